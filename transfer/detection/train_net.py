"""Train or score a detector: ``python transfer/detection/train_net.py --config-file X.yaml [key=value ...]``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mae_core.config import load_config
from mae_core.errors import user_errors
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
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options, such as optim.epochs=50")
    known, rest = parser.parse_known_intermixed_args(arguments)
    flags = [word for word in rest if word.startswith("-")]
    if flags:
        parser.error(f"unknown option {flags[0]}; options of the run are written key=value")
    if known.eval_only and known.resume:
        parser.error("--eval-only and --resume exclude each other")
    return known


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; a user's mistake ends in one sentence and exit code 2."""
    given = parse_arguments(arguments)
    with user_errors():
        config = load_config(DetectionConfig, given.config_file, given.overrides)
        if given.eval_only:
            evaluate_detector(config)
        else:
            train_detector(config, resume=given.resume)


if __name__ == "__main__":
    main()
