"""``model.trunk=timm:NAME`` in the commands on labelled images: what they train, write, and read again."""

from __future__ import annotations

import json

import numpy as np
import pytest
import timm
import torch

from mae_core.config.load import ConfigError, load_config
from mae_core.data.images import Statistics, statistics_of
from mae_core.data.views import FileView
from mae_core.errors import UserError
from mae_core.training.classify_images import load_classifier
from mae_core.training.embedding import embed, knn, write_features
from mae_core.training.evaluate import evaluate
from mae_core.training.finetune import build_model, finetune
from mae_core.training.finetune_config import FinetuneConfig
from mae_core.training.frozen_config import EvaluateConfig, FeaturesConfig, KnnConfig, LinprobeConfig
from mae_core.training.frozen_trunk import weights_of as file_of
from mae_core.training.linprobe import linprobe
from mae_core.training.pretrain_config import PretrainConfig
from mae_core.weights.files import read_weights
from mae_core.weights.load import load_encoder, load_mae, with_file
from mae_core.weights.opening import open_weights
from tests.timm_models import weights_of

OPTIONS = ("data.workers=0", "device=cpu", "precision=fp32", "evaluation_batch=5")
STEPS = ("optim.batch_size=6", "optim.epochs=1", "optim.warmup_epochs=0")
NAMES = ("tiny_beit", "tiny_dinov3")
WIDE = "data.image_size=[16,48]"


@pytest.fixture(scope="module")
def data(tmp_path_factory, write_classes):
    return write_classes(tmp_path_factory.mktemp("classes"))


@pytest.fixture(scope="module", params=NAMES)
def given(request, tmp_path_factory):
    path = weights_of(request.param, tmp_path_factory.mktemp("weights"))
    return [f"weights={path}", f"model.trunk=timm:{request.param}"]


def measured(run, out, data):
    options = [*OPTIONS, f"weights={run}", f"data.path={data}", f"output={out}"]
    return evaluate(load_config(EvaluateConfig, None, options))


@pytest.mark.parametrize("size", ["data.image_size=32", WIDE])
def test_a_fine_tuned_classifier_is_evaluated_and_predicts(given, size, data, tmp_path):
    options = [*OPTIONS, *STEPS, *given, size, f"data.path={data}", f"output={tmp_path / 'run'}"]
    metrics = finetune(load_config(FinetuneConfig, None, options))
    assert measured(tmp_path / "run", tmp_path / "again", data)["top1"] == metrics["top1"]
    state, metadata = read_weights(tmp_path / "run" / "classifier.safetensors")
    assert metadata["timm"] == given[1].removeprefix("model.trunk=") and metadata["mean"] == [0.5, 0.4, 0.3]
    name = metadata["timm"].removeprefix("timm:")
    theirs = timm.create_model(name, num_classes=3, img_size=tuple(metadata["image_size"])).eval()
    theirs.load_state_dict(state)  # timm takes the file as it is
    classifier = load_classifier(tmp_path / "run")
    view = torch.randn(1, 3, *metadata["image_size"])
    with torch.no_grad():
        torch.testing.assert_close(classifier.model(view), theirs(view))
    report = json.loads((tmp_path / "run" / "loading.json").read_text())
    assert report["new"] == ["head.bias", "head.weight"] and set(report["unused"]) >= {"head.bias", "head.weight"}


@pytest.mark.parametrize("probe", ["linear", "attentive"])
def test_a_probe_is_evaluated(given, probe, data, tmp_path):
    kind = [f"probe.kind={probe}", *(["probe.queries=2"] if probe == "attentive" else [])]
    options = [*OPTIONS, *STEPS, *given, *kind, WIDE, f"data.path={data}", f"output={tmp_path / 'run'}"]
    metrics = linprobe(load_config(LinprobeConfig, None, options))
    assert measured(tmp_path / "run", tmp_path / "again", data)["top1"] == metrics["top1"]


