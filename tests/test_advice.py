"""Advice in messages can be followed: every option that a message names exists in the commands that print it, and what
was never tried is tried."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from mae_core.cli.main import app
from mae_core.config.load import load_config
from mae_core.config.schema import leaf_names
from mae_core.data.sources import open_source
from mae_core.errors import UserError
from mae_core.training.finetune import check_pairs, finetune
from mae_core.training.finetune_config import FinetuneConfig
from mae_core.training.frozen_config import EvaluateConfig, FeaturesConfig, KnnConfig, LinprobeConfig
from mae_core.training.linprobe import check_batches
from mae_core.training.pretrain import pretrain
from mae_core.training.pretrain_config import PretrainConfig
from mae_core.training.tokenizer_config import TokenizerConfig
from mae_core.training.watch import split_images
from transfer.compare.config import CompareConfig
from transfer.detection.config import DetectionConfig
from transfer.segmentation.config import variables_of

ROOT = Path(__file__).resolve().parents[1]
SCHEMAS = {
    "pretrain": PretrainConfig,
    "fit-pca": PretrainConfig,
    "train-tokenizer": TokenizerConfig,
    "finetune": FinetuneConfig,
    "linprobe": LinprobeConfig,
    "knn": KnnConfig,
    "features": FeaturesConfig,
    "evaluate": EvaluateConfig,
    "detect": DetectionConfig,
    "compare": CompareConfig,
}
SCRIPTS = {
    "detect": "detection/train_net",
    "detect-predict": "detection/predict",
    "detect-export": "detection/export",
    "check-coco": "detection/check_data",
    "segment": "segmentation/train_net",
    "segment-predict": "segmentation/predict",
    "segment-export": "segmentation/export",
    "check-labels": "segmentation/check_data",
}
RUNS = ("pretrain", "train-tokenizer", "finetune", "linprobe", "detect")
"""Commands whose run can be resumed."""
IMAGES = (*RUNS, "fit-pca", "knn", "features", "evaluate")
PRINTED_BY: dict[str, tuple[str, ...]] = {
    "mae_core/atomic.py": ("reconstruct", "detect-predict", "segment-predict"),
    "mae_core/cli/arguments.py": ("pretrain",),
    "mae_core/cli/tasks.py": ("detect-predict", "segment-predict"),
    "mae_core/cli/checking.py": ("check-images", "data-stats"),
    "mae_core/cli/data.py": ("shrink", "bench-data"),
    "mae_core/cli/looking.py": ("reconstruct",),
    "mae_core/cli/main.py": ("fit-pca",),
    "mae_core/cli/running.py": ("slurm", "report"),
    "mae_core/cli/configuring.py": ("config-show",),
    "mae_core/cli/weights.py": ("inspect", "convert", "export"),
    "mae_core/config/sections.py": ("finetune", "detect"),
    "mae_core/config/": ("pretrain", "finetune", "detect"),
    "mae_core/data/loading.py": ("pretrain",),
    "mae_core/data/rates.py": ("bench-data",),
    "mae_core/data/remote.py": ("pretrain",),
    "mae_core/data/check.py": ("check-images", "check-folders", "check-coco", "check-labels"),
    "mae_core/data/contact_sheet.py": ("check-images", "check-folders", "check-coco", "check-labels"),
    "mae_core/data/survey.py": ("check-images", "data-stats"),
    "mae_core/data/labelled.py": ("finetune",),
    "mae_core/data/sources.py": ("pretrain", "train-tokenizer", "fit-pca"),
    "mae_core/data/views.py": ("finetune",),
    "mae_core/data/": IMAGES,
    "mae_core/measures/robustness.py": ("evaluate",),
    "mae_core/models/classifier.py": ("finetune",),
    "mae_core/models/exporting.py": ("export",),
    "mae_core/models/probe.py": ("linprobe",),
    "mae_core/models/decoder.py": ("pretrain",),
    "mae_core/models/distillation.py": ("pretrain",),
    "mae_core/models/mae.py": ("pretrain",),
    "mae_core/models/timm_trunk.py": ("finetune", "linprobe", "knn"),
    "mae_core/models/": ("pretrain", "finetune", "detect"),
    "mae_core/patches.py": ("pretrain",),
    "mae_core/resuming.py": RUNS,
    "mae_core/targets.py": ("pretrain",),
    "mae_core/training/embedding.py": ("features",),
    "mae_core/training/evaluate.py": ("evaluate",),
    "mae_core/training/feature_map.py": ("map",),
    "mae_core/training/features.py": ("knn", "features"),
    "mae_core/training/finetune": ("finetune",),
    "mae_core/training/frozen_config.py": ("linprobe",),
    "mae_core/training/frozen_trunk.py": ("linprobe", "knn", "features"),
    "mae_core/training/linprobe.py": ("linprobe",),
    "mae_core/training/pca.py": ("fit-pca",),
    "mae_core/training/viewer.py": ("reconstruct",),
    "mae_core/training/finite.py": ("pretrain", "train-tokenizer", "finetune", "detect"),
    "mae_core/training/distributed.py": IMAGES,
    "mae_core/training/progress.py": ("pretrain", "train-tokenizer", "finetune", "detect"),
    "mae_core/training/checkpoints.py": RUNS,
    "mae_core/training/run.py": RUNS,
    "mae_core/training/loop.py": RUNS,
    "mae_core/training/machine_faults.py": ("pretrain", "finetune"),
    "mae_core/training/same_data.py": RUNS,
    "mae_core/training/lock.py": RUNS,
    "mae_core/training/resuming_proof.py": ("verify-resume",),
    "mae_core/training/slurm.py": ("slurm",),
    "mae_core/training/": ("pretrain",),
    "mae_core/weights/catalogue.py": ("weights-get",),
    "mae_core/weights/encoder_file.py": ("linprobe", "knn", "features", "finetune"),
    "mae_core/weights/parts.py": ("convert", "knn"),
    "mae_core/weights/timm_file.py": ("finetune", "knn"),
    "mae_core/weights/tools/": ("convert",),
    "mae_core/weights/": ("inspect", "convert", "export", "reconstruct"),
    "transfer/compare/": ("compare", "finetune", "pretrain", "detect", "segment"),
    "transfer/detection/commands.py": ("detect", "detect-predict"),
    "transfer/detection/labels/cutting.py": ("labels-tile",),
    "transfer/detection/labels/": ("labels-convert", "detect"),
    "transfer/detection/detector.py": ("detect-predict", "detect"),
    "transfer/detection/export.py": ("detect-export",),
    "transfer/detection/predict.py": ("detect-predict", "detect"),
    "transfer/detection/": ("detect",),
    "transfer/segmentation/predict.py": ("segment-predict",),
    "transfer/segmentation/export.py": ("segment-export",),
    "transfer/segmentation/engine_mmseg/exporting.py": ("segment-export",),
    "transfer/segmentation/engine_mmseg/published.py": ("convert",),
    "transfer/segmentation/check_data.py": ("check-labels",),
    "transfer/segmentation/commands.py": ("mae-segment",),
    "transfer/segmentation/config.py": ("segment", "mae-segment", "segment-predict"),
    "transfer/segmentation/engine_mmseg/options.py": ("segment", "mae-segment"),
    "transfer/segmentation/": ("segment",),
    "transfer/report/runs.py": ("report",),
    "transfer/": ("detect",),
}
"""Start of a file's name -> the commands that print its messages; the first start that fits counts."""

