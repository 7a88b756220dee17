"""Changes to an mmseg config before it runs: options of the command line, facts of the weights file, the machine.

Nothing here imports mmseg; a config is its nested dicts and lists.
"""

from __future__ import annotations

import ast
import difflib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mae_core.config.recipes import which_recipe
from mae_core.config.schema import hint
from mae_core.data.decoding import LARGEST_PIXEL
from mae_core.data.images import DEFAULT_STATISTICS, Statistics
from mae_core.data.reading import TIMEOUT
from mae_core.data.statistics import Measured, describe_statistics
from mae_core.errors import UserError
from mae_core.models.sizes import SIZES, alike, size_of
from mae_core.models.timm_trunk import described
from mae_core.texts import read_text
from mae_core.weights.encoder_file import EncoderFile
from mae_core.weights.load import settled
from transfer.segmentation.segmenter_file import step_of

RECIPES = "segmentation"
"""Folder of ``configs/`` that holds the recipes."""
WORK_DIR = "--work-dir (mae segment calls it output)"
DATA_ROOT = "data_root (mae segment calls it data.path)"
BACKBONE = "MAECoreViT"
CPU_MIXED = "MAECoreCPUMixed"
"""The optimizer wrapper for bfloat16 on a CPU: mmengine's own wants a GPU."""
SCALE = 255
"""mmseg's means and deviations are of pixels in 0..255, those of weights files in 0..1."""
BASES = "_base_"
LEAST = {
    **dict.fromkeys(("num_classes", "crop_size", "batch_size", "iterations", "warmup", "patch_size"), 1),
    **dict.fromkeys(("width", "head_width"), 1),
    "workers": 0,
}
"""Variables of the recipes that are counts, and the least that each may be."""
RATE = "lr"
LARGEST_SEED = 2**32 - 1
"""NumPy's, which mmengine seeds too."""
READERS = ("LoadImageFromFile", "NamedImage")
LABEL_READERS = ("LoadAnnotations", "NamedLabels")
COLOUR_STEPS = ("PhotoMetricDistortion", "EightBitDistortion", "RGB2Gray", "CLAHE", "AdjustGamma")
"""Steps of mmseg's pipelines that take red, green and blue of 8 bits."""


def check_config_exists(path: Path) -> None:
    """Raise ``UserError``, with a guess, unless ``path`` is a Python file."""
    if not path.is_file() or path.suffix != ".py":
        near = difflib.get_close_matches(path.name, [other.name for other in path.parent.glob("*.py")], n=1)
        told = f"did you mean {path.parent / near[0]}?" if near else which_recipe(path, RECIPES)
        raise UserError(f"config {path} does not exist or is not a .py file; {told}")


def variables_of(path: Path) -> set[str]:
    """Names that a config file and its bases assign at their top level."""
    tree = _parse(path)
    own = {name for name, _ in _assignments(tree) if name != BASES}
    return own.union(*(variables_of(base) for base in _bases(tree, path.parent)))


def copy_with_variables(path: Path, values: Mapping[str, Any], folder: Path) -> Path:
    """Copy a config and its bases into ``folder`` with top-level assignments replaced by ``values``; returns the copy.

    Whatever is computed from a variable, in a base too, then follows. mmengine merges options into the finished config
    only, where a changed ``crop_size`` or ``data_root`` would reach no pipeline.
    """
    tree = _parse(path)
    copies = [
        copy_with_variables(base, values, folder / f"base{number}")
        for number, base in enumerate(_bases(tree, path.parent))
    ]
    for name, assignment in _assignments(tree):
        if name == BASES or name in values:
            value = list(map(str, copies)) if name == BASES else values[name]
            assignment.value = ast.parse(repr(value), mode="eval").body
    folder.mkdir(parents=True, exist_ok=True)
    copy = folder / path.name
    copy.write_text(ast.unparse(tree), encoding="utf-8")
    return copy


def _parse(path: Path) -> ast.Module:
    return ast.parse(read_text(path), filename=str(path))


def _bases(tree: ast.Module, folder: Path) -> list[Path]:
    """The base files of a config, as absolute paths. Raises ``UserError`` for those that belong to a package."""
    given = [ast.literal_eval(assignment.value) for name, assignment in _assignments(tree) if name == BASES]
    bases = [base for entry in given for base in ([entry] if isinstance(entry, str) else entry)]
    if foreign := [base for base in bases if "::" in base]:
        raise UserError(
            f"the base {foreign[0]!r} lies in a package, where the maintained forks of mmengine do not find it; "
            "copy the file and name its path"
        )
    return [(folder / base).resolve() for base in bases]


