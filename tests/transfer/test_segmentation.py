# ruff: noqa: E402 (most imports need mmseg, which may be absent)
"""The mmseg engine: backbone, layer decay, metric, configs, and whole trainings of a few steps on tiny scenes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.optim import param_groups_layer_decay

from mae_core.conversion.files import read_weights, write_weights
from mae_core.conversion.loading import describe_encoder
from mae_core.errors import UserError
from mae_core.models.encoder import ViTEncoder
from mae_core.models.sizes import SIZES
from transfer.backbone import DenseViT
from transfer.segmentation.config import check_key, with_variables
from transfer.segmentation.train_net import main, train_segmenter

mmseg = pytest.importorskip("mmseg", reason="mmseg is not installed; pip install mae-transfer[segmentation]")
engine = pytest.importorskip("transfer.segmentation.engine_mmseg", reason="mmseg is here without mmcv or mmengine")

from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmseg.registry import MODELS
from mmseg.utils import register_all_modules

from transfer.segmentation import config as configs
from transfer.segmentation.engine_mmseg import checks
from transfer.segmentation.engine_mmseg.checkpoints import history_method, load_safely
from transfer.segmentation.engine_mmseg.options import parse_options, read_config, registered
from transfer.segmentation.label_maps import LabelledImage

REPOSITORY = Path(__file__).parents[2]
CONFIGS = REPOSITORY / "configs" / "segmentation"
DIGITS = CONFIGS / "digits.py"
NAMES = ("ground", "box", "disc")
TINY = {
    "num_classes": 3,
    "crop_size": 32,
    "head_width": 16,
    "batch_size": 4,
    "model.neck.rescales": [4, 2, 1, 0.5],
    "visualizer.vis_backends": [],
}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_scenes(root: Path, num_images: int = 8, side: int = 32) -> Path:
    """Scenes of a red box and a blue disc on green ground; training and validation are the same."""
    generator = np.random.default_rng(0)
    rows, columns = np.mgrid[:side, :side]
    for index in range(num_images):
        labels = np.zeros((side, side), np.uint8)
        top, left = generator.integers(0, side - 14, 2)
        labels[top : top + 12, left : left + 14] = 1
        centre = generator.integers(6, side - 6, 2)
        labels[(rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 < 36] = 2
        pixels = np.array([[40, 160, 60], [200, 40, 40], [40, 40, 220]])[labels] + generator.normal(
            0, 12, (side, side, 3)
        )
        for part in ("training", "validation"):
            for folder, array in (("images", pixels.clip(0, 255).astype(np.uint8)), ("annotations", labels)):
                (root / folder / part).mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(root / folder / part / f"{index}.png")
    (root / "classes.txt").write_text("".join(f"{value}\t{name}\n" for value, name in enumerate(NAMES)))
    return root


def write_encoder(path: Path, size: str = "nano", in_chans: int = 3, image_size: int = 32, **metadata) -> Path:
    torch.manual_seed(7)
    encoder = ViTEncoder(size, image_size=image_size, patch_size=8, in_chans=in_chans)
    write_weights(path, encoder.state_dict(), {**describe_encoder(encoder), **metadata})
    return path


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    return write_scenes(tmp_path / "scenes")


@pytest.fixture(scope="module")
def digits_model():
    register_all_modules()
    return MODELS.build(read_config(DIGITS, {}).model)


# ---------------------------------------------------------------- backbone and optimizer


@pytest.mark.parametrize("shape", [(64, 64), (40, 72)])
def test_backbone_equals_dense_vit(shape):
    ours = engine.MAECoreViT("nano", image_size=64, patch_size=8).eval()
    plain = DenseViT("nano", image_size=64, patch_size=8, cls_token=True).eval()
    plain.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, *shape)
    maps = ours(images)
    assert isinstance(maps, tuple) and [level.shape for level in maps] == [(2, 128, shape[0] // 8, shape[1] // 8)] * 4
    for one, other in zip(maps, plain(images), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("size", "taps"), [("base", (3, 5, 7, 11)), ("large", (7, 11, 15, 23)), ("tiny", (2, 5, 8, 11))]
)
def test_taps_are_the_published_ones_or_the_quarters(size, taps, monkeypatch):
    def small_init(self, size, **options):
        torch.nn.Module.__init__(self)
        self.given = options

    monkeypatch.setattr(DenseViT, "__init__", small_init)
    given = engine.MAECoreViT(size).given
    assert (given["taps"] or SIZES[size].quarter_taps) == taps and given["cls_token"] is True
    assert engine.MAECoreViT(size, taps=[0, 1]).given["taps"] == [0, 1]


def test_init_weights_draws_nothing_anew():
    backbone = engine.MAECoreViT("nano", image_size=32, patch_size=8)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    backbone.init_weights()
    assert all(torch.equal(before[name], tensor) for name, tensor in backbone.state_dict().items())


def test_neck_and_heads_see_four_strides(digits_model):
    images = torch.randn(2, 3, 64, 64)
    features = digits_model.extract_feat(images)
    assert [tuple(level.shape) for level in features] == [(2, 128, side, side) for side in (16, 8, 4, 2)]
    assert digits_model.decode_head.forward(features).shape == (2, 5, 16, 16)
    assert digits_model.auxiliary_head.forward(features).shape == (2, 5, 4, 4)


def layer_decay_groups(model, rate: float = 0.65, lr: float = 1e-3, decay: float = 0.05):
    settings = {"type": "OptimWrapper", "optimizer": {"type": "AdamW", "lr": lr, "weight_decay": decay}}
    return engine.MAECoreLayerDecay(settings, {"layer_decay_rate": rate})(model).optimizer.param_groups


def test_layer_decay_of_the_trunk_is_one_layer_below_timm(digits_model):
    """timm gives the last block the head's rate; BEiT, mmseg and the published log put it a layer below."""
    encoder = ViTEncoder("nano", image_size=64, patch_size=8)
    names = {id(parameter): name for name, parameter in encoder.named_parameters()}
    expected = {
        names[id(parameter)]: (group["lr_scale"], group["weight_decay"])
        for group in param_groups_layer_decay(encoder, 0.05, encoder.no_weight_decay(), layer_decay=0.65)
        for parameter in group["params"]
    }
    found = {
        name.removeprefix("backbone."): (group["lr_scale"], group["weight_decay"])
        for group in layer_decay_groups(digits_model)
        for name in group["param_names"]
        if name.startswith("backbone.")
    }
    assert found.keys() == expected.keys() - {"norm.weight", "norm.bias"}
    for name, values in found.items():
        assert values == pytest.approx((0.65 * expected[name][0], expected[name][1])), name


