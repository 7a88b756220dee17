"""``mae inspect``: what a weights file holds."""

from __future__ import annotations

from pathlib import Path

from mae_core.conversion.files import read_weights
from mae_core.conversion.loading import read_encoder
from mae_core.layout import resolve_weights


def describe_file(path: Path | str) -> str:
    """A few lines on a weights file, a run or a checkpoint. Raises ``UserError`` where it holds no MAE encoder."""
    source = read_encoder(path)
    state, metadata = read_weights(resolve_weights(path))
    decoder = any(name.startswith(("decoder.", "decoder_")) for name in state)
    classes = state["head.weight"].shape[0] if "head.weight" in state else None
    known = ", ".join(f"{key} {metadata[key]}" for key in ("target", "mask_ratio", "epochs", "step") if key in metadata)
    uses = ["detection", "segmentation"] if classes else ["finetune", "detection", "segmentation"]
    uses += ["reconstruct"] if any(n.startswith("decoder.") for n in state) else []
    parameters = sum(tensor.numel() for tensor in state.values())
    lines = [
        f"file       {source.path}",
        f"format     {metadata.get('format', 'official MAE names, no metadata')}",
        f"encoder    ViT-{source.size}: width {source.shape.width}, depth {source.shape.depth}, "
        f"heads {source.shape.heads}",
        f"patches    {source.patch_size}x{source.patch_size}, grid {source.grid[0]}x{source.grid[1]} "
        f"(images {source.image_size[0]}x{source.image_size[1]}), {source.in_chans} channels",
        f"decoder    {'yes' if decoder else 'no'}",
        f"classes    {classes if classes else 'none'}",
        f"pixels     mean {metadata.get('mean', 'not stated')}, std {metadata.get('std', 'not stated')}",
        f"training   {known or 'not stated'}",
        f"tensors    {len(state)}, {parameters:,} numbers",
        f"use it for {', '.join(uses)}",
    ]
    return "\n".join(lines)
