"""The weights of a trunk of timm: a file in timm's names, or in those of the model's own project, which timm converts.

A file of ours says its trunk itself; of any other ``model.trunk=timm:NAME`` says it.
"""

from __future__ import annotations

import contextlib
import fnmatch
import inspect
import io
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.models import model_entrypoint
from torch import Tensor

from mae_core.errors import UserError, naming
from mae_core.layout import EXPORT_CONFIG
from mae_core.models.sizes import Pooling, ViTSize
from mae_core.models.timm_trunk import TimmTrunk, bare_name, build_timm, described
from mae_core.patches import as_pair
from mae_core.weights.encoder_file import HEADS, Adapted, EncoderFile, EncoderInfo, read_json_beside
from mae_core.weights.files import WeightsFile, read_file
from mae_core.weights.formats import WRAPPERS
from mae_core.weights.report import LoadReport
from mae_core.weights.wrappers import ASKED_IN_CONFIG, position_of, short_names

STEM = "patch_embed.proj.weight"
SHARED_TABLE = "rel_pos_bias.relative_position_bias_table"
"""BEiT's table of relative positions while it is pre-trained; each block gets a copy when it is fine-tuned."""
UNUSED = {
    **dict.fromkeys((f"{head}*" for head in HEADS), "a classifier's head"),
    "attn_pool.*": "attention pooling, which this pooling does not use",
    "*rope*": "computed from the image's size",
    "*relative_position_index": "computed from the image's size",
    "mask_token": "for pre-training only",
}
"""Patterns of names, in the file or after timm's conversion -> why the trunk does not take them."""
LEFT_OUT = "timm's conversion leaves it out"
TOLD_APART = {
    "register tokens": ("reg_token", "register_tokens", "storage_tokens"),
    "distillation tokens": ("dist_token",),
    "learned positions": ("pos_embed", "positional_embedding"),
    "relative positions": ("relative_position_bias_table", "rel_pos_h"),
    "class tokens": ("cls_token", "class_embedding"),
    "layer scale factors": ("gamma", "gamma_1", "gamma_2"),
}
"""What one ViT has and another has not -> how names of it end."""


