# ruff: noqa: E402 (most imports need mmseg, which may be absent)
"""The mmseg engine: backbone, layer decay, metric, configs, and whole trainings of a few steps on tiny scenes."""

import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mae_core.errors import UserError
from mae_core.models.encoder import ViTEncoder
from mae_core.weights.files import read_weights, write_weights
from mae_core.weights.load import read_encoder
from tests.processes import free_port
from transfer.segmentation.train_net import evaluate_segmenter, train_segmenter

mmseg = pytest.importorskip("mmseg", reason="mmseg is not installed; pip install mae-transfer[segmentation]")
engine = pytest.importorskip("transfer.segmentation.engine_mmseg", reason="mmseg is here without mmcv or mmengine")

from mmengine.config import Config
from mmengine.logging import HistoryBuffer

from transfer.segmentation.engine_mmseg import checks, training
from transfer.segmentation.engine_mmseg.checkpoints import history_method, load_safely
from transfer.segmentation.engine_mmseg.options import read_config
from transfer.segmentation.label_maps import LabelledImage

REPOSITORY = Path(__file__).parents[3]
CONFIGS = REPOSITORY / "configs" / "segmentation"
DIGITS = CONFIGS / "digits.py"
NAMES = ("ground", "box", "disc")


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


# ---------------------------------------------------------------- trainings


def test_training_writes_a_whole_run_directory_twice_in_one_process(tmp_path, capsys, tiny, write_encoder):
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
    weights = write_encoder(tmp_path / "encoder.safetensors", image_size=24, mean=mean, std=std)
    options = {**tiny, "iterations": 4, "custom_hooks.0.interval": 2}
    frozen = {
        **options,
        "optim_wrapper.optimizer.lr": 0.0,
        "visualizer.vis_backends": [{"type": "TensorboardVisBackend"}],
    }
    first = train_segmenter(DIGITS, weights=weights, work_dir=tmp_path / "first", cfg_options=frozen)
    printed = capsys.readouterr().out
    assert "100.0% of the model's" in printed and "3x3 -> 4x4" in printed and "replaces" in printed
    line = r"^step (\d)/4  loss .* images/s  .* GiB  waiting for data .*% .* left$"
    steps = re.findall(line, printed, flags=re.MULTILINE)
    assert steps == ["2", "4"] and "Iter(train)" not in printed  # the line of every training, not mmengine's

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
    page = (run / "report.html").read_text()
    shown = (f"mIoU {first['mIoU']:.2f} % after 4 steps", "disc", "Training loss", "data:image/png", "pos_embed: 3x3")
    assert all(part in page for part in shown) and json.loads((run / "environment.json").read_text())["torch"]

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
    again = train_segmenter(DIGITS, work_dir=run, cfg_options=options, resume="auto")  # a job that was queued again
    assert again == json.loads((run / "metrics.json").read_text())
    one, other = (load_file(tmp_path / name / "segmenter.safetensors") for name in ("second", "again"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("blocks", [0, 2])
def test_frozen_blocks_stay_as_the_weights_have_them(tmp_path, tiny, write_encoder, blocks):
    weights = write_encoder(tmp_path / "encoder.safetensors")
    run, options = tmp_path / "run", {**tiny, "iterations": 4, "model.backbone.trainable_blocks": blocks}
    stopped = {**options, "train_cfg.max_iters": 2} if blocks else options
    train_segmenter(DIGITS, weights=weights, work_dir=run, cfg_options=stopped)
    if blocks:
        train_segmenter(DIGITS, work_dir=run, cfg_options=options, resume=True)
    trained = load_file(run / "segmenter.safetensors")
    found = {name: trained.get(f"backbone.{name}") for name in load_file(weights)}
    changed = {n for n, t in load_file(weights).items() if found[n] is not None and not torch.equal(t, found[n])}
    assert {name.split(".")[1] for name in changed} == {str(index) for index in range(6 - blocks, 6)}
    assert all(name.startswith("blocks.") for name in changed)
    assert evaluate_segmenter(DIGITS, run, work_dir=tmp_path / "eval", cfg_options=tiny)["mIoU"] >= 0


def test_blocks_without_weights_are_not_frozen(refused, tmp_path, write_encoder):
    assert "give --weights FILE, or leave it out" in refused(**{"model.backbone.trainable_blocks": 2})
    weights = ("--weights", str(write_encoder(tmp_path / "encoder.safetensors")))
    told = refused(*weights, **{"model.backbone.trainable_blocks": -1})
    assert "trainable_blocks is -1; give a number of blocks" in told


@pytest.mark.slow
def test_overfits_eight_images(tmp_path, tiny):
    options = {**tiny, "iterations": 80, "lr": 3e-3, "head_width": 32, "batch_size": 8}
    options["train_dataloader.dataset.pipeline.2.ratio_range"] = [1.0, 1.0]
    results = train_segmenter(DIGITS, work_dir=tmp_path / "run", cfg_options=options)
    assert results["mIoU"] > 90
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert lines[-2]["loss"] < 0.5 * lines[0]["loss"]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, tiny_options, write_scenes) -> tuple[Path, dict]:
    """A run that ended after two of its four steps, and the options of all four; tests work on copies of it."""
    root = tmp_path_factory.mktemp("stopped")
    scenes = write_scenes(root / "scenes")
    options = {**tiny_options, "data_root": str(scenes), "iterations": 4, "custom_hooks.0.interval": 1}
    train_segmenter(DIGITS, work_dir=root / "run", cfg_options={**options, "train_cfg.max_iters": 2})
    return root / "run", options


def test_resume_goes_on_from_the_last_checkpoint(tmp_path, stopped, capsys):
    run, options = shutil.copytree(stopped[0], tmp_path / "run"), stopped[1]
    train_segmenter(DIGITS, work_dir=run, cfg_options=options, dry_run=True)
    assert f"note: {run} is not empty; give another --work-dir" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"give another --work-dir \(mae segment calls it output\), or --resume"):
        train_segmenter(DIGITS, work_dir=run, cfg_options=options)
    with pytest.raises(UserError, match=r"has done all 2 steps"):
        train_segmenter(DIGITS, work_dir=run, cfg_options={**options, "train_cfg.max_iters": 2}, resume=True)
    assert train_segmenter(DIGITS, work_dir=run, cfg_options=options, resume=True)["steps"] == 4
    steps = [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 2, 3, 4, 4]
    with pytest.raises(UserError, match=r"holds no checkpoint to resume from"):
        train_segmenter(DIGITS, work_dir=tmp_path / "other", cfg_options=options, resume=True)


