"""What is measured while a pre-training runs: the loss on images kept out of it, and where labels exist k-NN and, by
option, probes."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mae_core.data.augmentation import centre_view
from mae_core.data.config import PretrainData
from mae_core.data.decoding import UnreadableImage, usable
from mae_core.data.images import ImageFiles, ImageSource, read_some, spread_indices, statistics_of
from mae_core.data.labelled import LabelledBatch, LabelledPaths, LabelledSample, read_image_folder
from mae_core.data.labelled import collate_readable as collate_labelled
from mae_core.data.reading import ReadAs
from mae_core.data.sources import Part, open_places
from mae_core.data.unlabelled import CentreViews, collate_readable
from mae_core.errors import UserError
from mae_core.masking import SampleMasks
from mae_core.measures.knn import knn_accuracy
from mae_core.models.mae import MaskedAutoencoder
from mae_core.patches import PatchGrid, as_pair
from mae_core.seeds import SPLIT, generator_at
from mae_core.training import distributed
from mae_core.training.frozen_config import ProbeConfig, ProbeOptim
from mae_core.training.linprobe import ROWS_AT_ONCE, build_probe, probe_loss, probe_optimizer, rates_of
from mae_core.training.loop import FitSettings, cosine_schedule
from mae_core.training.memory import GIB, available_memory
from mae_core.training.pretrain_config import PretrainConfig
from mae_core.training.run import Run

IMAGES_TRIED = 4
PROBE_BATCH, PROBE_RATES = 256, (0.3, 1.0, 3.0, 10.0, 30.0)
"""Of LARS; the rates learn side by side, and the best on the validation images counts, as in a sweep of
``mae linprobe``."""
Rows = tuple[Tensor, Tensor]
"""(n, 1 + N, D) normalised tokens or, where no probe needs the others, the (n, 1, D) cls token; (n,) int64 labels."""


class Watched(NamedTuple):
    """Images of a pre-training: those it learns from, those kept out, and the labelled ones; see ``WatchConfig``."""

    training: ImageSource
    held_out: ImageSource | None
    labelled: tuple[LabelledPaths, LabelledPaths] | None

    def only_looked_at(self, read_as: ReadAs) -> list[ImageSource]:
        """The images that the run measures on and does not learn from."""
        held_out = [] if self.held_out is None else [self.held_out]
        return [*held_out, *(ImageFiles(files.paths, read_as) for files in self.labelled or ())]

    @property
    def worth(self) -> float:
        """How many images of a training step take about as long as a measurement, for ``Hook``: one that is kept out is
        a step's forward pass, a third; a labelled one shows the encoder all patches, four times those of a step."""
        held_out = 0 if self.held_out is None else len(self.held_out)
        return held_out / 3 + sum(len(files.paths) for files in self.labelled or ())


def split_images(config: PretrainConfig, source: ImageSource) -> Watched:
    """Divide ``source`` as the configuration says; equal seed and images, equal parts.

    Raises ``UserError`` where nothing is left to train on, or a folder to watch is not what it should be.
    """
    watch, seed = config.watch, config.seed
    training: ImageSource = source
    held_out: ImageSource | None = None
    if watch.share:
        order = torch.randperm(len(source), generator=generator_at(seed, SPLIT)).tolist()
        count = max(1, round(watch.share * len(source)))
        if count >= len(source):
            raise UserError(
                f"watch.share={watch.share:g} keeps {count} of {len(source)} images out, so that none is left to train "
                "on; lower it, or name other images with watch.path"
            )
        training, held_out = Part(source, sorted(order[count:])), Part(source, sorted(order[:count]))
    elif watch.path is not None:
        held_out = open_places([watch.path], config.data.reading, cache=config.data.shard_cache)
    if held_out is not None and len(held_out) > watch.most_images:
        held_out = Part(held_out, spread_indices(len(held_out), watch.most_images))
    labelled = None
    if watch.labelled is not None:
        train, val = (some_of(files, watch.most_images) for files in read_image_folder(watch.labelled))
        if len(train.paths) < watch.neighbours:
            raise UserError(
                f"watch.neighbours={watch.neighbours} is more than the {len(train.paths)} images of "
                f"{watch.labelled}/train; lower it"
            )
        labelled = train, val
        if "attentive" in watch.probes:
            _check_tokens_fit(config, len(train.paths) + len(val.paths))
    watched = Watched(training, held_out, labelled)
    for images in watched.only_looked_at(config.data.reading):
        read_some(images, IMAGES_TRIED)
    return watched


