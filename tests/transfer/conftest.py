"""A small COCO data set: bright shapes on dark noise, class ids with gaps, polygons and run-length masks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

CATEGORIES = [{"id": 20, "name": "disc"}, {"id": 3, "name": "bar"}, {"id": 7, "name": "frame"}]
TINY_DETECTOR = (
    "model.window=null",
    "model.norm=gn",
    "model.fpn_channels=32",
    "model.rpn_convs=1",
    "model.head_channels=32",
    "model.box_convs=0",
    "model.box_features=128",
    "model.mask_convs=1",
    "model.drop_path=0",
    "sampling.rpn_anchors=64",
    "sampling.pre_nms_train=60",
    "sampling.pre_nms_test=60",
    "sampling.proposals=40",
    "sampling.rois=24",
    "data.image_size=64",
    "data.resize_scale=[1,1]",
    "data.hflip=0",
    "data.workers=0",
    "optim.batch_size=4",
    "optim.warmup_epochs=2",
    "optim.clip_grad=1.0",
    "test.test_batch=4",
    "test.num_pictures=1",
    "log.every=20",
    "device=cpu",
)
DETECTOR_FROM_SCRATCH = ("from_scratch=true", "model.size=nano", "model.patch_size=8")
SCENE_CLASSES = ("ground", "box", "disc")
COLOURS = {3: (220, 60, 60), 7: (60, 220, 60), 20: (80, 80, 240)}


def runs_of(mask: np.ndarray) -> dict[str, object]:
    """Uncompressed run lengths, column by column, background first."""
    flat = np.concatenate([[False], mask.ravel(order="F"), [False]])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    edges = np.concatenate([[0], edges, [mask.size]])
    counts = np.diff(edges).tolist()
    return {"size": list(mask.shape), "counts": counts[:-1] if counts[-1] == 0 else counts}


def draw_shape(category: int, height: int, width: int, box: tuple[int, int, int, int]) -> np.ndarray:
    """A (height, width) bool mask that fills ``box`` (x, y, width, height) from edge to edge."""
    x, y, w, h = box
    mask = np.zeros((height, width), dtype=bool)
    mask[y : y + h, x : x + w] = True
    if category == 7:
        mask[y + 3 : y + h - 3, x + 3 : x + w - 3] = False
    if category == 20:
        rows, cols = np.mgrid[:height, :width] + 0.5
        mask &= ((rows - y - h / 2) / (h / 2)) ** 2 + ((cols - x - w / 2) / (w / 2)) ** 2 <= 1.0
    return mask


@pytest.fixture(scope="session")
def write_coco() -> Callable[..., Path]:
    """(root, train images, val images, size=(width, height)) -> a folder with train/, val/ and annotations/."""

    def write(root: Path, train: int = 4, val: int = 3, *, size: tuple[int, int] = (64, 48), val_seed: int = 1) -> Path:
        for name, count, seed in (("train", train, 0), ("val", val, val_seed)):
            write_part(root, name, count, size, np.random.default_rng(seed))
        return root

    return write


def write_part(root: Path, name: str, count: int, size: tuple[int, int], rng: np.random.Generator) -> None:
    """One half of the set: two shapes an image, one in its left half and one in its right."""
    width, height = size
    (root / name).mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for number in range(count):
        pixels = rng.integers(0, 50, (height, width, 3), dtype=np.uint8)
        for side in (0, 1):
            category = list(COLOURS)[(2 * number + side) % len(COLOURS)]
            w, h = rng.integers(14, width // 2 - 4), rng.integers(14, height - 4)
            x = side * width // 2 + rng.integers(1, width // 2 - w)
            y = rng.integers(1, height - h)
            box = (int(x), int(y), int(w), int(h))
            mask = draw_shape(category, height, width, box)
            pixels[mask] = COLOURS[category]
            x, y, w, h = box
            corners = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 10 * number + 5,
                    "category_id": category,
                    "bbox": list(box),
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": corners if category == 3 else runs_of(mask),
                }
            )
        Image.fromarray(pixels).save(root / name / f"{number:03d}.png")
        images.append({"id": 10 * number + 5, "file_name": f"{number:03d}.png", "height": height, "width": width})
    (root / "annotations").mkdir(exist_ok=True)
    content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    (root / "annotations" / f"instances_{name}.json").write_text(json.dumps(content))


@pytest.fixture(scope="session")
def detection_root(tmp_path_factory: pytest.TempPathFactory, write_coco: Callable[..., Path]) -> Path:
    """A tiny COCO set whose two halves are alike; tests must not write to it."""
    return write_coco(tmp_path_factory.mktemp("detection"), val_seed=0)


@pytest.fixture(scope="session")
def tiny_detector() -> tuple[str, ...]:
    """Options of a tiny detector from scratch."""
    return (*TINY_DETECTOR, *DETECTOR_FROM_SCRATCH)


@pytest.fixture(scope="session")
def to_bands() -> Callable[[Path], None]:
    """(root of a COCO set): rewrite its images as arrays of five bands."""

    def rewrite(root: Path) -> None:
        for half in ("train", "val"):
            path = root / "annotations" / f"instances_{half}.json"
            content = json.loads(path.read_text())
            for image in content["images"]:
                file = root / half / image["file_name"]
                image["file_name"] = file.with_suffix(".npy").name
                pixels = np.asarray(Image.open(file))
                np.save(file.with_suffix(".npy"), np.concatenate([pixels, pixels[..., :2]], -1))
                file.unlink()
            path.write_text(json.dumps(content))

    return rewrite


@pytest.fixture
def configure_detection(detection_root: Path, tmp_path: Path) -> Callable[..., Any]:
    """(overrides) -> a configuration of a tiny detector on the tiny set."""
    from mae_core.config.load import load_config
    from transfer.detection.config import DetectionConfig

    def make(*overrides: str, scratch: bool = True) -> DetectionConfig:
        given = dict(o.split("=", 1) for o in (*TINY_DETECTOR, *(DETECTOR_FROM_SCRATCH if scratch else ())))
        given |= {"data.path": str(detection_root), "output": str(tmp_path / "run")}
        given |= {"optim.epochs": "2", "optim.base_lr": "0.06"}
        given |= dict(o.split("=", 1) for o in overrides)
        return load_config(DetectionConfig, None, [f"{key}={value}" for key, value in given.items()])

    return make


@pytest.fixture
def break_off_and_resume(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """(configuration, module, name of a function that it calls once a step): a training that is stopped in its fourth
    step as by Ctrl-C, then resumed to its end."""
    from transfer.detection.run import train_detector

    def train(config: Any, module: ModuleType, name: str) -> None:
        real, calls = getattr(module, name), []

        def stops(*arguments: Any) -> Any:
            calls.append(1)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(module, name, stops)
            with pytest.raises(KeyboardInterrupt):
                train_detector(config)
        train_detector(config, resume=True)

    return train


@pytest.fixture(scope="session")
def write_scenes() -> Callable[..., Path]:
    """(root, num_images, side=(rows, columns)) -> the root, with images/, annotations/ and classes.txt."""
    return make_scenes


def make_scenes(root: Path, num_images: int = 8, side: tuple[int, int] = (32, 32)) -> Path:
    """Scenes of a red box and a blue disc on green ground; training and validation are the same."""
    generator = np.random.default_rng(0)
    rows, columns = np.mgrid[: side[0], : side[1]]
    for index in range(num_images):
        labels = np.zeros(side, np.uint8)
        top, left = generator.integers(0, np.array(side) - 14, 2)
        labels[top : top + 12, left : left + 14] = 1
        centre = generator.integers(6, np.array(side) - 6, 2)
        labels[(rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 < 36] = 2
        pixels = np.array([[40, 160, 60], [200, 40, 40], [40, 40, 220]])[labels] + generator.normal(0, 12, (*side, 3))
        for part in ("training", "validation"):
            for folder, array in (("images", pixels.clip(0, 255).astype(np.uint8)), ("annotations", labels)):
                (root / folder / part).mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(root / folder / part / f"{index}.png")
    (root / "classes.txt").write_text("".join(f"{value}\t{name}\n" for value, name in enumerate(SCENE_CLASSES)))
    return root


@pytest.fixture
def run_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands of a chain or a comparison run here, not in processes of their own."""
    from typer.testing import CliRunner

    from mae_core.cli.main import app
    from transfer import chain

    def execute(command: Any, place: Any, surroundings: Any, read: Callable[[str], None]) -> int:
        result = CliRunner().invoke(app, [*command[1:]])
        read(result.output)
        return result.exit_code

    monkeypatch.setattr(chain, "execute", execute)
