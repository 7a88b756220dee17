"""Write a trained segmenter for other programs.

    python transfer/segmentation/export.py runs/segmenter --to onnx --size 512 512 --out segmenter.onnx [--half]
    python transfer/segmentation/export.py runs/segmenter --to torch-export --size 512 512 --out segmenter.pt2
    python transfer/segmentation/export.py runs/segmenter --to mmseg --out segmenter.pth

onnx: one file for images of one size, from pixels (RGB, 0 to 255) to logits and labels.
torch-export: the same as a program that torch.export.load opens, without this package or mmseg.
mmseg: a checkpoint, and a config of the same name, for an mmseg without this package; its backbone is mmseg's own MAE.

Both are run on an image beside the original before they are written, and the largest difference is printed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mae_core.errors import UserError, user_errors
from transfer.engines import require
from transfer.segmentation.quiet import quietly
from transfer.segmentation.segmenter_file import read_segmenter

SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2", "mmseg": ".pth"}


def export(
    segmenter: Path | str, to: str, out: Path | str, *, size: Sequence[int] | None = None, half: bool = False
) -> str:
    """Write the segmenter of a run or file as ``to`` (``onnx``, ``torch-export`` or ``mmseg``) -> a line with the
    parity.

    size  (height, width) of the images, for onnx and torch-export
    half  of these, store weights in 16 bits: half the file; the computation stays in 32

    Raises ``UserError`` for an ``out`` that exists or ends otherwise, and as ``engine_mmseg.exporting`` does.
    """
    require("mmseg")
    out = Path(out)
    if out.suffix != SUFFIXES[to]:
        raise UserError(f"--out {out} has to end in {SUFFIXES[to]} for {to}")
    for path in (out, *([out.with_suffix(".py")] if to == "mmseg" else [])):
        if path.exists():
            raise UserError(f"{path} exists; choose another --out")
    if to == "mmseg" and (size is not None or half):
        raise UserError("--to mmseg takes neither --size nor --half: it uses the training's crop, and 32 bits")
    if to != "mmseg" and size is None:
        raise UserError(f"--to {to} needs --size HEIGHT WIDTH")
    file = read_segmenter(segmenter)
    with quietly():
        from transfer.segmentation.engine_mmseg import exporting

        if size is None:
            return exporting.write_mmseg(file, out)
        if min(size) < 1:
            raise UserError(f"--size is {size[0]} {size[1]}; give two positive numbers")
        return exporting.write_program(file, (size[0], size[1]), out, half=half)


def main(arguments: Sequence[str] | None = None, prog: str = "export.py") -> None:
    """The command; exits with code 2 on a mistake of the user's."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("segmenter", type=Path, metavar="SEGMENTER", help="a run directory, or its segmenter.safetensors")
    add("--to", choices=tuple(SUFFIXES), required=True, help="what to write")
    add("--out", type=Path, required=True, metavar="FILE", help="the new file")
    add("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="of the images, not for mmseg")
    add(
        "--half",
        action="store_true",
        help="store weights in 16 bits: half the file, computed in 32 bits; not for mmseg",
    )
    given = parser.parse_args(arguments)
    with user_errors():
        print(export(given.segmenter, given.to, given.out, size=given.size, half=given.half))


if __name__ == "__main__":
    main()
