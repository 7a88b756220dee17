"""Contestants side by side: each is a process of its own, and they take a step each in turns, round after round.

What else the machine does meets all of them alike, and what one sets for its process (allocator, oneDNN) helps no
other. A contestant's process calls ``serve``; the one that compares calls ``compare``, whose result ``table`` shows.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mae_core.atomic import write_json
from mae_core.training.run import commit, environment

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MATMUL = "matmul"
SIDE = 2048
"""The peak is measured with square matrices of this side."""
HEAD = "seconds (fastest to slowest)", "CPU seconds", "images/s", "times", "peak GiB", "of matmul peak"


@dataclass(frozen=True)
class Contestant:
    """A process that ends in ``serve``, and how many images a step of it takes; None where there are none."""

    name: str
    command: Sequence[str]
    images: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict)

    def start(self) -> subprocess.Popen[str]:
        """Its process, which waits for its first turn once it is built."""
        environment = {**os.environ, **self.environment}
        return subprocess.Popen(
            list(self.command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )


class Prepared(NamedTuple):
    """A step to measure, and how many operations it takes; None where nothing counts them."""

    step: Callable[[], Any]
    flops: Callable[[], int] | None = None


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def wait_for(device: torch.device) -> None:
    """Return when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def counted(step: Callable[[], Any]) -> int:
    """Operations of a step by torch's counter, which sees attention where it is multiplied out."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def matmul(dtype: torch.dtype, device: torch.device, side: int = SIDE) -> Prepared:
    """A product of two square matrices: what the device can do at best."""
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    return Prepared(lambda: a @ b, lambda: 2 * side**3)


def serve(prepare: Callable[[], Prepared], device: torch.device) -> None:
    """A contestant's process: a step for each line that comes in and what it took as a line of JSON; its cost once
    there are no more. Peak memory is that above what the process, or the GPU, held before ``prepare``. What libraries
    print goes to the screen, not among these lines."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    on_gpu = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if on_gpu else resident()
    prepared = prepare()
    for _ in sys.stdin:
        began, spent = time.perf_counter(), time.process_time()
        prepared.step()
        wait_for(device)
        took = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - spent}
        print(json.dumps(took), file=answers, flush=True)
    most = (
        torch.cuda.max_memory_allocated(device) if on_gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )
    flops = None if prepared.flops is None else prepared.flops()
    print(json.dumps({"peak_bytes": most - before, "flops": flops}), file=answers, flush=True)


def ask(process: subprocess.Popen[str], *, last: bool = False) -> dict[str, Any]:
    """A step of a contestant, or with ``last`` its cost. Raises ``RuntimeError`` where its process has ended."""
    assert process.stdin is not None and process.stdout is not None
    with suppress(BrokenPipeError):
        if last:
            process.stdin.close()
        else:
            print("step", file=process.stdin, flush=True)
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"ended with exit code {process.wait()}; its message is on the screen")
    return json.loads(line)


def compare(contestants: Sequence[Contestant], *, rounds: int, deadline: float) -> dict[str, Any]:
    """Rounds of a step each, after one that is not counted, and no new one after ``deadline`` on the monotonic clock
    -> by contestant, medians and spread; with ``MATMUL`` among them, the share of that peak. Of one that ends early,
    ``failed`` says so."""
    taken: dict[str, list[dict[str, Any]]] = {contestant.name: [] for contestant in contestants}
    failed: dict[str, str] = {}
    ends: dict[str, dict[str, Any]] = {}
    processes = {contestant.name: contestant.start() for contestant in contestants}
    try:
        for number in range(rounds + 2):
            last = number == rounds + 1 or (number > 1 and time.monotonic() > deadline)
            for name in [name for name in processes if name not in failed]:
                try:
                    found = ask(processes[name], last=last)
                except RuntimeError as error:
                    failed[name] = str(error)
                    continue
                if last:
                    ends[name] = found
                elif number:
                    taken[name].append(found)
            if last:
                break
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    rows = {c.name: row_of(taken[c.name], ends[c.name], c.images) for c in contestants if c.name in ends}
    measured: dict[str, Any] = {"rounds": max((len(steps) for steps in taken.values()), default=0)}
    if MATMUL in rows:
        peak = rows[MATMUL]["flops"] / rows[MATMUL]["seconds"]
        measured["matmul_gflops"] = peak / 1e9
        for row in rows.values():
            row["share_of_matmul_peak"] = None if row["flops"] is None else row["flops"] / row["seconds"] / peak
    return {**measured, "contestants": rows, "failed": failed}


