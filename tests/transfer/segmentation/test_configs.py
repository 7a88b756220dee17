# ruff: noqa: E402 (most imports need mmseg, which may be absent)
"""The configs, the options of the command line, precision and launchers."""

import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from mae_core.errors import UserError
from transfer.segmentation import config as configs
from transfer.segmentation.config import check_key
from transfer.segmentation.launching import join_launched

mmseg = pytest.importorskip("mmseg", reason="mmseg is not installed; pip install mae-transfer[segmentation]")
engine = pytest.importorskip("transfer.segmentation.engine_mmseg", reason="mmseg is here without mmcv or mmengine")

from mmengine.config import Config
from mmseg.registry import MODELS
from mmseg.utils import register_all_modules

from transfer.segmentation.engine_mmseg.options import parse_options, read_config, registered

CONFIGS = Path(__file__).parents[3] / "configs" / "segmentation"
DIGITS = CONFIGS / "digits.py"
BASE = CONFIGS / "mae_vit_base_upernet_160k_ade20k_512x512.py"
LARGE = CONFIGS / "mae_vit_large_upernet_160k_ade20k_512x512.py"


def biases_without_values(table, stored, grid, prefix):
    """Their shape: on the meta device a bicubic resize takes half a second, in each block."""
    tokens = prefix + grid[0] * grid[1]
    return table.new_empty(table.shape[1], tokens, tokens)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_config_is_one_that_mmengine_reads_and_builds(path, monkeypatch):
    monkeypatch.setattr("transfer.attention.table_biases", biases_without_values)
    register_all_modules()
    config = Config.fromfile(path)
    configs.check_widths(dict(config.items()))
    configs.check_schedule(dict(config.items()))
    assert config.model.backbone.type == "MAECoreViT" and config.default_scope == "mmseg"
    assert "transfer.segmentation.engine_mmseg" in config.custom_imports["imports"]
    assert config.param_scheduler[1].end == config.train_cfg.max_iters
    assert config.optim_wrapper.constructor == "MAECoreLayerDecay"
    for section in configs.sections(config.to_dict()):
        if isinstance(section.get("type"), str):
            assert registered(section["type"]), f"{section['type']} is unknown to mmseg"
        assert "::" not in str(section.get("_base_", ""))
    if path.stem.endswith("_ms"):
        return  # the model is that of the single-scale config, as another test shows
    with torch.device("meta"):
        model = MODELS.build(config.model)
        patch = model.backbone.grid.patch
        divisor = config.model.data_preprocessor.test_cfg.size_divisor
        images = torch.zeros(2, 3, 2 * divisor, 3 * divisor)
        logits = model.eval().decode_head.forward(model.extract_feat(images))
    finest = 4 if patch >= 14 else 2
    assert divisor % patch == 0
    assert logits.shape == (2, config.model.decode_head.num_classes, *(finest * s * divisor // patch for s in (2, 3)))


RECIPES = {
    # learning rate, layer decay, drop path, LayerScale, iterations, images a step, crop, taps
    "mae_vit_base_upernet_160k_ade20k_512x512": (1e-4, 0.65, 0.1, 1.0, 160000, 16, 512, (3, 5, 7, 11)),
    "mae_vit_large_upernet_160k_ade20k_512x512": (9e-5, 0.75, 0.2, 1.0, 160000, 16, 512, (7, 11, 15, 23)),
    "mae_vit_huge_upernet_160k_ade20k_504x504": (8e-5, 0.8, 0.3, 1.0, 160000, 16, 504, (7, 15, 23, 31)),
    "beit_like_vit_base_upernet_160k_ade20k_512x512": (7e-4, 0.65, 0.1, 0.1, 160000, 16, 512, (3, 5, 7, 11)),
    "mae_vit_base_upernet_one_gpu_ade20k_512x512": (1e-4, 0.65, 0.1, 1.0, 640000, 4, 512, (3, 5, 7, 11)),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name):
    config = Config.fromfile(CONFIGS / f"{name}.py")
    wrapper, backbone, test = config.optim_wrapper, config.model.backbone, config.model.test_cfg
    with torch.device("meta"):
        taps = engine.MAECoreViT(**{key: value for key, value in backbone.items() if key != "type"}).taps
    rates = (wrapper.optimizer.lr, wrapper.paramwise_cfg.layer_decay_rate, backbone.drop_path, backbone.layer_scale)
    steps = (config.train_cfg.max_iters, config.train_dataloader.batch_size)
    assert (*rates, *steps, backbone.image_size, taps) == RECIPES[name]
    assert wrapper.type == "AmpOptimWrapper" and wrapper.dtype == "bfloat16"
    assert (wrapper.optimizer.betas, wrapper.optimizer.weight_decay) == ((0.9, 0.999), 0.05)
    assert wrapper.paramwise_cfg.paper_bug is False and backbone.relative_positions == "table"
    assert steps[1] * wrapper.get("accumulative_counts", 1) == 16
    warmup, decay = config.param_scheduler
    assert (warmup.end, warmup.start_factor) == (1500 * wrapper.get("accumulative_counts", 1), 1e-6)
    assert (decay.begin, decay.end, decay.power, decay.eta_min) == (warmup.end, steps[0], 1.0, 0.0)
    crop = backbone.image_size
    assert test == {"mode": "slide", "crop_size": (crop, crop), "stride": (crop * 2 // 3, crop * 2 // 3)}
    for head, width in ((config.model.decode_head, config.model.neck.embed_dim), (config.model.auxiliary_head, 256)):
        assert (head.num_classes, head.channels or width) == (150, width) and head.align_corners is False
    assert config.model.auxiliary_head.loss_decode.loss_weight == 0.4 and config.model.auxiliary_head.in_index == 2
    resize, crop_step = (next(s for s in config.train_dataloader.dataset.pipeline if s.type == t) for t in CROPPING)
    assert (resize.scale, resize.ratio_range) == ((4 * crop, crop), (0.5, 2.0))
    assert (crop_step.crop_size, crop_step.cat_max_ratio) == ((crop, crop), 0.75)


CROPPING = ("RandomResize", "RandomCrop")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*_ms.py")), ids=lambda path: path.stem)
def test_multi_scale_variants_train_the_same_and_test_twelve_views(path):
    several, single = Config.fromfile(path), Config.fromfile(path.with_name(path.name.replace("_ms", "")))
    sizes, flips, *_ = several.tta_pipeline[1].transforms
    crop = single.model.backbone.image_size
    expected = [(int(4 * crop * s), int(crop * s)) for s in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)]
    assert [size.scale for size in sizes] == expected and [flip.prob for flip in flips] == [0.0, 1.0]
    for key, value in single.to_dict().items():
        assert several.to_dict()[key] == value, key


def test_a_variable_reaches_whatever_is_computed_from_it():
    config = read_config(DIGITS, {"data_root": "/somewhere", "crop_size": 48, "lr": 0.5, "iterations": 7})
    assert config.train_dataloader.dataset.data_root == config.val_dataloader.dataset.data_root == "/somewhere"
    assert config.model.data_preprocessor["size"] == (48, 48)
    assert config.train_dataloader.dataset.pipeline[3].crop_size == (48, 48)
    assert config.model.backbone.image_size == 48
    assert config.optim_wrapper.optimizer.lr == 0.5
    assert config.param_scheduler[1].end == config.train_cfg.max_iters == 7


def test_a_variable_of_a_base_reaches_the_child():
    """Plain mmengine evaluates a base by itself; options are set in it before that."""
    config = read_config(LARGE, {"data_root": "/somewhere", "batch_size": 2, "iterations": 10})
    loaders = config.train_dataloader, config.val_dataloader, config.test_dataloader
    assert {loader.dataset.data_root for loader in loaders} == {"/somewhere"}
    assert (config.train_dataloader.batch_size, config.train_cfg.max_iters) == (2, 10)
    assert config.model.backbone.size == "large" and config.model.neck.embed_dim == 1024


def test_a_variable_that_the_child_passes_over_is_refused():
    with pytest.raises(UserError, match=r"size=small has no effect: .*large.* itself sets"):
        read_config(LARGE, {"size": "small"})
    assert read_config(LARGE, {"size": "base"}).model.backbone.size == "large"  # what the base says anyway


def test_a_base_of_a_package_is_refused(tmp_path):
    (tmp_path / "mine.py").write_text("_base_ = ['mmseg::_base_/default_runtime.py']\n")
    with pytest.raises(UserError, match=r"the base 'mmseg::_base_/default_runtime\.py' lies in a package"):
        read_config(tmp_path / "mine.py", {})


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("data_rot=x", "unknown config option 'data_rot'; did you mean 'data_root'"),
        ("model.backbon.drop_path=0", "did you mean 'model.backbone'"),
        ("model.backbone.drop_pth=0", "did you mean 'model.backbone.drop_path'"),
        ("model.backbone.fp16=1", "unknown config option 'model.backbone.fp16'"),
        ("train_cfg.max_iter=5", "did you mean 'train_cfg.max_iters'"),
        ("optim_wrapper.optimizer.learning_rate=1", "unknown config option 'optim_wrapper.optimizer.learning_rate'"),
        ("fp16.loss_scale=dynamic", "unknown config option 'fp16.loss_scale'"),
        ("train_dataloader.dataset.pipeline.9.prob=0", "pipeline is a list of 5"),
        ("lr.x=1", "lr is a variable of"),
        ("lr", "'lr' is not a config option; write key=value"),
        ("model.test_cfg={'mode':'slide','stride':[32,32]}", "cannot be read .*; write lists as"),
        ("model.test_cfg={'mode':'whole'}", "model.test_cfg is a section; set its keys, such as model.test_cfg.mode"),
        ("optim_wrapper.optimizer.weight_decay=much", "the config has 0.05 there; give a number, not a text"),
        ("reduce_zero_label=maybe", "the config has False there; give True or False"),
        ("crop_size=0", "crop_size=0: give a whole number, 1 or more"),
        ("crop_size=[32,32]", "crop_size=[32, 32]: give a whole number, 1 or more"),
        ("batch_size=2.5", "batch_size=2.5: give a whole number, 1 or more"),
        ("head_width=0", "head_width=0: give a whole number, 1 or more"),
        ("iterations=x", "iterations=x: the config has .* there; give a number, not a text"),
        ("workers=-1", "workers=-1: give a whole number, 0 or more"),
        ("lr=nan", "lr=nan: give a finite number"),
        ("lr=0", "lr=0: give a number above 0"),
        ("data_root=", "data_root= has no value; give a path"),
        ("data_root=~nobody-here/x", "there is no such home folder"),
        ("resume=True", "the option resume is written --resume"),
        ("work_dir=x", "the option work_dir is written --work-dir DIR"),
        ("load_from=x", "the option load_from is written --weights FILE"),
    ],
)
def test_an_option_that_nothing_reads_is_refused(option, message):
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        read_config(DIGITS, parse_options([option]))


@pytest.mark.parametrize("name", ["two words", "a,b", "2024", "[a]", "~/x"])
def test_a_path_is_what_was_typed(name, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    wanted = name.replace("~", "/home/me")
    config = read_config(DIGITS, parse_options([f"data_root={name}", "label_values=[0, 1]"]))
    assert config.train_dataloader.dataset.data_root == wanted and config.label_values == [0, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"randomness": {"seed": -1}}, "randomness.seed is -1; give a whole number from 0"),
        ({"randomness": {"seed": 1.5}}, "randomness.seed is 1.5"),
        ({"randomness": {"seed": 2**40}}, "randomness.seed is 1099511627776"),
        ({"train_cfg": {"max_iters": 0}}, "train_cfg.max_iters is 0; give a whole number of steps, 1 or more"),
        ({"train_cfg": {"max_iters": 9, "val_interval": 0}}, "train_cfg.val_interval is 0"),
        ({"model": {"test_cfg": {"mode": "tiles"}}}, "model.test_cfg.mode is 'tiles'; set it to whole or slide"),
        (
            {"model": {"test_cfg": {"mode": "slide", "stride": (8, 8)}}},
            "model.test_cfg.mode=slide needs model.test_cfg.crop_size=[rows,columns]; set them, or mode=whole",
        ),
    ],
)
def test_what_mmengine_meets_when_a_run_has_begun_is_refused_before(change, message):
    sound = {"randomness": {}, "train_cfg": {"max_iters": 9}, "model": {"test_cfg": {"mode": "whole"}}}
    for config in (sound, {**sound, **change}):
        with pytest.raises(UserError, match=re.escape(message)) if config is not sound else nullcontext():
            configs.check_schedule(config)
            configs.check_test_mode(config)


