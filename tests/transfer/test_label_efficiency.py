"""The benchmark of few labels: nested subsets, a grid that never sees the validation set, cells that stay finished, and
a rehearsal of each task."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from mae_core.errors import UserError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMALL = ("model.size=nano", "model.patch_size=8", "data.image_size=32", "data.workers=0", "device=cpu")


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
        spec = importlib.util.spec_from_file_location("label_efficiency", BENCHMARKS / "label_efficiency.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["label_efficiency"] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        yield module
    del sys.modules["label_efficiency"]


@pytest.fixture
def classes(tmp_path, write_classes):
    return write_classes(tmp_path / "classes", train=8, val=2)


def test_smaller_subsets_are_inside_larger_ones_and_hold_all_classes(classes, benchmark):
    task = benchmark.TASKS["classification"](classes)
    first, again, other = task.order(0), task.order(0), task.order(1)
    assert first == again and first != other and sorted(first) == sorted(other) and len(first) == 24
    for count in (3, 6, 12):
        found = [path.parent.name for path in first[:count]]
        assert {name: found.count(name) for name in ("ash", "birch", "cedar")} == dict.fromkeys(
            ("ash", "birch", "cedar"), count // 3
        )


def test_what_is_held_out_is_scored_in_place_of_the_validation_set(tmp_path, classes, detection_root, benchmark):
    task = benchmark.TASKS["classification"](classes)
    order = task.order(0)
    task.write(tmp_path / "held", order[:6], order[6:9])
    task.write(tmp_path / "final", order[:9], None)

    def files(folder):
        return sorted(path.resolve() for path in folder.rglob("*.png"))

    assert files(tmp_path / "held" / "train") == sorted(order[:6])
    assert files(tmp_path / "held" / "val") == sorted(order[6:9])
    scored = [path for name in ("ash", "birch", "cedar") for path in files(tmp_path / "final" / "val" / name)]
    assert scored == files(classes / "val")

    coco = benchmark.TASKS["detection"](detection_root)
    ids = coco.order(0)
    coco.write(tmp_path / "coco", ids[:2], ids[2:3])
    for name, chosen in (("train", ids[:2]), ("val", ids[2:3])):
        content = json.loads((tmp_path / "coco" / f"{name}.json").read_text())
        assert {image["id"] for image in content["images"]} == set(chosen)
        assert {entry["image_id"] for entry in content["annotations"]} == set(chosen)


def test_the_grid_is_read_and_refused(benchmark):
    assert benchmark.grid_of(["decay=0.75,1", "rate=2,1"]) == ((1, 1), (1, 0.75), (2, 1), (2, 0.75))
    assert benchmark.grid_of(["rate=2"]) == ((2, 1),)
    for word in ("rates=1", "rate=", "decay=-1", "rate"):
        with pytest.raises(UserError, match=r"cannot be read; write rate=0.5,1,2 and decay=1,0.75"):
            benchmark.grid_of([word])


def test_classification_is_rehearsed_and_continued(tmp_path, classes, benchmark, capsys):
    words = ["classification", "--data", str(classes), "--unlabelled", str(classes / "train"), "--steps", "2"]
    words += ["--out", str(tmp_path / "out"), "--results", str(tmp_path), "--grid", "rate=1,2", "decay=1"]
    words += ["--options", *SMALL, "optim.batch_size=4"]
    words += ["--pretrain", *SMALL, "decoder.width=32", "decoder.depth=1", "optim.epochs=0.5", "optim.warmup_epochs=0"]
    benchmark.main([*words, "--fractions", "0.5", "--arms", "scratch", "--seeds", "1"])
    first = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "cells").iterdir()}
    assert len(first) == 2 + 1 and not list((tmp_path / "out" / "runs").iterdir())
    grid = json.loads((tmp_path / "out" / "cells" / "grid_0.5_scratch_rate_2_decay_1.json").read_text())
    assert (grid["labels"], grid["rate"]) == (9, 2.0)  # a quarter of the 12 labels is kept out

    benchmark.main([*words, "--fractions", "0.5", "--arms", "frozen", "scratch", "knn", "--seeds", "2", "--jobs", "2"])
    assert all(path.stat().st_mtime_ns == before for path, before in first.items())
    content = json.loads((tmp_path / "label_efficiency_classification.json").read_text())
    assert [(r["labels"], r["arm"]) for r in content["results"]] == [(12, "scratch"), (12, "frozen"), (12, "knn")]
    assert all(len(record["scores"]) == 2 for record in content["results"])
    assert [len(record["grid"]) for record in content["results"]] == [2, 2, 0]
    assert "| 12 (50%) | frozen | **" in (tmp_path / "label_efficiency_classification.md").read_text()
    assert min(Image.open(tmp_path / "label_efficiency_classification.png").size) > 300

    for file in (alone := tmp_path / "out" / "cells").glob("*scratch*"):
        (alone / f"{file.name}.before").write_text(json.dumps({**json.loads(file.read_text()), "seconds": 0}))
        file.unlink()
    benchmark.main([*words, "--fractions", "0.5", "--arms", "scratch", "--seeds", "2"])
    for before in alone.glob("*.before"):  # one after the other or at once is the same
        after = json.loads(before.with_suffix("").read_text())
        assert {**after, "seconds": 0} == json.loads(before.read_text())

    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        benchmark.main([*words, "--steps", "3"])
    assert ended.value.code == 2 and "was begun with other settings (steps: 2 there)" in capsys.readouterr().err


def test_detection_is_rehearsed(tmp_path, detection_root, tiny_detector, benchmark):
    options = [word for word in tiny_detector if not word.startswith(("from_scratch", "optim.warmup"))]
    words = ["detection", "--data", str(detection_root), "--steps", "1", "--fractions", "0.5", "--arms", "scratch"]
    words += ["--out", str(tmp_path / "out"), "--results", str(tmp_path), "--seeds", "1", "--grid", "rate=2"]
    benchmark.main([*words, "--options", *options])
    content = json.loads((tmp_path / "label_efficiency_detection.json").read_text())
    assert content["results"][0]["labels"] == 2 and 0 <= content["results"][0]["scores"][0] <= 100