SECTIONS = sorted({name.split(".")[0] for schema in SCHEMAS.values() for name in leaf_names(schema) if "." in name})
FLAG = re.compile(r"(?<![\w.-])--[a-z][a-z_-]+")
KEY = re.compile(rf"(?<![\w./{{])(?:{'|'.join(SECTIONS)})(?:\.[a-z_0-9]+)+(?![\w(.])|(?<![\w.(-])[a-z_]+(?==[\w\[{{])")
OF_OTHERS = {"--nproc_per_node", "--nnodes", "--node_rank", "--master_addr", "--help", "--shm-size"}
OF_OTHERS |= {"--requeue", "--wait", "--kill-on-bad-exit", "--cpus-per-task", "partition"}
OF_OTHERS |= {"key", "log.jsonl", "data.yaml", "model.safetensors", "bytes", "k", "norm_layer", "pretrained"}
"""torchrun's and Slurm's, those of other libraries, and words that only look like options."""
ONE_OF_THEM = (
    "mae_core/cli/",
    "mae_core/weights/",
    "transfer/compare/",
    "transfer/segmentation/config.py",
    "transfer/segmentation/engine_mmseg/options.py",
    "transfer/detection/commands.py",
    "transfer/detection/labels/",
    "transfer/detection/predict.py",
    "transfer/detection/detector.py",
)
"""Files of several commands, whose messages belong to one of them each."""
FRAGMENTS = {"--drop '{}'", "--branch {}", " --boxes-only"}
"""Parts of a command that the message names in full."""
SEGMENT_KEYS = {
    "model.backbone.trainable_blocks": 1,
    "model.backbone.size": "tiny",
    "model.backbone.relative_positions": "none",
    "model.backbone.layer_scale": None,
    "model.backbone.in_chans": 4,
    "model.data_preprocessor.mean": [1, 2, 3],
    "model.data_preprocessor.std": [1, 2, 3],
    "model.test_cfg.mode": "slide",
    "optim_wrapper.optimizer.lr": 1e-5,
    "train_cfg.max_iters": 100,
}
"""Keys of mmseg's configs that messages name, and a value."""
ELSEWHERE: dict[str, set[str]] = {
    "detect": {"train.max_iter", "train.init_checkpoint", "train.output_dir"},
    "segment": set(SEGMENT_KEYS),
    "mae-segment": {"weights", "from_scratch", "precision", "output", "data.path", "--resume", "--out", "--to"},
    **{
        name: set(leaf_names(PretrainConfig))
        for name in ("check-images", "check-folders", "data-stats", "shrink", "bench-data")
    },
}
"""Keys of detectron2's LazyConfigs and of mmseg's configs; a check speaks of the options of the training."""


