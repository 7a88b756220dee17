"""Time that a checkpoint takes the loop, and the disk.

    python benchmarks/save_time.py FOLDER                     ViT-B and its decoder, as mae pretrain saves them
    python benchmarks/save_time.py FOLDER --size large --rounds 5

Each round changes the weights, as steps do, and saves twice: with the loop waiting for the disk, and with the loop
waiting for a copy alone, from which a thread writes. Medians and ranges.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from pathlib import Path

import torch

from mae_core.config.load import load_config
from mae_core.training.pretrain import build_pretrain_model, pretrain_optimizer
from mae_core.training.pretrain_config import PretrainConfig
from mae_core.training.run import open_run, processor_name


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a new folder, removed at the end")
    parser.add_argument("--size", default="base")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    if given.folder.exists():
        parser.error(f"{given.folder} exists; choose a new folder")
    options = [f"model.size={given.size}", f"output={given.folder}", "device=cpu", "log.to=[]"]
    config = load_config(PretrainConfig, None, options)
    model = build_pretrain_model(config)
    optimizer = pretrain_optimizer(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, 1e-3)
    run = open_run(config, resume=False)
    waiting, copying, writing = [], [], []
    try:
        for step in range(1, 2 * given.rounds + 1):
            beside = step % 2 == 0
            optimizer.step()
            started = time.perf_counter()
            run.checkpoint(step, model, optimizer, {}, wait=not beside)
            (copying if beside else waiting).append(time.perf_counter() - started)
            if beside:
                run.finish_saving()
                writing.append(time.perf_counter() - started)
        size = sum(file.stat().st_size for file in (given.folder / "checkpoints").rglob("*") if file.is_file())
    finally:
        shutil.rmtree(given.folder, ignore_errors=True)
    kept = min(2 * given.rounds, config.log.keep_checkpoints)
    print(f"ViT-{given.size}, {size / kept / 2**30:.2f} GiB a checkpoint; {processor_name()}, {given.rounds} rounds")
    for what, seconds in (
        ("the loop waits for the disk", waiting),
        ("the loop waits for a copy", copying),
        ("the copy is on the disk after", writing),
    ):
        print(f"{what}: {statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})")


if __name__ == "__main__":
    main()
