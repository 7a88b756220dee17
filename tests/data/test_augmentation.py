"""The crops, flips, turns and colours of pre-training do what their names say, on pictures and on tensors."""

import numpy as np
import pytest
import torch
from PIL import Image

from mae_core.config.load import load_config
from mae_core.config.schema import ConfigError
from mae_core.data.augmentation import AUGMENTATIONS, TrainingView, centre_view, standardised
from mae_core.data.config import PretrainData
from mae_core.data.decoding import to_tensor
from mae_core.data.images import Statistics
from mae_core.seeds import seeded
from mae_core.training.pretrain_config import PretrainConfig

PLAIN = Statistics((0.0,) * 3, (1.0,) * 3)


def picture(height: int = 48, width: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def ramp(height: int = 48, width: int = 64) -> torch.Tensor:
    """(2, H, W) float: its own row and column in every pixel."""
    rows, cols = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([rows, cols]).float()


def views(count: int = 60, image=None, **options) -> list[torch.Tensor]:
    data = PretrainData(**{"image_size": 16, **options})
    plain = Statistics((0.0,) * data.channels, (1.0,) * data.channels)
    view = TrainingView(data, plain)
    found = []
    for seed in range(count):
        with seeded(seed):
            found.append(standardised(view(picture() if image is None else image), plain))
    return found


def spread(view: torch.Tensor) -> tuple[float, float]:
    """Rows and columns of the ramp between neighbouring pixels of a view: how much it was resized, with the sign."""
    inner = view[:, 4:-4, 4:-4]  # bicubic bends the ramp at the borders
    return float(inner[0].diff(dim=0).mean()), float(inner[1].diff(dim=1).mean())


def test_none_is_the_centre_always_without_a_flip():
    found = views(augmentation="none")
    centre = centre_view((16, 16), PLAIN)(picture())
    assert all(torch.equal(view, centre) for view in found)
    flipped = views(augmentation="none", hflip=1.0)[0]
    assert torch.equal(flipped, centre.flip(2)) and not torch.equal(flipped, centre)


def test_a_fixed_crop_moves_and_never_zooms():
    found = views(augmentation="fixed_crop", channels=2, image=ramp(), hflip=0)
    scale = 48 / round(16 / 0.875)  # the shorter side becomes 18 pixels
    for view in found:
        assert spread(view) == pytest.approx((scale, scale), rel=0.02)
    corners = {(round(view[0, 8, 8].item()), round(view[1, 8, 8].item())) for view in found}
    assert len(corners) > 10


def test_a_random_crop_zooms_within_its_scale():
    found = views(200, augmentation="random_crop", channels=2, image=ramp(64, 64), hflip=0, crop_scale=[0.2, 1.0])
    areas = torch.tensor([np.prod(spread(view)) * 256 / 64**2 for view in found])
    assert 0.15 < areas.min() < 0.3 and 0.8 < areas.max() < 1.1


def test_horizontal_flips_come_half_the_time_by_default_and_vertical_ones_on_request():
    default = [spread(view) for view in views(200, channels=2, image=ramp())]
    assert all(down > 0 for down, _ in default)
    assert 70 < sum(right < 0 for _, right in default) < 130
    both = [spread(view) for view in views(200, channels=2, image=ramp(), vflip=0.5)]
    assert 70 < sum(down < 0 for down, _ in both) < 130


@pytest.mark.parametrize("size", [(3, 5), (4, 4)])
def test_quarter_turns_are_exact_and_all_come(size):
    image = picture(*size)
    plain = dict(augmentation="none", quarter_turns=True, image=image)
    found = [view for shape in {size, size[::-1]} for view in views(40, image_size=shape, **plain)]
    turned = [torch.rot90(to_tensor(image), quarters, (1, 2)).float() / 255 for quarters in range(4)]
    seen = {
        next((k for k in range(4) if view.shape == turned[k].shape and view.allclose(turned[k])), None)
        for view in found
    }
    assert seen >= {0, 1, 2, 3}
    assert None not in seen or size[0] != size[1]  # the centre of one that lies the other way is resized


def test_quarter_turns_reach_the_training_view():
    found = [spread(view) for view in views(100, channels=2, image=ramp(64, 64), hflip=0, quarter_turns=True)]
    assert sum(abs(down) < 0.1 for down, _ in found) > 25  # rows lie along columns


def test_colour_jitter_changes_colours_and_nothing_else():
    grey = Image.new("RGB", (20, 20), (200, 80, 80))
    still = views(10, image=grey)
    moved = views(10, image=grey, color_jitter=0.4)
    assert all(torch.equal(view, still[0]) for view in still)
    assert len({tuple(view[:, 0, 0].tolist()) for view in moved}) == 10
    assert all(view.flatten(1).std(dim=1).max() < 1e-6 for view in moved)
    with pytest.raises(ConfigError, match="color_jitter is for 1 or 3 channels, not 4"):
        load_config(PretrainConfig, None, ["data.channels=4", "data.color_jitter=0.1"])


@pytest.mark.parametrize("kind", AUGMENTATIONS)
@pytest.mark.parametrize("size", [16, (16, 24)])
@pytest.mark.parametrize("shape", [(7, 300), (300, 7), (5, 5)])
def test_images_of_any_shape_become_the_size_asked_for(kind, size, shape):
    wanted = (3, 16, 24 if size == (16, 24) else 16)
    for view in views(4, augmentation=kind, image=picture(*shape), image_size=size, quarter_turns=True):
        assert tuple(view.shape) == wanted and view.dtype == torch.float32