def test_one_class_alone_is_refused():
    config = read_config(DIGITS, {"num_classes": 1})
    with pytest.raises(UserError, match=r"num_classes is below 2: .*; count the background too"):
        configs.check_widths(dict(config.items()))


@pytest.mark.parametrize("given", [{"crop_size": 0}, {"stride": 0}, {"crop_size": -4, "stride": 2}])
def test_windows_without_pixels_are_refused(given):
    with pytest.raises(UserError, match="leave gaps; give a --stride from 1 to the crop size"):
        configs.inference_mode(dict(read_config(DIGITS, {}).items()), mode="slide", **given)


def test_an_import_that_fails_in_a_config_is_named(tmp_path):
    (tmp_path / "mine.py").write_text("import nowhere_to_be_found\n")
    with pytest.raises(UserError, match=r"config .*mine\.py cannot be read: .*nowhere_to_be_found"):
        read_config(tmp_path / "mine.py", {})


def test_options_that_a_type_takes_are_accepted():
    options = [
        "optim_wrapper.clip_grad.max_norm=1",
        "train_dataloader.dataset.indices=4",
        "model.backbone.taps=[1,2,3,4]",
    ]
    config = read_config(DIGITS, parse_options([*options, "train_dataloader.pin_memory=True"]))
    assert config.optim_wrapper.clip_grad == {"max_norm": 1}
    assert config.model.backbone.taps == [1, 2, 3, 4] and config.train_dataloader.pin_memory is True


