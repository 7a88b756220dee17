"""The memory of a detector's training step: as ``--dry-run`` estimates it, and as two real steps take it.

    python benchmarks/detector_memory.py --config-file configs/detection/one_gpu_24gb.yaml device=cpu

Builds the network of a recipe, trains it for two steps (AdamW has its moments from the second on) on random pixels with
random boxes, and prints the peak above what the process held before. On a GPU the peak is the allocator's; on a CPU it
is that of the resident memory, which also holds the work space of the CPU's kernels. Nothing is written.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from mae_core.config.load import load_config
from mae_core.errors import user_errors
from mae_core.patches import as_pair
from mae_core.training import distributed
from mae_core.training.loop import seed_everything
from mae_core.training.memory import GIB
from mae_core.training.run import Run
from transfer.detection.config import DetectionConfig
from transfer.detection.engine import build_network, load_engine
from transfer.detection.plan import memory_of

CLASSES, STEPS = 80, 2
RSS_UNIT = 1 if sys.platform == "darwin" else 2**10
"""Bytes in the unit of ``ru_maxrss``."""


def random_targets(images: int, objects: int, height: int, width: int) -> list[dict[str, torch.Tensor]]:
    """Boxes of up to a quarter of each side, filled masks, labels from 1, on each of ``images`` images."""
    targets = []
    for _ in range(images):
        scale = torch.tensor([width, height])
        corners = 0.7 * torch.rand(objects, 2) * scale
        boxes = torch.cat([corners, corners + 8 + 0.25 * torch.rand(objects, 2) * scale], dim=1)
        masks = torch.zeros(objects, height, width, dtype=torch.bool)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y1:y2, x1:x2] = True
        targets.append({"boxes": boxes, "labels": torch.randint(1, CLASSES + 1, (objects,)), "masks": masks})
    return targets


def measure(config: DetectionConfig, run: Run, images: int, objects: int) -> tuple[int, float]:
    """Most bytes above those before, and seconds of the last step."""
    height, width = as_pair(config.data.image_size)
    on_gpu = run.device.type == "cuda"
    F.conv2d(torch.zeros(1, 1, 8, 8, device=run.device), torch.zeros(1, 1, 3, 3, device=run.device))  # loads libraries
    before = torch.cuda.memory_allocated() if on_gpu else RSS_UNIT * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = build_network(config, load_engine(config.engine), CLASSES)[1].to(run.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    seed_everything(config.seed)
    for _ in range(STEPS):
        began = time.perf_counter()
        pixels = torch.randn(images, config.data.channels, height, width, device=run.device)
        targets = random_targets(images, objects, height, width)
        with run.autocast():
            losses = model(
                pixels, [(height, width)] * images, [{k: t.to(run.device) for k, t in one.items()} for one in targets]
            )
            loss = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
        seconds = time.perf_counter() - began
    if on_gpu:
        return torch.cuda.max_memory_allocated() - before, seconds
    return RSS_UNIT * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, seconds


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config-file", type=Path, required=True, help="a yaml recipe of engine torchvision")
    parser.add_argument("--images", type=int, default=1, help="images at once")
    parser.add_argument("--objects", type=int, default=40, help="on each image")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    given = parser.parse_intermixed_args()
    with user_errors():
        fixed = ["from_scratch=true", "engine=torchvision"]
        config = load_config(DetectionConfig, given.config_file, [*given.overrides, *fixed])
        run = Run(config, distributed.join(config.device))
        measured, seconds = measure(config, run, given.images, given.objects)
        model = build_network(config, load_engine(config.engine), CLASSES)[1]
        estimated = memory_of(model, config, given.images, run.precision).peak
        print(
            f"{given.images} images of {config.data.image_size} at once, {given.objects} objects on each, on "
            f"{run.device} in {str(run.precision).removeprefix('torch.')}, checkpointing "
            f"{str(config.model.checkpointing).lower()}: estimated {estimated / GIB:.2f} GiB, measured "
            f"{measured / GIB:.2f} GiB, error of the estimate {100 * (estimated / measured - 1):+.0f} %; "
            f"{seconds:.0f} s a step"
        )


if __name__ == "__main__":
    main()