def test_layer_decay_rule(digits_model):
    depth = SIZES["nano"].depth
    groups = layer_decay_groups(digits_model)
    by_name = {name: group for group in groups for name in group["param_names"]}
    assert by_name.keys() == dict(digits_model.named_parameters()).keys()
    assert sum(len(group["params"]) for group in groups) == len(by_name)
    for name in ("backbone.pos_embed", "backbone.cls_token"):  # the published code decays both
        assert by_name[name]["weight_decay"] == 0 and by_name[name]["lr_scale"] == pytest.approx(0.65 ** (depth + 1))
    assert by_name[f"backbone.blocks.{depth - 1}.mlp.fc1.weight"]["lr"] == pytest.approx(0.65e-3)
    for name in ("neck.upsample_2x.0.weight", "decode_head.conv_seg.weight", "auxiliary_head.conv_seg.weight"):
        assert by_name.get(name, groups[0])["lr"] == pytest.approx(1e-3)
        assert by_name.get(name, groups[0])["weight_decay"] in (0, 0.05)
    assert by_name["decode_head.conv_seg.bias"]["weight_decay"] == 0
    assert groups[0]["lr_scale"] == 1  # what mmengine's log shows


# ---------------------------------------------------------------- metric


def test_iou_equals_an_independent_confusion_matrix():
    generator = np.random.default_rng(3)
    metric = engine.PerClassIoUMetric(iou_metrics=["mIoU"])
    metric.dataset_meta = {"classes": ("a", "b", "c", "absent")}
    confusion = np.zeros((4, 4))
    for _ in range(3):
        truth, prediction = generator.integers(0, 3, (9, 7)), generator.integers(0, 3, (9, 7))
        truth[generator.random((9, 7)) < 0.2] = 255
        np.add.at(confusion, (truth[truth < 255], prediction[truth < 255]), 1)
        as_sample = {"pred_sem_seg": {"data": torch.tensor(prediction)}, "gt_sem_seg": {"data": torch.tensor(truth)}}
        metric.process({}, [as_sample])
    values = metric.compute_metrics(metric.results)
    right, true, predicted = np.diag(confusion)[:3], confusion.sum(1)[:3], confusion.sum(0)[:3]
    iou, accuracy = 100 * right / (true + predicted - right), 100 * right / true
    assert values["mIoU"] == pytest.approx(iou.mean(), abs=0.01)
    assert values["mAcc"] == pytest.approx(accuracy.mean(), abs=0.01)
    assert values["aAcc"] == pytest.approx(100 * right.sum() / true.sum(), abs=0.01)
    for index, name in enumerate("abc"):
        assert metric.per_class[name] == {
            "IoU": pytest.approx(iou[index], abs=0.01),
            "Acc": pytest.approx(accuracy[index], abs=0.01),
        }
    assert metric.per_class["absent"] == {"IoU": None, "Acc": None}


