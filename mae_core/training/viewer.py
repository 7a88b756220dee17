"""``mae reconstruct``: look at any checkpoint on any images, under any masks."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mae_core.atomic import atomic_path
from mae_core.config.schema import hint
from mae_core.data.augmentation import centre_view
from mae_core.data.decoding import UnreadableImage, usable
from mae_core.data.images import DEFAULT_STATISTICS, ImageFiles, ImageSource, Statistics
from mae_core.data.sources import kind_of, open_places
from mae_core.errors import UserError
from mae_core.masking import MASKERS, Masker, build_masker, describe_masker
from mae_core.models.mae import MaskedAutoencoder
from mae_core.targets import TARGETS
from mae_core.training.pictures import (
    Display,
    Strip,
    describe_mask,
    draw_mask,
    notes_of,
    panel_titles,
    reconstruction_rows,
    tile,
)
from mae_core.weights.load import load_mae, read_encoder

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def reconstruct_files(
    weights: Path,
    images: Sequence[Path],
    out: Path,
    *,
    ratios: Sequence[float] = (),
    maskings: Sequence[str] = (),
    masks: int = 1,
    bands: Sequence[int] | None = None,
    target: str | None = None,
    heads: int | None = None,
    decoder_heads: int | None = None,
    branch: str | None = None,
    seed: int = 0,
    most: int = 12,
) -> Path:
    """Draw reconstruction strips of images (files, or the first of folders, lists, shards) into the picture ``out``: a
    row for each image, strategy, ratio and mask.

    Empty ``ratios`` and ``maskings`` are the checkpoint's own; ``target``, ``heads`` and ``decoder_heads`` are
    for files that do not say theirs. Raises
    ``UserError`` for unreadable images, weights without a decoder, predictions that are no pixels, unknown names, a
    ratio outside (0, 1) and an ``out`` that exists or cannot be written.
    """
    if out.suffix.lower() not in PICTURE_SUFFIXES:
        raise UserError(f"--out {out} is not the name of a picture; end it in {', '.join(PICTURE_SUFFIXES)}")
    if out.exists():
        raise UserError(f"{out} exists; choose another picture with --out")
    for name in maskings:
        check_known(name, MASKERS)
    if target is not None:
        check_known(target, TARGETS)
    model, statistics = load_with_statistics(weights, target, heads, decoder_heads, branch)
    if not model.target.gives_pixels:
        raise UserError(
            f"{weights} predicts {model.target_name}, whose tokenizer has no decoder; there are no pixels to draw"
        )
    display = Display.of(statistics, bands)
    own = describe_masker(model.masker)
    maskers = [
        build_masker(name, ratio, own["masking_options"] if name == own["masking"] else None)
        for name in maskings or [own["masking"]]
        for ratio in ratios or [model.masker.ratio]
    ]
    pixels = read_views(images, model, statistics, most)
    strip = tile(
        all_rows(model, pixels, maskers, statistics, display, masks=masks, seed=seed),
        panel_titles(model),
        notes_of(model, display),
    )
    try:
        with atomic_path(out) as temporary:
            strip.save(temporary)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {out} ({error}); choose another picture with --out") from None
    print(f"wrote {out}")
    return out


def check_known(name: str, table: Collection[str]) -> None:
    """Raise ``UserError`` with a guess unless ``table`` has a row ``name``."""
    if name not in table:
        raise UserError(f"unknown name {name!r}; {hint(name, table)}")


def all_rows(
    model: MaskedAutoencoder,
    pixels: Tensor,
    maskers: Sequence[Masker],
    statistics: Statistics,
    display: Display,
    *,
    masks: int,
    seed: int,
) -> list[Strip]:
    """Rows of all images (B, C, H, W), those of one image below each other."""
    blocks = []
    for masker in maskers:
        for number in range(masks):
            mask = draw_mask(model, masker, len(pixels), seed, number)
            label = describe_mask(masker, mask) + (f"\nmask {number + 1}" if masks > 1 else "")
            blocks.append(reconstruction_rows(model, pixels, mask, statistics, display, label))
    return [rows[index] for index in range(len(pixels)) for rows in blocks]


def load_with_statistics(
    weights: Path,
    target: str | None,
    heads: int | None = None,
    decoder_heads: int | None = None,
    branch: str | None = None,
) -> tuple[MaskedAutoencoder, Statistics]:
    """The model, and the mean and std of the pixels it was trained on: the file's, or ImageNet's, as the released
    models'. What is assumed is printed. Raises ``UserError`` where there is no default for these channels."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        source = read_encoder(weights, decoder=True, heads=heads, branch=branch, asked_as="--branch {}")
        model = load_mae(source, target=target, decoder_heads=decoder_heads)
    for warning in caught:
        print(f"note: {warning.message}")
    channels, info = model.encoder.in_channels, source.info
    if info.mean and info.std:
        return model, Statistics(tuple(info.mean), tuple(info.std))
    if channels not in DEFAULT_STATISTICS:
        raise UserError(
            f"{weights} does not state the mean and std of its {channels} channels, and there is "
            f"no default for {channels} channels; give the file as the run wrote it"
        )
    print(f"note: {weights} does not state the mean and std of its pixels; ImageNet's are assumed")
    return model, Statistics(*DEFAULT_STATISTICS[channels])


def read_views(images: Sequence[Path], model: MaskedAutoencoder, statistics: Statistics, most: int) -> Tensor:
    """(B, C, H, W): centre crops of at most ``most`` images. Raises ``UserError`` at one that cannot be read."""
    channels = model.encoder.in_channels
    view = centre_view(model.encoder.grid.image_size, statistics)
    views: list[Tensor] = []
    for path in images:
        if not path.exists() and kind_of(path) == "files":
            raise UserError(f"image {path} does not exist; give image files or folders of them")
        alone = path.is_file() and kind_of(path) == "files"  # whatever its ending
        source: ImageSource = ImageFiles([path], channels) if alone else open_places([path], channels)
        for index in range(min(len(source), most - len(views))):
            try:
                views.append(usable(view(source.read(index)), path))
            except UnreadableImage as error:
                name, reason = error.unreadable
                raise UserError(f"image {name} cannot be read ({reason}); repair it, or give another") from None
    return torch.stack(views)
