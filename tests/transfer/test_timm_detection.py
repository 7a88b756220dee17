"""``model.trunk=timm:NAME`` under both pyramids and both engines: maps, gradients, training, and the file that is read
again."""

from __future__ import annotations

import json

import numpy as np
import pytest
import timm
import torch

from mae_core.config.schema import ConfigError
from mae_core.errors import UserError
from mae_core.weights.load import read_encoder
from tests.timm_models import NAMES, file_of, small, weights_of
from transfer.detection.detector import load_detector
from transfer.detection.run import evaluate_detector, train_detector
from transfer.pyramid import PYRAMIDS
from transfer.timm_backbone import dense_timm
from transfer.trunk import build_trunk, load_pretrained

ENGINES = ("torchvision", pytest.param("detectron2", marks=pytest.mark.detectron2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("timm")


@pytest.mark.parametrize("name", NAMES)
def test_maps_are_timms_at_any_size_and_everything_learns(name, folder):
    source = read_encoder(file_of(name, folder), trunk=f"timm:{name}")
    side = 4 * source.patch_size
    vit = dense_timm(f"timm:{name}", image_size=(side, side), taps=lambda size: (0, size.depth - 1), **small(name))
    report = load_pretrained(vit, source)
    assert report.share == 1 and not report.new
    maps = vit(torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0)))
    torch.stack([found.square().mean() for found in maps]).sum().backward()
    assert [found.shape[-2:] for found in maps] == [(4, 4), (4, 4)]
    assert [name for name, parameter in vit.named_parameters() if parameter.grad is None] == []

    size = (3 * source.patch_size, 5 * source.patch_size)
    overlay = {"file": str(source.path), "num_classes": 1000}
    sized = {} if name.startswith("samvit") else {"img_size": (side, side)}
    theirs = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0, **small(name), **sized
    ).eval()
    if hasattr(theirs, "set_input_size"):
        theirs.set_input_size(img_size=size)
    images = torch.randn(1, 3, size[0], size[1] - 3, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        padded = torch.nn.functional.pad(images, (0, 3))
        expected = theirs.forward_intermediates(padded, indices=[0, 1], intermediates_only=True)
        for ours, their in zip(vit.eval()(images), expected, strict=True):
            torch.testing.assert_close(ours, their, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", PYRAMIDS)
def test_patches_of_14_are_resized_for_a_pyramid(kind, folder):
    name = "vit_small_patch14_reg4_dinov2"
    source = read_encoder(file_of(name, folder), trunk=f"timm:{name}", patch_size=16)
    assert source.image_size == (592, 592)
    options = {"taps": PYRAMIDS[kind].taps, "positions": (64, 64), **small(name)}
    vit, report = build_trunk(source, **options)
    assert report.resized["patch_embed.proj.weight"] == "(96, 3, 14, 14) -> (96, 3, 16, 16)"
    assert vit(torch.randn(1, 3, 64, 64))[-1].shape[-2:] == (4, 4)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("name", "pyramid"), [("tiny_beit", "four_stage"), ("tiny_dinov3", "simple")])
def test_a_detector_trains_and_its_file_is_read_again(engine, name, pyramid, configure_detection, folder, tmp_path):
    given = [f"weights={weights_of(name, tmp_path)}", f"model.trunk=timm:{name}", f"model.pyramid={pyramid}"]
    options = [*given, f"engine={engine}", "model.size=null", "model.patch_size=null", "model.window=null"]
    config = configure_detection(*options, scratch=False)
    metrics = train_detector(config)
    given = [f"weights={config.output}", f"engine={engine}", f"output={tmp_path / 'again'}"]
    again = evaluate_detector(configure_detection(*given, scratch=False))
    assert again["bbox"] == metrics["bbox"]
    report = json.loads((config.output / "loading.json").read_text())
    assert report["share"] == 1 and not report["refused"]
    detector = load_detector(config.output)
    assert detector.predict(np.zeros((40, 50, 3), dtype=np.uint8)) is not None


def test_windows_and_the_names_of_our_sizes_are_refused(configure_detection, folder):
    given = [f"weights={file_of('deit_tiny_patch16_224', folder)}", "model.trunk=timm:deit_tiny_patch16_224"]
    with pytest.raises(ConfigError, match=r"model\.window=4: only the toolkit's own ViT"):
        configure_detection(*given, "model.size=null", "model.window=4", scratch=False)
    with pytest.raises(ConfigError, match=r"model\.size is of the toolkit's own ViT"):
        configure_detection(*given, "model.size=nano", "model.window=null", scratch=False)


def test_a_trunk_of_one_size_says_so_in_training():
    vit = dense_timm("timm:beit_base_patch16_224", image_size=64, taps=lambda size: (1,), **small("beit"))
    with pytest.raises(UserError, match="trains on images of one size"):
        vit.train()(torch.zeros(1, 3, 64, 96))
