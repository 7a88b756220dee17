"""The proof of a conversion: source and target run on the same images, unmasked, and their features are compared.

Each side is the library's own model, built as the side's own configuration says (config.json of a folder, else the
facts of the file): timm, transformers, and what other packages register under the entry point group
``mae_core.feature_readers`` (mmseg's backbone, by ``transfer``). Where a format's library is missing, its tensors are
converted back and timm's model runs them, and the result says so.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.layers import get_act_layer
from torch import Tensor, nn

from mae_core.errors import UserError
from mae_core.weights.features import Geometry, Runner, Tokens
from mae_core.weights.files import WeightsFile
from mae_core.weights.parts import read_parts
from mae_core.weights.rename import Reading

TOLERANCE = 1e-4
GROUP = "mae_core.feature_readers"


class Comparison(NamedTuple):
    """Largest difference of two models' features, the models' names, what was compared, and the tensors of the source
    that both sides were measured without because ``--drop`` left them out."""

    difference: float
    source: str
    target: str
    what: str
    without: tuple[str, ...] = ()


def _tokens_of(model: nn.Module, last_block: nn.Module, run: Callable[[], Tensor], prefix: int = 1) -> Tokens:
    """Features of a library's model: what its last block and its final norm give."""
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    hook = last_block.register_forward_hook(keep)
    model.eval()
    normed = run()
    hook.remove()
    return Tokens(seen[0], normed, prefix)


def _options(state: Mapping[str, Tensor], geometry: Geometry) -> tuple[dict[str, Any], dict[str, Any]]:
    """(sizes, trunk) in timm's words."""
    width = state["patch_embed.proj.bias"].shape[0]
    sizes = {
        "img_size": geometry.image_size,
        "patch_size": geometry.patch_size,
        "in_chans": geometry.in_chans,
        "num_classes": 0,
        "global_pool": "",
    }
    return sizes, {
        "embed_dim": width,
        "depth": 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
        "num_heads": geometry.heads,
        "mlp_ratio": state["blocks.0.mlp.fc1.bias"].shape[0] / width,
        "norm_layer": partial(nn.LayerNorm, eps=geometry.norm_eps),
    }


def run_timm(state: Mapping[str, Tensor], geometry: Geometry, images: Tensor) -> Tokens:
    """timm's VisionTransformer; by a timm configuration its own ``create_model``. Tables of relative positions run in
    timm's BEiT. Raises ``UserError`` where timm has no model for the tensors."""
    if any(name.endswith("relative_position_bias_table") for name in state):
        return _run_beit(state, geometry, images)
    if any("rel_pos" in name and tensor.count_nonzero() for name, tensor in state.items()):
        raise UserError("--check cannot run detectron2's relative positions; convert without --check")
    import timm
    from timm.models.vision_transformer import VisionTransformer

    cls, config = "cls_token" in state, geometry.config or {}
    sizes, trunk = _options(state, geometry)
    sizes |= {
        "class_token": cls,
        "no_embed_class": cls and state["pos_embed"].shape[1] == geometry.num_patches,
        "init_values": 1.0 if "blocks.0.ls1.gamma" in state else None,
        "final_norm": "norm.weight" in state,
    }
    with torch.device("meta"):  # nothing is drawn that the state replaces, and no weight is held twice
        if "architecture" in config:
            given = {name: value for name, value in (config.get("model_args") or {}).items() if name != "fc_norm"}
            name = str(config["architecture"]).split(".")[0]
            model: Any = timm.create_model(name, pretrained=False, **{**given, **sizes})
        else:
            model = VisionTransformer(**sizes, **trunk, act_layer=get_act_layer(geometry.activation))
    wanted = model.state_dict().keys()
    model.load_state_dict({name: tensor.float() for name, tensor in state.items() if name in wanted}, assign=True)
    tokens = _tokens_of(model, model.blocks[-1], lambda: model.forward_features(images), int(cls))
    return tokens if "norm.weight" in state else tokens._replace(normed=None)


def _run_beit(state: Mapping[str, Tensor], geometry: Geometry, images: Tensor) -> Tokens:
    """timm's BEiT, which has tables of relative positions; its key has no bias, which changes nothing (softmax)."""
    from timm.models.beit import Beit

    if geometry.activation != "gelu":
        raise UserError(f"--check cannot run tables of relative positions with {geometry.activation}; leave it out")
    sizes, trunk = _options(state, geometry)
    given = {name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): t for name, t in state.items()}
    for name in [name for name in given if name.endswith("attn.qkv.bias")]:
        query, _, value = given.pop(name).chunk(3)
        given |= {name.replace("qkv.bias", "q_bias"): query, name.replace("qkv.bias", "v_bias"): value}
    normed, width = "norm.weight" in given, trunk["embed_dim"]
    if not normed:
        given |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    model = Beit(
        **sizes,
        **trunk,
        qkv_bias=True,
        init_values=1.0 if "blocks.0.gamma_1" in given else None,
        use_abs_pos_emb="pos_embed" in given,
        use_rel_pos_bias=True,
    )
    model.load_state_dict({name: tensor.float() for name, tensor in given.items() if not name.startswith("fc_norm")})
    tokens = _tokens_of(model, model.blocks[-1], lambda: model.forward_features(images))
    return tokens if normed else tokens._replace(normed=None)


