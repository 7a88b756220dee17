"""``mae detect export``: onnxruntime finds in an image what the detector finds in it, however much that is."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import transfer
from mae_core.cli.main import app
from mae_core.config.load import load_config
from mae_core.errors import UserError
from mae_core.weights.files import read_weights, write_weights
from transfer.detection.config import DetectionConfig
from transfer.detection.export import _difference, export
from transfer.detection.run import train_detector

pytest.importorskip("pycocotools", reason="pip install mae-transfer[detection]")
onnxruntime = pytest.importorskip("onnxruntime", reason="pip install mae-transfer[onnx]")
SCORES = ("test.score_threshold=0.1", "test.detections=100", "test.picture_score=0", "optim.base_lr=0.06")
KINDS = {"mask_rcnn": ("model.norm=gn",), "faster_rcnn": ("model.head=faster_rcnn", "model.pyramid=simple")}


@pytest.fixture(scope="module", params=KINDS)
def run(request, tmp_path_factory, detection_root, tiny_detector):
    folder = tmp_path_factory.mktemp(request.param) / "run"
    own = (f"data.path={detection_root}", f"output={folder}", "optim.epochs=4", *KINDS[request.param], *SCORES)
    train_detector(load_config(DetectionConfig, None, [*tiny_detector, *own]))
    return folder


def pictures() -> list[np.ndarray]:
    """Images that fill the canvas: black, noise, and some with shapes on a dark ground."""
    rng = np.random.default_rng(0)
    found = [np.zeros((64, 64, 3), np.uint8), rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)]
    for number in range(4):
        image = rng.integers(0, 50, (64, 64, 3), dtype=np.uint8)
        for _ in range(number + 1):
            x, y, w, h = rng.integers(2, 30, 4)
            image[y : y + h, x : x + w] = [(220, 60, 60), (60, 220, 60), (80, 80, 240)][rng.integers(3)]
        found.append(image)
    return found


@pytest.mark.parametrize("half", [False, True])
def test_the_file_finds_what_the_detector_finds(run, tmp_path, half):
    out = tmp_path / "detector.onnx"
    result = CliRunner().invoke(app, ["detect", "export", str(run), "--out", str(out), *(["--half"] * half)])
    assert result.exit_code == 0 and f"wrote {out} for images of 64x64: boxes, scores, labels" in result.output
    detector = transfer.load_detector(run, device="cpu", overrides=["precision=fp32"])
    if half:  # rounded weights: the detector's own, with as many digits
        for tensor in detector.model.parameters():
            tensor.data.copy_(tensor.data.half() if tensor.numel() >= 1024 else tensor.data)
        assert out.stat().st_size < 0.65 * (run / "detector.safetensors").stat().st_size
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    categories = json.loads(session.get_modelmeta().custom_metadata_map["categories"])
    assert [name for _, name in categories] == detector.classes
    numbers = set()
    for image in pictures():
        boxes, scores, labels, *masks = session.run(None, {"images": image.astype(np.float32).transpose(2, 0, 1)[None]})
        expected = detector.predict(image)
        numbers.add(len(expected))
        assert labels.tolist() == expected.labels.tolist()
        np.testing.assert_allclose(boxes, expected.boxes, atol=1e-3)
        np.testing.assert_allclose(scores, expected.scores, atol=1e-3)
        assert [mask.shape for mask in masks] == [(len(boxes), 28, 28)] * (expected.codes is not None)
    assert len(numbers) > 2


def test_what_cannot_be_written_is_refused(run, tmp_path):
    (tmp_path / "there.onnx").write_text("kept")
    for out, options, message in (
        ("there.onnx", {}, "there.onnx exists; choose another --out"),
        ("a.pt", {}, "has to end in .onnx"),
        ("a.onnx", {"size": (0, 4)}, "give two positive numbers"),
    ):
        with pytest.raises(UserError, match=message):
            export(run, tmp_path / out, **options)
    assert (tmp_path / "there.onnx").read_text() == "kept" and not (tmp_path / "a.onnx").exists()


def test_an_image_in_which_nothing_is_found_is_no_error(run, tmp_path):
    """Regions of no size at all, with the group norm of the recipes for small data."""
    out = tmp_path / "strict.onnx"
    tensors, metadata = read_weights(run / "detector.safetensors")
    strict = {**metadata["test"], "score_threshold": 0.9999}
    write_weights(tmp_path / "strict.safetensors", tensors, {**metadata, "test": strict})
    export(tmp_path / "strict.safetensors", out)
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    found = session.run(None, {"images": np.zeros((1, 3, 64, 64), np.float32)})
    assert [len(values) for values in found] == [0] * len(found)


def test_objects_of_equal_scores_may_stand_in_another_order(tmp_path):
    """As those of a detector that has hardly learned; another object, or one more, is still another."""
    expected = (torch.tensor([[0.0, 0, 9, 9], [40, 40, 60, 60]]), torch.tensor([0.5, 0.5]), torch.tensor([1, 1]))

    class Fixed(torch.nn.Module):
        def __init__(self, values):
            super().__init__()
            self.values = values

        def forward(self, images):
            return tuple(values + 0 * images.sum().to(values.dtype) for values in self.values)

    def difference(other):
        path = tmp_path / "fixed.onnx"
        torch.onnx.export(Fixed(other), (torch.zeros(1, 3, 8, 8),), str(path), dynamo=False, input_names=["images"])
        return _difference(Fixed(expected), path, torch.zeros(1, 3, 8, 8))

    assert difference(tuple(values.flip(0) for values in expected)) == 0
    assert difference((expected[0], expected[1], torch.tensor([1, 2]))) == 1
    assert difference((expected[0][[0, 0]], *expected[1:])) == 51
    assert difference(tuple(values[:1] for values in expected)) == float("inf")
