"""retinanet/config.py: what a file and the command line may say, and what is said back when they are wrong."""

from pathlib import Path

import pytest
import yaml

from retinanet.config import (
    Config,
    TrainConfig,
    config_for_inference,
    differences,
    load_config,
    parse_config,
    save_config,
    scale_to_batch,
)
from retinanet.errors import UserError


def fault(call, *arguments) -> str:
    """The one line of the UserError that the call raises."""
    with pytest.raises(UserError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


DATASET = {"path": "images", "annotations": "truth.json"}


class TestDefaults:
    def test_are_the_papers(self):
        config = Config()
        assert config.model.anchors.sizes == [32, 64, 128, 256, 512]
        assert config.model.anchors.scales == pytest.approx([1, 1.259921, 1.587401])
        assert config.model.anchors.ratios == [0.5, 1, 2]
        assert (config.model.prior, config.loss.alpha, config.loss.gamma) == (0.01, 0.25, 2)
        assert (config.loss.foreground_iou, config.loss.background_iou) == (0.5, 0.4)
        train = config.train
        assert (train.batch_size, train.learning_rate, train.momentum, train.weight_decay) == (16, 0.01, 0.9, 1e-4)
        post = config.postprocess
        assert (post.score_threshold, post.topk_per_level, post.nms_threshold, post.max_detections) == (0.05, 1000, 0.5, 100)

    def test_are_valid(self):
        assert Config.model_validate(Config().model_dump()) == Config()

    def test_are_not_shared_between_configs(self):
        one, other = Config(), Config()
        one.model.num_classes = 3
        one.model.anchors.sizes[0] = 16
        assert other.model.num_classes is None
        assert other.model.anchors.sizes[0] == 32

    def test_no_file_gives_them(self):
        assert load_config(None) == Config()

    def test_output_dir_is_named_after_the_file(self, tmp_path):
        path = write(tmp_path / "mine.yaml", "")
        assert load_config(path).output_dir == "runs/mine"
        assert load_config(path, ["output_dir=elsewhere"]).output_dir == "elsewhere"

    def test_json_schema_explains_most_fields(self):
        schema = Config.model_json_schema()
        sections = [part for name, part in schema["$defs"].items() if name.endswith("Config")]
        fields = [field for section in sections for field in section["properties"].values() if "$ref" not in field]
        assert len(fields) > 60
        assert sum("description" in field for field in fields) / len(fields) > 0.8
        assert all(section["additionalProperties"] is False for section in sections)


class TestUnknownKeys:
    @pytest.mark.parametrize(
        ("raw", "key", "near"),
        [
            ({"optput_dir": "x"}, "optput_dir", "'output_dir'"),
            ({"train": {"lerning_rate": 1}}, "train.lerning_rate", "'learning_rate'"),
            ({"model": {"anchors": {"size": [1]}}}, "model.anchors.size", "'sizes'"),
            ({"data": {"train": {**DATASET, "anotations": "x"}}}, "data.train.anotations", "'annotations'"),
            ({"max_steps": 3}, "max_steps", "'train.max_steps'"),  # right name, wrong place
            ({"batch_size": 3}, "batch_size", "'train.batch_size' or 'evaluation.batch_size'"),
        ],
    )
    def test_name_the_near_ones(self, raw, key, near):
        message = fault(parse_config, raw, "x.yaml")
        assert message.startswith(f"x.yaml: unknown key '{key}'. Did you mean ")
        assert near in message

    def test_without_a_near_one(self):
        assert fault(parse_config, {"train": {"qqq": 1}}) == "config: unknown key 'train.qqq'."

    def test_on_the_command_line(self):
        message = fault(load_config, None, ["train.momentm=0.5"])
        assert message == "the command line: unknown key 'train.momentm'. Did you mean 'momentum'?"


class TestWrongValues:
    @pytest.mark.parametrize(
        ("raw", "key", "value", "expectation"),
        [
            ({"train": {"batch_size": "many"}}, "train.batch_size", "'many'", "integer"),
            ({"train": {"batch_size": 0}}, "train.batch_size", "0", "greater than or equal to 1"),
            ({"train": {"batch_size": 2.5}}, "train.batch_size", "2.5", "integer"),
            ({"train": {"optimizer": "adam"}}, "train.optimizer", "'adam'", "'sgd' or 'adamw'"),
            ({"model": {"backbone": "resnet51"}}, "model.backbone", "'resnet51'", "'resnet50'"),
            ({"model": {"anchors": {"ratios": 2}}}, "model.anchors.ratios", "2", "list"),
            ({"model": {"anchors": {"ratios": [1, "wide"]}}}, "model.anchors.ratios.1", "'wide'", "number"),
            ({"input": {"mean": [1, 2]}}, "input.mean.2", "[1, 2]", "Field required"),
            ({"train": {"learning_rate": float("nan")}}, "train.learning_rate", "nan", "finite"),
            ({"loss": {"gamma": float("inf")}}, "loss.gamma", "inf", "finite"),
            ({"model": {"anchors": {"scales": [float("nan")]}}}, "model.anchors.scales.0", "nan", "finite"),
            ({"train": {"milestones": [60000]}}, "train.milestones.0", "60000", "less than or equal to 1"),
            ({"train": None}, "train", "None", "'key: value' pairs"),
            ({"data": {"train": "images"}}, "data.train", "'images'", "'key: value' pairs"),
            ({"augment": {"transforms": [3]}}, "augment.transforms.0", "3", "name"),
        ],
    )
    def test_key_value_and_expectation_are_named(self, raw, key, value, expectation):
        message = fault(parse_config, raw)
        assert message.startswith(f"config: {key}: ")
        assert f"(got {value})" in message
        assert expectation in message

    def test_every_fault_is_named(self):
        message = fault(parse_config, {"seed": -1, "train": {"optimizer": "x", "betas": [1]}, "nonsense": 1})
        for key in ("seed", "train.optimizer", "train.betas", "nonsense"):
            assert key in message

    @pytest.mark.parametrize(
        ("raw", "clause"),
        [
            ({"model": {"anchors": {"sizes": [32, 64]}}}, "sizes needs one number for each of P3..P7 (5)"),
            ({"model": {"anchors": {"ratios": []}}}, "ratios at least one"),
            ({"model": {"anchors": {"ratios": [-1]}}}, "must be positive"),
            ({"loss": {"background_iou": 0.6}}, "background_iou must not exceed foreground_iou"),
            ({"data": {"val": {"format": "voc"}}}, "data.val.path: Field required"),
        ],
    )
    def test_that_fit_their_type_but_not_each_other(self, raw, clause):
        assert clause in fault(parse_config, raw)

    def test_voc_needs_no_annotations(self):
        assert parse_config({"data": {"val": {"format": "voc", "path": "x"}}}).data.val.annotations is None

    def test_a_data_set_knows_under_which_name_it_stands_unless_it_is_told_another(self):
        data = parse_config({"data": {"train": {"path": "x"}, "test": {"path": "x", "part": "val"}}}).data
        assert (data.train.part, data.val, data.test.part) == ("train", None, "val")

    def test_assignment_is_checked_too(self):
        config = Config()
        with pytest.raises(ValueError, match="greater than or equal to 1"):
            config.train.batch_size = 0

    def test_a_transform_may_stand_without_arguments(self):
        raw = yaml.safe_load("augment: {transforms: [HorizontalFlip, {VerticalFlip: }, {Transpose: {p: 0.1}}]}")
        assert parse_config(raw).augment.transforms == ["HorizontalFlip", {"VerticalFlip": {}}, {"Transpose": {"p": 0.1}}]

    def test_a_transform_written_another_way_is_explained(self):
        message = fault(parse_config, {"augment": {"transforms": [{"name": "HorizontalFlip", "p": 0.5}]}})
        assert message == "config: augment.transforms.0: expected a transform's name, or 'name: {argument: value}'"


class TestOverrides:
    def test_parse_as_yaml(self):
        config = load_config(
            None,
            [
                "train.learning_rate=1e-3",
                "train.batch_size=4",
                "train.betas=[0.8, 0.9]",
                "train.clip_grad_norm=null",
                "train.compile=true",
                "model.anchors.sizes=[8, 16, 32, 64, 128]",
                "model.backbone_weights=none",
                "data.val={path: images, annotations: truth.json}",
                "data.train.path=a=b",
                "data.train.annotations=truth.json",
                "augment.transforms=[]",
            ],
        )
        assert (config.train.learning_rate, config.train.batch_size, config.train.betas) == (0.001, 4, (0.8, 0.9))
        assert config.train.clip_grad_norm is None
        assert config.train.compile is True
        assert config.model.anchors.sizes == [8, 16, 32, 64, 128]
        assert config.model.backbone_weights == "none"
        assert (config.data.val.path, config.data.train.path) == ("images", "a=b")
        assert config.augment.transforms == []

    def test_win_over_the_file_and_leave_the_rest(self, tmp_path):
        path = write(tmp_path / "c.yaml", "train: {learning_rate: 0.5, weight_decay: 0.25}\nseed: 3\n")
        config = load_config(path, ["train.learning_rate=0.125"])
        assert (config.train.learning_rate, config.train.weight_decay, config.seed) == (0.125, 0.25, 3)

    @pytest.mark.parametrize("text", ["train.batch_size", "=8", ""])
    def test_without_key_or_value(self, text):
        assert fault(load_config, None, [text]) == f"'{text}': expected key.sub=value, e.g. train.batch_size=8"

    def test_with_invalid_yaml(self):
        assert fault(load_config, None, ["train.betas=[0.9,"]) == "'train.betas=[0.9,': the value is not valid YAML"

    def test_below_a_value(self):
        assert fault(load_config, None, ["seed.x=3"]).startswith("the command line: seed: Input should be a valid integer")

    def test_one_length_replaces_the_other(self, tmp_path):
        in_epochs = write(tmp_path / "epochs.yaml", "train: {epochs: 12}\n")
        in_steps = write(tmp_path / "steps.yaml", "train: {max_steps: 900}\n")
        for path, override, expected in (
            (in_epochs, "train.max_steps=7", (None, 7)),
            (in_steps, "train.epochs=0.5", (0.5, None)),
            (in_epochs, "train.epochs=3", (3, None)),
            (in_epochs, "train.max_steps=null", (12, None)),  # null chooses nothing
        ):
            train = load_config(path, [override]).train
            assert (train.epochs, train.max_steps) == expected


class TestFiles:
    def test_missing_names_a_near_one(self, tmp_path):
        write(tmp_path / "retinanet_r50_1x.yaml", "")
        message = fault(load_config, tmp_path / "retinanet_r50.yaml")
        assert message.endswith("retinanet_r50.yaml does not exist. Did you mean 'retinanet_r50_1x.yaml'?")

    def test_missing_with_its_folder(self, tmp_path):
        assert fault(load_config, tmp_path / "no" / "c.yaml").endswith("c.yaml does not exist.")

    @pytest.mark.parametrize(
        ("text", "clause"),
        [
            ("train: [1,\nseed: 2\n", "is not valid YAML"),
            ("- train\n- seed\n", "expected 'key: value' lines, got list"),
            ("hello\n", "expected 'key: value' lines, got str"),
            ("seed: 1\ntrain: {epochs: 1}\nseed: 2\n", "key 'seed' stands here twice"),
            ("train:\n  epochs: 1\n  epochs: 2\n", "key 'epochs' stands here twice"),
            ("1: 2\n", "Keys should be strings"),
        ],
    )
    def test_malformed(self, tmp_path, text, clause):
        path = write(tmp_path / "c.yaml", text)
        message = fault(load_config, path)
        assert str(path) in message
        assert clause in message

    def test_unreadable(self, tmp_path):
        assert "cannot be read" in fault(load_config, tmp_path)
        (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00train")
        assert "cannot be read" in fault(load_config, tmp_path / "c.yaml")

    def test_a_key_may_stand_once_in_each_section(self, tmp_path):
        path = write(tmp_path / "c.yaml", "train: {batch_size: 2}\nevaluation: {batch_size: 3}\n")
        config = load_config(path)
        assert (config.train.batch_size, config.evaluation.batch_size) == (2, 3)

    def test_round_trip_is_identical(self, tmp_path):
        source = write(
            tmp_path / "c.yaml",
            """
            data: {train: {path: Bilder/größe, annotations: t.json}}
            augment: {transforms: [Transpose, {HorizontalFlip: {p: 0.25}}], short_edges: [64, 96]}
            train: {epochs: 3, learning_rate: 0.00001, batch_size: 8, reference_batch_size: 16, ema_decay: 0.9998}
            model: {anchors: {sizes: [16, 32, 64, 128, 256]}}
            """,
        )
        config = load_config(source)
        saved = tmp_path / "config.yaml"
        save_config(config, saved)
        again = load_config(saved)
        assert again == config
        save_config(again, tmp_path / "again.yaml")
        assert (tmp_path / "again.yaml").read_bytes() == saved.read_bytes()


class TestScaling:
    def test_rate_with_the_batch_and_steps_against_it(self, capsys):
        train = TrainConfig(batch_size=4, reference_batch_size=16, learning_rate=0.02, max_steps=300_000, warmup_steps=500)
        scale_to_batch(train)
        assert (train.learning_rate, train.max_steps, train.warmup_steps) == (0.005, 1_200_000, 2000)
        expected = "learning_rate 0.02 -> 0.005, max_steps 300000 -> 1200000, warmup_steps 500 -> 2000"
        assert capsys.readouterr().out == f"batch 4 instead of 16: {expected}\n"

    def test_happens_once(self):
        train = TrainConfig(batch_size=4, reference_batch_size=16, learning_rate=0.02)
        scale_to_batch(train)
        scale_to_batch(train)
        assert (train.learning_rate, train.reference_batch_size) == (0.005, None)

    @pytest.mark.parametrize("reference", [None, 4])
    def test_nothing_to_scale(self, reference, capsys):
        train = TrainConfig(batch_size=4, reference_batch_size=reference, learning_rate=0.02)
        scale_to_batch(train)
        assert train.learning_rate == 0.02
        assert capsys.readouterr().out == ""

    def test_is_said_by_one_rank_only(self, capsys, monkeypatch):
        monkeypatch.setenv("RANK", "1")
        train = TrainConfig(batch_size=4, reference_batch_size=16)
        scale_to_batch(train)
        assert train.learning_rate == 0.0025
        assert capsys.readouterr().out == ""


def test_another_data_set_by_hand_leaves_the_first_ones_description_behind(tmp_path):
    """Its boxes on other pictures would be a quiet disaster."""
    file = tmp_path / "a.yaml"
    file.write_text("data: {train: {path: a, annotations: a.json, format: coco}, val: {path: v, annotations: v.json}}")
    data = load_config(file, ["data.train.path=b"]).data
    assert (data.train.path, data.train.annotations, data.train.format) == ("b", None, "auto")
    assert (data.val.path, data.val.annotations) == ("v", "v.json")


def test_one_length_by_hand(tmp_path):
    message = fault(load_config, None, ["train.max_steps=2", "train.epochs=1"])
    assert message == "the command line: set at most one of train.epochs and train.max_steps"
    assert load_config(None, ["train.max_steps=2", "train.epochs=null"]).train.max_steps == 2


def test_a_fault_is_looked_for_where_it_can_be(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("seed: 1")
    assert fault(load_config, file, ["train.sedd=2"]).startswith(f"{file} and the command line: unknown key 'train.sedd'")


class TestForInference:
    trained = parse_config(
        {
            "model": {"num_classes": 3, "backbone": "resnet18"},
            "input": {"short_edge": 320},
            "data": {"val": {"path": "old", "annotations": "old.json"}},
            "evaluation": {"batch_size": 2},
            "train": {"learning_rate": 0.5},
        }
    )

    def test_without_a_config_the_checkpoints_holds(self):
        config, notes = config_for_inference(self.trained, None, [])
        assert config == self.trained
        assert notes == []

    def test_data_and_evaluation_come_from_the_config_the_rest_from_the_weights(self):
        asked = parse_config(
            {
                "model": {"backbone": "resnet50"},
                "input": {"short_edge": 800},
                "data": {"test": {"path": "new", "annotations": "new.json"}},
                "evaluation": {"split": "test"},
                "postprocess": {"nms_threshold": 0.6},
                "train": {"learning_rate": 0.25},
            }
        )
        config, notes = config_for_inference(self.trained, asked, [])
        assert (config.model, config.input, config.postprocess) == (
            self.trained.model,
            self.trained.input,
            self.trained.postprocess,
        )
        assert (config.data, config.evaluation) == (asked.data, asked.evaluation)
        assert config.train == self.trained.train
        assert notes == [  # what the config asks for in vain; the classes, which it leaves open, are no contradiction
            "note: model.backbone is resnet18 as the weights say, not resnet50 as the config does",
            "note: input.short_edge is 320 as the weights say, not 800 as the config does",
            "note: postprocess.nms_threshold is 0.5 as the weights say, not 0.6 as the config does",
        ]

    def test_what_is_given_by_hand_wins_over_both(self):
        asked = parse_config({"data": {"val": {"path": "new", "annotations": "new.json"}}, "input": {"short_edge": 320}})
        overrides = ["postprocess.max_detections=300", "data.val.path=third", "evaluation.batch_size=8"]
        config, notes = config_for_inference(self.trained, asked, overrides)
        assert (config.postprocess.max_detections, config.data.val.path, config.evaluation.batch_size) == (300, "third", 8)
        assert config.data.val.annotations is None  # they described the other data
        assert notes == [  # a config without `model.backbone` means the default one
            "note: model.backbone is resnet18 as the weights say, not resnet50 as the config does",
            "note: data.val.path is third instead of new",
            "note: data.val.annotations is None instead of new.json",
            "note: postprocess.max_detections is 300 instead of 100",
        ]

    def test_the_same_path_by_hand_changes_nothing(self):
        asked = parse_config({"data": {"val": {"path": "new", "annotations": "new.json"}}})
        config, _ = config_for_inference(self.trained, asked, ["data.val.path=new"])
        assert config.data.val == asked.data.val
        config, _ = config_for_inference(self.trained, asked, ["data.val.annotations=other.json", "data.val.path=third"])
        assert (config.data.val.path, config.data.val.annotations) == ("third", "other.json")  # in any order

    def test_what_is_wrong_by_hand_is_an_error(self):
        message = fault(config_for_inference, self.trained, None, ["postprocess.max_detection=3"])
        assert message == "the command line: unknown key 'postprocess.max_detection'. Did you mean 'max_detections'?"

    def test_leaves_the_checkpoints_own_config_alone(self):
        before = self.trained.model_dump()
        config_for_inference(self.trained, parse_config({}), ["model.anchors.ratios=[1]", "input.short_edge=64"])
        assert self.trained.model_dump() == before


class TestDifferences:
    def test_are_flat_pairs(self):
        old = parse_config({"seed": 1, "train": {"betas": [0.8, 0.9]}})
        new = parse_config({"seed": 2, "train": {"betas": [0.8, 0.95]}})
        assert differences(old, new) == {"seed": (1, 2), "train.betas": ([0.8, 0.9], [0.8, 0.95])}
        assert differences(old, old) == {}

    def test_see_what_came_and_what_went(self):
        without, with_data = parse_config({}), parse_config({"data": {"val": DATASET}})
        came = differences(without, with_data)
        went = differences(with_data, without)
        assert came == {
            "data.val.path": (None, "images"),
            "data.val.annotations": (None, "truth.json"),
            "data.val.format": (None, "auto"),
            "data.val.one_based": (None, False),
            "data.val.part": (None, "val"),
        }
        assert went == {key: (new, old) for key, (old, new) in came.items()}
