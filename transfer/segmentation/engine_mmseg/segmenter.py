"""From a run's model to ``segmenter.safetensors``, and from the file to a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import ConfigDict
from mmengine.model import revert_sync_batchnorm
from mmengine.runner import Runner
from mmseg.registry import MODELS
from mmseg.utils import register_all_modules
from torch import Tensor, nn

from mae_core.errors import explained
from mae_core.training.finite import refuse_non_finite
from mae_core.weights.encoder_file import describe_encoder
from mae_core.weights.files import write_weights
from mae_core.weights.load import load_state
from transfer.segmentation.engine_mmseg.backbone import is_ours
from transfer.segmentation.engine_mmseg.faults import ADVICE
from transfer.segmentation.engine_mmseg.runner import bare_model
from transfer.segmentation.segmenter_file import FORMAT, SegmenterFile


def write_segmenter(path: Path, runner: Runner) -> None:
    """The trained segmenter's tensors, with the classes and the config that rebuilds it as metadata."""
    model = bare_model(runner.model)
    meta = runner.val_dataloader.dataset.metainfo
    facts: dict[str, Any] = {"format": FORMAT, "classes": list(meta["classes"]), "steps": runner.iter}
    facts["palette"] = [list(map(int, colour)) for colour in meta["palette"]]
    facts["reduce_zero_label"] = bool(meta.get("reduce_zero_label", False))
    coding = getattr(runner.val_dataloader.dataset, "coding", None)
    if coding is not None and coding.written:
        facts["label_values"] = coding.values
    if is_ours(model.backbone):
        facts["encoder"] = describe_encoder(model.backbone)
    facts["config"] = runner.cfg.pretty_text
    refuse_non_finite(model.state_dict(), path.name, ADVICE)
    write_weights(path, model.state_dict(), facts)


def build_segmenter(file: SegmenterFile, device: torch.device | str = "cpu") -> nn.Module:
    """The segmenter of a file, in evaluation mode, batch norm for one device.

    Raises ``UserError`` where its config does not build a model that the tensors fit.
    """
    register_all_modules()
    section = ConfigDict(file.config["model"])
    section.backbone.pop("weights", None)
    with explained(f"{file.path}: its model cannot be built"):
        model = revert_sync_batchnorm(MODELS.build(section))
    fill_segmenter(model, file.state, str(file.path))
    return model.to(device).eval()


def fill_segmenter(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Put all tensors of a trained segmenter into ``model``; ``UserError`` unless names and shapes are the same."""
    load_state(model, state, source, remedy="use the config it was trained with")