def _check_tokens_fit(config: PretrainConfig, images: int) -> None:
    """Raise ``UserError`` where the tokens of so many images take more than half of the memory."""
    trunk = config.model.shape
    grid = PatchGrid.of(config.data.image_size, config.model.patch_size or trunk.patch_size)
    needed = images * (1 + grid.num_patches) * trunk.width * torch.float32.itemsize
    free = available_memory(torch.device("cpu")) // 2
    if needed > free:
        raise UserError(
            f"watch.probes=[attentive] keeps the tokens of {images} images, {needed / GIB:.1f} GiB, and "
            f"{free / GIB:.1f} GiB of memory are free for it; lower watch.most_images, or leave the probe out"
        )


def some_of(files: LabelledPaths, count: int) -> LabelledPaths:
    """At most ``count`` files, evenly over all classes."""
    chosen = spread_indices(len(files.paths), count)
    return files._replace(paths=[files.paths[i] for i in chosen], labels=[files.labels[i] for i in chosen])


@torch.inference_mode()
def held_out_loss(model: MaskedAutoencoder, source: ImageSource, config: PretrainConfig, run: Run) -> float | None:
    """The loss on centre crops with a mask per image that is always the same, over all ranks; None where no image can
    be read any more."""
    views = CentreViews(source, config.data, config.seed, SampleMasks(model.masker, model.encoder.grid))
    total = torch.zeros(2, dtype=torch.float64)
    for batch in run.loader(views, collate_readable, config.watch.batch):
        run.note_unreadable(batch.unreadable)
        if len(batch):
            with run.autocast():
                loss = model(batch.pixels.to(run.device), mask=batch.mask).loss
            total += torch.tensor([float(loss) * len(batch), len(batch)])
    total = distributed.sum_over_ranks(total.to(run.device, torch.float32))
    return float(total[0] / total[1]) if total[1] else None


def labelled_top1(
    model: MaskedAutoencoder, labelled: tuple[LabelledPaths, LabelledPaths], config: PretrainConfig, run: Run
) -> dict[str, float | None]:
    """Top-1 accuracy in percent of the validation images: ``knn_top1`` by their nearest training images, of the cls
    token as in ``mae knn`` by default, and of each probe. None where too few images can be read any more."""
    train, val = (_rows(model, files, config, run) for files in labelled)
    classes, k = len(labelled[0].classes), config.watch.neighbours
    names = ["knn_top1", *(f"{kind}_top1" for kind in config.watch.probes)]
    if len(train[1]) < k or not len(val[1]):
        return dict.fromkeys(names)
    found = [100 * knn_accuracy(val[0][:, 0], val[1], train[0][:, 0], train[1], classes, neighbours=(k,))[k]]
    found += [probe_top1(kind, train, val, classes, config, run.device) for kind in config.watch.probes]
    return dict(zip(names, found, strict=True))


