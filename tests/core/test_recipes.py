"""Recipes by name, what can be set in them, and where their values come from."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mae_core.cli.configuring import KINDS, SCHEMAS, schema_of
from mae_core.config.describing import as_typed, options_of, values_with_origins
from mae_core.config.load import load_config
from mae_core.config.recipes import find_recipe, recipe_names, recipes_folder
from mae_core.config.schema import ConfigError, leaf_names
from mae_core.training.finetune_config import FinetuneConfig
from mae_core.training.pretrain_config import PretrainConfig

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "given", ["tiny_96", "tiny_96.yaml", "configs/pretrain/tiny_96.yaml", "configs/pretrain/tiny_96"]
)
def test_a_recipe_is_found_by_name_from_any_folder(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny_96").mkdir()  # a folder of that name is no file
    assert find_recipe(given, "pretrain") == ROOT / "configs/pretrain/tiny_96.yaml"
    assert load_config(PretrainConfig, given).model.size == "tiny"


def test_a_file_goes_before_a_recipe_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny_96.yaml").write_text("base: configs/pretrain/tiny_96.yaml\noptim: {epochs: 3}")
    config = load_config(PretrainConfig, "tiny_96.yaml")
    assert (config.optim.epochs, config.model.size) == (3, "tiny")


@pytest.mark.parametrize("kind", KINDS)
def test_every_recipe_has_a_name(kind):
    names = recipe_names(kind)
    assert names and not any(name.startswith("_") for name in names)
    assert all(find_recipe(name, kind).is_file() for name in names)


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="tiny_69 does not exist; as a recipe's name: did you mean 'tiny_96'"):
        load_config(PretrainConfig, "tiny_69")


def test_a_wheel_brings_the_recipes(tmp_path):
    """Without a clone beside the package they are found inside it."""
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path / "b"), "build_py"]
    subprocess.run([*command, "--build-lib", str(tmp_path / "lib")], cwd=ROOT, check=True, capture_output=True)
    installed = tmp_path / "lib/mae_core/configs"
    for path in (ROOT / "configs").rglob("*.*"):
        if "__pycache__" not in path.parts:
            assert (installed / path.relative_to(ROOT / "configs")).read_bytes() == path.read_bytes()
    program = "from mae_core.config.recipes import recipes_folder; print(recipes_folder())"
    found = subprocess.run([sys.executable, "-c", program], cwd=tmp_path / "lib", capture_output=True, text=True)
    assert Path(found.stdout.strip()) == installed, found.stderr
    assert recipes_folder() == ROOT / "configs"


@pytest.mark.parametrize("command", SCHEMAS)
def test_every_option_is_listed_with_its_meaning(command):
    schema = schema_of(command)
    options = list(options_of(schema))
    assert [option.key.replace("[]", "") for option in options] == leaf_names(schema)  # entries of lists
    assert not [option.key for option in options if not (option.meaning and option.type)]
    sections = {key.split(".")[0].removesuffix("[]") for key, *_ in options}
    assert schema.model_json_schema()["properties"].keys() >= sections


def test_an_options_default_is_that_of_the_command():
    of = {option.key: option for option in options_of(FinetuneConfig)}
    assert of["optim.base_lr"].default == "0.0005" and "256" in of["optim.base_lr"].meaning
    assert of["optim.batch_size"].type == "integer >= 1"
    assert of["model.pooling"].type == "mean | cls | map"


def test_each_value_says_where_it_comes_from(tmp_path):
    below, path = tmp_path / "below.yaml", tmp_path / "mine.yaml"
    below.write_text("optim: {epochs: 5, batch_size: 64}\nmasking: {kind: block}")
    path.write_text("base: below.yaml\noptim: {epochs: 7}")
    found = values_with_origins(PretrainConfig, path, ["data.path=a #b", "masking.ratio=0.5"])
    assert found["optim.epochs"] == ("7", str(path))
    assert found["optim.batch_size"] == ("64", str(below))
    assert found["data.path"] == ("a #b", "command line")
    assert found["masking.ratio"] == ("0.5", "command line")
    assert found["seed"] == ("0", "default")
    assert found.keys() == set(leaf_names(PretrainConfig))


@pytest.mark.parametrize(
    "value, typed", [(None, "null"), (True, "true"), (2.0, "2"), (1e-6, "1e-06"), ((0.1, None), "[0.1,null]")]
)
def test_values_read_back_as_they_are_shown(value, typed):
    assert as_typed(value) == typed