def _assignments(tree: ast.Module) -> Iterator[tuple[str, ast.Assign]]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            yield node.targets[0].id, node


def check_key(
    config: Mapping[str, Any], key: str, accepted: Callable[[str, Mapping[str, Any]], Collection[str]]
) -> Any:
    """The value of ``key`` (``a.b.0.c``), None where the config lacks it and its parent takes it; else a ``UserError``
    with a guess.

    ``accepted(path, node)`` names what a section takes besides the keys it has, such as the arguments of its ``type``.
    """
    node: Any = config
    place: list[str] = []
    for part in key.split("."):
        where = ".".join(place)
        if isinstance(node, Mapping):
            known = set(node) | set(accepted(where, node))
            if part not in known:
                prefix = f"{where}." if where else ""
                near = hint(prefix + part, [prefix + name for name in known])
                raise UserError(f"unknown config option {key!r}; {near}")
            if part not in node:
                return None  # taken by the section's type, which checks what is below
            node = node[part]
        elif isinstance(node, Sequence) and not isinstance(node, str):
            if not part.isdigit() or int(part) >= len(node):
                raise UserError(f"config option {key!r}: {where} is a list of {len(node)}; give an index below that")
            node = node[int(part)]
        else:
            raise UserError(f"config option {key!r}: {where} is {node!r} and has no {part!r}")
        place.append(part)
    return node


def check_kind(key: str, stated: Any, given: Any) -> None:
    """Raise ``UserError`` where an option gives a text for what the config has as a number or as a section, or a number
    that is none."""
    if isinstance(stated, int | float) and isinstance(given, str):
        wanted = "True or False" if isinstance(stated, bool) else "a number, not a text"
        raise UserError(f"config option {key}={given}: the config has {stated} there; give {wanted}")
    if isinstance(given, float) and not math.isfinite(given):
        raise UserError(f"config option {key}={given}: give a finite number")
    if stated and isinstance(stated, Mapping) and isinstance(given, str):
        raise UserError(f"config option {key}={given}: {key} is a section; set its keys, such as {key}.{min(stated)}")


def check_variable(name: str, stated: Any, given: Any) -> None:
    """``check_kind`` of a variable of a config. Raises ``UserError`` too for a count that is no whole number or too
    small, where the config has a count, and for a rate that trains nothing."""
    check_kind(name, stated, given)
    counts = name in LEAST and isinstance(stated, int)
    if counts and (not isinstance(given, int) or isinstance(given, bool) or given < LEAST[name]):
        raise UserError(f"config option {name}={given}: give a whole number, {LEAST[name]} or more")
    if name == RATE and isinstance(stated, int | float) and not (isinstance(given, int | float) and given > 0):
        raise UserError(f"config option {name}={given}: give a number above 0")


def fit_to_trunk(config: MutableMapping[str, Any], options: Collection[str]) -> list[str]:
    """Put patch size and width of a trunk of timm, where the config names one, into neck, heads and padding; returns
    what to tell the user.

    Raises ``UserError`` where an option the user gave (``options``: their keys) is of the toolkit's own ViT.
    """
    model = config["model"]
    backbone = model["backbone"]
    trunk = backbone.get("trunk")
    if trunk is None:
        return []
    if given := {"size", "width", "model.backbone.size"}.intersection(options):
        raise UserError(f"{min(given)} was given, but trunk={trunk} decides it; leave one of them out")
    backbone.pop("size", None)
    before, width = backbone.get("patch_size"), described(trunk).width
    if not {"patch_size", "model.backbone.patch_size"}.intersection(options):
        backbone["patch_size"] = described(trunk).patch_size
    cells = preprocessor_of(config).get("test_cfg") or {}
    if before and cells.get("size_divisor"):
        cells["size_divisor"] = cells["size_divisor"] * backbone["patch_size"] // before
    if model.get("neck"):
        model["neck"]["embed_dim"] = width
    for head in heads_of(config):
        several = head["in_channels"]
        head["in_channels"] = width if isinstance(several, int) else [width] * len(several)
    return [f"trunk: {trunk}, patches of {backbone['patch_size']}, maps of {width} channels"]