# ---------------------------------------------------------------- configs and options


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_config_is_one_that_mmengine_reads(path):
    config = Config.fromfile(path)
    configs.check_widths(dict(config.items()))
    assert config.model.backbone.type == "MAECoreViT" and config.default_scope == "mmseg"
    assert config.param_scheduler[1].end == config.train_cfg.max_iters
    assert config.optim_wrapper.constructor == "MAECoreLayerDecay"
    for section in configs.sections(config.to_dict()):
        if isinstance(section.get("type"), str):
            assert registered(section["type"]), f"{section['type']} is unknown to mmseg"


def test_ade20k_recipe_numbers():
    config = read_config(next(CONFIGS.glob("*ade20k*")), {})
    optimizer = config.optim_wrapper.optimizer
    assert (optimizer.lr, optimizer.betas, optimizer.weight_decay) == (1e-4, (0.9, 0.999), 0.05)
    assert config.optim_wrapper.type == "AmpOptimWrapper" and config.optim_wrapper.dtype == "bfloat16"
    assert config.optim_wrapper.paramwise_cfg.layer_decay_rate == 0.65
    assert config.model.test_cfg == {"mode": "slide", "crop_size": (512, 512), "stride": (341, 341)}
    assert (config.model.decode_head.channels, config.model.auxiliary_head.loss_decode.loss_weight) == (768, 0.4)


def test_a_variable_reaches_whatever_is_computed_from_it():
    config = read_config(DIGITS, {"data_root": "/somewhere", "crop_size": 48, "lr": 0.5, "iterations": 7})
    assert config.train_dataloader.dataset.data_root == config.val_dataloader.dataset.data_root == "/somewhere"
    assert config.model.data_preprocessor["size"] == (48, 48)
    assert config.train_dataloader.dataset.pipeline[3].crop_size == (48, 48)
    assert config.model.backbone.image_size == 48
    assert config.optim_wrapper.optimizer.lr == 0.5
    assert config.param_scheduler[1].end == config.train_cfg.max_iters == 7


def test_setting_variables_keeps_bases_where_they_are(tmp_path):
    source = with_variables("_base_ = ['_base_/a.py']\nx = 1\ny = 2 * x\n", {"x": 5}, tmp_path)
    scope: dict = {}
    exec(source, scope)
    assert scope["y"] == 10 and scope["_base_"] == [str(tmp_path / "_base_" / "a.py")]


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
    ],
)
def test_an_option_that_nothing_reads_is_refused(option, message):
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        read_config(DIGITS, parse_options([option]))


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


