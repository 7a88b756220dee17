"""``load_encoder(...).transform``: an image of one's own becomes what the encoder was trained on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import mae_core
import mae_core.data.images
from mae_core.data.views import FileView


def test_a_feature_vector_of_a_file_in_two_lines(pretrained, write_images, tmp_path):
    encoder = mae_core.load_encoder(pretrained)
    (path,) = write_images(tmp_path, 1, size=(64, 48))
    pixels = encoder.transform(path)
    assert pixels.shape == (3, 32, 32) and pixels.dtype == torch.float32
    with torch.inference_mode():
        assert encoder.encode(pixels[None]).shape == (1, 1 + 16, 128)


def test_a_file_a_picture_and_its_own_path_text_agree(pretrained, write_images, tmp_path):
    transform = mae_core.load_encoder(pretrained).transform
    (path,) = write_images(tmp_path, 1)
    with Image.open(path) as picture:
        assert torch.equal(transform(path), transform(picture))
    assert torch.equal(transform(path), transform(str(path)))


def test_pixels_are_resized_by_pillow_and_standardised(tmp_path):
    """Against Pillow and NumPy, on an image that is not square: shorter side resized, centre crop."""
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (48, 96, 3), dtype=np.uint8))
    statistics = mae_core.data.images.Statistics((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    found = FileView((24, 24), 3, statistics)(picture)
    resized = picture.resize((48, 24), Image.Resampling.BICUBIC).crop((12, 0, 36, 24))
    expected = (np.asarray(resized) / 255 - [0.1, 0.2, 0.3]) / [0.5, 0.6, 0.7]
    np.testing.assert_allclose(found.permute(1, 2, 0).numpy(), expected, atol=1e-5)


def test_what_cannot_be_transformed_is_said(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    statistics = mae_core.data.images.Statistics((0.5,) * 3, (0.2,) * 3)
    with pytest.raises(mae_core.UserError, match=r"bad\.png cannot be read"):
        FileView((8, 8), 3, statistics)(tmp_path / "bad.png")
    with pytest.raises(mae_core.UserError, match="do not state the mean and std of their 5 channels"):
        FileView((8, 8), 5, None)(torch.rand(5, 9, 9))