def test_neighbours_and_features_are_timms(given, data, tmp_path):
    options = [*OPTIONS, *given, f"data.path={data}"]
    metrics = knn(load_config(KnnConfig, None, [*options, f"output={tmp_path / 'knn'}", "k=1"]))
    assert metrics["pooling"] == "mean" and metrics["images"] == 9
    options[-1] = f"data.path={data / 'val'}"
    file = write_features(load_config(FeaturesConfig, None, [*options, f"output={tmp_path / 'f'}", "data.test_crop=1"]))
    found = np.load(file)
    name, path = given[1].partition("timm:")[2], given[0].partition("=")[2]
    theirs = timm.create_model(name, num_classes=0).eval()
    theirs.load_state_dict({k: v for k, v in read_weights(path)[0].items() if not k.startswith("head")})
    view = FileView((32, 32), 3, Statistics((0.5, 0.4, 0.3), (0.3, 0.2, 0.1)))
    with torch.no_grad():
        expected = theirs(torch.stack([view(data / "val" / name) for name in found["files"]]))
    np.testing.assert_allclose(found["features"], expected.numpy(), atol=1e-5, rtol=1e-5)


def test_from_scratch_and_with_frozen_blocks(given, data, tmp_path):
    scratch = load_config(FinetuneConfig, None, ["from_scratch=true", given[1], "data.image_size=32"])
    model, report, _ = build_model(scratch, 3)
    assert report is None and model(torch.zeros(2, 3, 32, 32)).shape == (2, 3)
    options = [*OPTIONS, *STEPS, *given, "data.image_size=32", "trainable_blocks=1", "model.checkpointing=true"]
    run = tmp_path / "run"
    finetune(load_config(FinetuneConfig, None, [*options, f"data.path={data}", f"output={run}"]))
    before, after = (read_weights(p)[0] for p in (given[0].partition("=")[2], run / "classifier.safetensors"))
    same = {name for name in after if name in before and torch.equal(before[name], after[name])}
    assert {"cls_token", "blocks.0.attn.proj.weight"} <= same and "blocks.1.attn.proj.weight" not in same


@pytest.mark.parametrize(
    "options, mean",
    [((), (0.5, 0.4, 0.3)), (("data.mean=[0.1,0.2,0.3]", "data.std=[1,1,1]"), (0.1, 0.2, 0.3))],
)
def test_statistics_are_the_names_unless_the_user_says_otherwise(given, options, mean):
    config = load_config(KnnConfig, None, [*given, *options])
    source = file_of(config)
    config = with_file(source, config, frozen=True)
    assert statistics_of(config.data, source.metadata).mean == mean


def test_what_does_not_go_with_a_trunk_of_timm(given, tmp_path):
    with pytest.raises(ConfigError, match=r"model\.size is of the toolkit's own ViT"):
        load_config(FinetuneConfig, None, [*given, "model.size=large"])
    with pytest.raises(ConfigError, match=r"model\.trunk=timm:.*masked pre-training"):
        load_config(PretrainConfig, None, [given[1]])
    with pytest.raises(ConfigError, match=r"distributed=fsdp shards the toolkit's own ViT alone"):
        load_config(FinetuneConfig, None, [*given, "distributed=fsdp"])
    config = load_config(KnnConfig, None, [*given, "model.pooling=map"])
    with pytest.raises(UserError, match=r"set model\.pooling=mean"):
        file_of(config).build(pooling=config.model.pooling)


def test_a_file_that_says_its_trunk_needs_no_option_and_takes_no_other(given, data, tmp_path):
    options = [*OPTIONS, *STEPS, *given, "data.image_size=32", f"data.path={data}", f"output={tmp_path / 'run'}"]
    finetune(load_config(FinetuneConfig, None, options))
    trained = f"weights={tmp_path / 'run'}"
    source = file_of(load_config(KnnConfig, None, [trained]))
    assert source.info.timm == given[1].partition("=")[2]
    other = next(name for name in NAMES if name not in given[1])
    with pytest.raises(UserError, match=r"was asked for, but .* is of timm:"):
        file_of(load_config(KnnConfig, None, [trained, f"model.trunk=timm:{other}"]))
    with pytest.raises(UserError, match="needs the toolkit's own ViT"):
        load_mae(tmp_path / "run")
    with pytest.raises(UserError, match="under timm's own names"):
        open_weights(tmp_path / "run")


def test_pooling_in_python_is_the_own_vits(given):
    encoder = load_encoder(given[0].partition("=")[2], trunk=given[1].partition("=")[2])
    with pytest.raises(UserError, match="use mae features with model"):
        embed(encoder, np.zeros((32, 32, 3), dtype=np.uint8))
