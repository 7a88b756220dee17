"""--dry-run of pre-training and classifiers: its numbers against numbers worked out here; it leaves nothing behind."""

import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mae_core.cli.main import app
from mae_core.config.load import load_config
from mae_core.data.images import statistics_of
from mae_core.errors import UserError
from mae_core.models.sizes import SIZES
from mae_core.training.classification_plan import print_finetune_plan
from mae_core.training.finetune_config import FinetuneConfig
from mae_core.training.loop import FitSettings
from mae_core.training.memory import LIMITS, available_memory, fixed_bytes
from mae_core.training.plan import (
    Speed,
    batch_line,
    cost_of,
    differences_from_paper,
    plan,
    print_plan,
    time_lines,
)
from mae_core.training.pretrain import build_pretrain_model
from mae_core.training.pretrain_config import PretrainConfig

CONFIGS = Path(__file__).parents[2] / "configs" / "pretrain"


def configured(options, *more) -> PretrainConfig:
    return load_config(PretrainConfig, None, [*options, *more])


def block_flops(tokens: int, width: int, asking: int | None = None) -> int:
    """Forward: keys and values of all tokens; of those that ask two projections, two matrix products of attention, and
    an MLP of ratio 4."""
    asking = tokens if asking is None else asking
    return 2 * width * width * (2 * tokens + 10 * asking) + 2 * 2 * asking * tokens * width


@pytest.mark.extra("fvcore")
@pytest.mark.parametrize("mask_tokens", [False, True])
def test_flops_are_those_of_the_matrix_products(pretrain_options, mask_tokens):
    config = configured(pretrain_options, f"masking.mask_tokens_in_encoder={mask_tokens}")
    size = SIZES["nano"]
    seen = 17 if mask_tokens else 5  # 16 patches, four visible, and the cls token
    embedded = 16 if mask_tokens else 4
    encoder = 2 * embedded * size.width * 192 + size.depth * block_flops(seen, size.width)
    decoder = 2 * seen * size.width * 32 + block_flops(17, 32, asking=12) + 2 * 12 * 32 * 192
    cost = cost_of(build_pretrain_model(config), config, torch.float32)
    assert cost.forward == pytest.approx(encoder + decoder, rel=0.01)
    assert cost.total == pytest.approx(3 * cost.forward, rel=0.05)


def test_memory_grows_with_the_images_at_once_and_counts_the_optimizer(pretrain_options):
    config = configured(pretrain_options)
    model = build_pretrain_model(config)
    cost = cost_of(model, config, torch.float32)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert fixed_bytes(model) == trained * 16 + frozen * 4
    tokens = 5 * SIZES["nano"].depth * SIZES["nano"].width * 4
    assert cost.kept > 10 * tokens  # at least ten activations of each block
    half = cost_of(model, config, torch.bfloat16).kept
    assert half < 0.9 * cost.kept


def test_the_plan_is_the_papers_arithmetic():
    config = load_config(PretrainConfig, CONFIGS / "table1" / "baseline.yaml", ["model.size=tiny", "decoder.depth=1"])
    settings = FitSettings.of(config.optim, 1_281_167)
    lines = "\n".join(plan(config, build_pretrain_model(config), settings, 1_281_167, 8))
    assert "batch: 4096 images per step: 8 devices x 512\n" in lines
    assert "0.00015 x 4096 / 256 = 0.0024" in lines and "warm-up 12511 steps" in lines
    assert "steps: 250228 = 800 epochs of 312.785 steps; 249600 where the end of an epoch is dropped" in lines
    assert "196 patches, 147 masked and 49 visible (random, 0.75); the encoder runs on 49 + 1" in lines
    small = load_config(PretrainConfig, None, ["optim.micro_batch=100", "model.size=nano", "decoder.depth=1"])
    line = plan(small, build_pretrain_model(small), settings, 10, 8)[0]
    assert line == "batch: 4096 images per step: 8 devices x 512, in 6 micro-batches of at most 100"
    text = "\n".join(plan(small, build_pretrain_model(small), settings, 10, 8))
    assert "optim.batch_size=4096 is more than the 10 images" in text and "set optim.batch_size=10 or less" in text
    even = load_config(PretrainConfig, None, ["optim.batch_size=512", "optim.micro_batch=256"])
    assert batch_line(even.optim, 1) == "batch: 512 images per step: 1 device x 512, in 2 micro-batches of 256"


