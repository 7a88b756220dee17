"""Commands that measure an encoder or a classifier on labelled images."""

from __future__ import annotations

from mae_core.cli.arguments import ConfigAndOverrides, Resume, read_arguments
from mae_core.errors import user_errors


def linprobe(arguments: ConfigAndOverrides = None, resume: Resume = False) -> None:
    """Train one linear layer on a frozen encoder, on train/<class>/*, and measure it on val/<class>/*. Writes
    classifier.safetensors, metrics.json.

    Example: mae linprobe configs/linprobe/base.yaml weights=runs/mine data.path=labelled output=runs/probe
    """
    with user_errors():
        from mae_core.evaluation.config import LinprobeConfig
        from mae_core.training.linprobe import linprobe as run

        run(read_arguments(LinprobeConfig, arguments), resume=resume)
