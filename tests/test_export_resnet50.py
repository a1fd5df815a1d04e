"""A detector of full size as an ONNX file: on photographs it finds what the checkpoint finds."""

from pathlib import Path

import pytest
import torch
from equality import compare
from peers import Found

from retinanet.checkpoint import Checkpoint
from retinanet.config import parse_config
from retinanet.model import build_model
from retinanet.predictor import Predictor, to_array
from retinanet.weights.layout import COCO_CATEGORIES

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@torch.no_grad()
def lively_resnet50(image: torch.Tensor) -> Checkpoint:
    """Random weights whose scores are spread, of which about one in a thousand passes the threshold of 0.05."""
    torch.manual_seed(0)
    config = parse_config(
        {
            "model": {"num_classes": 80, "backbone_weights": "none", "norm": "batch", "head_norm": "group"},
            "input": {"short_edge": 256, "long_edge": 416},
        }
    )
    model = build_model(config.model, config.input, trained_backbone=False)
    model.backbone.train()  # statistics that fit, or the activations would grow from block to block
    for module in model.backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.train()
            module.momentum = None
    model(image)
    model.eval()
    predictions = model(image)
    final = model.cls_subnet.final
    scale = 1 / predictions.cls_logits.std()
    final.weight.mul_(scale)
    limit = ((predictions.cls_logits - final.bias[0]) * scale).flatten().kthvalue(int(predictions.cls_logits.numel() * 0.999))
    final.bias.fill_(-2.944 - float(limit.values))  # the logit of 0.05
    model.box_subnet.final.weight.mul_(0.2 / predictions.box_deltas.std())
    return Checkpoint(config, COCO_CATEGORIES, model.state_dict())


@pytest.mark.slow
def test_the_same_is_found_in_photographs(real_data: Path, tmp_path: Path) -> None:
    from retinanet.onnx.export import export_onnx

    files = sorted((real_data / "coco_mini" / "val2017").glob("*.jpg"))[:20]
    image = torch.from_numpy(to_array(files[0])).permute(2, 0, 1)[None, :, :256, :384]
    checkpoint = lively_resnet50(image)
    export_onnx(checkpoint, tmp_path / "r50.onnx", nms=True, dynamic=True)
    ours = Predictor.from_checkpoint(checkpoint, score_threshold=0.05, precision="fp32", device="cpu")
    theirs = Predictor.load(tmp_path / "r50.onnx", score_threshold=0.05, device="cpu")
    found = [[Found(d.boxes, d.scores, d.labels) for d in predictor(list(files), 4)] for predictor in (ours, theirs)]
    same = compare(*found, scores=1e-3, pixels=0.1)
    print(same)
    assert same.count >= 500 and same.share >= 0.999
