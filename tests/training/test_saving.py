"""Checkpoints written beside the training: exact, whole, and their errors not lost."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from mae_core.config.load import load_config
from mae_core.errors import UserError
from mae_core.layout import complete_checkpoints
from mae_core.training import loop, run, saving
from mae_core.training.pretrain import pretrain
from mae_core.training.pretrain_config import PretrainConfig
from mae_core.training.saving import Beside, copied, copy_fits
from mae_core.weights.files import read_weights


@pytest.fixture
def options(tmp_path, write_images, pretrain_options) -> list[str]:
    write_images(tmp_path / "images", 8)
    places = [f"data.path={tmp_path / 'images'}", f"output={tmp_path / 'run'}"]
    return [*pretrain_options, *places, "optim.epochs=2", "log.checkpoint_every=1", "log.keep_checkpoints=9"]


def test_a_checkpoint_holds_its_step_though_training_goes_on(tmp_path, options, monkeypatch):
    """The write of a step's checkpoint waits until the next step has changed the weights."""
    saved_at: dict[int, bool] = {}
    at_step: dict[int, Any] = {}
    changed, real_save, real_backward = threading.Event(), run.save_checkpoint, loop.backward

    def save(folder: Any, step: int, *args: Any, **words: Any) -> Any:
        beside = threading.current_thread() is not threading.main_thread()
        saved_at[step] = beside
        assert not beside or changed.wait(20)
        return real_save(folder, step, *args, **words)

    def backward(model: Any, *args: Any) -> Any:
        losses = real_backward(model, *args)
        at_step[len(at_step)] = {name: value.clone() for name, value in model.state_dict().items()}
        changed.set()
        return losses

    monkeypatch.setattr(run, "save_checkpoint", save)
    monkeypatch.setattr(loop, "backward", backward)
    pretrain(load_config(PretrainConfig, None, options))
    assert saved_at == {1: True, 2: True, 3: True, 4: False}
    for folder in complete_checkpoints(tmp_path / "run")[:-1]:
        state = read_weights(folder / "model.safetensors")[0]
        wanted = at_step[int(folder.name[-8:])]  # what the next step began with
        assert all(torch.equal(state[name], wanted[name]) for name in state), folder.name


def test_what_fails_beside_the_training_ends_it_with_its_sentence(tmp_path, options, monkeypatch):
    real = run.save_checkpoint

    def save(folder: Any, step: int, *args: Any, **words: Any) -> Any:
        if step >= 2:
            raise OSError(28, "No space left on device")
        return real(folder, step, *args, **words)

    monkeypatch.setattr(run, "save_checkpoint", save)
    with pytest.raises(UserError, match=r"cannot write to .*No space left on device.*--resume continues"):
        pretrain(load_config(PretrainConfig, None, options))
    assert [folder.name for folder in complete_checkpoints(tmp_path / "run")] == ["step_00000001"]


def test_a_save_that_failed_once_is_done_again_at_the_next_step(tmp_path, options, monkeypatch, capsys):
    real = run.save_checkpoint
    threads: dict[int, bool] = {}

    def save(folder: Any, step: int, *args: Any, **words: Any) -> Any:
        threads[step] = threading.current_thread() is threading.main_thread()
        if step == 2:
            raise OSError(5, "Input/output error")
        return real(folder, step, *args, **words)

    monkeypatch.setattr(run, "save_checkpoint", save)
    pretrain(load_config(PretrainConfig, None, [*options, "log.checkpoint_every=2", "optim.epochs=4"]))
    assert threads[2] is False and min(step for step, waited in threads.items() if waited) in (3, 4)
    assert "the last checkpoint was not written (cannot write to" in capsys.readouterr().out
    assert "step_00000002" not in [folder.name for folder in complete_checkpoints(tmp_path / "run")]


def test_without_memory_for_a_copy_the_loop_waits(tmp_path, options, monkeypatch):
    monkeypatch.setattr(saving, "available_memory", lambda device: 1 << 10)
    assert not copy_fits({"a": [torch.zeros(1 << 10)]}) and copy_fits({"a": (torch.zeros(4), "b")})
    threads: list[bool] = []
    real = run.save_checkpoint

    def save(*args: Any, **words: Any) -> Any:
        threads.append(threading.current_thread() is threading.main_thread())
        return real(*args, **words)

    monkeypatch.setattr(run, "save_checkpoint", save)
    pretrain(load_config(PretrainConfig, None, options))
    assert threads == [True] * 4


def test_a_checkpoint_is_whole_when_a_training_fails(tmp_path, options, monkeypatch):
    real, steps = loop.backward, iter(range(1, 9))

    def backward(*args: Any) -> Any:
        if next(steps) == 3:
            raise ValueError("a step that fails")
        return real(*args)

    monkeypatch.setattr(loop, "backward", backward)
    with pytest.raises(ValueError, match="a step that fails"):
        pretrain(load_config(PretrainConfig, None, options))
    assert [folder.name for folder in complete_checkpoints(tmp_path / "run")] == ["step_00000001", "step_00000002"]


def test_copies_are_apart_and_errors_are_told_once():
    state = {"step": 3, "moments": [(torch.zeros(2), None)], "groups": ({"lr": 0.1},)}
    other = copied(state)
    state["moments"][0][0].add_(1)
    assert other["moments"][0][0].tolist() == [0, 0] and other["groups"] == ({"lr": 0.1},)
    work = Beside()

    def fail() -> None:
        raise ValueError("once")

    work.start(fail)
    assert str(work.take_error()) == "once" and work.take_error() is None
    work.start(lambda: None)
    assert work.take_error() is None