@pytest.mark.parametrize(
    "name, different",
    [
        ("base", []),
        ("huge_800", []),
        ("table1/baseline", []),
        ("table1/a_depth_2", ["decoder.depth: 8 -> 2"]),
        ("table1/f_block_50", ["masking.kind: random -> block", "masking.ratio: 0.75 -> 0.5"]),
    ],
)
def test_what_differs_from_the_paper_is_named(name, different):
    found = differences_from_paper(load_config(PretrainConfig, CONFIGS / f"{name}.yaml", ["data.path=x", "seed=3"]))
    assert [line.strip() for line in found[1:]] == different
    assert found[0] == ("differs from the paper's recipe:" if different else "this is the paper's recipe")


def test_a_size_that_is_not_the_papers_is_named():
    found = differences_from_paper(load_config(PretrainConfig, CONFIGS / "tiny_96.yaml"))
    assert "  model.size: base, large, huge -> tiny" in found and "  model.patch_size: None -> 12" in found


@pytest.mark.extra("fvcore")
def test_a_dry_run_says_all_and_writes_nothing(pretrain_options, tmp_path, write_images, monkeypatch):
    write_images(tmp_path / "images", 9)
    monkeypatch.chdir(tmp_path)
    arguments = [*pretrain_options, f"data.path={tmp_path / 'images'}", "output=run", "optim.micro_batch=3"]
    result = CliRunner().invoke(app, ["pretrain", *arguments, "--dry-run"])
    assert result.exit_code == 0, result.output
    for word in (
        "batch: 4",
        "in 2 micro-batches",
        "learning rate",
        "steps",
        "12 masked and 4 visible",
        "parameters: ",
        "FLOPs",
    ):
        assert word in result.output
    for word in ("encoder.blocks", "memory, estimated", "s per step", "for the run", "differs from the paper's recipe"):
        assert word in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images"]


def test_a_run_that_does_not_fit_is_not_started(pretrain_options, tmp_path, write_images, monkeypatch):
    write_images(tmp_path, 3)
    monkeypatch.setattr("mae_core.training.plan.available_memory", lambda device: 1000)
    said: list[str] = []
    monkeypatch.setattr("builtins.print", lambda *words, **_: said.append(" ".join(map(str, words))))
    print_plan(configured(pretrain_options, f"data.path={tmp_path}"))
    assert any("time: not measured" in line for line in said)


CLASSIFIED = (
    "device=cpu",
    "data.workers=0",
    "optim.warmup_epochs=0",
    "evaluation_batch=5",
    "optim.batch_size=6",
    "data.image_size=32",
)


