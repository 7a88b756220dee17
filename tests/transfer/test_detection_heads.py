"""Heads and engines are rows: boxes alone on both engines, and a toy head and a toy engine through the command."""

from __future__ import annotations

import json
import re
import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from mae_core.config.load import load_config
from mae_core.config.schema import ConfigError
from mae_core.errors import UserError
from mae_core.weights.files import read_weights
from transfer.detection.config import DetectionConfig, DetectorConfig, InferenceConfig, SamplingConfig
from transfer.detection.engine import DetectorEngine, assemble, build_network, load_engine
from transfer.detection.engine_torchvision import training
from transfer.detection.engine_torchvision.regions import MASKS_AT_ONCE, mask_targets
from transfer.detection.heads import HEADS, Head
from transfer.detection.plan import print_plan
from transfer.detection.predict import predict
from transfer.detection.run import evaluate_detector, train_detector
from transfer.detection.train_net import main
from transfer.engines import DETECTION, Engine, installed
from transfer.pyramid import NORMS, PyramidBackbone

ENGINES = [
    "torchvision",
    pytest.param(
        "detectron2",
        marks=[
            pytest.mark.detectron2,
            pytest.mark.skipif(not installed("detectron2"), reason="detectron2 is not installed; its page says how"),
        ],
    ),
]
BOXES = ("model.head=faster_rcnn", "test.score_threshold=0.001", "test.detections=20", "test.picture_score=0")


@pytest.fixture
def boxes_alone(tmp_path, write_coco):
    """A COCO set whose annotations have no segmentation."""
    root = write_coco(tmp_path / "boxes", val_seed=0)
    for half in ("train", "val"):
        path = root / "annotations" / f"instances_{half}.json"
        content = json.loads(path.read_text())
        for annotation in content["annotations"]:
            del annotation["segmentation"]
        path.write_text(json.dumps(content))
    return root


@pytest.mark.parametrize("engine", ENGINES)
def test_boxes_alone_train_score_predict_and_are_drawn(
    engine, configure_detection, boxes_alone, tmp_path, break_off_and_resume
):
    own = (*BOXES, f"engine={engine}", f"data.path={boxes_alone}", "optim.epochs=4", "log.checkpoint_every=2")
    config = configure_detection(*own)
    module = sys.modules[load_engine(engine).fit.__module__]
    break_off_and_resume(config, module, "detection_losses" if engine == "torchvision" else "records")
    run = tmp_path / "run"
    metrics = json.loads((run / "metrics.json").read_text())
    assert "segm" not in metrics and 0 <= metrics["bbox"]["AP"] <= 1
    if engine == "detectron2":
        assert metrics["detectron2"].keys() == {"bbox"}
    state, metadata = read_weights(run / "detector.safetensors")
    assert metadata["detector"]["head"] == "faster_rcnn" and not [name for name in state if "mask" in name]
    predictions = json.loads((run / "predictions.json").read_text())
    assert predictions and not any("segmentation" in p for p in predictions)
    assert (run / "pictures" / "val_000.png").is_file()

    asked = (f"engine={engine}", f"data.path={boxes_alone}", f"weights={run}", f"output={tmp_path / 'again'}")
    assert evaluate_detector(configure_detection(*asked, scratch=False))["bbox"] == metrics["bbox"]
    truth = boxes_alone / "annotations" / "instances_val.json"
    found = predict(run, [boxes_alone / "val"], tmp_path / "found", truth=truth, overrides=["device=cpu"])
    assert len(found.found) == 3 and all(detections.codes is None for detections in found.found)
    assert (tmp_path / "found" / "pictures" / "000.png").is_file()


def test_boxes_alone_are_planned_by_the_dry_run(configure_detection, boxes_alone):
    said: list[str] = []
    print_plan(configure_detection(*BOXES, f"data.path={boxes_alone}"), 1, said.append)
    assert said[-1] == "dry run: nothing was written" and any("memory, estimated" in line for line in said)


def test_the_losses_of_boxes_alone_are_those_of_mask_rcnn_without_masks(configure_detection):
    networks = [
        build_network(configure_detection(f"model.head={head}"), load_engine("torchvision"), 3).network
        for head in ("faster_rcnn", "mask_rcnn")
    ]
    boxes, both = (dict(network.named_parameters()) for network in networks)
    assert set(boxes) < set(both) and all("mask" in name for name in set(both) - set(boxes))


