"""Time and peak memory of converting a ViT-H of random weights, beside a copy of the file; or, with --check, the
largest feature difference of all 32 blocks between the libraries' own models.

    python benchmarks/conversion.py --folder /tmp/conversion
    python benchmarks/conversion.py --folder /tmp/conversion --check

Each conversion runs in a process of its own (``mae convert``); its peak is the largest resident set that Linux saw of
it, the interpreter, torch and the pages of mapped files included (``getrusage`` would count the parent's). Before each
conversion the file is copied (``shutil.copyfile`` and fsync), so that both meet the same disk.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from mae_core.models.sizes import SIZES
from mae_core.weights.formats import FORMATS, SHAPES

ROWS = (
    ("official", "huggingface", ".safetensors"),
    ("official", "mmseg", ".safetensors"),
    ("huggingface", "official", ".safetensors"),
    ("official", "mmseg", ".pth"),
    ("huggingface", "official", ".pth"),
)
"""What is timed: (format of the file, target, ending). Renaming, splitting and joining query, key and value."""
CHECKED = tuple(name for name in FORMATS if name != "mmseg_beit")
"""What is checked; BEiT's backbone has no absolute positions."""
COLUMNS = ("from", "to", "copy, s", "convert, s", "copies", "with torch's start, s", "peak, GB", "times the file")
MEASURED = "measured:"
RUN = f"""
import time
import torch
from mae_core.cli.main import main
start = time.perf_counter()
try:
    main()
finally:
    seconds = time.perf_counter() - start
    (peak,) = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")]
    print("{MEASURED}", seconds, peak)
"""


class Conversion(NamedTuple):
    """One run of ``mae convert``: seconds with the start of the interpreter and torch, seconds without, bytes of its
    largest resident set, and what it printed."""

    process: float
    seconds: float
    peak: int
    text: str


def write_huge(path: Path, size: str) -> None:
    """An encoder of random weights under the official names, as the published file holds it."""
    row = SIZES[size]
    grid = 224 // row.patch_size
    numbers = {"1": 1, "D": row.width, "N": 1 + grid * grid, "C": 3, "P": row.patch_size, "HD": 4 * row.width}
    generator = torch.Generator().manual_seed(0)
    state = {}
    for pattern, letters in SHAPES.items():
        if pattern.startswith(("decoder", "mask", "head", "fc_norm")) or "gamma" in pattern:
            continue
        shape = [numbers[letter.removeprefix("3")] * (3 if letter.startswith("3") else 1) for letter in letters]
        for index in range(row.depth if "{}" in pattern else 1):
            state[pattern.format(index)] = torch.randn(shape, generator=generator) * 0.02
    torch.save({"model": state}, path)


def timed(work: Callable[[], None]) -> float:
    """Seconds that ``work`` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def copy(source: Path, target: Path) -> None:
    """Copy a file to the disk, not only to the cache."""
    shutil.copyfile(source, target)
    with target.open("rb") as file:
        os.fsync(file.fileno())
    target.unlink()


def convert(source: Path, target: str, out: Path, *options: str) -> Conversion:
    """Run ``mae convert`` in a process of its own."""
    out.unlink(missing_ok=True)
    command = [sys.executable, "-c", RUN, "convert", str(source), "--to", target, "--out", str(out), *options]
    begin = time.perf_counter()
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    process = time.perf_counter() - begin
    if result.returncode:
        raise SystemExit(result.stderr)
    text, numbers = result.stdout.split(MEASURED)
    seconds, kilobytes = numbers.split()
    return Conversion(process, float(seconds), 1024 * int(kilobytes), text)


def measure(source: Path, folder: Path, rounds: int) -> None:
    """A line for every row: the median of the rounds and their range."""
    size = source.stat().st_size
    sources = {"official": source, "huggingface": folder / "huggingface.safetensors"}
    if not sources["huggingface"].exists():
        convert(source, "huggingface", sources["huggingface"])
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for start, target, ending in ROWS:
        out = folder / f"out{ending}"
        copies, runs = [], []
        for _ in range(rounds):
            copies.append(timed(partial(copy, sources[start], folder / "copy")))
            runs.append(convert(sources[start], target, out))
            out.unlink()
        ratios = [run.seconds / copied for run, copied in zip(runs, copies, strict=True)]
        peak = max(run.peak for run in runs)
        cells = [
            start,
            target + ending,
            spread(copies),
            spread([run.seconds for run in runs]),
            spread(ratios, 2),
            spread([run.process for run in runs]),
            f"{peak / 1e9:.2f}",
            f"{peak / size:.2f}",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


def spread(values: list[float], digits: int = 1) -> str:
    """Median and range."""
    middle, low, high = (f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({low} to {high})"


def check(source: Path, folder: Path) -> None:
    """A line for every format: the largest feature difference that ``--check`` found, and between which models."""
    out = folder / "out.safetensors"
    for target in CHECKED:
        run = convert(source, target, out, "--check")
        (line,) = [line for line in run.text.splitlines() if line.startswith("checked: ")]
        print(f"official -> {target}: {line.removeprefix('checked: ')}; peak {run.peak / 1e9:.2f} GB", flush=True)
        out.unlink()


def main() -> None:
    """Print a table of times and memory, or the feature differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="scratch folder; needs four times the file")
    parser.add_argument("--size", default="huge", choices=list(SIZES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--check", action="store_true", help="compare features in place of measuring")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    source = options.folder / f"{options.size}.pth"
    if not source.exists():
        write_huge(source, options.size)
    print(f"ViT-{options.size}: {source.stat().st_size / 1e9:.2f} GB", flush=True)
    if options.check:
        check(source, options.folder)
    else:
        measure(source, options.folder, options.rounds)


if __name__ == "__main__":
    main()
