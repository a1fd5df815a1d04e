# `make demo` and `make test` work on a machine that has nothing but Python (3.11 or newer) and make.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
CONFIG ?= configs/demo.yaml
WEIGHTS ?= runs/demo/best.pt
DEMO_RUN ?= runs/demo
MEASURE ?= all

.PHONY: help setup demo demo-smoke test test-slow test-faults test-faults-long mutation-check lint format train evaluate predict benchmark tensorboard clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

setup: $(VENV)/.ready  ## make .venv with everything the project needs

$(VENV)/.ready: requirements.txt requirements-dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	@echo "installing into $(VENV): about 5.5 GB, a few minutes ..."
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

demo: setup  ## draw a data set, train on it, evaluate, predict; goes on where it was stopped
	$(RUN) datasets/make_shapes.py --preset demo --out datasets/shapes
	$(RUN) tools/train.py configs/demo.yaml --resume output_dir=$(DEMO_RUN) $(DEMO_OPTIONS)
	$(RUN) tools/evaluate.py --weights $(DEMO_RUN)/best.pt
	$(RUN) tools/predict.py datasets/shapes/val --weights $(DEMO_RUN)/best.pt --sheet
	@echo "look at $(DEMO_RUN)/predictions/sheet.jpg"

demo-smoke:  ## the demo's road in a minute, without its result
	rm -rf runs/demo-smoke
	$(MAKE) demo DEMO_RUN=runs/demo-smoke DEMO_OPTIONS="train.max_steps=12"

test: setup  ## the fast tests
	$(RUN) -m pytest -m "not slow" --numprocesses auto

test-slow: setup  ## the slow ones, fault injection in short among them
	$(RUN) -m pytest -m slow

test-faults: setup  ## runs that are killed, starved and lied to: a few minutes
	$(RUN) -m pytest tests/faults

test-faults-long: setup  ## the same at length: 60 runs killed at random, 24 minutes of random data
	RETINANET_FAULTS_MINUTES=24 $(RUN) -m pytest --numprocesses 2 --dist worksteal tests/faults

mutation-check: setup  ## takes each guard of docs/security.md out of a copy; a test must notice
	$(RUN) tests/mutation_check.py

lint: setup  ## style, errors, types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: setup  ## put the code in the project's format
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

train: setup  ## make train CONFIG=configs/finetune.yaml OPTIONS="data.train.path=..."
	$(RUN) tools/train.py $(CONFIG) $(OPTIONS)

evaluate: setup  ## make evaluate WEIGHTS=runs/demo/best.pt
	$(RUN) tools/evaluate.py --weights $(WEIGHTS) $(OPTIONS)

predict: setup  ## make predict WEIGHTS=runs/demo/best.pt INPUT=photos/
	$(RUN) tools/predict.py $(INPUT) --weights $(WEIGHTS) $(OPTIONS)

benchmark: setup  ## speed and memory beside torchvision and pycocotools; MEASURE=loss for one
	$(RUN) tools/benchmark.py $(MEASURE) --json runs/benchmark/$(MEASURE).json --chart runs/benchmark/$(MEASURE).png $(OPTIONS)

tensorboard: setup  ## curves and pictures of all runs
	$(VENV)/bin/tensorboard --logdir runs

clean:  ## remove the virtual environment, runs and caches (data stays)
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
