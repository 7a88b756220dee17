"""Pre-training without a cls token (paper, A.1): against timm's ViT without one, through the file and every adapter."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

import mae_core
from mae_core.config.load import load_config
from mae_core.errors import UserError
from mae_core.masking import PatchMask
from mae_core.models.mae import build_mae
from mae_core.models.sizes import SIZES
from mae_core.training.embedding import embed, knn
from mae_core.training.finetune import finetune
from mae_core.training.finetune_config import FinetuneConfig
from mae_core.training.frozen_config import KnnConfig, LinprobeConfig
from mae_core.training.linprobe import linprobe
from mae_core.training.pretrain import pretrain
from mae_core.training.pretrain_config import PretrainConfig
from mae_core.weights.load import load_mae, read_encoder
from mae_core.weights.tools.convert import convert_file
from transfer.trunk import build_trunk

NORM = partial(nn.LayerNorm, eps=1e-6)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def timms(state: dict[str, Tensor]) -> VisionTransformer:
    """timm's ViT-nano without a cls token, with the tensors of ours: its table has a row less."""
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4, "num_classes": 0}
    model = VisionTransformer(**size, class_token=False, global_pool="", norm_layer=NORM).eval()
    model.load_state_dict({**state, "pos_embed": state["pos_embed"][:, 1:]})
    return model


def test_the_autoencoder_is_timms_without_a_cls_token(images):
    torch.manual_seed(0)
    shape = {"image_size": 32, "patch_size": 8, "decoder_width": 32, "decoder_depth": 2, "decoder_heads": 2}
    model = build_mae(replace(SIZES["nano"], cls_token=False), **shape).eval()
    reference = timms(model.encoder.state_dict())
    torch.testing.assert_close(model.encoder.encode(images), reference.forward_features(images))

    mask = PatchMask.from_hidden(torch.rand(2, 16, generator=torch.Generator().manual_seed(1)).argsort(dim=1) >= 4)
    with torch.no_grad():
        patches = reference.patch_embed(images) + reference.pos_embed
        visible = patches.gather(1, mask.visible_ids[:, :, None].expand(-1, -1, 128))
        encoded = reference.norm(reference.blocks(visible))
        decoder = model.decoder
        canvas = decoder.mask_token.expand(2, 16, 32).clone()
        canvas.scatter_(1, mask.visible_ids[:, :, None].expand(-1, -1, 32), decoder.embed(encoded))
        x = canvas + decoder.pos_embed[:, 1:]
        for ours in decoder.blocks:
            block = Block(32, 2, qkv_bias=True, norm_layer=NORM).eval()
            block.load_state_dict(ours.state_dict())
            x = block(x)
        expected = decoder.pred(decoder.norm(x))
        output = model(images, mask=mask)
        assert output.loss == pytest.approx(float(model(images, mask=mask, predict_visible=False).loss), abs=1e-6)
    torch.testing.assert_close(output.prediction, expected)


@pytest.fixture(scope="module")
def run(tmp_path_factory, write_classes, pretrain_options):
    """The folder of a pre-training without a cls token that watches a probe, and its labelled images."""
    root = tmp_path_factory.mktemp("without")
    data = write_classes(root / "classes")
    words = [*pretrain_options, "model.cls_token=false", f"data.path={data / 'train'}", f"output={root / 'run'}"]
    watch = [f"watch.labelled={data}", "watch.neighbours=1", "watch.every_epochs=1", "watch.probes=[attentive]"]
    pretrain(load_config(PretrainConfig, None, [*words, *watch, "optim.epochs=1", "log.pictures_every=2"]))
    return root / "run", data


def test_the_file_says_so_and_gives_the_features(run, images):
    folder, _ = run
    source = read_encoder(folder)
    assert source.shape.cls_token is False and source.size == "nano" and "cls_token" not in source.tensors
    encoder = mae_core.load_encoder(folder)
    torch.testing.assert_close(encoder.encode(images), timms(source.tensors).forward_features(images))
    assert embed(encoder, images, pooling="mean").shape == (2, 128) and list((folder / "pictures").iterdir())
    with pytest.raises(UserError, match="no cls token; ask for pooling='mean'"):
        embed(encoder, images)
    model = load_mae(folder)
    assert model.decoder.prefix == 0 and model(images).prediction.shape == (2, 16, 192)
    for target in ("official", "huggingface"):
        with pytest.raises(UserError, match=f"no cls token, and a file of the format {target} has one"):
            convert_file(folder / "encoder.safetensors", target, folder.parent / "converted.safetensors")


def test_every_adapter_takes_it(run, tmp_path, images):
    folder, data = run
    quick = [f"weights={folder}", f"data.path={data}", "data.workers=0", "device=cpu"]
    words = [*quick, "data.image_size=32", "optim.batch_size=4", "optim.epochs=0.4", "optim.warmup_epochs=0"]
    finetune(load_config(FinetuneConfig, None, [*words, f"output={tmp_path / 'classes'}"]))
    classifier = mae_core.load_classifier(tmp_path / "classes")
    assert len(classifier.predict(sorted((data / "val").rglob("*.png")))) == 9
    metrics = knn(load_config(KnnConfig, None, [*quick, f"output={tmp_path / 'knn'}", "k=[1]"]))
    assert metrics["pooling"] == "mean"  # where nothing else is said
    for kind in ("linear", "attentive"):
        told = [*words, f"probe.kind={kind}", f"output={tmp_path / kind}", "probe.queries=8"]
        assert 0 <= linprobe(load_config(LinprobeConfig, None, told))["top1"] <= 100
    with pytest.raises(UserError, match=r"has no cls token; set model\.pooling=mean"):
        knn(load_config(KnnConfig, None, [*quick, f"output={tmp_path / 'other'}", "k=[1]", "model.pooling=cls"]))
    with pytest.raises(UserError, match="cls_token True was asked for, but the file has False"):
        finetune(load_config(FinetuneConfig, None, [*words, "model.cls_token=true", f"output={tmp_path / 'more'}"]))

    again = [f"weights={folder}", f"data.path={data / 'train'}", "data.workers=0", "device=cpu", "optim.batch_size=4"]
    pretrain(load_config(PretrainConfig, None, [*again, "optim.epochs=0.4", f"output={tmp_path / 'warm'}"]))
    assert read_encoder(tmp_path / "warm").shape.cls_token is False


@pytest.mark.parametrize("cls_token", [False, True], ids=["detection", "segmentation"])
def test_dense_maps_are_those_of_the_blocks(run, images, cls_token):
    """Segmentation's backbone asks for a cls token, which this encoder has not."""
    source = read_encoder(run[0])
    trunk = build_trunk(source, taps=lambda size: [size.depth - 1], cls_token=cls_token).vit.eval()
    (found,) = trunk(images)
    expected = timms(source.tensors).forward_intermediates(images, indices=1, norm=False, intermediates_only=True)[0]
    torch.testing.assert_close(found, expected)


def test_a_segmenter_is_built_on_it(run, images):
    pytest.importorskip("mmseg", reason="mmseg is not installed; pip install mae-transfer[segmentation]")
    from transfer.segmentation.engine_mmseg.backbone import MAECoreViT

    source = read_encoder(run[0])
    backbone = MAECoreViT(source.shape, image_size=32, weights=str(run[0])).eval()
    backbone.init_weights()
    assert backbone.cls_token is None and [tuple(map.shape) for map in backbone(images)] == [(2, 128, 4, 4)] * 4
