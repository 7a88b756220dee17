"""From a JPEG to pixels for a model on one core, ours beside the pipeline of the paper's code, in turns.

    python -m benchmarks.loader --out benchmarks/results/loader
    python -m benchmarks.loader --data photos --out loader            # on a folder of yours

``authors`` is what facebookresearch/mae asks of torchvision: Pillow's decoding, ``RandomResizedCrop`` (bicubic), a
flip, ``ToTensor``, ``Normalize``. ``ours`` is what a worker of ``mae pretrain`` does for a batch, its masks too;
``ours, to floats`` standardises the bytes as well, which a training does on its device; ``ours by Pillow`` is without
the extra ``fast``; ``ours, scaled`` is with ``data.scaled_decoding``, whose pixels differ. Without ``--data`` photos of
500 x 375 are made up; the mean absolute differences are of the same crops of these photos, in levels of 255. How it is
measured: ``benchmarks.side_by_side``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

from benchmarks.side_by_side import (
    Contestant,
    Prepared,
    add_common_options,
    compare,
    machine_lines,
    serve,
    table,
    write_results,
)
from mae_core.atomic import write_text
from mae_core.data import jpeg
from mae_core.data.config import PretrainData
from mae_core.data.images import IMAGENET_MEAN, IMAGENET_STD, ImageFiles, list_images
from mae_core.data.loading import StepSampler
from mae_core.data.unlabelled import UnlabelledImages, collate
from mae_core.masking import RandomMasking, SampleMasks
from mae_core.patches import PatchGrid
from mae_core.seeds import AUGMENT, derive_seed, seeded
from mae_core.training.precision import prepare_process
from mae_core.training.run import commit, environment

CPU = torch.device("cpu")
OURS = ("ours", "ours, to floats", "ours by Pillow", "ours, scaled")
AUTHORS = "authors"
MADE_UP = 64
COMPARED = 32
"""Photos of which differences are taken."""


def make_photos(folder: Path, count: int, size: tuple[int, int] = (500, 375)) -> None:
    """JPEGs of smooth colours, edges and grain, whose sizes in bytes are those of photos."""
    rng = np.random.default_rng(0)
    width, height = size
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        layers = np.zeros((height, width, 3), dtype=np.float32)
        for cells, strength in ((4, 160), (16, 70), (64, 25)):
            coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
            layers += strength * np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), dtype=np.float32) / 255
        grain = rng.normal(0, 4, (height, width, 1)).astype(np.float32)
        Image.fromarray((layers + grain).clip(0, 255).astype(np.uint8)).save(folder / f"{number:04d}.jpg", quality=90)


def authors_view(size: int) -> transforms.Compose:
    """The crop and flip of the paper's code, which take and give a picture."""
    crop = transforms.RandomResizedCrop(size, scale=(0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC)
    return transforms.Compose([crop, transforms.RandomHorizontalFlip()])


def our_images(paths: list[Path], size: int, *, scaled: bool = False) -> UnlabelledImages:
    """Training images as ``mae pretrain`` has them, at 16 x 16 patches."""
    data = PretrainData(image_size=size, scaled_decoding=scaled, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    masks = SampleMasks(RandomMasking(0.75), PatchGrid.of(size, 16))
    return UnlabelledImages(ImageFiles(paths, data.reading), data, 0, masks)


def batches(name: str, paths: list[Path], size: int, batch: int) -> Iterator[Any]:
    """Batches of a contestant without end."""
    sampler = StepSampler(len(paths), batch, 0, total_steps=2**31)
    if name == AUTHORS:
        view = authors_view(size)
        view.transforms += [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
        for places in sampler:
            pictures = []
            for _, index in places:
                with paths[index].open("rb") as file:
                    pictures.append(view(Image.open(file).convert("RGB")))
            yield torch.stack(pictures)
    if name == "ours by Pillow":
        jpeg.LIBRARY = None
    images = our_images(paths, size, scaled=name == "ours, scaled")
    for places in sampler:
        found = collate(images.__getitems__(places))
        yield found.to(CPU) if name == "ours, to floats" else found


def differences(paths: list[Path], size: int) -> dict[str, float]:
    """Mean absolute difference from the authors' pipeline, in levels of 255, of the same crops; at most one level is
    the claim for ``ours``."""
    view, found = authors_view(size), {}
    for name, scaled in (("ours", False), ("ours, scaled", True)):
        images, total = our_images(paths, size, scaled=scaled), 0.0
        for index, path in enumerate(paths):
            pixels = images[(0, index)].pixels
            assert isinstance(pixels, Tensor)
            with seeded(derive_seed(0, AUGMENT, 0, index)), Image.open(path) as image:
                wanted = torch.from_numpy(np.array(view(image.convert("RGB")))).permute(2, 0, 1)
            total += float((pixels.float() - wanted.float()).abs().mean())
        found[name] = total / len(paths)
    return found


def page(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    (entry,) = results["measured"]
    lines = ["# Loading on one core", "", f"`{results['command']}` at {results['commit']}", ""]
    lines += machine_lines(results["machine"])
    lines += table(f"{entry['photos']} to {entry['image_size']} x {entry['image_size']}", entry, AUTHORS)
    rows = entry["contestants"]
    if AUTHORS in rows:
        theirs = rows[AUTHORS]["cpu_seconds"]
        texts = [f"{name} {theirs / row['cpu_seconds']:.2f}" for name, row in rows.items() if name in OURS]
        lines += [f"Faster than the authors' pipeline by CPU time: {', '.join(texts)}.", ""]
    texts = [f"{name} {value:.3f} / 255" for name, value in entry["mean_absolute_difference"].items()]
    return "\n".join([*lines, f"Mean absolute difference for the same crops: {', '.join(texts)}."])


def run(given: argparse.Namespace, folder: Path, described: str) -> None:
    """Compare on the photos of ``folder``, write and print."""
    paths = list_images(folder)
    options = ["--data", str(folder), "--image-size", str(given.image_size), "--batch", str(given.batch)]
    names = [name for name in (AUTHORS, *OURS) if name != "ours by Pillow" or jpeg.LIBRARY is not None]
    contestants = [
        Contestant(name, [sys.executable, "-m", "benchmarks.loader", "--worker", name, *options], given.batch)
        for name in names
    ]
    deadline = time.monotonic() + 60 * given.minutes
    entry = compare(contestants, rounds=given.rounds, deadline=deadline)
    entry |= {"photos": f"{len(paths)} {described}", "image_size": given.image_size, "batch": given.batch}
    entry["decoder"] = jpeg.describe_decoder()
    entry["mean_absolute_difference"] = differences(paths[:COMPARED], given.image_size)
    results = {
        "command": "python -m benchmarks.loader",
        "commit": commit(),
        "machine": environment(CPU),
        "measured": [entry],
    }
    write_results(results, given.out)
    if given.out is not None:
        write_text(given.out.with_suffix(".md"), page(results) + "\n")
    print(page(results))


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder of photos; made up without it")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=64, help="images a step")
    add_common_options(parser, minutes=10)
    given = parser.parse_args(arguments)
    if given.worker:
        torch.set_num_threads(1)
        if given.worker != AUTHORS:
            prepare_process(CPU)
        endless = batches(given.worker, list_images(given.data), given.image_size, given.batch)
        serve(lambda: Prepared(lambda: next(endless)), CPU)
    elif given.data is not None:
        run(given, given.data, "photos")
    else:
        with tempfile.TemporaryDirectory() as folder:
            make_photos(Path(folder), min(MADE_UP, given.batch))
            run(given, Path(folder), "made-up photos of 500 x 375")


if __name__ == "__main__":
    main()
