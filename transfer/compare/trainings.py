"""The trainings of a comparison: the command of each, which ones the grid needs, and their scores as they finish.

A training's folder and its score are named by its command, so that another budget is another training, and what is
finished stays finished.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from pkgutil import resolve_name
from statistics import fmean
from typing import Any, NamedTuple

from mae_core.atomic import write_json
from mae_core.config.load import load_config, named_config, read_layers
from mae_core.config.recipes import find_recipe
from mae_core.errors import UserError, naming
from mae_core.layout import METRICS
from transfer.chain import Job, Stage
from transfer.compare import labelled_sets
from transfer.compare.config import CompareConfig, TaskSpec, file_name
from transfer.compare.encoders import Encoder
from transfer.compare.kinds import KINDS, NEIGHBOURS, Kind
from transfer.compare.labelled_sets import LabelledSet
from transfer.segmentation.config import RECIPES

WARMUP_SHARE = 0.1
NEVER = 10**9
NOT_FINITE = "not finite"
"""In the message of a training that a rate too high has ended."""


class Choice(NamedTuple):
    """One point of the grid: a multiple of the recipe's learning rate, and the layer decay."""

    rate: float = 1.0
    decay: float = 1.0


@dataclass(frozen=True)
class Training:
    """A command without its output folder; ``subset`` is what it trains on, where that is not the whole set, ``recipe``
    the text of its recipe: one that was edited is another training."""

    label: str
    words: tuple[str, ...]
    subset: Subset | None = None
    recipe: str = ""

    @property
    def key(self) -> str:
        """The name of its files: readable, and unique to its command."""
        return (
            f"{file_name(self.label)}-{hashlib.sha256(' '.join([*self.words, self.recipe]).encode()).hexdigest()[:8]}"
        )


@dataclass(frozen=True)
class Subset:
    """Some of the training images of a set, written to ``folder`` when a training needs it."""

    folder: Path
    labelled: LabelledSet
    train: tuple[Any, ...]
    scored: tuple[Any, ...] | None

    def write(self) -> None:
        """Write it, where it was not."""
        if not self.folder.is_dir():
            self.labelled.write(self.folder, self.train, self.scored)


@dataclass(frozen=True)
class Task:
    """A task of the configuration with what its recipe and its data say."""

    spec: TaskSpec
    config: CompareConfig

    @property
    def kind(self) -> Kind:
        """Its row of ``KINDS``."""
        return KINDS[self.spec.kind]

    @cached_property
    def labelled(self) -> LabelledSet:
        """Its data."""
        layout: type[LabelledSet] = getattr(labelled_sets, self.kind.layout)
        return layout(self.spec.data)

    @cached_property
    def orders(self) -> dict[int, list[Any]]:
        """Seed -> all training images in its order. Raises ``UserError`` where there are too few."""
        with naming(f"task {self.spec.title!r}"):
            found = {seed: self.labelled.order(seed) for seed in range(self.config.seeds)}
        if len(found[0]) < 2:
            raise UserError(
                f"task {self.spec.title!r}: {self.spec.data} has {len(found[0])} labelled training images; two or more "
                "are needed"
            )
        return found

    @property
    def recipe(self) -> str | None:
        """The recipe as the command takes it."""
        return self.spec.recipe or self.kind.recipe

    @cached_property
    def recipe_text(self) -> str:
        """What the recipe says, with those it builds on."""
        if self.recipe is None:
            return ""
        if not self.kind.schema:
            return find_recipe(self.recipe, RECIPES).read_text(encoding="utf-8")
        schema: Any = resolve_name(self.kind.schema)
        with naming(f"task {self.spec.title!r}"):
            return json.dumps([*read_layers(named_config(schema, self.recipe)).values()], default=str)

    @property
    def steps(self) -> int:
        """Of every training."""
        return self.spec.steps or self.config.steps

    @cached_property
    def base(self) -> tuple[float, int]:
        """(learning rate, batch size) of the recipe with the task's options. Raises ``UserError`` where these do not
        validate."""
        if not self.kind.schema:
            from transfer.segmentation.train_net import prepare

            recipe = find_recipe(str(self.recipe), RECIPES)
            options = prepare(recipe, None).parse_options(self.spec.options)
            from transfer.segmentation.engine_mmseg.options import read_config

            read = read_config(recipe, options)
            return float(read.optim_wrapper["optimizer"]["lr"]), int(read.train_dataloader["batch_size"])
        scratch = any(option.startswith("model.init=") for option in self.spec.options)  # which is for nothing else
        optim = self.validate(["from_scratch=true"] if scratch else ["weights=encoder.safetensors"])
        return optim.base_lr, optim.batch_size

    def validate(self, words: Sequence[str]) -> Any:
        """The ``optim`` section of the command's configuration. Raises ``UserError`` naming the task."""
        schema: Any = resolve_name(self.kind.schema)
        with naming(f"task {self.spec.title!r}"):
            config = load_config(schema, self.recipe, [*self.kind.more, *self.spec.options, *words])
        return getattr(config, "optim", None)

    def grid(self) -> tuple[Choice, ...]:
        """The points that differ: layers that do not learn have no decay, and what is not trained has no rate."""
        if not self.kind.trains:
            return (Choice(),)
        stays = any(option.endswith("trainable_blocks=0") for option in self.spec.options)
        decays = (1.0,) if self.kind.frozen or stays else self.config.layer_decays
        return tuple(Choice(*point) for point in dict.fromkeys(product(self.config.rates, decays)))

    def seeds(self, share: float) -> range:
        """Of the final trainings; k-NN of all labels has nothing random."""
        return range(self.config.seeds if self.kind.trains or share < 1 else 1)

    def images(self, share: float, seed: int) -> list[Any]:
        """The labelled images of a share: a prefix of the seed's order."""
        order = self.orders[seed]
        return order[: max(2, round(share * len(order)))]

    def training(self, encoder: Encoder, share: float, seed: int, choice: Choice, *, held_out: bool) -> Training:
        """The training of an encoder on a share of the labels, with some of these held out to be scored on, or scored
        on the validation set."""
        images = self.images(share, seed)
        scored: tuple[Any, ...] | None = None
        if held_out:
            kept = max(1, round(self.config.holdout * len(images)))
            images, scored = images[:-kept], tuple(images[-kept:])
        subset = None
        if share < 1 or held_out:
            part = f"{share:g}_seed_{seed}" + (f"_held_out_{len(scored)}" if scored else "")
            folder = self.config.output.resolve() / "subsets" / file_name(self.spec.title) / part
            subset = Subset(folder, self.labelled, tuple(images), scored)
        words = [*self.kind.command, *([str(self.recipe)] if self.recipe else []), *self.kind.more, *self.spec.options]
        words += self.labelled.words(None if subset is None else subset.folder)
        words += self.budget(len(images), choice, seed) + encoder.words(self.kind)
        of_labels = "" if share == 1 else f" {share:.0%} of the labels"
        point = f" rate {choice.rate:g} decay {choice.decay:g}" if held_out else f" seed {seed}"
        label = f"{self.spec.title} {encoder.name}{of_labels}{point}"
        return Training(label, tuple(words), subset, self.recipe_text)

    def budget(self, images: int, choice: Choice, seed: int) -> list[str]:
        """Steps, rate, decay and seed in the words of the command."""
        if not self.kind.trains:
            stated = any(word.startswith("k=") for word in self.spec.options)
            return [] if stated else [f"k=[{min(NEIGHBOURS, images)}]"]
        lr, batch = self.base
        if not self.kind.schema:
            return [
                *(f"iterations={self.steps}", f"seed={seed}", f"optim_wrapper.optimizer.lr={lr * choice.rate!r}"),
                f"optim_wrapper.paramwise_cfg.layer_decay_rate={choice.decay!r}",
            ]
        epochs = self.steps * batch / images
        words = [f"optim.epochs={epochs!r}", f"optim.warmup_epochs={WARMUP_SHARE * epochs!r}", f"seed={seed}"]
        words += [f"optim.base_lr={lr * choice.rate!r}"]
        if not self.kind.frozen:
            words.append(f"optim.layer_decay={choice.decay!r}")
        return words if self.spec.kind == "detection" else [*words, f"evaluate_every={NEVER}"]


