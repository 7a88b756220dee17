"""Bytes from the worker to the device, by either JPEG decoder, are the pixels that Pillow and torchvision make."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from mae_core.config.load import load_config
from mae_core.config.schema import ConfigError
from mae_core.data import jpeg
from mae_core.data.augmentation import standardised
from mae_core.data.config import PretrainData
from mae_core.data.decoding import read_image, to_tensor
from mae_core.data.images import ImageFiles, Statistics, statistics_of
from mae_core.data.reading import Reading
from mae_core.data.unlabelled import UnlabelledImages, collate
from mae_core.masking import RandomMasking, SampleMasks
from mae_core.patches import PatchGrid
from mae_core.seeds import AUGMENT, derive_seed, seeded
from mae_core.training.pretrain_config import PretrainConfig

CPU = torch.device("cpu")
SAME = 1 / 255


@pytest.fixture(params=["simplejpeg", "Pillow"])
def decoder(request, monkeypatch):
    if request.param == "Pillow":
        monkeypatch.setattr(jpeg, "LIBRARY", None)
    else:
        pytest.importorskip("simplejpeg", reason="comes with the extra fast")
    assert jpeg.describe_decoder().startswith(request.param)
    return request.param


def photo(width: int, height: int, mode: str = "RGB") -> Image.Image:
    coarse = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def saved(folder: Path, name: str = "x.jpg", size: tuple[int, int] = (160, 120), mode: str = "RGB", **options) -> Path:
    photo(*size, mode).save(folder / name, **options)
    return folder / name


def images_of(*paths: Path, **options) -> UnlabelledImages:
    data = PretrainData(**{"image_size": 32, **options})
    return UnlabelledImages(
        ImageFiles(paths, data.reading), data, 0, SampleMasks(RandomMasking(0.75), PatchGrid(4, 4, 8))
    )


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3, None])
@pytest.mark.parametrize("orientation", [1, 6])
def test_both_decoders_give_pillows_pixels_upright(tmp_path, decoder, mode, channels, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    path = saved(tmp_path, mode=mode, exif=exif)
    with Image.open(path) as image:
        wanted = image.convert("L" if channels == 1 or (channels is None and mode == "L") else "RGB")
        wanted = to_tensor(wanted.transpose(Image.Transpose.ROTATE_270) if orientation == 6 else wanted)
    assert torch.equal(to_tensor(read_image(path, Reading(channels))), wanted)
    found = read_image(path, Reading(channels, tensors=True))
    assert isinstance(found, torch.Tensor) and torch.equal(found, wanted)


@pytest.mark.parametrize("harm", [lambda b: b[: len(b) // 2], lambda b: b[:300], lambda b: b[:2] + b"\xff" + b[2:]])
def test_damage_is_left_to_pillows_judgement(tmp_path, harm, monkeypatch):
    pytest.importorskip("simplejpeg", reason="comes with the extra fast")
    path = saved(tmp_path)
    path.write_bytes(harm(path.read_bytes()))

    def outcome():
        try:
            return to_tensor(read_image(path, 3)).tolist()
        except Exception as error:
            return str(error)

    fast = outcome()
    monkeypatch.setattr(jpeg, "LIBRARY", None)
    assert fast == outcome()


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.parametrize("size", [(160, 120), (50, 37), (30, 300)])
def test_crops_and_flips_are_those_of_pillow_and_torchvision(tmp_path, decoder, suffix, size):
    path = saved(tmp_path, f"x{suffix}", size)
    images = images_of(path)
    view = v2.Compose([v2.RandomResizedCrop(32, scale=(0.2, 1.0), interpolation=3), v2.RandomHorizontalFlip()])
    for epoch in range(12):
        pixels = images[(epoch, 0)].pixels
        with seeded(derive_seed(0, AUGMENT, epoch, 0)), Image.open(path) as image:
            wanted = to_tensor(view(image.convert("RGB")))
        assert pixels.dtype == torch.uint8
        assert float((pixels.float() - wanted.float()).abs().mean()) / 255 < SAME / 4


def test_bytes_become_what_torchvision_makes_of_them():
    statistics = Statistics((0.1, 0.5, 0.7), (0.2, 0.3, 0.01))
    pixels = torch.arange(256, dtype=torch.uint8).expand(2, 3, 5, -1)
    reference = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(*map(list, statistics))])
    assert torch.equal(standardised(pixels, statistics), reference(pixels))
    shares = torch.rand(3, 4, 4)
    before = shares.clone()
    assert torch.equal(standardised(shares, statistics), reference(shares)) and torch.equal(shares, before)


def test_a_batch_of_bytes_is_standardised_where_it_goes_and_keeps_deep_images_deep(tmp_path):
    saved(tmp_path)
    deep = np.random.default_rng(0).random((40, 40, 3)).astype(np.float32)
    np.save(tmp_path / "deep.npy", deep)
    images = images_of(tmp_path / "x.jpg", tmp_path / "deep.npy")
    shallow, mixed = collate(images.__getitems__([(0, 0), (1, 0)])), collate(images.__getitems__([(0, 0), (0, 1)]))
    assert shallow.pixels.dtype == torch.uint8 and mixed.pixels.dtype == torch.float32
    statistics = statistics_of(PretrainData())
    assert torch.equal(shallow.to(CPU).pixels, standardised(shallow.pixels, statistics))
    assert torch.equal(mixed.to(CPU).pixels[0], shallow.to(CPU).pixels[0])
    assert len(mixed.pixels[1].unique()) > 1000  # no 256 levels
    for part, whole in zip(shallow.split(1), shallow.to(CPU).pixels, strict=True):
        assert torch.equal(part.to(CPU).pixels[0], whole)


def test_repeats_decode_an_image_once_and_are_the_samples_of_as_many_epochs(tmp_path):
    images = images_of(saved(tmp_path), saved(tmp_path, "y.jpg", (60, 60)))
    read, real = [], images.source.read
    images.source.read = lambda index: read.append(index) or real(index)
    batch = images.__getitems__([(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)])
    assert read == [0, 1]
    for sample, place in zip(batch, [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)], strict=True):
        alone = images[place]
        assert torch.equal(sample.pixels, alone.pixels) and torch.equal(sample.mask.hidden, alone.mask.hidden)
    assert not torch.equal(batch[0].pixels, batch[1].pixels)
    assert not torch.equal(batch[0].mask.hidden, batch[1].mask.hidden)


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("turns", [False, True])
def test_scaled_decoding_takes_the_same_crops_of_smaller_pictures(tmp_path, decoder, orientation, turns):
    exif = Image.Exif()
    exif[274] = orientation
    path = saved(tmp_path, size=(403, 302), exif=exif, quality=95)
    whole, scaled = (images_of(path, image_size=24, quarter_turns=turns, scaled_decoding=on) for on in (False, True))
    sizes, real = set(), scaled.source.read

    def read(index):
        image = real(index)
        sizes.add(tuple(sorted(image.shape[1:])))
        return image

    scaled.source.read = read
    for epoch in range(20):
        one, other = whole[(epoch, 0)].pixels.float(), scaled[(epoch, 0)].pixels.float()
        others = whole[(epoch + 20, 0)].pixels.float()
        assert float((one - other).abs().mean()) < 18 and float((one - others).abs().mean()) > 36
    assert sizes == {(38, 51), (76, 101)} or sizes == {(38, 51), (76, 101), (151, 202)}


def test_scaled_decoding_leaves_small_crops_and_other_files_whole(tmp_path, decoder):
    for path, options in ((saved(tmp_path), {"image_size": 96}), (saved(tmp_path, "x.png", (300, 300)), {})):
        whole, scaled = (images_of(path, scaled_decoding=on, **options) for on in (False, True))
        for epoch in range(4):
            assert torch.equal(whole[(epoch, 0)].pixels, scaled[(epoch, 0)].pixels)
    with pytest.raises(ConfigError, match="scaled_decoding works with augmentation=random_crop"):
        load_config(PretrainConfig, None, ["data.scaled_decoding=true", "data.augmentation=none"])
