"""``mae fit-pca`` and ``mae train-tokenizer``, and a pre-training on what they write."""

from __future__ import annotations

import importlib
import json

import numpy as np
import pytest
import torch

from mae_core import load_mae, load_pca, load_tokenizer
from mae_core.config.load import load_config
from mae_core.errors import UserError
from mae_core.tokenizers import DalleEncoder
from mae_core.training.pca import PatchMoments, fit_pca
from mae_core.training.plan import differences_from_paper
from mae_core.training.pretrain import pretrain
from mae_core.training.pretrain_config import PretrainConfig
from mae_core.training.tokenizer import temperature_at, train_tokenizer
from mae_core.training.tokenizer_config import TokenizerConfig
from mae_core.weights.files import read_weights


@pytest.fixture(scope="module")
def images(tmp_path_factory, write_images):
    """A folder of eight images."""
    folder = tmp_path_factory.mktemp("target_files") / "images"
    write_images(folder, 8)
    return folder


@pytest.fixture
def options(tmp_path, images, pretrain_options):
    """Of a pre-training of two steps."""
    return [*pretrain_options, f"data.path={images}", f"output={tmp_path / 'run'}", "optim.epochs=1"]


def config_of(options, *more: str) -> PretrainConfig:
    return load_config(PretrainConfig, None, [*options, *more])


def test_moments_give_the_components_that_numpy_finds():
    patches = torch.randn(500, 12, generator=torch.Generator().manual_seed(0)) @ torch.diag(torch.arange(1.0, 13)) + 3
    moments = PatchMoments(12)
    for part in patches.split(170):
        moments.add(part)
    rows, mean, variances = moments.components(4)
    centred = patches.numpy().astype(np.float64) - patches.double().mean(dim=0).numpy()
    _, singular, vectors = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(mean, patches.double().mean(dim=0), atol=1e-9)
    np.testing.assert_allclose(variances, singular**2 / 500, rtol=1e-6)
    np.testing.assert_allclose(np.abs(rows.numpy() @ vectors[:4].T), np.eye(4), atol=1e-6)
    assert (rows.gather(1, rows.abs().argmax(dim=1, keepdim=True)) > 0).all()


def test_a_fitted_pca_is_trained_on_and_travels_in_the_checkpoint(tmp_path, options, capsys):
    file = tmp_path / "pca.safetensors"
    config = config_of(options, "target.kind=pca", f"target.pca={file}", "log.pictures_every=1")
    assert fit_pca(config, components=24, images=8) == file
    assert "24 of 192 coefficients hold" in capsys.readouterr().out
    rows = load_pca(file).components
    assert rows.shape == (24, 192)
    torch.testing.assert_close(rows @ rows.T, torch.eye(24), atol=1e-5, rtol=0)
    tensors, metadata = read_weights(file)
    assert (tensors["variances"].diff() <= 0).all() and metadata["patches"] == 8 * 16 and metadata["patch_size"] == 8

    pretrain(config)
    file.unlink()
    model = load_mae(tmp_path / "run")
    assert model.target_name == "pca" and torch.equal(model.target.components, rows)
    assert model.decoder.pred.out_features == 24
    assert len(list((tmp_path / "run" / "pictures").glob("*.png"))) == 2


@pytest.mark.parametrize(
    "more, arguments, message",
    [
        ([], {}, "no file to write; give --out FILE"),
        (["target.pca={there}"], {}, "there.safetensors exists; choose another file with --out"),
        (["target.pca={new}"], {"components": 500}, "500 components were asked for, .*3 channels have 192"),
        (["target.pca={new}"], {"components": 100, "images": 2}, "2 images have 32 patches, too few for 100"),
    ],
)
def test_a_pca_that_cannot_be_fitted_is_refused(tmp_path, options, more, arguments, message):
    there, new = tmp_path / "there.safetensors", tmp_path / "new.safetensors"
    there.touch()
    config = config_of(options, *(option.format(there=there, new=new) for option in more))
    with pytest.raises(UserError, match=message):
        fit_pca(config, **arguments)
    assert not new.exists()