def test_a_resume_on_other_images_or_label_maps_of_the_same_names_is_refused(tmp_path, stopped):
    run, options = shutil.copytree(stopped[0], tmp_path / "run"), stopped[1]
    moved = shutil.copytree(options["data_root"], tmp_path / "moved")
    train_segmenter(DIGITS, work_dir=run, cfg_options={**options, "data_root": str(moved)}, resume=True, dry_run=True)
    label_map = sorted((moved / "annotations" / "training").iterdir())[0]
    with Image.open(label_map) as opened:
        opened.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(label_map)
    with pytest.raises(UserError, match=r"1 of 8 compared files have another content, such as 0\.png; set data_root"):
        train_segmenter(DIGITS, work_dir=run, cfg_options={**options, "data_root": str(moved)}, resume=True)


def test_weights_of_mmengine_are_not_dropped_silently(tmp_path, tiny):
    with pytest.raises(UserError, match=r"the option load_from is written --weights FILE"):
        train_segmenter(DIGITS, work_dir=tmp_path / "run", cfg_options={**tiny, "load_from": "x.pth"})
    assert not (tmp_path / "run").exists()


def test_a_run_that_was_killed_before_its_results_were_written_gets_them(tmp_path, stopped):
    run, options = shutil.copytree(stopped[0], tmp_path / "run"), {**stopped[1], "train_cfg.max_iters": 2}
    before = json.loads((run / "metrics.json").read_text())
    for name in ("metrics.json", "segmenter.safetensors"):
        (run / name).unlink()
    results = train_segmenter(DIGITS, work_dir=run, cfg_options=options, resume="auto")
    assert results["steps"] == 2 and results["mIoU"] == before["mIoU"]
    one, other = (load_file(folder / "segmenter.safetensors") for folder in (stopped[0], run))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Malice:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_resume_runs_no_code_of_the_checkpoint(tmp_path, stopped):
    run, options = shutil.copytree(stopped[0], tmp_path / "run"), stopped[1]
    trace = tmp_path / "executed"
    checkpoint = run / "iter_2.pth"
    state = load_safely(str(checkpoint), "cpu")
    torch.save({**state, "more": Malice(trace)}, checkpoint)
    with pytest.raises(UserError, match=r"iter_2\.pth is refused: it is broken, or holds more than tensors"):
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


