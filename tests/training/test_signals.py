"""A signal lets a training finish its step and save, and what comes after is as if there had been none."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from mae_core.config.load import load_config
from mae_core.layout import complete_checkpoints
from mae_core.training import pretrain as pretraining
from mae_core.training import run as runs
from mae_core.training.pretrain import pretrain
from mae_core.training.pretrain_config import PretrainConfig
from mae_core.training.signals import Signals, Stopped

MOMENTS = {
    "step": (pretraining, "pretrain_loss", 4, 4),
    "save": (runs, "save_checkpoint", 1, 4),
    "picture": (pretraining, "reconstruction_strip", 2, 5),
}
"""What a signal comes in: whose call, which one of them, and the last step that is taken then."""


@pytest.mark.parametrize(
    ("number", "code", "moment"),
    [
        (signal.SIGTERM, 75, "step"),
        (signal.SIGUSR1, 75, "step"),
        (signal.SIGINT, 130, "step"),
        (signal.SIGTERM, 75, "save"),
        (signal.SIGTERM, 75, "picture"),
    ],
)
def test_a_signal_finishes_the_step_and_saves(
    tmp_path, write_images, pretrain_options, monkeypatch, capsys, number, code, moment
):
    write_images(tmp_path / "images", 8)
    options = [*pretrain_options, f"data.path={tmp_path / 'images'}", "optim.epochs=3"]
    options += ["log.checkpoint_every=3", "log.pictures_every=2", "log.keep_checkpoints=1"]
    where, name, call, last = MOMENTS[moment]

    def config(name: str) -> PretrainConfig:
        return load_config(PretrainConfig, None, [*options, f"output={tmp_path / name}"])

    pretrain(config("whole"))
    real, count = getattr(where, name), [0]

    def signalled(*parts, **more):
        count[0] += 1
        if count[0] == call:
            os.kill(os.getpid(), number)
        return real(*parts, **more)

    monkeypatch.setattr(where, name, signalled)
    with pytest.raises(Stopped) as stopped:
        pretrain(config("run"))
    assert stopped.value.code == code
    run = tmp_path / "run"
    assert [folder.name for folder in complete_checkpoints(run)] == [f"step_{last:08d}"] and not (
        run / "run.lock"
    ).exists()
    said = capsys.readouterr().out
    assert (
        f"{number.name}: stopped after step {last} of 6, which is saved; the same command with --resume continues"
        in said
    )
    pretrain(config("run"), resume=True)
    assert (run / "encoder.safetensors").read_bytes() == (tmp_path / "whole" / "encoder.safetensors").read_bytes()


PROGRAM = """
import os, signal, time
from mae_core.training.signals import Signals
with Signals() as signals:
    for wait in (0, 0, 2.1):
        time.sleep(wait)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGTERM
        print("noted", flush=True)
"""


SLOW_SAVE = """
import os, signal, sys, time
from mae_core.cli.main import main
from mae_core.training import pretrain, run
save, loss, steps = run.save_checkpoint, pretrain.pretrain_loss, []
def slow(*parts, **more):
    time.sleep(9 if len(steps) > 2 else 0)
    return save(*parts, **more)
def signalled(*parts, **more):
    steps.append(1)
    if len(steps) == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    return loss(*parts, **more)
run.save_checkpoint, pretrain.pretrain_loss = slow, signalled
sys.argv[0] = "mae"
main()
"""


def test_a_second_signal_ends_at_once_and_handlers_come_back(run_forked):
    before = signal.getsignal(signal.SIGTERM)
    with Signals():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
    result = run_forked(["-c", PROGRAM])
    assert result.returncode == -signal.SIGTERM and result.stdout.count("noted") == 2


def test_a_save_that_takes_too_long_is_given_up_and_the_one_before_continues(
    tmp_path, write_images, pretrain_options, run_forked, capsys
):
    """``log.stop_seconds``: what ends the wait leaves every file whole."""
    write_images(tmp_path / "images", 8)
    options = [*pretrain_options, f"data.path={tmp_path / 'images'}", "optim.epochs=3", "log.checkpoint_every=2"]
    command = ["pretrain", *options, "log.stop_seconds=0.5", f"output={tmp_path / 'run'}"]
    result = run_forked(["-c", SLOW_SAVE, *command])
    assert result.returncode == 75, result.stderr
    assert "SIGTERM: not saved within the 0.5 s of stop_seconds; the same command with --resume auto" in result.stdout
    assert [folder.name for folder in complete_checkpoints(tmp_path / "run")] == ["step_00000002"]
    for name, resume in (("whole", False), ("run", True)):
        pretrain(load_config(PretrainConfig, None, [*options, f"output={tmp_path / name}"]), resume=resume)
    one, other = ((tmp_path / name / "encoder.safetensors").read_bytes() for name in ("whole", "run"))
    assert one == other


def test_checkpoints_come_by_time_too(tmp_path, write_images, pretrain_options):
    write_images(tmp_path / "images", 4)
    options = [*pretrain_options, f"data.path={tmp_path / 'images'}", "optim.epochs=3", f"output={tmp_path / 'run'}"]
    pretrain(load_config(PretrainConfig, None, [*options, "log.checkpoint_minutes=1e-9", "log.keep_checkpoints=9"]))
    assert len(complete_checkpoints(tmp_path / "run")) == 3


LOADER = """
from mae_core.data.loading import make_loader
loader = make_loader(list(range(8)), [[0, 1], [2, 3]], list, workers=1, pin=False)
print(list(loader), flush=True)
kept = [loader]
kept.append(kept)  # nothing takes the workers away before the process ends
"""


def test_workers_that_are_kept_do_not_keep_a_process_from_ending(run_python):
    result = run_python(["-c", LOADER], timeout=100)
    assert result.returncode == 0 and "[[0, 1], [2, 3]]" in result.stdout
    assert result.stderr == ""


def test_a_checkpoint_that_is_due_on_several_ranks_comes_once(monkeypatch):
    """Flags are read a step after they are sent: one that is under way when the checkpoint comes is for the same."""
    monkeypatch.setattr("mae_core.training.signals.world_size", lambda: 2)
    monkeypatch.setattr("mae_core.training.signals.sum_over_ranks", lambda flags: flags)
    signals, saved = Signals(), 0
    due = True
    for _ in range(5):
        _, late = signals.agreed(due, torch.device("cpu"), deferred=True)
        saved, due = saved + late, due and not late
    assert saved == 1
