"""``mae detect|segment|classify|config``: the scripts in the words of ``mae``, and the words of other command lines."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

import mae_core
from mae_core.cli.main import app
from transfer.detection import train_net as detection
from transfer.segmentation import train_net as segmentation


def run(*words: str):
    return CliRunner().invoke(app, list(words))


@pytest.fixture
def words(monkeypatch):
    """What the scripts are given."""
    given: list[list[str]] = []
    monkeypatch.setattr(detection, "main", given.append)
    monkeypatch.setattr(segmentation, "main", given.append)
    return given


@pytest.mark.parametrize(
    "typed, handed_on",
    [
        (
            "detect train small_data weights=w data.path=d --resume auto",
            ["--config-file", "small_data", "weights=w", "data.path=d", "--resume=auto"],
        ),
        ("detect train weights=w --dry-run", ["weights=w", "--dry-run"]),
        ("detect evaluate small_data weights=w", ["--config-file", "small_data", "weights=w", "--eval-only"]),
        (
            "segment train small_data weights=w output=o data.path=d num_classes=2 --resume",
            "small_data --weights w --work-dir o --cfg-options data_root=d num_classes=2 --resume=yes".split(),
        ),
        (
            "segment train small_data from_scratch=true precision=fp32 --dry-run",
            ["small_data", "--no-amp", "--dry-run"],
        ),
        (
            "segment evaluate small_data weights=w output=o seed=3",
            "small_data --eval-only w --work-dir o --cfg-options randomness.seed=3".split(),
        ),
    ],
)
def test_a_verb_is_its_script_in_other_words(typed, handed_on, words):
    result = run(*typed.split())
    assert result.exit_code == 0, result.output
    assert words == [handed_on]


def test_a_run_brings_its_recipe_to_its_evaluation(tmp_path, words):
    (tmp_path / "config.yaml").write_text("{}")
    given = [f"weights={tmp_path}", "output=o"]
    assert run("detect", "evaluate", *given).exit_code == 0
    assert words.pop() == [*given, "--eval-only"]  # not a detector's run: its configuration is of another kind
    (tmp_path / "detector.safetensors").touch()
    assert run("detect", "evaluate", *given).exit_code == 0
    assert words == [["--config-file", f"{tmp_path}/config.yaml", *given, "--eval-only"]]
    refused = run("detect", "evaluate", f"weights={tmp_path}")
    assert refused.exit_code == 2 and "output=DIR" in refused.stderr


@pytest.mark.parametrize(
    "typed, told",
    [
        ("pretrain --config-file x.yaml", "--config-file is written RECIPE or FILE.yaml here"),
        ("finetune --weights x", "--weights is written weights=FILE here"),
        ("detect train small_data --work-dir x", "--work-dir is written output=DIR here"),
        ("classify train --data x", "--data is written data.path=DIR here"),
        ("segment train small_data", "give either weights=FILE or from_scratch=true"),
        ("segment train small_data weights=w from_scratch=true", "give either weights=FILE or from_scratch=true"),
        ("segment train weights=w", "name a recipe, such as small_data"),
        ("segment train small_data weights=w device=gpu", "device=gpu is not known; write auto, cpu or cuda"),
        pytest.param(
            "segment train small_data weights=w device=cuda",
            "device=cuda was asked for, but torch sees no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        ("segment evaluate small_data", "weights=RUN"),
        ("segment train small_data weights=w precision=fp8", "write auto, bf16 or fp32"),
        ("config keys pretrian", "did you mean 'pretrain'"),
        ("config keys pretrain nothing_like_it", "no option of mae pretrain contains 'nothing_like_it'"),
        ("config show tiny_96", "is a recipe of pretrain and of finetune; write pretrain/tiny_96"),
        (
            "config show pretrain/tiny_69",
            "there is no file pretrain/tiny_69; as a recipe's name: did you mean 'pretrain/tiny_96'",
        ),
        ("config show {own}", "is for: --for pretrain or finetune"),
        ("config show nothing.py", "there is no file nothing.py"),
        ("config recipes detecton", "did you mean 'detection'"),
    ],
)
def test_a_wrong_word_is_answered_with_the_right_one(typed, told, tmp_path):
    (tmp_path / "own.yaml").write_text("{}")
    result = run(*typed.format(own=tmp_path / "own.yaml").split())
    assert result.exit_code == 2
    assert told in " ".join(result.stderr.replace("│", " ").split())


@pytest.mark.parametrize(
    "main, typed, told",
    [
        (detection.main, "--weights x", "--weights is written weights=FILE here"),
        (detection.main, "small_data weights=x", "a recipe is given by --config-file small_data"),
        (segmentation.main, "small_data weights=x", "weights is written --weights FILE here"),
        (segmentation.main, "small_data --config-file x", "--config-file is written RECIPE or FILE.py here"),
        (segmentation.main, "small_dta", "did you mean 'small_data'"),
        (segmentation.main, "small_data --resume=never", "write --resume, or --resume auto"),
        (detection.main, "--resume=never", "write --resume, or --resume auto"),
        (detection.main, "--eval-only --dry-run weights=x", "--eval-only and --dry-run exclude each other"),
    ],
)
def test_a_script_answers_the_words_of_mae(main, typed, told, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(typed.split())
    assert stopped.value.code == 2 and told in capsys.readouterr().err


def test_configurations_are_shown():
    assert run("--version").stdout == f"mae-transfer {mae_core.__version__}\n"
    shown = run("config", "show", "pretrain/tiny_96", "optim.epochs=7").stdout
    assert any(line.split() == ["optim.epochs:", "7", "#", "command", "line"] for line in shown.splitlines())
    assert "weights: FILE" in run("config", "show", "detection/small_data").stdout
    assert "data_root" in run("config", "show", "segmentation/own_data").stdout
    rows = {row["key"]: row for row in json.loads(run("config", "keys", "pretrain", "--json").stdout)}
    assert rows["optim.epochs"]["default"] == "800" and rows["optim.epochs"]["paper"] == "1600"
    assert "masking.ratio=0.75" in run("config", "keys", "pretrain", "masking").stdout
    assert json.loads(run("config", "schema", "detect").stdout)["title"] == "DetectionConfig"
    assert "detection/small_data: " in run("config", "recipes", "detection").stdout
