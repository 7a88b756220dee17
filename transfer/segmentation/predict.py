"""Label images with a trained segmenter: a label map and a coloured overlay for each.

    python transfer/segmentation/predict.py runs/segmenter photos/ --out labelled

SEGMENTER is a run directory or its segmenter.safetensors, IMAGES are files or folders. The new folder gets
labels/*.png (one channel, 16 bits where a value needs them; values as in the label maps it was trained on),
overlays/*.png and classes.txt.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from mae_core.atomic import atomic_path, write_text
from mae_core.data.given import named_images
from mae_core.errors import UserError, user_errors
from transfer.engines import require
from transfer.segmentation.drawing import draw_overlay
from transfer.segmentation.label_coding import as_values, written_values
from transfer.segmentation.pixels import picture_of
from transfer.segmentation.quiet import quietly
from transfer.segmentation.segmenter_file import SegmenterFile, read_segmenter


def predict(
    segmenter: Path | str,
    images: Sequence[Path | str],
    out: Path | str,
    *,
    mode: str | None = None,
    crop_size: int | None = None,
    stride: int | None = None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    opacity: float = 0.5,
    device: str = "auto",
    on_error: str = "skip",
) -> list[Path]:
    """Write label maps and overlays of ``images`` (files or folders) into the new folder ``out`` -> the label maps.

    mode, crop_size, stride, scales, flip   see ``engine_mmseg.prediction.Predictor``
    opacity   of the colours on the overlays, 0 to 1
    on_error  ``skip`` names an unreadable image and goes on, ``raise`` stops

    Everything is checked before ``out`` is made. Raises ``UserError``, also where no image could be read.
    """
    require("mmseg")
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty; give another --out")
    if not 0 <= opacity <= 1:
        raise UserError(f"--opacity is {opacity}; give a number from 0 to 1")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda was asked for, but torch sees no GPU; use auto or cpu")
    names = dict(named_images(images))
    file = read_segmenter(segmenter)
    with quietly():
        from transfer.segmentation.engine_mmseg.prediction import Predictor

        chosen = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
        predictor = Predictor(
            file, mode=mode, crop_size=crop_size, stride=stride, scales=scales, flip=flip, device=chosen
        )
    written = []
    for name, path in names.items():
        try:
            labels = predictor(path)
        except UserError as error:
            if on_error == "raise" or (len(names) == 1):
                raise
            print(f"skipped: {error}", flush=True)
            continue
        written.append(out / "labels" / f"{name}.png")
        save(Image.fromarray(as_values(labels, file.values)), written[-1])
        save(draw_overlay(picture_of(path), labels, file.classes, file.palette, opacity=opacity), _beside(out, name))
    if not written:
        raise UserError(f"none of the {len(names)} images could be read; set --images to image files or folders")
    write_text(out / "classes.txt", class_lines(file))
    return written


def _beside(out: Path, name: str) -> Path:
    return out / "overlays" / f"{name}.png"


def class_lines(file: SegmenterFile) -> str:
    """The text of classes.txt: a line value<TAB>name for each class."""
    return "".join(f"{value}\t{name}\n" for value, name in zip(written_values(file.values), file.classes, strict=True))


def save(picture: Image.Image, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG")


def main(arguments: Sequence[str] | None = None, prog: str = "predict.py") -> None:
    """The command; exits with code 2 on a mistake of the user's."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("segmenter", type=Path, metavar="SEGMENTER", help="a run directory, or its segmenter.safetensors")
    add("images", type=Path, nargs="+", metavar="IMAGES", help="image files, or folders of them")
    add("--out", type=Path, required=True, metavar="DIR", help="new folder for labels/, overlays/ and classes.txt")
    add("--mode", choices=("whole", "slide"), help="the image at once or in windows; as in training's test_cfg")
    add("--crop-size", type=int, metavar="N", help="side of the windows; the training's crop")
    add("--stride", type=int, metavar="N", help="pixels between windows; two thirds of the crop")
    add("--scales", type=float, nargs="+", default=[1.0], metavar="S", help="average over the image at these scales")
    add("--flip", action="store_true", help="average over the mirrored image too")
    add("--opacity", type=float, default=0.5, metavar="X", help="of the colours on the overlays, 0 to 1")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--on-error", choices=("skip", "raise"), default="skip", help="what to do about an image that cannot be read")
    given = vars(parser.parse_args(arguments))
    with user_errors():
        written = predict(**given)
        print(f"labelled {len(written)} images in {given['out']}/: labels/, overlays/, classes.txt")


if __name__ == "__main__":
    main()
