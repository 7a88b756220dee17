"""A detector of one engine in the other: equal weights, equal detections."""

from __future__ import annotations

import pytest
import torch

from mae_core.errors import UserError
from mae_core.weights.files import read_weights
from transfer.detection.config import DetectorConfig
from transfer.detection.engine import build_network, load_engine
from transfer.detection.run import evaluate_detector, train_detector
from transfer.detection.translation import names_of, to_detectron2, to_torchvision, translated
from transfer.engines import installed

detectron2 = [
    pytest.mark.detectron2,
    pytest.mark.skipif(not installed("detectron2"), reason="detectron2 is not installed; its page says how"),
]
NETWORKS = {
    "mask_rcnn": ("model.norm=ln", "model.box_convs=2", "model.rpn_convs=2", "model.mask_convs=2"),
    "one rpn convolution": ("model.norm=gn",),
    "no norm": ("model.norm=none", "model.box_convs=1"),
    "single": ("model.pyramid=single", "model.norm=ln"),
    "faster_rcnn": ("model.head=faster_rcnn",),
}


@pytest.mark.parametrize("options", NETWORKS.values(), ids=NETWORKS)
def test_there_and_back_is_the_same(configure_detection, options):
    config = configure_detection(*options)
    state = build_network(config, load_engine("torchvision"), 3).network.state_dict()
    back = to_torchvision(to_detectron2(state, config.model), config.model)
    assert list(back) == list(state)
    unread = ("box_predictor.bbox_pred", "mask_fcn_logits")
    for name, tensor in state.items():
        rows = (4 if "bbox" in name else 1) if any(part in name for part in unread) else 0
        assert torch.equal(back[name][rows:], tensor[rows:]) and not back[name][:rows].any(), name


def test_every_name_has_one_partner():
    rows = names_of(DetectorConfig())
    assert len(set(rows.values())) == len(rows)


def test_what_an_engine_cannot_run_is_refused_by_name():
    with pytest.raises(UserError, match=r"x is a cascade of engine detectron2, which engine torchvision cannot run"):
        translated({}, DetectorConfig(cascade=True), source="detectron2", engine="torchvision", path="x")


class TestBothEngines:
    """What needs detectron2."""

    pytestmark = detectron2

    @pytest.mark.parametrize("options", NETWORKS.values(), ids=NETWORKS)
    def test_equal_weights_find_equal_boxes(self, configure_detection, options):
        rest = (*options, "test.score_threshold=0", "test.detections=100", "sampling.proposals=200")
        rest = (*rest, "sampling.pre_nms_test=200")
        ours, theirs = (
            build_network(configure_detection(*rest, f"engine={name}"), load_engine(name), 3).network.eval()
            for name in ("torchvision", "detectron2")
        )
        torch.manual_seed(0)
        for name, parameter in ours.named_parameters():
            if "predictor" in name or "rpn.head" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        config = configure_detection(*rest).model
        state = to_detectron2(ours.state_dict(), config)
        wanted = theirs.state_dict()
        assert {name: t.shape for name, t in state.items()} == {name: t.shape for name, t in wanted.items()}
        theirs.load_state_dict(state)
        image = torch.rand(3, 64, 64)
        mean, std = [theirs.pixel_mean / 255, theirs.pixel_std / 255]
        with torch.no_grad():
            found = ours(((image - mean) / std)[None], [(64, 64)])[0]
            expected = theirs([{"image": 255 * image, "height": 64, "width": 64}])[0]["instances"]
        assert len(found["boxes"]) == len(expected) > 20
        torch.testing.assert_close(found["scores"], expected.scores, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found["boxes"], expected.pred_boxes.tensor, rtol=0, atol=1e-4)
        assert torch.equal(found["labels"] - 1, expected.pred_classes)

    @pytest.mark.parametrize("trainer, scorer", [("torchvision", "detectron2"), ("detectron2", "torchvision")])
    def test_a_detector_of_one_engine_is_scored_by_the_other(self, configure_detection, tmp_path, trainer, scorer):
        options = ("optim.epochs=8", "test.score_threshold=0.001", "test.detections=20")
        metrics = train_detector(configure_detection(*options, f"engine={trainer}"))
        asked = (f"engine={scorer}", f"weights={tmp_path / 'run'}", f"output={tmp_path / 'other'}")
        other = evaluate_detector(configure_detection(*asked, scratch=False))
        for kind in ("bbox", "segm"):
            assert other[kind]["AP"] == pytest.approx(metrics[kind]["AP"], abs=0.01)
        _, metadata = read_weights(tmp_path / "run" / "detector.safetensors")
        assert metadata["engine"] == trainer
