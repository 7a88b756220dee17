"""Label images with a trained segmenter: a label map and a coloured overlay for each.

    python transfer/segmentation/predict.py runs/segmenter photos/ --out labelled

SEGMENTER is a run directory or its segmenter.safetensors, IMAGES are files or folders. The new folder gets
labels/*.png (one channel, 16 bits where a value needs them; values as in the label maps it was trained on),
overlays/*.png and classes.txt.

    python transfer/segmentation/predict.py runs/segmenter slide.tif --out labelled --tile 1024 --overlap 0.2

labels images of any size by windows, in bounded memory where the file is a TIFF or an array on disk; labels/*.tif.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from PIL import Image

from mae_core.atomic import atomic_path, check_new_folder, write_text
from mae_core.counting import Counter
from mae_core.data.given import named_images
from mae_core.data.windows import tiles_of
from mae_core.errors import UserError, user_errors
from transfer.segmentation.segmenter import OVERLAP, Segmenter, load_segmenter
from transfer.segmentation.tiles import write_label_tiff


def predict(
    weights: Path | str,
    images: Sequence[Path | str],
    out: Path | str,
    *,
    mode: str | None = None,
    crop_size: int | None = None,
    stride: int | None = None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    opacity: float = 0.5,
    tile: int | None = None,
    overlap: float = OVERLAP,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    on_error: str = "skip",
) -> list[Path]:
    """Write label maps and overlays of ``images`` (files or folders) into the new folder ``out`` -> the label maps.

    mode, crop_size, stride, scales, flip   see ``load_segmenter``
    tile, overlap  label large images in windows, see ``Segmenter.predict_in_tiles``; label maps are tiled TIFF then
    opacity   of the colours on the overlays, 0 to 1
    on_error  ``skip`` names an unreadable image and goes on, ``raise`` stops

    Everything is checked before ``out`` is made. Raises ``UserError``, also where no image could be read.
    """
    out = Path(out)
    check_new_folder(out)
    if not 0 <= opacity <= 1:
        raise UserError(f"--opacity is {opacity}; give a number from 0 to 1")
    names = dict(named_images(images))
    if tile is not None:
        tiles_of(1, 1, tile, overlap)
        if flip or tuple(scales) != (1.0,):
            raise UserError("--tile labels at one scale and unmirrored; leave --scales and --flip out, or --tile")
    segmenter = load_segmenter(
        weights, device=device, mode=mode, crop_size=crop_size, stride=stride, scales=scales, flip=flip
    )
    written = []
    for name, path in names.items():
        mapped = out / "labels" / f".{name.replace('/', '_')}.npy"
        try:
            if tile is None:
                found = segmenter.predict(path)
            else:
                mapped.parent.mkdir(parents=True, exist_ok=True)
                counter = Counter("labelling windows")
                found = segmenter.predict_in_tiles(path, str(path), tile, overlap, mapped=mapped, on_progress=counter)
        except UserError as error:
            mapped.unlink(missing_ok=True)
            if on_error == "raise" or (len(names) == 1):
                raise
            print(f"skipped: {error}", flush=True)
            continue
        written.append(out / "labels" / f"{name}.{'png' if tile is None else 'tif'}")
        if tile is None:
            save(Image.fromarray(found.labels), written[-1])
        else:
            with atomic_path(written[-1]) as temporary:
                write_label_tiff(temporary, found.indices, found.values)
        save(found.draw(opacity), out / "overlays" / f"{name}.png")
        mapped.unlink(missing_ok=True)
    if not written:
        raise UserError(f"none of the {len(names)} images could be read; give image files, or folders of them")
    write_text(out / "classes.txt", class_lines(segmenter))
    return written


def class_lines(segmenter: Segmenter) -> str:
    """The text of classes.txt: a line value<TAB>name for each class."""
    return "".join(f"{value}\t{name}\n" for value, name in zip(segmenter.values, segmenter.classes, strict=True))


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
    add("weights", type=Path, metavar="SEGMENTER", help="a run directory, or its segmenter.safetensors")
    add("images", type=Path, nargs="+", metavar="IMAGES", help="image files, or folders of them")
    add("--out", type=Path, required=True, metavar="DIR", help="new folder for labels/, overlays/ and classes.txt")
    add("--mode", choices=("whole", "slide"), help="the image at once or in windows; as in training's test_cfg")
    add("--crop-size", type=int, metavar="N", help="side of the windows; the training's crop")
    add("--stride", type=int, metavar="N", help="pixels between windows; two thirds of the crop")
    add("--scales", type=float, nargs="+", default=[1.0], metavar="S", help="average over the image at these scales")
    add("--flip", action="store_true", help="average over the mirrored image too")
    add("--tile", type=int, metavar="N", help="label large images in tiles of N pixels, without seams")
    add("--overlap", type=float, default=OVERLAP, metavar="X", help="share of a tile that its neighbours see too")
    add("--opacity", type=float, default=0.5, metavar="X", help="of the colours on the overlays, 0 to 1")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--on-error", choices=("skip", "raise"), default="skip", help="what to do about an image that cannot be read")
    given = vars(parser.parse_args(arguments))
    with user_errors():
        written = predict(**given)
        print(f"labelled {len(written)} images in {given['out']}/: labels/, overlays/, classes.txt")


if __name__ == "__main__":
    main()
