"""The shipped configurations are the published recipes, and each says which number it is meant to reach."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mae_core.config.load import load_config
from mae_core.training.finetune import scratch_line
from mae_core.training.finetune_config import FinetuneConfig, scratch_differences
from mae_core.training.frozen_config import EvaluateConfig, LinprobeConfig
from mae_core.training.pretrain_config import PretrainConfig

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(path for folder in ("finetune", "linprobe", "evaluate") for path in (CONFIGS / folder).glob("*.yaml"))
OWN = {"digits", "tiny_96"}
"""Small configurations of this project, which reproduce nothing published."""
SIZES = ("base", "large", "huge")

RECIPES = {
    # name: (base_lr, layer_decay, drop_path, epochs, random_erasing, published)
    "base_released": (5e-4, 0.65, 0.1, 100, 0.25, "83.6 %"),
    "large_released": (1e-3, 0.75, 0.2, 50, 0.25, "85.9 %"),
    "huge_released": (1e-3, 0.75, 0.3, 50, 0.25, "86.9 %"),
    "huge_448_released": (1e-3, 0.75, 0.3, 50, 0.25, "87.8 %"),
    "base_table9": (1e-3, 0.75, 0.1, 100, 0.0, "83.3 %"),
    "large_table9": (1e-3, 0.75, 0.1, 50, 0.0, "84.9 %"),
    "huge_table9": (1e-3, 0.75, 0.2, 50, 0.0, "86.2 %"),
    "base_scratch": (1e-4, 1.0, 0.1, 300, 0.0, "82.3 %"),
    "large_scratch": (1e-4, 1.0, 0.2, 200, 0.0, "82.6 %"),
    "huge_scratch": (1e-4, 1.0, 0.2, 200, 0.0, "83.1 %"),
}


def read(name: str, *options: str) -> FinetuneConfig:
    file = CONFIGS / "finetune" / f"{name}.yaml"
    start = () if name.endswith("_scratch") else ("weights=somewhere",)
    return load_config(FinetuneConfig, file, [*start, *options])


@pytest.mark.parametrize("file", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_shipped_file_is_valid_and_names_its_number(file):
    schema = {"finetune": FinetuneConfig, "linprobe": LinprobeConfig, "evaluate": EvaluateConfig}[file.parent.name]
    if schema is FinetuneConfig:
        read(file.stem)
    else:
        load_config(schema, file)
    comment = " ".join(line[1:] for line in file.read_text().splitlines() if line.startswith("#"))
    assert re.search(r"\bmae\)? (finetune|linprobe|evaluate)\b", comment) and str(file.relative_to(CONFIGS)) in comment
    if file.stem not in OWN:
        stated = re.search(r"Published(.*)", comment)
        assert stated and ("no number" in stated[1] or re.search(r"\d\d\.\d.*\((paper|FINETUNE)", stated[1]))


@pytest.mark.parametrize("name", RECIPES)
def test_a_published_recipe_is_the_published_one(name):
    base_lr, layer_decay, drop_path, epochs, erasing, number = RECIPES[name]
    config = read(name)
    optim = config.optim
    assert (optim.base_lr, optim.layer_decay, optim.epochs) == (base_lr, layer_decay, epochs)
    assert (config.model.drop_path, config.data.random_erasing) == (drop_path, erasing)
    assert config.model.size == name.partition("_")[0] and config.model.pooling == "mean"
    data = config.data
    assert (data.mixup, data.cutmix, data.label_smoothing) == (0.8, 1.0, 0.1)
    assert (data.auto_augment, data.crop_scale, data.hflip) == ("rand-m9-mstd0.5-inc1", (0.08, 1.0), 0.5)
    if config.from_scratch:
        assert (optim.weight_decay, optim.betas, optim.warmup_epochs, optim.batch_size) == (0.3, (0.9, 0.95), 20, 4096)
        assert config.ema == 0.9999
        plain = load_config(FinetuneConfig, None, ["from_scratch=true", f"model.size={config.model.size}"])
        plain = plain.model_copy(update={"data": plain.data.model_copy(update={"statistics": data.statistics})})
        assert plain == config  # the file says what the word means, but of one's own images the statistics are theirs
        assert scratch_differences(config) == [] and "Table 11" in scratch_line(config)
    else:
        assert (optim.weight_decay, optim.betas, optim.warmup_epochs, optim.batch_size) == (0.05, (0.9, 0.999), 5, 1024)
        assert config.ema is None and optim.min_lr == 1e-6
    assert data.image_size == (448 if "448" in name else 224)
    assert number in (CONFIGS / "finetune" / f"{name}.yaml").read_text()


@pytest.mark.parametrize("size", SIZES)
def test_each_size_has_each_kind(size):
    stems = {path.stem for path in FILES if path.stem.startswith(f"{size}_")}
    kinds = ("released", "table9", "partial", "scratch", "inaturalist", "places", "small_data")
    assert {f"{size}_{kind}" for kind in kinds} <= stems and (CONFIGS / "linprobe" / f"{size}.yaml").is_file()
    for kind in ("partial", "inaturalist", "places"):  # Table 9 but for what they are about
        table9, other = read(f"{size}_table9"), read(f"{size}_{kind}")
        assert (other.model, other.data) == (table9.model, table9.data)
        assert other.optim.model_copy(update={"epochs": table9.optim.epochs}) == table9.optim


@pytest.mark.parametrize("size, number", [("base", "68.0"), ("large", "75.8"), ("huge", "76.6")])
def test_a_probe_is_table_10(size, number):
    file = CONFIGS / "linprobe" / f"{size}.yaml"
    assert load_config(LinprobeConfig, file) == LinprobeConfig() and number in file.read_text()


GOLDEN = json.loads(Path(__file__).with_name("recipes.json").read_text())
"""Every shipped file, resolved: the values of a schema's options, and where a file has another."""
SCHEMAS = {
    "pretrain": PretrainConfig,
    "finetune": FinetuneConfig,
    "linprobe": LinprobeConfig,
    "evaluate": EvaluateConfig,
}


