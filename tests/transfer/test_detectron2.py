"""The detectron2 engine: parity with detectron2's own ViTDet, training, scoring, its configs and its zoo."""

from __future__ import annotations

import json
import os
import pickle
import signal
from functools import partial

import pytest
import torch
from torch import nn

from mae_core.config.schema import ConfigError
from mae_core.errors import UserError
from mae_core.models.sizes import SIZES
from mae_core.training.finite import non_finite
from mae_core.training.loop import FitSettings, cosine_schedule, step_schedule
from mae_core.weights.files import read_weights
from transfer.backbone import DenseViT
from transfer.detection.engine import build_network, load_engine
from transfer.detection.run import evaluate_detector, train_detector
from transfer.detection.train_net import main
from transfer.engines import DETECTION
from transfer.pyramid import NORMS, PYRAMIDS, PyramidBackbone
from transfer.trunk import parameter_groups

pytest.importorskip("detectron2", reason="detectron2 is not installed; its page says how")
pytestmark = pytest.mark.detectron2

NANO = SIZES["nano"]
WINDOWED = [index for index in range(NANO.depth) if index not in NANO.quarter_taps]
VITDET = (
    "engine=detectron2",
    "model.pyramid=simple",
    "model.norm=ln",
    "model.window=3",
    "model.relative_positions=decomposed",
    "model.positions=weights",
)


def their_backbone(side: int, patch: int = 16, width: int = 64, window: int = 14) -> nn.Module:
    """detectron2's own ViT and simple feature pyramid, with tables that are not zero."""
    from detectron2.modeling import SimpleFeaturePyramid, ViT
    from detectron2.modeling.backbone.fpn import LastLevelMaxPool

    torch.manual_seed(0)
    vit = ViT(
        img_size=side, patch_size=patch, embed_dim=NANO.width, depth=NANO.depth, num_heads=NANO.heads,
        window_size=window, window_block_indexes=WINDOWED, use_rel_pos=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6), pretrain_img_size=224,
    )  # fmt: skip
    net = SimpleFeaturePyramid(
        vit, "last_feat", width, (4.0, 2.0, 1.0, 0.5), LastLevelMaxPool(), norm="LN", square_pad=side
    )
    for name, parameter in net.named_parameters():
        if "rel_pos" in name:
            nn.init.normal_(parameter, std=0.3)
        elif parameter.ndim == 1:
            nn.init.normal_(parameter, mean=float("weight" in name), std=0.1)
    return net.eval()


def our_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    from transfer.detection.engine_detectron2.zoo import our_name

    return {our_name(f"backbone.{name}").removeprefix("backbone."): tensor for name, tensor in state.items()}


# ---- parity


