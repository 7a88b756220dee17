"""Every option of a configuration is looked at while a run runs: a stronger proof than finding its name in the code."""

from __future__ import annotations

import pytest

from mae_core.config.load import load_config
from mae_core.config.schema import Schema
from mae_core.config.sections import RunConfig
from mae_core.training.embedding import knn, write_features
from mae_core.training.evaluate import evaluate
from mae_core.training.finetune import finetune
from mae_core.training.finetune_config import FinetuneConfig
from mae_core.training.frozen_config import EvaluateConfig, FeaturesConfig, KnnConfig, LinprobeConfig
from mae_core.training.linprobe import linprobe
from mae_core.training.pretrain import pretrain
from mae_core.training.pretrain_config import PretrainConfig

pytestmark = pytest.mark.slow


def leaves(config: Schema) -> set[tuple[type, str]]:
    """(type of the section, option) of every leaf."""
    found: set[tuple[type, str]] = set()
    for name in type(config).model_fields:
        value = getattr(config, name)
        found |= leaves(value) if isinstance(value, Schema) else {(type(config), name)}
    return found


def options_not_read(config: RunConfig, run, monkeypatch) -> set[tuple[type, str]]:
    """(type of the section, option): options of ``config`` that nobody asks for while ``run(config)`` runs."""
    wanted, read = leaves(config), set()

    def watch(self: Schema, name: str):
        read.add((type(self), name))  # what the weights say of the images is filled into a copy
        return super(Schema, self).__getattribute__(name)

    with monkeypatch.context() as patch:
        patch.setattr(Schema, "__getattribute__", watch, raising=False)
        run(config)
    return wanted - read


def names(options: set[tuple[type, str]]) -> set[str]:
    return {name for _, name in options}


@pytest.mark.extra("peft")
def test_a_pretraining_reads_every_option(
    tmp_path, write_images, write_classes, pretrain_options, pretrained, monkeypatch
):
    write_images(tmp_path / "images", 6)
    labelled = write_classes(tmp_path / "labelled", train=2, val=1)
    watched = ["watch.share=0.3", f"watch.labelled={labelled}", "watch.neighbours=3"]
    watched += ["watch.probes=[linear]", "watch.probe_epochs=1", "target.kind=pixels"]
    unread = []
    warm = [f"weights={pretrained}", "adapt.mode=lora"]
    taught = [f"distill.teacher={pretrained}"]
    for name, more in {"plain": [], "watched": watched, "warm": warm, "taught": taught}.items():
        places = [f"data.path={tmp_path / 'images'}", f"output={tmp_path / name}"]
        config = load_config(PretrainConfig, None, [*pretrain_options, *places, "optim.epochs=1", *more])
        unread.append(options_not_read(config, pretrain, monkeypatch))
    of_other_targets = {"pca", "tokenizer", "tokenizer_image_size"}  # of files, which test_target_files.py trains on
    assert names(set.intersection(*unread)) == of_other_targets


def test_a_finetuning_reads_every_option(tmp_path, write_classes, pretrained, monkeypatch):
    data = write_classes(tmp_path / "data", train=2, val=1)
    options = ["data.image_size=32", "data.workers=0", "device=cpu", "optim.epochs=1", "optim.batch_size=2"]
    starts = {
        "scratch": ["from_scratch=true", "model.size=nano", "model.patch_size=16"],
        "encoder": [f"weights={pretrained}", "model.size=nano"],
    }
    unread = []
    for name, start in starts.items():
        places = [f"data.path={data}", f"output={tmp_path / name}"]
        config = load_config(FinetuneConfig, None, [*options, *start, *places])
        unread.append(options_not_read(config, finetune, monkeypatch))
    # from_scratch is what the schema checks weights=FILE against; a run looks at the weights.
    # pictures_every has nothing to draw in a classification.
    assert names(set.intersection(*unread)) <= {"from_scratch", "pictures_every"}


@pytest.mark.extra("sklearn")
@pytest.mark.parametrize(
    "schema, action, folder, more",
    [
        (LinprobeConfig, linprobe, "", ["optim.epochs=1", "optim.batch_size=2"]),
        (KnnConfig, knn, "", ["k=[3]"]),
        (FeaturesConfig, write_features, "val", []),
        (FeaturesConfig, write_features, "val", ["picture=tsne"]),
        (EvaluateConfig, evaluate, "val", []),
    ],
)
def test_a_measurement_reads_every_option(
    tmp_path, write_classes, pretrained, monkeypatch, schema, action, folder, more
):
    data = write_classes(tmp_path / "data", train=2, val=2)
    weights = pretrained
    if schema is EvaluateConfig:
        probe = [f"weights={pretrained}", f"data.path={data}", f"output={tmp_path / 'probe'}", "data.workers=0"]
        linprobe(load_config(LinprobeConfig, None, [*probe, "device=cpu", "optim.epochs=1", "optim.batch_size=2"]))
        weights = tmp_path / "probe"
    options = [f"weights={weights}", f"data.path={data / folder}", f"output={tmp_path / 'run'}", "device=cpu"]
    # What the weights say of the images would be filled into a copy of the section, which nobody watches.
    config = load_config(schema, None, [*options, "data.workers=0", "data.image_size=32", *more])
    # Nothing to draw in a probe; the weights say their statistics; queries are an attentive probe's; the seed of
    # features is t-SNE's.
    allowed = {"pictures_every", "statistics", "queries"} | (
        {"seed"} if schema is FeaturesConfig and not more else set()
    )
    assert names(options_not_read(config, action, monkeypatch)) <= allowed
