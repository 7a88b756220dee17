"""Every recipe of configs/detection: it loads, says what was published, and has the published rate at the published
devices."""

import re
from pathlib import Path

import pytest

from mae_core.config.load import load_config
from mae_core.config.schema import ConfigError
from mae_core.data.loading import steps_for
from transfer.detection.config import DetectionConfig, DetectorConfig
from transfer.detection.plan import print_plan

FOLDER = Path(__file__).parents[2] / "configs" / "detection"
FILES = sorted(FOLDER.glob("*.yaml"))

PUBLISHED = {
    "mask_rcnn_vit_base": (50.3, 44.9),
    "mask_rcnn_vit_large": (53.3, 47.2),
    "mask_rcnn_mimdet_vit_base": (50.4, 44.9),
    "vitdet_vit_base": (51.6, 45.9),
    "vitdet_vit_large": (55.5, 49.2),
    "vitdet_vit_huge": (56.7, 50.2),
    "cascade_vit_base": (54.0, 46.7),
    "cascade_vit_large": (57.6, 50.0),
    "cascade_vit_huge": (58.7, 51.0),
}
"""Box AP and mask AP: Table 4 of the MAE paper, and the README of detectron2's projects/ViTDet."""

WITH_OBJECTS = 117_266
"""Of COCO's 118,287 training images those with an object that is no crowd: what detectron2 trains on."""

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
        assert f"{box} box AP, {mask} mask AP" in header and re.search("Table 4|projects/ViTDet|hustvl/MIMDet", header)
        assert "Never run here in full" in header
    else:
        assert "No published numbers" in header


def test_every_published_detector_has_a_recipe():
    assert PUBLISHED.keys() <= {path.stem for path in FILES}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("overrides", [(), ("optim.batch_size=64",), ("optim.micro_batch=1",)])
def test_batch_and_rate_are_the_published_ones_whatever_the_devices(name, overrides, detection_root):
    rate = 8e-5 if name.startswith("mask_rcnn") else 1e-4
    if "optim.micro_batch=1" in overrides:
        overrides = (*overrides, "engine=torchvision", "model.cascade=false")
    optim = load(FOLDER / f"{name}.yaml", *overrides).optim
    assert optim.batch_size == 64 and optim.lr == pytest.approx(rate)
    assert load(FOLDER / f"{name}.yaml", "optim.batch_size=8").optim.lr == pytest.approx(rate / 8)


def test_the_option_that_batch_size_replaces_says_so():
    with pytest.raises(ConfigError, match=r"images_per_device is replaced by batch_size.*on N devices set batch_size"):
        load(FOLDER / "vitdet_vit_base.yaml", "optim.images_per_device=8")


def test_windows_are_the_papers_and_mimdets_are_a_named_variant():
    """14 patches (arXiv 2111.11429, section 2.1; ViTDet, A.2), and 16 in hustvl/MIMDet's configs/benchmarking."""
    windows = {name: load(FOLDER / f"{name}.yaml").model.window for name in PUBLISHED}
    assert windows.pop("mask_rcnn_mimdet_vit_base") == 16
    assert set(windows.values()) == {14} == {DetectorConfig().window}


def test_sizes_differ_in_what_was_published_alone():
    """Drop path, layer decay, length (recipes of arXiv 2111.11429, 2.4, and 2203.16527, Table 11)."""
    configs = {name: load(FOLDER / f"{name}.yaml") for name in PUBLISHED}
    drop = {name: config.model.drop_path for name, config in configs.items()}
    assert [drop[f"mask_rcnn_vit_{size}"] for size in ("base", "large")] == [0.1, 0.3]
    for kind in ("vitdet", "cascade"):
        three = [configs[f"{kind}_vit_{size}"] for size in ("base", "large", "huge")]
        assert [config.model.drop_path for config in three] == [0.1, 0.4, 0.5]
        assert [config.optim.layer_decay for config in three] == [0.7, 0.8, 0.9]
        assert [steps_for(WITH_OBJECTS, 64, c.optim.epochs) for c in three] == [184_375, 184_375, 138_281]
        warmup = [c.optim.warmup_epochs * WITH_OBJECTS / 64 for c in three]
        assert warmup == pytest.approx([250, 250, 250 / 184_375 * 138_281], abs=0.05)
        assert [config.optim.decayed for config in three] == ["vitdet", "vitdet", "all"]
        assert {config.model.cascade for config in three} == {kind == "cascade"}
        assert [round(share * 184_375) for share in three[0].optim.milestones] == [163_889, 177_546]
        theirs = [milestone * 3 // 4 for milestone in (163_889, 177_546)]
        assert [int(share * 138_281) for share in three[2].optim.milestones] == pytest.approx(theirs, abs=1)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_rehearsal_of_a_recipe_says_its_batch_rate_and_steps(path, detection_root, tmp_path):
    said = []
    config = load(path, *TINY, "engine=torchvision", "model.cascade=false", f"data.path={detection_root}",
        f"output={tmp_path / 'run'}")  # fmt: skip
    print_plan(config, 4, said.append)
    planned = config.optim
    text = "\n".join(said)
    assert f"batch: {planned.batch_size} images per step: 4 devices x {planned.batch_size // 4}" in text
    assert f"= {planned.lr:.6g} at its peak" in text and "memory, estimated:" in text
    assert not (tmp_path / "run").exists()
