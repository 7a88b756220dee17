"""``mae segment``: the scripts of this folder in the words of ``mae``; nothing heavy is imported before one runs."""

from __future__ import annotations

import os

import typer

from mae_core.cli.arguments import ConfigAndOverrides, Configured, DryRun, Resume, split_arguments
from mae_core.cli.tasks import pass_on
from mae_core.errors import UserError, user_errors

app = typer.Typer(no_args_is_help=True, help="Semantic segmentation on an encoder, from images and label maps.")

FLAGS = {"weights": "--weights", "branch": "--branch", "output": "--work-dir"}
"""Options of ``mae`` that the script has as flags; all others are options of the config."""
SPELLED = {"data.path": "data_root", "seed": "randomness.seed"}
"""Options that every other recipe of ``mae`` calls so, and what mmseg's configs call them."""


def _script_words(arguments: list[str] | None) -> list[str]:
    """A command line of ``mae`` in the words of train_net.py. Raises ``UserError`` where it names no recipe, or an
    option has another value than it can."""
    recipe, overrides = split_arguments(arguments)
    if recipe is None:
        raise UserError("name a recipe, such as small_data, or an mmseg config; mae config recipes lists them")
    given = dict(word.split("=", 1) for word in overrides)
    for name in FLAGS.keys() & given.keys():
        if given[name] in ("", "null"):
            raise UserError(f"{name}= has no value; give one, or leave {name} out")
    flags = [word for name, flag in FLAGS.items() if name in given for word in (flag, given.pop(name))]
    if (device := given.pop("device", "auto")) == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif device != "auto":
        from mae_core.training.distributed import check_device

        check_device(device)
    precision = given.pop("precision", "auto")
    if precision not in ("auto", "bf16", "fp32"):
        raise UserError(f"precision={precision} is not known; write auto, bf16 or fp32")
    if precision != "auto":
        flags.append("--amp" if precision == "bf16" else "--no-amp")
    options = [f"{SPELLED.get(name, name)}={value}" for name, value in given.items()]
    return [recipe, *flags, *(["--cfg-options", *options] if options else [])]


@app.command(cls=Configured)
def train(arguments: ConfigAndOverrides = None, resume: Resume = "no", dry_run: DryRun = False) -> None:
    """Train a segmenter and evaluate it. Writes segmenter.safetensors, metrics.json, report.html, pictures/.

    Example: mae segment train small_data weights=runs/mine data.path=LABELMAPS num_classes=5 output=runs/segmenter
    """
    with user_errors():
        scratch = [word for word in arguments or [] if word.startswith("from_scratch=")]
        rest = [word for word in arguments or [] if word not in scratch]
        said = scratch[-1].partition("=")[2].lower() if scratch else "false"
        if said not in ("true", "false"):
            raise UserError(f"{scratch[-1]} is not known; write from_scratch=true, or leave it out")
        from_scratch = said == "true"
        if from_scratch == any(word.startswith("weights=") for word in rest) and resume == "no":
            raise UserError("give either weights=FILE or from_scratch=true")
        words = _script_words(rest)
        from transfer.segmentation.train_net import main

        main([*words, *(["--dry-run"] if dry_run else []), *([] if resume == "no" else [f"--resume={resume}"])])


@app.command(cls=Configured)
def evaluate(arguments: ConfigAndOverrides = None) -> None:
    """Score a segmenter on the recipe's validation images.

    Example: mae segment evaluate small_data weights=runs/segmenter data.path=LABELMAPS num_classes=5 output=runs/scores
    """
    with user_errors():
        words = _script_words(arguments)
        if FLAGS["weights"] not in words:
            raise UserError("say which segmenter: weights=RUN, or its segmenter.safetensors")
        words[words.index(FLAGS["weights"])] = "--eval-only"
        from transfer.segmentation.train_net import main

        main(words)


for _name, _place, _about in (
    ("predict", "predict", "Label images: RUN IMAGES... --out DIR; writes label maps and overlays"),
    ("export", "export", "Write a segmenter for other programs: RUN --to onnx|torch-export|mmseg --out FILE"),
    ("check", "check_data", "Find faults in images and label maps before training meets them; as mae check labels"),
):
    pass_on(app, _name, f"transfer.segmentation.{_place}:main", prog=f"mae segment {_name}", about=_about)
