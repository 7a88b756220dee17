"""``mae replay DUMP``: a step whose numbers were not finite, done again on its images with its seeds and weights."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import Dataset

from mae_core.config.load import load_config
from mae_core.data import labelled, unlabelled
from mae_core.data.sources import open_source
from mae_core.errors import UserError
from mae_core.layout import CHECKPOINTS, MODEL
from mae_core.masking import SampleMasks
from mae_core.patches import as_pair
from mae_core.training.culprit import Replay, read_dump, replay_step, same_number
from mae_core.training.distributed import device_of
from mae_core.training.loop import LossOf, backward, seed_everything
from mae_core.training.precision import choose_precision, prepare_process
from mae_core.weights.files import read_weights


class Scene(NamedTuple):
    """What a training computes a step with: the model, images by place, how they become a batch, and the losses."""

    model: nn.Module
    images: Dataset[Any]
    collate: Callable[[list[Any]], Any]
    loss_of: LossOf


def _pretraining(text: Path) -> tuple[Any, Scene]:
    from mae_core.training.adapting import Adapted
    from mae_core.training.pretrain import build_pretrain_model, pretrain_loss
    from mae_core.training.pretrain_config import PretrainConfig
    from mae_core.training.warm_start import started_from
    from mae_core.training.watch import split_images

    config = load_config(PretrainConfig, text)
    config, start = started_from(config, resume=True)
    model = build_pretrain_model(config, start)
    Adapted(model, config.adapt)
    training = split_images(config, open_source(config.data)).training
    images = unlabelled.UnlabelledImages(training, config.data, config.seed)
    images.masks = SampleMasks(model.masker, model.encoder.grid)
    return config, Scene(model, images, unlabelled.collate, pretrain_loss)


def _finetuning(text: Path) -> tuple[Any, Scene]:
    from mae_core.training.classification import read_splits
    from mae_core.training.finetune import build_model, finetune_loss
    from mae_core.training.finetune_config import FinetuneConfig

    config = load_config(FinetuneConfig, text)
    splits = read_splits(config.data)
    model, _, statistics = build_model(config, len(splits.classes))
    size = as_pair(config.data.image_size)
    images = labelled.TrainImages(splits.train, config.data, size, statistics, config.seed)
    return config, Scene(model, images, labelled.collate, finetune_loss(config, len(splits.classes)))


SCENES: dict[str, Callable[[Path], tuple[Any, Scene]]] = {
    "PretrainConfig": _pretraining,
    "FinetuneConfig": _finetuning,
}
"""Class of the configuration in a dump -> what its training computes a step with."""


def replay(path: Path, say: Callable[[str], None] = print) -> bool:
    """Do the step of a dump again and say what it shows; whether the numbers are those of the dump.

    Raises ``UserError`` where the dump, the run's checkpoint of that step, or its images are not there any more.
    """
    dump = read_dump(path)
    if dump["kind"] not in SCENES:
        raise UserError(f"{path} is of another training ({dump['kind']}); replayed are pre-training and fine-tuning")
    checkpoint = path.absolute().parents[1] / CHECKPOINTS / f"step_{dump['step']:08d}" / MODEL
    if not checkpoint.is_file():
        raise UserError(f"{checkpoint} is gone, with whose weights the step is done again; nothing can be replayed")
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "config.yaml")
        text.write_text(dump["config"], encoding="utf-8")
        config, scene = SCENES[dump["kind"]](text)
    number, rank = next(
        ((n, rank) for n, rank in enumerate(dump["ranks"]) if rank.get("forward") or rank.get("backward")),
        (0, dump["ranks"][0]),
    )
    device = device_of("cpu" if config.device == "cpu" else "auto")  # what a GPU has dumped, where there is none too
    prepare_process(device, config.precision)
    scene.model.load_state_dict(read_weights(checkpoint)[0])
    scene.model.to(device).train()
    again = _step(scene, rank, config, device)
    say(f"step {dump['step']}, rank {number}, {len(rank['places'])} images: {', '.join(rank['files'][:8])}")
    say(f"losses {again.losses}, gradient norm {again.norm}; {again}")
    then: dict[str, float] = rank.get("losses") or {}
    same = again.forward == rank.get("forward") and again.backward == rank.get("backward")
    same = same and all(same_number(again.losses.get(name, 0.0), value) for name, value in then.items())
    say("as in the run" if same else f"otherwise than in the run, where {_said_then(rank)}")
    return same


def _step(scene: Scene, rank: dict[str, Any], config: Any, device: torch.device) -> Replay:
    batch = scene.collate([scene.images[tuple(place)] for place in rank["places"]])
    precision = choose_precision(config.precision, device).autocast(device)

    def compute(model: nn.Module) -> Any:
        seed_everything(rank["seed"])
        return backward(model, batch, scene.loss_of, device, precision, config.optim.micro_batch)

    return replay_step(scene.model, compute)


def _said_then(rank: dict[str, Any]) -> str:
    if rank.get("error"):
        return f"it could not be replayed ({rank['error']})"
    return f"losses {rank['losses']}, gradient norm {rank['norm']}; {Replay(**{k: rank[k] for k in Replay._fields})}"
