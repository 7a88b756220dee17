"""Files behind prediction targets: a fitted PCA, a tokenizer of one's own, DALL-E's published encoder."""

from __future__ import annotations

import pickle
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mae_core.errors import UserError
from mae_core.layout import TOKENIZER
from mae_core.targets import TARGETS, NormalizedPixelTarget, PCATarget, Target, TokenTarget
from mae_core.tokenizers import DalleEncoder, DiscreteVAE, rebuild_tokenizer
from mae_core.training.pretrain_config import TargetConfig
from mae_core.weights.files import read_weights
from mae_core.weights.load import load_state

PCA_FORMAT, TOKENIZER_FORMAT = "mae_core pca", "mae_core tokenizer"


def load_target(options: TargetConfig, *, mean: Sequence[float], std: Sequence[float]) -> Target:
    """The target a configuration asks for. ``mean`` and ``std``: of the pixels the model gets.

    Raises ``UserError`` for a file that is missing, is something else, or goes with other pixels.
    """
    if options.kind == "normalized_pixels":
        return NormalizedPixelTarget(options.eps)
    if options.kind == "pca" and options.pca is not None:
        return load_pca(options.pca, mean=mean, std=std)
    if options.kind == "tokens" and options.tokenizer is not None:
        size = options.tokenizer_image_size
        return TokenTarget(load_tokenizer(options.tokenizer), mean=mean, std=std, image_size=size)
    return TARGETS[options.kind].named(**options.options)


def load_pca(path: Path | str, *, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> PCATarget:
    """The target of a file of ``mae fit-pca``.

    ``mean`` and ``std``, where given, must be those of the pixels it was fitted on. Raises ``UserError`` for a file
    that is missing or something else.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"PCA file {path} does not exist; write it with mae fit-pca, or set target.pca to another")
    tensors, metadata = read_weights(path)
    if metadata.get("format") != PCA_FORMAT or not {"components", "mean"} <= tensors.keys():
        raise UserError(f"{path} is not a file of mae fit-pca (format {metadata.get('format', 'not stated')!r})")
    for name, asked in (("mean", mean), ("std", std)):
        fitted = metadata.get(name)
        same = len(fitted or ()) == len(asked or ()) and np.allclose(fitted or (), asked or (), rtol=0, atol=1e-6)
        if asked is not None and not same:
            raise UserError(
                f"{path} was fitted on pixels with {name} {fitted}, but this run has {name} {list(asked)}; "
                f"fit it again with mae fit-pca, or set data.{name}"
            )
    return PCATarget(tensors["components"], tensors["mean"])


def load_tokenizer(path: Path | str) -> DiscreteVAE | DalleEncoder:
    """A tokenizer, frozen and in eval mode, of a run of ``mae train-tokenizer``, its tokenizer.safetensors, or the
    encoder of the published DALL-E dVAE.

    That encoder comes as the published ``encoder.pkl``, whose pickled modules are read without running what they say,
    or as a state dict of it. Raises ``UserError`` for anything else.
    """
    path = Path(path)
    if path.is_dir():
        path = path / TOKENIZER
    if not path.is_file():
        raise UserError(
            f"tokenizer {path} does not exist; train one with mae train-tokenizer, or set target.tokenizer to another"
        )
    if path.suffix == ".safetensors":
        state, metadata = read_weights(path)
    else:
        state, metadata = _read_dalle(path), {}
    try:
        if metadata.get("format") == TOKENIZER_FORMAT:
            tokenizer: DiscreteVAE | DalleEncoder = rebuild_tokenizer(metadata["tokenizer"])
            load_state(tokenizer, state, path, remedy="train it again")
        else:
            tokenizer = DalleEncoder.of(state)
    except (UserError, RuntimeError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path} is not a tokenizer: {reason}; give a run of mae train-tokenizer, or DALL-E's encoder.pkl"
        ) from None
    return tokenizer.requires_grad_(False).eval()


class _Inert:
    """Stands in for the classes of a pickled module: it holds the attributes and has no behaviour."""

    dump_patches = False  # torch asks a class whose stored source is not its own


DALLE_CLASSES = frozenset(
    {
        "dall_e.encoder.Encoder",
        "dall_e.encoder.EncoderBlock",
        "dall_e.utils.Conv2d",
        "torch.nn.modules.container.Sequential",
        "torch.nn.modules.activation.ReLU",
        "torch.nn.modules.pooling.MaxPool2d",
        "torch.nn.modules.linear.Identity",
    }
)
"""What the published file names; whatever else a file names is refused."""

PLAIN = {
    "collections.OrderedDict": OrderedDict,
    "torch.device": torch.device,
    "torch._utils._rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
    "torch._utils._rebuild_parameter": torch._utils._rebuild_parameter,
    "builtins.set": set,
    "__builtin__.set": set,
}


class _InertUnpickler(pickle.Unpickler):
    """For torch files of before 1.6, in which torch's restricted unpickler takes no modules."""

    def find_class(self, module: str, name: str) -> Any:
        """One of the above, and nothing else."""
        full = f"{module}.{name}"
        if full not in DALLE_CLASSES and full not in PLAIN:
            raise pickle.UnpicklingError(f"GLOBAL {full} is not allowed")
        return PLAIN.get(full, _Inert)


def _load_inert(file: Any, **options: Any) -> Any:
    return _InertUnpickler(file, **options).load()


INERT_PICKLE = SimpleNamespace(__name__="inert pickle", Unpickler=_InertUnpickler, load=_load_inert)


def _read_dalle(path: Path) -> dict[str, Tensor]:
    """Tensors by name of a pickled DALL-E encoder, or of any torch file of plain tensors."""
    try:
        if zipfile.is_zipfile(path):
            with torch.serialization.safe_globals([(_Inert, name) for name in sorted(DALLE_CLASSES)]):
                content = torch.load(path, map_location="cpu", weights_only=True)
        else:
            if tarfile.is_tarfile(path):
                raise ValueError("torch would unpack it")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", torch.serialization.SourceChangeWarning)
                content = torch.load(path, map_location="cpu", pickle_module=INERT_PICKLE, weights_only=False)
    except Exception as error:  # on foreign bytes an unpickler fails in every way there is
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error).upper():
            raise UserError(
                f"{path} holds objects other than DALL-E's encoder, and loading them could execute code; "
                "save its "
                "state_dict alone, as safetensors"
            ) from None
        raise UserError(f"{path} is truncated or not a torch file; copy it again") from None
    return dict(_tensors_of(content)) if isinstance(content, _Inert) else read_weights(path)[0]


def _tensors_of(record: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Parameters of a pickled module and of those below it, named as its state dict would."""
    for name, parameter in (getattr(record, "_parameters", None) or {}).items():
        if isinstance(parameter, Tensor):
            yield prefix + name, parameter.detach()
    for name, module in (getattr(record, "_modules", None) or {}).items():
        yield from _tensors_of(module, f"{prefix}{name}.")
