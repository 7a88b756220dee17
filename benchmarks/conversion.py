"""Time and peak memory of converting a ViT-H of random weights, beside a copy of the file.

    python benchmarks/conversion.py --folder /tmp/conversion

Each conversion runs in a process of its own (``mae convert``); its peak is the largest resident set that Linux saw of
it, the interpreter and torch included (``getrusage`` would count the parent's). A copy is ``shutil.copyfile`` and
fsync, the best of two.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from mae_core.conversion.formats import SHAPES
from mae_core.models.sizes import SIZES

TARGETS = ("mae_core", "huggingface", "mmseg", "detectron2")
PEAK = "peak_kilobytes"
RUN = f"""
from mae_core.cli.main import main
try:
    main()
finally:
    (peak,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    print("{PEAK}", peak.split()[1])
"""


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


def main() -> None:
    """Print a table: target, ending, seconds, seconds of a copy, peak memory over the size of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="scratch folder; needs four times the file")
    parser.add_argument("--size", default="huge", choices=list(SIZES))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    source = options.folder / "encoder.pth"
    if not source.exists():
        write_huge(source, options.size)
    size = source.stat().st_size
    seconds = min(timed(lambda: copy(source, options.folder / "copy")) for _ in range(2))
    print(f"ViT-{options.size}: {size / 1e9:.2f} GB; a copy takes {seconds:.1f} s")
    sources = {"official": source, "huggingface": options.folder / "huggingface.safetensors"}
    for start, target, ending in [
        *(("official", target, ".safetensors") for target in TARGETS),
        ("huggingface", "official", ".safetensors"),
        ("official", "official", ".pth"),
        ("huggingface", "official", ".pth"),
    ]:
        out = options.folder / f"{target}{ending}"
        out.unlink(missing_ok=True)
        command = [sys.executable, "-c", RUN, "convert", str(sources[start]), "--to", target, "--out", str(out)]
        begin = time.perf_counter()
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        taken = time.perf_counter() - begin
        if result.returncode:
            raise SystemExit(result.stderr)
        peak = 1024 * int(result.stdout.split(PEAK)[1])
        print(
            f"{start} -> {target}{ending}: {taken:.1f} s ({taken / seconds:.2f} copies), "
            f"peak {peak / 1e9:.2f} GB = {peak / size:.2f} times the file",
            flush=True,
        )
        if (start, target) != ("official", "huggingface"):
            out.unlink()


if __name__ == "__main__":
    main()
