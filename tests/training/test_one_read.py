"""A command opens its weights file once, and a trunk that no row names goes through all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from mae_core.config.load import load_config
from mae_core.models.sizes import ViTSize
from mae_core.training.embedding import knn, write_features
from mae_core.training.evaluate import evaluate
from mae_core.training.finetune import finetune
from mae_core.training.finetune_config import FinetuneConfig
from mae_core.training.frozen_config import EvaluateConfig, FeaturesConfig, KnnConfig, LinprobeConfig
from mae_core.training.linprobe import linprobe
from mae_core.training.pretrain import pretrain
from mae_core.training.pretrain_config import PretrainConfig
from mae_core.training.viewer import reconstruct_files
from mae_core.weights.encoder_file import describe_encoder
from mae_core.weights.load import load_mae, read_encoder
from mae_core.weights.tools.convert import convert_file
from mae_core.weights.tools.inspect import inspect_file

TRUNK = ViTSize(96, 3, 3, norm_eps=1e-5, activation="relu")
QUICK = ("data.workers=0", "device=cpu")
TRAINING = ("optim.epochs=1", "optim.batch_size=4", "optim.warmup_epochs=0")


@pytest.fixture(scope="module")
def model_file(write_mae) -> Path:
    """A masked autoencoder of 96 x 3 blocks, which no row names, with an epsilon and an activation of its own."""
    return write_mae(TRUNK)


@pytest.fixture(scope="module")
def data(tmp_path_factory, write_classes) -> Path:
    return write_classes(tmp_path_factory.mktemp("classes"))


COMMANDS = {
    "finetune": (finetune, FinetuneConfig, (*TRAINING, "data.image_size=32")),
    "linprobe": (linprobe, LinprobeConfig, TRAINING),
    "knn": (knn, KnnConfig, ("k=1",)),
    "features": (write_features, FeaturesConfig, ("picture=none",)),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_that_take_an_encoder_open_it_once(tmp_path, data, model_file, opens, command):
    run, schema, options = COMMANDS[command]
    given = [f"weights={model_file}", f"data.path={data}", f"output={tmp_path / 'run'}", *QUICK, *options]
    run(load_config(schema, None, given))
    assert opens[model_file.name] == 1


def test_a_classifier_of_an_unnamed_trunk_is_measured_from_one_read(tmp_path, data, model_file, opens):
    options = [f"weights={model_file}", f"data.path={data}", *QUICK]
    tuned = load_config(FinetuneConfig, None, [*options, *TRAINING, "data.image_size=32", f"output={tmp_path / 'ft'}"])
    finetune(tuned)
    opens.clear()
    file = tmp_path / "ft" / "classifier.safetensors"
    evaluate(load_config(EvaluateConfig, None, [f"weights={file}", *options[1:], f"output={tmp_path / 'run'}"]))
    assert opens[file.name] == 1
    assert read_encoder(file).shape == ViTSize(96, 3, 3, 4.0, 8, 1e-5, "relu")


def test_tools_open_it_once(tmp_path, data, model_file, opens):
    for tool in (
        lambda: inspect_file(model_file),
        lambda: convert_file(model_file, "official", tmp_path / "out.pth", check=True),
        lambda: reconstruct_files(model_file, [data / "val"], tmp_path / "strip.png", most=1),
    ):
        opens.clear()
        tool()
        assert opens[model_file.name] == 1
    whole = load_mae(model_file)
    assert whole.encoder.shape.trunk == TRUNK.trunk and whole.decoder.norm.eps == 1e-5


def test_a_trunk_of_ones_own_is_pretrained(tmp_path, write_images, pretrain_options):
    write_images(tmp_path / "images", 4)
    options = [*pretrain_options, f"data.path={tmp_path / 'images'}", f"output={tmp_path / 'run'}", "optim.epochs=1"]
    config = load_config(PretrainConfig, None, [*options, "model.width=96", "model.depth=2", "model.heads=6"])
    pretrain(config)
    assert read_encoder(tmp_path / "run").shape == ViTSize(96, 2, 6, 4.0, 8)
    assert describe_encoder(load_mae(sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]))["heads"] == 6
    with pytest.raises(ValueError, match=r"no named size is 96 wide.*model\.heads=N"):
        load_config(PretrainConfig, None, [*options, "model.width=96"])
