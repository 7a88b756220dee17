"""What goes wrong in a training of the mmseg engine, injected."""

import json
import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mae_core.errors import UserError
from transfer.segmentation.train_net import train_segmenter

pytest.importorskip("mmseg", reason="mmseg is not installed; pip install mae-transfer[segmentation]")
pytest.importorskip("transfer.segmentation.engine_mmseg", reason="mmseg is here without mmcv or mmengine")

from mmengine.optim import OptimWrapper

from mae_core.training.finite import non_finite
from mae_core.training.lock import _start_of
from mae_core.training.signals import Stopped
from transfer.segmentation.engine_mmseg.checkpoints import load_safely
from transfer.segmentation.engine_mmseg.faults import Faults

DIGITS = Path(__file__).parents[3] / "configs" / "segmentation" / "digits.py"


def test_a_step_whose_gradient_is_not_finite_is_skipped(tmp_path, tiny, monkeypatch):
    real, count = OptimWrapper.backward, [0]

    def spoiled(self, loss, **more):
        real(self, loss, **more)
        count[0] += 1
        if count[0] == 2:
            next(p for group in self.param_groups for p in group["params"] if p.grad is not None).grad[0] = torch.nan

    monkeypatch.setattr(OptimWrapper, "backward", spoiled)
    options = {**tiny, "iterations": 3, "default_hooks.checkpoint.interval": 1}
    train_segmenter(DIGITS, work_dir=tmp_path / "run", cfg_options=options)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "non-finite gradient" in line.get("event", "")] == [2]
    assert not non_finite(load_file(tmp_path / "run" / "segmenter.safetensors"))


def test_a_rate_that_is_too_high_ends_without_a_file_that_is_not_finite(tmp_path, tiny):
    options = {**tiny, "iterations": 30, "lr": 1e30, "default_hooks.checkpoint.interval": 1}
    with pytest.raises(UserError, match=r"--resume and a lower optim_wrapper.optimizer.lr; .* in another --work-dir"):
        train_segmenter(DIGITS, work_dir=tmp_path / "run", cfg_options=options)
    assert not (tmp_path / "run" / "segmenter.safetensors").exists()
    for file in (tmp_path / "run").glob("iter_*.pth"):
        assert not non_finite(load_safely(str(file), "cpu")["state_dict"])


@pytest.fixture
def interrupted(tmp_path, tiny, monkeypatch, capsys):
    """A training of six steps that a signal stops in the third, and its options."""
    options = {**tiny, "iterations": 6, "custom_hooks.0.interval": 1, "model.backbone.drop_path": 0.2}
    real, calls = Faults.before_train_iter, []

    def signalled(*arguments: Any, **more: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        real(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Faults, "before_train_iter", signalled)
        with pytest.raises(Stopped) as stopped:
            train_segmenter(DIGITS, work_dir=tmp_path / "run", cfg_options={**options, "workers": 1})
    assert stopped.value.code == 75 and "SIGUSR1: stopped after step 3 of 6, which is saved" in capsys.readouterr().out
    assert not (tmp_path / "run" / "run.lock").exists()
    return tmp_path / "run", options


def test_a_signal_saves_and_a_resumed_run_ends_in_the_same_weights(interrupted, tmp_path):
    run, options = interrupted
    assert [path.name for path in run.glob("*.pth")] == ["iter_3.pth"]
    train_segmenter(DIGITS, work_dir=tmp_path / "whole", cfg_options=options)
    train_segmenter(DIGITS, work_dir=run, cfg_options=options, resume="auto")
    whole, resumed = (load_file(path / "segmenter.safetensors") for path in (tmp_path / "whole", run))
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
    lines = [
        [json.loads(line) for line in (p / "log.jsonl").read_text().splitlines()] for p in (tmp_path / "whole", run)
    ]
    assert [line.get("loss") for line in lines[0]] == [line.get("loss") for line in lines[1]]


def test_a_signal_in_an_evaluation_saves_after_the_next_step(tmp_path, tiny, monkeypatch, capsys):
    from mmengine.runner import ValLoop

    options = {**tiny, "iterations": 4, "train_cfg.val_interval": 2, "default_hooks.checkpoint.stop_seconds": 90}
    train_segmenter(DIGITS, work_dir=tmp_path / "whole", cfg_options=options)
    real, limits = ValLoop.run, []

    def signalled(loop: ValLoop) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        hooks = [hook for hook in loop.runner.hooks if hasattr(hook, "signals")]
        limits.append([(hook.signals.limit, hook.signals._timer is not None) for hook in hooks])
        return real(loop)

    with monkeypatch.context() as patch, pytest.raises(Stopped) as stopped:
        patch.setattr(ValLoop, "run", signalled)
        train_segmenter(DIGITS, work_dir=tmp_path / "run", cfg_options=options)
    assert stopped.value.code == 75 and "SIGTERM: stopped after step 3 of 4" in capsys.readouterr().out
    assert limits == [[(90, True)]]
    train_segmenter(DIGITS, work_dir=tmp_path / "run", cfg_options=options, resume="auto")
    whole, resumed = (load_file(tmp_path / name / "segmenter.safetensors") for name in ("whole", "run"))
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


def test_damaged_checkpoints_are_passed_over_and_the_rate_may_fall(interrupted, capsys):
    run, options = interrupted
    content = bytearray((run / "iter_3.pth").read_bytes())
    content[len(content) // 2] ^= 1
    (run / "iter_4.pth").write_bytes(content)
    (run / "iter_5.pth").write_bytes(content[:-100])
    (run / ".writing_iter_6.pth").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"lr is higher than the run started with .* may be lowered"):
        train_segmenter(DIGITS, work_dir=run, cfg_options={**options, "lr": 2.4e-3}, resume=True)
    assert capsys.readouterr().out.count("it is passed over") == 2
    with pytest.raises(UserError, match=r"iter_3.pth holds .* resume with the configuration that the run started with"):
        train_segmenter(DIGITS, work_dir=run, cfg_options={**options, "head_width": 24}, resume=True)
    train_segmenter(DIGITS, work_dir=run, cfg_options={**options, "lr": 1.2e-4}, resume=True)
    rates = [json.loads(line).get("lr") for line in (run / "log.jsonl").read_text().splitlines()]
    assert rates[2] == pytest.approx(1.2e-3) and rates[3:5] == pytest.approx([8e-5, 4e-5])
    assert not list(run.glob(".writing_*"))
    for path in run.glob("*.pth"):
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"iter_6.pth is missing, truncated or damaged"):
        train_segmenter(DIGITS, work_dir=run, cfg_options=options, resume=True)


def test_two_processes_do_not_write_one_folder_and_a_killed_start_is_started_again(tmp_path, tiny):
    run, options = tmp_path / "run", {**tiny, "iterations": 3, "custom_hooks.0.interval": 1}
    run.mkdir()
    (run / "log.jsonl").write_text('{"step": 1, "loss": 1}\n')  # killed before its first checkpoint
    lock = {"host": socket.gethostname(), "pid": os.getppid(), "started": _start_of(os.getppid())}
    (run / "run.lock").write_text(json.dumps(lock))
    with pytest.raises(UserError, match=f"is being written by process {os.getppid()} on"):
        train_segmenter(DIGITS, work_dir=run, cfg_options=options, resume="auto")
    (run / "run.lock").write_text(json.dumps({**lock, "started": "0"}))
    train_segmenter(DIGITS, work_dir=run, cfg_options=options, resume="auto")
    assert [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()] == [1, 2, 3, 3]