def test_precision_follows_the_machine():
    def wrapper(**machine):
        section = {"type": "AmpOptimWrapper", "dtype": "bfloat16", "loss_scale": "dynamic"}
        notes = configs.fit_to_machine({"optim_wrapper": section, "train_dataloader": {}}, **machine)
        return section, notes[0]

    assert wrapper(gpu=False, bf16=False) == (
        {"type": "OptimWrapper"},
        "precision: fp32; there is no GPU for the config's bfloat16",
    )
    assert wrapper(gpu=True, bf16=True)[0]["dtype"] == "bfloat16"
    assert wrapper(gpu=True, bf16=False)[0]["dtype"] == "float16"


# ---------------------------------------------------------------- trainings


def test_training_writes_a_whole_run_directory_twice_in_one_process(scenes, tmp_path, capsys):
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
    weights = write_encoder(tmp_path / "encoder.safetensors", image_size=24, mean=mean, std=std)
    options = {**TINY, "data_root": str(scenes), "iterations": 4, "custom_hooks.0.interval": 2}
    frozen = {**options, "lr": 0.0, "visualizer.vis_backends": [{"type": "TensorboardVisBackend"}]}
    first = train_segmenter(DIGITS, weights=weights, work_dir=tmp_path / "first", cfg_options=frozen)
    printed = capsys.readouterr().out
    assert "100.0% of the model's" in printed and "3x3 -> 4x4" in printed and "replaces" in printed

    run = tmp_path / "first"
    assert json.loads((run / "metrics.json").read_text()) == first
    assert first["per_class"].keys() == set(NAMES) and 0 <= first["mIoU"] <= 100 and first["steps"] == 4
    report = json.loads((run / "loading.json").read_text())
    assert report["share"] == 1 and report["resized"] == {"pos_embed": "3x3 -> 4x4"} and len(report["unused"]) == 2
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 4]
    assert {"loss", "lr", "time"} <= lines[0].keys() and lines[-1]["mIoU"] == first["mIoU"]
    assert Image.open(run / "pictures" / "step_000004.png").size[0] > 500
    assert list((run / "tensorboard").rglob("events.*"))

    tensors, metadata = read_weights(run / "segmenter.safetensors")
    for name, tensor in load_file(weights).items():  # lr 0: the trained trunk is the file's
        if name not in ("norm.weight", "norm.bias", "pos_embed"):
            assert torch.equal(tensors[f"backbone.{name}"], tensor), name
    assert metadata["classes"] == list(NAMES) and metadata["encoder"]["size"] == "nano"
    preprocessor = Config.fromstring(metadata["config"], ".py").model.data_preprocessor
    assert preprocessor["mean"] == [102.0, 127.5, 153.0] and preprocessor["std"] == [51.0, 76.5, 102.0]

    second = train_segmenter(DIGITS, work_dir=tmp_path / "second", cfg_options=options)
    again = train_segmenter(DIGITS, work_dir=tmp_path / "again", cfg_options=options)
    assert "training from scratch" in capsys.readouterr().out
    assert not (tmp_path / "second" / "loading.json").exists()
    assert {**second, "seconds": 0} == {**again, "seconds": 0}  # one seed, one result
    one, other = (load_file(tmp_path / name / "segmenter.safetensors") for name in ("second", "again"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_overfits_eight_images(scenes, tmp_path):
    options = {**TINY, "data_root": str(scenes), "iterations": 100, "lr": 2e-3, "head_width": 32, "batch_size": 8}
    options["train_dataloader.dataset.pipeline.2.ratio_range"] = [1.0, 1.0]
    results = train_segmenter(DIGITS, work_dir=tmp_path / "run", cfg_options=options)
    assert results["mIoU"] > 90
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert lines[-2]["loss"] < 0.5 * lines[0]["loss"]


def test_resume_goes_on_from_the_last_checkpoint(scenes, tmp_path):
    options = {**TINY, "data_root": str(scenes), "iterations": 4, "custom_hooks.0.interval": 1}
    run = tmp_path / "run"
    train_segmenter(DIGITS, work_dir=run, cfg_options={**options, "train_cfg.max_iters": 2})
    with pytest.raises(UserError, match=r"is not empty; give another --work-dir, or --resume"):
        train_segmenter(DIGITS, work_dir=run, cfg_options=options)
    with pytest.raises(UserError, match=r"has done all 2 steps"):
        train_segmenter(DIGITS, work_dir=run, cfg_options={**options, "train_cfg.max_iters": 2}, resume=True)
    assert train_segmenter(DIGITS, work_dir=run, cfg_options=options, resume=True)["steps"] == 4
    steps = [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 2, 3, 4, 4]
    with pytest.raises(UserError, match=r"holds no checkpoint to resume from"):
        train_segmenter(DIGITS, work_dir=tmp_path / "other", cfg_options=options, resume=True)


class Malice:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_resume_runs_no_code_of_the_checkpoint(scenes, tmp_path):
    options = {**TINY, "data_root": str(scenes), "iterations": 4}
    run, trace = tmp_path / "run", tmp_path / "executed"
    train_segmenter(DIGITS, work_dir=run, cfg_options={**options, "train_cfg.max_iters": 2})
    checkpoint = run / "iter_2.pth"
    state = load_safely(str(checkpoint), "cpu")
    torch.save({**state, "more": Malice(trace)}, checkpoint)
    with pytest.raises(UserError, match=r"iter_2\.pth is refused, for it is broken or holds more than tensors"):
        train_segmenter(DIGITS, work_dir=run, cfg_options=options, resume=True)
    assert not trace.exists()
    state["meta"]["config"] = f"open({str(trace)!r}, 'w').close()\n"  # mmengine executes this one
    torch.save(state, checkpoint)
    assert train_segmenter(DIGITS, work_dir=run, cfg_options=options, resume=True)["steps"] == 4
    assert not trace.exists()


def test_attributes_in_a_checkpoint_are_those_of_its_histories():
    assert history_method(HistoryBuffer, "mean") is HistoryBuffer.mean
    for owner, name in ((Path, "mean"), (HistoryBuffer, "__init__")):
        with pytest.raises(Exception, match="it asks for the attribute"):
            history_method(owner, name)


def test_unreadable_images_are_named_counted_and_left_out(scenes, tmp_path, capsys):
    for part, name in (("training", "2.png"), ("validation", "7.png")):
        (scenes / "images" / part / name).write_bytes(b"no picture")
    (scenes / "images" / "training" / "._0.png").write_bytes(b"a notebook's copy")
    options = {**TINY, "data_root": str(scenes), "iterations": 3}
    config = read_config(DIGITS, options)
    found = checks.check_data(dict(config.items()))
    assert "1 unreadable images left out" in found["train data"] and "training/2.png" in found["train data"]
    assert "validation/7.png" in found["val data"]
    assert config.train_dataloader.dataset.indices == [0, 1, 3, 4, 5, 6, 7]
    assert train_segmenter(DIGITS, work_dir=tmp_path / "run", cfg_options=options)["steps"] == 3


def test_left_out_images_respect_the_indices_of_the_config():
    pairs = [LabelledImage(Path(name), Path("map")) for name in "abc"]
    for given, kept in ((3, [0, 2]), (-3, [-3, -1]), ([5, 1, 7], [5, 7]), (None, [0, 2])):
        section = {"indices": given}
        checks.leave_out(section, pairs, {"b"})
        assert section["indices"] == kept


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_map_that_the_check_did_not_see_is_named(scenes, tmp_path, monkeypatch, workers):
    path = scenes / "annotations" / "training" / "3.png"
    unchecked = checks.check_label_maps

    def spoil(*arguments, **options):
        found = unchecked(*arguments, **options)
        Image.fromarray(np.full((32, 32), 9, np.uint8)).save(path)
        return found

    monkeypatch.setattr(checks, "check_label_maps", spoil)
    options = {**TINY, "data_root": str(scenes), "iterations": 9, "workers": workers}
    with pytest.raises(UserError, match=rf"^label map {path} holds the value 9, which is none of the 3 classes; "):
        train_segmenter(DIGITS, work_dir=tmp_path / "run", cfg_options=options)


def test_readers_name_what_they_cannot_read(tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(b"no picture")
    record = {"img_path": str(tmp_path / "a.png"), "seg_map_path": str(tmp_path / "a.png"), "reduce_zero_label": False}
    assert engine.NamedImage(on_error="skip").transform(dict(record)) is None
    assert "a.png cannot be read and is skipped; 1 so far" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"image .*a\.png cannot be read"):
        engine.NamedImage().transform(dict(record))
    with pytest.raises(UserError, match=r"label map .*a\.png cannot be read"):
        engine.NamedLabels(num_classes=3).transform({**record, "seg_fields": []})


def test_small_data_config_needs_no_class_file(scenes):
    small = CONFIGS / "small_data.py"

    def classes(**options):
        config = read_config(small, {"data_root": str(scenes), **options})
        return checks.labelled_images(config.train_dataloader.dataset)[1]

    assert classes(num_classes=2) == list(NAMES[1:])
    (scenes / "classes.txt").unlink()
    assert classes(num_classes=2) == ["class 1", "class 2"]
    assert classes(num_classes=3, reduce_zero_label=False) == ["class 0", "class 1", "class 2"]


def test_two_ranks_of_torchrun_train_as_one(scenes, tmp_path):
    script = REPOSITORY / "transfer" / "segmentation" / "train_net.py"
    options = {**TINY, "data_root": scenes, "iterations": 3, "custom_hooks.0.interval": 1, "batch_size": 2}
    options.pop("visualizer.vis_backends")
    settings = [f"{key}={value}".replace(" ", "") for key, value in options.items()]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*torchrun, str(script), str(DIGITS), "--work-dir", str(tmp_path / "run"), "--cfg-options", *settings],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("ranks: 2") == done.stdout.count("percent)") == 1
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 3]


