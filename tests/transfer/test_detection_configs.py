"""Every recipe of configs/detection: it loads, says what was published, and has the published rate at the published
devices."""

import re
from pathlib import Path

import pytest

from mae_core.config.load import load_config
from transfer.detection.config import DetectionConfig
from transfer.detection.rehearsal import rehearse
from transfer.detection.trainer import follow_devices

FOLDER = Path(__file__).parents[2] / "configs" / "detection"
FILES = sorted(FOLDER.glob("*.yaml"))

PUBLISHED = {
    "mask_rcnn_vit_base": (50.3, 44.9),
    "mask_rcnn_vit_large": (53.3, 47.2),
    "vitdet_vit_base": (51.6, 45.9),
    "vitdet_vit_large": (55.5, 49.2),
    "vitdet_vit_huge": (56.7, 50.2),
    "cascade_vit_base": (54.0, 46.7),
    "cascade_vit_large": (57.6, 50.0),
    "cascade_vit_huge": (58.7, 51.0),
}
"""Box AP and mask AP: Table 4 of the MAE paper, and the README of detectron2's projects/ViTDet."""

TINY = (
    "model.size=nano", "model.patch_size=8", "model.positions=canvas", "model.fpn_channels=16",
    "model.head_channels=16", "model.box_features=32", "data.image_size=64", "device=cpu",
)  # fmt: skip


def load(path, *overrides):
    return load_config(DetectionConfig, path, ["from_scratch=true", *overrides])


def header_of(path):
    lines = path.read_text().splitlines()
    return " ".join(line.lstrip("# ") for line in lines[: next(n for n, x in enumerate(lines) if x[0] != "#")])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recipe_loads_and_its_header_says_what_was_published_and_how_it_is_started(path):
    load(path)
    header = header_of(path)
    assert f"--config-file configs/detection/{path.name}" in header
    if path.stem in PUBLISHED:
        box, mask = PUBLISHED[path.stem]
        assert f"{box} box AP, {mask} mask AP" in header and re.search("Table 4|projects/ViTDet", header)
        assert "Never run here in full" in header
    else:
        assert "No published numbers" in header


def test_every_published_detector_has_a_recipe():
    assert PUBLISHED.keys() <= {path.stem for path in FILES}


@pytest.mark.parametrize("name", PUBLISHED)
def test_batch_and_rate_follow_the_devices_and_are_the_published_ones_on_the_published_devices(name):
    devices, rate = (32, 8e-5) if name.startswith("mask_rcnn") else (64, 1e-4)
    config = load(FOLDER / f"{name}.yaml")
    published = follow_devices(config, devices).optim
    assert published.batch_size == 64 and published.lr == pytest.approx(rate)
    eighth = follow_devices(config, devices // 8).optim
    assert eighth.batch_size == 8 and eighth.lr == pytest.approx(rate / 8)


def test_sizes_differ_in_what_was_published_alone():
    """Drop path, layer decay, length (recipes of arXiv 2111.11429, 2.4, and 2203.16527, Table 11)."""
    configs = {name: load(FOLDER / f"{name}.yaml") for name in PUBLISHED}
    drop = {name: config.model.drop_path for name, config in configs.items()}
    assert [drop[f"mask_rcnn_vit_{size}"] for size in ("base", "large")] == [0.1, 0.3]
    for kind in ("vitdet", "cascade"):
        three = [configs[f"{kind}_vit_{size}"] for size in ("base", "large", "huge")]
        assert [config.model.drop_path for config in three] == [0.1, 0.4, 0.5]
        assert [config.optim.layer_decay for config in three] == [0.7, 0.8, 0.9]
        assert [config.optim.epochs for config in three] == [100, 100, 75]
        assert [config.optim.decayed for config in three] == ["vitdet", "vitdet", "all"]
        assert {config.model.cascade for config in three} == {kind == "cascade"}
        assert three[0].optim.warmup_epochs * 118_287 / 64 == pytest.approx(250, abs=0.5)
        assert [round(share * 184_375) for share in three[0].optim.milestones] == [163_889, 177_546]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_rehearsal_of_a_recipe_says_its_batch_rate_and_steps(path, detection_root, tmp_path):
    said = []
    config = load(path, *TINY, "engine=torchvision", "model.cascade=false", f"data.path={detection_root}",
        f"output={tmp_path / 'run'}")  # fmt: skip
    rehearse(config, 4, said.append)
    planned = follow_devices(config, 4).optim
    text = "\n".join(said)
    assert f"batch: {planned.batch_size} images a step, on 4 devices" in text
    assert f"= {planned.lr:.6g} at its peak" in text and "memory, estimated:" in text
    assert not (tmp_path / "run").exists()
