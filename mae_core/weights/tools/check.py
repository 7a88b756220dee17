"""The proof of a conversion: source and target run on the same images, unmasked, and their features are compared.

Each side is the library's own model where it is installed: timm, transformers, and what other packages register under
the entry point group ``mae_core.feature_readers`` (mmseg's backbone, by ``transfer``). Elsewhere it is ``OwnReading``,
our own forward pass.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mae_core.weights.rename import Reading
from mae_core.weights.tools.reference import EPSILON, Geometry, OwnReading, Tokens, names_in

TOLERANCE = 1e-4
GROUP = "mae_core.feature_readers"


class Comparison(NamedTuple):
    """Largest difference of two models' features, the models' names and what was compared."""

    difference: float
    source: str
    target: str
    what: str


Runner = Callable[[Mapping[str, Tensor], Geometry, Tensor], Tokens]


def _tokens_of(model: nn.Module, last_block: nn.Module, run: Callable[[], Tensor]) -> Tokens:
    """Features of a library's model: what its last block and its final norm give."""
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    hook = last_block.register_forward_hook(keep)
    model.eval()
    normed = run()
    hook.remove()
    return Tokens(seen[0], normed, 1)


def run_timm(state: Mapping[str, Tensor], geometry: Geometry, images: Tensor) -> Tokens:
    """timm's VisionTransformer."""
    from timm.models.vision_transformer import VisionTransformer

    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    with torch.device("meta"):  # nothing is drawn that the state replaces, and no weight is held twice
        model = VisionTransformer(
            img_size=geometry.image_size,
            patch_size=geometry.patch_size,
            in_chans=geometry.in_chans,
            num_classes=0,
            global_pool="",
            embed_dim=state["patch_embed.proj.bias"].shape[0],
            depth=depth,
            num_heads=geometry.heads,
            mlp_ratio=state["blocks.0.mlp.fc1.bias"].shape[0] / state["patch_embed.proj.bias"].shape[0],
            norm_layer=lambda width, **_: nn.LayerNorm(width, eps=EPSILON),
            init_values=1.0 if "blocks.0.ls1.gamma" in state else None,
            final_norm="norm.weight" in state,
        )
    wanted = model.state_dict().keys()
    model.load_state_dict({name: tensor.float() for name, tensor in state.items() if name in wanted}, assign=True)
    tokens = _tokens_of(model, model.blocks[-1], lambda: model.forward_features(images))
    return tokens if "norm.weight" in state else tokens._replace(normed=None)


def run_transformers(state: Mapping[str, Tensor], geometry: Geometry, images: Tensor) -> Tokens:
    """transformers' ViTModel, through its own ``from_pretrained``."""
    from transformers import ViTConfig, ViTModel
    from transformers.utils import logging

    depth = 1 + max(
        int(n.split(".layer.")[-1].removeprefix("layers.").split(".")[0]) for n in state if ".attention." in n
    )
    config = ViTConfig(
        hidden_size=state["embeddings.cls_token"].shape[-1],
        num_hidden_layers=depth,
        num_attention_heads=geometry.heads,
        intermediate_size=next(
            t.shape[0] for n, t in state.items() if n.endswith(("fc1.bias", "intermediate.dense.bias"))
        ),
        image_size=list(geometry.image_size),
        patch_size=geometry.patch_size,
        num_channels=geometry.in_chans,
        layer_norm_eps=EPSILON,
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


LIBRARIES: dict[str, tuple[str, Runner]] = {
    "official": ("timm", run_timm),
    "mae_core": ("timm", run_timm),
    "timm": ("timm", run_timm),
    "huggingface": ("transformers", run_transformers),
    "huggingface_5": ("transformers", run_transformers),
}
"""Format -> the library that runs it, and how."""


def runner_of(format_name: str, *, cls: bool) -> tuple[str, Runner]:
    """(name to show, runner) of a format: a library's model where it is installed, and can leave the cls token out
    where that is asked; otherwise our own reading."""
    if cls and format_name in LIBRARIES:
        library, runner = LIBRARIES[format_name]
        if importlib.util.find_spec(library) is not None:
            return library, runner
    if cls:
        for found in entry_points(group=GROUP, name=format_name):
            try:
                return found.name, found.load()
            except ImportError:
                continue  # the engine behind it is not installed
    return f"our reading of {format_name}", OwnReading(cls=cls)


def encoder_names(state: Mapping[str, Tensor], reading: Reading) -> dict[str, Tensor]:
    """The encoder's tensors without the prefix of ``reading``; decoder, heads and what a format drops are left out."""
    kept = {}
    for name, tensor in state.items():
        slot = reading.slot(name)
        decoder = slot is None or slot.ours.startswith(("decoder_", "mask_token", "head.", "own."))
        if not decoder:
            kept[name.removeprefix(reading.prefix)] = tensor
    return kept


@torch.no_grad()
def compare_features(
    source: Mapping[str, Tensor],
    source_reading: Reading,
    target: Mapping[str, Tensor],
    target_reading: Reading,
    geometry: Geometry,
    *,
    batch: int = 2,
    seed: int = 0,
) -> Comparison:
    """Run both sides on the same random images, nothing masked, in float32.

    What one side lacks is left out on both: the cls token (detectron2), the final norm (backbones of detectors and
    segmenters).
    """
    encoders = [encoder_names(source, source_reading), encoder_names(target, target_reading)]
    cls = all(names_in(state).cls in state for state in encoders)
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, geometry.in_chans, *geometry.image_size, generator=generator)
    shown, results = [], []
    for state, reading in zip(encoders, (source_reading, target_reading), strict=True):
        name, runner = runner_of(reading.format.name, cls=cls)
        shown.append(name)
        results.append(runner(state, geometry, images))
    one, other = results
    prefixes = [0, 0] if one.prefix == other.prefix else [one.prefix, other.prefix]
    if one.normed is not None and other.normed is not None:
        pair, what = [one.normed, other.normed], "normalised tokens"
    else:
        pair, what = [one.raw, other.raw], "tokens before the final norm"
    difference = (pair[0][:, prefixes[0] :] - pair[1][:, prefixes[1] :]).abs().max().item()
    return Comparison(difference, shown[0], shown[1], what if cls else f"{what}, without a cls token")