def messages(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of every string that is no docstring and has several words; ``{}`` stands for a value."""
    silent: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            silent.add(id(node.value))
        if isinstance(node, ast.JoinedStr):
            silent.update(id(part) for part in ast.walk(node) if part is not node)
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr) and id(node) not in silent:
            yield node.lineno, "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in silent:
            if " " in node.value:
                yield node.lineno, node.value


@cache
def options_of(command: str) -> frozenset[str]:
    """The options of a command: its flags, and the keys of its configuration."""
    found = set(leaf_names(SCHEMAS[command])) if command in SCHEMAS else set()
    found |= ELSEWHERE.get(command, set())
    if command in SCRIPTS:
        source = (ROOT / "transfer" / f"{SCRIPTS[command]}.py").read_text("utf-8")
        flags = set(re.findall(r"add(?:_argument)?\(\s*\"(--[a-z-]+)\"", source))
        flags |= {f"--no-{flag[2:]}" for flag in flags}
        if command in ("segment", "check-labels"):
            flags |= variables_of(ROOT / "configs" / "segmentation" / "own_data.py")
        return frozenset(found | flags)
    if command == "mae-segment":  # hands its words to train_net.py
        return frozenset(found)
    here: Any = typer.main.get_command(app)
    nested = command.startswith(("check-", "weights-", "config-", "labels-"))
    for word in command.split("-", 1) if nested else [command]:
        here = here.commands[word]
    return frozenset(found | {flag for parameter in here.params for flag in parameter.opts})


def is_option(where: str, option: str, commands: Sequence[str], text: str, arguments: set[str]) -> bool:
    """Whether all ``commands`` take ``option``, or the command that ``text`` names, or a Python function beside it."""
    one_of_them = any if where.startswith(ONE_OF_THEM) else all
    if option in OF_OTHERS or one_of_them(option in options_of(command) for command in commands):
        return True
    if "." not in option and any(name.endswith(f".{option}") for command in commands for name in options_of(command)):
        return True  # a validator's message, which begins with the section
    said = re.findall(r"\bmae (convert|inspect|export|fit-pca|data-stats|pretrain)\b", text)
    said += ["pretrain"] * ("a run's configuration" in text)
    return text in FRAGMENTS or any(option in options_of(command) for command in said) or option in arguments


def unknown_options(path: Path) -> list[str]:
    """The messages of a file that name an option which its commands do not have."""
    where, tree = path.relative_to(ROOT).as_posix(), ast.parse(path.read_text("utf-8"))
    commands = next((commands for start, commands in PRINTED_BY.items() if where.startswith(start)), ())
    functions = [node.args for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    arguments = {arg.arg for each in functions for arg in (*each.args, *each.kwonlyargs)} | PYTHON
    return [
        f"{where}:{line}: {option} in {text!r}"
        for line, text in messages(tree)
        for option in sorted({*FLAG.findall(text), *KEY.findall(text)})
        if not commands or not is_option(where, option, commands, text, arguments)
    ]


PYTHON = {
    "target",
    "patch_size",
    "cls_token",
    "decoder_heads",
    "heads",
    "in_chans",
    "num_classes",
    "trainable_blocks",
    "predict_visible",
}
"""Arguments of functions of the Python interface that messages of other files name."""


@pytest.mark.parametrize("package", ["mae_core", "transfer"])
def test_every_option_that_a_message_names_exists_in_the_commands_that_print_it(package):
    files = [path for path in sorted((ROOT / package).rglob("*.py")) if path.name != "dialects.py"]  # others' words
    found = [line for path in files for line in unknown_options(path)]
    assert not found, "correct the message, or PRINTED_BY, for:\n" + "\n".join(found)


@pytest.mark.parametrize("key", SEGMENT_KEYS)
def test_every_key_of_a_segmenter_that_a_message_names_is_taken(key):
    pytest.importorskip("mmseg", reason="mmseg is not installed; pip install mae-transfer[segmentation]")
    from transfer.segmentation.engine_mmseg.options import read_config

    read_config(ROOT / "configs" / "segmentation" / "own_data.py", {key: SEGMENT_KEYS[key]})


def test_the_audit_sees_options_that_do_not_exist(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    path = tmp_path / "mae_core" / "data" / "x.py"
    path.parent.mkdir(parents=True)
    path.write_text('raise E(f"{a} is wrong; set data.no_such={b}, --split {c}, data.max_pixels=3 or sheets=first")')
    assert [line.split()[1] for line in unknown_options(path)] == ["--split", "data.no_such", "sheets"]


def watched(options: list[str], tmp_path: Path) -> None:
    config = load_config(PretrainConfig, None, [f"data.path={tmp_path / 'images'}", *options])
    split_images(config, open_source(config.data))


def pairs(options: list[str], tmp_path: Path) -> None:
    check_pairs(load_config(FinetuneConfig, None, ["from_scratch=true", "optim.batch_size=8", *options]))


def probed(options: list[str], tmp_path: Path) -> None:
    check_batches(load_config(LinprobeConfig, None, ["weights=x", *options]).optim)


@pytest.mark.parametrize(
    ("run", "typed", "advice", "followed"),
    [
        (watched, ["watch.share=0.99"], "lower it, or name other images with watch.path", ["watch.share=0.5"]),
        (watched, ["watch.share=0.99"], "watch.path", ["watch.path={}/images"]),
        (watched, ["watch.labelled={}/set", "watch.neighbours=99"], "lower it", ["watch.neighbours=2"]),
        (pairs, ["optim.micro_batch=3"], "an even optim.micro_batch", ["optim.micro_batch=4"]),
        (pairs, ["optim.batch_size=7"], "optim.batch_size gives each rank 7", ["optim.batch_size=6"]),
        (pairs, ["optim.batch_size=7"], "data.mixup=0 data.cutmix=0", ["data.mixup=0", "data.cutmix=0"]),
        (probed, ["optim.batch_size=9", "optim.micro_batch=4"], "optim.micro_batch", ["optim.micro_batch=3"]),
        (probed, ["optim.batch_size=9", "optim.micro_batch=4"], "change optim.batch_size", ["optim.batch_size=8"]),
    ],
)
def test_advice_of_refusals_ends_them(tmp_path, write_images, write_classes, run, typed, advice, followed):
    write_images(tmp_path / "images", 3)
    write_classes(tmp_path / "set")
    typed, followed = ([word.format(tmp_path) for word in words] for words in (typed, followed))
    with pytest.raises(UserError, match=advice):
        run(typed, tmp_path)
    kept = [word for word in typed if followed[0].startswith("watch.path") is False or "share" not in word]
    run([*kept, *followed], tmp_path)


def test_an_average_over_more_steps_than_the_run_has(tmp_path, write_classes, capsys):
    options = [f"data.path={write_classes(tmp_path / 'set')}", "from_scratch=true", "model.size=nano", "device=cpu"]
    options += ["model.patch_size=8", "data.image_size=16", "data.workers=0", "optim.epochs=1", "optim.batch_size=4"]
    options += ["optim.warmup_epochs=0", "precision=fp32"]
    for typed, told in (("ema=0.9999", True), ("ema=null", False)):
        finetune(load_config(FinetuneConfig, None, [*options, typed, f"output={tmp_path / typed}"]))
        assert ("set ema=null" in capsys.readouterr().out) == told


@pytest.mark.parametrize("options", ["data.workers=4", "log.every=5", "log.pictures_every=7", "log.checkpoint_every=3"])
@pytest.mark.parametrize("schema", [PretrainConfig, FinetuneConfig, DetectionConfig])
def test_every_training_takes_what_is_advised_on_speed_and_logs(schema, options):
    given = [options, *([] if schema is PretrainConfig else ["from_scratch=true"])]
    config: Any = load_config(schema, None, [*given, "output=x"])
    section, name, value = re.fullmatch(r"(\w+)\.(\w+)=(\d+)", options).groups()  # type: ignore[union-attr]
    assert getattr(getattr(config, section), name) == int(value)


def test_a_lower_rate_in_another_folder_after_losses_that_are_not_finite(pretrain_options, tmp_path, write_images):
    write_images(tmp_path / "images", 8)
    options = [*pretrain_options, f"data.path={tmp_path / 'images'}", "optim.warmup_epochs=0", "optim.epochs=12"]
    options += ["log.checkpoint_every=1"]

    def run(rate: str, folder: str, **more) -> None:
        config = load_config(PretrainConfig, None, [*options, f"optim.base_lr={rate}", f"output={tmp_path / folder}"])
        pretrain(config, **more)

    with pytest.raises(UserError, match=r"not finite .* start again with a lower optim.base_lr, in another folder"):
        run("1e30", "first")
    with pytest.raises(UserError, match="not finite"):
        run("1e-3", "first", resume=True)  # "if that does not help": the checkpoint's weights are too large
    run("1e-3", "second")
    assert (tmp_path / "second" / "encoder.safetensors").is_file()
