"""Two ranks compute what one computes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mae_core.config.load import load_config
from mae_core.errors import UserError
from mae_core.training.distributed import meet
from mae_core.training.finetune_config import FinetuneConfig
from mae_core.training.loop import over_ranks
from mae_core.training.pretrain import pretrain
from mae_core.training.pretrain_config import PretrainConfig
from mae_core.weights.files import read_weights

pytestmark = pytest.mark.slow
MAE = ["-m", "mae_core.cli.main"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def losses_of(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory, write_images, pretrain_options) -> tuple[Path, list[str]]:
    """A run of twenty steps on one rank, and its options."""
    root = tmp_path_factory.mktemp("ranks")
    write_images(root / "images", 11)
    options = [*pretrain_options, f"data.path={root / 'images'}", "optim.epochs=7.2", "optim.warmup_epochs=1"]
    options += ["optim.base_lr=0.01", "optim.clip_grad=1.0"]
    pretrain(load_config(PretrainConfig, None, [*options, f"output={root / 'one'}"]))
    assert len(losses_of(root / "one")) == 20
    return root / "one", options


def assert_same_run(run: Path, expected: Path) -> None:
    assert losses_of(run) == pytest.approx(losses_of(expected), rel=1e-5)
    weights, wanted = (read_weights(path / "encoder.safetensors")[0] for path in (run, expected))
    for name, tensor in wanted.items():
        # Adam turns rounding of a gradient near zero into a step of up to lr: single weights may differ by more.
        assert (weights[name] - tensor).abs().mean() < 1e-6, name


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks_compute_the_losses_of_one_and_go_on_as_one_and_as_four(
    tmp_path, one_rank, run_python, run_forked, kind
):
    expected, options = one_rank
    run, options = tmp_path / "two", [*options, "log.checkpoint_every=16"]
    command = [*MAE, "pretrain", *options, f"distributed={kind}"]
    started = run_python([*TORCHRUN, *command, f"output={run}"]) if kind == "ddp" else None
    result = started or run_forked([*command, f"output={run}"], ranks=2)
    assert result.returncode == 0, result.stderr
    assert_same_run(run, expected)
    assert losses_of(run) == pytest.approx(losses_of(expected), rel=1e-6)
    assert result.stdout.count("step 20/20") == 1, "only one rank talks"
    shutil.rmtree(run / "checkpoints" / "step_00000020")  # saved on two ranks, in shards or not
    (run / "encoder.safetensors").unlink()
    shutil.copytree(run, tmp_path / "four")
    pretrain(load_config(PretrainConfig, None, [*options, f"output={run}"]), resume=True)
    result = run_forked([*command, f"output={tmp_path / 'four'}", "--resume"], ranks=4)
    assert result.returncode == 0, result.stderr
    assert "after step 16" in result.stdout
    for resumed in (run, tmp_path / "four"):
        assert_same_run(resumed, expected)


class WithSpare(torch.nn.Module):
    """A part of it is used by no loss."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.used(x).sum()}


def wrapped_by_mmengine(model: torch.nn.Module) -> torch.nn.Module:
    runner = pytest.importorskip("transfer.segmentation.engine_mmseg.runner")
    return runner.SegmentationRunner.wrap_model(SimpleNamespace(distributed=True), None, model)


@pytest.mark.parametrize(
    "wrap", [lambda model: over_ranks(model, SimpleNamespace(world=2)), wrapped_by_mmengine], ids=["core", "mmengine"]
)
def test_parameters_that_no_loss_uses_are_refused_before_any_gradient(tmp_path, wrap):
    with meet("gloo", 0, 1, f"file://{tmp_path / 'meeting'}"):
        model = WithSpare()
        parallel = wrap(model)
        with pytest.raises(UserError, match=r"2 tensors of the model .* such as spare.bias; .*requires_grad=False"):
            parallel(torch.ones(1, 2))
        assert model.used.weight.grad is None
        model = WithSpare()
        model.spare.requires_grad_(False)
        parallel = wrap(model)
        for _ in range(2):
            parallel(torch.ones(1, 2))["loss"].backward()
        assert not torch.equal(model.used.weight.grad, torch.zeros(1, 2))


