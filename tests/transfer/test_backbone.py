import pytest
import torch

from mae_core.errors import UserError
from mae_core.models.block import kernels_as_on
from mae_core.models.encoder import ViTEncoder
from mae_core.models.sizes import SIZES
from mae_core.weights.encoder_file import describe_encoder
from mae_core.weights.files import write_weights
from transfer.attention import RELATIVE_POSITIONS, merge_windows, of_offsets, partition_windows, table_biases
from transfer.backbone import DenseViT
from transfer.trunk import load_pretrained


def twin(vit: DenseViT, **options) -> DenseViT:
    other = DenseViT("nano", image_size=vit.grid.image_size, patch_size=8, **options)
    other.load_state_dict(vit.state_dict())
    return other.eval()


@pytest.fixture
def vit():
    torch.manual_seed(0)
    return DenseViT("nano", image_size=(32, 48), patch_size=8).eval()


@pytest.mark.parametrize("height, width", [(32, 48), (40, 24), (33, 50), (8, 200)])
def test_any_image_size_gives_the_rounded_up_grid(vit, height, width):
    maps = vit(torch.randn(2, 3, height, width))
    assert [tuple(x.shape) for x in maps] == [(2, 128, -(-height // 8), -(-width // 8))] * 4
    assert [level.channels for level in vit.levels] == [128] * 4
    assert {level.stride for level in vit.levels} == {8}


def test_a_window_that_covers_the_grid_is_global_attention(vit):
    images = torch.randn(2, 3, 32, 32)
    windowed = twin(vit, window=4, global_blocks=())
    for one, other in zip(vit(images), windowed(images), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_smaller_windows_are_not_global_attention(vit):
    images = torch.randn(1, 3, 32, 32)
    assert not torch.allclose(vit(images)[0], twin(vit, window=2, global_blocks=())(images)[0], atol=1e-3)


def test_a_window_sees_only_itself(vit):
    windowed = twin(vit, window=2, global_blocks=())
    images = torch.randn(1, 3, 32, 32)
    changed = images.clone()
    changed[..., 16:, 16:] += 1.0
    before, after = windowed(images)[-1], windowed(changed)[-1]
    assert torch.equal(before[..., :2, :], after[..., :2, :])
    assert not torch.allclose(before[..., 2:, 2:], after[..., 2:, 2:])


@pytest.mark.parametrize("grid, window", [((4, 6), 2), ((5, 7), 3), ((3, 2), 4)])
def test_windows_are_put_back_where_they_came_from(grid, window):
    x = torch.randn(2, grid[0] * grid[1], 5)
    windows, padded = partition_windows(x, grid, window)
    assert windows.shape[1:] == (window * window, 5)
    assert all(side % window == 0 for side in padded)
    assert torch.equal(merge_windows(windows, grid, window, padded), x)


def test_taps_are_the_quarters_and_come_before_the_final_norm(vit):
    encoder = ViTEncoder("nano", image_size=(32, 48), patch_size=8).eval()
    dense = DenseViT("nano", image_size=(32, 48), patch_size=8, cls_token=True).eval()
    encoder_state = {k: v for k, v in encoder.state_dict().items() if not k.startswith("norm.")}
    dense.load_state_dict(encoder_state)
    images = torch.randn(1, 3, 32, 48)
    _, intermediates = encoder.forward_intermediates(images, indices=list(dense.taps), norm=False)
    assert dense.taps == SIZES["nano"].quarter_taps
    for one, other in zip(dense(images), intermediates, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_checkpointing_gives_the_same_gradients(vit):
    images = torch.randn(1, 3, 32, 48)
    plain, sparing = twin(vit).train(), twin(vit, checkpointing=True).train()
    for model in (plain, sparing):
        sum(x.sum() for x in model(images)).backward()
    for one, other in zip(plain.parameters(), sparing.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_a_pretrained_encoder_loads_and_its_positions_are_resized(pretrained):
    vit = DenseViT("nano", image_size=64, patch_size=8)
    report = load_pretrained(vit, pretrained)
    assert report.resized == {"pos_embed": "4x4 -> 8x8"}
    assert report.share == 1.0
    assert "cls_token" in report.unused
    assert not report.refused and not report.new


def stir(vit: DenseViT) -> DenseViT:
    """Tables that are not zero."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in vit.named_parameters():
        if "rel_pos" in name or name.endswith("table"):
            parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)
    return vit


def offsets(side: int) -> torch.Tensor:
    return torch.arange(side)[:, None] - torch.arange(side)[None]


@pytest.mark.parametrize("grid", [(3, 3), (2, 5)])
def test_a_bias_is_that_of_the_offset_between_query_and_key(grid):
    rows, cols = grid
    table = torch.randn((2 * rows - 1) * (2 * cols - 1) + 3, 4)
    biases = table_biases(table, grid, grid, prefix=1)
    assert biases.shape == (4, rows * cols + 1, rows * cols + 1)
    for query in range(rows * cols):
        for key in range(rows * cols):
            dy, dx = query // cols - key // cols, query % cols - key % cols
            row = (dy + rows - 1) * (2 * cols - 1) + dx + cols - 1
            assert torch.equal(biases[:, query + 1, key + 1], table[row])
    assert torch.equal(biases[:, 0, 1:], table[-3][:, None].expand(-1, rows * cols))
    assert torch.equal(biases[:, 1:, 0], table[-2][:, None].expand(-1, rows * cols))
    assert torch.equal(biases[:, 0, 0], table[-1])


def test_tables_for_another_grid_are_resized():
    table = torch.randn(5 * 7, 2)
    image = table.t().unflatten(1, (5, 7))[None]
    resized = torch.nn.functional.interpolate(image, size=(3, 9), mode="bicubic", align_corners=False)[0]
    expected = table_biases(resized.flatten(1).t(), (2, 5), (2, 5), prefix=0)
    torch.testing.assert_close(table_biases(table, (3, 4), (2, 5), prefix=0), expected)
    vector = torch.randn(5, 6)
    assert torch.equal(of_offsets(vector, 3), vector[offsets(3) + 2])
    longer = torch.nn.functional.interpolate(vector.t()[None], size=9, mode="linear")[0].t()
    torch.testing.assert_close(of_offsets(vector, 5), longer[offsets(5) + 4])


@pytest.mark.parametrize("device_type, shared", [("cpu", False), ("cpu", True), ("cuda", False), ("cuda", True)])
@pytest.mark.parametrize("window", [None, 3])
def test_decomposed_positions_are_the_products_with_the_unscaled_query(window, device_type, shared):
    """By each kernel, in values and gradients, with a bias that all images share too."""
    vit = stir(DenseViT("nano", image_size=(40, 56), patch_size=8, window=window, relative_positions="decomposed"))
    attention, grid = vit.blocks[1].attn, (3, 3) if window else (5, 7)
    rows, cols = grid
    query, key, value = (torch.randn(2, 4, rows * cols, 32, requires_grad=True) for _ in range(3))
    table = torch.randn(4, rows * cols, rows * cols, requires_grad=True) if shared else None
    vertical = torch.einsum("bhyxc,ykc->bhyxk", query.unflatten(2, grid), attention.rel_pos_h[offsets(rows) + rows - 1])
    horizontal = torch.einsum(
        "bhyxc,xkc->bhyxk", query.unflatten(2, grid), attention.rel_pos_w[offsets(cols) + cols - 1]
    )
    bias = (vertical[..., :, None] + horizontal[..., None, :]).flatten(4).flatten(2, 3)
    bias = bias if table is None else bias + table
    expected = (query @ key.mT / 32**0.5 + bias).softmax(-1) @ value
    with kernels_as_on(device_type):
        found = attention.attend(query, key, value, grid, table)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    weights, learned = torch.randn_like(expected), [query, key, value, attention.rel_pos_h, attention.rel_pos_w]
    learned += [] if table is None else [table]
    of_found, of_expected = (torch.autograd.grad((x * weights).sum(), learned) for x in (found, expected))
    for mine, plain in zip(of_found, of_expected, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("relative", RELATIVE_POSITIONS)
@pytest.mark.parametrize("window", [None, 2, 4])
def test_relative_positions_start_as_none_and_matter_once_learned(vit, relative, window):
    images = torch.randn(1, 3, 40, 56)
    plain = twin(vit, window=window, global_blocks=(2,))
    other = DenseViT(
        "nano", image_size=(32, 48), patch_size=8, window=window, global_blocks=(2,), relative_positions=relative
    ).eval()
    missing, unexpected = other.load_state_dict(vit.state_dict(), strict=False)
    assert not unexpected and all("rel" in name for name in missing)
    for one, same in zip(plain(images), other(images), strict=True):
        torch.testing.assert_close(one, same, rtol=1e-5, atol=1e-5)
    if relative != "none":
        assert not torch.allclose(stir(other)(images)[0], plain(images)[0], atol=1e-3)
        other.train()
        sum(x.square().sum() for x in other(images)).backward()
        tables = [p for name, p in other.named_parameters() if "rel" in name]
        assert tables and all(p.grad is not None and p.grad.abs().sum() > 0 for p in tables)


def test_tables_are_shared_by_the_blocks_of_a_kind():
    vit = DenseViT("nano", image_size=(32, 48), patch_size=8, window=2, relative_positions="shared_table")
    shapes = {name: tuple(p.shape) for name, p in vit.named_parameters() if "relative" in name}
    assert shapes == {
        "shared_tables.global.relative_position_bias_table": (7 * 11, 4),
        "shared_tables.window.relative_position_bias_table": (9, 4),
    }


def test_tables_of_a_trunk_with_a_cls_token_have_its_three_rows():
    vit = DenseViT(
        "nano", image_size=(32, 48), patch_size=8, cls_token=True, relative_positions="table", layer_scale=0.1
    )
    assert vit.blocks[3].attn.relative_position_bias_table.shape == (7 * 11 + 3, 4)
    assert [tuple(x.shape) for x in stir(vit)(torch.randn(1, 3, 24, 40))] == [(1, 128, 3, 5)] * 4
    assert torch.equal(vit.blocks[0].ls2.gamma, torch.full((128,), 0.1))


def test_tables_can_be_made_for_another_size_than_the_positions():
    vit = DenseViT(
        "nano", image_size=32, patch_size=8, relative_positions="decomposed", relative_size=64, window=3, taps=(5,)
    )
    assert vit.pos_embed.shape == (1, 17, 128)
    assert vit.global_blocks == {0, 2, 3, 5}
    assert vit.blocks[5].attn.rel_pos_h.shape == (15, 32)
    assert vit.blocks[1].attn.rel_pos_h.shape == (5, 32)
    assert [level.name for level in vit.levels] == ["block5"]


@pytest.mark.parametrize("relative", ["shared_table", "decomposed"])
def test_checkpointing_gives_the_gradients_of_tables_too(relative):
    options = {"image_size": (32, 48), "patch_size": 8, "window": 3, "relative_positions": relative}
    plain = stir(DenseViT("nano", **options))
    sparing = DenseViT("nano", **options, checkpointing=True)
    sparing.load_state_dict(plain.state_dict())
    images = torch.randn(1, 3, 32, 48)
    for model in (plain, sparing):
        sum(x.square().sum() for x in model.train()(images)).backward()
    for one, other in zip(plain.parameters(), sparing.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"relative_positions": "swin"}, "unknown relative positions 'swin'; known: none, table"),
        ({"window": 2, "cls_token": True}, "a cls token does not go with window attention"),
        (
            {"relative_positions": "decomposed", "cls_token": True},
            "a cls token does not go with decomposed relative positions",
        ),
        ({"taps": (0, 6)}, "must lie within the 6 blocks"),
        ({"taps": (3, 1)}, "must ascend"),
        ({"taps": ()}, "must ascend"),
    ],
)
def test_options_that_exclude_each_other_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        DenseViT("nano", image_size=32, patch_size=8, **options)


def test_a_pretrained_encoder_loads_beside_new_tables(pretrained):
    vit = DenseViT("nano", image_size=64, patch_size=8, relative_positions="table", layer_scale=1.0, window=2)
    report = load_pretrained(vit, pretrained)
    assert len(report.new) == 6 * 3 and not report.refused


def test_blocks_behind_the_last_tap_do_not_exist(tmp_path):
    """They would be parameters without a gradient; the maps are those of the whole trunk."""
    torch.manual_seed(0)
    encoder = ViTEncoder("nano", image_size=32, patch_size=8)
    write_weights(tmp_path / "e.safetensors", encoder.state_dict(), describe_encoder(encoder))
    whole = DenseViT("nano", image_size=32, patch_size=8, taps=(1, 3, 5))
    cut = DenseViT("nano", image_size=32, patch_size=8, taps=(1, 3))
    load_pretrained(whole, tmp_path / "e.safetensors")
    report = load_pretrained(cut, tmp_path / "e.safetensors")
    left_out = {name: why for name, why in report.unused.items() if name.startswith("blocks.")}
    assert set(left_out) == {name for name in encoder.state_dict() if name.startswith(("blocks.4.", "blocks.5."))}
    assert set(left_out.values()) == {"behind block 3, the last whose output is used"}
    assert {int(name.split(".")[1]) for name in cut.state_dict() if name.startswith("blocks.")} == {0, 1, 2, 3}
    images = torch.rand(1, 3, 32, 40)
    for one, other in zip(cut(images), whole(images), strict=False):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    sum(level.sum() for level in cut(images)).backward()
    assert all(parameter.grad is not None for parameter in cut.parameters())
