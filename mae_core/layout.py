"""Names inside a run directory, and how to find the weights in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from mae_core.atomic import checksum
from mae_core.errors import UserError

CONFIG = "config.yaml"
LOG = "log.jsonl"
ENVIRONMENT = "environment.json"
DATA = "data.json"
ENCODER = "encoder.safetensors"
CLASSIFIER = "classifier.safetensors"
ATTENTIVE = "attentive_classifier.safetensors"
TOKENIZER = "tokenizer.safetensors"
LOADING = "loading.json"
METRICS = "metrics.json"
FEATURES = "features.npz"
PREDICTIONS = "predictions.csv"
PER_CLASS = "per_class.csv"
LOGITS = "logits.npz"
CHECKPOINTS = "checkpoints"
PICTURES = "pictures"
EVENTS = "events"
MODEL = "model.safetensors"
EXPORT_CONFIG = "config.json"
PREPROCESSOR_CONFIG = "preprocessor_config.json"
EXPORTED = (MODEL, f"{MODEL}.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
TRAINING_STATE = "training.pt"
COMPLETE = "COMPLETE"
CHECKPOINT_FORMAT = 1
"""Of the checkpoints that this version writes; it reads older ones, and refuses newer ones. 0 had no checksums."""
WHOLE_NETWORK = "mae_core_"
"""How the ``format`` of a file begins that holds another network than an encoder's; the rest is the network's name."""
ATTENTIVE_FORMAT = f"{WHOLE_NETWORK}classifier_with_attentive_pooling"
"""Of the file of an attentive probe."""


class Marker(NamedTuple):
    """What the COMPLETE file of a checkpoint says: its format, of each file the bytes and the checksum, which format 0
    does not have, and what was measured at its step, where something was."""

    format: int
    files: dict[str, tuple[int, str | None]]
    measured: dict[str, float]


def checkpoint_folders(run: Path) -> list[Path]:
    """Checkpoint folders of a run, whole or not, oldest first."""
    named = [(folder.name.removeprefix("step_"), folder) for folder in (run / CHECKPOINTS).glob("step_*")]
    folders = sorted((int(step), folder) for step, folder in named if step.isdecimal() and folder.is_dir())
    return [folder for _, folder in folders]


def complete_checkpoints(run: Path) -> list[Path]:
    """Checkpoint folders of a run that were written to the end, oldest first."""
    return [folder for folder in checkpoint_folders(run) if is_complete(folder)]


def best_checkpoint(run: Path, measure: str) -> tuple[Path, float] | None:
    """The complete checkpoint of a run at whose step ``measure`` was best, the first of equal ones, with its value; a
    loss is better where it is lower. None where it was measured at none."""
    found = [(folder, marker_of(folder).measured.get(measure)) for folder in complete_checkpoints(run)]
    values = [(folder, value) for folder, value in found if value is not None]
    return min(values, key=lambda entry: cost_of(measure, entry[1]), default=None)


def cost_of(measure: str, value: float) -> float:
    """What is the lower the better ``value`` is: a loss itself, and an accuracy with its sign changed."""
    return value if measure.endswith("_loss") else -value


def marker_of(checkpoint: Path) -> Marker:
    """What the COMPLETE file says. Raises ``OSError``, ``ValueError`` and the like where there is none that can be
    read."""
    content = json.loads((checkpoint / COMPLETE).read_text())
    if "files" not in content:
        return Marker(0, {name: (size, None) for name, size in content.items()}, {})
    files = {name: (entry["bytes"], entry["crc32"]) for name, entry in content["files"].items()}
    measured = {name: float(value) for name, value in content.get("measured", {}).items()}
    return Marker(int(content["format"]), files, measured)


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint has its COMPLETE marker and every file in it has the size the marker names."""
    try:
        files = marker_of(checkpoint).files
        return bool(files) and all((checkpoint / name).stat().st_size == size for name, (size, _) in files.items())
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError):
        return False


def _is_undamaged(file: Path) -> bool:
    """Whether a file of a complete checkpoint has the checksum that was written with it, where there is one."""
    crc = marker_of(file.parent).files.get(file.name, (0, None))[1]
    return crc is None or checksum(file) == crc


def _refuse_other_networks(path: Path, files: list[Path]) -> None:
    for file in files:
        kind = stated_format(file)
        if kind.startswith(WHOLE_NETWORK):
            raise UserError(
                f"{path}: no MAE encoder in it, it is a {kind.removeprefix(WHOLE_NETWORK).replace('_', ' ')}; give the "
                "encoder it was trained from, or its run"
            )


def stated_format(file: Path, key: str = "format") -> str:
    """What a safetensors file says its format is, or another ``key`` of its metadata; empty where it says nothing, or
    is another kind of file."""
    try:
        with safe_open(file, framework="pt") as opened:
            stated = (opened.metadata() or {}).get(key, "")
        return str(json.loads(stated)) if stated.startswith('"') else stated
    except (SafetensorError, OSError, ValueError, RecursionError):
        return ""


def resolve_weights(path: Path | str, *, decoder: bool = False) -> Path:
    """The weights file meant by a file, a run directory, a checkpoint folder or a folder of timm or transformers.

    A run directory means its encoder or its classifier; with ``decoder`` its classifier, or of a pre-training, where
    there is none, the full model of its last complete checkpoint.
    Raises ``UserError`` where there is none, and for a file that says it is another network.
    """
    path = Path(path)
    if not path.is_dir():
        if not path.exists():
            raise UserError(f"weights file {path} does not exist; give a weights file, or the folder of a run")
        _refuse_other_networks(path, [path])
        return path
    if not any((path / name).is_file() for name in (EXPORT_CONFIG, ENCODER, CLASSIFIER)):
        _refuse_other_networks(path, sorted(path.glob("*.safetensors")))
    if (path / EXPORT_CONFIG).is_file():
        found_weights = [path / name for name in EXPORTED if (path / name).is_file()]
        if not found_weights:
            raise UserError(f"{path} has a {EXPORT_CONFIG} and no {MODEL} or {EXPORTED[2]}; give the weights file")
        return found_weights[0]
    if (path / MODEL).is_file():
        if not is_complete(path) or not _is_undamaged(path / MODEL):
            raise UserError(f"checkpoint {path} is not complete, or damaged; use an earlier one")
        return path / MODEL
    for name in (CLASSIFIER,) if decoder else (ENCODER, CLASSIFIER):
        if (path / name).is_file():
            return path / name
    checkpoint = newest_undamaged(path)
    if checkpoint is None and any(path.glob("*.distcp")):
        raise UserError(
            f"{path} is a sharded checkpoint of torch.distributed.checkpoint; make one file of it with "
            f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {path} whole.pth"
        )
    if checkpoint is None:
        others = [file for suffix in ("safetensors", "pth", "pt") for file in sorted(path.glob(f"*.{suffix}"))]
        lacks, way = "weights", "give a run directory or a weights file"
        if others:
            lacks, way = f"{ENCODER}, no {CLASSIFIER}", f"give {others[0]}, which lies in it"
        raise UserError(f"{path} holds no {lacks} and no complete checkpoint; {way}")
    return checkpoint / MODEL


def newest_undamaged(run: Path) -> Path | None:
    """The newest complete checkpoint of a run whose weights are as they were written; None where there is none."""
    return next((folder for folder in reversed(complete_checkpoints(run)) if _is_undamaged(folder / MODEL)), None)
