"""``mae fit-pca``: principal components of the training set's patches, for the PCA target (paper, Table 1d)."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from mae_core.counting import Counter
from mae_core.data.images import refuse_unreadable, statistics_of
from mae_core.data.loading import StepSampler, make_loader
from mae_core.data.rates import processes
from mae_core.data.sources import open_source
from mae_core.data.unlabelled import UnlabelledImages, collate
from mae_core.errors import UserError
from mae_core.patches import PatchGrid, patchify
from mae_core.training.pretrain_config import PretrainConfig
from mae_core.training.statistics import with_statistics
from mae_core.training.target_files import PCA_FORMAT
from mae_core.training.warm_start import started_from, weights_facts
from mae_core.training.watch import split_images
from mae_core.weights.files import write_weights

BATCH = 32


class PatchMoments:
    """Running sum and outer products of patches, in float64: all that principal components need of them."""

    def __init__(self, values: int) -> None:
        self.count = 0
        self.total = torch.zeros(values, dtype=torch.float64)
        self.products = torch.zeros(values, values, dtype=torch.float64)

    def add(self, patches: Tensor) -> None:
        """Take in (n, values) patches."""
        patches = patches.double()
        self.count += len(patches)
        self.total += patches.sum(dim=0)
        self.products += patches.T @ patches

    def components(self, kept: int) -> tuple[Tensor, Tensor, Tensor]:
        """(kept, values) orthonormal rows, the largest variance first; the mean patch; the variances of all components.

        The sign of a row, which is free, makes its largest entry positive.
        """
        mean = self.total / self.count
        covariance = self.products / self.count - torch.outer(mean, mean)
        variances, vectors = torch.linalg.eigh(covariance)
        rows = vectors.flip(1).T[:kept]
        rows = rows * rows.gather(1, rows.abs().argmax(dim=1, keepdim=True)).sign()
        return rows.contiguous(), mean, variances.flip(0).clamp(min=0)


def fit_pca(config: PretrainConfig, out: Path | None = None, *, components: int = 96, images: int = 2000) -> Path:
    """Fit on ``images`` training images, seen as a pre-training of ``config`` sees them; write ``out`` (``target.pca``
    when None).

    Raises ``UserError`` where ``out`` exists or cannot be written, or there are not as many components as asked for.
    """
    out = out or config.target.pca
    if out is None:
        raise UserError("no file to write; give --out FILE, or set target.pca=FILE")
    if out.exists():
        raise UserError(f"{out} exists; choose another file with --out")
    with _writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out.parent).close()  # fails now, not after the fit
    config, start = started_from(config, resume=False)
    grid = PatchGrid.of(config.data.image_size, config.model.patch_size or config.model.shape.patch_size)
    values = grid.patch**2 * config.data.channels
    if not 0 < components <= values:
        raise UserError(
            f"{components} components were asked for, but patches of {grid.patch}x{grid.patch} pixels and "
            f"{config.data.channels} channels have {values} values; set --components to 1 to {values}"
        )
    config = with_statistics(config, open_source(config.data), resume=False, weights=weights_facts(start, config.data))
    moments = moments_of(config, grid, images, least=components)
    rows, mean, variances = moments.components(components)
    explained = (variances[:components].sum() / variances.sum().clamp(min=1e-12)).item()
    metadata = {
        "format": PCA_FORMAT,
        "patch_size": grid.patch,
        "in_chans": config.data.channels,
        **statistics_of(config.data)._asdict(),
        "patches": moments.count,
        "explained": round(explained, 6),
    }
    tensors = {"components": rows, "mean": mean, "variances": variances}
    with _writing(out):
        write_weights(out, {name: tensor.float() for name, tensor in tensors.items()}, metadata)
    print(
        f"wrote {out}: {components} of {values} coefficients hold {explained:.1%} of the variance of "
        f"{moments.count} patches ({grid.patch}x{grid.patch} pixels, {config.data.channels} channels)"
    )
    return out


def moments_of(config: PretrainConfig, grid: PatchGrid, images: int, *, least: int) -> PatchMoments:
    """Of the patches of ``images`` training images (or of all). Raises ``UserError`` where they are ``least`` or
    fewer."""
    training = split_images(config, open_source(config.data)).training
    dataset = UnlabelledImages(training, config.data, config.seed)
    wanted = min(images, len(dataset))
    size = min(BATCH, wanted)
    steps = math.ceil(wanted / size)
    seen = steps * size
    if seen * grid.num_patches <= least:
        raise UserError(
            f"{seen} images have {seen * grid.num_patches} patches, too few for {least} components; raise --images"
        )
    sampler = StepSampler(len(dataset), size, config.seed, total_steps=steps)
    moments, progress = PatchMoments(grid.patch**2 * config.data.channels), Counter("fitting on images")
    workers = processes(config.data.workers)
    for batch in make_loader(dataset, sampler, collate, workers=workers):
        if config.data.on_error == "raise":
            refuse_unreadable(batch.unreadable)
        for path, reason in batch.unreadable:
            print(f"skipped unreadable image {path} ({reason})")
        moments.add(patchify(batch.to(torch.device("cpu")).pixels, grid.patch).flatten(0, 1))
        progress(moments.count // grid.num_patches, seen)
    return moments


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """What stops a file from being written becomes a ``UserError``."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {out} ({error.strerror}); choose another file with --out") from None
