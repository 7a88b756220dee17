"""``mae reconstruct``: look at any checkpoint on any images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from mae_core.atomic import atomic_path
from mae_core.conversion.files import read_weights
from mae_core.conversion.loading import load_mae
from mae_core.data.augmentation import centre_view
from mae_core.data.images import Statistics, UnreadableImage, list_images, read_image
from mae_core.errors import UserError
from mae_core.layout import resolve_weights
from mae_core.training.pictures import fixed_mask, reconstruction_strip

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def reconstruct_files(
    weights: Path, images: Sequence[Path], out: Path, *, ratio: float | None = None, seed: int = 0, most: int = 12
) -> Path:
    """Draw reconstruction strips of image files (or of the first of a folder) into the picture ``out``.

    Raises ``UserError`` for unreadable images, weights without a decoder, a ratio outside (0, 1) and an
    ``out`` that exists or cannot be written.
    """
    if out.suffix.lower() not in PICTURE_SUFFIXES:
        raise UserError(f"--out {out} is not a picture; end it in {', '.join(PICTURE_SUFFIXES)}")
    if out.exists():
        raise UserError(f"{out} exists; choose another picture with --out")
    model = load_mae(weights)
    if ratio is not None:
        model.masker = type(model.masker)(ratio)  # type: ignore[call-arg]
    metadata = read_weights(resolve_weights(weights, decoder=True))[1]
    statistics = Statistics(tuple(metadata["mean"]), tuple(metadata["std"]))
    view = centre_view(model.encoder.grid.image_size, statistics)
    files: list[Path] = []
    for path in images:
        files += list_images(path) if path.is_dir() else [path]
    pixels = []
    for path in files[:most]:
        try:
            pixels.append(view(read_image(path, model.encoder.in_channels)))
        except UnreadableImage as error:
            _, reason = error.unreadable
            raise UserError(f"image {path} cannot be read ({reason}); mend it, or give another") from None
    mask = fixed_mask(model, len(pixels), seed)
    strip = reconstruction_strip(model, torch.stack(pixels), mask, statistics)
    try:
        with atomic_path(out) as temporary:
            strip.save(temporary)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {out} ({error}); choose another picture with --out") from None
    print(f"wrote {out}")
    return out
