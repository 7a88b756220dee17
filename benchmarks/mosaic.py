"""A large image of known truth: a mosaic of a COCO set's validation images, searched in tiles in bounded memory.

    python benchmarks/mosaic.py nuclei runs/detector --out runs/mosaic --side 12000

Images of one size are repeated until the mosaic has SIDE pixels; tiles as large as the images do not start where they
do. Prints average precision on the mosaic and on the single images, how many objects there are and were found, the
time, and the largest resident memory of the process that searched. What is found in the mosaic counts for the image in
which its centre lies, cut to it: both scores have the same truth, and no table of all pairs of a large image is needed.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from mae_core.atomic import write_json
from mae_core.data.decoding import read_image
from transfer.detection.coco import CocoImage, CocoSet, Part, read_coco
from transfer.detection.masks import code_of_part, cut_part, part_of_code
from transfer.detection.predict import predict
from transfer.detection.results import average_precision, coco_results

TILE = 256


def cells_of(images: list[CocoImage], side: int) -> tuple[list[CocoImage], int]:
    """As many images of the most frequent size as fill a square of ``side`` pixels, row by row, and how many a row."""
    sizes = [(image.height, image.width) for image in images]
    height, width = max(set(sizes), key=sizes.count)
    usable = [image for image, size in zip(images, sizes, strict=True) if size == (height, width)]
    across, down = side // width, side // height
    return [usable[number % len(usable)] for number in range(across * down)], across


def write_mosaic(cells: list[CocoImage], across: int, path: Path) -> tuple[int, int]:
    """The mosaic as a compressed TIFF of tiles -> (height, width)."""
    height, width = cells[0].height, cells[0].width
    size = (len(cells) // across * height, across * width)

    def tiles() -> Iterator[np.ndarray]:
        for row in range(len(cells) // across):
            images = [np.asarray(read_image(cell.path, 3)) for cell in cells[row * across : (row + 1) * across]]
            band = np.concatenate(images, axis=1)
            for top in range(0, height, TILE):
                for left in range(0, size[1], TILE):
                    part = band[top : top + TILE, left : left + TILE]
                    yield np.pad(part, [(0, TILE - part.shape[0]), (0, TILE - part.shape[1]), (0, 0)])

    if height % TILE:
        raise SystemExit(f"images of {height} pixels do not stack to TIFF tiles of {TILE}; use a set of 256x256 images")
    options: dict[str, Any] = {"tile": (TILE, TILE), "compression": "zlib", "photometric": "rgb"}
    tifffile.imwrite(path, tiles(), shape=(*size, 3), dtype=np.uint8, **options)
    return size


def as_images(cells: list[CocoImage], coco: CocoSet) -> CocoSet:
    """The cells as images 1, 2, ... of their own, however often an image is repeated."""
    images = [cell._replace(id=number) for number, cell in enumerate(cells, start=1)]
    return replace(coco, images=tuple(images))


def by_cell(results: list[dict[str, Any]], cells: CocoSet, across: int) -> list[dict[str, Any]]:
    """Results on the mosaic as results on its cells: each where its centre lies, cut to that cell."""
    height, width = cells.images[0].height, cells.images[0].width
    found = []
    for result in results:
        x, y, w, h = result["bbox"]
        row, col = int((y + h / 2) // height), int((x + w / 2) // width)
        top, left = row * height, col * width
        corner, mask = part_of_code(result["segmentation"])
        (up, start), part = cut_part(corner, mask, (top, left, height, width))
        x1, y1, x2, y2 = max(x, left), max(y, top), min(x + w, left + width), min(y + h, top + height)
        code = code_of_part(part, (up - top, start - left), (height, width))
        found.append(
            {
                "image_id": row * across + col + 1,
                "category_id": result["category_id"],
                "score": result["score"],
                "bbox": [x1 - left, y1 - top, x2 - x1, y2 - y1],
                "segmentation": {"size": [height, width], "counts": code["counts"].decode()},
            }
        )
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a folder with val/ and annotations/instances_val.json")
    parser.add_argument("weights", help="a detector that was trained on it")
    parser.add_argument("--out", type=Path, required=True, help="new folder")
    parser.add_argument("--side", type=int, default=12000, help="pixels of the mosaic's sides")
    parser.add_argument("--overlap", type=float, default=0.2)
    parser.add_argument("--score", type=float, default=0.5, help="objects with this score are counted")
    given = parser.parse_args()
    given.out.mkdir(parents=True)
    coco = read_coco(Part(given.data / "val", given.data / "annotations" / "instances_val.json"))
    cells, across = cells_of(list(coco.images), given.side)
    path = given.out / "mosaic.tif"
    size = write_mosaic(cells, across, path)
    as_cells = as_images(cells, coco)

    script = [
        "-m",
        "transfer.detection.predict",
        "--weights",
        given.weights,
        str(path),
        "--out",
        str(given.out / "found"),
    ]
    words = ["--tile", str(cells[0].width), "--overlap", str(given.overlap), "data.workers=0"]
    start = time.perf_counter()
    subprocess.run([sys.executable, *script, *words], check=True)
    seconds = time.perf_counter() - start
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    results = by_cell(json.loads((given.out / "found" / "predictions.json").read_text()), as_cells, across)

    names = sorted({cell.path for cell in cells})
    single = predict(given.weights, names, given.out / "single", truth=coco.path)
    of_path: dict[Path, list[dict[str, Any]]] = {name: [] for name in names}
    paths = {image.id: image.path for image in single.coco.images}
    for result in coco_results(single.coco, single.found):
        of_path[paths[result["image_id"]]].append(result)
    alone = [{**one, "image_id": image.id} for image in as_cells.images for one in of_path[image.path]]
    of_mosaic, of_singles = (average_precision(as_cells, each, detections=10**4) for each in (results, alone))
    record = {
        "pixels": list(size),
        "seconds": round(seconds, 1),
        "peak_memory_gib": round(memory, 3),
        "objects": sum(len(image.instances) for image in as_cells.images),
        "found": sum(result["score"] >= given.score for result in results),
        "found_in_single_images": sum(result["score"] >= given.score for result in alone),
        **{f"{kind}_ap_mosaic": of_mosaic[kind]["AP"] for kind in ("bbox", "segm")},
        **{f"{kind}_ap_single": of_singles[kind]["AP"] for kind in ("bbox", "segm")},
    }
    write_json(given.out / "record.json", record)
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