def row_of(taken: Sequence[Mapping[str, float]], end: Mapping[str, Any], images: int | None) -> dict[str, Any]:
    """What a contestant took, and its cost -> its row."""
    seconds = sorted(step["seconds"] for step in taken)
    middle = statistics.median(seconds)
    return {
        "seconds": middle,
        "fastest": seconds[0],
        "slowest": seconds[-1],
        "cpu_seconds": statistics.median(step["cpu_seconds"] for step in taken),
        "images_per_second": images / middle if images else None,
        **end,
    }


def table(title: str, entry: Mapping[str, Any], reference: str) -> list[str]:
    """Lines of Markdown: a comparison under its title; ``times`` is the time in times that of ``reference``."""
    more = f", matmul {entry['matmul_gflops']:.0f} GFLOP/s" if "matmul_gflops" in entry else ""
    lines = [
        f"## {title}: {entry['rounds']} rounds{more}",
        "",
        f"| | {' | '.join(HEAD)} |",
        "|---|" + "---:|" * len(HEAD),
    ]
    least = entry["contestants"].get(reference, {}).get("seconds")
    for name, row in entry["contestants"].items():
        if name != MATMUL:
            rate, share = row["images_per_second"], row.get("share_of_matmul_peak")
            cells = (
                f"{row['seconds']:.3g} ({row['fastest']:.3g} to {row['slowest']:.3g})",
                f"{row['cpu_seconds']:.3g}",
                "" if rate is None else f"{rate:.3g}",
                f"{row['seconds'] / least:.2f}" if least else "",
                f"{row['peak_bytes'] / 2**30:.2f}",
                "" if share is None else f"{share:.0%}",
            )
            lines.append(f"| {name} | {' | '.join(cells)} |")
    failed = [f"{name} {reason}." for name, reason in entry["failed"].items()]
    return [*lines, "", *failed, *([""] if failed else [])]


def machine_of(device: torch.device) -> dict[str, str]:
    """Versions and hardware, and what else the machine does: its load over 1, 5 and 15 minutes."""
    return {**environment(device), "load": ", ".join(f"{value:.1f}" for value in os.getloadavg())}


def machine_lines(machine: Mapping[str, Any]) -> list[str]:
    """What was measured on, as a list of Markdown."""
    return [*(f"* {name}: {text}" for name, text in machine.items()), ""]


def write_results(results: Mapping[str, Any], out: Path | None) -> None:
    """Write ``OUT.json``, if a place is given: what is measured so far."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out.with_suffix(".json"), dict(results))


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """The parser of a comparison of steps: number formats, a device, and what every comparison has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["fp32"])
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1")
    add_common_options(parser, minutes=60)
    return parser


def new_results(given: argparse.Namespace) -> dict[str, Any]:
    """Results to which a comparison adds, a row of ``measured`` at a time."""
    return {"machine": {"commit": commit(), **machine_of(torch.device(given.device))}, "measured": []}


def add_common_options(parser: argparse.ArgumentParser, *, minutes: float) -> None:
    """The options that every comparison has."""
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--minutes", type=float, default=minutes, help="no new round after so many")
    parser.add_argument("--out", type=Path, help="writes OUT.json, a comparison at a time")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
