"""What a model says of images, row by row; features of a frozen trunk, by option kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mae_core.data.config import EvaluationData
from mae_core.data.images import Statistics
from mae_core.data.labelled import LabelledPaths, TestImages, collate_readable
from mae_core.errors import UserError
from mae_core.models.probe import digest_of
from mae_core.models.timm_trunk import Encoder
from mae_core.patches import as_pair
from mae_core.training.distributed import gather
from mae_core.training.memory import GIB, available_memory
from mae_core.training.predictions import predict
from mae_core.training.run import Run
from mae_core.weights.files import read_weights, write_weights


class Rows(NamedTuple):
    """What a model says of images: values (N, D), or (N, tokens, D), float32, and which image each row is of: indices
    (N,) int64, ascending. Unreadable images have no row."""

    values: Tensor
    indices: Tensor


class Viewer(NamedTuple):
    """A model from images (B, C, H, W) to rows (B, D) or (B, tokens, D), and how images come to it."""

    model: nn.Module
    data: EvaluationData
    statistics: Statistics
    batch: int


def rows_of(paths: Sequence[Path], viewer: Viewer, run: Run) -> Rows:
    """A row for each image as it is measured (no augmentation), on all ranks; each image is computed on one, once.

    Raises ``UserError`` where no image can be read.
    """
    # An image's place takes the place of its label, so that each row knows its image.
    files = LabelledPaths(list(paths), range(len(paths)), [])
    images = TestImages(files, viewer.data, as_pair(viewer.data.image_size), viewer.statistics)
    loader = run.loader(images, collate_readable, viewer.batch)
    found = [(values.cpu(), places.cpu()) for values, places in predict(viewer.model, loader, run)]
    parts = [pair for part in gather(found) for pair in part]
    if not parts:
        raise UserError(f"none of {len(paths)} images can be read, the first is {paths[0]}; check data.path")
    values, indices = (torch.cat(columns) for columns in zip(*parts, strict=True))
    order = indices.argsort()
    return Rows(values[order], indices[order])


def features_of(paths: Sequence[Path], trunk: Viewer, run: Run, *, cache: Path | None = None) -> Rows:
    """Features of images, see ``rows_of``. ``cache``: a folder where features of the same files under the same trunk
    and view are looked for first, and kept. Raises ``UserError`` where it cannot be written."""
    kept = None if cache is None else cache / f"{_identity(paths, trunk, run.precision)}.safetensors"
    if kept is not None and all(gather(kept.is_file())):
        run.say(f"features of {len(paths)} images are in {kept}")
        stored, _ = read_weights(kept)
        if lacking := len(paths) - len(stored["indices"]):
            run.say(
                f"{lacking} images could not be read when the file was written and have no features; "
                "delete the file to read them again"
            )
        return Rows(stored["values"], stored["indices"])
    features = rows_of(paths, trunk, run)
    if kept is not None and run.is_main:
        try:
            write_weights(kept, features._asdict(), {"images": len(paths)})
        except OSError as error:
            raise UserError(f"cannot write features to cache={cache}: {error.strerror}") from None
        run.say(f"kept the features of {len(features.values)} images in {kept}")
    return features


def check_cache(cache: Path | None) -> None:
    """Raise ``UserError`` where ``cache`` is no folder or cannot be written to, before any work."""
    if cache is None:
        return
    if cache.exists() and not cache.is_dir():
        raise UserError(f"cache={cache} is a file; give a folder to keep features in")
    nearest = next(place for place in (cache, *cache.absolute().parents) if place.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"cannot write features to cache={cache}: {nearest} is not writable; give another folder")


def check_tokens_fit(images: int, model: Encoder, cache: Path, device: torch.device) -> None:
    """Raise ``UserError`` where the tokens of so many images do not fit into memory and into the disk of ``cache``.

    All rows are in memory at once, twice while they are put together; tokens are hundreds of times what features are.
    """
    needed = images * (model.prefix + model.grid.num_patches) * model.num_features * torch.float32.itemsize
    nearest = next(place for place in (cache, *cache.absolute().parents) if place.exists())
    there = {"memory": available_memory(device) // 2, "disk": shutil.disk_usage(nearest).free}
    for kind, free in there.items():
        if needed > free:
            raise UserError(
                f"the tokens of {images} images take {needed / GIB:.1f} GiB and {free / GIB:.1f} GiB of {kind} are "
                "free; leave cache out, so that every step passes its images through the trunk"
            )


def _identity(paths: Sequence[Path], trunk: Viewer, precision: torch.dtype) -> str:
    """Changes with the trunk's weights and pooling, the view, the precision, and the files' names, sizes and times."""
    digest = hashlib.sha256(bytes(digest_of(trunk.model).tolist()))
    pooling = getattr(trunk.model, "pooling", getattr(trunk.model, "global_pool", None))
    pooled = [] if pooling else ["tokens"]
    data = trunk.data
    view = [*pooled, data.image_size, data.test_crop, *data.reading, trunk.statistics, str(precision)]
    digest.update(json.dumps(view).encode())
    for path in paths:
        found = path.stat()
        digest.update(f"{path}\0{found.st_size}\0{found.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()[:24]
