import json
import re

import pytest
import torch
from PIL import Image

from mae_core.config.load import load_config
from mae_core.config.schema import ConfigError, leaf_names
from mae_core.data.images import Statistics
from mae_core.errors import UserError
from mae_core.training.groups import layer_decay_groups
from mae_core.training.loop import seed_everything
from mae_core.weights.files import read_weights, write_weights
from transfer.backbone import DenseViT, Level
from transfer.detection.coco import Part, read_coco
from transfer.detection.config import DetectionConfig, DetectionData, DetectorConfig, InferenceConfig, SamplingConfig
from transfer.detection.data_sets import locate
from transfer.detection.engine import assemble as build_mask_rcnn
from transfer.detection.engine_torchvision import ENGINE
from transfer.detection.engine_torchvision.regions import LevelPool, mask_targets, paste_mask
from transfer.detection.engine_torchvision.training import detection_losses, to_original
from transfer.detection.run import evaluate_detector, train_detector
from transfer.detection.samples import TrainingSamples, WholeImages, boxes_of, collate
from transfer.detection.train_net import check_one_process, main, parse_arguments
from transfer.engines import installed


@pytest.fixture
def root(detection_root):
    return detection_root


@pytest.fixture
def configure(configure_detection):
    return configure_detection


def tiny_detector(config, num_classes=3):
    seed_everything(0)
    vit = DenseViT("nano", image_size=64, patch_size=8)
    return build_mask_rcnn(vit, num_classes, config.model, config.sampling, config.test)


# ---- regions of interest


def test_a_box_is_read_where_it_lies_on_the_level_of_its_size():
    levels = [Level(name, 2, stride) for name, stride in (("p2", 4), ("p3", 8), ("p4", 16), ("p5", 32))]
    features = {}
    for number, level in enumerate(levels):
        side = 512 // level.stride
        centres = (torch.arange(side) + 0.5) * level.stride
        features[level.name] = torch.stack([centres.expand(side, side), torch.full((side, side), float(number))])[None]
    boxes = torch.tensor(
        [[100.0, 40, 200, 140], [64, 64, 288, 288], [0, 0, 111, 111], [0, 0, 448, 448], [8, 8, 12, 12]]
    )
    pooled = LevelPool(levels, 2)(features, [boxes])
    assert pooled[:, 1].flatten(1).amin(1).tolist() == pooled[:, 1].flatten(1).amax(1).tolist() == [0, 2, 0, 3, 0]
    torch.testing.assert_close(pooled[0, 0, 0], torch.tensor([125.0, 175.0]))  # centres of the halves of 100..200
    torch.testing.assert_close(pooled[1, 0, 0], torch.tensor([120.0, 232.0]))


def test_boxes_of_many_images_keep_their_order():
    levels = [Level("p2", 1, 4)]
    features = {"p2": torch.arange(3.0)[:, None, None, None].expand(3, 1, 8, 8)}
    box = torch.tensor([[0.0, 0, 16, 16]])
    pooled = LevelPool(levels, 1)(features, [box, box[:0], box.repeat(2, 1)])
    assert pooled.flatten().tolist() == [0, 2, 2]


def test_a_mask_cut_to_its_box_and_pasted_back_is_the_mask():
    mask = torch.zeros(60, 80, dtype=torch.bool)
    mask[10:38, 20:48] = True
    mask[16:30, 26:40] = False
    box = torch.from_numpy(boxes_of(mask[None].numpy())).float()
    cells = mask_targets(mask[None], box, torch.tensor([0]), 28)[0]
    assert torch.equal(paste_mask(cells, box[0].tolist(), 60, 80), mask)


@pytest.mark.parametrize(
    "box", [(-5.0, -5.0, 3.0, 3.0), (70.5, 50.2, 90.0, 75.0), (3.0, 3.0, 3.2, 3.1), (90, 70, 95, 75)]
)
def test_pasting_stays_inside_the_image(box):
    mask = paste_mask(torch.ones(28, 28), box, 60, 80)
    assert mask.shape == (60, 80)
    x1, y1, x2, y2 = box
    rows, cols = torch.where(mask)
    assert all(x1 <= x + 0.5 <= x2 for x in cols.tolist()) and all(y1 <= y + 0.5 <= y2 for y in rows.tolist())


# ---- evaluation


