"""What may change size on the way: positions, the patch embedding, channels, relative tables, and the sine layouts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import resample_patch_embed

import mae_core
from mae_core.errors import UserError
from mae_core.pos_embed import sincos_2d
from mae_core.weights.features import Geometry
from mae_core.weights.resize import Adaptation, adapt_channels, is_row_first, resize_patch_embed, resize_relative_table
from tests.independent_vit import OwnReading

SIDES = st.integers(1, 9)


@given(SIDES, SIDES, SIDES, SIDES, st.booleans())
def test_positions_go_from_any_grid_to_any_grid(rows, cols, new_rows, new_cols, antialias):
    positions = torch.randn(1, 1 + rows * cols, 8, generator=torch.Generator().manual_seed(rows * 10 + cols))
    state = encoder_state(positions)
    wanted = Adaptation(image_size=(new_rows * 2, new_cols * 2), grid=(rows, cols), antialias=antialias)
    there, report = mae_core.convert(state, "official", "timm", adaptation=wanted)
    table = there["pos_embed"]
    assert table.shape == (1, 1 + new_rows * new_cols, 8) and torch.equal(table[:, 0], positions[:, 0])
    picture = positions[:, 1:].transpose(1, 2).reshape(1, 8, rows, cols)
    expected = F.interpolate(picture, size=(new_rows, new_cols), mode="bicubic", antialias=antialias)
    assert torch.allclose(table[:, 1:], expected.flatten(2).transpose(1, 2), atol=1e-5)
    assert ("pos_embed" in report.resized) == ((rows, cols) != (new_rows, new_cols))


def encoder_state(positions, width: int = 8, patch: int = 2):
    """One block of width 8 around given positions."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, generator=generator) * 0.2

    state = {"cls_token": draw(1, 1, width), "pos_embed": positions}
    state |= {"patch_embed.proj.weight": draw(width, 3, patch, patch), "patch_embed.proj.bias": draw(width)}
    for name, rows, cols in [("attn.qkv", 3, 1), ("attn.proj", 1, 1), ("mlp.fc1", 4, 1), ("mlp.fc2", 1, 4)]:
        state[f"blocks.0.{name}.weight"] = draw(rows * width, cols * width)
        state[f"blocks.0.{name}.bias"] = draw(rows * width)
    for name in ("blocks.0.norm1", "blocks.0.norm2", "norm"):
        state[f"{name}.weight"], state[f"{name}.bias"] = 1 + draw(width), draw(width)
    return state


def test_a_grid_stays_where_its_images_do_not_split_into_the_new_patches():
    """As DINOv2's 518 pixels do not into patches of 16."""
    state = encoder_state(torch.randn(1, 1 + 7 * 7, 8))
    there, report = mae_core.convert(state, "official", "timm", adaptation=Adaptation(patch_size=4))
    assert torch.equal(there["pos_embed"], state["pos_embed"]) and there["patch_embed.proj.weight"].shape[-1] == 4
    assert any("grid of 7x7 patches stays, so that it is for images of 28x28" in note for note in report.notes)


@pytest.mark.parametrize("old, new", [(14, 16), (16, 14), (16, 8)])
def test_patch_embeddings_are_resized_as_fair_and_as_timm_do(old, new):
    weight = torch.randn(6, 3, old, old, generator=torch.Generator().manual_seed(2))
    as_picture = F.interpolate(weight, size=(new, new), mode="bicubic", align_corners=False)
    assert torch.allclose(resize_patch_embed(weight, new), as_picture)
    expected = resample_patch_embed(weight, [new, new], interpolation="bicubic", antialias=True)
    assert torch.allclose(resize_patch_embed(weight, new, "pseudo_inverse"), expected, atol=1e-4)


def test_the_pseudo_inverse_keeps_the_embedding_of_an_enlarged_patch():
    generator = torch.Generator().manual_seed(3)
    weight, image = torch.randn(6, 3, 14, 14, generator=generator), torch.randn(2, 3, 14, 14, generator=generator)
    larger = F.interpolate(image, size=(16, 16), mode="bicubic", antialias=True)
    before = F.conv2d(image, weight)
    assert torch.allclose(F.conv2d(larger, resize_patch_embed(weight, 16, "pseudo_inverse")), before, atol=1e-2)
    assert not torch.allclose(F.conv2d(larger, resize_patch_embed(weight, 16)), before, atol=1e-1)


