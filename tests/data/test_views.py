"""Views of labelled images that are no 8-bit pictures: a fine-tuning on five channels, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from mae_core.config.load import load_config
from mae_core.data.config import FinetuneData
from mae_core.data.images import Statistics
from mae_core.data.views import evaluation_view, finetune_view, probe_view
from mae_core.errors import UserError
from mae_core.training.finetune import finetune
from mae_core.training.finetune_config import FinetuneConfig

STATISTICS = Statistics((0.5,) * 5, (0.25,) * 5)


@pytest.fixture
def five_channels(tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("one", "two"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(4):
                np.save(tmp_path / split / name / f"{number}.npy", rng.integers(0, 256, (40, 36, 5), dtype=np.uint8))
    return tmp_path


def options(root, *more: str) -> FinetuneConfig:
    given = ["from_scratch=true", "model.size=nano", "model.patch_size=8", "data.image_size=32", "data.workers=0"]
    given += ["data.channels=5", "data.mean=[.5,.5,.5,.5,.5]", "data.std=[.3,.3,.3,.3,.3]", "device=cpu", "ema=null"]
    given += [f"data.path={root}", f"output={root / 'run'}", "optim.epochs=1", "optim.batch_size=4", *more]
    return load_config(FinetuneConfig, None, given)


def test_five_channels_are_fine_tuned_on(five_channels):
    assert finetune(options(five_channels, "data.auto_augment=null", "data.random_erasing=1"))["images"] == 8


def test_auto_augmentation_of_five_channels_is_refused(five_channels):
    with pytest.raises(UserError, match="works only on 8-bit grey and RGB images"):
        finetune(options(five_channels))
    assert not (five_channels / "run").exists()


def test_every_view_takes_pictures_and_tensors():
    tensor = torch.randint(0, 256, (5, 40, 60), dtype=torch.uint8)
    data = FinetuneData(auto_augment=None, random_erasing=1)
    for view in (
        finetune_view(data, (16, 24), STATISTICS),
        probe_view((0.08, 1.0), 0.5, (16, 24), STATISTICS),
        evaluation_view(None, (16, 24), STATISTICS),
    ):
        assert view(tensor).shape == (5, 16, 24) and view(tensor).dtype == torch.float32


@pytest.mark.parametrize("shape", [(40, 40), (30, 80), (80, 30)])
def test_a_size_that_is_not_square_is_covered(shape):
    """Of pictures and of tensors alike: nothing is padded."""
    white = torch.full((5, *shape), 255, dtype=torch.uint8)
    assert evaluation_view(None, (16, 32), STATISTICS)(white).min() == pytest.approx((1 - 0.5) / 0.25)
    noise = Image.effect_noise(shape, 60)
    grey = Statistics((0.5,), (0.25,))
    one = evaluation_view(None, (16, 32), grey)(noise)
    other = evaluation_view(None, (16, 32), grey)(torch.from_numpy(np.asarray(noise).copy())[None])
    assert (other - one).abs().mean() < 0.02 < one.std()


@pytest.mark.parametrize("size, share", [(16, 0.875), (256, 1.0)])
def test_the_evaluation_view_is_timms_with_a_whole_crop_above_224(size, share):
    picture = Image.effect_noise((90, 70), 60).convert("RGB")
    statistics = Statistics((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    expected = create_transform(size, is_training=False, interpolation="bicubic", crop_pct=share)(picture)
    torch.testing.assert_close(evaluation_view(None, (size, size), statistics)(picture), expected)