def probe_top1(
    kind: Literal["linear", "attentive"],
    train: Rows,
    val: Rows,
    classes: int,
    config: PretrainConfig,
    device: torch.device,
) -> float:
    """Top-1 accuracy in percent of a probe that learns from ``train``, the best of ``PROBE_RATES`` on ``val``.

    Everything random comes from the run's seed, and nothing outside changes: equal encoders, equal numbers, and the
    same on every rank.
    """
    rows, labels = train if kind == "attentive" else (train[0][:, 0], train[1])
    queries = val[0] if kind == "attentive" else val[0][:, 0]
    batch = min(PROBE_BATCH, len(rows))
    steps = config.watch.probe_epochs * max(len(rows) // batch, 1)
    optim = ProbeOptim(batch_size=256, base_lr=PROBE_RATES[0], sweep=PROBE_RATES[1:])
    options = ProbeConfig() if kind == "linear" else ProbeConfig(kind=kind, queries=math.gcd(8, rows.shape[-1]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        probe = build_probe(options, None, rows.shape[-1], classes, heads=len(rates_of(optim))).to(device)
    optimizer = probe_optimizer(probe, optim, optim.lr)
    schedule = cosine_schedule(optimizer, FitSettings(steps, steps // 10, optim.lr))
    generator = torch.Generator().manual_seed(config.seed)
    order = torch.empty(0, dtype=torch.int64)
    for step in range(steps):
        if len(order) < batch:
            order = torch.randperm(len(rows), generator=generator)
        chosen, order = order[:batch], order[batch:]
        schedule.step_update(step)
        optimizer.zero_grad(set_to_none=True)
        probe_loss(probe, LabelledBatch(rows[chosen].to(device), labels[chosen].to(device), []))["loss"].backward()
        optimizer.step()
    probe.eval()
    with torch.inference_mode():
        right = [
            (probe(part.to(device)).argmax(dim=2).cpu() == truth).sum(dim=1)
            for part, truth in zip(queries.split(ROWS_AT_ONCE), val[1].split(ROWS_AT_ONCE), strict=True)
        ]
    return 100 * float(torch.stack(right).sum(dim=0).max()) / len(queries)


class _LabelledViews(Dataset[LabelledSample]):
    """Centre crops with their labels."""

    def __init__(self, files: LabelledPaths, data: PretrainData) -> None:
        self.source, self.labels = ImageFiles(files.paths, data.reading), files.labels
        self.view = centre_view(as_pair(data.image_size), statistics_of(data))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> LabelledSample:
        try:
            pixels = usable(self.view(self.source.read(index)), self.source.paths[index])
            return LabelledSample(pixels, self.labels[index], [])
        except UnreadableImage as error:
            return LabelledSample(None, self.labels[index], [error.unreadable])


@torch.inference_mode()
def _rows(model: MaskedAutoencoder, files: LabelledPaths, config: PretrainConfig, run: Run) -> Rows:
    """Of all ranks' images."""
    whole = "attentive" in config.watch.probes
    kept = 1 + model.encoder.grid.num_patches if whole else 1
    rows, labels = [torch.zeros(0, kept, model.encoder.embed_dim)], [torch.zeros(0, dtype=torch.int64)]
    for batch in run.loader(_LabelledViews(files, config.data), collate_labelled, config.watch.batch):
        run.note_unreadable(batch.unreadable)
        if len(batch):
            with run.autocast():
                tokens = model.encoder.encode(batch.pixels.to(run.device))
                if not model.encoder.prefix:  # their mean stands where the cls token would
                    tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)
            rows.append(tokens[:, :kept].float().cpu())
            labels.append(batch.labels)
    parts = distributed.gather((torch.cat(rows), torch.cat(labels)))
    return torch.cat([part for part, _ in parts]), torch.cat([part for _, part in parts])


def measure(model: MaskedAutoencoder, watched: Watched, config: PretrainConfig, run: Run, step: int) -> None:
    """Measure what the configuration asks for, log it and print it. The model is left in eval mode."""
    model.eval()
    found: dict[str, float | None] = {}
    if watched.held_out is not None:
        found["held_out_loss"] = held_out_loss(model, watched.held_out, config, run)
    if watched.labelled is not None:
        found |= labelled_top1(model, watched.labelled, config, run)
    run.note_measured(step, found)
    if found:
        run.record({"step": step, **found})
        told = {
            "held_out_loss": "loss on images kept out {:.4f}",
            "knn_top1": "k-NN top-1 {:.2f} %",
            "linear_top1": "linear probe {:.2f} %",
            "attentive_top1": "attentive probe {:.2f} %",
        }
        texts = [
            f"{name} not measured, too few images can be read" if value is None else told[name].format(value)
            for name, value in found.items()
        ]
        run.say(f"step {step}: {', '.join(texts)}")