@pytest.mark.parametrize("size", [(64, 48), (30, 90), (200, 50)])
def test_detections_come_back_in_original_pixels(tmp_path, write_coco, size):
    root = write_coco(tmp_path, 1, 1, size=(64, 48))
    coco = read_coco(Part(root / "val", root / "annotations" / "instances_val.json"))
    width, height = size
    coco = type(coco)(coco.path, (coco.images[0]._replace(width=width, height=height, instances=()),), coco.categories)
    images = WholeImages(coco, DetectionData(image_size=(96, 96)), Statistics((0.0,) * 3, (1.0,) * 3))
    placement = images.placement(0)
    assert max(placement.visible) == 96
    truth = torch.tensor([[4.0, 8.0, 20.0, 40.0]])
    scale = torch.tensor([placement.width / width, placement.height / height] * 2)
    output = {"boxes": truth * scale, "scores": torch.ones(1), "labels": torch.ones(1, dtype=torch.int64)}
    found = to_original({**output, "masks": torch.ones(1, 28, 28)}, images, 0)
    torch.testing.assert_close(found.boxes, truth)
    assert found.codes[0]["size"] == [height, width]


def test_an_empty_image_trains_and_evaluates(configure):
    model = tiny_detector(configure())
    pixels, empty = torch.randn(1, 3, 64, 64), {
        "boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "masks": torch.zeros(0, 64, 64).bool(),
    }  # fmt: skip
    losses = model(pixels, [(64, 64)], [empty])
    torch.stack(list(losses.values())).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert all(torch.isfinite(loss) for loss in losses.values())
    found = model.eval()(pixels, [(64, 40)])[0]
    assert len(found["boxes"]) == len(found["masks"]) and (found["boxes"][:, 2] <= 40).all()


def test_a_canvas_that_is_no_multiple_of_the_strides(configure):
    config = configure()
    vit = DenseViT("nano", image_size=(40, 56), patch_size=8)
    model = build_mask_rcnn(vit, 3, config.model, config.sampling, config.test).eval()
    assert model(torch.randn(1, 3, 40, 56), [(40, 56)])[0]["masks"].shape[1:] == (28, 28)


def test_the_published_heads():
    vit = DenseViT("nano", image_size=64, patch_size=16)
    model = build_mask_rcnn(vit, 80, DetectorConfig(), SamplingConfig(), InferenceConfig())
    kinds = [[type(m).__name__ for m in head.modules()] for head in (model.rpn.head.conv, model.roi_heads.box_head)]
    assert kinds[0].count("Conv2d") == 2 and "BatchNorm2d" not in kinds[0]
    assert kinds[1].count("Conv2d") == 4 == kinds[1].count("BatchNorm2d") and kinds[1].count("Linear") == 1
    assert model.rpn.anchor_generator.sizes == ((32,), (64,), (128,), (256,), (512,))
    assert model.rpn.anchor_generator.aspect_ratios == ((0.5, 1.0, 2.0),) * 5
    assert model.roi_heads.mask_predictor.mask_fcn_logits.out_channels == 81


# ---- training


def test_layer_decay_scales_from_the_stem_to_the_heads(configure):
    model = tiny_detector(configure())
    scale, decay = {}, {}
    names = {id(p): name for name, p in model.named_parameters()}
    groups = layer_decay_groups(model, model.backbone.vit, layer_decay=0.5, weight_decay=0.1, trunk="backbone.vit.")
    for group in groups:
        for parameter in group["params"]:
            scale[names[id(parameter)]], decay[names[id(parameter)]] = group["lr_scale"], group["weight_decay"]
    depth = len(model.backbone.vit.blocks)
    assert set(scale) == set(names.values())
    assert scale["backbone.vit.patch_embed.proj.weight"] == scale["backbone.vit.pos_embed"] == 0.5 ** (depth + 1)
    assert [scale[f"backbone.vit.blocks.{i}.mlp.fc1.weight"] for i in (0, depth - 1)] == [0.5**depth, 0.5]
    assert {s for name, s in scale.items() if "vit" not in name} == {1.0}
    assert decay["backbone.vit.pos_embed"] == decay["backbone.vit.blocks.0.norm1.weight"] == 0
    assert decay["roi_heads.box_predictor.cls_score.weight"] == 0.1


