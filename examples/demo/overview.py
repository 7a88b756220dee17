"""The picture of the README: images, three quarters hidden, reconstructed, and what a detector found in them.

python examples/demo/overview.py runs/demo/pretrain runs/demo/detection/pre-trained_0 IMAGES --out overview.png
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from PIL import Image

from mae_core.errors import user_errors
from mae_core.training.pictures import Display, Strip, fixed_mask, reconstruction_rows, tile
from mae_core.training.viewer import load_with_statistics, read_views
from transfer.detection.predict import predict

TITLES = ["image", "75 % hidden", "reconstructed", "boxes and masks found"]
SIDE = 192


def overview(pretraining: Path, detector: Path, images: list[Path], score: float) -> Image.Image:
    """A row of four panels for each image. Raises ``UserError`` where a run or an image cannot be read."""
    model, statistics = load_with_statistics(pretraining, None)
    pixels = read_views(images, model, statistics, len(images))
    strips = reconstruction_rows(
        model, pixels, fixed_mask(model, len(images), seed=0), statistics, Display.of(statistics)
    )
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found"
        predict(detector, images, found, score=score, say=lambda text: None)
        rows = []
        for strip, path in zip(strips, images, strict=True):
            (file,) = (found / "pictures").rglob(f"{path.stem}*.png")
            with Image.open(file) as sheet:  # the image beside what was found, equally wide, below a line of titles
                side = (sheet.width - 8) // 2
                detected = sheet.crop((sheet.width - side, sheet.height - side, sheet.width, sheet.height))
            image, masked, _, pasted = strip.panels
            panels = [panel.resize((SIDE, SIDE), Image.Resampling.NEAREST) for panel in (image, masked, pasted)]
            rows.append(Strip("", [*panels, detected.resize((SIDE, SIDE), Image.Resampling.LANCZOS)]))
    return tile(rows, TITLES, side=SIDE)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("pretraining", type=Path, help="a run of mae pretrain")
    parser.add_argument("detector", type=Path, help="a run of transfer/detection/train_net.py")
    parser.add_argument("images", type=Path, nargs="+", help="square images; a row each")
    parser.add_argument("--score", type=float, default=0.5, help="least score of what is drawn")
    parser.add_argument("--out", type=Path, default=Path("overview.png"))
    given = parser.parse_args()
    with user_errors():
        overview(given.pretraining, given.detector, given.images, given.score).save(given.out)


if __name__ == "__main__":
    main()
