"""The estimate of a training step's memory, and ``--dry-run``, which prints it."""

import re

import pytest
import torch
from torch import nn

from mae_core.errors import UserError
from transfer.detection.engine import build_network, load_engine
from transfer.detection.memory import BYTES, MOMENTS, peak_of_step
from transfer.detection.rehearsal import add_cascade, rehearse, stand_in_loss


def estimate(config, *, cascade: bool = False, images: int = 2) -> int:
    model = build_network(config, load_engine(config.engine), 3)[1]
    if cascade:
        add_cascade(model)
    return peak_of_step(model, lambda: stand_in_loss(model, config, images), torch.float32)


def test_what_lives_at_once_is_counted_and_what_has_gone_is_not():
    rows, width, depth = 1000, 500, 6
    layers = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(depth)))
    weights = depth * width * width * BYTES
    step = peak_of_step(layers, lambda: layers(torch.empty(rows, width)).sum(), torch.float32)
    kept = step - weights * (1 + MOMENTS)
    one = rows * width * BYTES
    # at most: the inputs of all layers, and two gradients of that size beside those of the weights
    assert depth * one <= kept <= (depth + 3) * one + weights


def test_the_estimate_follows_what_costs_memory(configure_detection):
    plain = configure_detection()
    base = estimate(plain)
    assert estimate(configure_detection("model.checkpointing=true")) < base < estimate(plain, images=4)
    head = build_network(plain, load_engine(plain.engine), 3)[1].roi_heads
    more = sum(p.numel() for part in (head.box_head, head.box_predictor) for p in part.parameters())
    assert estimate(plain, cascade=True) >= base + 2 * more * BYTES * (1 + MOMENTS)


def test_a_dry_run_says_the_plan_and_writes_nothing(configure_detection, detection_root, tmp_path):
    said: list[str] = []
    recipe = ("optim.batch_size=4", "optim.base_lr=0.64", "optim.epochs=5", "optim.milestones=[0.5]")
    rehearse(configure_detection(*recipe), 2, said.append)
    text = "\n".join(said)
    assert "steps: 5 = 5 epochs of 1 steps" in text  # 4 images, 2 devices with 2 each
    assert "learning rate: 0.64 x 4 / 256 = 0.01 at its peak, warm-up 2 steps, a tenth from step 2 on" in text
    assert re.search(r"memory, estimated: at least \d+\.\d GiB at the peak of a step of 2 images at once", text)
    assert said[-1] == "dry run: nothing was written" and not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="does not exist"):
        rehearse(configure_detection("data.path=missing"), 1, said.append)