def run_transformers(state: Mapping[str, Tensor], geometry: Geometry, images: Tensor) -> Tokens:
    """transformers' ViTModel, through its own ``from_pretrained``, by the folder's configuration where there is one."""
    from transformers import ViTConfig, ViTModel
    from transformers.utils import logging

    depth = 1 + max(
        int(n.split(".layer.")[-1].removeprefix("layers.").split(".")[0]) for n in state if ".attention." in n
    )
    facts: dict[str, Any] = {
        "num_attention_heads": geometry.heads,
        "layer_norm_eps": geometry.norm_eps,
        "hidden_act": TRANSFORMERS_NAMES.get(geometry.activation, geometry.activation),
    }
    facts |= {name: value for name, value in (geometry.config or {}).items() if name in (*facts, "qkv_bias")}
    config = ViTConfig(
        hidden_size=state["embeddings.cls_token"].shape[-1],
        num_hidden_layers=depth,
        intermediate_size=next(
            t.shape[0] for n, t in state.items() if n.endswith(("fc1.bias", "intermediate.dense.bias"))
        ),
        image_size=list(geometry.image_size),
        patch_size=geometry.patch_size,
        num_channels=geometry.in_chans,
        **facts,
    )
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        model = ViTModel.from_pretrained(None, config=config, state_dict=dict(state), add_pooling_layer=False)
    finally:
        logging.set_verbosity(level)
    layers = model.layers if hasattr(model, "layers") else model.encoder.layer
    tokens = _tokens_of(model, layers[-1], lambda: model(images).last_hidden_state)
    return tokens if "layernorm.bias" in state else tokens._replace(normed=None)


TRANSFORMERS_NAMES = {"gelu_tanh": "gelu_pytorch_tanh"}
"""A row of ``ACTIVATIONS`` -> its ``hidden_act``, where they differ."""

LIBRARIES: dict[str, tuple[str, Runner]] = {
    "official": ("timm", run_timm),
    "mae_core": ("timm", run_timm),
    "timm": ("timm", run_timm),
    "huggingface": ("transformers", run_transformers),
    "huggingface_5": ("transformers", run_transformers),
}
"""Format -> the library that runs it, and how."""


def runner_of(format_name: str, *, cls: bool) -> tuple[str, Runner] | None:
    """(name to show, runner) of a format whose library is installed and can leave the cls token out where that is
    asked; None where timm has to run what is converted back."""
    if format_name in LIBRARIES:
        library, runner = LIBRARIES[format_name]
        if importlib.util.find_spec(library) is not None and (cls or runner is run_timm):
            return library, runner
    for found in entry_points(group=GROUP, name=format_name) if cls else ():
        try:
            return found.name, found.load()
        except ImportError:
            continue  # the engine behind it is not installed
    return None


def encoder_names(state: Mapping[str, Tensor], reading: Reading) -> dict[str, Tensor]:
    """The encoder's tensors without the prefix of ``reading``; decoder, heads and what a format drops are left out."""
    kept = {}
    for name, tensor in state.items():
        slot = reading.slot(name)
        decoder = slot is None or slot.ours.startswith(("decoder_", "mask_token", "head.", "own."))
        if not decoder:
            kept[name.removeprefix(reading.prefix)] = tensor
    return kept


def run_side(
    state: Mapping[str, Tensor], reading: Reading, geometry: Geometry, images: Tensor, *, cls: bool
) -> tuple[str, Tokens]:
    """(what ran, its tokens) of one side: the format's library, or timm on the tensors converted back."""
    found = runner_of(reading.format.name, cls=cls)
    encoder = encoder_names(state, reading)
    if found is not None and found[1] is not run_timm:
        return found[0], found[1](encoder, geometry, images)
    shown = "timm"
    if found is None:
        shown = f"timm, on {reading.format.name}'s tensors converted back"
        encoder = read_parts(WeightsFile(Path("check"), encoder), reading.format.name, needless=("cls_token",)).tensors
    encoder = {n.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma"): t for n, t in encoder.items()}
    if not cls:  # ViTDet has no cls token; timm's table has no row for it then
        encoder.pop("cls_token", None)
        encoder["pos_embed"] = encoder["pos_embed"][:, -geometry.num_patches :]
    return shown, run_timm(encoder, geometry, images)


@torch.no_grad()
def compare_features(
    source: tuple[Mapping[str, Tensor], Reading, Geometry],
    target: tuple[Mapping[str, Tensor], Reading, Geometry],
    *,
    without: Sequence[str] = (),
    batch: int = 2,
    seed: int = 0,
) -> Comparison:
    """Run both sides on the same random images, nothing masked, in float32.

    What one side lacks is left out on both: the cls token (detectron2), the final norm (backbones of detectors and
    segmenters). ``without``: what was dropped from the source before, for the account.
    """
    cls = all(
        any(n.endswith("cls_token") for n in encoder_names(state, reading)) for state, reading, _ in (source, target)
    )
    geometry = target[2]
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, geometry.in_chans, *geometry.image_size, generator=generator)
    (shown, one), (other_shown, other) = (run_side(*side, images, cls=cls) for side in (source, target))
    prefixes = [0, 0] if one.prefix == other.prefix else [one.prefix, other.prefix]
    if one.normed is not None and other.normed is not None:
        pair, what = [one.normed, other.normed], "normalised tokens"
    else:
        pair, what = [one.raw, other.raw], "tokens before the final norm"
    difference = (pair[0][:, prefixes[0] :] - pair[1][:, prefixes[1] :]).abs().max().item()
    what = what if cls else f"{what}, without a cls token"
    return Comparison(difference, shown, other_shown, what, tuple(without))