def test_splitting_a_batch_leaves_every_loss_finite_and_named(root, configure):
    config = configure()
    coco = read_coco(locate(config.data, "train"))
    samples = TrainingSamples(coco, config.data, Statistics((0.5,) * 3, (0.25,) * 3), 0)
    losses = detection_losses(tiny_detector(config), collate([samples[(0, i)] for i in range(2)]))
    assert set(losses) == {"loss", "proposal_class_loss", "proposal_box_loss", "class_loss", "box_loss", "mask_loss"}
    total = sum(value.item() for name, value in losses.items() if name != "loss")
    assert losses["loss"].item() == pytest.approx(total)


@pytest.mark.slow
def test_a_detector_overfits_eight_images_and_is_rebuilt_from_its_file(configure, tmp_path, write_coco):
    eight = f"data.path={write_coco(tmp_path / 'eight', train=8, val=8, val_seed=0)}"
    config = configure(eight, "optim.epochs=160", "optim.base_lr=0.15", "log.pictures_every=100")
    metrics = train_detector(config)
    assert metrics["bbox"]["AP50"] > 0.9
    assert metrics["segm"]["AP50"] > 0.85
    run = tmp_path / "run"
    assert json.loads((run / "metrics.json").read_text()) == metrics
    assert {path.name for path in (run / "pictures").iterdir()} >= {"step_00000100.png", "val_000.png"}
    with Image.open(run / "pictures" / "val_000.png") as picture:
        assert picture.width > 2 * picture.height
    predictions = json.loads((run / "predictions.json").read_text())
    assert {p["category_id"] for p in predictions} <= {3, 7, 20} and {p["image_id"] for p in predictions} <= set(
        range(5, 85, 10)
    )

    again = evaluate_detector(configure(eight, f"weights={run}", f"output={tmp_path / 'again'}", scratch=False))
    assert [again[kind] for kind in ("bbox", "segm")] == [metrics[kind] for kind in ("bbox", "segm")]
    with pytest.raises(UserError, match="already holds a run"):
        train_detector(config)
    for weights in (run, run / "detector.safetensors"):
        with pytest.raises(UserError, match="no MAE encoder in it, it is a detector; give the encoder"):
            train_detector(configure(eight, f"weights={weights}", f"output={tmp_path / 'next'}", scratch=False))


def test_a_pretrained_encoder_is_reported_and_its_statistics_taken(configure, pretrained, tmp_path, capsys):
    train_detector(configure(f"weights={pretrained}", "optim.epochs=1", scratch=False))
    loading = json.loads((tmp_path / "run" / "loading.json").read_text())
    assert loading["share"] == 1.0 and loading["resized"] == {"pos_embed": "4x4 -> 8x8"}
    assert "weights from" in capsys.readouterr().out


def test_an_interrupted_run_ends_in_the_same_weights(configure, tmp_path, break_off_and_resume):
    from transfer.detection.engine_torchvision import training as core_loop

    options = (
        "optim.epochs=4",
        "log.every=1",
        "log.checkpoint_every=2",
        "data.resize_scale=[0.5,1.5]",
        "model.drop_path=0.2",
    )
    train_detector(configure(*options, f"output={tmp_path / 'whole'}"))
    break_off_and_resume(configure(*options, f"output={tmp_path / 'broken'}"), core_loop, "detection_losses")
    whole, resumed = (read_weights(tmp_path / name / "detector.safetensors")[0] for name in ("whole", "broken"))
    differing = [name for name in whole if not torch.equal(whole[name], resumed[name])]
    assert not differing


def test_resuming_a_finished_run_leaves_it_as_it_is(configure, tmp_path, capsys):
    config, run = configure("optim.epochs=1"), tmp_path / "run"
    metrics = train_detector(config)
    assert metrics["training"]["loss"] > 0 and metrics["training"]["seconds"] > 0
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.rglob("*") if path.is_file()}
    assert train_detector(config, resume=True) == metrics
    assert "is a finished run" in capsys.readouterr().out
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in run.rglob("*") if p.is_file()} == before

    (run / "metrics.json").unlink()  # stopped between the last step and the end of its evaluation
    again = train_detector(config, resume=True)
    assert again["bbox"] == metrics["bbox"]
    assert again["training"] == {"steps": metrics["training"]["steps"], "seconds": None, "loss": None}
    assert "NaN" not in (run / "metrics.json").read_text()


