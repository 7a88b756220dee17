"""``segmenter.safetensors``: a trained segmenter with its classes and the config that rebuilds it."""

from __future__ import annotations

from pathlib import Path

from mmengine.runner import Runner

from mae_core.conversion.files import write_weights
from mae_core.conversion.loading import describe_encoder
from transfer.segmentation.engine_mmseg.backbone import MAECoreViT
from transfer.segmentation.engine_mmseg.runner import bare_model

SEGMENTER = "segmenter.safetensors"


def write_segmenter(path: Path, runner: Runner) -> None:
    """The trained segmenter's tensors, with the classes and the config that rebuilds it as metadata."""
    model = bare_model(runner.model)
    meta = runner.val_dataloader.dataset.metainfo
    facts = {"format": "mae_core segmenter", "classes": list(meta["classes"]), "steps": runner.iter}
    facts["palette"] = [list(map(int, colour)) for colour in meta["palette"]]
    facts["reduce_zero_label"] = bool(meta.get("reduce_zero_label", False))
    if isinstance(model.backbone, MAECoreViT):
        facts["encoder"] = describe_encoder(model.backbone)
    facts["config"] = runner.cfg.pretty_text
    write_weights(path, model.state_dict(), facts)