def fit_to_weights(config: MutableMapping[str, Any], source: EncoderFile, options: Collection[str] = ()) -> list[str]:
    """Put size, patch, channels and normalisation of a weights file into a config; returns what to tell the user.

    Raises ``UserError`` where the config, or an option the user gave (``options``: their keys), says otherwise.
    """
    backbone = config["model"]["backbone"]
    if backbone["type"] != BACKBONE:
        raise UserError(f"weights load only into a {BACKBONE} backbone, but this config builds a {backbone['type']}")
    if source.info.timm is not None:
        sides = {name: getattr(source, name) for name in ("patch_size", "in_chans")}
        given = {name: backbone.get(name) for name in ("trunk", *sides)}
        backbone.update(settled(source.path, given, must={"trunk": source.info.timm, **sides}, section="backbone."))
        backbone["weights"] = str(source.path)
        return fit_statistics_of(config, source.metadata, str(source.path), options)
    trunk = asdict(source.shape)
    size: Any = source.shape.name if source.shape.name in SIZES else trunk
    if source.shape.name in SIZES and any(trunk[name] != asdict(size_of(size))[name] for name in UNNAMED):
        size = trunk
    stated = backbone.get("size")
    if stated is not None and alike(stated, source.shape):
        stated = size  # the file has the last word on epsilon and activation, and on heads
    given = {"size": stated, **{name: backbone.get(name) for name in ("patch_size", "in_chans")}}
    facts = {"size": size, "patch_size": source.patch_size, "in_chans": source.in_chans}
    backbone.update(settled(source.path, given, must=facts, section="backbone."))
    backbone["weights"] = str(source.path)
    return fit_statistics_of(config, source.metadata, str(source.path), options)


def fit_to_run(
    config: MutableMapping[str, Any], stored: Mapping[str, Any], checkpoint: Path, options: Collection[str]
) -> list[str]:
    """As ``fit_to_weights``, with what a resumed run started with: ``stored`` is the config in its checkpoint."""
    theirs, backbone = stored.get("model", {}).get("backbone", {}), config["model"]["backbone"]
    backbone.pop("weights", None)
    sizes = [section["size"] for section in (theirs, backbone) if section.get("size") is not None]
    if backbone["type"] == BACKBONE and len(sizes) == 2 and alike(*sizes):
        backbone["size"] = sizes[0]  # with the weights' epsilon and activation, which a name of a size does not state
    preprocessor = preprocessor_of(stored) if stored else {}
    facts = {key: [value / SCALE for value in preprocessor.get(key) or []] for key in ("mean", "std")}
    return fit_statistics_of(config, facts, str(checkpoint), options)


def preprocessor_of(config: Mapping[str, Any]) -> MutableMapping[str, Any]:
    """The section that standardises pixels: of the model or, in older configs, beside it."""
    found: MutableMapping[str, Any] = config["model"].get("data_preprocessor") or config["data_preprocessor"]
    return found


def fit_statistics_of(
    config: Mapping[str, Any], facts: Mapping[str, Any], path: str, options: Collection[str]
) -> list[str]:
    """Put the mean and std (of pixels in 0..1) that a file states into a config; returns what to tell the user.

    Raises ``UserError`` where an option the user gave (``options``: their keys) says otherwise.
    """
    preprocessor, notes = preprocessor_of(config), []
    for key in ("mean", "std"):
        if not facts.get(key):
            continue
        found = [round(SCALE * value, 4) for value in facts[key]]
        stated = list(preprocessor.get(key) or [])
        if len(stated) == len(found) and all(abs(a - b) < 0.01 for a, b in zip(stated, found, strict=True)):
            continue
        if stated and f"model.data_preprocessor.{key}" in options:
            raise UserError(f"{key}={stated} was asked for, but {path} was trained with {found}; leave it out")
        preprocessor[key] = found
        if stated:
            notes.append(f"{key} {found} of {path} replaces {stated} of the config")
    return notes