@dataclass(frozen=True)
class TimmFile(EncoderFile):
    """As ``EncoderFile``, for a trunk of timm: ``tensors`` are under the names of the file without wrappers' prefixes,
    and are converted when the model that takes them is known."""

    @property
    def trunk(self) -> str:
        """``timm:NAME``."""
        return str(self.info.timm)

    @property
    def shape(self) -> ViTSize:
        """Raises ``UserError``: what asks for it builds the toolkit's own ViT."""
        raise self.refusal()

    def refusal(self) -> UserError:
        """For what needs the toolkit's own ViT."""
        return UserError(
            f"{self.path} is read as {self.trunk}, and this needs the toolkit's own ViT; give an encoder of mae "
            "pretrain, or use mae finetune, linprobe, knn, features, detect or segment, which take any trunk"
        )

    @property
    def size(self) -> str:
        """``timm:NAME``."""
        return self.trunk

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels: the name's, or the one that was asked for."""
        return int(self.info.patch_size or described(self.trunk).patch_size)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) it was trained at, as the file says, else the name."""
        if self.info.image_size:
            return as_pair(self.info.image_size)
        found = described(self.trunk)
        height, width = found.image_size
        return height // found.patch_size * self.patch_size, width // found.patch_size * self.patch_size

    @property
    def has_norm(self) -> bool:
        """False: timm's model and the conversion place the norms."""
        return False

    @property
    def num_classes(self) -> int:
        """Classes of its head; 0 where it has none."""
        return next((len(self.tensors[f"head.{n}"]) for n in ("weight", "fc.weight") if f"head.{n}" in self.tensors), 0)

    @property
    def classifier_pooling(self) -> Pooling:
        """What its head reads."""
        stated = self.info.pooling
        return stated if stated in ("mean", "cls", "map") else described(self.trunk).pooling  # type: ignore[return-value]

    def check_pretrained(self) -> None:
        """Raises ``UserError``: masked pre-training hides patches from the toolkit's own ViT."""
        raise self.refusal()

    def check_pooling(self, pooling: Pooling | None) -> None:
        """timm's model refuses what it cannot."""

    def model_facts(self, model: Any) -> dict[str, Any]:
        """The trunk in the words of a ``model`` section."""
        facts = {"trunk": self.trunk, "patch_size": self.patch_size}
        return {name: facts[name] for name in facts if getattr(model, name, None) is not None or name == "trunk"}

    def model_defaults(self, model: Any) -> dict[str, Any]:
        """What holds where the user said nothing: the pooling that timm's model has."""
        return {"pooling": described(self.trunk).pooling} if hasattr(model, "pooling") else {}

    def build(self, image_size: int | Sequence[int] | None = None, **options: Any) -> TimmTrunk:
        """timm's model, newly initialised, for images of ``image_size``; see ``build_timm``."""
        size = self.image_size if image_size is None else image_size
        return build_timm(self.trunk, image_size=size, patch_size=self.patch_size, in_chans=self.in_chans, **options)

    def adapted(self, trunk: Any, grid: tuple[int, int], rename: Mapping[str, str]) -> Adapted:
        """The tensors in the names and sizes of ``trunk``, by timm's own conversion. Raises ``UserError`` where the
        file is of another model."""
        wanted = trunk.state_dict()
        before = self.report
        report = LoadReport(before.path, unused={**before.unused}, notes=[*before.notes])
        state, sources = dict(self.tensors), {name: [name] for name in self.tensors}
        self._share_table(state, sources, wanted, report)
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # timm prints what it tries
                converted = _convert(self.trunk, dict(state), trunk)
        except Exception as error:  # on another model's tensors the conversion fails in every way there is
            self._check_kind(state, trunk)
            raise UserError(f"{self.path} does not fit {self.trunk}: timm's conversion failed ({error})") from None
        self._check_kind(converted, trunk)
        origin = _origins(self.trunk, state, converted, trunk)
        for old, new in (("norm", "fc_norm"), ("fc_norm", "norm")):
            if f"{new}.weight" in wanted and f"{new}.weight" not in converted and f"{old}.weight" not in wanted:
                moved = [part for part in ("weight", "bias") if f"{old}.{part}" in converted]
                for part in moved:
                    converted[f"{new}.{part}"] = converted.pop(f"{old}.{part}")
                    origin[f"{new}.{part}"] = origin.pop(f"{old}.{part}")
                if moved:
                    after = "of the pooled tokens" if new == "fc_norm" else "of every token"
                    report.notes.append(f"the file's {old} is the norm {after} here ({new})")
        names = {name: [s for each in origin[name] for s in self.names[sources[each][0]]] for name in converted}
        for name, tensor in converted.items():
            given = state[origin[name][0]] if len(origin[name]) == 1 else tensor
            if given.shape != tensor.shape and given.ndim == tensor.ndim:
                report.resized[rename.get(name, name)] = f"{tuple(given.shape)} -> {tuple(tensor.shape)}"
        used = {part for parts in origin.values() for part in parts}
        for name in state.keys() - used:
            why = next((w for p, w in UNUSED.items() if fnmatch.fnmatchcase(name, p)), LEFT_OUT)
            report.unused.update(dict.fromkeys(self.names[sources[name][0]], why))
        remedy = f"it is not a file of {self.trunk}: give the name it was trained with, model.trunk=timm:NAME"
        return Adapted(converted, names, report, UNUSED, remedy)

    def _share_table(
        self,
        state: dict[str, Tensor],
        sources: dict[str, list[str]],
        wanted: Mapping[str, Tensor],
        report: LoadReport,
    ) -> None:
        """Give every block its copy of BEiT's shared table, as BEiT's own fine-tuning does."""
        tables = [name for name in wanted if name.endswith(".attn.relative_position_bias_table")]
        if SHARED_TABLE in state and SHARED_TABLE not in wanted and tables:
            shared = state.pop(SHARED_TABLE)
            state.update({name: shared.clone() for name in tables})
            sources.update({name: [SHARED_TABLE] for name in tables})
            report.notes.append(f"{SHARED_TABLE}, which all blocks share, was copied to each of {len(tables)} blocks")

    def _check_kind(self, found: Collection[str], trunk: Any) -> None:
        wanted, rotary = trunk.state_dict(), getattr(trunk, "rope", None) is not None
        for what, endings in TOLD_APART.items():
            has, needs = (any(name.rpartition(".")[2] in endings for name in names) for names in (found, wanted))
            if has != needs:
                theirs = f"{'has' if has else 'has no'} {what}"
                none = "has rotary ones" if rotary and "positions" in what else "has none"
                ours = f"{self.trunk} {'needs them' if needs else none}"
                raise UserError(f"{self.path} {theirs}, and {ours}; name the model that it was trained as")


def _convert(trunk: str, state: dict[str, Tensor], model: TimmTrunk) -> dict[str, Tensor]:
    """timm's ``checkpoint_filter_fn`` of the module that the name is from."""
    module = sys.modules[model_entrypoint(bare_name(trunk).split(".")[0]).__module__]
    convert = getattr(module, "checkpoint_filter_fn", None)
    if convert is None:
        return state
    options = {"adapt_layer_scale": True} if "adapt_layer_scale" in inspect.signature(convert).parameters else {}
    return dict(convert(state, model, **options))


