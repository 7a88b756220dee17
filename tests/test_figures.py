"""The paper's figures as sweeps: their comparisons, the points of a report, and what is drawn and written."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from transfer.compare.config import CompareConfig
from transfer.compare.encoders import check_files, encoders_of
from transfer.compare.trainings import Choice, Task

FILE = Path(__file__).parents[1] / "benchmarks" / "figures.py"


@pytest.fixture(scope="module")
def figures() -> ModuleType:
    spec = importlib.util.spec_from_file_location("figures", FILE)
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["figures"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["figures"]


@pytest.fixture
def asked(figures, monkeypatch, tmp_path, write_classes):
    """(words of the command line) -> the comparison it runs, in place of running it."""

    def ask(*words: str) -> CompareConfig:
        found: list[CompareConfig] = []

        def stop(config: CompareConfig, **more: Any) -> None:
            found.append(config)
            raise StopIteration

        monkeypatch.setattr(figures, "compare", stop)
        data = write_classes(tmp_path / "classes")
        with pytest.raises(StopIteration):
            figures.main([words[0], "--data", str(data), "--out", str(tmp_path / "out"), *map(str, words[1:])])
        return found[0]

    return ask


def commands_of(config: CompareConfig) -> list[list[str]]:
    """Of every final training of the first seed; all of them, and those of the encoders, validate."""
    check_files(config)
    found = []
    for task in (Task(spec, config) for spec in config.tasks):
        assert len(task.grid()) == 1, "a sweep has no grid"
        for encoder in encoders_of(config).values():
            if not task.spec.encoders or encoder.name in task.spec.encoders:
                training = task.training(encoder, 1.0, 0, task.grid()[0], held_out=False)
                found.append(list(training.words))
    return found


@pytest.mark.parametrize(
    ("number", "option", "encoders"),
    [
        ("5", "masking.ratio=0.9", ["10", "25", "50", "75", "90"]),
        ("7", "optim.epochs=20", ["2", "5", "10", "20"]),
        ("8", "model.size=tiny", ["nano", "tiny", "nano from scratch", "tiny from scratch"]),
    ],
)
def test_what_varies_is_the_pre_training(asked, number, option, encoders):
    config = asked(number)
    assert [encoder.name for encoder in config.encoders] == encoders
    made = [encoder.command.split() for encoder in config.encoders if encoder.command]
    assert option in made[-1] and all(option not in words for words in made[:-1])
    assert len(commands_of(config)) == len(encoders) * len(config.tasks)


def test_figure_9_tunes_one_encoder(asked, pretrained, figures, capsys):
    config = asked("9", "--encoder", pretrained)
    assert [task.title for task in config.tasks] == ["linear probe", "0.5", "1", "2", "4", "6"]
    assert [w for words in commands_of(config) for w in words if w.startswith("trainable")] == [
        f"trainable_blocks={count}" for count in ("0.5", "1", "2", "4", "6")
    ]
    assert Task(config.tasks[1], config).grid() == (Choice(1.0, 0.75),)
    with pytest.raises(SystemExit):
        figures.main(["9", "--data", "x"])
    assert "Figure 9 tunes one encoder: give --encoder FILE" in capsys.readouterr().err


RESULTS = {
    "5": [("10", "fine-tuned"), ("75", "fine-tuned"), ("10", "linear probe"), ("75", "linear probe")],
    "7": [("2", "fine-tuned"), ("20", "fine-tuned"), ("2", "linear probe")],
    "8": [("nano", "fine-tuned"), ("tiny", "fine-tuned"), ("nano from scratch", "fine-tuned")],
    "9": [("MAE", "linear probe"), ("MAE", "0.5"), ("MAE", "4")],
}


@pytest.mark.parametrize("number", sorted(RESULTS))
def test_a_report_is_drawn_beside_the_paper(figures, number, tmp_path):
    names = dict.fromkeys(encoder for encoder, _ in RESULTS[number])
    report = {
        "encoders": [{"name": name, "parameters": 1_200_000 * (1 + ("tiny" in name))} for name in names],
        "results": [
            {"encoder": encoder, "task": task, "scores": [40.0 + place, 42.0 + place]}
            for place, (encoder, task) in enumerate(RESULTS[number])
        ],
        "environment": {"processor": "P", "threads": "1", "torch": "2", "commit": "abc"},
        **{"trainings": 3, "seconds": 120.0},
    }
    (tmp_path / "report.json").write_text(json.dumps(report))
    figures.main([number, "--report", str(tmp_path / "report.json"), "--results", str(tmp_path)])
    picture = tmp_path / f"figure_{number}.png"
    assert Image.open(picture).size[0] > 2 * Image.open(picture).size[1]
    text = picture.with_suffix(".md").read_text()
    assert "41.0 ± 1.0" in text and "at commit abc; P" in text
    published = {"5": "| 90 | ", "7": "| 1600 | ", "8": "86.9", "9": "| 24 | "}[number]
    assert published in text and json.loads(picture.with_suffix(".json").read_text())["results"] == report["results"]
    if number == "9":
        assert "| 0 | 41.0 ± 1.0 | 73.5 | 77.6 |" in text and "MoCo v3, paper" in text
