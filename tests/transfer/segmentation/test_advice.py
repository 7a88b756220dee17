# ruff: noqa: E402 (most imports need mmseg, which may be absent)
"""Advice that names an option is followed as it is written, and the data then trains; more than 255 classes do too."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae_core.errors import UserError
from transfer.segmentation.check_data import check_folders, folders_of_config

mmseg = pytest.importorskip("mmseg", reason="mmseg is not installed; pip install mae-transfer[segmentation]")
engine = pytest.importorskip("transfer.segmentation.engine_mmseg", reason="mmseg is here without mmcv or mmengine")

from transfer.segmentation.engine_mmseg import checks
from transfer.segmentation.engine_mmseg.options import parse_options, read_config
from transfer.segmentation.predict import predict
from transfer.segmentation.train_net import train_segmenter

CONFIGS = Path(__file__).parents[3] / "configs" / "segmentation"


def relabel(scenes: Path, table: dict[int, int], *, kind: type = np.uint8, suffix: str = ".png") -> None:
    """Write every label map with other values, and drop the names of the classes."""
    for path in (scenes / "annotations").rglob("*.png"):
        labels = np.asarray(Image.open(path))
        path.unlink()
        lookup = np.array([table.get(value, value) for value in range(3)], kind)
        values = lookup[labels]
        target = path.with_name(path.stem + suffix)
        if target.suffix == ".npy":
            np.save(target, values)
        else:
            Image.fromarray(values).save(target)
    (scenes / "classes.txt").unlink(missing_ok=True)


def train_data(config: str, scenes: Path, options: list[str]) -> str:
    """What the training says of its data. Raises ``UserError``."""
    read = read_config(CONFIGS / config, {"data_root": str(scenes), **parse_options(options)})
    return checks.check_data(dict(read.items()))["train data"]


def problems(config: str, scenes: Path, options: list[str]) -> list[str]:
    """What the check of the data says of the training half."""
    folders = folders_of_config(CONFIGS / config, {"data_root": str(scenes), **parse_options(options)})
    return [problem.sentence for problem in check_folders(folders[0]).problems if problem.severity != "note"]


ADVICE = [
    # how the maps are written, options as first typed, the options in the advice
    ({0: 0, 1: 255, 2: 255}, {}, ["num_classes=2"], r"set (label_values=\[0,255\] num_classes=2)"),
    ({0: 0, 1: 255, 2: 255}, {}, ["num_classes=2"], r"set (ignored_values=255)"),
    (
        {0: 0, 1: 255, 2: 255},
        {},
        ["num_classes=11", "reduce_zero_label=True"],
        r"set (label_values=\[0,255\] num_classes=2 reduce_zero_label=False)",
    ),
    ({1: 128, 2: 255}, {}, ["num_classes=3"], r"set (label_values=\[0,128,255\] num_classes=3)"),
    ({2: -1}, {"kind": np.int32, "suffix": ".npy"}, ["num_classes=2"], r"set (ignored_values=\[-1,255\]) if"),
    ({}, {"suffix": "_mask.png"}, ["num_classes=3"], r"set (seg_map_suffix=_mask\.png)"),
    ({}, {}, ["num_classes=2"], r"set (reduce_zero_label=True); if it is a class"),
    ({}, {}, ["num_classes=2"], r"if it is a class, set (num_classes=3)"),
    ({}, {}, ["num_classes=3", "reduce_zero_label=True"], r"set (reduce_zero_label=False), or"),
]


@pytest.mark.parametrize(
    ("config", "table", "form", "typed", "advice"),
    [
        *(("small_data.py", *row) for row in ADVICE),
        *(("camvid.py", *row) for row in ADVICE if "seg_map_suffix" in row[-1]),
    ],
    ids=[*range(len(ADVICE)), "camvid"],
)
def test_check_and_training_give_advice_that_works(scenes, config, table, form, typed, advice):
    relabel(scenes, table, **form)
    typed = [*typed, *(["seg_map_suffix=.npy"] if form.get("suffix") == ".npy" else [])]
    typed = [*(["reduce_zero_label=False"] if not any("reduce" in option for option in typed) else []), *typed]
    said = " | ".join(problems(config, scenes, typed))
    found = re.search(advice, said)
    assert found, said
    with pytest.raises(UserError) as refusal:
        train_data(config, scenes, typed)
    assert re.search(advice, str(refusal.value)), refusal.value
    followed = [*typed, *found[1].split()]
    assert problems(config, scenes, followed) == []
    assert "all 8 label maps fit" in train_data(config, scenes, followed)


def test_a_class_more_than_asked_for_may_be_void(scenes):
    typed = ["num_classes=2", "reduce_zero_label=False"]
    with pytest.raises(UserError, match="set num_classes=3, or reduce_zero_label=True where ground is void") as refusal:
        train_data("small_data.py", scenes, typed)
    for advice in (r"set (num_classes=3)", r"or (reduce_zero_label=True)"):
        followed = [*typed, re.search(advice, str(refusal.value))[1]]
        assert "all 8 label maps fit" in train_data("small_data.py", scenes, followed)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_every_config_takes_the_suffix_of_label_maps(path):
    config = read_config(path, parse_options(["seg_map_suffix=_mask.png", "data_root=/somewhere"]))
    for name in ("train_dataloader", "val_dataloader", "test_dataloader"):
        assert config[name].dataset.seg_map_suffix == "_mask.png"
        assert config[name].dataset.data_root == "/somewhere"


@pytest.mark.parametrize("name", ["own_data", "small_data", "camvid", "digits"])
def test_configs_of_own_label_maps_take_the_same_variables(name):
    options = {"label_values": [0, [1, 2]], "ignored_values": 9, "on_error": "raise", "num_classes": 2}
    config = read_config(CONFIGS / f"{name}.py", {**options, "reduce_zero_label": False})
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        assert {key: loader.dataset[key] for key in options} == options
        assert loader.dataset.reduce_zero_label is False
    assert config.model.decode_head.num_classes == config.model.auxiliary_head.num_classes == 2
    stated = read_config(CONFIGS / f"{name}.py", {})
    assert stated.train_dataloader.dataset.reduce_zero_label is (name == "camvid")


def test_objects_written_as_255_train_and_are_predicted_as_255(scenes, tmp_path, tiny):
    relabel(scenes, {0: 0, 1: 255, 2: 255})
    options = {**tiny, "num_classes": 2, "label_values": [0, 255], "iterations": 3}
    results = train_segmenter(CONFIGS / "digits.py", work_dir=tmp_path / "run", cfg_options=options)
    assert results["per_class"].keys() == {"class 0", "class 255"}
    assert all(row["IoU"] is not None for row in results["per_class"].values())
    (found,) = predict(tmp_path / "run", [scenes / "images/validation/1.png"], tmp_path / "out")
    assert set(np.unique(np.asarray(Image.open(found)))) <= {0, 255}
    assert (tmp_path / "out" / "classes.txt").read_text() == "0\tclass 0\n255\tclass 255\n"


def test_three_hundred_classes_train_and_are_predicted_in_16_bits(scenes, tmp_path, tiny):
    """255 is a class like any other, and neither padding nor ignored pixels are; 297 is not 41."""
    relabel(scenes, {0: 255, 1: 297, 2: 65535}, kind=np.uint16)
    options = {**tiny, "num_classes": 300, "iterations": 3, "lr": 2e-3, "crop_size": 40}
    options["model.neck.rescales"] = [4, 2, 1, 0.5]
    results = train_segmenter(CONFIGS / "digits.py", work_dir=tmp_path / "run", cfg_options=options)
    seen = {name for name, row in results["per_class"].items() if row["Acc"] is not None}
    assert seen == {"class 255", "class 297"}  # 65535 is ignored
    (found,) = predict(tmp_path / "run", [scenes / "images/validation/1.png"], tmp_path / "out")
    with Image.open(found) as label_map:
        assert label_map.mode == "I;16" and np.asarray(label_map).max() < 300
    config = (tmp_path / "run" / "digits.py").read_text()
    assert config.count("ignore_index=65535") >= 3 and "seg_pad_val=65535" in config
