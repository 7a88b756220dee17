"""What a machine does to a training: a sentence, and nothing lost."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from typing import Any

import pytest
import torch

from mae_core.config.load import load_config
from mae_core.data.loading import make_loader
from mae_core.errors import UserError, user_errors
from mae_core.layout import complete_checkpoints
from mae_core.training import loop
from mae_core.training.machine_faults import machine_faults, smaller_runs
from mae_core.training.pretrain import pretrain
from mae_core.training.pretrain_config import PretrainConfig
from tests import processes
from transfer.detection.config import DetectionConfig


@pytest.fixture
def options(tmp_path, write_images, pretrain_options) -> list[str]:
    write_images(tmp_path / "images", 8)
    options = [*pretrain_options, f"data.path={tmp_path / 'images'}", f"output={tmp_path / 'run'}"]
    return [*options, "optim.epochs=2", "log.checkpoint_every=1"]


@pytest.fixture
def at_step(monkeypatch):
    """(step, what is done before it)."""

    def arrange(step: int, act: Any) -> None:
        steps, real = iter(range(1, 100)), loop.backward

        def backward(*args: Any) -> Any:
            if next(steps) == step:
                act()
            return real(*args)

        monkeypatch.setattr(loop, "backward", backward)

    return arrange


def run_out_of_memory() -> None:
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore lines")


def test_a_run_without_memory_says_what_to_change_and_the_advice_works(tmp_path, options, at_step, monkeypatch):
    at_step(3, run_out_of_memory)
    said = r"out of GPU memory \(CUDA out .* 2 GiB\.\); lower optim\.micro_batch \(now 4 images at once\), or set "
    with pytest.raises(UserError, match=rf"{said}model\.checkpointing=true, or start a run of a smaller .*--resume"):
        pretrain(load_config(PretrainConfig, None, options))
    assert [folder.name for folder in complete_checkpoints(tmp_path / "run")][-1] == "step_00000002"
    monkeypatch.undo()
    smaller = [*options, "optim.micro_batch=2", "model.checkpointing=true"]
    pretrain(load_config(PretrainConfig, None, smaller), resume=True)
    assert (tmp_path / "run" / "encoder.safetensors").is_file()


def test_only_what_a_run_has_is_advised(options):
    config = load_config(DetectionConfig, None, ["weights=x"])
    assert smaller_runs(config)[0] == "lower optim.micro_batch (now 64 images at once)"
    tight = load_config(PretrainConfig, None, [*options, "model.checkpointing=true", "optim.micro_batch=2"])
    assert smaller_runs(tight) == [
        "lower optim.micro_batch (now 2 images at once)",
        "start a run of a smaller model or data.image_size",
    ]


def test_an_image_that_is_deleted_in_mid_run_is_named_and_passed_over(tmp_path, options, at_step, capsys):
    at_step(2, (tmp_path / "images" / "005.png").unlink)
    pretrain(load_config(PretrainConfig, None, options))
    events = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    (event,) = [event for event in events if event.get("event") == "unreadable"]
    assert event["path"].endswith("005.png") and "1 unreadable images were skipped" in capsys.readouterr().out


class Faulty(list[int]):
    """A data set whose reading process is sent a signal."""

    number = signal.SIGKILL

    def __getitem__(self, index: Any) -> Any:
        os.kill(os.getpid(), self.number)
        return super().__getitem__(index)


class Stopped(Faulty):
    number = signal.SIGSTOP


@pytest.mark.parametrize(
    ("images", "told"),
    [
        (Stopped(range(4)), r"gave no batch for data\.timeout seconds: .* raise data\.timeout; the last checkpoint"),
        (Faulty(range(4)), r"a loading process is gone \(DataLoader worker .*\).*lower data\.workers.*--resume"),
    ],
)
def test_a_loading_process_that_is_gone_ends_a_run_soon(images, told):
    started = time.monotonic()
    with pytest.raises(UserError, match=told), machine_faults(["x"]):
        list(make_loader(images, [[0, 1], [2, 3]], list, workers=1, timeout=0.5))  # type: ignore[arg-type]
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    ("error", "ranks", "told"),
    [
        (RuntimeError("[pair.cc:534] Connection closed by peer [10.0.0.2]"), 2, "another rank is gone or hangs"),
        (torch.distributed.DistBackendError("NCCL watchdog\nstack"), 2, r"\(NCCL watchdog\); what ended it stands in"),
    ],
)
def test_a_lost_rank_is_told_by_the_others(error, ranks, told, monkeypatch):
    monkeypatch.setattr("mae_core.training.machine_faults.world_size", lambda: ranks)
    with pytest.raises(UserError, match=told), machine_faults([]):
        raise error


def test_other_errors_stay_what_they_are():
    for error in (RuntimeError("Connection closed by peer"), ValueError("Timed out waiting")):
        with pytest.raises(type(error)) as found, machine_faults([]):
            raise error
        assert found.value is error


WAITING = """
import time
from mae_core.errors import user_errors
from mae_core.training.distributed import barrier, join
from mae_core.training.machine_faults import machine_faults
place = join("cpu", 1.0)
barrier()
if place.rank == 1:
    time.sleep(60)
with user_errors(), machine_faults([]):
    barrier()
"""


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_others_after_rank_timeout(run_forked):
    started = time.monotonic()
    result = run_forked(["-c", WAITING], ranks=2)
    assert result.returncode == 2 and "error: another rank is gone or hangs" in result.stderr
    assert time.monotonic() - started < 50


KILLED = WAITING.replace("time.sleep(60)", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")


def test_a_rank_that_is_killed_ends_the_others_with_the_cause(tmp_path):
    place, outputs = processes.free_port(), [tmp_path / "0", tmp_path / "1"]
    with contextlib.ExitStack() as stack:
        ranks = [
            stack.enter_context(processes.started(["-c", KILLED], output, processes.announced(rank, 2, place)))
            for rank, output in enumerate(outputs)
        ]
        began = time.monotonic()
        for rank in ranks:
            rank.join(50)
        assert [rank.exitcode for rank in ranks] == [2, -signal.SIGKILL]
        assert time.monotonic() - began < 50
    assert "error: another rank is gone or hangs" in outputs[0].with_suffix(".err").read_text()


@pytest.mark.parametrize(
    "error, told",
    [
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 80000000512 bytes."),
            ", 75 GiB",
        ),
        (MemoryError(), ""),
    ],
)
def test_memory_of_the_cpu_that_does_not_suffice_is_a_sentence(error, told, capsys):
    with pytest.raises(SystemExit) as stopped, user_errors():
        raise error
    assert stopped.value.code == 2
    assert f"error: out of memory{told}" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="another"), user_errors():
        raise RuntimeError("another")
