import pytest
import torch

from mae_core.errors import UserError
from mae_core.models.sizes import SIZES
from transfer.backbone import DenseViT, Level, to_convolve
from transfer.pyramid import (
    NORMS,
    PYRAMIDS,
    FourStagePyramid,
    PyramidBackbone,
    SimpleFeaturePyramid,
    group_norm,
    sync_batch_norm,
)


def levels(patch: int, width: int = 32) -> list[Level]:
    return [Level(f"block{n}", width, patch) for n in range(4)]


@pytest.mark.parametrize("patch, strides", [(16, [4, 8, 16, 32]), (8, [2, 4, 8, 16]), (12, [3, 6, 12, 24])])
def test_four_stages_are_quarter_half_one_and_two_patches(patch, strides):
    pyramid = FourStagePyramid(levels(patch))
    assert [level.stride for level in pyramid.levels] == strides
    maps = pyramid([torch.randn(2, 32, 6, 4) for _ in range(4)])
    image = (6 * patch, 4 * patch)
    for level, x in zip(pyramid.levels, maps, strict=True):
        assert x.shape == (2, level.channels, image[0] // level.stride, image[1] // level.stride)


def test_third_stage_is_the_map_itself_and_fourth_its_maxima():
    maps = [torch.randn(1, 32, 4, 6) for _ in range(4)]
    out = FourStagePyramid(levels(16))(maps)
    assert torch.equal(out[2], maps[2])
    assert torch.equal(out[3], maps[3].unflatten(2, (2, 2)).unflatten(4, (3, 2)).amax(dim=(3, 5)))


def test_odd_grids_have_the_coarsest_level_of_detectron2():
    out = FourStagePyramid(levels(8))([torch.randn(1, 32, 5, 3) for _ in range(4)])
    assert out[3].shape == (1, 32, 2, 1)


def test_first_stage_is_the_published_stack():
    stage = FourStagePyramid(levels(16)).stages[0]
    assert [type(layer).__name__ for layer in stage] == ["ConvTranspose2d", "GroupNorm", "GELU", "ConvTranspose2d"]


def test_a_patch_that_four_does_not_divide_is_refused():
    with pytest.raises(UserError, match="not 14; resize the patch embedding"):
        FourStagePyramid(levels(14))


@pytest.mark.parametrize("width", [size.width for size in SIZES.values()])
def test_norm_groups_divide_every_width(width):
    assert group_norm(width).num_groups == 32


def test_norm_groups_of_an_odd_width():
    assert group_norm(48).num_groups == 16


@pytest.mark.parametrize("gpu, kind", [(True, torch.nn.SyncBatchNorm), (False, torch.nn.BatchNorm2d)])
def test_sync_bn_is_so_on_gpus_before_the_ranks_have_joined(monkeypatch, gpu, kind):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert not torch.distributed.is_initialized()
    assert type(sync_batch_norm(8)) is kind


def test_sync_bn_is_plain_bn_in_one_process():
    assert type(sync_batch_norm(8)) is torch.nn.BatchNorm2d


def dense(kind: str, **options) -> DenseViT:
    return DenseViT("nano", patch_size=8, taps=PYRAMIDS[kind].taps(SIZES["nano"]), **options)


@pytest.mark.parametrize("kind", ["four_stage", "simple"])
@pytest.mark.parametrize("norm", NORMS)
def test_pyramid_backbone_emits_what_it_declares(norm, kind):
    backbone = PyramidBackbone(dense(kind, image_size=(48, 64), window=4), kind=kind, channels=24, norm=NORMS[norm])
    assert backbone.anchor_strides == ((2,), (4,), (8,), (16,), (32,))
    assert backbone.box_levels == backbone.levels[:4]
    assert [(level.name, level.stride) for level in backbone.levels] == [
        ("p2", 2), ("p3", 4), ("p4", 8), ("p5", 16), ("p6", 32),
    ]  # fmt: skip
    maps = backbone(torch.randn(2, 3, 64, 96))
    assert list(maps) == [level.name for level in backbone.levels]
    for level in backbone.levels:
        assert maps[level.name].shape == (2, 24, 64 // level.stride, 96 // level.stride)


@pytest.mark.parametrize("kind", PYRAMIDS)
def test_every_parameter_of_the_pyramid_gets_a_gradient(kind):
    backbone = PyramidBackbone(dense(kind, image_size=32), kind=kind, channels=16, norm=NORMS["gn"])
    sum(x.square().sum() for x in backbone(torch.randn(1, 3, 32, 32)).values()).backward()
    assert [name for name, p in backbone.named_parameters() if p.grad is None] == []


def test_a_single_scale_has_one_level_with_anchors_of_all_sizes():
    backbone = PyramidBackbone(dense("single", image_size=64), kind="single", channels=16, norm=NORMS["ln"])
    assert backbone.levels == backbone.box_levels == (Level("p4", 16, 8),)
    assert backbone.anchor_strides == ((2, 4, 8, 16, 32),)
    assert backbone(torch.randn(1, 3, 40, 64))["p4"].shape == (1, 16, 5, 8)


@pytest.mark.parametrize("width, together", [(192, True), (256, False), (768, False)])
def test_wide_maps_are_laid_out_for_the_convolutions_of_a_cpu(width, together):
    channels_together = torch.randn(2, 3, 5, width).permute(0, 3, 1, 2)
    for x in (to_convolve(channels_together), NORMS["ln"](width)(channels_together)):
        assert x.is_contiguous(memory_format=torch.channels_last) == together
        assert x.is_contiguous() != together
    assert torch.equal(to_convolve(channels_together), channels_together)


def test_the_simple_pyramid_is_the_published_stack():
    stages = SimpleFeaturePyramid(levels(16, 64), 24, NORMS["ln"]).stages
    kinds = [[type(layer).__name__ for layer in stage] for stage in stages]
    last = ["Conv2d", "LayerNorm2d", "Conv2d", "LayerNorm2d"]
    assert kinds == [
        ["ConvTranspose2d", "LayerNorm2d", "GELU", "ConvTranspose2d", *last],
        ["ConvTranspose2d", *last],
        last,
        ["MaxPool2d", *last],
    ]
    widths = [[layer.in_channels for layer in stage if hasattr(layer, "in_channels")] for stage in stages]
    assert widths == [[64, 32, 16, 24], [64, 32, 24], [64, 24], [64, 24]]
    assert all(layer.bias is None for stage in stages for layer in stage if type(layer) is torch.nn.Conv2d)