@pytest.mark.parametrize("height, width", [(224, 224), (240, 208), (256, 320), (1024, 1024)])
def test_backbone_and_pyramid_are_detectron2s(height, width):
    theirs = their_backbone(1024)
    taps = PYRAMIDS["simple"].taps(NANO)
    vit = DenseViT(
        "nano", image_size=224, relative_size=1024, window=14, relative_positions="decomposed", taps=taps, patch_size=16
    )
    ours = PyramidBackbone(vit, kind="simple", channels=64, norm=NORMS["ln"]).eval()
    ours.load_state_dict(our_state(theirs.state_dict()))
    images = torch.randn(1, 3, height, width)
    with torch.no_grad():
        expected, found = theirs(images), ours(images)
    assert list(found) == list(expected) == ["p2", "p3", "p4", "p5", "p6"]
    for name, maps in found.items():
        torch.testing.assert_close(maps, expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pyramid", PYRAMIDS)
def test_both_engines_share_the_backbone_to_the_bit(configure_detection, pyramid):
    options = (f"model.pyramid={pyramid}", "model.norm=ln", "model.window=3", "model.relative_positions=shared_table")
    networks = []
    for engine in DETECTION:
        config = configure_detection(f"engine={engine}", *options)
        networks.append(build_network(config, load_engine(config.engine), 3)[1].eval())
    one, other = (
        {name: tensor for name, tensor in network.state_dict().items() if name.startswith("backbone.")}
        for network in networks
    )
    assert list(one) == list(other)
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    images = torch.randn(2, 3, 64, 64)
    maps, same = (network.backbone(images) for network in networks)
    assert all(torch.equal(x, same[name]) for name, x in maps.items())


@pytest.mark.parametrize(
    ("decayed", "exempt"),
    [
        ("vitdet", {"weight_decay_norm": 0.0, "overrides": {"pos_embed": {"weight_decay": 0.0}}}),  # ViT-B and ViT-L
        ("all", {"weight_decay_norm": None, "overrides": {}}),  # ViT-H
    ],
)
def test_what_is_decayed_as_published_is_what_vitdets_optimizer_decays(configure_detection, decayed, exempt):
    from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate
    from detectron2.solver.build import get_default_optimizer_params

    from transfer.detection.engine_detectron2.zoo import our_name

    config = configure_detection(*VITDET, "model.patch_size=16")
    network = build_network(config, load_engine(config.engine), 3)[1]
    theirs = nn.ModuleDict({"backbone": their_backbone(64, width=32, window=3)})
    rate = partial(get_vit_lr_decay_rate, num_layers=NANO.depth, lr_decay_rate=0.7)
    published = get_default_optimizer_params(theirs, base_lr=1.0, lr_factor_func=rate, **exempt)
    optim = {"weight_decay": 0.1, "layer_decay": 0.7}

    def flat(model, groups, key):
        names = {id(parameter): our_name(name) for name, parameter in model.named_parameters()}
        found = {
            names[id(parameter)]: (round(group[key], 9), group.get("weight_decay", 0.1))
            for group in groups
            for parameter in group["params"]
        }
        return {name: value for name, value in found.items() if name.startswith("backbone.")}

    ours = flat(network, parameter_groups(network, **optim, decayed=decayed), "lr_scale")
    assert ours == flat(theirs, published, "lr")
    default = flat(network, parameter_groups(network, **optim), "lr_scale")
    assert {name: scale for name, (scale, _) in default.items()} == {name: scale for name, (scale, _) in ours.items()}
    free = {name for name, (_, decay) in default.items() if decay == 0}
    assert free == {name for name in default if name.endswith(("bias", "rel_pos_h", "rel_pos_w", "pos_embed"))} | {
        name for name, parameter in network.named_parameters() if name in default and parameter.ndim == 1
    }


@pytest.mark.parametrize(
    ("steps", "warmup", "milestones"), [(200, 20, (0.8, 0.9)), (13, 0, (0.888889, 0.962961)), (100, 10, ()), (5, 0, ())]
)
def test_the_rate_is_that_of_the_other_engine(steps, warmup, milestones):
    from transfer.detection.engine_detectron2.training import CoreRate

    settings = FitSettings(steps, warmup, lr=2.0, min_lr=0.02, milestones=milestones)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=2.0)
    schedule, theirs = (step_schedule if milestones else cosine_schedule)(optimizer, settings), CoreRate(settings)
    for step in range(steps):
        schedule.step_update(step)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(2.0 * theirs(step / steps), rel=1e-6), step


def test_the_steps_are_vitdets_own():
    """Of projects/ViTDet: MultiStepParamScheduler in WarmupParamScheduler."""
    from detectron2.solver import WarmupParamScheduler
    from fvcore.common.param_scheduler import MultiStepParamScheduler

    from transfer.detection.engine_detectron2.training import CoreRate

    steps = 184_375
    after = MultiStepParamScheduler([1.0, 0.1, 0.01], milestones=[163_889, 177_546], num_updates=steps)
    published = WarmupParamScheduler(after, warmup_factor=0.001, warmup_length=250 / steps)
    ours = CoreRate(FitSettings(steps, 250, lr=1e-4, milestones=(0.888889, 0.962961)))
    for step in (0, 1, 100, 249, 250, 163_888, 163_889, 177_545, 177_546, 184_374):
        assert ours(step / steps) == pytest.approx(published(step / steps), rel=1e-5), step