def test_scoring_makes_its_folder_and_overwrites_nothing(configure, tmp_path, write_coco):
    train_detector(configure("optim.epochs=1"))
    run, scored = tmp_path / "run", tmp_path / "deep" / "scored"
    before = (run / "metrics.json").read_bytes()
    other = write_coco(tmp_path / "other", val_seed=0)
    (other / "val" / "001.png").write_bytes(b"no image")

    def options(output):
        return configure(f"weights={run}", f"output={output}", f"data.path={other}", scratch=False)

    assert evaluate_detector(options(scored))["images"] == 2
    assert "001.png" in (scored / "log.jsonl").read_text()
    for output in (scored, run):
        with pytest.raises(UserError, match=r"already holds metrics\.json.*output=FOLDER"):
            evaluate_detector(options(output))
    assert (run / "metrics.json").read_bytes() == before


# ---- what a user can get wrong


@pytest.mark.parametrize("workers", [0, 1])
def test_images_of_another_size_than_the_json_end_in_one_sentence(tmp_path, write_coco, configure, workers):
    root = write_coco(tmp_path / "other")
    config = configure(f"data.path={root}", f"data.workers={workers}", "data.on_error=raise")
    Image.new("RGB", (10, 12)).save(root / "train" / "002.png")
    with pytest.raises(UserError, match=r"^image .*002\.png cannot be read \(it is 10x12, .* are for 64x48\)"):
        train_detector(config)
    for path in (root / "train").iterdir():
        Image.new("RGB", (10, 12)).save(path)
    with pytest.raises(UserError, match=r"^no image of .*instances_train\.json can be used, .*\(it is 10x12"):
        train_detector(configure(f"data.path={root}", f"data.workers={workers}"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--num-gpus", "8"], r"use torchrun --nproc_per_node=8 transfer/detection/train_net\.py \.\.\."),
        (["--num-machines", "2", "--num-gpus", "4"], "torchrun --nnodes=2 --node_rank=0 .*--nproc_per_node=4 "),
        (["--machine-rank", "1", "--dist-url", "tcp://x:1"], "torchrun --nnodes=2 --node_rank=1 "),
        (["--num-gpus", "0"], "device=cpu"),
    ],
)
def test_more_processes_than_one_are_torchruns_matter(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*flags, "from_scratch=true"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.startswith("error: ") and error.count("\n") == 1


def test_one_gpu_may_be_asked_for():
    given = parse_arguments(["--num-gpus", "1", "--dist-url", "tcp://x:1", "from_scratch=true"])
    check_one_process(given, "torchvision")
    assert given.overrides == ["from_scratch=true"]


def test_a_run_on_cpus_has_no_norm_of_gpus(configure, monkeypatch):
    from transfer.detection import engine

    class Built(Exception):
        pass

    def build(vit, model):
        raise Built(model.norm)

    monkeypatch.setattr(engine, "load_engine", lambda name: ENGINE._replace(backbone=build))
    with pytest.raises(Built, match=r"^bn$"):
        train_detector(configure("model.norm=sync_bn"))


def test_an_unknown_key_gets_a_guess():
    with pytest.raises(ConfigError, match=r"unknown key 'model\.fpn_chanels'; did you mean 'model\.fpn_channels'"):
        load_config(DetectionConfig, None, ["from_scratch=true", "model.fpn_chanels=3"])


def test_an_engine_that_does_not_exist_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="unknown name 'mmdet'; known: detectron2, torchvision"):
        load_config(DetectionConfig, None, ["from_scratch=true", "engine=mmdet"])


@pytest.mark.skipif(installed("detectron2"), reason="detectron2 is installed")
@pytest.mark.parametrize("given", [["engine=detectron2", "from_scratch=true"], ["--config-file", "lazy.py"]])
def test_without_detectron2_one_sentence_names_its_page(given, capsys):
    with pytest.raises(SystemExit) as stop:
        main(given)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert "needs detectron2, not installed here; its page says how to install it: https://detectron2.readth" in error


def test_a_cascade_is_detectron2s():
    with pytest.raises(ConfigError, match=r"model\.cascade needs engine=detectron2, not torchvision"):
        load_config(DetectionConfig, None, ["from_scratch=true", "model.cascade=true"])


def test_weights_or_scratch_but_not_both_or_neither():
    for overrides in ([], ["from_scratch=true", "weights=x"]):
        with pytest.raises(ConfigError, match="either weights=FILE or from_scratch=true"):
            load_config(DetectionConfig, None, overrides)