def test_what_cannot_be_written_is_refused_before_the_fit(tmp_path, options, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr("mae_core.training.pca.moments_of", lambda *_, **__: pytest.fail("it fitted first"))
    with pytest.raises(UserError, match=r"cannot write .*pca.safetensors \(Not a directory|File exists\)"):
        fit_pca(config_of(options), tmp_path / "file" / "pca.safetensors")


def test_images_kept_out_of_training_are_kept_out_of_the_fit(tmp_path, options, monkeypatch):
    seen: list[int] = []
    sampler = "mae_core.training.pca.StepSampler"
    real = importlib.import_module("mae_core.training.pca").StepSampler
    monkeypatch.setattr(sampler, lambda length, *args, **more: seen.append(length) or real(length, *args, **more))
    fit_pca(config_of(options, "watch.share=0.25"), tmp_path / "pca.safetensors", components=4)
    assert seen == [6]


def test_a_pca_file_that_does_not_serve_is_refused_before_the_run_starts(tmp_path, options):
    with pytest.raises(UserError, match=r"target.kind=pca needs target.pca=FILE; `mae fit-pca` writes one"):
        config_of(options, "target.kind=pca")
    asked = ["target.kind=pca", f"target.pca={tmp_path / 'pca.safetensors'}"]
    with pytest.raises(UserError, match=r"PCA file .*pca.safetensors does not exist; write it with mae fit-pca"):
        pretrain(config_of(options, *asked))
    fit_pca(config_of(options, *asked), components=4)
    with pytest.raises(
        UserError, match=r"patches of 192 numbers, but this model's patches have 768 \(16x16 pixels, 3 ch"
    ):
        pretrain(config_of(options, *asked, "model.patch_size=16"))
    with pytest.raises(UserError, match=r"fitted on pixels with mean \[0.4.*this run has mean \[0.1, 0.1, 0.1\]"):
        pretrain(config_of(options, *asked, "data.mean=[0.1,0.1,0.1]"))
    encoder_only = config_of(options, "output=" + str(tmp_path / "other"))
    pretrain(encoder_only)
    with pytest.raises(UserError, match="is not a file of mae fit-pca"):
        load_pca(tmp_path / "other" / "encoder.safetensors")
    assert not (tmp_path / "run").exists()


def tokenizer_config(images, output, *more: str) -> TokenizerConfig:
    options = [f"data.path={images}", f"output={output}", "data.image_size=32", "data.workers=0", "device=cpu"]
    options += ["model.vocabulary=16", "model.width=16", "model.depth=1", "model.patch_size=8", "log.every=1"]
    options += ["optim.batch_size=4", "optim.base_lr=0.1", "optim.warmup_epochs=0", "optim.epochs=4"]
    return load_config(TokenizerConfig, None, [*options, *more])


def test_a_trained_tokenizer_is_trained_on_and_travels_in_the_checkpoint(tmp_path, images, options):
    run = tmp_path / "tokens"
    train_tokenizer(tokenizer_config(images, run))
    tokenizer = load_tokenizer(run)
    assert (tokenizer.vocabulary, tokenizer.stride, tokenizer.width, tokenizer.depth) == (16, 8, 16, 1)
    assert len(list((run / "pictures").glob("*.png"))) == 1
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == list(range(1, 9))
    assert {"loss", "reconstruction", "divergence", "used"} <= log[0].keys()
    assert log[-1]["reconstruction"] < log[0]["reconstruction"]

    pretrain(config_of(options, "target.kind=tokens", f"target.tokenizer={run}", "log.pictures_every=1"))
    (run / "tokenizer.safetensors").unlink()
    model = load_mae(tmp_path / "run")
    pixels = torch.rand(2, 3, 32, 32)
    stored = load_config(PretrainConfig, tmp_path / "run" / "config.yaml").data
    mean, std = torch.tensor(stored.mean), torch.tensor(stored.std)
    normalised = (pixels - mean[:, None, None]) / std[:, None, None]
    assert (model.target(normalised, 8) == tokenizer(pixels)).float().mean() > 0.9  # rounding moves a token at times
    assert model.decoder.pred.out_features == 16
    assert len(list((tmp_path / "run" / "pictures").glob("*.png"))) == 2


def test_tokens_without_a_decoder_are_trained_on_and_not_drawn(tmp_path, options, capsys):
    torch.save(DalleEncoder(vocabulary=16, width=8, blocks=1).state_dict(), tmp_path / "encoder.pt")
    asked = ["target.kind=tokens", f"target.tokenizer={tmp_path / 'encoder.pt'}", "log.pictures_every=1"]
    pretrain(config_of(options, *asked))
    assert "no decoder: no pictures are drawn" in capsys.readouterr().out
    assert not list((tmp_path / "run").glob("pictures/*"))
    model = load_mae(tmp_path / "run")
    with pytest.raises(UserError, match=r"\(DalleEncoder\) has no decoder: its tokens cannot be drawn"):
        model.reconstruct(torch.zeros(1, 3, 32, 32), model(torch.zeros(1, 3, 32, 32)))


def test_a_tokenizer_of_another_grid_is_refused_before_the_run_starts(tmp_path, images, options):
    train_tokenizer(tokenizer_config(images, tmp_path / "tokens", "model.patch_size=4", "optim.epochs=1"))
    asked = ["target.kind=tokens", f"target.tokenizer={tmp_path / 'tokens'}"]
    with pytest.raises(UserError, match=r"8x8 of an image of 32x32, and the model has 4x4.*image_size=\[16,16\]"):
        pretrain(config_of(options, *asked))
    with pytest.raises(UserError, match="the tokenizer takes images of 3 channels, the model's have 1"):
        pretrain(config_of(options, *asked, "data.channels=1", "target.tokenizer_image_size=16"))
    assert not (tmp_path / "run").exists()
    pretrain(config_of(options, *asked, "target.tokenizer_image_size=16"))
    assert load_mae(tmp_path / "run").target.image_size == (16, 16)


def test_a_stopped_tokenizer_training_goes_on_where_it_was(tmp_path, images, monkeypatch):
    whole = tokenizer_config(images, tmp_path / "whole", "log.checkpoint_every=3")
    train_tokenizer(whole)
    stopped = tokenizer_config(images, tmp_path / "stopped", "log.checkpoint_every=3")

    class Stop(Exception):
        pass

    def stop(step: int, total: int, ends: tuple[float, float]) -> float:
        if step == 5:
            raise Stop
        return temperature_at(step, total, ends)

    with monkeypatch.context() as patch:
        patch.setattr("mae_core.training.tokenizer.temperature_at", stop)
        with pytest.raises(Stop):
            train_tokenizer(stopped)
    train_tokenizer(stopped, resume=True)
    one, two = (read_weights(tmp_path / name / "tokenizer.safetensors")[0] for name in ("whole", "stopped"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_temperature_falls_along_half_a_cosine():
    values = [temperature_at(step, 10, (1.0, 0.1)) for step in (0, 5, 10, 12)]
    assert values == pytest.approx([1.0, 0.55, 0.1, 0.1])


def test_the_epsilon_of_a_configuration_reaches_the_file(options, tmp_path):
    config = config_of(options, "target.eps=1e-2", f"output={tmp_path / 'run'}")
    assert "  target.eps: 1e-06 -> 0.01" in differences_from_paper(config)
    pretrain(config)
    assert load_mae(tmp_path / "run").target.eps == 0.01
    with pytest.raises(UserError, match=r"eps=0.01 applies only to kind=normalized_pixels, and the kind is pixels"):
        config_of(options, "target.eps=1e-2", "target.kind=pixels")
