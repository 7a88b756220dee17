"""Every format to and from the official one: nothing is lost that the target can hold, and the features stay the same.

The other end is always the real thing: timm's, transformers' and mmseg's own models, loaded strictly.
"""

from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import mae_core
from mae_core.models.encoder import LayerNorm
from mae_core.weights.formats import FORMATS
from mae_core.weights.rename import is_decoder

EIGHT = ("official", "mae_core", "timm", "huggingface", "mmseg", "mmpretrain", "detectron2", "mae_segmentation")
HUB = "official"
OTHERS = [*(name for name in EIGHT if name != HUB), "huggingface_5"]
PAIRS = [(HUB, name) for name in OTHERS] + [(name, HUB) for name in OTHERS]
"""Every conversion goes through our names: reading does not know the target, writing not the source, so that each
format to and from one hub runs all that the 72 ordered pairs would."""


@pytest.fixture(scope="module")
def states(official_state) -> dict[str, dict[str, Tensor]]:
    """The same MAE under the names of every format, with a decoder where the format holds one."""
    official = official_state()
    return {name: mae_core.convert(official, "official", name)[0] for name in {*EIGHT, "huggingface_5"}}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("source, target", PAIRS)
def test_there_and_back_is_exact(states, source, target):
    there, report = mae_core.convert(states[source], source, target)
    back, _ = mae_core.convert(there, target, source)
    lost = {name for name in report.unused if not name.endswith(("gamma_1", "gamma_2"))}
    kept = {name: tensor for name, tensor in states[source].items() if name not in lost}
    if "decoder" in FORMATS[target].lacks:  # ours and transformers' name an encoder alone without this
        kept = {name.removeprefix("encoder.").removeprefix("vit."): tensor for name, tensor in kept.items()}
    assert same(back, kept)
    lacks = set(FORMATS[target].lacks)
    for name, why in report.unused.items():
        assert why
        assert {"decoder", "norm", "cls_token"} & lacks or "layer scale" in why, name
    named = {*report.loaded, *report.renamed.values(), *report.changed, *report.resized}
    assert named == there.keys(), "every tensor of the target has an origin"
    decoders = [any(is_decoder(n) or "decoder" in n for n in states[source]), "decoder" not in lacks]
    assert any("decoder was dropped" in note for note in report.notes) == (decoders == [True, False])


@pytest.mark.parametrize("name", [*EIGHT, "huggingface_5"])
def test_a_format_is_recognised_by_its_keys(states, name):
    other = "timm" if name == "official" else "official"
    recognised = mae_core.convert(states[name], None, other)[1].path.split(" -> ")[0]
    alike = {"timm": "official", "huggingface_5": "huggingface"}
    assert recognised == alike.get(name, name)


def pixels(channels: int, size: tuple[int, int], seed: int = 1) -> Tensor:
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(seed))


def timm_model(state: dict[str, Tensor], *, size: tuple[int, int], heads: int) -> nn.Module:
    width, channels, patch, _ = state["patch_embed.proj.weight"].shape
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    with torch.device("meta"):  # nothing is drawn that the state replaces
        model = VisionTransformer(
            img_size=size,
            patch_size=patch,
            in_chans=channels,
            num_classes=0,
            global_pool="",
            embed_dim=width,
            depth=depth,
            num_heads=heads,
            norm_layer=LayerNorm,
        )
    model.load_state_dict(state, assign=True)
    return model.eval()


SHAPES = {
    "tiny": {"width": 192, "patch": 16, "heads": 3},
    "base": {"width": 768, "patch": 16, "heads": 12},
    "huge": {"width": 1280, "patch": 14, "heads": 16},
}
CASES = [
    ("tiny", 12, (2, 8), 13),
    ("tiny", 2, (3, 3), 3),
    ("base", 2, (1, 9), 13),
    ("base", 2, (4, 4), 3),
    ("huge", 1, (2, 2), 3),
    ("huge", 1, (4, 1), 13),
]
"""Size, blocks, grid, channels; a number of patches that is no square is more than transformers' ViTMAE holds."""
FEATURES = pytest.mark.parametrize(
    "case, source",
    [(case, HUB) for case in CASES] + [(CASES[1], name) for name in EIGHT if name != HUB],
    indirect=["case"],
    ids=lambda given: given if isinstance(given, str) else "-".join(map(str, given)).replace(" ", ""),
)
"""Every size from one format, and every format at one size: what is renamed does not depend on the size, and each
format holds the hub's tensors to the bit (above), on a grid that is not square."""