def _origins(
    trunk: str, state: Mapping[str, Tensor], converted: Mapping[str, Tensor], model: TimmTrunk
) -> dict[str, list[str]]:
    """Name after the conversion -> the names it was made of: the same tensor, else the same name, else what a
    conversion of tensors full of their own number shows."""
    by_identity = {id(tensor): name for name, tensor in state.items()}
    origin = {name: [by_identity[id(t)]] for name, t in converted.items() if id(t) in by_identity}
    origin |= {name: [name] for name in converted if name not in origin and name in state}
    if len(origin) == len(converted):
        return origin
    order = list(state)
    with contextlib.redirect_stdout(io.StringIO()):
        marked = {name: torch.tensor(float(n)).expand(state[name].shape) for n, name in enumerate(order, start=1)}
        shown = _convert(trunk, marked, model)
    for name in converted.keys() - origin.keys():
        values = shown[name].reshape(shown[name].shape[0], -1)
        edge = torch.cat([values[0], values[:, 0]]).round().long().unique().tolist()
        origin[name] = [order[n - 1] for n in edge if 0 < n <= len(order)]
    return origin


def read_timm(
    path: Path | str,
    trunk: str,
    *,
    patch_size: int | None = None,
    named_statistics: bool = True,
    branch: str | None = None,
    asked_as: str = ASKED_IN_CONFIG,
) -> TimmFile:
    """Read the weights of ``timm:NAME``, any file that our readers take. ``branch``, ``asked_as``: which of several
    encoders, see ``choose_branch``.

    ``patch_size``: side of the patches, where it is not the name's, for which timm resizes the patch embedding.
    ``named_statistics``: the pixels' mean and std are those of the name where the file does not state them. Raises
    ``UserError`` where the file is broken, or the name is not of a plain ViT.
    """
    found = described(trunk)
    file = read_file(path)
    stated = EncoderInfo.from_metadata(file.metadata)
    if stated.timm not in (None, trunk):
        raise UserError(
            f"model.trunk={trunk} was asked for, but {file.path} is of {stated.timm}; leave model.trunk out"
        )
    if stated.timm is None:
        stated = EncoderInfo(mean=stated.mean, std=stated.std)
    report = LoadReport(str(file.path), notes=list(file.notes))
    with naming(file.path):
        tensors, names = _chosen(file, report, branch, asked_as)
    beside = (read_json_beside(file.path, EXPORT_CONFIG) or {}).get("pretrained_cfg") or {}
    stem = next((t for name, t in tensors.items() if name.endswith(STEM) and t.ndim == 4), None)
    channels = 3 if stem is None else stem.shape[1]
    fallback = (found.mean, found.std) if named_statistics and channels == len(found.mean) else (None, None)
    info = stated.with_facts(
        timm=trunk,
        patch_size=stated.patch_size or patch_size or found.patch_size,
        in_chans=channels,
        image_size=stated.image_size,
        mean=stated.mean or beside.get("mean") or fallback[0],
        std=stated.std or beside.get("std") or fallback[1],
    )
    return TimmFile(file.path, info, tensors, names, report)


def _chosen(
    file: WeightsFile, report: LoadReport, branch: str | None, asked_as: str
) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """The tensors of the trunk that is meant, without the prefix of wrappers, and what they are called in the file;
    what else there is goes to ``report``."""
    found: list[tuple[tuple[str, ...], str, dict[str, Tensor]]] = []
    for keys, state in (file.branches or {(): file.state}).items():
        stems = [name.removesuffix(STEM) for name in state if name.endswith(STEM)]
        wrapped = [stem for stem in stems if stem and {*stem.rstrip(".").split(".")} <= {*WRAPPERS, "net"}]
        found += [((*keys, *prefix.rstrip(".").split(".")), prefix, state) for prefix in wrapped] or [(keys, "", state)]
    paths = [tuple(word for word in words if word) for words, _, _ in found]
    number = position_of(branch, short_names(paths), paths, asked_as)
    _, prefix, state = found[number]
    if prefix:
        report.notes.append(f"removed the prefix {prefix!r} from the trunk's names")
    report.unused.update({name: "it lies beside the trunk" for name in state if not name.startswith(prefix)})
    names = {name.removeprefix(prefix): [name] for name in state if name.startswith(prefix)}
    return {name: state[theirs[0]] for name, theirs in names.items()}, names
