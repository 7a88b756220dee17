"""The Table 1 benchmark: its rows are the row files, scaled, and encoders of a comparison."""

import importlib.util
import json
from pathlib import Path

import pytest

from mae_core.config.load import load_config
from mae_core.training.pretrain_config import PretrainConfig
from transfer.compare.encoders import check_files
from transfer.compare.trainings import Choice, Task

ROOT = Path(__file__).parents[1]


def load_script():
    spec = importlib.util.spec_from_file_location("table1", ROOT / "benchmarks" / "table1.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


table1 = load_script()


@pytest.fixture
def bench(tmp_path):
    return table1.Bench(tmp_path / "out", epochs=2, finetune_epochs=1, seed=0)


def test_every_row_file_is_in_the_table_with_the_numbers_it_names():
    files = {path.stem for path in table1.ROW_FILES.glob("*.yaml")}
    assert files == {row.name for row in table1.ROWS} and len(table1.ROWS) == 24
    for row in table1.ROWS:
        said = (table1.ROW_FILES / f"{row.name}.yaml").read_text().replace("\n# ", " ")
        assert f"Published: {row.finetuned:.1f} fine-tuned, {row.linear:.1f} linear" in said
        assert row.name == table1.BASELINE or f"Table {row.part}," in said


@pytest.mark.parametrize("row", table1.ROWS, ids=lambda row: f"{row.part}-{row.name}")
def test_a_row_runs_its_difference_at_the_benchmarks_scale(bench, row):
    file, *overrides = bench.options(row.name)
    config = load_config(PretrainConfig, ROOT / file, overrides)
    paper = load_config(PretrainConfig, table1.ROW_FILES / f"{row.name}.yaml")
    assert (config.model.size, config.data.image_size, config.optim.epochs) == ("nano", 48, 2)
    assert config.decoder.depth == paper.decoder.depth and config.decoder.width * 8 == paper.decoder.width
    assert (config.masking, config.target.kind) == (paper.masking, paper.target.kind)
    assert config.data.augmentation == paper.data.augmentation
    assert config.data.color_jitter == paper.data.color_jitter
    assert config.target.tokenizer_image_size is None


def test_what_comes_first_is_made_once(bench, tmp_path):
    (bench.data / "val").mkdir(parents=True)
    jobs = bench.preparations(["d_pca", "d_tokens"], tmp_path / "images")
    assert [job.name for job in jobs] == ["shrink train", "fit pca", "train tokenizer"]
    assert jobs[0].command[2:4] == [str(tmp_path / "images" / "train"), str(bench.data / "train")]
    (bench.data / "train").mkdir()
    assert bench.preparations(["baseline"], tmp_path / "images") == []


def test_rows_are_encoders_of_a_comparison(bench, write_classes):
    write_classes(bench.data, train=8)
    config = bench.configuration(["baseline", "f_grid_75"])
    assert [encoder.name for encoder in config.encoders] == ["baseline", "f_grid_75"]
    assert "masking.kind=grid" in config.encoders[1].command and "output=" not in config.encoders[1].command
    check_files(config)
    assert [(task.kind, Task(task, config).grid()) for task in config.tasks] == [
        *(("knn", (Choice(),)), ("finetune", (Choice(1.0, 0.75),)))
    ]
    assert config.steps == 1  # an epoch of 24 images in batches of 64


def test_the_table_says_how_it_came_about():
    measured = {"finetuned": 55.5, "knn": 44.4, "flops": 1.0}
    found = {
        "rows": [{**table1.ROWS[3]._asdict(), "measured": measured}],
        "images": 500,
        "standard_error": 2.2,
        "epochs": 20,
        "finetune_epochs": 8,
        "command": "python benchmarks/table1.py x y",
        "commit": "abc",
        "machine": {"processor": "P", "torch": "2", "timm": "1"},
    }
    text = table1.markdown(json.loads(json.dumps(found)))
    assert "| 1a | **8 blocks** | 84.9 | 55.5 | 73.5 | 44.4 | 1.00x |" in text
    assert "commit abc, on P" in text and "standard error of up to 2.2 points" in text