class OneBox(nn.Module):
    """A toy: the mean of the coarsest map gives one box and its class."""

    def __init__(self, backbone: PyramidBackbone, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.answer = nn.Linear(backbone.levels[-1].channels, 4 + num_classes)

    def forward(self, pixels, sizes, targets=None):
        """Losses, or boxes."""
        answers = self.answer(list(self.backbone(pixels).values())[-1].mean(dim=(2, 3)))
        boxes, logits = answers[:, :4].sigmoid() * pixels.shape[-1], answers[:, 4:]
        if targets is None:
            corners = torch.cat([boxes[:, :2].minimum(boxes[:, 2:]), boxes[:, :2].maximum(boxes[:, 2:])], dim=1)
            return [
                {"boxes": box[None], "scores": score[None], "labels": label[None] + 1}
                for box, (score, label) in zip(corners, map(lambda x: x.softmax(0).max(0), logits), strict=True)
            ]
        assert all(target.keys() == {"boxes", "labels"} for target in targets)
        truth = torch.stack([target["boxes"][0] for target in targets])
        labels = torch.stack([target["labels"][0] for target in targets]) - 1
        return {"box_loss": (boxes - truth).abs().mean(), "class_loss": nn.functional.cross_entropy(logits, labels)}


def one_box(
    backbone: PyramidBackbone, num_classes: int, config: DetectorConfig, sampling: SamplingConfig, test: InferenceConfig
) -> OneBox:
    return OneBox(backbone, num_classes)


@pytest.fixture
def toy_head(monkeypatch):
    builders = {"torchvision": one_box, "toy": one_box}
    parts = ("boxes", "labels")
    monkeypatch.setitem(HEADS, "one_box", Head(parts, (*parts, "scores"), {"bbox": "box"}, ("boxes",), builders))


@pytest.fixture
def toy_engine(monkeypatch):
    """A third engine: one package and one row."""

    def backbone(vit, config):
        return PyramidBackbone(vit, kind=config.pyramid, channels=config.fpn_channels, norm=NORMS[config.norm])

    package = ModuleType("toy_engine")
    loop = (training.fit_in_core_loop, training.detect, training.score_by_detecting)
    package.ENGINE = DetectorEngine(backbone, lambda *_: None, *loop)
    monkeypatch.setitem(sys.modules, "toy_engine", package)
    monkeypatch.setitem(DETECTION, "toy", Engine(packages=(), install="", module="toy_engine"))


@pytest.mark.parametrize("engine", ["torchvision", "toy"])
def test_a_toy_head_trains_scores_and_predicts_by_the_command(
    engine, toy_head, toy_engine, tiny_detector, boxes_alone, tmp_path, capsys
):
    run = tmp_path / "run"
    options = [*tiny_detector, f"engine={engine}", "model.head=one_box", f"data.path={boxes_alone}", "optim.epochs=1"]
    main([*options, f"output={run}", "--dry-run"])
    assert "memory: not estimated for model.head=one_box" in capsys.readouterr().out and not run.exists()
    main([*options, f"output={run}"])
    assert json.loads((run / "metrics.json").read_text())["training"]["steps"] == 1
    recipe = run / "config.yaml"  # which says from_scratch: true
    main(["--eval-only", "--config-file", str(recipe), f"weights={run}", f"output={tmp_path / 'b'}"])
    scores = [json.loads((path / "metrics.json").read_text())["bbox"] for path in (run, tmp_path / "b")]
    assert scores[0] == scores[1]
    assert len(predict(run, [boxes_alone / "val" / "000.png"], tmp_path / "c", overrides=["device=cpu"]).found) == 1


def test_what_an_engine_lacks_is_named_with_the_engines_that_have_it(toy_engine, monkeypatch):
    for option, able in (("model.cascade=true", "detectron2"), ("ema=0.9", "torchvision")):
        with pytest.raises(ConfigError, match=rf"{option.partition('=')[0]} needs engine={able}, not toy"):
            load_config(DetectionConfig, None, ["from_scratch=true", "engine=toy", option])
    with pytest.raises(UserError, match=r"model\.head=mask_rcnn needs engine=torchvision or detectron2, not toy"):
        train_detector(load_config(DetectionConfig, None, ["from_scratch=true", "engine=toy"]))
    monkeypatch.setitem(DETECTION, "toy", DETECTION["toy"]._replace(can=("ema",)))
    with pytest.raises(ConfigError, match="ema needs engine=torchvision or toy, not detectron2"):
        load_config(DetectionConfig, None, ["from_scratch=true", "engine=detectron2", "ema=0.9"])


def test_no_file_but_its_own_package_and_two_tables_knows_an_engine_by_name(pytestconfig):
    folder = pytestconfig.rootpath / "transfer" / "detection"
    for path in folder.glob("*.py"):
        if path.name not in ("heads.py", "translation.py"):
            code = re.sub(r"other_word\(.*?\)", "", path.read_text())  # words of command lines
            assert "engine == " not in code and '"detectron2"' not in code, path.name


# ---- numbers of the torchvision engine


def published_network(num_classes: int = 3) -> nn.Module:
    from transfer.backbone import DenseViT

    torch.manual_seed(0)
    vit = DenseViT("nano", image_size=64, patch_size=16)
    return assemble(vit, num_classes, DetectorConfig(norm="gn"), SamplingConfig(), InferenceConfig())


def test_the_heads_start_as_published():
    """detectron2: N(0, 0.001) in the last layer of masks, Xavier (fan-in) in hidden linear layers, N(0, 0.01) and
    N(0, 0.001) in the outputs of boxes."""
    heads = published_network().roi_heads
    (hidden,) = (layer for layer in heads.box_head.modules() if isinstance(layer, nn.Linear))
    assert hidden.weight.std().item() == pytest.approx(hidden.in_features**-0.5, rel=0.01)  # 0.0089
    expected = {
        heads.mask_predictor.mask_fcn_logits: 0.001,
        heads.box_predictor.cls_score: 0.01,
        heads.box_predictor.bbox_pred: 0.001,
    }
    for layer, std in expected.items():
        assert layer.weight.std().item() == pytest.approx(std, rel=0.08) and not layer.bias.any()


def test_the_first_mask_loss_is_that_of_a_coin():
    heads = published_network().roi_heads
    logits = heads.mask_predictor(heads.mask_head(torch.randn(4, 256, 14, 14)))
    truth = (torch.rand_like(logits) > 0.5).float()
    assert nn.functional.binary_cross_entropy_with_logits(logits, truth).item() == pytest.approx(0.6931, abs=2e-3)


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_anchors_are_not_rounded(scale):
    from transfer.backbone import DenseViT
    from transfer.detection.engine_torchvision.network import proposal_network

    backbone = PyramidBackbone(DenseViT("nano", image_size=64, patch_size=16), channels=16, norm=None)
    anchors = proposal_network(backbone, DetectorConfig(anchor_scale=scale), SamplingConfig()).anchor_generator
    for stride, cells in zip((4, 8, 16, 32, 64), anchors.cell_anchors, strict=True):
        for ratio, (x1, y1, x2, y2) in zip((0.5, 1.0, 2.0), cells.tolist(), strict=True):
            assert (x2 - x1) * (y2 - y1) == pytest.approx((scale * stride) ** 2, rel=1e-5)
            assert (y2 - y1) / (x2 - x1) == pytest.approx(ratio, rel=1e-5) and x1 == -x2 and y1 == -y2


def test_mask_targets_are_the_same_without_all_masks_as_numbers():
    from torchvision.ops import roi_align

    torch.manual_seed(0)
    masks = torch.rand(3 * MASKS_AT_ONCE + 5, 60, 80) > 0.4
    corners = 40 * torch.rand(120, 2)
    boxes = torch.cat([corners, corners + 1 + 30 * torch.rand(120, 2)], dim=1)
    index = torch.randint(0, len(masks), (120,))
    rois = torch.cat([index[:, None].float(), boxes], dim=1)
    whole = (roi_align(masks[:, None].float(), rois, 28, aligned=True)[:, 0] >= 0.5).float()
    largest: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor) and made.is_floating_point():
                largest.append(made.untyped_storage().nbytes())
            return made

    with Watch():
        found = mask_targets(masks, boxes, index, 28)
    assert torch.equal(found, whole)
    assert max(largest) <= max(MASKS_AT_ONCE * 60 * 80 * 4, found.nbytes)