def test_mmseg_alone_runs_the_config(scenes, tmp_path, monkeypatch):
    from mmengine.runner import Runner

    config = Config.fromfile(DIGITS)
    config.merge_from_dict({"train_cfg.max_iters": 2, "work_dir": str(tmp_path / "run"), "visualizer": None})
    config.merge_from_dict(
        {"train_dataloader.batch_size": 2, "model.backbone.weights": str(write_encoder(tmp_path / "e.safetensors"))}
    )
    for section in (config.train_dataloader, config.val_dataloader):
        section.dataset.update(data_root=str(scenes))
    config.model.decode_head.num_classes = config.model.auxiliary_head.num_classes = 3
    runner = Runner.from_cfg(config)
    runner.train()
    assert runner.model.backbone.loading.share == 1 and runner.iter == 2


def test_grey_weights_make_grey_images(scenes, tmp_path, capsys):
    weights = write_encoder(tmp_path / "grey.safetensors", in_chans=1, mean=[0.5], std=[0.25])
    options = {**TINY, "data_root": str(scenes), "iterations": 3}
    results = train_segmenter(DIGITS, weights=weights, work_dir=tmp_path / "run", cfg_options=options)
    assert results["steps"] == 3 and "read as greyscale" in capsys.readouterr().out


# ---------------------------------------------------------------- wrong input


