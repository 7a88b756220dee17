"""Train a segmenter from an mmseg config, on a pre-trained encoder or from scratch.

    python transfer/segmentation/train_net.py configs/segmentation/small_data.py \\
        --weights runs/pretrain/encoder.safetensors --work-dir runs/segmenter \\
        --cfg-options data_root=PATH num_classes=11

Under ``torchrun --nproc_per_node N`` the N processes train as one, each with the config's batch size.

The work dir gets the finished config, log.jsonl, tensorboard/, pictures/, loading.json, mmengine's checkpoints,
metrics.json (percent) and segmenter.safetensors.
"""

from __future__ import annotations

import argparse
import io
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from mae_core.errors import UserError, user_errors
from mae_core.training.distributed import join, leave
from transfer.engines import require
from transfer.segmentation.config import check_config_exists

LAST_CHECKPOINT = "last_checkpoint"
"""mmengine's file that names the last checkpoint; written after the checkpoint itself."""


def train_segmenter(
    config_path: Path | str,
    *,
    weights: Path | str | None = None,
    work_dir: Path | str,
    cfg_options: Mapping[str, Any] | Sequence[str] | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Train what an mmseg config describes and return its last evaluation, which is also written to metrics.json.

    weights      any file the loader takes; None trains from scratch
    work_dir     the run directory, new or empty unless ``resume``
    cfg_options  ``key=value`` texts or a mapping, keys as in ``model.backbone.drop_path``; variables of the config too
    returns      mIoU, mAcc, aAcc and per_class (name -> IoU, Acc) in percent, steps, seconds

    Data, weights and options are checked first: ``UserError`` comes before anything is written. May be called again in
    the same process.
    """
    require("mmseg")
    check_config_exists(Path(config_path))
    join("auto")  # torchrun's ranks; a single process stays alone
    checkpoint = find_checkpoint(Path(work_dir), resume=resume)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(mmcv|mmengine|mmseg)(\.|$)")
        with redirect_stdout(io.StringIO()):  # mmseg prints that optional packages are absent
            from transfer.segmentation import engine_mmseg

        options = cfg_options if isinstance(cfg_options, Mapping) else engine_mmseg.parse_options(cfg_options or ())
        return engine_mmseg.train(
            config_path, weights=weights, work_dir=work_dir, options=options, checkpoint=checkpoint
        )


def find_checkpoint(work_dir: Path, *, resume: bool) -> Path | None:
    """The checkpoint to resume from, or None for a new run.

    Raises ``UserError`` where a new run meets a folder in use, or a resumed one finds nothing whole.
    """
    if not resume:
        if work_dir.exists() and (not work_dir.is_dir() or any(work_dir.iterdir())):
            raise UserError(
                f"{work_dir} is not empty; give another --work-dir, or --resume to go on with the run in it"
            )
        return None
    pointer = work_dir / LAST_CHECKPOINT
    if not pointer.is_file():
        raise UserError(f"{work_dir} holds no checkpoint to resume from; leave --resume out to start a run there")
    checkpoint = work_dir / Path(pointer.read_text().strip()).name
    if not zipfile.is_zipfile(checkpoint):
        raise UserError(f"checkpoint {checkpoint} is missing or truncated; name an earlier one in {pointer}")
    return checkpoint


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; exits with code 2 on a mistake of the user's."""
    parser = argparse.ArgumentParser(
        prog="train_net.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("config", type=Path, metavar="CONFIG", help="an mmseg config, such as one of configs/segmentation")
    add("--weights", type=Path, metavar="FILE", help="encoder.safetensors, a run directory or an official file")
    add("--work-dir", type=Path, metavar="DIR", help="run directory; runs/segmentation/<config> when left out")
    add("--resume", action="store_true", help="go on from the last checkpoint in the work dir")
    add(
        "--cfg-options",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="change the config: its variables (data_root=PATH crop_size=256) or its keys (train_cfg.max_iters=2000)",
    )
    given = parser.parse_args(arguments)
    work_dir = given.work_dir or Path("runs/segmentation") / given.config.stem
    with user_errors():
        place = join("auto")
        results = train_segmenter(
            given.config, weights=given.weights, work_dir=work_dir, cfg_options=given.cfg_options, resume=given.resume
        )
        if "mIoU" not in results:
            raise UserError(f"{given.config} evaluates no mIoU; set val_evaluator to PerClassIoUMetric")
        leave()
        if not place.is_main:
            return
        print(f"{'class':<24} {'IoU':>6} {'Acc':>6}")
        for name, values in results["per_class"].items():
            print(f"{name:<24} {_cell(values['IoU'])} {_cell(values['Acc'])}")
        print(f"mIoU {results['mIoU']:.2f}  mAcc {results['mAcc']:.2f}  aAcc {results['aAcc']:.2f}  (percent)")
        print(f"wrote {work_dir}/ in {results['seconds']:.0f} s: metrics.json, pictures/, segmenter.safetensors")


def _cell(value: float | None) -> str:
    return f"{'-' if value is None else format(value, '.2f'):>6}"


if __name__ == "__main__":
    main()
