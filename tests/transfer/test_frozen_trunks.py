"""``trainable_blocks`` in dense tasks: what is frozen stays, and keeps nothing for a backward pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mae_core.config.schema import ConfigError
from mae_core.errors import UserError
from mae_core.models.encoder import ViTEncoder
from mae_core.training.memory import kept_storages
from mae_core.weights.encoder_file import describe_encoder
from mae_core.weights.files import read_weights, write_weights
from transfer.backbone import DenseViT
from transfer.detection.engine import build_network, load_engine
from transfer.detection.engine_torchvision import training as core_loop
from transfer.detection.plan import memory_of, print_plan
from transfer.detection.run import evaluate_detector, train_detector
from transfer.trunk import parameter_groups

DEPTH = 6
VARIANTS = {
    "plain": {},
    "shared tables": {"window": 2, "relative_positions": "shared_table"},
    "decomposed": {"window": 2, "relative_positions": "decomposed"},
    "tables and scales": {"relative_positions": "table", "layer_scale": 0.1, "cls_token": True, "drop_path": 0.5},
}


@pytest.fixture(scope="module")
def encoder_file(tmp_path_factory) -> Path:
    torch.manual_seed(3)
    encoder = ViTEncoder("nano", image_size=64, patch_size=8)
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    write_weights(path, encoder.state_dict(), describe_encoder(encoder))
    return path


def trunk(variant: str, blocks: int | None) -> DenseViT:
    torch.manual_seed(0)
    vit = DenseViT("nano", image_size=32, patch_size=8, **VARIANTS[variant])
    if blocks is not None:
        vit.freeze(blocks)
    return vit.train()


def kept(vit: DenseViT) -> int:
    images = torch.zeros(2, 3, 32, 32)
    return sum(kept_storages(lambda: torch.stack(list(vit(images))).sum(), vit))


@pytest.mark.parametrize("variant", VARIANTS)
def test_frozen_blocks_keep_nothing_for_a_backward_pass(variant):
    whole = kept(trunk(variant, None))
    assert kept(trunk(variant, 0)) == 0
    assert kept(trunk(variant, DEPTH)) == whole
    assert 0 < kept(trunk(variant, 2)) < 0.45 * whole


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("blocks", [1, 3, DEPTH])
def test_all_that_learns_gets_a_gradient_and_the_optimizer_has_it_alone(variant, blocks):
    vit = trunk(variant, blocks)
    for block in vit.blocks:
        block.drop_path1 = block.drop_path2 = torch.nn.Identity()  # a dropped path has none, frozen or not
    torch.stack(list(vit(torch.randn(2, 3, 32, 32)))).square().sum().backward()
    learning = {name for name, p in vit.named_parameters() if p.requires_grad}
    with_gradient = {name for name, p in vit.named_parameters() if p.grad is not None}
    assert with_gradient == learning  # DDP waits for every parameter that learns
    assert {name.split(".")[1] for name in learning if name.startswith("blocks.")} == {
        str(index) for index in range(DEPTH - blocks, DEPTH)
    }
    holder = torch.nn.Module()
    holder.backbone = torch.nn.Module()
    holder.backbone.vit = vit
    groups = parameter_groups(holder, layer_decay=0.75, weight_decay=0.1)
    names = {name.removeprefix("backbone.vit.") for group in groups for name in group["param_names"]}
    assert names == learning


def test_a_frozen_trunk_computes_what_it_computed():
    images = torch.randn(1, 3, 32, 32)
    for variant in ("plain", "shared tables", "tables and scales"):
        one, other = trunk(variant, None).eval(), trunk(variant, 0)
        for a, b in zip(one(images), other(images), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_more_blocks_than_there_are_are_refused():
    with pytest.raises(UserError, match="trainable_blocks=7 was asked for, but ViT-nano has 6 blocks"):
        trunk("plain", 7)


@pytest.mark.parametrize("blocks", [0, 2])
def test_a_detector_leaves_the_frozen_blocks_as_they_were(
    configure_detection, tmp_path, encoder_file, break_off_and_resume, capsys, blocks
):
    options = (f"weights={encoder_file}", f"model.trainable_blocks={blocks}", "model.positions=weights")
    more = ("optim.epochs=4", "log.checkpoint_every=2", "model.checkpointing=true", "model.drop_path=0.2")
    config = configure_detection(*options, *more, f"output={tmp_path / 'whole'}", scratch=False)
    metrics = train_detector(config)
    assert f"trainable_blocks={blocks}: " in capsys.readouterr().out
    state, _ = read_weights(tmp_path / "whole" / "detector.safetensors")
    changed = {
        name
        for name, tensor in load_file(encoder_file).items()
        if f"backbone.vit.{name}" in state and not torch.equal(tensor, state[f"backbone.vit.{name}"])
    }
    assert {name.split(".")[1] for name in changed} == {str(index) for index in range(DEPTH - blocks, DEPTH)}

    broken = configure_detection(*options, *more, f"output={tmp_path / 'broken'}", scratch=False)
    break_off_and_resume(broken, core_loop, "detection_losses")
    resumed, _ = read_weights(tmp_path / "broken" / "detector.safetensors")
    assert [name for name in state if not torch.equal(state[name], resumed[name])] == []
    again = configure_detection(f"weights={tmp_path / 'whole'}", f"output={tmp_path / 'again'}", scratch=False)
    assert evaluate_detector(again)["bbox"] == metrics["bbox"]


def test_the_dry_run_shows_what_a_frozen_trunk_saves(configure_detection, encoder_file):
    def peak(*options: str) -> int:
        config = configure_detection(f"weights={encoder_file}", *options, scratch=False)
        model = build_network(config, load_engine("torchvision"), 3)[1]
        return memory_of(model, config, 2, torch.float32).peak

    frozen = ("model.trainable_blocks=0",)
    assert peak(*frozen) < peak("model.trainable_blocks=3") < peak()
    assert peak(*frozen, "model.checkpointing=true") == peak(*frozen)
    said: list[str] = []
    print_plan(configure_detection(f"weights={encoder_file}", *frozen, scratch=False), 1, said.append)
    assert any(line.startswith("trainable_blocks=0: ") and "parameters learn" in line for line in said)


def test_a_trunk_from_scratch_is_not_frozen(configure_detection):
    with pytest.raises(ConfigError, match=r"from_scratch=true they would stay random; set weights=FILE, or leave"):
        configure_detection("model.trainable_blocks=2")
