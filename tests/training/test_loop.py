"""The loop on a toy model: what is computed does not depend on how it is cut up, and a bad loss is survived."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mae_core.config.load import load_config
from mae_core.config.sections import OptimConfig
from mae_core.errors import UserError
from mae_core.training.loop import FitSettings, Hook, cosine_schedule, fit, step_schedule
from mae_core.training.pretrain_config import PretrainConfig
from mae_core.training.progress import Progress
from mae_core.training.run import Run, open_run


@dataclass
class Numbers:
    """A batch of numbers."""

    values: Tensor
    unreadable: list = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.values)

    def to(self, device: torch.device) -> Numbers:
        return Numbers(self.values.to(device))

    def split(self, size: int) -> list[Numbers]:
        return [Numbers(part) for part in self.values.split(size)]


def squares(model: nn.Module, batch: Numbers) -> dict[str, Tensor]:
    return {"loss": model(batch.values[:, None]).square().mean(), "largest": batch.values.max()}


def run_in(folder: Path, *options: str) -> Run:
    return open_run(
        load_config(PretrainConfig, None, [f"output={folder}", "device=cpu", "log.every=1", *options]), resume=False
    )


def toy(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(1, 2)


def train(run: Run, batches: list[Numbers], model: nn.Module | None = None, **settings) -> nn.Module:
    model = model or toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    options = {"total_steps": len(batches), "warmup_steps": 0, "lr": 0.1, **settings}
    fit(model, batches, squares, optimizer, run=run, settings=FitSettings(**options))
    return model


def losses(run: Run) -> list[float]:
    lines = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def batches_of(count: int, size: int) -> list[Numbers]:
    return list(map(Numbers, torch.randn(count, size, generator=torch.Generator().manual_seed(0))))


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 100])
def test_accumulation_changes_nothing(tmp_path, micro_batch):
    whole, parts = run_in(tmp_path / "whole"), run_in(tmp_path / "parts")
    one = train(whole, batches_of(5, 7))
    other = train(parts, batches_of(5, 7), micro_batch=micro_batch)
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=1e-5, atol=1e-7)
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)


def test_the_gradient_is_clipped_where_asked_for(tmp_path):
    def moved(name: str, **settings) -> float:
        model = toy()
        before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        train(run_in(tmp_path / name), [Numbers(torch.tensor([100.0]))], model, lr=1.0, **settings)
        return (nn.utils.parameters_to_vector(model.parameters()).detach() - before).norm().item()

    assert moved("clipped", clip_grad=0.5) == pytest.approx(0.5, rel=1e-3)
    assert moved("free") > 10


def test_warm_up_is_linear_from_0_and_decay_half_a_cosine():
    groups = [{"params": [nn.Parameter(torch.zeros(1))]}, {"params": [nn.Parameter(torch.zeros(1))], "lr_scale": 0.25}]
    optimizer = torch.optim.AdamW(groups)
    settings = FitSettings(total_steps=20, warmup_steps=5, lr=0.8, min_lr=0.1)
    schedule = cosine_schedule(optimizer, settings)
    rates = []
    for step in range(20):
        schedule.step_update(step)
        rates.append([group["lr"] for group in optimizer.param_groups])
    for step, (rate, scaled) in enumerate(rates):
        cosine = 0.1 + 0.7 * (1 + math.cos(math.pi * (step - 5) / 15)) / 2
        assert rate == pytest.approx(0.8 * step / 5 if step < 5 else cosine)
        assert scaled == pytest.approx(rate / 4)


def test_steps_of_the_rate_come_at_their_milestones_whatever_the_warm_up():
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)], "lr_scale": 0.5}], lr=1.0)
    schedule = step_schedule(optimizer, FitSettings(100, 10, lr=2.0, milestones=(0.8, 0.95)))
    rates = []
    for step in range(100):
        schedule.step_update(step)
        rates.append([group["lr"] for group in optimizer.param_groups])
    assert [rate[0] for rate in rates[::5]] == pytest.approx(
        [0.002, 0.002 + 1.998 / 2, *[2.0] * 14, *[0.2] * 3, 0.02], rel=1e-6
    )
    assert rates[79][0] == pytest.approx(2.0) and rates[94][0] == pytest.approx(0.2)
    assert all(half == pytest.approx(whole / 2) for whole, half in rates)


def test_settings_follow_the_scaling_rule_and_the_number_of_images():
    optim = OptimConfig(epochs=10, warmup_epochs=2, batch_size=64, base_lr=1e-3, betas=(0.9, 0.95))
    settings = FitSettings.of(optim, length=100)
    assert (settings.total_steps, settings.warmup_steps) == (16, 3)
    assert settings.lr == pytest.approx(2.5e-4)


def test_a_step_with_a_bad_loss_is_skipped_and_recorded(tmp_path):
    batches = batches_of(4, 3)
    clean = train(run_in(tmp_path / "clean"), [batches[0], batches[2]], total_steps=2, min_lr=0.1)
    run = run_in(tmp_path / "bad")
    spoiled = Numbers(torch.tensor([float("nan"), 1.0, 2.0]))
    dirty = train(run, [batches[0], spoiled, batches[2]], min_lr=0.1)
    torch.testing.assert_close(clean.state_dict(), dirty.state_dict())
    events = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in events if "non-finite" in entry.get("event", "")] == [2]


def test_a_row_of_bad_losses_ends_the_run(tmp_path):
    model = toy()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match="not finite for 10 steps in a row, up to step 10"):
        train(run_in(tmp_path / "run"), [Numbers(torch.tensor([float("inf")]))] * 30, model)
    torch.testing.assert_close(model.state_dict(), before)


def test_hooks_come_when_due_and_after_the_last_step(tmp_path):
    run, model = run_in(tmp_path / "run"), toy()
    seen: list[tuple[str, int, bool]] = []

    def third(step: int) -> None:
        seen.append(("third", step, model.training))
        model.eval()  # as an evaluation would leave it

    hooks = [Hook(3, third), Hook(100, lambda step: seen.append(("rare", step, model.training)))]
    settings = FitSettings(total_steps=7, warmup_steps=0, lr=0.1)
    fit(model, batches_of(7, 2), squares, torch.optim.SGD(model.parameters()), run=run, settings=settings, hooks=hooks)
    assert seen == [("third", 3, True), ("third", 6, True), ("third", 7, True), ("rare", 7, True)]


def test_other_losses_are_logged_beside(tmp_path):
    run = run_in(tmp_path / "run", "log.every=2")
    train(run, [Numbers(torch.tensor([1.0, 2.0])), Numbers(torch.tensor([3.0, 4.0]))])
    (line,) = [json.loads(text) for text in (run.folder / "log.jsonl").read_text().splitlines()]
    assert line["step"] == 2 and line["largest"] == pytest.approx(3.0)
    assert line["images_per_second"] > 0 and 0 <= line["data_wait"] <= 1


def test_precision_is_fp32_on_a_cpu_unless_asked_otherwise(tmp_path):
    assert run_in(tmp_path / "auto").precision == torch.float32
    bf16 = run_in(tmp_path / "bf16", "precision=bf16")
    assert bf16.precision == torch.bfloat16
    seen = []

    class Spy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            result = super().forward(x)
            seen.append(result.dtype)
            return result

    train(bf16, batches_of(1, 2), Spy(1, 2))
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize("losses, warned", [([1.0, 0.98], []), ([0.5], [200]), ([0.4951, 0.5049], [200]), ([0.49], [])])
def test_a_loss_that_stays_at_chance_is_said_once(tmp_path, losses, warned):
    run = run_in(tmp_path / "run")
    progress = Progress(run, 0, 400, 20, chance_loss=0.5)
    for step in range(1, 401):
        progress.step(step, 1, {"loss": torch.tensor(losses[step % len(losses)])}, 0.1)
    entries = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries if "predicting the mean" in entry.get("event", "")] == warned


def test_the_norm_of_the_gradient_and_clipping_are_logged(tmp_path):
    train(run_in(tmp_path / "run"), batches_of(4, 3), clip_grad=1e-3)
    entries = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert all(entry["gradient_norm"] > 0 and entry["clipped"] == 1.0 for entry in entries)