def test_a_section_without_type_takes_its_own_keys_only():
    with pytest.raises(UserError, match=r"did you mean 'a\.deep'"):
        check_key({"a": {"deep": 1}}, "a.dep", lambda place, node: ())


def precision(kind="AmpOptimWrapper", **machine):
    """The section of the optimizer, and what the user is told."""
    section = {"type": kind, "dtype": "bfloat16", "loss_scale": "dynamic"} if "Amp" in kind else {"type": kind}
    notes = configs.fit_to_machine({"optim_wrapper": section, "train_dataloader": {}}, **machine)
    return section, notes[0]


def test_precision_follows_the_machine():
    assert precision(gpu=False, bf16=False) == (
        {"type": "OptimWrapper"},
        "precision: fp32; there is no GPU for the config's bfloat16, and this CPU has no bf16",
    )
    on_cpu = {"type": "MAECoreCPUMixed"}, "precision: mixed, bfloat16, which this CPU has; --no-amp trains in fp32"
    assert precision(gpu=False, bf16=True) == precision("MAECoreCPUMixed", gpu=False, bf16=True) == on_cpu
    assert precision("MAECoreCPUMixed", gpu=True, bf16=True)[0] == {"type": "AmpOptimWrapper", "dtype": "bfloat16"}
    assert precision(gpu=True, bf16=True)[0]["dtype"] == "bfloat16"
    assert precision(gpu=True, bf16=False)[0]["dtype"] == "float16"