# ---- training and scoring


@pytest.mark.slow
def test_it_overfits_eight_images_and_both_evaluators_agree(configure_detection, tmp_path, write_coco):
    root = write_coco(tmp_path / "eight", train=8, val=8, val_seed=0)
    options = ("optim.epochs=100", "optim.base_lr=0.2", "model.head_channels=128", f"data.path={root}")
    metrics = train_detector(configure_detection("engine=detectron2", *options))
    assert metrics["bbox"]["AP50"] > 0.9
    assert metrics["segm"]["AP50"] > 0.85
    for kind in ("bbox", "segm"):
        for name in ("AP", "AP50", "AP75", "APs"):
            assert metrics["detectron2"][kind][name] == pytest.approx(100 * metrics[kind][name], abs=1e-4)
    run = tmp_path / "run"
    again = evaluate_detector(
        configure_detection(
            "engine=detectron2", f"weights={run}", f"output={tmp_path / 'again'}", f"data.path={root}", scratch=False
        )
    )
    assert again["bbox"] == metrics["bbox"]
    assert {path.name for path in (run / "pictures").iterdir()} == {"val_000.png"}
    other = configure_detection(f"weights={run}", f"output={tmp_path / 'other'}", f"data.path={root}", scratch=False)
    assert evaluate_detector(other)["segm"]["AP"] == pytest.approx(metrics["segm"]["AP"], abs=0.01)


