"""Table 2 of the paper on the machine at hand: what leaving mask tokens out of the encoder saves, by decoder depth.

    python -m benchmarks.table2 --out benchmarks/results/table2
    python -m benchmarks.table2 --rows large_8 large_1 --batch 4 --device cuda --dtypes bf16

Each row is a trunk and a depth of the decoder. ``encoder w/ [M]`` runs the encoder on all patches, a mask token in
place of the hidden ones, with a decoder of 8 blocks; ``ours`` on the visible ones alone. A step is forward and
backward: the optimizer's cost is the same for both, and per image it vanishes at the paper's batch of 4096. Operations
are counted by torch. ``--tokenizer`` adds what the target of the paper's Table 1d costs beside a step: the tokens of
the published dVAE's encoder, whose weights do not matter to the time.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.side_by_side import (
    DTYPES,
    Contestant,
    Prepared,
    compare,
    counted,
    machine_lines,
    new_results,
    parser_of,
    serve,
    table,
    write_results,
)
from mae_core import build_mae
from mae_core.tokenizers import DalleEncoder
from mae_core.training.precision import prepare_process

WITH, WITHOUT, TOKENS = "encoder w/ [M]", "ours", "dVAE tokens"
SIDE_OF_TOKENS = 112
"""The dVAE reads images of this side: 14 x 14 tokens of 8 pixels."""


@dataclass(frozen=True)
class Row:
    """A trunk and a depth of the decoder; by how much the paper's Table 2 is faster, None where it has no row."""

    size: str
    image: int
    depth: int
    published: float | None
    width: int = 512
    heads: int = 16


ROWS = {
    "large_8": Row("large", 224, 8, 2.8),
    "large_1": Row("large", 224, 1, 3.7),
    "huge_8": Row("huge", 224, 8, 3.5),
    "nano_1": Row("nano", 32, 1, None, 32, 2),
}
"""``nano_1`` is for the test of this file."""


def step_of(name: str, row: Row, batch: int, dtype: torch.dtype, device: torch.device) -> Callable[[], Tensor]:
    """Forward and backward of a batch of noise; of ``TOKENS`` the forward pass of the tokenizer."""
    if name == TOKENS:
        pixels = torch.rand(batch, 3, SIDE_OF_TOKENS, SIDE_OF_TOKENS, device=device)
        tokenizer = DalleEncoder().to(device).eval()

        def tokens() -> Tensor:
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                return tokenizer(pixels)

        return tokens
    with device:
        model = build_mae(
            row.size,
            image_size=row.image,
            patch_size=8 if row.size == "nano" else 14 if row.size == "huge" else 16,
            decoder_width=row.width,
            decoder_heads=row.heads,
            decoder_depth=8 if name == WITH and row.published else row.depth,
            mask_tokens_in_encoder=name == WITH,
        )
    model.to(device).train()
    images = torch.randn(batch, 3, row.image, row.image, device=device)
    mask = model.masker(batch, model.encoder.grid, None).to(device)

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(images, mask=mask, predict_visible=False).loss
        loss.backward()
        return loss.detach()

    return step


def work(given: argparse.Namespace) -> None:
    """A contestant's process."""
    device = torch.device(given.device)
    prepare_process(device)

    def prepare() -> Prepared:
        step = step_of(given.worker, ROWS[given.rows[0]], given.batch, DTYPES[given.dtypes[0]], device)
        return Prepared(step, lambda: counted(step))

    serve(prepare, device)


def contestant(name: str, row: str, dtype: str, given: argparse.Namespace) -> Contestant:
    """A process of ``work``."""
    command = [sys.executable, "-m", "benchmarks.table2", "--worker", name, "--rows", row, "--dtypes", dtype]
    return Contestant(name, [*command, "--batch", str(given.batch), "--device", given.device], given.batch)


def page(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = ["# Mask tokens in the encoder or not (paper, Table 2)", "", *machine_lines(results["machine"])]
    lines += ["| trunk | decoder blocks | faster by | by operations | paper (TPU) | dVAE's tokens, of a step |"]
    lines += ["|---|---:|---:|---:|---:|---:|"]
    for entry in results["measured"]:
        rows = entry["contestants"]
        if WITH in rows and WITHOUT in rows:
            seconds, flops = (rows[WITH][key] / rows[WITHOUT][key] for key in ("seconds", "flops"))
            share = f"{rows[TOKENS]['seconds'] / rows[WITHOUT]['seconds']:.0%}" if TOKENS in rows else ""
            cells = (entry["size"], entry["depth"], f"{seconds:.2f}x", f"{flops:.2f}x", f"{entry['published']}x", share)
            lines.append(f"| {' | '.join(map(str, cells))} |")
    lines.append("")
    for entry in results["measured"]:
        lines += table(f"{entry['row']}, batch {entry['batch']}, {entry['dtype']}", entry, WITHOUT)
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = parser_of(__doc__)
    published = [name for name, row in ROWS.items() if row.published]
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=published)
    parser.add_argument("--batch", type=int, default=1, help="images a step")
    parser.add_argument("--tokenizer", action="store_true", help="also the dVAE's tokens of a batch")
    given = parser.parse_args(arguments)
    if given.worker:
        work(given)
        return
    names = [WITH, WITHOUT, *([TOKENS] if given.tokenizer else [])]
    results = new_results(given)
    began, places = time.monotonic(), [(row, dtype) for row in given.rows for dtype in given.dtypes]
    for number, (row, dtype) in enumerate(places, start=1):
        contestants = [contestant(name, row, dtype, given) for name in names]
        deadline = began + 60 * given.minutes * number / len(places)
        found = compare(contestants, rounds=given.rounds, deadline=deadline)
        facts = {"row": row, "size": ROWS[row].size, "depth": ROWS[row].depth, "published": ROWS[row].published}
        results["measured"].append({**facts, "batch": given.batch, "dtype": dtype, **found})
        write_results(results, given.out)
    print(page(results))


if __name__ == "__main__":
    main()
