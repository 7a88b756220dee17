"""The Table 1 benchmark: its rows are the row files, scaled; what is done stays done; other settings are refused."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from mae_core.config.load import load_config
from mae_core.errors import UserError
from mae_core.training.checkpoints import save_checkpoint
from mae_core.training.pretrain_config import PretrainConfig

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


def test_what_is_done_is_left_and_what_was_stopped_goes_on(bench):
    done, stopped, torn = (bench.run_of("pretrain", name) for name in ("baseline", "a_depth_1", "a_depth_2"))
    for folder in (done, torn):
        folder.mkdir(parents=True)
    (done / "encoder.safetensors").write_bytes(b"x")
    (torn / "config.yaml").write_text("")

    save_checkpoint(stopped, 3, {"x": torch.zeros(1)}, {}, {}, keep=1)
    jobs = bench.jobs("pretrain", ["baseline", "a_depth_1", "a_depth_2", "a_depth_4"])
    left = [job.remaining() for job in jobs]
    assert left[0] is None and left[1] == [*jobs[1].command, "--resume"]
    assert left[2:] == [job.command for job in jobs[2:]]
    assert not torn.exists() and stopped.exists()


def test_only_rows_that_need_a_file_have_it_made(bench):
    assert [job.name for job in bench.preparations(["d_pca", "d_tokens"])] == ["fit pca", "train tokenizer"]
    assert bench.preparations(["baseline"]) == []


def test_a_folder_begun_with_another_budget_is_refused(bench, tmp_path):
    bench.claim(tmp_path)
    bench.claim(tmp_path)
    other = table1.Bench(bench.out, epochs=3, finetune_epochs=1, seed=0)
    with pytest.raises(UserError, match=r"epochs 2 then, 3 now"):
        other.claim(tmp_path)


def test_images_are_shrunk_once_and_the_unreadable_left_out(tmp_path, write_classes, capsys):

    root = write_classes(tmp_path / "classes")
    for path in root.rglob("*.png"):
        Image.open(path).resize((200, 120)).save(path)
    broken = next((root / "train").rglob("*.png"))
    broken.write_bytes(b"broken")
    table1.shrink(root, tmp_path / "small")
    found = sorted((tmp_path / "small").rglob("*.png"))
    assert len(found) == len(list(root.rglob("*.png"))) - 1 and str(broken) in capsys.readouterr().out
    assert {Image.open(path).size for path in found} == {(160, 96)}
    found[0].unlink()
    table1.shrink(root, tmp_path / "small")
    assert not found[0].exists()


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
