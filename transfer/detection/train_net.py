"""Train or score a detector: ``python transfer/detection/train_net.py --config-file X.yaml [key=value ...]``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mae_core.config import load_config
from mae_core.errors import UserError, user_errors
from transfer.detection.config import DetectionConfig
from transfer.detection.detector import evaluate_detector, train_detector


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; detectron2's flags."""
    parser = argparse.ArgumentParser(
        description="Mask R-CNN on a pre-trained encoder, from a COCO data set.",
        epilog="example: python transfer/detection/train_net.py --config-file configs/detection/small_data.yaml "
        "weights=runs/pretrain/encoder.safetensors data.path=DATA output=runs/detection",
    )
    parser.add_argument("--config-file", type=Path, help="a yaml file, such as those in configs/detection")
    parser.add_argument("--eval-only", action="store_true", help="score weights=detector.safetensors, or its run")
    parser.add_argument("--resume", action="store_true", help="continue from the last complete checkpoint in output")
    parser.add_argument("--num-gpus", type=int, default=1, metavar="1", help="1; torchrun starts more")
    parser.add_argument("--num-machines", type=int, default=1, metavar="1", help="1; torchrun starts more")
    parser.add_argument("--machine-rank", type=int, default=0, metavar="0", help="0; torchrun numbers machines")
    parser.add_argument("--dist-url", help="not used: torchrun arranges how processes meet")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options, such as optim.epochs=50")
    known, rest = parser.parse_known_intermixed_args(arguments)
    flags = [word for word in rest if word.startswith("-")]
    if flags:
        parser.error(f"unknown option {flags[0]}; options of the run are written key=value")
    if known.eval_only and known.resume:
        parser.error("--eval-only and --resume exclude each other")
    return known


def check_one_process(given: argparse.Namespace) -> None:
    """Raise ``UserError``, with the command to use, where detectron2's flags ask for other than one process."""
    machines = max(given.num_machines, given.machine_rank + 1)
    if given.num_gpus == machines == 1 and given.machine_rank == 0:
        return
    if given.num_gpus < 1:
        raise UserError(f"--num-gpus {given.num_gpus} is not supported; leave it out and add device=cpu for none")
    nodes = f"--nnodes={machines} --node_rank={given.machine_rank} --master_addr=HOST " if machines > 1 else ""
    raise UserError(
        "this command starts one process on one GPU; for more, use "
        f"torchrun {nodes}--nproc_per_node={given.num_gpus} transfer/detection/train_net.py ..."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; a user's mistake ends in one sentence and exit code 2."""
    given = parse_arguments(arguments)
    with user_errors():
        check_one_process(given)
        config = load_config(DetectionConfig, given.config_file, given.overrides)
        if given.eval_only:
            evaluate_detector(config)
        else:
            train_detector(config, resume=given.resume)


if __name__ == "__main__":
    main()