def refused(scenes: Path, tmp_path: Path, capsys, *arguments: str, **options) -> str:
    """The one sentence that the command answers with; nothing may have been written."""
    work_dir = tmp_path / "refused"
    settings = {**TINY, "data_root": scenes, "iterations": 3, **options}
    settings.pop("visualizer.vis_backends")
    command = [str(DIGITS), "--work-dir", str(work_dir), *arguments, "--cfg-options"]
    with pytest.raises(SystemExit) as stopped:
        main([*command, *(f"{key}={value}".replace(" ", "") for key, value in settings.items())])
    assert stopped.value.code == 2
    assert not work_dir.exists()
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error
    return error


def test_label_value_out_of_range(scenes, tmp_path, capsys):
    path = scenes / "annotations" / "training" / "3.png"
    labels = np.asarray(Image.open(path)).copy()
    labels[0, 0] = 200
    Image.fromarray(labels).save(path)
    assert f"label map {path} holds the value 200, but num_classes=3 allows 0..2" in refused(scenes, tmp_path, capsys)


def test_image_without_label_map(scenes, tmp_path, capsys):
    (scenes / "annotations" / "validation" / "5.png").unlink()
    assert "1 of 8 images have no label map" in refused(scenes, tmp_path, capsys)


def test_missing_data_folder(scenes, tmp_path, capsys):
    error = refused(scenes, tmp_path, capsys, data_root=tmp_path / "nowhere")
    assert f"data folder {tmp_path}/nowhere/images/training does not exist; set data_root" in error


