"""A killed and resumed run ends in bitwise the same weights, and a run directory is never written over."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from mae_core.config.load import load_config
from mae_core.errors import UserError
from mae_core.layout import complete_checkpoints
from mae_core.training.pretrain import pretrain
from mae_core.training.pretrain_config import PretrainConfig
from tests.processes import kill, started

pytestmark = pytest.mark.slow


def steps_of(run: Path) -> list[dict]:
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [entry for entry in entries if "loss" in entry]


def kill_after_first_checkpoint(command: list[str], run: Path) -> int:
    """Start a run, SIGKILL it and its workers once a checkpoint is complete; returns its exit status."""
    deadline = time.monotonic() + 200
    with started(command, run.with_name("output")) as process:
        while process.is_alive() and not complete_checkpoints(run):
            assert time.monotonic() < deadline, "no checkpoint in 200 s"
            time.sleep(0.005)
        kill(process)
        process.join()
    return process.exitcode


def test_a_killed_and_resumed_run_ends_in_the_same_weights(tmp_path, write_images, pretrain_options, run_forked):
    write_images(tmp_path / "images", 10)
    options = [
        *pretrain_options,
        f"data.path={tmp_path / 'images'}",
        "optim.epochs=32",
        "optim.warmup_epochs=4",
        "log.checkpoint_every=10",
        "log.pictures_every=25",
    ]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    pretrain(load_config(PretrainConfig, None, [*options, f"output={whole}"]))  # 80 steps, no worker process

    command = ["-m", "mae_core.cli.main", "pretrain", *options, "data.workers=1", f"output={killed}"]
    assert kill_after_first_checkpoint(command, killed) == -signal.SIGKILL
    assert not (killed / "encoder.safetensors").exists(), "it ended before it was killed"
    done = int(complete_checkpoints(killed)[-1].name.removeprefix("step_"))
    assert 10 <= done < 80

    resumed = run_forked([*command, "--resume"])
    assert resumed.returncode == 0, resumed.stderr
    assert f"after step {done}" in resumed.stdout

    assert (killed / "encoder.safetensors").read_bytes() == (whole / "encoder.safetensors").read_bytes()
    last = "checkpoints/step_00000080/model.safetensors"
    assert (killed / last).read_bytes() == (whole / last).read_bytes()
    assert [entry["step"] for entry in steps_of(killed)] == list(range(1, 81))
    for one, other in zip(steps_of(whole), steps_of(killed), strict=True):
        assert (one["loss"], one["lr"]) == (other["loss"], other["lr"])
    assert [p.name for p in complete_checkpoints(killed)] == ["step_00000070", "step_00000080"]
    pictures = sorted(p.name for p in (killed / "pictures").iterdir())
    assert pictures == [f"step_000000{step}.png" for step in (25, 50, 75, 80)]
    for name in pictures:
        assert (killed / "pictures" / name).read_bytes() == (whole / "pictures" / name).read_bytes()


@pytest.fixture
def finished(pretrained, tmp_path) -> Path:
    """A copy of a finished run, its configuration naming the copy."""
    run = tmp_path / "run"
    shutil.copytree(pretrained, run)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(str(pretrained), str(run)))
    return run


def configuration(run: Path, *overrides: str) -> PretrainConfig:
    return load_config(PretrainConfig, run / "config.yaml", overrides)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_run_directory_holds_what_it_should(pretrained):
    names = {p.name for p in pretrained.iterdir()}
    expected = {"config.yaml", "log.jsonl", "tensorboard", "pictures", "checkpoints", "encoder.safetensors"}
    assert expected <= names
    entries = steps_of(pretrained)
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4]
    assert {"loss", "lr", "images_per_second", "data_wait", "time"} <= entries[0].keys()
    assert not list(pretrained.rglob(".*")), "temporary files are left"


def test_a_finished_run_is_not_written_over(finished):
    before = contents(finished)
    with pytest.raises(UserError, match="already holds a run"):
        pretrain(configuration(finished))
    assert contents(finished) == before


@pytest.mark.parametrize("change", ["optim.base_lr=1e-3", "seed=1", "masking.ratio=0.5", "data.crop_scale=[0.5,1]"])
def test_another_configuration_does_not_resume(finished, change):
    before = contents(finished)
    with pytest.raises(UserError, match=f"another configuration.*{change.partition('=')[0]}"):
        pretrain(configuration(finished, change), resume=True)
    assert contents(finished) == before


def test_nothing_to_resume_is_refused(tmp_path, finished):
    empty = tmp_path / "empty"
    with pytest.raises(UserError, match="nothing to resume"):
        pretrain(configuration(finished, f"output={empty}"), resume=True)
    assert not empty.exists()
    shutil.rmtree(finished / "checkpoints")
    with pytest.raises(UserError, match="nothing to resume"):
        pretrain(configuration(finished), resume=True)


def test_a_torn_last_checkpoint_resumes_from_the_one_before(tmp_path, write_images, pretrain_options):
    write_images(tmp_path / "images", 8)
    run = tmp_path / "run"
    options = [*pretrain_options, f"data.path={tmp_path / 'images'}", f"output={run}", "optim.epochs=4"]
    config = load_config(PretrainConfig, None, [*options, "log.checkpoint_every=3"])
    pretrain(config)
    weights = (run / "encoder.safetensors").read_bytes()
    (run / "encoder.safetensors").unlink()
    torn = complete_checkpoints(run)[-1] / "training.pt"
    torn.write_bytes(torn.read_bytes()[:-10])
    # What may change: where and how fast.
    pretrain(load_config(PretrainConfig, None, [*options, "log.checkpoint_every=1", "data.workers=1"]), resume=True)
    assert (run / "encoder.safetensors").read_bytes() == weights
    assert [entry["step"] for entry in steps_of(run)] == list(range(1, 9))


def test_a_resume_leaves_a_half_written_log_line_behind(finished):
    with (finished / "log.jsonl").open("a") as log:
        log.write('{"step": 4, "lo')
    pretrain(configuration(finished), resume=True)
    assert [entry["step"] for entry in steps_of(finished)] == [1, 2, 3, 4]


def test_the_seed_of_the_caller_does_not_matter(tmp_path, write_images, pretrain_options):
    write_images(tmp_path / "images", 4)
    for number in range(2):
        torch.manual_seed(number)
        options = [f"data.path={tmp_path / 'images'}", f"output={tmp_path / str(number)}", "optim.epochs=2"]
        pretrain(load_config(PretrainConfig, None, [*pretrain_options, *options]))
    one, two = (tmp_path / str(number) / "encoder.safetensors" for number in range(2))
    assert one.read_bytes() == two.read_bytes()


def test_data_may_move_but_not_change(finished, pretrained, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(pretrained.parent / "images", moved)
    pretrain(configuration(finished, f"data.path={moved}", "optim.micro_batch=2"), resume=True)
    (moved / "000.png").rename(moved / "other.png")
    before = contents(finished)
    with pytest.raises(UserError, match="was started on other images"):
        pretrain(configuration(finished, f"data.path={moved}"), resume=True)
    assert contents(finished) == before


def test_images_replaced_under_their_names_are_found(finished, pretrained, tmp_path, write_images):
    moved = tmp_path / "moved"
    shutil.copytree(pretrained.parent / "images", moved)
    write_images(tmp_path / "others", 1, seed=9)[0].replace(moved / "003.png")
    before = contents(finished)
    with pytest.raises(UserError, match=r"other images of the same names: 1 of 8 compared files .* such as 003\.png"):
        pretrain(configuration(finished, f"data.path={moved}"), resume=True)
    assert contents(finished) == before
    data = json.loads((finished / "data.json").read_text())
    (finished / "data.json").write_text(json.dumps({key: data[key] for key in ("images", "sha256")}))
    pretrain(configuration(finished, f"data.path={moved}"), resume=True)  # of an older version: nothing to compare


def test_repeats_resume_exactly_count_as_samples_and_must_divide_the_batch(tmp_path, write_images, pretrain_options):
    write_images(tmp_path / "images", 6)
    options = [*pretrain_options, f"data.path={tmp_path / 'images'}", "data.repeats=2", "log.checkpoint_every=5"]
    whole, stopped = ([*options, f"output={tmp_path / name}", "optim.epochs=6"] for name in ("whole", "stopped"))
    pretrain(load_config(PretrainConfig, None, whole))
    assert len(steps_of(tmp_path / "whole")) == 9  # of 4 samples: 6 epochs of 6
    pretrain(load_config(PretrainConfig, None, stopped))
    shutil.rmtree(complete_checkpoints(tmp_path / "stopped")[-1])
    (tmp_path / "stopped" / "encoder.safetensors").unlink()
    pretrain(load_config(PretrainConfig, None, [*stopped, "data.workers=1"]), resume=True)
    one, other = (tmp_path / name / "encoder.safetensors" for name in ("whole", "stopped"))
    assert one.read_bytes() == other.read_bytes()
    with pytest.raises(UserError, match=r"batch size 4 does not divide by data.repeats=3; .* a multiple of 3"):
        pretrain(load_config(PretrainConfig, None, [*options, "data.repeats=3", f"output={tmp_path / 'new'}"]))
    assert not (tmp_path / "new").exists()
