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
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from mae_core.errors import UserError

SECTIONS = ("model", "dataloader", "optimizer", "lr_multiplier", "train")
"""What a LazyConfig has to define, as those of detectron2's projects do."""

TRAIN = (
    "device", "output_dir", "init_checkpoint", "max_iter", "amp", "ddp", "checkpointer", "eval_period", "log_period",
)  # fmt: skip
"""What its section ``train`` has to hold, as detectron2's ``common/train.py`` does."""


def load_lazy_config(path: Path, overrides: Sequence[str]) -> DictConfig:
    """The config of a file with ``key=value`` overrides.

    Raises ``UserError`` for a missing file, one that does not run, a missing section, or an
    override that is none or of a key that is not there.
    """
    if not path.is_file():
        raise UserError(f"config file {path} does not exist")
    try:
        config = LazyConfig.load(str(path))
    except Exception as error:  # whatever the file's own code raises
        raise UserError(f"{path} does not load as a LazyConfig ({type(error).__name__}: {error}); correct it") from None
    missing = [name for name in SECTIONS if name not in config]
    if missing:
        raise UserError(
            f"{path} defines no {', '.join(missing)}; a LazyConfig for this command needs {', '.join(SECTIONS)}"
        )
    missing = [name for name in TRAIN if name not in config.train]
    if missing:
        raise UserError(
            f"{path} has no train.{', train.'.join(missing)}; start from detectron2's common/train.py, which has them"
        )
    for override in overrides:
        key, separator, _ = override.partition("=")
        if not separator:
            raise UserError(f"{override!r} is not an override; write key=value, such as train.max_iter=100")
        parent, _, name = key.rpartition(".")
        section = OmegaConf.select(config, parent) if parent else config
        if not isinstance(section, DictConfig) or name not in section:
            known = ", ".join(map(str, section)) if isinstance(section, DictConfig) else ", ".join(SECTIONS)
            raise UserError(f"command line: {path} has no key {key!r}; known keys: {known}")
    try:
        return LazyConfig.apply_overrides(config, list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"command line: {', '.join(overrides)}: {reason}; quote values that are not plain words"
        ) from None


def check_lazy_run(config: DictConfig, *, eval_only: bool, resume: bool) -> None:
    """Raise ``UserError`` where a run would overwrite another, has nothing to resume, nothing to score, or would start
    from a file that is not there; addresses such as detectron2:// are left to detectron2."""
    folder, start = Path(config.train.output_dir), config.train.init_checkpoint or ""
    held = DetectionCheckpointer(nn.Identity(), str(folder)).has_checkpoint()
    if resume and not held:
        raise UserError(f"nothing to resume: {folder} has no checkpoint; start without --resume")
    if eval_only and not start:
        raise UserError("--eval-only needs a trained detector; set train.init_checkpoint=FILE")
    if not resume and "://" not in start and start and not Path(start.partition("?")[0]).is_file():
        raise UserError(f"train.init_checkpoint {start} does not exist; give a file of weights")
    if not (eval_only or resume) and (held or any(folder.glob("model_*.pth"))):
        raise UserError(
            f"output folder {folder} already holds a run; add --resume to continue it, or choose another with "
            "train.output_dir=FOLDER"
        )


def run_lazy_config(given: argparse.Namespace) -> dict[str, Any] | None:
    """Train, or with ``--eval-only`` score, what the LazyConfig ``given.config_file`` describes."""
    config = load_lazy_config(given.config_file, given.overrides)
    check_lazy_run(config, eval_only=given.eval_only, resume=given.resume)
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