def test_number_of_classes(scenes, tmp_path, capsys):
    error = refused(scenes, tmp_path, capsys, num_classes=4)
    assert "num_classes=4, and the train data 3 classes (ground, box, disc); set num_classes=3" in error


def test_unreadable_image_where_it_is_to_stop_the_run(scenes, tmp_path, capsys):
    (scenes / "images" / "training" / "2.png").write_bytes(b"no picture")
    option = {"train_dataloader.dataset.on_error": "raise"}
    assert "2.png cannot be read" in refused(scenes, tmp_path, capsys, **option)


def test_weights_of_another_architecture(scenes, tmp_path, capsys):
    weights = write_encoder(tmp_path / "tiny.safetensors", size="tiny")
    error = refused(scenes, tmp_path, capsys, "--weights", str(weights))
    assert f"the config builds an encoder with size=nano, and {weights} holds one with size=tiny" in error


def test_weights_that_hold_no_encoder(scenes, tmp_path, capsys):
    write_weights(tmp_path / "detector.safetensors", {"roi_heads.weight": torch.zeros(2)}, {})
    assert "no MAE encoder in it" in refused(
        scenes, tmp_path, capsys, "--weights", str(tmp_path / "detector.safetensors")
    )


def test_weights_that_lack_a_tensor(scenes, tmp_path, capsys):
    weights = write_encoder(tmp_path / "encoder.safetensors")
    state, metadata = read_weights(weights)
    state.pop("blocks.2.attn.qkv.weight")
    write_weights(weights, state, metadata)
    error = refused(scenes, tmp_path, capsys, "--weights", str(weights))
    assert "blocks.2.attn.qkv.weight: missing from the file" in error


def test_truncated_and_missing_weights(scenes, tmp_path, capsys):
    weights = write_encoder(tmp_path / "encoder.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "is truncated" in refused(scenes, tmp_path, capsys, "--weights", str(weights))
    assert "does not exist" in refused(scenes, tmp_path, capsys, "--weights", str(tmp_path / "none.pth"))


def test_normalisation_that_contradicts_the_weights(scenes, tmp_path, capsys):
    weights = write_encoder(tmp_path / "encoder.safetensors", mean=[0.5] * 3, std=[0.5] * 3)
    option = {"model.data_preprocessor.mean": [1, 2, 3]}
    error = refused(scenes, tmp_path, capsys, "--weights", str(weights), **option)
    assert "mean=[1, 2, 3] was asked for" in error and "[127.5, 127.5, 127.5]" in error


def test_crop_that_does_not_split_into_patches(scenes, tmp_path, capsys):
    assert "30" in refused(scenes, tmp_path, capsys, crop_size=30)


def test_encoder_wider_than_the_heads(scenes, tmp_path, capsys):
    assert "maps of a tiny encoder are 192 wide; set width=192" in refused(scenes, tmp_path, capsys, size="tiny")


def test_training_shorter_than_its_warm_up(scenes, tmp_path, capsys):
    error = refused(scenes, tmp_path, capsys, iterations=2)
    assert "the PolyLR phase of param_scheduler runs from step 2 to 2; train for more steps" in error


def test_batch_of_one(scenes, tmp_path, capsys):
    assert "batch norm needs at least 2 images" in refused(scenes, tmp_path, capsys, batch_size=1)


def test_script_run_by_path_names_a_missing_config(tmp_path):
    script = REPOSITORY / "transfer" / "segmentation" / "train_net.py"
    done = subprocess.run(
        [sys.executable, str(script), str(CONFIGS / "digit.py"), "--work-dir", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        env={"PATH": "", "PYTHONPATH": str(REPOSITORY)},
    )
    assert done.returncode == 2 and "did you mean 'digits.py'" in done.stderr and "Traceback" not in done.stderr
