"""LazyConfig files, detectron2's python configs: trained and scored as its own script does."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import AMPTrainer, SimpleTrainer, create_ddp_model, default_setup, default_writers, hooks
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from omegaconf import DictConfig, OmegaConf
from torch import nn

from mae_core.errors import UserError

SECTIONS = ("model", "dataloader", "optimizer", "lr_multiplier", "train")
"""What a LazyConfig has to define, as those of detectron2's projects do."""


def load_lazy_config(path: Path, overrides: Sequence[str]) -> DictConfig:
    """The config of a file with ``key=value`` overrides.

    Raises ``UserError`` for a missing file, one that does not run, a missing section, or a key that is not there.
    """
    if not path.is_file():
        raise UserError(f"config file {path} does not exist")
    try:
        config = LazyConfig.load(str(path))
    except Exception as error:  # whatever the file's own code raises
        raise UserError(f"{path} is no LazyConfig that loads ({type(error).__name__}: {error}); mend it") from None
    missing = [name for name in SECTIONS if name not in config]
    if missing:
        raise UserError(
            f"{path} defines no {', '.join(missing)}; a LazyConfig of this command has {', '.join(SECTIONS)}"
        )
    for override in overrides:
        key, separator, _ = override.partition("=")
        if not separator:
            raise UserError(f"{override!r} is not an override; write key=value, such as train.max_iter=100")
        parent, _, name = key.rpartition(".")
        section = OmegaConf.select(config, parent) if parent else config
        if not isinstance(section, DictConfig) or name not in section:
            known = ", ".join(map(str, section)) if isinstance(section, DictConfig) else ", ".join(SECTIONS)
            raise UserError(f"command line: {path} has no key {key!r}; known here: {known}")
    return LazyConfig.apply_overrides(config, list(overrides))


def run_lazy_config(given: argparse.Namespace) -> dict[str, Any] | None:
    """Train, or with ``--eval-only`` score, what the LazyConfig ``given.config_file`` describes."""
    config = load_lazy_config(given.config_file, given.overrides)
    default_setup(config, argparse.Namespace(config_file=str(given.config_file), eval_only=given.eval_only))
    model = instantiate(config.model).to(config.train.device)
    on_cpu = {"device_ids": None} if str(config.train.device) == "cpu" else {}
    if given.eval_only:
        DetectionCheckpointer(model).load(config.train.init_checkpoint)
        return _score(config, create_ddp_model(model, **on_cpu))
    config.optimizer.params.model = model
    optimizer = instantiate(config.optimizer)
    loader = instantiate(config.dataloader.train)
    parallel = create_ddp_model(model, **on_cpu, **config.train.ddp)
    trainer = (AMPTrainer if config.train.amp.enabled else SimpleTrainer)(parallel, loader, optimizer)
    checkpointer = DetectionCheckpointer(model, config.train.output_dir, trainer=trainer)
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(config.lr_multiplier)),
            hooks.PeriodicCheckpointer(checkpointer, **config.train.checkpointer) if comm.is_main_process() else None,
            hooks.EvalHook(config.train.eval_period, lambda: _score(config, parallel)),
            hooks.PeriodicWriter(
                default_writers(config.train.output_dir, config.train.max_iter), period=config.train.log_period
            )
            if comm.is_main_process()
            else None,
        ]
    )
    checkpointer.resume_or_load(config.train.init_checkpoint, resume=given.resume)
    start = trainer.iter + 1 if given.resume and checkpointer.has_checkpoint() else 0
    trainer.train(start, config.train.max_iter)
    return None


def _score(config: DictConfig, model: nn.Module) -> dict[str, Any] | None:
    """The results of the config's evaluator, where it has one."""
    if "evaluator" not in config.dataloader:
        return None
    loader = instantiate(config.dataloader.test)
    results = inference_on_dataset(model, loader, instantiate(config.dataloader.evaluator))
    print_csv_format(results)
    return results
