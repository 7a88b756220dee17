"""How the cost of a pre-training step grows: with the side of the image, with the share of hidden patches, with ranks.

    python -m benchmarks.scaling --out benchmarks/results/scaling
    python -m benchmarks.scaling --axes ranks --ranks 1 2 4 8 --device cuda --dtypes bf16

``image`` and ``ratio`` are contestants in turns, each a process of its own; the first is the reference. ``ranks``
starts ``torchrun`` on this machine with the same batch a rank: on GPUs a rank has one of its own, on a CPU all share
its cores, where the rate of all together shows what the ranks cost and not what they bring.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.side_by_side import (
    DTYPES,
    Contestant,
    Prepared,
    compare,
    counted,
    machine_lines,
    new_results,
    parser_of,
    row_of,
    serve,
    table,
    wait_for,
    write_results,
)
from mae_core import build_mae
from mae_core.training import distributed
from mae_core.training.precision import prepare_process


@dataclass(frozen=True)
class Point:
    """What a step is made of."""

    size: str = "tiny"
    image: int = 96
    patch: int = 12
    ratio: float = 0.75
    batch: int = 16
    decoder: tuple[int, int, int] = (128, 2, 4)


SMALL = Point("nano", 32, 8, 0.75, 2, (32, 1, 2))
"""For the test of this file."""
AXES = {
    "image": [Point(image=side) for side in (96, 144, 192, 288)],
    "ratio": [Point(image=192, ratio=ratio) for ratio in (0.75, 0.5, 0.25, 0.9)],
    "small": [SMALL, replace(SMALL, image=48), replace(SMALL, ratio=0.5)],
}
"""Axis -> points, the reference first."""


def step_of(point: Point, dtype: torch.dtype, device: torch.device) -> Any:
    """Forward, backward and AdamW on a batch of noise; over all ranks where there are several."""
    width, depth, heads = point.decoder
    shape = {"decoder_width": width, "decoder_depth": depth, "decoder_heads": heads, "mask_ratio": point.ratio}
    model = build_mae(point.size, image_size=point.image, patch_size=point.patch, **shape).to(device).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    images = torch.randn(point.batch, 3, point.image, point.image, device=device)
    mask = model.masker(point.batch, model.encoder.grid, None).to(device)
    several = distributed.world_size() > 1
    net: nn.Module = nn.parallel.DistributedDataParallel(model) if several else model

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = net(images, mask=mask, predict_visible=False).loss
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def work(given: argparse.Namespace) -> None:
    """A contestant's process: the point of an axis."""
    axis, number = given.worker.split(":")
    device = torch.device(given.device)
    prepare_process(device)

    def prepare() -> Prepared:
        step = step_of(AXES[axis][int(number)], DTYPES[given.dtypes[0]], device)
        return Prepared(step, lambda: counted(step))

    serve(prepare, device)


def one_rank(given: argparse.Namespace) -> None:
    """A process that torchrun starts: rounds of a step; the first rank prints what each took."""
    place = distributed.join(given.device)
    prepare_process(place.device)
    step = step_of(AXES[given.points][0], DTYPES[given.dtypes[0]], place.device)
    taken = []
    for number in range(given.rounds + 1):
        began, spent = time.perf_counter(), time.process_time()
        step()
        wait_for(place.device)
        if number:
            taken.append({"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - spent})
    if place.rank == 0:
        print(json.dumps(taken), flush=True)
    distributed.leave()


def over_ranks(count: int, given: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """``count`` ranks on this machine -> a row. Raises ``RuntimeError`` where they fail."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command += ["-m", "benchmarks.scaling", "--worker", "rank", "--points", given.points, "--dtypes", dtype]
    command += ["--rounds", str(given.rounds), "--device", given.device]
    ended = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    if ended.returncode:
        raise RuntimeError(f"{count} ranks: {ended.stderr.strip().splitlines()[-1]}")
    taken = json.loads(next(line for line in ended.stdout.splitlines() if line.startswith("[{")))
    return row_of(taken, {"peak_bytes": 0, "flops": None}, count * AXES[given.points][0].batch)


def title_of(point: Point) -> str:
    """A point in words."""
    return f"{point.image} px, {point.ratio:.0%} hidden"


def page(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = ["# How the cost grows", "", *machine_lines(results["machine"])]
    for entry in results["measured"]:
        point = Point(**entry["reference"])
        title = f"{entry['axis']}, ViT-{point.size}, {point.batch} images a step, {entry['dtype']}"
        lines += table(title, entry, next(iter(entry["contestants"])))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = parser_of(__doc__)
    parser.add_argument("--axes", nargs="+", choices=[*AXES, "ranks"], default=["image", "ratio", "ranks"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2], help="processes on this machine")
    parser.add_argument("--points", choices=list(AXES), default="image", help="the axis whose first point ranks train")
    given = parser.parse_args(arguments)
    if given.worker:
        (one_rank if given.worker == "rank" else work)(given)
        return
    results = new_results(given)
    deadline = time.monotonic() + 60 * given.minutes
    for axis in given.axes:
        for dtype in given.dtypes:
            points = AXES[given.points if axis == "ranks" else axis]
            if axis == "ranks":
                rows = {f"{count} ranks": over_ranks(count, given, dtype) for count in given.ranks}
                found: dict[str, Any] = {"rounds": given.rounds, "contestants": rows, "failed": {}}
            else:
                command = [sys.executable, "-m", "benchmarks.scaling", "--dtypes", dtype, "--device", given.device]
                running = [
                    Contestant(title_of(point), [*command, "--worker", f"{axis}:{number}"], point.batch)
                    for number, point in enumerate(points)
                ]
                found = compare(running, rounds=given.rounds, deadline=deadline)
            results["measured"].append({"axis": axis, "reference": asdict(points[0]), "dtype": dtype, **found})
            write_results(results, given.out)
    print(page(results))


if __name__ == "__main__":
    main()