def test_unreadable_images_are_named_counted_and_left_out(scenes, tmp_path, tiny):
    for part, name in (("training", "2.png"), ("validation", "7.png")):
        (scenes / "images" / part / name).write_bytes(b"no picture")
    (scenes / "images" / "training" / "._0.png").write_bytes(b"a notebook's copy")
    options = {**tiny, "iterations": 3}
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
def test_a_bad_map_that_the_check_did_not_see_is_named(scenes, tmp_path, monkeypatch, workers, tiny):
    path = scenes / "annotations" / "training" / "3.png"
    unchecked = checks.check_label_maps

    def spoil(*arguments, **options):
        found = unchecked(*arguments, **options)
        Image.fromarray(np.full((32, 32), 9, np.uint8)).save(path)
        return found

    monkeypatch.setattr(checks, "check_label_maps", spoil)
    options = {**tiny, "iterations": 9, "workers": workers}
    with pytest.raises(UserError, match=rf"^label map {path} holds the value 9, but num_classes=3 allows 0..2"):
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

    assert classes(num_classes=2, reduce_zero_label=True) == list(NAMES[1:])
    (scenes / "classes.txt").unlink()
    assert classes(num_classes=2, reduce_zero_label=True) == ["class 1", "class 2"]
    assert classes(num_classes=3) == ["class 0", "class 1", "class 2"]


def test_two_ranks_of_torchrun_train_as_one(tmp_path, tiny, monkeypatch, write_encoder, run_forked):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    weights = write_encoder(tmp_path / "encoder.safetensors")
    options = {**tiny, "iterations": 3, "custom_hooks.0.interval": 1, "batch_size": 2}
    options["model.backbone.taps"] = [0, 1, 2, 3]  # of six blocks: the others would get no gradient, which DDP refuses
    options.pop("visualizer.vis_backends")
    for part in ("neck", "decode_head", "auxiliary_head"):  # what else looks at a rank's own images, or draws for them
        options |= {f"model.{part}.norm_cfg.type": "GN", f"model.{part}.norm_cfg.num_groups": 8}
    options |= {f"model.{head}_head.dropout_ratio": 0.0 for head in ("decode", "auxiliary")}
    settings = [f"{key}={value}".replace(" ", "") for key, value in options.items()]
    command = [str(DIGITS), "--weights", str(weights), "--work-dir", str(tmp_path / "run"), "--launcher", "pytorch"]
    program = [("transfer.segmentation.train_net:main", [*command, "--cfg-options", *settings], free_port())]
    done = run_forked(["-m", "tests.opens", json.dumps(program)], ranks=2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("ranks: 2") == done.stdout.count("percent)") == 1
    assert done.stdout.count('opens [{"encoder.safetensors": 1}]') == 2, "each rank opens the weights once"
    train_segmenter(DIGITS, weights=weights, work_dir=tmp_path / "one", cfg_options={**options, "batch_size": 4})
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("run", "one")]
    two, one = ([json.loads(line) for line in log] for log in logs)
    assert [line["step"] for line in two] == [1, 2, 3, 3]
    assert [line.get("loss") for line in two[:3]] == pytest.approx([line.get("loss") for line in one[:3]], rel=1e-5)


def test_mmseg_alone_runs_the_config(scenes, tmp_path, monkeypatch, write_encoder):
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


def test_the_official_layout_trains_with_a_full_report(tmp_path, tiny, monkeypatch):
    """A released pre-training checkpoint: the encoder's names, the decoder's, arguments, all under ``model``; it is
    read once."""
    opened = []

    def counted(path, **options):
        opened.append(path)
        return read_encoder(path, **options)

    monkeypatch.setattr(training, "read_encoder", counted)
    monkeypatch.setattr("transfer.trunk.opened_once", lambda source: source)  # no path comes here
    torch.manual_seed(3)
    encoder = ViTEncoder("nano", image_size=24, patch_size=8)
    decoder = {"mask_token": torch.zeros(1, 1, 64), "decoder_embed.weight": torch.zeros(64, 128)}
    decoder |= {"decoder_embed.bias": torch.zeros(64), "decoder_pos_embed": torch.zeros(1, 10, 64)}
    torch.save({"model": {**encoder.state_dict(), **decoder}, "epoch": 799}, tmp_path / "mae_pretrain.pth")
    options = {**tiny, "iterations": 3, "optim_wrapper.optimizer.lr": 0.0, "model.backbone.relative_positions": "table"}
    train_segmenter(DIGITS, weights=tmp_path / "mae_pretrain.pth", work_dir=tmp_path / "run", cfg_options=options)
    assert opened == [tmp_path / "mae_pretrain.pth"]
    report = json.loads((tmp_path / "run" / "loading.json").read_text())
    assert len(report["loaded"]) + len(report["resized"]) == 6 * 12 + 4 and report["resized"] == {
        "pos_embed": "3x3 -> 4x4"
    }
    assert {*decoder, "norm.weight", "norm.bias"} == set(report["unused"]) and not report["refused"]
    assert report["new"] == [f"blocks.{index}.attn.relative_position_bias_table" for index in range(6)]
    trained = load_file(tmp_path / "run" / "segmenter.safetensors")
    for name, tensor in encoder.state_dict().items():
        if not name.startswith(("norm.", "pos_embed")):
            assert torch.equal(trained[f"backbone.{name}"], tensor), name