def leaves(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        flat |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def test_every_shipped_file_has_a_resolved_copy():
    found = {str(path.relative_to(CONFIGS)) for name in SCHEMAS for path in (CONFIGS / name).rglob("*.yaml")}
    assert found == set(GOLDEN["files"])


@pytest.mark.parametrize("name", GOLDEN["files"])
def test_a_shipped_file_resolves_to_the_values_it_had(name):
    """Files build on each other: an edit of one must not change another unseen."""
    kind = name.partition("/")[0]
    given = ["weights=somewhere"] if kind == "finetune" and not name.endswith("_scratch.yaml") else []
    found = leaves(load_config(SCHEMAS[kind], CONFIGS / name, given).model_dump(mode="json"))
    wanted = {**GOLDEN["defaults"][kind], **GOLDEN["files"][name]}
    assert {key: found.get(key) for key in wanted} == wanted


@pytest.mark.parametrize("name", ["large_released", "base_table9", "tiny_96"])
def test_from_scratch_on_a_recipe_is_the_recipe_without_weights(name):
    file = CONFIGS / "finetune" / f"{name}.yaml"
    with_weights = load_config(FinetuneConfig, file, ["weights=somewhere"])
    without = load_config(FinetuneConfig, file, ["from_scratch=true"])
    assert without == with_weights.model_copy(update={"weights": None, "from_scratch": True})
    line = scratch_line(without)
    assert line.startswith("recipe: this configuration, without weights; it differs")
    paper = 200.0 if name.startswith("large") else 300.0
    assert f"optim.epochs: {paper} -> {with_weights.optim.epochs}" in line and "ema: 0.9999 -> None" in line


def test_from_scratch_without_a_file_is_table_11_but_for_what_is_typed():
    config = load_config(FinetuneConfig, None, ["from_scratch=true", "optim.epochs=3", "model.size=huge", "seed=2"])
    assert scratch_differences(config) == ["optim.epochs: 200.0 -> 3.0"]
