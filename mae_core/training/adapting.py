"""Which part of an encoder learns in a pre-training that starts from weights: all, none, or adapters of low rank."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

from torch import nn

from mae_core.errors import UserError
from mae_core.models.encoder import ViTEncoder
from mae_core.models.mae import MaskedAutoencoder
from mae_core.training.pretrain_config import AdaptConfig

LORA_LAYERS = {"qkv": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
"""``adapt.layers`` -> the linear layer of a block."""


class Adapted:
    """A model's encoder as ``adapt`` says what of it learns.

    Made before the optimizer: with ``frozen_epochs`` the optimizer holds all parameters, and those of the encoder have
    no gradients, and so no steps, until ``set_frozen(False)``.
    """

    def __init__(self, model: MaskedAutoencoder, adapt: AdaptConfig) -> None:
        self.model = model
        self.lora: Any = None
        if adapt.mode == "decoder":
            model.encoder.requires_grad_(False)
        elif adapt.mode == "lora":
            self.lora = insert_lora(model.encoder, adapt)
        self.learning = [parameter for parameter in model.encoder.parameters() if parameter.requires_grad]

    def set_frozen(self, frozen: bool) -> None:
        """Freeze what learns of the encoder, or let it learn again."""
        for parameter in self.learning:
            parameter.requires_grad_(not frozen)

    def merge(self) -> None:
        """Add the adapters to the weights they belong to, so that the encoder is an ordinary one again."""
        if self.lora is not None:
            self.lora.merge_and_unload()
            self.lora = None


def insert_lora(encoder: ViTEncoder, adapt: AdaptConfig) -> nn.Module:
    """Put adapters W + B A of ``adapt.rank`` (LoRA, arXiv 2106.09685, scale 1) into all blocks but the last
    ``adapt.blocks``, which learn in whole with the final norm (ExPLoRA, arXiv 2406.10973); the rest is frozen.

    One adapter serves query, key and value, which are one layer here. Returns peft's tuner. Raises ``UserError`` where
    peft is not installed and where no block is left.
    """
    if importlib.util.find_spec("peft") is None:
        raise UserError("adapt.mode=lora needs the peft library; pip install 'mae-transfer[lora]'")
    import peft

    below = len(encoder.blocks) - adapt.blocks
    if below < 1:
        raise UserError(
            f"adapt.blocks={adapt.blocks} leaves no block for adapters: the encoder has "
            f"{len(encoder.blocks)} blocks; lower it, or set adapt.mode=full"
        )
    blocks, layers = "|".join(map(str, range(below))), "|".join(re.escape(LORA_LAYERS[name]) for name in adapt.layers)
    places = rf"blocks\.({blocks})\.({layers})"
    tuner = peft.LoraModel(encoder, peft.LoraConfig(r=adapt.rank, lora_alpha=adapt.rank, target_modules=places), "mae")
    if adapt.blocks:
        for module in (*encoder.blocks[below:], encoder.norm):
            module.requires_grad_(True)
    return tuner