def test_an_interrupted_run_ends_in_the_same_weights(configure_detection, tmp_path, break_off_and_resume):
    from transfer.detection.engine_detectron2 import training

    options = ("engine=detectron2", "optim.epochs=4", "log.every=1", "log.checkpoint_every=2", "optim.clip_grad=1.0")
    train_detector(configure_detection(*options, f"output={tmp_path / 'whole'}"))
    break_off_and_resume(configure_detection(*options, f"output={tmp_path / 'broken'}"), training, "records")
    whole, resumed = (read_weights(tmp_path / name / "detector.safetensors")[0] for name in ("whole", "broken"))
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
    steps = [json.loads(line)["step"] for line in (tmp_path / "broken" / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


def test_a_signal_saves_and_a_loss_that_is_not_finite_is_skipped(configure_detection, tmp_path, monkeypatch, capfd):
    from mae_core.training.signals import Stopped
    from transfer.detection.engine_detectron2 import training

    def changed(step: int, change):
        real, calls = training.records, []

        def record(batch):
            calls.append(1)
            return change(real(batch)) if len(calls) == step else real(batch)

        patch.setattr(training, "records", record)

    def terminated(found):
        os.kill(os.getpid(), signal.SIGTERM)
        return found

    def spoiled(found):
        found[0]["image"] = found[0]["image"] * float("nan")
        return found

    config = configure_detection("engine=detectron2", "optim.epochs=4", "log.every=1")
    with monkeypatch.context() as patch:
        changed(2, terminated)
        with pytest.raises(Stopped) as stopped:
            train_detector(config)
    assert stopped.value.code == 75 and "SIGTERM: stopped after step 2 of 4" in capfd.readouterr().out
    with monkeypatch.context() as patch:
        changed(1, spoiled)
        train_detector(config, resume="auto")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [(line["event"], line["step"]) for line in lines if "event" in line] == [
        ("non-finite gradient, step skipped", 3)
    ]
    assert not non_finite(read_weights(tmp_path / "run" / "detector.safetensors")[0])
    with pytest.raises(UserError, match=r"not finite for 10 steps in a row"), monkeypatch.context() as patch:
        real = training.records
        patch.setattr(training, "records", lambda batch: spoiled(real(batch)))
        train_detector(configure_detection("engine=detectron2", "optim.epochs=12", f"output={tmp_path / 'nan'}"))
    assert "Traceback" not in "".join(capfd.readouterr())


def test_bf16_is_bf16_on_a_cpu_too(configure_detection, monkeypatch):
    from transfer.detection.engine_detectron2 import training

    seen = []

    class Watched(training.InPrecision):
        def forward(self, batch):
            hook = self.network.backbone.vit.blocks[0].mlp.register_forward_hook(lambda *a: seen.append(a[2].dtype))
            losses = super().forward(batch)
            hook.remove()
            return losses

    monkeypatch.setattr(training, "InPrecision", Watched)
    metrics = train_detector(configure_detection("engine=detectron2", "precision=bf16", "optim.epochs=1"))
    assert seen == [torch.bfloat16] and metrics["training"]["loss"] > 0


def test_a_cascade_trains_and_scores(configure_detection, tmp_path):
    metrics = train_detector(configure_detection("engine=detectron2", "model.cascade=true", "optim.epochs=1"))
    state, metadata = read_weights(tmp_path / "run" / "detector.safetensors")
    assert metadata["detector"]["cascade"] and metrics["images"] == 3
    assert state["roi_heads.box_predictor.2.bbox_pred.weight"].shape[0] == 4
    with pytest.raises(UserError, match="is a cascade of engine detectron2, which engine torchvision cannot run"):
        evaluate_detector(
            configure_detection(f"weights={tmp_path / 'run'}", f"output={tmp_path / 'other'}", scratch=False)
        )


def test_an_encoder_is_loaded_with_its_report(configure_detection, pretrained, tmp_path):
    train_detector(configure_detection("engine=detectron2", f"weights={pretrained}", "optim.epochs=1", scratch=False))
    assert json.loads((tmp_path / "run" / "loading.json").read_text())["share"] == 1.0


def test_processes_that_a_launcher_started_train_as_one(configure_detection, tmp_path, run_forked):
    """torchrun's environment, into which srun's is translated."""
    from omegaconf import OmegaConf

    config = configure_detection("engine=detectron2", "optim.epochs=2", "device=cpu").model_dump(mode="json")
    (tmp_path / "recipe.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    done = run_forked(["transfer/detection/train_net.py", "--config-file", tmp_path / "recipe.yaml"], ranks=2)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["images"] == 3
    assert done.stdout.count("wrote ") == 1, "only one rank talks"


def test_many_processes_meet_and_a_mistake_ends_them_all(configure_detection, tmp_path, run_python, detection_root):
    from omegaconf import OmegaConf

    config = configure_detection("engine=detectron2", "optim.epochs=2", "device=cpu").model_dump(mode="json")
    (tmp_path / "recipe.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    command = ["transfer/detection/train_net.py", "--config-file", tmp_path / "recipe.yaml", "--num-gpus", "2"]
    done = run_python(command)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["images"] == 3
    again = run_python(command)
    assert again.returncode == 2 and "already holds a run" in again.stderr and "Traceback" not in again.stderr


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["ema=0.9"], "ema needs engine=torchvision, not detectron2"),
        (["optim.micro_batch=1"], r"optim\.micro_batch needs engine=torchvision"),
    ],
)
def test_options_of_the_other_engine_are_refused(configure_detection, overrides, message):
    with pytest.raises(ConfigError, match=message):
        configure_detection("engine=detectron2", *overrides)


def test_any_patch_and_canvas_train_and_boxes_are_read_where_the_other_engine_reads_them(configure_detection, tmp_path):
    from detectron2.structures import Boxes

    options = ("model.patch_size=12", "data.image_size=[48,96]", "optim.epochs=1")
    networks = []
    for engine in DETECTION:
        config = configure_detection(f"engine={engine}", *options)
        networks.append(build_network(config, load_engine(config.engine), 3)[1].eval())
    ours, theirs = networks
    records = [{"image": torch.rand(3, 48, 64), "height": 48, "width": 64}]
    assert theirs.preprocess_image(records).tensor.shape[-2:] == (48, 96)
    torch.manual_seed(0)
    corners = 40 * torch.rand(40, 2)
    boxes = torch.cat([corners, corners + torch.exp(6 * torch.rand(40, 2))], dim=1)
    features = ours.backbone(torch.randn(1, 3, 48, 96))
    expected = ours.roi_heads.box_roi_pool(features, [boxes])
    levels = [features[level.name] for level in ours.backbone.box_levels]
    assert torch.equal(theirs.roi_heads.box_pooler(levels, [Boxes(boxes)]), expected)
    assert train_detector(config)["images"] == 3


# ---- detectron2's own configs and files


def test_the_registry_builds_the_backbone():
    from detectron2.config import get_cfg
    from detectron2.modeling import build_backbone

    from transfer.detection.engine_detectron2 import add_mae_core_config

    cfg = get_cfg()
    add_mae_core_config(cfg)
    cfg.MODEL.BACKBONE.NAME = "build_mae_core_backbone"
    cfg.MODEL.MAE_CORE.merge_from_list(["SIZE", "nano", "IMAGE_SIZE", 128, "CHANNELS", 32])
    backbone = build_backbone(cfg)
    shapes = backbone.output_shape()
    assert {name: shape.stride for name, shape in shapes.items()} == {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64}
    assert backbone.padding_constraints == {"size_divisibility": 64, "square_size": 128}
    assert backbone(torch.zeros(1, 3, 128, 128))["p2"].shape == (1, 32, 32, 32)


LAZY = """
from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import CosineParamScheduler
from transfer.detection.engine_detectron2 import mae_core_backbone

model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
model.backbone = L(mae_core_backbone)(size="nano", image_size=64, patch_size=16, channels=256, norm="ln", window=2)
model.roi_heads.num_classes = 3
dataloader = dict(train=L(records)(root="ROOT"), test=L(records)(root="ROOT"))
optimizer = model_zoo.get_config("common/optim.py").AdamW
lr_multiplier = L(WarmupParamScheduler)(scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.0),
                                        warmup_length=0.1, warmup_factor=0.001)
train = model_zoo.get_config("common/train.py").train
train.device, train.output_dir, train.max_iter, train.log_period = "cpu", "OUTPUT", 2, 1
train.eval_period = 0
"""
RECORDS = """
import torch
from detectron2.structures import BitMasks, Boxes, Instances

def records(root):
    while True:
        instances = Instances((64, 64))
        instances.gt_boxes, instances.gt_classes = Boxes(torch.tensor([[4.0, 4, 40, 40]])), torch.tensor([1])
        masks = torch.zeros(1, 64, 64, dtype=torch.bool)
        masks[:, 4:40, 4:40] = True
        instances.gt_masks = BitMasks(masks)
        yield [{"image": torch.randint(0, 255, (3, 64, 64)).float(), "instances": instances, "height": 64, "width": 64}]
"""


def test_a_lazy_config_is_trained(tmp_path, monkeypatch, capsys):
    from detectron2.checkpoint import DetectionCheckpointer

    (tmp_path / "lazy_records.py").write_text(RECORDS)
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / "config.py"
    text = LAZY.replace("OUTPUT", str(tmp_path / "out"))
    path.write_text("from lazy_records import records\n" + text)
    main(["--config-file", str(path), "train.max_iter=3"])
    checkpoints = sorted(p.name for p in (tmp_path / "out").glob("model_*.pth"))
    assert checkpoints == ["model_final.pth"]
    assert DetectionCheckpointer(nn.Identity(), str(tmp_path / "out")).has_checkpoint()
    with pytest.raises(SystemExit) as stop:
        main(["--config-file", str(path), "train.max_itr=3"])
    assert stop.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: command line: ") and "has no key 'train.max_itr'" in error

    written = (tmp_path / "out" / "model_final.pth").stat().st_mtime_ns
    fresh = f"train.output_dir={tmp_path / 'fresh'}"
    for arguments, message in (
        ([], "already holds a run; add --resume to continue it"),
        (["--resume", fresh], "nothing to resume"),
        (["--eval-only"], "--eval-only needs a trained detector; set train.init_checkpoint=FILE"),
        (["train.init_checkpoint=gone.pth", fresh], "train.init_checkpoint gone.pth does not exist"),
        (["train.init_checkpoint=gone.pth?heuristics=True", fresh], "quote values that are not plain words"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["--config-file", str(path), *arguments])
        assert stop.value.code == 2 and message in capsys.readouterr().err
    assert (tmp_path / "out" / "model_final.pth").stat().st_mtime_ns == written and not (tmp_path / "fresh").exists()
    main(["--config-file", str(path), "--resume", "train.max_iter=4"])
    assert (tmp_path / "out" / "last_checkpoint").read_text() == "model_final.pth"
    main(["--config-file", str(path), "--eval-only", f"train.init_checkpoint={tmp_path / 'out' / 'model_final.pth'}"])
    path.write_text("from lazy_records import records\n" + text + "\ndel train['ddp']\n")
    with pytest.raises(SystemExit) as stop:
        main(["--config-file", str(path), fresh])
    assert stop.value.code == 2 and "config.py has no train.ddp; start from" in capsys.readouterr().err


def test_a_vitdet_detector_of_the_zoo_is_scored_and_taken_further(configure_detection, tmp_path, monkeypatch):
    from transfer.detection.engine_detectron2.zoo import RENAMED

    # files of the zoo do not state their statistics, which are ImageNet's
    config = configure_detection(*VITDET, "optim.epochs=1", "model.patch_size=16", "data.statistics=imagenet")
    metrics = train_detector(config)
    state, _ = read_weights(tmp_path / "run" / "detector.safetensors")
    back = {ours: theirs for theirs, ours in RENAMED.items()}
    theirs = {}
    for name, tensor in state.items():
        start = max((ours for ours in back if name.startswith(ours)), key=len, default="")
        theirs[back.get(start, "") + name.removeprefix(start)] = tensor.numpy()
    assert {"backbone.net.pos_embed", "backbone.simfp_2.4.norm.weight", "backbone.simfp_5.1.weight"} <= set(theirs)
    assert not any(name.startswith(("backbone.vit", "backbone.pyramid")) for name in theirs)
    zoo = tmp_path / "model_final_f00.pkl"
    zoo.write_bytes(pickle.dumps({"model": theirs, "__author__": "someone", "matching_heuristics": True}, protocol=2))

    recipe = (*VITDET, f"weights={zoo}", "optim.epochs=1", "model.patch_size=16", "model.size=nano")
    scored = evaluate_detector(configure_detection(*recipe, f"output={tmp_path / 'scored'}", scratch=False))
    assert scored["bbox"] == metrics["bbox"]
    train_detector(configure_detection(*recipe, f"output={tmp_path / 'further'}", scratch=False))
    loading = json.loads((tmp_path / "further" / "loading.json").read_text())
    assert loading["share"] == 1.0 and not loading["refused"]
    with pytest.raises(UserError, match=r"does not fit this model: .*take the recipe of its size"):
        evaluate_detector(
            configure_detection(*recipe, "model.head_channels=48", f"output={tmp_path / 'no'}", scratch=False)
        )


def test_the_zoos_names_are_those_of_detectron2s_own_modules():
    theirs = their_backbone(64, window=2).state_dict()
    vit = DenseViT(
        "nano", image_size=224, relative_size=64, window=2, relative_positions="decomposed", taps=(5,), patch_size=16
    )
    ours = PyramidBackbone(vit, kind="simple", channels=64, norm=NORMS["ln"]).state_dict()
    assert {name: t.shape for name, t in our_state(theirs).items()} == {name: t.shape for name, t in ours.items()}