@pytest.mark.parametrize(
    "command, options, expected",
    [
        (
            "classify train",
            ["optim.epochs=4", "evaluate_every=2", "ema=null"],
            ["per block x 0.65", "steps: 8 = 4 epochs of 2 steps", "in 2 evaluations of 9 images; without checkpoints"],
        ),
        ("finetune", ["optim.epochs=4", "data.mixup=0.8"], ["in 1 evaluation of 9 images"]),
        (
            "linprobe",
            ["optim.epochs=30", "optim.sweep=[0.3]"],
            ["LARS, momentum 0.9, 2 rates in the same pass", "steps: 60", "parameters: 774 learn", "in 3 evaluations"],
        ),
        ("linprobe", ["optim.epochs=2", "cache=kept"], ["for the features of 21 images, computed once"]),
        ("linprobe", ["optim.epochs=2", "cache=kept", "probe.kind=attentive"], ["for the features of 21 images"]),
    ],
)
def test_a_classifiers_dry_run_says_all_and_writes_nothing(
    tmp_path, write_classes, pretrained, monkeypatch, command, options, expected
):
    write_classes(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    given = [*CLASSIFIED, f"weights={pretrained}", "data.path=data", "output=run", *options]
    result = CliRunner().invoke(app, [*command.split(), *given, "--dry-run"])
    assert result.exit_code == 0, result.output
    for text in (
        "data: 12 training and 9 validation images of 3 classes, 4 training images each",
        "classes: ash, birch, cedar\n",
        "batch: 6 images per step: 1 device x 6",
        "memory, estimated",
        "for the run",
        "dry run: nothing was written",
        *expected,
    ):
        assert text in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def test_a_classifiers_flops_are_those_of_the_matrix_products(tmp_path, write_classes, pretrained, capsys):
    options = [*CLASSIFIED, f"weights={pretrained}", f"data.path={write_classes(tmp_path)}"]
    print_finetune_plan(load_config(FinetuneConfig, None, options))
    forward = float(re.search(r"\(([0-9.e+]+) forward\)", capsys.readouterr().out)[1])
    size = SIZES["nano"]
    expected = 2 * 16 * size.width * 192 + size.depth * block_flops(17, size.width)
    assert forward == pytest.approx(expected, rel=0.01)


def test_the_time_of_a_run_is_its_steps_and_what_is_beside_them():
    speed = Speed(reading=0.2, computing=0.3, at_once=4)
    line, rates = time_lines(speed, 0, 10, 6, 1, {"in 2 evaluations of 9 images": 12.0})
    assert "5 s per step, 0:42 for the run, 0:12 of it in 2 evaluations of 9 images; without checkpoints" in line
    assert rates == "  computing 3.333 images/s per device, reading 5 per process"
    line, _ = time_lines(speed, 2, 10, 6, 1)  # two processes read faster than the device computes
    assert "3 s per step, 0:18 for the run; without pictures, checkpoints and measurements" in line
    *_, advice = time_lines(speed._replace(reading=0.9), 2, 10, 6, 1)
    assert advice == "  reading with 2 workers is the bottleneck; raise data.workers"
    assert "reading" not in time_lines(speed._replace(reading=0.0), 0, 10, 6, 1)[1]


def test_it_refuses_what_the_run_would_refuse(pretrain_options, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        print_plan(configured(pretrain_options, f"data.path={tmp_path / 'none'}"))
    with pytest.raises(UserError, match="no default mean for 5 channels; run mae data-stats"):
        statistics_of(configured(pretrain_options, "data.channels=5").data)


@pytest.mark.parametrize("command", ["pretrain", "classify train", "linprobe"])
def test_it_says_whether_the_output_folder_is_taken(
    pretrain_options, tmp_path, write_classes, pretrained, monkeypatch, command
):
    write_classes(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    options = pretrain_options if command == "pretrain" else [*CLASSIFIED, f"weights={pretrained}"]
    given = [*command.split(), *options, "data.path=data", "output=run", "optim.epochs=1", "--dry-run"]

    def note(*more: str) -> str:
        result = CliRunner().invoke(app, [*given, *more])
        assert result.exit_code == 0 and "dry run: nothing was written" in result.output, result.output
        return next((line for line in result.output.splitlines() if line.startswith("note: ")), "")

    assert not note() and "nothing to resume" in note("--resume")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").touch()
    assert "output folder run already holds a run (log.jsonl)" in note()
    assert not note("--resume", "auto") and [path.name for path in (tmp_path / "run").iterdir()] == ["log.jsonl"]


def test_memory_that_only_caches_files_is_available(tmp_path, monkeypatch):
    table = tmp_path / "meminfo"
    table.write_text("MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable:    7000 kB\n", encoding="ascii")
    monkeypatch.setattr("mae_core.training.memory.SYSTEM_MEMORY", table)
    assert available_memory(torch.device("cpu")) == 7000 * 1024
    table.unlink()
    assert available_memory(torch.device("cpu")) > 0


@pytest.mark.parametrize("version", [0, 1])
def test_a_containers_limit_bounds_the_memory_that_is_available(tmp_path, monkeypatch, version):
    monkeypatch.setattr("mae_core.training.memory.CONTAINER", tmp_path)
    limit, used, details, caches = LIMITS[version]
    (tmp_path / "memory").mkdir()
    for name, content in ((limit, "9000\n"), (used, "5000\n"), (details, f"anon 1\n{caches} 1000\n")):
        (tmp_path / name).write_text(content)
    assert available_memory(torch.device("cpu")) == 5000
    (tmp_path / limit).write_text("max\n")
    assert available_memory(torch.device("cpu")) > 9000
