"""An mmseg config and the options of the command line: read, checked, merged."""

from __future__ import annotations

import argparse
import inspect
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mmseg.registry
from mmengine.config import Config, DictAction
from mmengine.registry import Registry
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from mae_core.errors import UserError, explained, first_line
from transfer.segmentation import config as configs
from transfer.segmentation.engine_mmseg.checkpoints import OURS

CONFIG_ONLY_KEYS = {
    "activation_checkpointing",
    "compile",
    "custom_imports",
    "efficient_conv_bn_eval",
    "model_wrapper_cfg",
}
"""Top-level keys of a config that mmengine reads besides the arguments of its runner."""
PATHS = {"data_root", "classes_file", "img_path", "seg_map_path"}
"""Last words of options that are paths. mmengine's reader would drop their spaces, split them at commas, and take a
folder called 2024 for a number."""
WRITTEN = {
    "work_dir": "--work-dir DIR (mae segment: output=DIR)",
    "resume": "--resume",
    "load_from": "--weights FILE (mae segment: weights=FILE), or --resume to continue a run",
    "launcher": "--launcher",
}
"""Keys of a config that a training sets itself -> how the command line says what they mean."""


def parse_options(items: Sequence[str]) -> dict[str, Any]:
    """``["a.b=1", "c=[x,y]"]`` -> values by key, read as mmengine reads ``--cfg-options``."""
    for item in items:
        if not re.match(r"[\w.]+=", item):
            raise UserError(f"{item!r} is not a config option; write key=value, such as train_cfg.max_iters=1000")
    pairs = [item.split("=", 1) for item in items]
    paths = {key: _as_path(key, text) for key, text in pairs if key.rpartition(".")[2] in PATHS}
    rest = [item for item, (key, _) in zip(items, pairs, strict=True) if key not in paths]
    parser = argparse.ArgumentParser()
    parser.add_argument("--cfg-options", nargs="*", action=DictAction)
    try:
        return {**(parser.parse_args(["--cfg-options", *rest]).cfg_options or {}), **paths}
    except (AssertionError, RecursionError, ValueError) as error:  # mmengine's reader of lists, at anything else
        raise UserError(
            f"config options {' '.join(items)} cannot be read ({first_line(error)}); write lists as [1,2], and "
            "the keys of a dict one by one, such as model.test_cfg.mode=slide"
        ) from None


def _as_path(key: str, text: str) -> str | None:
    """The value of an option that is a path, as it was typed; ``~`` is the home, None is none."""
    text = text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text
    if not text:
        raise UserError(f"{key}= has no value; give a path")
    try:
        return None if text == "None" else str(Path(text).expanduser())
    except RuntimeError:
        raise UserError(f"{key}={text}: there is no such home folder; give another path") from None


def read_config(path: Path | str, options: Mapping[str, Any]) -> Config:
    """An mmseg config with options: variables of the file are set before it is evaluated, other keys after.

    Raises ``UserError`` for a broken file and for an option that nothing would read.
    """
    path = Path(path)
    for key in options.keys() & WRITTEN.keys():
        raise UserError(f"the option {key} is written {WRITTEN[key]}")
    plain, _ = evaluated(path, {})
    for name in options.keys() & plain.keys() - runner_keys():
        configs.check_variable(name, plain.get(name), options[name])
    config, chosen = evaluated(path, options) if options else (plain, set())
    for name in chosen:
        others = {key: value for key, value in options.items() if key != name}
        without = plain if chosen == {name} else evaluated(path, others)[0]
        same = {**config.to_dict(), name: None} == {**without.to_dict(), name: None}
        if same and without.get(name) != options[name]:
            raise UserError(
                f"{name}={options[name]} has no effect: {path} itself sets the keys that its base computes "
                f"from {name}; set those keys, such as model.backbone.size, or copy the config"
            )
    rest = {key: value for key, value in options.items() if key not in chosen}
    for key in rest:
        if key.split(".")[0] in set(config.keys()) - runner_keys():
            raise UserError(f"{key.split('.')[0]} is a variable of {path}; set it as a whole")
        configs.check_kind(key, configs.check_key(dict(config.items()), key, accepted_keys), rest[key])
        config.merge_from_dict({key: rest[key]})
    missing = {"model", "train_dataloader", "train_cfg", "optim_wrapper", "val_dataloader"} - set(config.keys())
    if missing:
        raise UserError(f"config {path} has no {', '.join(sorted(missing))}; training needs them")
    return config


def evaluated(path: Path, options: Mapping[str, Any]) -> tuple[Config, set[str]]:
    """A config with those of ``options`` that are variables of it or its bases, before it is evaluated; and which."""
    with explained(f"config {path} cannot be read"), tempfile.TemporaryDirectory() as folder:  # a config is a program
        chosen = set(options) & (configs.variables_of(path) - runner_keys())
        values = {name: options[name] for name in chosen}
        config = Config.fromfile(configs.copy_with_variables(path.resolve(), values, Path(folder)))
        config.items()  # what it imports is looked for only now
        return config, chosen


def runner_keys() -> set[str]:
    """Top-level keys that mmengine reads."""
    return set(inspect.signature(Runner.__init__).parameters) - {"self", "cfg"} | CONFIG_ONLY_KEYS


def accepted_keys(place: str, node: Mapping[str, Any]) -> set[str]:
    """What a section of a config takes: the arguments of the class its ``type`` names."""
    if not place:
        return runner_keys()
    if place.endswith("_dataloader"):
        return set(inspect.signature(DataLoader.__init__).parameters) - {"self"}
    keys = {"_delete_"}
    kind = node.get("type")
    for found in registered(OURS.get(kind, kind) if isinstance(kind, str) else kind):
        for parent in inspect.getmro(found) if inspect.isclass(found) else [found]:
            if parent is object:
                continue
            parameters = inspect.signature(parent.__init__ if inspect.isclass(parent) else parent).parameters
            keys |= {name for name, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
            if not any(p.kind == p.VAR_KEYWORD for p in parameters.values()):
                break
    return keys - {"self"}


def registered(kind: Any) -> list[Any]:
    """The classes and functions that mmseg and mmengine know under the name ``kind``."""
    known = _registered.get(kind) if isinstance(kind, str) else None
    if known is None:
        registries = [entry for entry in vars(mmseg.registry).values() if isinstance(entry, Registry)]
        found = [registry.get(kind) for registry in registries] if isinstance(kind, str) else []
        known = [entry for entry in found if entry is not None]
        if known:
            _registered[kind] = known
    return known


_registered: dict[str, list[Any]] = {}
"""What was found before: a registry that does not hold a name tries to import it, which takes milliseconds."""