def test_weights_of_detectors_are_refused(refused, tmp_path, write_encoder):
    encoder = load_file(write_encoder(tmp_path / "encoder.safetensors"))
    vitdet = {
        f"backbone.net.{name}": tensor for name, tensor in encoder.items() if not name.startswith(("cls_token", "norm"))
    }
    resnet = {"backbone.body.conv1.weight": torch.zeros(8, 3, 7, 7), "rpn.head.conv.weight": torch.zeros(8, 8, 3, 3)}
    for name, state, message in (
        (
            "vitdet.pth",
            {"model": {**vitdet, "roi_heads.box_head.fc1.weight": torch.zeros(4, 4)}},
            "missing from the file",
        ),
        ("maskrcnn.pth", resnet, "no MAE encoder in it"),
    ):
        torch.save(state, tmp_path / name)
        assert message in refused("--weights", str(tmp_path / name))


def test_grey_weights_make_grey_images(tmp_path, capsys, tiny, write_encoder):
    weights = write_encoder(tmp_path / "grey.safetensors", in_chans=1, mean=[0.5], std=[0.25])
    options = {**tiny, "iterations": 3}
    results = train_segmenter(DIGITS, weights=weights, work_dir=tmp_path / "run", cfg_options=options)
    assert results["steps"] == 3 and "read as greyscale" in capsys.readouterr().out
    found = evaluate_segmenter(DIGITS, tmp_path / "run", work_dir=tmp_path / "eval", cfg_options=tiny)
    assert "read as greyscale" in capsys.readouterr().out and found["per_class"] == results["per_class"]


# ---------------------------------------------------------------- wrong input


def test_label_value_out_of_range(scenes, refused):
    path = scenes / "annotations" / "training" / "3.png"
    labels = np.asarray(Image.open(path)).copy()
    labels[0, 0] = 200
    Image.fromarray(labels).save(path)
    assert f"label map {path} holds the value 200, but num_classes=3 allows 0..2" in refused()


def test_image_without_label_map(scenes, refused):
    (scenes / "annotations" / "validation" / "5.png").unlink()
    assert "has no label map" in refused()


def test_missing_data_folder(tmp_path, refused):
    error = refused(data_root=tmp_path / "nowhere")
    assert f"data folder {tmp_path}/nowhere/images/training does not exist; set data_root" in error


def test_number_of_classes(refused):
    error = refused(num_classes=4)
    assert "num_classes=4, but the train data have 3 classes (ground, box, disc); set num_classes=3" in error


def test_a_crop_that_is_too_small_for_the_pyramid():
    training.register_all_modules()

    def check(crop_size: int) -> None:
        checks.check_model(dict(read_config(DIGITS, {"model.backbone.image_size": crop_size}).items()))

    with pytest.raises(UserError, match=r"a crop of 1x1 patches leaves nothing .*; set crop_size=32 or more"):
        check(8)
    check(32)


def test_unreadable_image_where_it_is_to_stop_the_run(scenes, refused):
    (scenes / "images" / "training" / "2.png").write_bytes(b"no picture")
    option = {"train_dataloader.dataset.on_error": "raise"}
    assert "2.png cannot be read" in refused(**option)


def test_weights_of_another_architecture(tmp_path, tiny, write_encoder, refused):
    weights = write_encoder(tmp_path / "tiny.safetensors", size="tiny")
    error = refused("--weights", str(weights))
    assert f"{weights} has another architecture: backbone.size nano was asked for, but the file has tiny" in error


def test_weights_that_hold_no_encoder(tmp_path, refused):
    write_weights(tmp_path / "detector.safetensors", {"roi_heads.weight": torch.zeros(2)}, {})
    assert "no MAE encoder in it" in refused("--weights", str(tmp_path / "detector.safetensors"))