def test_precision_follows_the_user():
    gpu = {"gpu": True, "bf16": True}
    assert precision("OptimWrapper", **gpu) == ({"type": "OptimWrapper"}, "precision: fp32, as the config says")
    asked = precision("OptimWrapper", amp=True, **gpu)
    assert asked == ({"type": "AmpOptimWrapper", "dtype": "bfloat16"}, "precision: mixed, bfloat16")
    assert precision("OptimWrapper", amp=True, gpu=True, bf16=False)[0]["dtype"] == "float16"
    assert precision(amp=False, **gpu) == ({"type": "OptimWrapper"}, "precision: fp32, as --no-amp says")
    assert precision("OptimWrapper", amp=True, gpu=False, bf16=True)[0] == {"type": "MAECoreCPUMixed"}
    with pytest.raises(UserError, match="--amp was asked for, but torch sees no GPU and this CPU has no bf16"):
        precision(amp=True, gpu=False, bf16=False)


def test_a_launcher_that_did_not_launch_is_refused(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="torchrun did not start this process"):
        join_launched("pytorch")
    with pytest.raises(UserError, match="Slurm did not start this process"):
        join_launched("slurm")
    assert join_launched("none").is_main and join_launched(None).is_main
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match="4 processes were started together, each of which would train alone"):
        join_launched("none")
