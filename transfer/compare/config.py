"""Configuration of ``mae compare``: which encoders, on which tasks, with which budget."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field, field_validator, model_validator

from mae_core.config.schema import Count, Schema, Size, row_of
from transfer.compare.kinds import KINDS

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, lt=1)]
MADE_BY = ("mae pretrain", "mae finetune")
"""Commands whose run can be an encoder."""


def file_name(name: str) -> str:
    """A name as a part of a file's name."""
    return re.sub(r"[^\w.-]+", "_", name)


def named_twice(names: Iterable[str]) -> str | None:
    """The first of ``names`` that another one, or its file, is called like."""
    seen: set[str] = set()
    for name in names:
        if file_name(name).lower() in seen:
            return name
        seen.add(file_name(name).lower())
    return None


class EncoderSpec(Schema):
    """One of the encoders: a file, the run of a command, or random numbers."""

    name: Annotated[str, Field(min_length=1)] = Field(description="as it is called in the report")
    weights: Path | None = Field(None, description="a weights file of any known format, or a run")
    command: str | None = Field(
        None, description="a mae pretrain or mae finetune command without output=, whose run is the encoder"
    )
    scratch: bool = Field(False, description="random: trained from scratch, and read frozen as it is")
    trunk: str | None = Field(None, description="timm:NAME, the network of weights that is another than this toolkit's")
    like: str | None = Field(
        None, description="scratch: the encoder whose size it has; empty: the first that has weights"
    )
    licence: str | None = Field(None, description="of the weights; empty: as the catalogue or the file says")
    options: tuple[str, ...] = Field((), description="options of every mae command that takes this encoder")

    @model_validator(mode="after")
    def _one_source(self) -> EncoderSpec:
        given = [word for word in ("weights", "command", "scratch") if getattr(self, word)]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise ValueError(f"give one of weights, command and scratch: true for encoder {self.name!r}, not {found}")
        if self.like is not None and not self.scratch:
            raise ValueError(f"like applies only to scratch: true; leave it out of encoder {self.name!r}")
        return self

    @field_validator("command")
    @classmethod
    def _makes_an_encoder(cls, command: str | None) -> str | None:
        if command is not None and not command.startswith(MADE_BY):
            raise ValueError(f"write a command that begins with {' or '.join(MADE_BY)}")
        if command is not None and re.search(r"(^|\s)(output=|--resume)", command):
            raise ValueError("leave output= and --resume out; the comparison chooses the folder and continues the run")
        return command


class TaskSpec(Schema):
    """One of the tasks: a kind of training on a labelled set."""

    kind: Annotated[str, row_of(KINDS)] = Field(description="what is done with the encoder")
    name: str | None = Field(None, description="as it is called in the report; empty: the kind")
    data: Path = Field(description="the labelled set, in the layout of the kind")
    recipe: str | None = Field(None, description="a recipe's name or file; empty: the one for small data")
    options: tuple[str, ...] = Field((), description="key=value options of the command, the same for every encoder")
    steps: Count | None = Field(None, description="optimizer steps of every training; empty: those of the comparison")
    encoders: tuple[str, ...] = Field((), description="names of the encoders that take part; empty: all")

    @property
    def title(self) -> str:
        """Its name, or its kind."""
        return self.name or self.kind


class CompareConfig(Schema):
    """``mae compare``."""

    recipes: ClassVar[str] = "compare"
    title: str = Field("Which encoder?", description="of the report")
    output: Path = Field(Path("runs/compare"), description="folder of all trainings and of the report")
    encoders: tuple[EncoderSpec, ...] = Field((), description="a list of encoders")
    tasks: tuple[TaskSpec, ...] = Field((), description="a list of tasks")
    seeds: Count = Field(3, description="final trainings of every encoder on every task")
    steps: Count = Field(300, description="optimizer steps of every training")
    rates: tuple[Positive, ...] = Field(
        (0.5, 1.0, 2.0), description="the grid: multiples of the recipe's learning rate, tried for every encoder"
    )
    layer_decays: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        (1.0, 0.75), description="the grid: layer decays, where all of an encoder learns"
    )
    holdout: Share = Field(0.25, description="share of the training labels that the grid is scored on")
    labels: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        (1.0,), description="shares of the training labels; the seed draws them"
    )
    image_size: Size | None = Field(None, description="at which FLOPs and images/s are measured; empty: the file's own")
    jobs: Count = Field(1, description="trainings at once, each a process")

    @model_validator(mode="after")
    def _lists_are_filled(self) -> CompareConfig:
        for name in ("encoders", "tasks", "rates", "layer_decays", "labels"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; give at least one entry")
        return self

    @model_validator(mode="after")
    def _names_are_distinct(self) -> CompareConfig:
        known = [encoder.name for encoder in self.encoders]
        titles = [task.title for task in self.tasks]
        for what, names in (("encoders", known), ("tasks", titles)):
            if (twice := named_twice(names)) is not None:
                raise ValueError(f"two {what} are called {twice!r}; give each a name of its own")
        wanted = [(f"task {task.title!r}", name) for task in self.tasks for name in task.encoders]
        wanted += [(f"like of encoder {each.name!r}", each.like) for each in self.encoders if each.like is not None]
        for where, name in wanted:
            if name not in known:
                raise ValueError(f"{where} names encoder {name!r}; the encoders are {', '.join(known)}")
        return self

    def encoders_of(self, task: TaskSpec) -> list[EncoderSpec]:
        """The encoders that take part in a task."""
        return [encoder for encoder in self.encoders if not task.encoders or encoder.name in task.encoders]