def fit_statistics(
    config: Mapping[str, Any], weights: Mapping[str, Any] | None, measure: Callable[[], Measured]
) -> list[str]:
    """Fill the mean and std that a config leaves open (None); returns which are used and where they come from.

    weights  what the file of the encoder states; None from scratch. Weights that state none were trained with
             ImageNet's
    measure  the statistics of the training images, for a training from scratch

    Raises ``UserError`` where they are of another number of channels, and where weights that state none do not have
    ImageNet's channels.
    """
    preprocessor, channels = preprocessor_of(config), channels_of(config)
    stated = {key: preprocessor.get(key) for key in ("mean", "std")}
    for key, values in stated.items():
        if values is not None and len(values) not in (1, channels):
            raise UserError(
                f"model.data_preprocessor.{key} has {len(values)} numbers, but the encoder takes {channels} channels; "
                f"give {channels}, 255 times what mae data-stats finds, or None for those of the training images"
            )
    if config["model"]["backbone"]["type"] != BACKBONE:
        return []
    notes: list[str] = []
    if all(stated.values()):
        where, usual = "those of the weights" if weights and weights.get("mean") else "as configured", None
    elif weights is None:
        usual, images, notes = measure()
        where = f"measured on {images} training images"
    elif channels in DEFAULT_STATISTICS:
        where, usual = "ImageNet's: the weights file does not state them", Statistics(*DEFAULT_STATISTICS[channels])
    else:
        raise UserError(
            f"there is no default mean and std for {channels} channels, and the weights file states none; set "
            f"model.data_preprocessor.mean and model.data_preprocessor.std to {channels} numbers each, 255 times what "
            "mae data-stats finds"
        )
    for key, values in stated.items():
        chosen = values or [SCALE * value for value in getattr(usual, key)]
        preprocessor[key] = [round(value, 4) for value in (chosen * channels if len(chosen) == 1 else chosen)]
    used = Statistics(*(tuple(value / SCALE for value in preprocessor[key]) for key in stated))
    return [f"pixels are standardised with {describe_statistics(used)} ({where})", *(f"note: {note}" for note in notes)]


def check_frozen_blocks_have_weights(config: Mapping[str, Any]) -> None:
    """Raise ``UserError`` where a training from scratch would freeze blocks that are random."""
    if config["model"]["backbone"].get("trainable_blocks") is not None:
        raise UserError(
            "model.backbone.trainable_blocks freezes the other blocks, which are random without weights; "
            "give --weights FILE, or leave it out"
        )


UNNAMED = ("norm_eps", "activation", "cls_token")
"""What the name of a size says nothing of."""


def channels_of(config: Mapping[str, Any]) -> int:
    """How many channels the encoder of a config takes."""
    backbone = config["model"]["backbone"]
    return backbone.get("in_chans") or backbone.get("in_channels") or 3


def fit_channels(config: MutableMapping[str, Any]) -> list[str]:
    """Make every pipeline read as many channels as the encoder takes; returns what to tell the user.

    What distorts colours is left out where there are not three.
    """
    channels = channels_of(config)
    preprocessor = preprocessor_of(config)
    if (
        channels not in (1, 3)
        and preprocessor.get("mean") is not None
        and preprocessor["type"] == "SegDataPreProcessor"
    ):
        preprocessor["type"] = "ManyChannelPreProcessor"
    left_out = False
    for section in sections(dict(config)):
        for key, steps in section.items():
            if not isinstance(steps, list) or not key.endswith(("pipeline", "transforms")):
                continue
            kept = [step for step in steps if channels == 3 or not _is_colour_step(step)]
            left_out |= len(kept) < len(steps)
            section[key] = kept
            for step in kept:
                if isinstance(step, MutableMapping) and step.get("type") in READERS:
                    step.update(type="NamedImage", channels=channels)
                    if len(preprocessor.get("mean") or ()) == channels:
                        step["no_data"] = list(preprocessor["mean"])
                        step["largest"] = LARGEST_PIXEL * min(preprocessor["std"])
    if channels == 3:
        return []
    how = "as greyscale" if channels == 1 else f"in {channels} channels, as many as the encoder takes"
    return [f"images are read {how}{'; colour distortion is left out' * left_out}"]


def _is_colour_step(step: Any) -> bool:
    return isinstance(step, Mapping) and step.get("type") in COLOUR_STEPS


def check_widths(config: Mapping[str, Any]) -> None:
    """Raise ``UserError`` where neck or heads do not take maps as wide as the encoder's, or disagree on the classes."""
    model = config["model"]
    if any(head["num_classes"] < 2 for head in heads_of(config)):
        raise UserError(
            "num_classes is below 2: one class alone cannot be told from anything; count the background too"
        )
    if model["backbone"]["type"] != BACKBONE:
        return
    size, trunk = model["backbone"].get("size", "base"), model["backbone"].get("trunk")
    width = size_of(size).width if trunk is None else described(trunk).width
    size = trunk or (size if isinstance(size, str) else size_of(size).name)
    stated = {"model.neck.embed_dim": [model["neck"]["embed_dim"]]} if model.get("neck") else {}
    for head in heads_of(config):
        widths = head["in_channels"]
        stated.setdefault("in_channels", []).extend([widths] if isinstance(widths, int) else widths)
    for name, values in stated.items():
        if set(values) != {width}:
            raise UserError(f"{name} is {values}, but maps of a {size} encoder are {width} wide; set width={width}")
    numbers = {head["num_classes"] for head in heads_of(config)}
    if len(numbers) > 1:
        raise UserError(f"the heads disagree on num_classes: {sorted(numbers)}; give all the same")


