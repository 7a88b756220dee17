"""Train or score a detector: ``python transfer/detection/train_net.py --config-file X.yaml [key=value ...]``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from mae_core.config.load import load_config
from mae_core.dialects import DETECTION_SCRIPT, other_word
from mae_core.errors import UserError, user_errors
from mae_core.resuming import AUTO, HELP, Resume, meaning, one_word
from mae_core.training import distributed
from transfer.detection.config import DetectionConfig
from transfer.detection.plan import print_plan
from transfer.detection.run import evaluate_detector, train_detector
from transfer.engines import DETECTION, require


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; detectron2's flags."""
    parser = argparse.ArgumentParser(
        description="Mask R-CNN on a pre-trained encoder, from a COCO data set.",
        epilog="example: python transfer/detection/train_net.py --config-file configs/detection/small_data.yaml "
        "weights=runs/pretrain/encoder.safetensors data.path=DATA output=runs/detection",
    )
    parser.add_argument(
        "--config-file",
        type=Path,
        help="a recipe of configs/detection by name, a yaml file, or a LazyConfig .py",
    )
    parser.add_argument("--eval-only", action="store_true", help="score weights=detector.safetensors, or its run")
    parser.add_argument("--resume", type=meaning, default=False, metavar="[auto]", help=HELP)
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan of the run and its memory, and write nothing"
    )
    many = parser.add_argument_group("many processes", "of engine detectron2; torchrun starts those of torchvision")
    many.add_argument("--num-gpus", type=int, default=1, metavar="N", help="processes of this machine")
    many.add_argument("--num-machines", type=int, default=1, metavar="N", help="machines")
    many.add_argument("--machine-rank", type=int, default=0, metavar="N", help="rank of this machine, from 0")
    many.add_argument("--dist-url", default="auto", metavar="URL", help="tcp://HOST:PORT of the first; auto for one")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options, such as optim.epochs=50")
    known, rest = parser.parse_known_intermixed_args(one_word(sys.argv[1:] if arguments is None else arguments))
    flags = [word for word in rest if word.startswith("-")]
    if flags:
        told = other_word(flags[0], DETECTION_SCRIPT) or f"unknown option {flags[0]}"
        parser.error(f"{told}; options of the run are written key=value")
    recipes = [word for word in known.overrides if "=" not in word]
    if recipes and known.config_file is None:
        parser.error(f"{recipes[0]} is no option; a recipe is given by --config-file {recipes[0]}")
    for flag in ("resume", "dry_run"):
        if known.eval_only and getattr(known, flag):
            parser.error(f"--eval-only and --{flag.replace('_', '-')} exclude each other")
    return known


def check_one_process(given: argparse.Namespace, engine: str) -> None:
    """Raise ``UserError``, with the command to use, where ``--num-gpus`` and its like ask an engine that ``torchrun``
    starts for other than one process."""
    machines = max(given.num_machines, given.machine_rank + 1)
    if given.num_gpus == machines == 1 and given.machine_rank == 0:
        return
    if given.num_gpus < 1:
        raise UserError(f"--num-gpus {given.num_gpus} is not supported; leave it out; to use no GPU add device=cpu")
    nodes = f"--nnodes={machines} --node_rank={given.machine_rank} --master_addr=HOST " if machines > 1 else ""
    raise UserError(
        f"engine {engine} starts one process on one GPU; for more, use "
        f"torchrun {nodes}--nproc_per_node={given.num_gpus} transfer/detection/train_net.py ..."
    )


def run_config(config: DetectionConfig, eval_only: bool, resume: Resume) -> None:
    """Train or score."""
    if eval_only:
        evaluate_detector(config)
    else:
        train_detector(config, resume=resume)


def start(name: str, work: Callable[..., Any], args: tuple[Any, ...], given: argparse.Namespace) -> None:
    """Call ``work(*args)`` in the processes that the command line asks engine ``name`` for."""
    require(name)
    engine = DETECTION[name]
    if not engine.launch:
        check_one_process(given, name)
        work(*args)
        return
    many = {flag: getattr(given, flag) for flag in ("num_gpus", "num_machines", "machine_rank", "dist_url")}
    resolve_name(engine.launch)(work, **many, args=args)


def run_own_config(given: argparse.Namespace) -> None:
    """Run a Python configuration of an engine's own kind."""
    if given.dry_run:
        raise UserError("--dry-run reads yaml recipes; it cannot plan a LazyConfig")
    if given.resume == AUTO:
        raise UserError("--resume auto reads yaml recipes; a LazyConfig takes --resume, once it has a checkpoint")
    name = next(name for name, engine in DETECTION.items() if engine.own_config)
    require(name)
    start(name, resolve_name(DETECTION[name].own_config), (given,), given)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; a user's mistake ends in one sentence and exit code 2."""
    given = parse_arguments(arguments)
    with user_errors():
        if given.config_file is not None and given.config_file.suffix == ".py":
            run_own_config(given)
            return
        overrides = given.overrides
        if given.eval_only and any(word.startswith("weights=") for word in overrides):
            overrides = ["from_scratch=false", *overrides]  # the recipe of a run may say how its training began
        config = load_config(DetectionConfig, given.config_file, overrides)
        if given.dry_run:
            devices = max(given.num_gpus, 1) * given.num_machines * distributed.world_size()
            print_plan(config, devices, resume=given.resume)
        else:
            start(config.engine, run_config, (config, given.eval_only, given.resume), given)


if __name__ == "__main__":
    main()
