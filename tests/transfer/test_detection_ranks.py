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
    detection_root, tiny_detector, configure_detection, run_python, tmp_path
):
    run = tmp_path / "two"
    options = [*tiny_detector, f"data.path={detection_root}", "optim.epochs=2", "optim.base_lr=0.06", "log.every=1"]
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", TRAIN]
    result = run_python([*ranks, *options, f"output={run}"])
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