def check_schedule(config: Mapping[str, Any]) -> None:
    """Raise ``UserError`` for a seed that is none, for no steps, or a learning-rate phase without any, which mmengine
    meets only when its run has begun, or not at all."""
    seed = (config.get("randomness") or {}).get("seed")
    if seed is not None and not (isinstance(seed, int) and 0 <= seed <= LARGEST_SEED):
        raise UserError(f"randomness.seed is {seed}; give a whole number from 0 to {LARGEST_SEED}")
    for name in ("max_iters", "val_interval"):
        number = config["train_cfg"].get(name, 1)
        if not isinstance(number, int) or number < 1:
            raise UserError(f"train_cfg.{name} is {number}; give a whole number of steps, 1 or more")
    phases = config.get("param_scheduler") or []
    for phase in [phases] if isinstance(phases, Mapping) else phases:
        begin, end = phase.get("begin", 0), phase.get("end")
        if end is not None and end <= begin:
            raise UserError(
                f"the {phase['type']} phase of param_scheduler runs from step {begin} to {end}; train for more steps"
            )


def check_test_mode(config: Mapping[str, Any]) -> None:
    """Raise ``UserError`` for a ``model.test_cfg`` that mmseg cannot test with, which it meets in the evaluation."""
    test = config["model"].get("test_cfg") or {}
    mode, window = test.get("mode", "whole"), ("crop_size", "stride")
    if mode not in ("whole", "slide"):
        raise UserError(f"model.test_cfg.mode is {mode!r}; set it to whole or slide")
    if mode == "slide" and (lacking := [name for name in window if not test.get(name)]):
        named = " and ".join(f"model.test_cfg.{name}=[rows,columns]" for name in lacking)
        raise UserError(f"model.test_cfg.mode=slide needs {named}; set them, or mode=whole")


def heads_of(config: Mapping[str, Any]) -> list[Any]:
    """The decode head and the auxiliary heads of a segmentor's config."""
    auxiliary = config["model"].get("auxiliary_head") or []
    return [config["model"]["decode_head"], *([auxiliary] if isinstance(auxiliary, Mapping) else auxiliary)]


def fit_to_machine(config: MutableMapping[str, Any], *, gpu: bool, bf16: bool, amp: bool | None = None) -> list[str]:
    """Precision and worker settings that this machine can run; returns what to tell the user.

    ``bf16``: whether the GPU, or without one the CPU, multiplies bfloat16. ``amp`` is what the user asked for, None:
    what the config says. Raises ``UserError`` for ``amp`` where neither is there.
    """
    notes = []
    wrapper = config["optim_wrapper"]
    mixed = wrapper.get("type") in ("AmpOptimWrapper", CPU_MIXED)
    if amp and not gpu and not bf16:
        raise UserError(
            "--amp was asked for, but torch sees no GPU and this CPU has no bf16; leave it out to train in fp32"
        )
    if mixed if amp is None else amp:
        wanted = wrapper.get("dtype") or ("bfloat16" if bf16 else "float16")
        if gpu:
            wrapper["type"], wrapper["dtype"] = "AmpOptimWrapper", "float16" if not bf16 else wanted
            notes.append(f"precision: mixed, {wrapper['dtype']}")
        elif bf16:
            _train_in_full(wrapper)
            wrapper["type"] = CPU_MIXED
            notes.append("precision: mixed, bfloat16, which this CPU has; --no-amp trains in fp32")
        else:
            notes.append(f"precision: fp32; there is no GPU for the config's {wanted}, and this CPU has no bf16")
            _train_in_full(wrapper)
    else:
        notes.append("precision: fp32, as the config says" if amp is None else "precision: fp32, as --no-amp says")
        _train_in_full(wrapper)
    for name in ("train_dataloader", "val_dataloader", "test_dataloader"):
        loader = config.get(name)
        if loader and not loader.get("num_workers"):
            loader["persistent_workers"], loader["timeout"] = False, 0
        elif loader:
            loader.setdefault("timeout", TIMEOUT)
    return notes


