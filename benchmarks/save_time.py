"""Time that a checkpoint takes the loop, of which the disk takes most: waited for, and written beside the training.

    python -m benchmarks.save_time                        ViT-B and its decoder, as mae pretrain saves them
    python -m benchmarks.save_time --size large --rounds 5

A round trains so many steps three times: without a checkpoint, after one that the loop waited for, and after one that
a thread writes from a copy meanwhile. What a checkpoint takes the loop is what the call and these steps take longer.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.side_by_side import machine_lines, machine_of, write_results
from mae_core.config.load import load_config
from mae_core.training.pretrain import build_pretrain_model, loss_of_zeros, pretrain_optimizer
from mae_core.training.pretrain_config import PretrainConfig
from mae_core.training.run import Run, commit, open_run

ROWS = {
    "call, loop waits": "the call, where the loop waits for the disk",
    "call, beside": "the call, where the loop waits for a copy",
    "loop, loop waits": "longer in all, where the loop waits for the disk",
    "loop, beside": "longer in all, where a thread writes",
    "written": "until the copy is on the disk",
    "steps": "the steps without a checkpoint",
}


def measure(size: str, rounds: int, steps: int) -> dict[str, Any]:
    """Seconds of each round by the keys of ``ROWS``, and bytes of a checkpoint."""
    taken: dict[str, list[float]] = {key: [] for key in ROWS}
    with tempfile.TemporaryDirectory(prefix="mae-save-time-", dir=Path.cwd()) as folder:
        options = [f"model.size={size}", f"output={folder}/run", "device=cpu", "log.to=[]"]
        config = load_config(PretrainConfig, None, options)
        model = build_pretrain_model(config)
        optimizer, loss = pretrain_optimizer(model, config), loss_of_zeros(model, config)
        run = open_run(config, resume=False)

        def train() -> float:
            began = time.perf_counter()
            for _ in range(steps):
                loss(1).backward()
                optimizer.step()
                optimizer.zero_grad()
            return time.perf_counter() - began

        train()
        for number in range(rounds):
            plain = train()
            taken["steps"].append(plain)
            for way in ("loop waits", "beside"):
                call, written = save(run, 2 * number + (way == "beside") + 1, model, optimizer, way, train, plain)
                taken[f"call, {way}"].append(call[0])
                taken[f"loop, {way}"].append(call[1])
                taken["written"] += written
        saved = sorted((run.folder / "checkpoints").glob("step_*"))[-1]
        size_of_one = sum(file.stat().st_size for file in saved.iterdir())
        run.close()
    return {"size": size, "rounds": rounds, "steps": steps, "bytes": size_of_one, "seconds": taken}


def save(
    run: Run, step: int, model: Any, optimizer: Any, way: str, train: Any, plain: float
) -> tuple[tuple[float, float], list[float]]:
    """((seconds of the call, seconds that it and the steps after it took longer than ``plain``), seconds until the copy
    is on the disk where that came after the call)."""
    began = time.perf_counter()
    run.checkpoint(step, model, optimizer, {}, wait=way == "loop waits")
    call = time.perf_counter() - began
    longer = call + train() - plain
    if way == "loop waits":
        return (call, longer), []
    run.saving.join()
    return (call, longer), [run.saving.seconds]


def page(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    lines = ["# Time that a checkpoint takes the loop", "", f"`{results['command']}` at {results['commit']}", ""]
    lines += machine_lines(results["machine"])
    for entry in results["measured"]:
        lines += [
            f"## ViT-{entry['size']} with its decoder, {entry['bytes'] / 2**30:.2f} GiB a checkpoint: "
            f"{entry['rounds']} rounds of {entry['steps']} steps of one image",
            "",
            "| | seconds (fastest to slowest) |",
            "|---|---:|",
        ]
        lines += [f"| {told} | {_spread(entry['seconds'][key])} |" for key, told in ROWS.items()]
        lines.append("")
    return "\n".join(lines)


def _spread(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="base")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12, help="as many as the writing of a checkpoint lasts")
    parser.add_argument("--out", type=Path, help="writes OUT.json")
    given = parser.parse_args()
    torch.manual_seed(0)
    results = {
        "command": f"python -m benchmarks.save_time --size {given.size} --rounds {given.rounds} --steps {given.steps}",
        "commit": commit(),
        "machine": machine_of(torch.device("cpu")),
        "measured": [measure(given.size, given.rounds, given.steps)],
    }
    write_results(results, given.out)
    print(page(results))


if __name__ == "__main__":
    main()
