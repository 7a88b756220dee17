"""The page of all comparisons, docs/benchmarks.md, from the JSON in benchmarks/results.

    python -m benchmarks.page

A comparison that was not run has no file and no part of the page.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import dense, gpu, loader, pretrain_step, save_time, scaling, table2
from mae_core.atomic import write_text

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "benchmarks.md"
PARTS: dict[str, Callable[[dict[str, Any]], str]] = {
    "pretrain_step": pretrain_step.page,
    "loader": loader.page,
    "table2": table2.page,
    "scaling": scaling.page,
    "dense": dense.page,
    "save_time": save_time.page,
    "gpu": gpu.page,
}
"""File of ``RESULTS`` without its suffix -> its results as Markdown."""
HEAD = """# Benchmarks

Written by `python -m benchmarks.page` from `benchmarks/results/*.json`; change nothing here by hand. In each comparison
the contestants take a step each in turns, and a row has the median, the fastest and the slowest round. `times` is the
time in times that of the row with 1.00. On a machine that does other work too, compare CPU seconds.

| to measure again | |
|---|---|
| a pre-training step beside other implementations | `python -m benchmarks.pretrain_step` |
| from a JPEG to pixels, beside the pipeline of the paper's code | `python -m benchmarks.loader` |
| mask tokens in the encoder or not (paper, Table 2) | `python -m benchmarks.table2` |
| cost against image size, mask ratio and ranks | `python -m benchmarks.scaling` |
| a detector's and a segmenter's step, the small recipe | `python -m benchmarks.dense` |
| what a checkpoint takes the loop | `python -m benchmarks.save_time` |
| all of a GPU, in one command without network | `python -m benchmarks.gpu --out DIR --minutes 8` |

Each has `--help`. To show what `benchmarks.gpu` measured here, copy its `gpu.json` to `benchmarks/results`.
"""


def page() -> str:
    """All results that there are."""
    parts = [HEAD]
    for name, to_markdown in PARTS.items():
        file = RESULTS / f"{name}.json"
        if file.is_file():
            text = to_markdown(json.loads(file.read_text(encoding="utf-8")))
            parts.append("\n".join(f"#{line}" if line.startswith("#") else line for line in text.splitlines()))
    return "\n".join(f"{part.strip()}\n" for part in parts)


def main() -> None:
    """The command."""
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()
    write_text(PAGE, page())
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
