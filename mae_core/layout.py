"""Names inside a run directory, and how to find the weights in it."""

from __future__ import annotations

import json
from pathlib import Path

from mae_core.errors import UserError

CONFIG = "config.yaml"
LOG = "log.jsonl"
ENVIRONMENT = "environment.json"
DATA = "data.json"
ENCODER = "encoder.safetensors"
CLASSIFIER = "classifier.safetensors"
TOKENIZER = "tokenizer.safetensors"
SEGMENTER = "segmenter.safetensors"
DETECTOR = "detector.safetensors"
LOADING = "loading.json"
METRICS = "metrics.json"
FEATURES = "features.npz"
PREDICTIONS = "predictions.csv"
PER_CLASS = "per_class.csv"
LOGITS = "logits.npz"
CHECKPOINTS = "checkpoints"
PICTURES = "pictures"
MODEL = "model.safetensors"
EXPORT_CONFIG = "config.json"
PREPROCESSOR_CONFIG = "preprocessor_config.json"
EXPORTED = (MODEL, f"{MODEL}.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
TRAINING_STATE = "training.pt"
COMPLETE = "COMPLETE"
LAST_CHECKPOINT = "last_checkpoint"
"""mmengine's file that names the last checkpoint of a run; written after the checkpoint itself."""


def complete_checkpoints(run: Path) -> list[Path]:
    """Checkpoint folders of a run that were written to the end, oldest first."""
    named = [(folder.name.removeprefix("step_"), folder) for folder in (run / CHECKPOINTS).glob("step_*")]
    folders = sorted((int(step), folder) for step, folder in named if step.isdecimal())
    return [folder for _, folder in folders if is_complete(folder)]


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint has its COMPLETE marker and every file in it has the size the marker names."""
    try:
        sizes = json.loads((checkpoint / COMPLETE).read_text())
        return bool(sizes) and all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def resolve_weights(path: Path | str, *, decoder: bool = False) -> Path:
    """The weights file meant by a file, a run directory, a checkpoint folder or a folder of timm or transformers.

    A run directory means its encoder or its classifier; with ``decoder`` its classifier, or of a pre-training, where
    there is none, the full model of its last complete checkpoint.
    Raises ``UserError`` where there is none, and for a detector.
    """
    path = Path(path)
    if path.name == DETECTOR or (path / DETECTOR).is_file():
        raise UserError(
            f"{path}: no MAE encoder in it, it is a detector; give the encoder it was trained from, or its run"
        )
    if not path.is_dir():
        if not path.exists():
            raise UserError(f"weights file {path} does not exist")
        return path
    if (path / EXPORT_CONFIG).is_file():
        found_weights = [path / name for name in EXPORTED if (path / name).is_file()]
        if not found_weights:
            raise UserError(f"{path} has a {EXPORT_CONFIG} and no {MODEL} or {EXPORTED[2]}; give the weights file")
        return found_weights[0]
    if (path / MODEL).is_file():
        if not is_complete(path):
            raise UserError(f"checkpoint {path} is not complete; use an earlier one")
        return path / MODEL
    for name in (CLASSIFIER,) if decoder else (ENCODER, CLASSIFIER):
        if (path / name).is_file():
            return path / name
    found = complete_checkpoints(path)
    if not found:
        raise UserError(f"{path} holds no weights and no complete checkpoint; give a run directory or a weights file")
    return found[-1] / MODEL