@pytest.mark.parametrize(
    "wrong", ["data.resize_scale=[2,1]", "optim.milestones=[0.9,0.8]", "optim.milestones=[0.5,0.5]"]
)
def test_ranges_and_milestones_ascend(wrong):
    with pytest.raises(ConfigError, match=r"(resize_scale|milestones) .* must ascend"):
        load_config(DetectionConfig, None, ["from_scratch=true", wrong])


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["data.path=null"], "no train set given; set data.path"),
        (["data.image_size=60"], "image size 60x60 does not split into 8x8 patches"),
        (["model.patch_size=16", "model.size=nano", "data.image_size=40"], "use 48x48"),
        (
            ["model.patch_size=32", "data.image_size=64", "data.path=/no/such/folder"],
            r"/no/such/folder.*does not exist",
        ),
    ],
)
def test_wrong_input_writes_nothing(configure, tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        train_detector(configure(*overrides))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_weights_that_are_not_finite_are_refused(configure, pretrained, tmp_path, value):
    state, metadata = read_weights(pretrained / "encoder.safetensors")
    state["norm.weight"][0] = float(value)
    write_weights(tmp_path / "bad.safetensors", state, metadata)
    with pytest.raises(UserError, match=r"bad\.safetensors: NaN or infinite numbers in norm\.weight"):
        train_detector(configure(f"weights={tmp_path / 'bad.safetensors'}", scratch=False))
    assert not (tmp_path / "run").exists()


def test_an_encoder_of_another_architecture_is_refused(configure, pretrained, tmp_path):
    with pytest.raises(UserError, match="another architecture: size tiny was asked for, but the file has nano"):
        train_detector(configure(f"weights={pretrained}", "model.size=tiny", scratch=False))
    truncated = tmp_path / "cut.safetensors"
    truncated.write_bytes((pretrained / "encoder.safetensors").read_bytes()[:1000])
    with pytest.raises(UserError, match=r"cut\.safetensors is truncated"):
        train_detector(configure(f"weights={truncated}", scratch=False))
    assert not (tmp_path / "run").exists()


def test_an_encoder_is_no_detector(configure, pretrained):
    with pytest.raises(UserError, match="holds no detector"):
        evaluate_detector(configure(f"weights={pretrained}", scratch=False))
    with pytest.raises(UserError, match="is not a detector of engine torchvision"):
        evaluate_detector(configure(f"weights={pretrained / 'encoder.safetensors'}", scratch=False))
    with pytest.raises(UserError, match="--eval-only needs a trained detector"):
        evaluate_detector(configure())


def test_validation_classes_must_be_the_training_classes(tmp_path, write_coco, configure):
    root = write_coco(tmp_path / "other")
    path = root / "annotations" / "instances_val.json"
    content = json.loads(path.read_text())
    content["categories"][0]["name"] = "ring"
    path.write_text(json.dumps(content))
    with pytest.raises(
        UserError, match=r"instances_val\.json and .*instances_train\.json differ in 1 categories \(id 20"
    ):
        train_detector(configure(f"data.path={root}"))


def test_a_corrupt_image_refuses_the_run_where_asked_to(tmp_path, write_coco, configure):
    root = write_coco(tmp_path / "other")
    (root / "train" / "002.png").write_bytes(b"\x89PNG")
    with pytest.raises(UserError, match=r"image .*002\.png cannot be read"):
        train_detector(configure(f"data.path={root}", "data.on_error=raise"))
    metrics = train_detector(configure(f"data.path={root}"))
    assert metrics["images"] == 3
    assert "002.png" in (tmp_path / "run" / "log.jsonl").read_text()


def test_the_command_answers_a_mistake_with_one_sentence_and_exit_code_2(run_forked, tmp_path):
    script = "transfer/detection/train_net.py"
    done = run_forked([script, "from_scratch=true", f"data.path={tmp_path}", f"output={tmp_path / 'run'}"])
    assert done.returncode == 2
    assert done.stderr.startswith("error: annotation file ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_every_option_is_read(pytestconfig):
    folders = [pytestconfig.rootpath / "mae_core", pytestconfig.rootpath / "transfer"]
    sources = [path for folder in folders for path in folder.rglob("*.py") if path.name != "config.py"]
    code = "\n".join(path.read_text() for path in sources)
    options = {name.rpartition(".")[2] for name in leaf_names(DetectionConfig)}
    assert [name for name in sorted(options) if not re.search(rf"\.{name}\b", code)] == []
