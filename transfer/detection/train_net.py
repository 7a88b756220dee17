"""Train or score a detector: ``python transfer/detection/train_net.py --config-file X.yaml [key=value ...]``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mae_core.config.load import load_config
from mae_core.errors import UserError, user_errors
from mae_core.training import distributed
from transfer.detection.config import DetectionConfig
from transfer.detection.detector import evaluate_detector, train_detector
from transfer.detection.rehearsal import rehearse
from transfer.engines import require


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; detectron2's flags."""
    parser = argparse.ArgumentParser(
        description="Mask R-CNN on a pre-trained encoder, from a COCO data set.",
        epilog="example: python transfer/detection/train_net.py --config-file configs/detection/small_data.yaml "
        "weights=runs/pretrain/encoder.safetensors data.path=DATA output=runs/detection",
    )
    parser.add_argument(
        "--config-file", type=Path, help="yaml, such as those in configs/detection, or a LazyConfig .py"
    )
    parser.add_argument("--eval-only", action="store_true", help="score weights=detector.safetensors, or its run")
    parser.add_argument("--resume", action="store_true", help="continue from the last complete checkpoint in output")
    parser.add_argument("--dry-run", action="store_true", help="say what the run will be and take, and write nothing")
    many = parser.add_argument_group("many processes", "of engine detectron2; torchrun starts those of torchvision")
    many.add_argument("--num-gpus", type=int, default=1, metavar="N", help="processes of this machine")
    many.add_argument("--num-machines", type=int, default=1, metavar="N", help="machines")
    many.add_argument("--machine-rank", type=int, default=0, metavar="N", help="which of them this is, from 0")
    many.add_argument("--dist-url", default="auto", metavar="URL", help="tcp://HOST:PORT of the first; auto for one")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options, such as optim.epochs=50")
    known, rest = parser.parse_known_intermixed_args(arguments)
    flags = [word for word in rest if word.startswith("-")]
    if flags:
        parser.error(f"unknown option {flags[0]}; options of the run are written key=value")
    if known.eval_only and known.resume:
        parser.error("--eval-only and --resume exclude each other")
    return known


def check_one_process(given: argparse.Namespace) -> None:
    """Raise ``UserError``, with the command to use, where detectron2's flags ask the core's loop for other than one
    process."""
    machines = max(given.num_machines, given.machine_rank + 1)
    if given.num_gpus == machines == 1 and given.machine_rank == 0:
        return
    if given.num_gpus < 1:
        raise UserError(f"--num-gpus {given.num_gpus} is not supported; leave it out and add device=cpu for none")
    nodes = f"--nnodes={machines} --node_rank={given.machine_rank} --master_addr=HOST " if machines > 1 else ""
    raise UserError(
        "engine torchvision starts one process on one GPU; for more, use "
        f"torchrun {nodes}--nproc_per_node={given.num_gpus} transfer/detection/train_net.py ..."
    )


def run_config(config: DetectionConfig, eval_only: bool, resume: bool) -> None:
    """Train or score."""
    if eval_only:
        evaluate_detector(config)
    else:
        train_detector(config, resume=resume)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; a user's mistake ends in one sentence and exit code 2."""
    given = parse_arguments(arguments)
    with user_errors():
        lazy = given.config_file is not None and given.config_file.suffix == ".py"
        if lazy and given.dry_run:
            raise UserError("--dry-run reads yaml recipes; a LazyConfig is detectron2's own to judge")
        config = None if lazy else load_config(DetectionConfig, given.config_file, given.overrides)
        if config is not None and given.dry_run:
            rehearse(config, max(given.num_gpus, 1) * given.num_machines * distributed.world_size())
        elif config is None or config.engine == "detectron2":
            require("detectron2")
            from transfer.detection.engine_detectron2 import launch_processes, run_lazy_config

            launch_processes(
                run_lazy_config if config is None else run_config,
                num_gpus=given.num_gpus,
                num_machines=given.num_machines,
                machine_rank=given.machine_rank,
                dist_url=given.dist_url,
                args=(given,) if config is None else (config, given.eval_only, given.resume),
            )
        else:
            check_one_process(given)
            run_config(config, given.eval_only, given.resume)


if __name__ == "__main__":
    main()
