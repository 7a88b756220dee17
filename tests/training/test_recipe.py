"""The recipe's numbers against the published rules, written out here a second time (paper, A.1; Tables 9 to 11)."""

from __future__ import annotations

import math

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from mae_core.models.classifier import initialize_as_timm
from mae_core.models.encoder import ViTEncoder
from mae_core.training.averaging import attach_average
from mae_core.training.groups import layer_decay_groups
from mae_core.training.loop import FitSettings, cosine_schedule

GOLDEN = {
    # size: layer decay, depth, groups, rate of the embeddings, parameters with weight decay in a block
    "base": (0.65, 12, 28, 3.70e-3, 12 * 768**2),
    "large": (0.75, 24, 52, 7.5e-4, 12 * 1024**2),
    "huge": (0.75, 32, 68, 7.5e-5, 12 * 1280**2),
}


@pytest.mark.parametrize("size", GOLDEN)
def test_parameter_groups_are_the_official_rules(size):
    decay, depth, num_groups, rate_of_embeddings, in_a_block = GOLDEN[size]
    with torch.device("meta"):
        model = ViTEncoder(size, num_classes=1000, pooling="mean")
    groups = layer_decay_groups(model, model, layer_decay=decay, weight_decay=0.05)
    assert len(groups) == num_groups
    seen = {}
    for group in groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            seen[name] = (group["lr_scale"], group["weight_decay"], parameter.numel())
    assert seen.keys() == {name for name, _ in model.named_parameters()}
    for name, (scale, weight_decay, _) in seen.items():
        if name in ("cls_token", "pos_embed") or name.startswith("patch_embed."):
            layer = 0
        elif name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        else:
            assert name in ("fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias")
            layer = depth + 1
        assert scale == pytest.approx(decay ** (depth + 1 - layer)), name
        undecayed = name.endswith("bias") or ".norm" in name or name.startswith("fc_norm")
        assert weight_decay == (0.0 if undecayed or name in ("cls_token", "pos_embed") else 0.05), name
    assert seen["patch_embed.proj.weight"][0] == pytest.approx(rate_of_embeddings, rel=0.01)
    assert seen["blocks.0.attn.qkv.weight"][0] == pytest.approx(decay**depth)
    assert seen["head.weight"][0] == 1.0
    decayed = sum(count for name, (_, wd, count) in seen.items() if name.startswith("blocks.3.") and wd)
    assert decayed == in_a_block


def test_head_and_norm_start_as_the_official_ones():
    torch.manual_seed(0)
    model = ViTEncoder("tiny", num_classes=1000, pooling="mean")
    head = model.head.weight.detach()
    assert float(head.std()) == pytest.approx(2e-5, rel=0.02)
    assert abs(float(head.mean())) < 2e-7
    assert not model.head.bias.any()
    assert torch.equal(model.fc_norm.weight, torch.ones(192)) and not model.fc_norm.bias.any()
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 25 and {norm.eps for norm in norms} == {1e-6}
    assert isinstance(model.norm, nn.Identity)  # mean pooling has its norm after it


def test_learning_rates_are_the_closed_form():
    """Linear from zero, then a half-cosine to min_lr, and all of it, min_lr too, times the group's scale."""
    settings = FitSettings(total_steps=100, warmup_steps=10, lr=4e-3, min_lr=1e-6)
    scales = [1.0, 0.65**13]
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr_scale": scale} for scale in scales]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr)
    schedule = cosine_schedule(optimizer, settings)
    for step in (0, 1, 5, 9, 10, 11, 33, 55, 99):
        schedule.step_update(step)
        share = step / 10 if step < 10 else None
        cosine = 0.5 * (1 + math.cos(math.pi * (step - 10) / 90))
        expected = 4e-3 * share if share is not None else 1e-6 + (4e-3 - 1e-6) * cosine
        for group, scale in zip(optimizer.param_groups, scales, strict=True):
            assert group["lr"] == pytest.approx(expected * scale, rel=1e-9), step


def test_the_average_is_the_written_formula_and_travels_with_the_optimizer():
    def problem() -> tuple[nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    def step(model: nn.Linear, optimizer: torch.optim.Optimizer, number: int) -> None:
        optimizer.zero_grad()
        model(torch.full((1, 3), float(number))).sum().backward()
        optimizer.step()

    model, optimizer = problem()
    average = attach_average(optimizer, model, 0.9)
    expected = model.weight.detach().clone()
    for number in range(4):
        step(model, optimizer, number)
        expected = 0.9 * expected + 0.1 * model.weight.detach()
        if number == 1:
            saved = (optimizer.state_dict(), {name: t.clone() for name, t in model.state_dict().items()})
            saved[0]["average"] = {name: t.clone() for name, t in saved[0]["average"].items()}
    torch.testing.assert_close(average.weight, expected)
    assert not average.training and not torch.equal(average.weight, model.weight)

    again, optimizer = problem()
    average_again = attach_average(optimizer, again, 0.9)
    again.load_state_dict(saved[1])
    optimizer.load_state_dict(saved[0])
    torch.testing.assert_close(average_again.weight, saved[0]["average"]["weight"], rtol=0, atol=0)
    step(again, optimizer, 2)
    assert not torch.equal(average_again.weight, saved[0]["average"]["weight"])


def test_the_other_start_is_timms():
    """Standard deviations of each tensor, against a classifier that timm initialises itself."""
    torch.manual_seed(0)
    theirs = VisionTransformer(img_size=64, embed_dim=192, depth=2, num_heads=3, num_classes=50, global_pool="avg")
    ours = ViTEncoder("tiny", image_size=64, num_classes=50, pooling="mean")
    mae = {name: float(p.detach().std()) for name, p in ours.named_parameters()}
    initialize_as_timm(ours)
    found = dict(ours.named_parameters())
    for name, wanted in theirs.named_parameters():
        if name not in ("head.weight", "cls_token"):  # the official code's own; 1e-6 in later releases of timm
            assert float(found[name].std()) == pytest.approx(float(wanted.std()), rel=0.1, abs=1e-6), name
    assert float(found["cls_token"].std()) == pytest.approx(0.02, rel=0.2)
    assert float(found["head.weight"].std()) == pytest.approx(2e-5, rel=0.05)
    assert mae["blocks.0.attn.qkv.weight"] > 2 * 0.02 and found["pos_embed"].requires_grad