def test_channels_are_adapted_as_said():
    weight = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(4))
    grey = torch.randn(1, 1, 2, 2)
    same = F.conv2d(grey, adapt_channels(weight, 1, "sum"))
    assert torch.allclose(same, F.conv2d(grey.expand(-1, 3, -1, -1), weight), atol=1e-5)
    for channels in (1, 4, 13):
        tiled = adapt_channels(weight, channels, "mean_tile")
        assert tiled.shape == (4, channels, 2, 2)
        response = F.conv2d(grey.expand(-1, channels, -1, -1), tiled)
        assert torch.allclose(response, same, atol=1e-5), "the response to equal channels keeps its size"
    new = adapt_channels(weight, 13, "new", seed=7)
    assert torch.equal(new, adapt_channels(weight, 13, "new", seed=7)) and new.std() > 0
    with pytest.raises(UserError, match="sum makes one channel of several, not 4"):
        adapt_channels(weight, 4, "sum")


@pytest.mark.parametrize("old, new", [((3, 3), (5, 7)), ((4, 2), (2, 4))])
def test_relative_tables_are_resized_and_keep_their_cls_entries(old, new):
    table = torch.randn((2 * old[0] - 1) * (2 * old[1] - 1) + 3, 2, generator=torch.Generator().manual_seed(5))
    resized = resize_relative_table(table, old, new)
    assert resized.shape == ((2 * new[0] - 1) * (2 * new[1] - 1) + 3, 2)
    assert torch.equal(resized[-3:], table[-3:])
    middle, new_middle = (len(t[:-3]) // 2 for t in (table, resized))  # no offset: the centre of both pictures
    assert torch.allclose(resized[new_middle], table[middle], atol=0.35)
    flat = resize_relative_table(torch.ones_like(table), old, new)
    assert torch.allclose(flat, torch.ones_like(flat), atol=1e-6)


def test_a_converted_segmenter_keeps_its_relative_positions(official_state):
    state = mae_core.convert(official_state(64, 2, grid=(3, 3), patch=4, decoder=None), "official", "mmseg")[0]
    table = torch.randn(28, 4, generator=torch.Generator().manual_seed(6))
    state["layers.0.attn.relative_position_bias_table"] = table
    there, report = mae_core.convert(
        state, "mmseg", "mae_segmentation", adaptation=Adaptation(image_size=(20, 28), patch_size=4)
    )
    assert there["blocks.0.attn.relative_position_bias_table"].shape == (9 * 13 + 3, 4)
    assert report.resized["blocks.0.attn.relative_position_bias_table"] == "3x3 -> 5x7"
    with pytest.raises(UserError, match="learned relative positions, which timm cannot hold"):
        mae_core.convert(state, "mmseg", "timm")
    there, report = mae_core.convert(state, "mmseg", "timm", drop=["*relative_position_bias_table"])
    assert report.unused["layers.0.attn.relative_position_bias_table"] == "left out as requested"


def test_layer_scale_is_kept_or_folded(official_state):
    state = mae_core.convert(official_state(64, 2, grid=(3, 3), patch=4, decoder=None), "official", "mmseg")[0]
    for name in [name for name in state if "gamma" in name]:
        state[name] = torch.randn(64, generator=torch.Generator().manual_seed(7))
    geometry, images = Geometry((12, 12), 4, 3, 4), torch.randn(2, 3, 12, 12)
    expected = OwnReading()(state, geometry, images).raw
    for target, held in (("timm", True), ("mae_segmentation", True), ("official", False), ("huggingface", False)):
        there, report = mae_core.convert(state, "mmseg", target)
        assert any("gamma" in name for name in there) == held
        assert held or "folded into" in report.unused["layers.0.gamma_1"]
        assert torch.allclose(OwnReading()(there, geometry, images).raw, expected, atol=1e-5), target


def test_separate_biases_are_joined_and_taken_apart(official_state):
    """A key bias adds the same to every key's score, so dropping it changes nothing (softmax)."""
    official = official_state(64, 2, grid=(3, 3), patch=4, decoder=None)
    geometry, images = Geometry((12, 12), 4, 3, 4), torch.randn(2, 3, 12, 12)
    no_positions = {**official, "pos_embed": torch.zeros_like(official["pos_embed"])}
    beit, _ = mae_core.convert(no_positions, "official", "mmseg_beit")
    assert "layers.0.attn.qkv.bias" not in beit and beit["layers.0.attn.q_bias"].shape == (64,)
    assert torch.equal(beit["layers.1.attn.v_bias"], official["blocks.1.attn.qkv.bias"][128:])
    one, other = OwnReading()(beit, geometry, images), OwnReading()(no_positions, geometry, images)
    assert torch.allclose(one.raw, other.raw, atol=1e-5)
    with pytest.raises(UserError, match="no absolute positions"):
        mae_core.convert(official, "official", "mmseg_beit")
    for name in [name for name in list(official) if name.endswith("qkv.bias")]:
        query, _, value = official.pop(name).chunk(3)
        official |= {name.replace("qkv.bias", "q_bias"): query, name.replace("qkv.bias", "v_bias"): value}
    joined, report = mae_core.convert(official, None, "timm")
    assert torch.equal(joined["blocks.0.attn.qkv.bias"][64:128], torch.zeros(64))
    assert "joined from blocks.0.attn.q_bias" in report.changed["blocks.0.attn.qkv.bias"]


def test_a_beit_backbone_gets_positions_that_add_nothing(official_state):
    official = official_state(64, 2, grid=(3, 3), patch=4, decoder=None)
    official["pos_embed"] = torch.zeros_like(official["pos_embed"])
    beit, _ = mae_core.convert(official, "official", "mmseg_beit")
    beit |= {f"layers.{index}.attn.relative_position_bias_table": torch.zeros(28, 4) for index in (0, 1)}
    back, report = mae_core.convert(beit, None, "official")
    assert report.path == "mmseg_beit -> official" and torch.equal(back["pos_embed"], official["pos_embed"])
    assert "filled with zeros" in report.changed["pos_embed"]


@pytest.mark.parametrize("grid", [(4, 4), (2, 8)])
def test_row_first_sine_tables_are_recognised_and_put_right(official_state, grid):
    """mmpretrain's and MIMDet's tables: rows before columns. In the official order the function is the same."""
    state = official_state(64, 2, grid=grid, patch=4)
    official = sincos_2d(64, *grid)
    state["pos_embed"] = torch.cat([official[..., 32:], official[..., :32]], dim=-1)
    state["decoder_pos_embed"] = sincos_2d(32, *grid).roll(16, dims=2)
    assert is_row_first(state["pos_embed"], grid) and not is_row_first(official, grid)
    theirs = mae_core.convert(state, "official", "mmpretrain", adaptation=Adaptation(grid=grid))[0]
    kept, report = mae_core.convert(theirs, "mmpretrain", "official", adaptation=Adaptation(grid=grid))
    assert torch.equal(kept["pos_embed"], state["pos_embed"])
    assert any("row-first sine-cosine layout" in note and "kept" in note for note in report.notes)
    right, report = mae_core.convert(theirs, "mmpretrain", "official", adaptation=Adaptation(grid=grid, reorder=True))
    assert torch.equal(right["pos_embed"], official) and torch.equal(right["decoder_pos_embed"], sincos_2d(32, *grid))
    geometry, images = Geometry((grid[0] * 4, grid[1] * 4), 4, 3, 4), torch.randn(2, 3, grid[0] * 4, grid[1] * 4)
    one, other = OwnReading()(kept, geometry, images), OwnReading()(right, geometry, images)
    assert torch.allclose(one.normed, other.normed.roll(32, dims=2), atol=1e-5)
    embeds = [
        F.linear(t.normed, s["decoder_embed.weight"], s["decoder_embed.bias"]) for t, s in ((one, kept), (other, right))
    ]
    assert torch.allclose(embeds[0], embeds[1].roll(16, dims=2), atol=1e-5)