@dataclass
class Trainings:
    """Runs trainings in a folder, and knows those that are finished.

    ``results``: key -> score, None with the reason of one whose numbers were no longer finite, and seconds.
    """

    folder: Path
    jobs: int
    threads: int
    results: dict[str, dict[str, Any]] = field(default_factory=dict)

    def file(self, training: Training) -> Path:
        """Where its score is."""
        return self.folder / "scores" / f"{training.key}.json"

    def run_folder(self, training: Training) -> Path:
        """Its run directory."""
        return self.folder / "runs" / training.key

    def finished(self, training: Training) -> dict[str, Any] | None:
        """Its result; None where it is not finished."""
        if training.key not in self.results:
            if not self.file(training).is_file():
                return None
            self.results[training.key] = dict(json.loads(self.file(training).read_text(encoding="utf-8")))
        return self.results[training.key]

    def job(self, training: Training) -> Job:
        """The command as the chain runs it."""
        run = self.run_folder(training)
        return Job(training.key, [*training.words, f"output={run}"], run)

    def stage(self, tolerated: str = "") -> Stage:
        """What runs commands, in the user's folder."""
        return Stage(self.folder, parallel=self.jobs, threads=self.threads, place=Path.cwd(), tolerated=tolerated)

    def run(self, trainings: Sequence[tuple[Training, Kind]], *, keep: bool, tolerant: bool = False) -> list[Any]:
        """The results of trainings, of which those that are not finished are run now. ``keep``: their run directories
        stay. ``tolerant``: one whose numbers are no longer finite has a score of None."""
        left = {training.key: (training, kind) for training, kind in trainings if self.finished(training) is None}
        for training, _ in left.values():
            if training.subset is not None:
                training.subset.write()
        stage = self.stage(tolerated=NOT_FINITE if tolerant else "")

        def note(job: Job, failure: str) -> None:
            self._note(*left[job.name], failure, stage.seconds.get(job.name), keep=keep)

        stage.on_finish = note
        stage.run([self.job(training) for training, _ in left.values()])
        return [self.finished(training) for training, _ in trainings]

    def _note(self, training: Training, kind: Kind, failure: str, seconds: float | None, *, keep: bool) -> None:
        run = self.run_folder(training)
        found: dict[str, Any] = {"score": None, "reason": failure}
        if not failure:
            metrics: Mapping[str, Any] = json.loads((run / METRICS).read_text(encoding="utf-8"))
            found = {"score": round(kind.score(metrics), 4)}
        found |= {"seconds": seconds and round(seconds, 1), "label": training.label, "command": list(training.words)}
        write_json(self.file(training), found)
        if not keep:
            shutil.rmtree(run, ignore_errors=True)

    def mean_seconds(self, trainings: Sequence[Training]) -> float | None:
        """Of those that are finished; None where none is."""
        results = [self.finished(training) for training in trainings]
        known = [entry["seconds"] for entry in results if entry is not None and entry["seconds"] is not None]
        return fmean(known) if known else None
