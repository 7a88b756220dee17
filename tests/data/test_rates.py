"""How many processes read images: measured by mae bench-data, and chosen by data.workers=auto."""

from __future__ import annotations

import json
import re

import pytest
import yaml
from typer.testing import CliRunner

from mae_core.cli.main import app
from mae_core.config.load import load_config
from mae_core.data import rates
from mae_core.data.rates import Stage, best_number, candidates, needed, rate_lines
from mae_core.training import run as run_module
from mae_core.training.pretrain import pretrain
from mae_core.training.pretrain_config import PretrainConfig


def test_the_fewest_processes_near_the_best_rate_are_chosen():
    assert candidates(7) == [1, 2, 4, 7] and candidates(8) == [1, 2, 4, 8] and candidates(0) == [1]
    assert best_number({1: 100.0, 2: 195.0, 4: 200.0}) == 2
    assert best_number({1: 100.0, 2: 120.0, 4: 220.0}) == 4


def test_what_a_gpu_needs_follows_from_the_best_rate_of_a_process():
    measured = {0: 90.0, 1: 100.0, 2: 180.0}
    assert needed(1000, measured) == 10
    text = "\n".join(rate_lines([Stage("read", 0.001), Stage("all", 0.01)], measured, 1000))
    assert "needs 10 processes (10.0); this machine reaches 180" in text and re.search(r"read +1000 images/s", text)
    assert "needs 2 processes (1.5); this machine can" in rate_lines([], measured, 150)[-2]


@pytest.mark.parametrize("recipe", ["pretrain/tiny_96", "finetune/tiny_96"])
def test_the_loader_of_a_recipe_is_measured(recipe, tmp_path, write_images, write_classes, monkeypatch):
    monkeypatch.setattr("mae_core.training.bench_data.cores", lambda: 1)
    place = write_classes(tmp_path / "a") if "finetune" in recipe else write_images(tmp_path / "a", 8)[0].parent
    words = [recipe, f"data.path={place}", "data.image_size=32", "data.workers=0", "--rate", "1e6", "--seconds", "0.1"]
    words += ["model.patch_size=8"] if "pretrain" in recipe else []
    result = CliRunner().invoke(app, ["bench-data", *words])
    assert result.exit_code == 0, result.output
    for stage in ("read", "decode", "augment", "collate", "all"):
        assert re.search(rf"^ *{stage} +\d+ images/s +[\d.]+ ms each$", result.output, flags=re.MULTILINE), stage
    assert re.search(r"^1 processes: \d+ images/s$", result.output, flags=re.MULTILINE)
    assert "a GPU that trains 1e+06 images/s needs" in result.output
    assert not list(tmp_path.glob("*unused*"))


@pytest.mark.parametrize(
    "words, told",
    [
        (["detection/small_data"], "recipes of pretrain and finetune"),
        (["pretrain/tiny_96", "data.path=none"], "none"),
        ([], "name a recipe"),
    ],
)
def test_what_cannot_be_measured_is_refused(words, told):
    result = CliRunner().invoke(app, ["bench-data", *words])
    assert result.exit_code == 2 and told in result.stderr


def test_a_run_measures_once_and_stores_the_number(tmp_path, write_images, pretrain_options, monkeypatch, capsys):
    write_images(tmp_path / "images", 8)
    options = [*pretrain_options, f"data.path={tmp_path / 'images'}", f"output={tmp_path / 'run'}", "data.workers=auto"]
    asked: list[int] = []

    def rate(images: object, collate: object, number: int, **rest: object) -> float:
        asked.append(number)
        return {1: 10.0, 2: 10.5}[number]

    monkeypatch.setattr(run_module, "loader_rate", rate)
    monkeypatch.setattr(run_module, "cores", lambda: 2)
    pretrain(load_config(PretrainConfig, None, [*options, "optim.epochs=1", "log.checkpoint_every=1"]))
    assert asked == [1, 2] and "data.workers: 1 (images/s a rank by number of processes: 1: 10, 2: 10)" in (
        capsys.readouterr().out
    )
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"]["workers"] == 1
    (tmp_path / "run" / "encoder.safetensors").unlink()
    pretrain(load_config(PretrainConfig, None, [*options, "optim.epochs=1"]), resume=True)
    assert asked == [1, 2], "a resumed run takes the stored number"
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"]["workers"] == 1


def test_the_measured_rate_is_that_of_the_loader(tmp_path, write_images, pretrain_options):
    write_images(tmp_path / "images", 4)
    options = [*pretrain_options, f"data.path={tmp_path / 'images'}", f"output={tmp_path / 'run'}"]
    from mae_core.training.bench_data import loaded_by

    _, samples, collate = loaded_by(load_config(PretrainConfig, None, options))
    measured = rates.loader_rate(samples, collate, 0, batch=4, seconds=0.05)
    assert 1 < measured < 1e6 and json.dumps(measured)
