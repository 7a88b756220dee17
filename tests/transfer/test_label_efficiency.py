"""The benchmark of few labels is a comparison: its arms as encoders and tasks, and its table and curve."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from mae_core.errors import UserError
from transfer.compare.encoders import check_files, encoders_of
from transfer.compare.trainings import Task

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("label_efficiency", BENCHMARKS / "label_efficiency.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def configured(benchmark, monkeypatch):
    """(words) -> the comparison of a command line."""

    def configure(*words: str):
        found: list[argparse.Namespace] = []
        monkeypatch.setattr(benchmark, "label_efficiency", lambda given, command: found.append(given))
        benchmark.main([*map(str, words)])
        return benchmark.configuration(found[0])

    return configure


def test_the_grid_is_read_and_refused(benchmark):
    assert benchmark.grid_of(["decay=0.75,1", "rate=2,1"]) == {"rate": [1, 2], "decay": [1, 0.75]}
    assert benchmark.grid_of(["rate=2"]) == {"rate": [2], "decay": [1]}
    for word in ("rates=1", "rate=", "decay=-1", "rate"):
        with pytest.raises(UserError, match=r"cannot be read; write rate=0.5,1,2 and decay=1,0.75"):
            benchmark.grid_of([word])


def test_arms_are_encoders_and_tasks_whose_commands_parse(configured, write_classes, tmp_path, pretrained):
    data = write_classes(tmp_path / "classes", train=8, val=2)
    words = ["classification", "--data", data, "--unlabelled", data / "train", "--warm-from", pretrained]
    options = ["model.size=nano", "model.patch_size=8", "data.image_size=32", "data.workers=0", "optim.batch_size=4"]
    config = configured(*words, "--arms", *"scratch pretrained warm frozen linear knn".split(), "--options", *options)
    assert [encoder.name for encoder in config.encoders] == ["scratch", "pretrained", "warm"]
    commands = {encoder.name: encoder.command for encoder in config.encoders}
    assert commands["pretrained"].startswith("mae pretrain tiny_96 data.path=") and commands["scratch"] is None
    assert commands["warm"].startswith("mae pretrain continue ") and f"weights={pretrained}" in commands["warm"]
    check_files(config)
    kinds = {task.title: (task.kind, task.encoders) for task in config.tasks}
    assert kinds["warm"] == ("finetune", ("warm",)) and kinds["frozen"] == ("attentive", ("pretrained",))
    assert kinds["linear"] == ("linprobe", ("pretrained",)) and kinds["knn"] == ("knn", ("pretrained",))
    assert config.labels == (0.05, 0.1, 0.25, 1.0)
    for task in (Task(spec, config) for spec in config.tasks):
        assert task.kind.trains == (task.spec.kind == "knn") ^ True and "data.image_size=32" in task.spec.options
        task.validate([] if task.kind.frozen else encoders_of(config)["scratch"].words(task.kind))


def test_a_frozen_trunk_of_detection_has_no_decay(configured, detection_root, pretrained):
    words = ["--data", detection_root, "--encoder", f"pretrained={pretrained}", "--arms", "pretrained", "frozen"]
    config = configured("detection", *words)
    assert len(config.encoders) == 1 and config.tasks[1].options == ("model.trainable_blocks=0",)
    assert [len(Task(spec, config).grid()) for spec in config.tasks] == [9, 3]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--arms", "pretrained"],
            "arm pretrained needs --unlabelled IMAGES to pre-train on, or --encoder p",
        ),
        (["--arms", "warm", "--unlabelled", "x"], "arm warm needs --warm-from FILE"),
        (["--encoder", "scratch=x"], "--encoder scratch=x is not ARM=FILE"),
        (["--fractions", "2"], "--fractions 2 is no share of the labels"),
        (["--arms", "knn"], "arm knn is for classification"),
    ],
)
def test_what_cannot_be_asked(configured, words, message):
    with pytest.raises(UserError, match=message):
        configured("detection", "--data", "x", *words)


def test_the_table_and_the_curve_show_every_arm(benchmark, configured, tmp_path):
    config = configured("classification", "--data", "x", "--arms", "scratch", "--seeds", "2")
    results = [
        {"share": share, "task": arm, "labels": int(24 * share), "choice": {"rate": 2.0}, "scores": scores, "grid": []}
        for share in (1.0, 0.5)
        for arm, scores in (("pretrained", [50.0, 52.0]), ("scratch", [40.0, 41.0]))
    ]
    records = benchmark.records_of(results)
    assert [(record["labels"], record["arm"]) for record in records[:2]] == [(12, "scratch"), (12, "pretrained")]
    facts = {"commit": "abc", "processor": "a CPU", "gpu": "a GPU", "threads": "1", "torch": "2"}
    table = benchmark.write_results(config, records, facts, "classification", tmp_path, "command")
    assert "Commit abc; a GPU, 1 trainings at once, 1 thread; torch 2." in table.read_text()
    assert "| 12 (50%) | pretrained | **51.0** | 1.4 | 50.0, 52.0 | +10.5 | 2.0 | 2 | 1 |" in table.read_text()
    assert json.loads(table.with_suffix(".json").read_text())["results"] == records
    assert min(Image.open(table.with_suffix(".png")).size) > 300
