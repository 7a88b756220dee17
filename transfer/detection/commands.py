"""``mae detect``: the scripts of this folder in the words of ``mae``; nothing heavy is imported before one runs."""

from __future__ import annotations

from pathlib import Path

import typer

from mae_core.cli.arguments import ConfigAndOverrides, Configured, DryRun, Resume, split_arguments
from mae_core.cli.tasks import pass_on
from mae_core.errors import UserError, user_errors
from mae_core.layout import CONFIG

app = typer.Typer(no_args_is_help=True, help="Detection and instance segmentation on an encoder, from a COCO data set.")


def _script_words(arguments: list[str] | None, *, recipe_of_run: bool = False) -> list[str]:
    """A command line of ``mae`` in the words of train_net.py; with ``recipe_of_run`` the recipe of the run that
    ``weights=`` names stands in for one that is not given."""
    recipe, overrides = split_arguments(arguments)
    if recipe is None and recipe_of_run:
        from transfer.detection.detector_file import DETECTOR

        runs = [Path(word.partition("=")[2]) for word in overrides if word.startswith("weights=")]
        named = (run / CONFIG for run in runs if (run / DETECTOR).is_file())
        recipe = next((str(config) for config in named if config.is_file()), None)
        if recipe is not None and not any(word.startswith("output=") for word in overrides):
            raise UserError(f"say where the results go: output=DIR, another folder than {runs[0]}")
    return [*(["--config-file", recipe] if recipe else []), *overrides]


@app.command(cls=Configured)
def train(arguments: ConfigAndOverrides = None, resume: Resume = "no", dry_run: DryRun = False) -> None:
    """Train a detector and evaluate it. Writes detector.safetensors, metrics.json, report.html, pictures/.

    Example: mae detect train small_data weights=runs/mine data.path=COCO output=runs/detector
    """
    with user_errors():
        words = _script_words(arguments)
        from transfer.detection.train_net import main

        main([*words, *(["--dry-run"] if dry_run else []), *([] if resume == "no" else [f"--resume={resume}"])])


@app.command(cls=Configured)
def evaluate(arguments: ConfigAndOverrides = None) -> None:
    """Score a detector on the validation images: COCO's metrics and pictures. A run brings its own recipe.

    Example: mae detect evaluate weights=runs/detector data.path=COCO output=runs/scores
    """
    with user_errors():
        words = _script_words(arguments, recipe_of_run=True)
        from transfer.detection.train_net import main

        main([*words, "--eval-only"])


for _name, _place, _about in (
    ("predict", "predict", "Find objects in images: RUN IMAGES... --out DIR; writes pictures and COCO results"),
    ("export", "export", "Write a detector as ONNX for other programs: RUN --out FILE"),
    ("check", "check_data", "Find faults in a COCO data set before training meets them: DATA; as mae check coco"),
):
    pass_on(app, _name, f"transfer.detection.{_place}:main", prog=f"mae detect {_name}", about=_about)