def test_weights_that_lack_a_tensor(tmp_path, write_encoder, refused):
    weights = write_encoder(tmp_path / "encoder.safetensors")
    state, metadata = read_weights(weights)
    state.pop("blocks.2.attn.qkv.weight")
    write_weights(weights, state, metadata)
    error = refused("--weights", str(weights))
    assert "blocks.2.attn.qkv.weight: missing from the file" in error


@pytest.mark.parametrize("value", ["nan", "-inf"])
def test_weights_that_are_not_finite(tmp_path, write_encoder, refused, value):
    weights = write_encoder(tmp_path / "encoder.safetensors")
    state, metadata = read_weights(weights)
    state["blocks.1.mlp.fc1.bias"][3] = float(value)
    write_weights(weights, state, metadata)
    assert "NaN or infinite numbers in blocks.1.mlp.fc1.bias (1 of " in refused("--weights", str(weights))


def test_truncated_and_missing_weights(tmp_path, write_encoder, refused):
    weights = write_encoder(tmp_path / "encoder.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "is truncated" in refused("--weights", str(weights))
    assert "does not exist" in refused("--weights", str(tmp_path / "none.pth"))


def test_normalisation_that_contradicts_the_weights(tmp_path, write_encoder, refused):
    weights = write_encoder(tmp_path / "encoder.safetensors", mean=[0.5] * 3, std=[0.5] * 3)
    option = {"model.data_preprocessor.mean": [1, 2, 3]}
    error = refused("--weights", str(weights), **option)
    assert "mean=[1, 2, 3] was asked for" in error and "[127.5, 127.5, 127.5]" in error


def test_crop_that_does_not_split_into_patches(refused):
    assert "30" in refused(crop_size=30)


def test_encoder_wider_than_the_heads(tiny, refused):
    assert "maps of a tiny encoder are 192 wide; set width=192" in refused(size="tiny")


def test_training_shorter_than_its_warm_up(refused):
    error = refused(iterations=2)
    assert "the PolyLR phase of param_scheduler runs from step 2 to 2; train for more steps" in error


def test_batch_of_one(refused):
    assert "batch norm needs at least 2 images" in refused(batch_size=1)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"lr": "abc"}, "lr=abc: the config has 0.0012 there; give a number"),
        ({"train_cfg.max_iters": "abc"}, "train_cfg.max_iters=abc: the config has 3 there; give a number"),
        ({"optim_wrapper.optimizer.lr": -1}, "optim_wrapper cannot be built: ValueError: Invalid learning rate: -1"),
        ({"train_dataloader.num_workers": -1}, "train_dataloader.num_workers is -1; set it to 0 or more"),
        ({"train_dataloader.batch_size": 0}, "train_dataloader.batch_size is 0; set it to 1 or more"),
        (
            {"model.backbone.taps": [1, 3, 5]},
            "the backbone's taps [1, 3, 5] do not match the 4 maps that the neck takes",
        ),
        ({"model.backbone.drop_path": 2}, "drop_path is 2; give a rate from 0 up to but not including 1"),
        ({"model.decode_head.in_index": [0, 1, 2, 7]}, "model cannot be built: IndexError: tuple index out of range"),
    ],
)
def test_values_that_break_a_training_are_refused_before_it_begins(refused, option, message):
    assert message in refused(**option)


def test_one_image_on_each_of_several_gpus_is_a_batch(tiny):
    config = read_config(DIGITS, {**tiny, "batch_size": 1})
    checks.check_batches(dict(config.items()), synchronised=True)
    with pytest.raises(UserError, match="batch norm needs at least 2 images"):
        checks.check_batches(dict(config.items()), synchronised=False)


def test_script_run_by_path_names_a_missing_config(tmp_path, monkeypatch, capsys):
    script = REPOSITORY / "transfer" / "segmentation" / "train_net.py"
    monkeypatch.setattr(sys, "argv", [str(script), str(CONFIGS / "digit.py"), "--work-dir", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(script), run_name="__main__")
    assert stopped.value.code == 2 and "configs/segmentation/digits.py?" in capsys.readouterr().err


def test_a_cpu_that_has_bf16_trains_in_it():
    from mmseg.registry import OPTIM_WRAPPERS

    import transfer.segmentation.engine_mmseg.optimizer  # noqa: F401, registers it

    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapper = OPTIM_WRAPPERS.build({"type": "MAECoreCPUMixed", "optimizer": optimizer})
    before = model.weight.detach().clone()
    with wrapper.optim_context(model):
        output = model(torch.ones(2, 4))
    wrapper.update_params(output.float().square().mean())
    assert output.dtype == torch.bfloat16 and model.weight.dtype == torch.float32
    assert not torch.equal(model.weight, before)
