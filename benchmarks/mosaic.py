"""A large image of known truth: a mosaic of a COCO set's validation images, searched in tiles in bounded memory.

    python benchmarks/mosaic.py nuclei runs/detector --out runs/mosaic --side 12000

Images of one size are repeated until the mosaic has SIDE pixels. Prints average precision on the mosaic and on the
single images, how many objects there are and were found, the time, and the largest resident memory of the process that
searched.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from mae_core.atomic import write_json
from mae_core.data.decoding import read_image
from transfer.detection.coco import CocoImage, Part, decode_masks, read_coco
from transfer.detection.masks import code_of_part
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


def truth_of(cells: list[CocoImage], across: int, size: tuple[int, int], name: str, categories: Any) -> dict[str, Any]:
    """The mosaic's COCO json."""
    annotations: list[dict[str, Any]] = []
    for number, cell in enumerate(cells):
        top, left = number // across * cell.height, number % across * cell.width
        for instance, mask in zip(cell.instances, decode_masks(cell, cell.instances), strict=True):
            rows, cols = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            if not len(rows):
                continue
            part = mask[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]
            code = code_of_part(part, (top + int(rows[0]), left + int(cols[0])), size)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 1,
                    "category_id": categories[instance.label - 1].id,
                    "bbox": [left + int(cols[0]), top + int(rows[0]), part.shape[1], part.shape[0]],
                    "area": int(mask.sum()),
                    "iscrowd": int(instance.crowd),
                    "segmentation": {"size": list(size), "counts": code["counts"].decode()},
                }
            )
    image = {"id": 1, "file_name": name, "height": size[0], "width": size[1]}
    return {"images": [image], "annotations": annotations, "categories": [c._asdict() for c in categories]}


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
    path, truth_path = given.out / "mosaic.tif", given.out / "truth.json"
    size = write_mosaic(cells, across, path)
    write_json(truth_path, truth_of(cells, across, size, path.name, coco.categories))

    script = ["-m", "transfer.detection.predict", "--weights", given.weights, str(path)]
    words = ["--out", str(given.out / "found"), "--truth", str(truth_path)]
    words += ["--tile", str(cells[0].width), "--overlap", str(given.overlap)]
    start = time.perf_counter()
    subprocess.run([sys.executable, *script, *words, "data.workers=0"], check=True)
    seconds = time.perf_counter() - start
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20

    singles = sorted({cell.path for cell in cells})
    single = predict(given.weights, singles, given.out / "single", truth=coco.path)
    of_singles = average_precision(single.coco, coco_results(single.coco, single.found), detections=10**6)
    large = read_coco(Part(given.out, truth_path))
    results = json.loads((given.out / "found" / "predictions.json").read_text())
    of_mosaic = average_precision(large, results, detections=10**6)
    counted = sum(result["score"] >= given.score for result in results)
    expected = {image.path: image.id for image in single.coco.images}
    single_counts = {
        expected[image.path]: int((found.scores >= given.score).sum())
        for image, found in zip(single.coco.images, single.found, strict=True)
    }
    record = {
        "pixels": list(size),
        "seconds": round(seconds, 1),
        "peak_memory_gib": round(memory, 3),
        "objects": len(large.images[0].instances),
        "found": counted,
        "found_in_single_images": sum(single_counts[expected[cell.path]] for cell in cells),
        **{f"{kind}_ap_mosaic": of_mosaic[kind]["AP"] for kind in ("bbox", "segm")},
        **{f"{kind}_ap_single": of_singles[kind]["AP"] for kind in ("bbox", "segm")},
    }
    write_json(given.out / "record.json", record)
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
