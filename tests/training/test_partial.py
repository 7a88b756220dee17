"""Partial fine-tuning: what learns, what stays to the bit, and what it saves."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from mae_core.config.load import load_config
from mae_core.errors import UserError
from mae_core.models.classifier import freeze_below
from mae_core.models.encoder import ViTEncoder
from mae_core.training.finetune import finetune
from mae_core.training.finetune_config import FinetuneConfig
from mae_core.weights.files import read_weights

MLP = {"norm2.weight", "norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"}
HEAD = {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}


def small(**options) -> ViTEncoder:
    return ViTEncoder("nano", image_size=32, patch_size=8, num_classes=3, pooling="mean", **options)


def learning(model: ViTEncoder) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_half_a_block_is_its_mlp():
    model = small()
    freeze_below(model, 0.5)
    assert learning(model) == HEAD | {f"blocks.5.{name}" for name in MLP}


@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_the_last_blocks_and_the_head_learn(blocks):
    model = small()
    freeze_below(model, blocks)
    expected = {name for name, _ in model.named_parameters() if name.startswith("blocks.")}
    expected = {name for name in expected if int(name.split(".")[1]) >= 6 - blocks}
    assert learning(model) == HEAD | expected


def test_all_blocks_are_full_fine_tuning():
    model = small()
    freeze_below(model, 6)
    assert learning(model) == {name for name, _ in model.named_parameters()}


def test_more_blocks_than_there_are_is_refused():
    with pytest.raises(UserError, match="trainable_blocks=7 was asked for, but ViT-nano has 6 blocks"):
        freeze_below(small(), 7)


@pytest.mark.parametrize("blocks, saved", [(0.5, 1), (2, 2), (6, 6)])
def test_nothing_is_kept_for_a_backward_pass_through_what_is_frozen(blocks, saved):
    """The outputs of frozen blocks do not ask for gradients, and drop path is off there alone."""
    model = small(drop_path=0.5).train()
    freeze_below(model, blocks)
    asks = []
    for block in model.blocks:
        block.register_forward_hook(lambda _module, _inputs, output: asks.append(output.requires_grad))
    model(torch.randn(2, 3, 32, 32))
    assert asks == [False] * (6 - saved) + [True] * saved
    frozen = model.blocks[: 6 - saved]
    assert all(not hasattr(path, "drop_prob") for block in frozen for path in (block.drop_path1, block.drop_path2))
    assert model.blocks[5].drop_path2.drop_prob == 0.5


@pytest.mark.parametrize(
    "options, message",
    [
        (["weights=FILE", "trainable_blocks=0"], "to train none of them use mae linprobe"),
        (["weights=FILE", "trainable_blocks=-1"], "a whole number of blocks, 1 or more, or 0.5 for the MLP"),
        (["weights=FILE", "trainable_blocks=1.5"], "a whole number of blocks, 1 or more, or 0.5 for the MLP"),
        (["from_scratch=true", "trainable_blocks=1"], "from_scratch=true they would stay random; set weights=FILE"),
    ],
)
def test_numbers_of_blocks_that_mean_nothing_are_refused(options, message):
    with pytest.raises(UserError, match=message) as error:
        load_config(FinetuneConfig, None, options)
    assert "\n" not in str(error.value)


def digest(state: dict[str, torch.Tensor], names: set[str]) -> str:
    return hashlib.sha256(b"".join(state[name].numpy().tobytes() for name in sorted(names))).hexdigest()


@pytest.mark.parametrize("blocks, ema", [(0.5, "null"), (2, "null"), (2, "0.9")])
def test_what_is_frozen_stays_to_the_bit_and_the_rest_moves(tmp_path, write_classes, pretrained, blocks, ema):
    options = [f"weights={pretrained}", f"data.path={write_classes(tmp_path / 'data')}", f"output={tmp_path / 'run'}"]
    options += ["data.image_size=32", "data.workers=0", "optim.batch_size=4", "optim.epochs=2", "device=cpu"]
    options += ["optim.warmup_epochs=0", "optim.base_lr=0.05", f"trainable_blocks={blocks}", f"ema={ema}"]
    finetune(load_config(FinetuneConfig, None, options))
    before, after = (
        read_weights(pretrained / "encoder.safetensors")[0],
        read_weights(tmp_path / "run" / "classifier.safetensors")[0],
    )
    model = small()
    freeze_below(model, blocks)
    moved = learning(model)
    frozen = after.keys() - moved
    assert len(frozen) > 40
    assert digest(before, frozen) == digest(after, frozen)
    assert all(not torch.equal(before[name], after[name]) for name in moved - HEAD)


PEAK = """
import json, sys
from pathlib import Path
import torch
from mae_core.models.classifier import freeze_below
from mae_core.models.encoder import ViTEncoder

def kilobytes(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what))

blocks = json.loads(sys.argv[1])
torch.manual_seed(0)
model = ViTEncoder("nano", image_size=64, patch_size=4, num_classes=10, pooling="mean").train()
if blocks is not None:
    freeze_below(model, blocks)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
images, labels = torch.randn(8, 3, 64, 64), torch.arange(8)
with torch.no_grad():
    model(images[:1])  # what the libraries take at their first call is not the training's
before = kilobytes("VmRSS")
for _ in range(2):
    torch.nn.functional.cross_entropy(model(images), labels).backward()
    optimizer.step()
    optimizer.zero_grad()
print(json.dumps(kilobytes("VmHWM") - before))
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the system does not say what a process takes")
def test_one_block_takes_less_than_half_the_memory(run_forked):
    """Measured by the operating system, in processes of their own."""
    found = {}
    for blocks in (None, 1):
        result = run_forked(["-c", PEAK, json.dumps(blocks)])
        assert result.returncode == 0, result.stderr
        found[blocks] = int(result.stdout)
    print(found)
    assert found[1] < 0.5 * found[None]
