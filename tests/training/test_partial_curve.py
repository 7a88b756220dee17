"""The benchmark of Figure 9: which runs are left to do, and what it draws."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

FILE = Path(__file__).parents[2] / "benchmarks" / "partial_curve.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("partial_curve", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_points_are_every_number_of_blocks_and_seed(tmp_path, benchmark):
    arms = benchmark.arms_of(
        tmp_path / "data", tmp_path / "e.safetensors", tmp_path, blocks=[0.5, 2], epochs=1, seeds=2
    )
    assert [arm.name for arm in arms] == ["10-NN", "20-NN", "linear", "0.5 blocks", "2 blocks", "scratch"]
    jobs = benchmark.jobs_of(arms, tmp_path)
    assert len(jobs) == 2 + 2 * 4  # k-NN has no seeds
    assert len({job.name for job in jobs}) == len(jobs) and len({job.run for job in jobs}) == len(jobs)

    left = {job.name: job.command for job in jobs}
    assert "trainable_blocks=0.5" in left["0.5 blocks seed 0"] and "seed=1" in left["scratch seed 1"]
    assert {"from_scratch=true", "optim.layer_decay=1"} <= set(left["scratch seed 0"])


def test_the_figure_and_the_table_show_every_point(tmp_path, benchmark):
    names = ["10-NN", "20-NN", "linear", "0.5 blocks", "2 blocks", "scratch"]
    points = {name: benchmark.Point(name, [40.0 + place, 42.0 + place]) for place, name in enumerate(names)}
    points["10-NN"] = benchmark.Point("10-NN", [40.0])
    benchmark.draw(points, [0.5, 2], tmp_path / "figure.png", "title")
    assert min(Image.open(tmp_path / "figure.png").size) > 400
    table = benchmark.table_of(points, tmp_path / "figure.png", "told", "command")
    assert "| 2 blocks | **45.0** | 1.41 | 44.0, 46.0 |" in table and "| 10-NN | **40.0** | - | 40.0 |" in table