@pytest.fixture(scope="module")
def case(request, official_state):
    """A size at its true width and patch: (official state, image size, heads, images, timm's tokens, the same before
    the final norm)."""
    name, depth, grid, channels = request.param
    shape = SHAPES[name]
    state = official_state(shape["width"], depth, grid=grid, patch=shape["patch"], channels=channels, decoder=32)
    size = (grid[0] * shape["patch"], grid[1] * shape["patch"])
    images = pixels(channels, size)
    encoder = mae_core.convert(state, "official", "timm")[0]
    with torch.no_grad():
        model = timm_model(encoder, size=size, heads=shape["heads"])
        tokens = model.forward_features(images)
        unnormed = model.forward_intermediates(images, norm=False, output_fmt="NLC", intermediates_only=True)[-1]
    return state, size, shape["heads"], images, tokens, unnormed


@FEATURES
def test_timm_gives_the_same_features_from_every_format(case, source):
    state, size, heads, images, tokens, _ = case
    there = mae_core.convert(state, "official", source)[0]
    encoder, _ = mae_core.convert(there, source, "timm")
    for name in {"cls_token", "norm.weight", "norm.bias"} - encoder.keys():  # detectron2 and segmenters have none
        encoder[name] = state[name]
    with torch.no_grad():
        assert (timm_model(encoder, size=size, heads=heads).forward_features(images) - tokens).abs().max() < 1e-5


LOST_BY_BACKBONES = {
    "embeddings.cls_token": "cls_token",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}
"""What detectron2 and the segmenters do not hold, under transformers' names and the official ones."""


@pytest.mark.extra("transformers")
@pytest.mark.parametrize("names", ["huggingface", "huggingface_5"])
@FEATURES
def test_transformers_gives_the_same_features(case, source, names):
    from transformers import ViTConfig, ViTMAEConfig, ViTMAEForPreTraining, ViTModel

    state, size, heads, images, tokens, _ = case
    there = mae_core.convert(state, "official", source)[0]
    width, channels, patch, _ = state["patch_embed.proj.weight"].shape
    shared = {
        "hidden_size": width,
        "num_hidden_layers": 1 + max(int(n.split(".")[1]) for n in state if n.startswith("blocks.")),
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "image_size": list(size),
        "patch_size": patch,
        "num_channels": channels,
        "layer_norm_eps": 1e-6,
    }
    encoder = {name: tensor for name, tensor in there.items() if "decoder" not in name and "mask_token" not in name}
    encoder = {name: tensor for name, tensor in encoder.items() if not name.startswith("neck.")}
    bare, _ = mae_core.convert(encoder, None, names)
    for lost, ours in LOST_BY_BACKBONES.items():
        bare.setdefault(lost, state[ours])
    vit, info = ViTModel.from_pretrained(None, config=ViTConfig(**shared), state_dict=bare, output_loading_info=True)
    assert all("pooler" in name for name in info["missing_keys"]) and not info["unexpected_keys"]
    with torch.no_grad():
        assert (vit.eval()(images).last_hidden_state - tokens).abs().max() < 1e-5
    if "decoder" in FORMATS[source].lacks:
        return
    full, _ = mae_core.convert(there, source, names)
    config = ViTMAEConfig(
        **shared,
        mask_ratio=0.0,
        decoder_hidden_size=32,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=128,
    )
    mae, info = ViTMAEForPreTraining.from_pretrained(None, config=config, state_dict=full, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    noise = torch.arange(tokens.shape[1] - 1.0).expand(len(images), -1)
    with torch.no_grad():
        assert (mae.eval().vit(images, noise=noise).last_hidden_state - tokens).abs().max() < 1e-5


@FEATURES
def test_mmseg_gives_the_same_features(case, source):
    backbones = pytest.importorskip("mmseg.models.backbones")
    state, size, heads, images, _, unnormed = case
    there = mae_core.convert(state, "official", source)[0]
    converted, report = mae_core.convert(there, source, "mmseg")
    width, channels, patch, _ = state["patch_embed.proj.weight"].shape
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    model = backbones.MAE(
        img_size=size,
        patch_size=patch,
        in_channels=channels,
        embed_dims=width,
        num_layers=depth,
        num_heads=heads,
        norm_cfg={"type": "LN", "eps": 1e-6},
        out_indices=[depth - 1],
    )
    if source == "detectron2":
        assert "cls_token" in report.new
        converted["cls_token"] = state["cls_token"]
    model.eval()  # mmengine's returns nothing
    loaded = model.load_state_dict(converted, strict=False)
    assert not loaded.unexpected_keys
    assert all("relative_position" in name for name in loaded.missing_keys)
    with torch.no_grad():
        (features,) = model(images)
    assert (features.flatten(2).transpose(1, 2) - unnormed).abs().max() < 1e-5
