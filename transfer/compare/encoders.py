"""The encoders of a comparison: what their files are, and the options by which a command takes each."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mae_core.errors import UserError
from mae_core.layout import CLASSIFIER, ENCODER
from mae_core.models.encoder import ViTEncoder
from mae_core.models.sizes import SIZES, ViTSize
from mae_core.weights.catalogue import CATALOGUE
from mae_core.weights.encoder_file import EncoderInfo
from mae_core.weights.files import write_weights
from mae_core.weights.load import read_encoder
from transfer.chain import Job
from transfer.compare.config import CompareConfig, EncoderSpec, file_name
from transfer.compare.kinds import Kind


@dataclass(frozen=True)
class Encoder:
    """An encoder of the configuration.

    file      its weights; None: from scratch
    shape     its trunk; None where the recipe says it, or timm
    trunk     ``timm:NAME``, as the configuration or the file says
    random    the file with random weights, which what reads it frozen takes in place of ``from_scratch=true``
    like      the file whose facts ``random`` has
    """

    spec: EncoderSpec
    file: Path | None
    shape: ViTSize | None
    trunk: str | None = None
    random: Path | None = None
    like: Path | None = None

    @property
    def name(self) -> str:
        """As it is called in the report."""
        return self.spec.name

    def words(self, kind: Kind) -> list[str]:
        """The options of a command of ``kind`` that trains on this encoder."""
        frozen_file = self.file or self.random
        if kind.frozen and frozen_file is None:
            raise UserError(
                f"encoder {self.name!r} is read frozen, and no encoder with weights tells its size; give one, or list "
                "the others under encoders of the task"
            )
        start = frozen_file if kind.frozen else self.file
        words = ["from_scratch=true" if start is None else f"weights={start}"]
        if self.trunk is not None:
            words.append(f"{'model.' if kind.schema else ''}trunk={self.trunk}")
        elif self.shape is not None and not kind.frozen:
            words += size_words(self.shape) if kind.schema else mmseg_words(self.name, self.shape)
        return [*words, *self.spec.options]


def size_words(shape: ViTSize) -> list[str]:
    """A trunk as options of a ``model`` section: by its name where it has one."""
    if shape.name in SIZES:
        return [f"model.size={shape.name}", f"model.patch_size={shape.patch_size}"]
    numbers = ("width", "depth", "heads", "mlp_ratio", "patch_size")
    return [f"model.{name}={getattr(shape, name)}" for name in numbers]


def mmseg_words(name: str, shape: ViTSize) -> list[str]:
    """A trunk as variables of a segmentation recipe. Raises ``UserError`` for one that has no name."""
    if shape.name not in SIZES:
        raise UserError(f"encoder {name!r} is a {shape.name}; segmentation recipes take the sizes {', '.join(SIZES)}")
    return [f"size={shape.name}", f"patch_size={shape.patch_size}", f"width={shape.width}"]


class Facts(NamedTuple):
    """The trunk of a weights file (None: one of timm's), the size of its images, and what it says of itself."""

    shape: ViTSize | None
    image_size: tuple[int, int]
    info: EncoderInfo


@cache
def facts_of(path: Path, trunk: str | None) -> Facts:
    """Of a file that is read once, without its tensors; ``trunk``: ``timm:NAME``, where the file does not say so.
    Raises ``UserError`` where it holds no encoder."""
    found = read_encoder(path, trunk=trunk)
    return Facts(found.shape if found.info.timm is None else None, found.image_size, found.info)


def folder_of(config: CompareConfig, spec: EncoderSpec) -> Path:
    """Where an encoder that is made here is."""
    return config.output.resolve() / "encoders" / file_name(spec.name)


def check_files(config: CompareConfig) -> None:
    """Raise ``UserError`` where a weights file is missing or no encoder, or a command does not validate."""
    for spec in config.encoders:
        try:
            if spec.weights is not None and not spec.weights.exists():
                raise UserError(f"weights file {spec.weights} does not exist")
            if spec.weights is not None:
                facts_of(spec.weights.resolve(), spec.trunk)
            elif spec.command is not None:
                check_command(shlex.split(spec.command)[1:])
        except UserError as error:
            raise UserError(f"encoder {spec.name!r}: {error}") from None


def check_command(words: Sequence[str]) -> None:
    """Raise ``UserError`` where the options of a ``mae pretrain`` or ``mae finetune`` command do not validate."""
    from mae_core.cli.arguments import read_arguments
    from mae_core.training.finetune_config import FinetuneConfig
    from mae_core.training.pretrain_config import PretrainConfig

    verb, *rest = words
    if verb == "pretrain":
        read_arguments(PretrainConfig, rest)
        return
    found = read_arguments(FinetuneConfig, rest)
    if found.model.pooling != "cls":
        raise UserError("add model.pooling=cls to its command; a classifier on mean-pooled patches has no final norm")


def making(config: CompareConfig) -> list[Job]:
    """The commands whose runs are encoders."""
    jobs = []
    for spec in config.encoders:
        if spec.command is not None:
            run = folder_of(config, spec)
            result = ENCODER if shlex.split(spec.command)[1] == "pretrain" else CLASSIFIER
            jobs.append(Job(f"making {spec.name}", [*shlex.split(spec.command), f"output={run}"], run, result))
    return jobs


def encoders_of(config: CompareConfig) -> dict[str, Encoder]:
    """Name -> the encoder. One whose command has not run yet has no shape; one from scratch has the shape of the
    encoder that it is like, and a place for random weights."""
    found: dict[str, Encoder] = {}
    for spec in config.encoders:
        if not spec.scratch:
            file = (spec.weights or folder_of(config, spec) / ENCODER).resolve()
            known = facts_of(file, spec.trunk) if file.exists() else None
            trunk = spec.trunk or (None if known is None else known.info.timm)
            found[spec.name] = Encoder(spec, file, None if known is None else known.shape, trunk)
    own = [name for name, encoder in found.items() if encoder.trunk is None]
    for spec in config.encoders:
        if spec.scratch:
            model = None if spec.trunk else found.get(spec.like or next(iter(own), ""))
            if model is None or model.trunk is not None:
                found[spec.name] = Encoder(spec, None, None, spec.trunk if model is None else model.trunk)
            else:
                place = folder_of(config, spec) / ENCODER
                found[spec.name] = Encoder(spec, None, model.shape, random=place, like=model.file)
    return {spec.name: found[spec.name] for spec in config.encoders}


def finish_making(config: CompareConfig) -> dict[str, Encoder]:
    """``encoders_of`` after the commands have run: of their classifiers the encoders are written, and of encoders from
    scratch the random weights."""
    for spec in config.encoders:
        run = folder_of(config, spec)
        if spec.command is not None and not (run / ENCODER).is_file():
            without_head(run)
    found = encoders_of(config)
    for encoder in found.values():
        if encoder.random is not None and encoder.like is not None and not encoder.random.is_file():
            write_random(encoder.random, facts_of(encoder.like, None))
    return found


def without_head(run: Path) -> None:
    """Write the encoder of a classifier beside it."""
    source = read_encoder(run / CLASSIFIER)
    kept = {name: tensor for name, tensor in source.tensors.items() if not name.startswith("head.")}
    write_weights(run / ENCODER, kept, source.info.with_facts(classes=None, pooling=None).to_metadata())


def write_random(path: Path, like: Facts) -> None:
    """Write an encoder of the toolkit's own ViT with the facts of another and random weights."""
    assert like.shape is not None
    torch.manual_seed(0)
    model = ViTEncoder(like.shape, image_size=like.image_size, in_chans=like.info.in_chans or 3)
    facts: Mapping[str, Any] = {"mean": like.info.mean, "std": like.info.std}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_weights(path, model.state_dict(), EncoderInfo.of(model, **facts).to_metadata())


def licence_of(encoder: Encoder) -> str:
    """As the configuration, the file or the catalogue says."""
    spec = encoder.spec
    if spec.licence or encoder.file is None:
        return spec.licence or "none: random weights"
    stated = facts_of(encoder.file, spec.trunk).info.licence
    published = next((row.licence for row in CATALOGUE.values() if row.filename == encoder.file.name), None)
    return stated or published or ("made here" if spec.command else "not stated")
