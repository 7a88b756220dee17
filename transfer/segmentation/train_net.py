"""Train a segmenter from an mmseg config, on a pre-trained encoder or from scratch.

    python transfer/segmentation/train_net.py configs/segmentation/small_data.py \\
        --weights runs/pretrain/encoder.safetensors --work-dir runs/segmenter \\
        --cfg-options data_root=PATH num_classes=11

Under ``torchrun --nproc_per_node N`` or ``srun`` the N processes train as one, each with the config's batch size.

The work dir gets the finished config, environment.json, log.jsonl, tensorboard/, pictures/, loading.json, mmengine's
checkpoints, metrics.json (percent), report.html and segmenter.safetensors. With ``--eval-only`` a trained segmenter is
evaluated on the config's validation data instead.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from mae_core.config.recipes import find_recipe
from mae_core.dialects import DialectParser
from mae_core.errors import UserError, refusal_note, user_errors
from mae_core.resuming import AUTO, HELP, Resume, meaning, one_word
from mae_core.training.distributed import Place, leave
from transfer.engines import require
from transfer.segmentation.config import RECIPES, WORK_DIR, check_config_exists
from transfer.segmentation.launching import LAUNCHERS, join_launched
from transfer.segmentation.quiet import quietly
from transfer.segmentation.segmenter_file import SEGMENTER, steps_saved

ENGINE_MODULES = r"(mmcv|mmengine|mmseg)(\.|$)"


def train_segmenter(
    config_path: Path | str,
    *,
    weights: Path | str | None = None,
    branch: str | None = None,
    work_dir: Path | str,
    cfg_options: Mapping[str, Any] | Sequence[str] | None = None,
    resume: Resume = False,
    amp: bool | None = None,
    dry_run: bool = False,
    launcher: str | None = None,
) -> dict[str, Any]:
    """Train what an mmseg config describes and return its last evaluation, which is also written to metrics.json.

    config_path  a file, or the name of a recipe of configs/segmentation
    weights      any file the loader takes; None trains from scratch
    branch       which encoder of a file that holds several, such as teacher
    work_dir     the run directory, new or empty unless ``resume``; "auto" continues where there is a checkpoint
    cfg_options  ``key=value`` texts or a mapping, keys as in ``model.backbone.drop_path``; variables of the config too
    amp          mixed precision, whatever the config says; None: what it says
    dry_run      print what the training would be and take, write nothing and return an empty mapping
    launcher     ``pytorch``, ``slurm`` or ``none``; None: the ranks of torchrun or srun, if one started this process
    returns      mIoU, mAcc, aAcc and per_class (name -> IoU, Acc) in percent, steps, seconds

    Data, weights and options are checked first: ``UserError`` comes before anything is written. May be called again in
    the same process.
    """
    config_path = find_recipe(config_path, RECIPES)
    engine = prepare(config_path, launcher)
    checkpoints: list[Path] = []
    if not dry_run:
        checkpoints = find_checkpoints(Path(work_dir), resume=resume)
    elif not resume and (note := refusal_note(lambda: find_checkpoints(Path(work_dir), resume=False))):
        print(note, flush=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=ENGINE_MODULES)
        options = cfg_options if isinstance(cfg_options, Mapping) else engine.parse_options(cfg_options or ())
        return engine.train(
            config_path,
            weights=weights,
            branch=branch,
            work_dir=work_dir,
            options=options,
            checkpoints=checkpoints,
            amp=amp,
            dry_run=dry_run,
            auto=resume == AUTO,
        )


def evaluate_segmenter(
    config_path: Path | str,
    checkpoint: Path | str,
    *,
    work_dir: Path | str,
    cfg_options: Mapping[str, Any] | Sequence[str] | None = None,
    launcher: str | None = None,
) -> dict[str, Any]:
    """Evaluate a trained segmenter on the validation data of a config, with the config's test mode and, where it has
    ``tta_model`` and ``tta_pipeline``, on scaled and mirrored views; returns and writes what training does.

    checkpoint  ``segmenter.safetensors``, a run directory, or a checkpoint of mmengine's that fits the config's model
    """
    config_path = find_recipe(config_path, RECIPES)
    engine = prepare(config_path, launcher)
    find_checkpoints(Path(work_dir), resume=False)
    if not Path(checkpoint).exists():
        raise UserError(f"segmenter {checkpoint} does not exist; give a run directory or its segmenter.safetensors")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=ENGINE_MODULES)
        options = cfg_options if isinstance(cfg_options, Mapping) else engine.parse_options(cfg_options or ())
        return engine.evaluate(config_path, Path(checkpoint), work_dir=work_dir, options=options)


def prepare(config_path: Path, launcher: str | None) -> ModuleType:
    """Check what needs no engine, join the ranks -> the engine."""
    require("mmseg")
    check_config_exists(config_path)
    join_launched(launcher)
    with quietly():
        from transfer.segmentation import engine_mmseg
    return engine_mmseg


def find_checkpoints(work_dir: Path, *, resume: Resume) -> list[Path]:
    """The checkpoints to resume from, newest first; none for a new run.

    Raises ``UserError`` where a new run meets a folder in use, or a resumed one finds no checkpoint.
    """
    if not resume:
        if work_dir.exists() and not work_dir.is_dir():
            raise UserError(f"{work_dir} is a file; give a folder with {WORK_DIR}")
        if work_dir.exists() and any(work_dir.iterdir()):
            raise UserError(
                f"{work_dir} is not empty; give another {WORK_DIR}, or --resume auto to continue the run in it"
            )
        return []
    found = steps_saved(work_dir)
    if found or (resume == AUTO and not (work_dir / SEGMENTER).exists()):
        return found
    raise UserError(f"{work_dir} holds no checkpoint to resume from; --resume auto starts a run there")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; exits with code 2 on a mistake of the user's."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = DialectParser(prog="train_net.py", description=__doc__, formatter_class=layout, dialect="mmseg")
    add = parser.add_argument
    add("config", type=Path, metavar="CONFIG", help="an mmseg config, or the name of one of configs/segmentation")
    add("--weights", type=Path, metavar="FILE", help="encoder.safetensors, a run directory or an official file")
    add("--branch", metavar="NAME", help="which encoder of a file that holds several: teacher, momentum_encoder, ...")
    add("--work-dir", type=Path, metavar="DIR", help="run directory; runs/segmentation/<config> when left out")
    add("--resume", type=meaning, default=False, metavar="[auto]", help=HELP)
    add(
        "--amp",
        action=argparse.BooleanOptionalAction,
        help="mixed precision (bf16, or fp16 where the GPU has no bf16), or fp32; what the config says when left out",
    )
    add("--dry-run", action="store_true", help="print what the training would be and take, and write nothing")
    add("--eval-only", type=Path, metavar="CKPT", help="train nothing: evaluate this segmenter or run directory")
    add(
        "--launcher",
        choices=LAUNCHERS,
        help="what started the processes; torchrun and srun are recognised without it",
    )
    add(
        "--cfg-options",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="change the config: its variables (data_root=PATH crop_size=256) or its keys (train_cfg.max_iters=2000)",
    )
    given = parser.parse_args(one_word(sys.argv[1:] if arguments is None else arguments))
    stem = f"{given.config.stem}_eval" if given.eval_only else given.config.stem
    work_dir = given.work_dir or Path("runs/segmentation") / stem
    with user_errors():
        place = join_launched(given.launcher)
        if given.eval_only and (given.weights or given.resume or given.dry_run or given.amp is not None):
            raise UserError("--eval-only trains nothing; leave out --weights, --resume, --dry-run and --amp")
        shared = {"work_dir": work_dir, "cfg_options": given.cfg_options, "launcher": given.launcher}
        if given.eval_only:
            results = evaluate_segmenter(given.config, given.eval_only, **shared)
        else:
            training = {name: getattr(given, name) for name in ("weights", "branch", "resume", "amp", "dry_run")}
            results = train_segmenter(given.config, **training, **shared)
        report(results, given.config, work_dir, place, wrote_model=not given.eval_only)


def report(results: Mapping[str, Any], config: Path, work_dir: Path, place: Place, *, wrote_model: bool) -> None:
    """Say what was measured and where it is; nothing after a dry run."""
    if results and "mIoU" not in results:
        raise UserError(f"{config} evaluates no mIoU; set val_evaluator to PerClassIoUMetric")
    leave()
    if results and place.is_main:
        print(describe(results))
        model = ", segmenter.safetensors" if wrote_model else ""
        print(f"wrote {work_dir}/ in {results['seconds']:.0f} s: metrics.json, report.html, pictures/{model}")


def describe(results: Mapping[str, Any]) -> str:
    """The metrics as a table of classes and a line of means."""
    lines = [f"{'class':<24} {'IoU':>6} {'Acc':>6}"]
    lines += [f"{name:<24} {_cell(row['IoU'])} {_cell(row['Acc'])}" for name, row in results["per_class"].items()]
    means = "  ".join(f"{name} {results[name]:.2f}" for name in ("mIoU", "mAcc", "aAcc"))
    return "\n".join([*lines, f"{means}  (percent)"])


def _cell(value: float | None) -> str:
    return f"{'-' if value is None else format(value, '.2f'):>6}"


if __name__ == "__main__":
    main()