def inference_mode(
    config: Mapping[str, Any], *, mode: str | None = None, crop_size: int | None = None, stride: int | None = None
) -> dict[str, Any]:
    """The ``test_cfg`` of a segmentor for inference; what is None is the config's, then the crop and two thirds of it.

    Raises ``UserError`` for windows with gaps between them, and for a window asked of whole images.
    """
    stated = dict(config["model"].get("test_cfg") or {})
    windows = crop_size is not None or stride is not None
    mode = mode or ("slide" if windows else stated.get("mode", "whole"))
    if mode == "whole":
        if windows:
            raise UserError("--crop-size and --stride apply only to --mode slide; leave them out, or give --mode slide")
        return {"mode": "whole"}
    preprocessor = config["model"].get("data_preprocessor") or config.get("data_preprocessor") or {}
    crop = (crop_size, crop_size) if crop_size is not None else stated.get("crop_size") or preprocessor.get("size")
    if crop is None:
        raise UserError("the config names no crop; give --crop-size")
    given = stated.get("stride") if crop_size is None else None
    step = (stride, stride) if stride is not None else given or tuple(max(side * 2 // 3, 1) for side in crop)
    if min(*crop, *step) < 1 or step[0] > crop[0] or step[1] > crop[1]:
        raise UserError(f"windows of {crop} every {step} pixels leave gaps; give a --stride from 1 to the crop size")
    return {"mode": "slide", "crop_size": tuple(crop), "stride": tuple(step)}


def inference_pipeline(
    config: Mapping[str, Any], scales: Sequence[float], *, flip: bool, always: bool = False
) -> list[dict[str, Any]]:
    """The test pipeline of a config for images without truth; with several ``scales`` or ``flip`` one that mmseg's
    ``SegTTAModel`` averages over (``always``: also where it is a single view)."""
    if min(scales, default=0) <= 0:
        raise UserError(f"--scales {list(scales)} must be positive numbers; 1 is the size that the config tests at")
    steps = (config.get("val_dataloader") or config["test_dataloader"])["dataset"]["pipeline"]
    reader = {**next(step for step in steps if step["type"] in READERS), "type": "NamedImage", "on_error": "raise"}
    reader["channels"] = channels_of(config)
    resizing = [dict(step) for step in steps if step["type"] == "Resize"]
    rest = [dict(step) for step in steps if step["type"] not in (*READERS, *LABEL_READERS, "Resize")]
    if not always:
        return [reader, *resizing, *rest]
    stated = resizing[0] if resizing else {"type": "Resize", "scale_factor": 1.0, "keep_ratio": True}
    views = [[_scaled(stated, factor) for factor in scales]]
    views.append([{"type": "RandomFlip", "prob": prob} for prob in ((0.0, 1.0) if flip else (0.0,))])
    return [reader, {"type": "TestTimeAug", "transforms": [*views, *([step] for step in rest)]}]


def _scaled(resize: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """A ``Resize`` step whose result is ``factor`` times as large."""
    if resize.get("scale_factor"):
        return {**resize, "scale_factor": factor * resize["scale_factor"]}
    return {**resize, "scale": tuple(max(round(factor * side), 1) for side in resize["scale"])}


def _train_in_full(wrapper: MutableMapping[str, Any]) -> None:
    wrapper["type"] = "OptimWrapper"
    for key in ("dtype", "loss_scale", "use_fsdp"):
        wrapper.pop(key, None)


def sections(node: Any) -> Iterator[MutableMapping[str, Any]]:
    """Every dict in a nested config, itself included."""
    if isinstance(node, MutableMapping):
        yield node
        for value in list(node.values()):
            yield from sections(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from sections(value)


def check_steps_left(checkpoint: Path, config: Mapping[str, Any]) -> None:
    """Raise ``UserError`` where a checkpoint already is at the config's last step."""
    if all_steps_done(checkpoint, config):
        last = config["train_cfg"]["max_iters"]
        raise UserError(f"{checkpoint} has done all {last} steps; raise train_cfg.max_iters to go on")


def all_steps_done(checkpoint: Path | None, config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is at the config's last step."""
    done, last = None if checkpoint is None else step_of(checkpoint), config["train_cfg"].get("max_iters")
    return done is not None and last is not None and done >= last
