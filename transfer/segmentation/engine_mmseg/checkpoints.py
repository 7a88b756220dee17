"""mmengine's checkpoints: read without running what is in them, verified, and written when it is time to."""

from __future__ import annotations

import pickle
import time
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader, Runner
from mmseg.registry import HOOKS

from mae_core.errors import UserError, first_line, what_it_asks_for
from mae_core.training.checkpoints import model_fault
from mae_core.training.signals import Signals
from mae_core.weights.files import HARMLESS_BESIDE_TENSORS, damaged_record
from transfer.segmentation.segmenter_file import literal_config, step_of, steps_saved


def history_method(owner: Any, name: str) -> Any:
    """What ``getattr`` does in a checkpoint of mmengine's, and nothing else: methods of ``HistoryBuffer``."""
    if owner is not HistoryBuffer or name not in ("min", "max", "current", "mean"):
        raise pickle.UnpicklingError(f"it asks for the attribute {name!r}")
    return getattr(owner, name)


SAFE_GLOBALS: list[Any] = [
    HistoryBuffer,
    (history_method, "builtins.getattr"),
    (history_method, "__builtin__.getattr"),
    *HARMLESS_BESIDE_TENSORS,
]
"""What mmengine's checkpoints hold besides tensors and plain values."""


def load_safely(filename: str, map_location: Any = None) -> dict[str, Any]:
    """``read_checkpoint`` in the place of mmengine's loader; without the stored config, which mmengine executes."""
    checkpoint = read_checkpoint(Path(filename).expanduser(), map_location)
    if isinstance(checkpoint, dict) and isinstance(checkpoint.get("meta"), dict):
        checkpoint["meta"].pop("cfg", None)
        checkpoint["meta"].pop("config", None)
    return checkpoint


def config_in(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the run that wrote a checkpoint, as nested dicts; empty where it holds none that is literal."""
    try:
        return literal_config(checkpoint["meta"]["cfg"])
    except (KeyError, TypeError, ValueError, SyntaxError):
        return {}


def read_checkpoint(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """A local checkpoint, read without running code in it.

    Raises ``UserError`` for a file that holds anything else.
    """
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist")
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is truncated or not a checkpoint; give one that this toolkit wrote")
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            checkpoint: dict[str, Any] = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:
        raise UserError(
            f"checkpoint {path} is refused: it is broken, or holds more than tensors and plain values "
            f"({what_it_asks_for(error) or first_line(error)[:200]}); use one that this toolkit wrote"
        ) from None
    return checkpoint


def newest_whole(candidates: Sequence[Path]) -> tuple[Path, dict[str, Any]]:
    """The first of ``candidates`` that is undamaged, and what it holds; the others are passed over with a sentence.

    Raises ``UserError`` where none is, with what the first one has.
    """
    problems = []
    for checkpoint in candidates:
        try:
            return checkpoint, read_whole(checkpoint)
        except UserError as error:
            problems.append(error)
            if is_main_process():
                print(f"{error}; it is passed over", flush=True)
    raise problems[0]


def read_whole(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint holds. Raises ``UserError`` where it is damaged: torch writes a checksum of each tensor."""
    try:
        damaged = damaged_record(checkpoint) if checkpoint.is_file() else "the file itself"
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        damaged = first_line(error)
    if damaged is not None:
        raise UserError(f"checkpoint {checkpoint} is missing, truncated or damaged ({damaged})")
    content = read_checkpoint(checkpoint)
    try:
        step, state = content["meta"]["iter"], content["state_dict"]
        lacking = {"optimizer", "message_hub"} - content.keys()
        fault = model_fault(state, None)
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"checkpoint {checkpoint} does not hold what a resume needs") from None
    if lacking or not isinstance(step, int) or step != step_of(checkpoint):
        raise UserError(
            f"checkpoint {checkpoint} does not hold what a resume needs, or another step than its name says"
        )
    if fault:
        raise UserError(f"checkpoint {checkpoint} {fault}")
    return content


OURS = {"CheckpointHook": "WholeCheckpoints"}
"""Types in a config that stand for another, which takes all that they take."""


@HOOKS.register_module()
class WholeCheckpoints(CheckpointHook):
    """mmengine's checkpoints, and also one every ``minutes``, and one before a signal ends the training, for which
    there are ``stop_seconds`` (0: no limit); older ones are deleted after the new one is whole."""

    max_keep_ckpts: int

    def __init__(self, *args: Any, minutes: float = 10.0, stop_seconds: float = 0, **options: Any) -> None:
        super().__init__(*args, **options)
        self.minutes, self.saved, self.stop_seconds = minutes, time.monotonic(), stop_seconds
        self.signals = Signals()

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Save where it is time to; end the training after a signal."""
        before = self.last_ckpt
        super().after_train_iter(runner, batch_idx, data_batch, outputs)
        device = next(runner.model.parameters()).device
        stop, due = self.signals.agreed(time.monotonic() - self.saved > 60 * self.minutes, device)
        if (due or stop) and self.last_ckpt == before:
            self._save_checkpoint(runner)
        if self.last_ckpt != before:
            self.saved = time.monotonic()
        done = runner.iter + 1
        if stop and done < runner.max_iters:
            if is_main_process():
                print(self.signals.told(done, runner.max_iters), flush=True)
            raise self.signals.stopped()

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: Any) -> None:
        keep, self.max_keep_ckpts = self.max_keep_ckpts, -1  # mmengine deletes before it writes
        try:
            super()._save_checkpoint_with_step(runner, step, meta)
        finally:
            self.max_keep_ckpts = keep
        if keep > 0 and is_main_process():
            done = [path for path in steps_saved(Path(self.out_dir)) if (step_of(path) or 0) <= step]
            for old in done[keep:]:
                old.unlink()


CheckpointLoader.register_scheme("", load_safely, force=True)
