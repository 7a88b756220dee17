"""A detector on two ranks: one run, one file, every image scored once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from transfer.detection.run import evaluate_detector, train_detector

pytestmark = pytest.mark.slow
TRAIN = Path(__file__).parents[2] / "transfer" / "detection" / "train_net.py"


def first_loss(run: Path) -> float:
    return json.loads((run / "log.jsonl").read_text().splitlines()[0])["loss"]


def test_two_ranks_train_one_detector_and_score_every_image_once(
    detection_root, tiny_detector, configure_detection, run_forked, tmp_path
):
    run = tmp_path / "two"
    options = [*tiny_detector, f"data.path={detection_root}", "optim.epochs=2", "optim.base_lr=0.06", "log.every=1"]
    result = run_forked([TRAIN, *options, f"output={run}"], ranks=2)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("wrote ") == 1, "only one rank talks"
    train_detector(configure_detection("log.every=1"))
    assert first_loss(run) == pytest.approx(first_loss(tmp_path / "run"), rel=0.1)  # the regions are other random ones
    two = json.loads((run / "metrics.json").read_text())
    assert two["images"] == 3
    one = evaluate_detector(configure_detection(f"weights={run}", f"output={tmp_path / 'again'}", scratch=False))
    assert [one[kind] for kind in ("bbox", "segm")] == [two[kind] for kind in ("bbox", "segm")]
    predictions = [json.loads((path / "predictions.json").read_text()) for path in (run, tmp_path / "again")]
    assert len(predictions[0]) == len(predictions[1]) > 0
