"""Two ranks: one detector, one file, every image scored once; and each opens its weights once in every command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mae_core.models.sizes import ViTSize
from tests.processes import free_port
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


MAE, DETECTION = "mae_core.cli.main:app", "transfer.detection.train_net:main"
QUICK = ("data.workers=0", "device=cpu", "optim.epochs=1", "optim.warmup_epochs=0", "optim.batch_size=4")
TRUNK = ViTSize(192, 3, 6, norm_eps=1e-5)


@pytest.fixture(scope="module")
def model_file(write_mae) -> Path:
    """A masked autoencoder of 192 x 3 blocks, which no row of the sizes names."""
    return write_mae(TRUNK)


def test_each_rank_of_each_command_opens_the_weights_once(
    tmp_path, model_file, write_classes, detection_root, tiny_detector, run_forked
):
    """The commands one after another in one pair of ranks: pre-training, classifiers and probes, and detectors, each
    started from the file of 192 x 3 or from what the one before has written."""
    data, weights = write_classes(tmp_path / "classes"), f"weights={model_file}"
    labelled = [f"data.path={data}", *QUICK]
    frozen = [f"data.path={data}", *QUICK[:2]]
    detector = [o for o in tiny_detector if o.partition("=")[0] not in ("from_scratch", "model.size")]
    detector += [f"data.path={detection_root}", "optim.epochs=1", "optim.warmup_epochs=0"]
    tuned, trained = tmp_path / "finetune", tmp_path / "detect"
    commands = [
        (MAE, ["pretrain", weights, f"data.path={data / 'train'}", "data.image_size=32", *QUICK], model_file.name),
        (MAE, ["finetune", weights, *labelled, "data.image_size=32"], model_file.name),
        (MAE, ["evaluate", f"weights={tuned}", *frozen], "classifier.safetensors"),
        (MAE, ["linprobe", weights, *labelled], model_file.name),
        (MAE, ["knn", weights, *frozen, "k=1"], model_file.name),
        (MAE, ["features", weights, *frozen, "picture=none"], model_file.name),
        (DETECTION, [weights, *detector], model_file.name),
        (DETECTION, ["--eval-only", f"weights={trained}", f"data.path={detection_root}"], "detector.safetensors"),
    ]
    outputs = [arguments[0] if entry == MAE else "detect" for entry, arguments, _ in commands]
    outputs[-1] = "score"
    program = [
        (entry, [*arguments, f"output={tmp_path / output}"], free_port())
        for (entry, arguments, _), output in zip(commands, outputs, strict=True)
    ]
    result = run_forked(["-m", "tests.opens", json.dumps(program)], ranks=2)
    assert result.returncode == 0, result.stderr
    found = [json.loads(line.removeprefix("opens ")) for line in result.stdout.splitlines() if line[:6] == "opens "]
    expected = {output: 1 for output in outputs}
    for rank in found:
        opened = {o: opens.get(name) for o, (_, _, name), opens in zip(outputs, commands, rank, strict=True)}
        assert opened == expected
    assert len(found) == 2