@pytest.mark.parametrize("option", ["ema=0.9", "trainable_blocks=1"])
def test_what_cannot_be_sharded_is_refused(option):
    with pytest.raises(UserError, match="leave ema and trainable_blocks out"):
        load_config(FinetuneConfig, None, ["weights=x", "data.path=x", "distributed=fsdp", option])


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_accumulation_computes_the_losses_of_whole_batches(tmp_path, one_rank, micro_batch):
    expected, options = one_rank
    options = [*options, f"output={tmp_path / 'run'}", f"optim.micro_batch={micro_batch}"]
    pretrain(load_config(PretrainConfig, None, options))
    assert_same_run(tmp_path / "run", expected)


def test_a_batch_that_does_not_divide_is_refused_before_anything_is_written(tmp_path, one_rank, monkeypatch):
    """As the two ranks of a torchrun would, without starting them."""
    from mae_core.errors import UserError

    monkeypatch.setenv("WORLD_SIZE", "2")
    options = [*one_rank[1], f"output={tmp_path / 'run'}", "optim.batch_size=5"]
    with pytest.raises(UserError, match="batch size 5 does not divide among 2 ranks"):
        pretrain(load_config(PretrainConfig, None, options))
    assert not (tmp_path / "run").exists()
    assert not torch.distributed.is_initialized()


def test_two_ranks_count_every_validation_image_once(tmp_path, write_classes, run_forked):
    data = write_classes(tmp_path / "data", train=3, val=3)  # 9 validation images: no rank gets half of them
    options = ["from_scratch=true", "model.size=nano", "model.patch_size=16", "data.image_size=32", "data.workers=0"]
    options += ["optim.epochs=1", "optim.warmup_epochs=0", "optim.batch_size=4", "device=cpu", "evaluation_batch=2"]
    result = run_forked([*MAE, "finetune", *options, f"data.path={data}", f"output={tmp_path / 'run'}"], ranks=2)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["images"] == 9


PROBE = """
import sys
from mae_core.config.load import load_config
from mae_core.training.frozen_config import LinprobeConfig
from mae_core.training import distributed, linprobe
measure = linprobe.measure_heads
def watched(probe, *others):
    means = distributed.gather(probe.norm.running_mean.tolist())
    assert len(means) == 2 and means[0] == means[1] and any(means[0]), means
    return measure(probe, *others)
linprobe.measure_heads = watched
assert linprobe.linprobe(load_config(LinprobeConfig, None, sys.argv[1:]))["images"] == 9
"""


def test_two_ranks_measure_one_probe(tmp_path, write_classes, pretrained, run_forked):
    """Batch norm sees other images on each rank; what is measured has the statistics of what is saved."""
    options = [f"weights={pretrained}", f"data.path={write_classes(tmp_path / 'data')}", "data.workers=0", "device=cpu"]
    options += ["optim.epochs=1", "optim.batch_size=4", "optim.warmup_epochs=0", f"output={tmp_path / 'run'}"]
    result = run_forked(["-c", PROBE, *options], ranks=2)
    assert result.returncode == 0, result.stderr


def test_unreadable_images_of_every_rank_are_named_and_counted(tmp_path, write_images, pretrain_options, run_forked):
    paths = write_images(tmp_path / "images", 8)
    for path in paths[1::2]:
        path.write_bytes(b"broken")
    options = [*pretrain_options, f"data.path={tmp_path / 'images'}", f"output={tmp_path / 'run'}", "optim.epochs=1"]
    result = run_forked([*MAE, "pretrain", *options], ranks=2)
    assert result.returncode == 0, result.stderr
    assert "4 unreadable images were skipped" in result.stdout
    entries = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    named = sorted(entry["path"] for entry in entries if entry.get("event") == "unreadable")
    assert named == [str(path) for path in paths[1::2]]
