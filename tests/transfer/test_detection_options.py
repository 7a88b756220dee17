"""What the options of a detector change: pyramid and positions, averaged weights, weight decay, data that must stay."""

import json

import pytest
import torch

from mae_core.errors import UserError
from mae_core.weights.files import read_weights
from transfer.detection.engine import assemble as build_mask_rcnn
from transfer.detection.engine import trunk_of
from transfer.detection.engine_torchvision import training as core_loop
from transfer.detection.run import evaluate_detector, train_detector
from transfer.trunk import parameter_groups


@pytest.mark.parametrize("pyramid", ["simple", "single"])
def test_other_pyramids_and_positions_train_and_are_rebuilt_from_their_file(configure_detection, tmp_path, pyramid):
    config = configure_detection(
        f"model.pyramid={pyramid}",
        "model.norm=ln",
        "model.window=3",
        "model.relative_positions=decomposed",
        "model.positions=weights",
        "model.checkpointing=true",
        "optim.milestones=[0.8]",
        "optim.epochs=4",
    )
    metrics = train_detector(config)
    state, metadata = read_weights(tmp_path / "run" / "detector.safetensors")
    assert state["backbone.vit.pos_embed"].shape == (1, 28 * 28 + 1, 128)
    assert state["backbone.vit.blocks.5.attn.rel_pos_h"].shape == (15, 32)
    assert metadata["position_size"] == [224, 224] and metadata["image_size"] == [64, 64]
    again = evaluate_detector(
        configure_detection(f"weights={tmp_path / 'run'}", f"output={tmp_path / 'again'}", scratch=False)
    )
    assert again["bbox"] == metrics["bbox"]


def test_averaged_weights_are_scored_written_and_resumed(configure_detection, tmp_path, break_off_and_resume):
    options = ("ema=0.9", "optim.epochs=4", "log.checkpoint_every=2")
    train_detector(configure_detection(*options, f"output={tmp_path / 'whole'}"))
    checkpoint = tmp_path / "whole" / "checkpoints" / "step_00000004" / "model.safetensors"
    last, _ = read_weights(checkpoint)
    written, _ = read_weights(tmp_path / "whole" / "detector.safetensors")
    name = "roi_heads.box_predictor.cls_score.weight"
    assert not torch.equal(written[name], last[name])

    break_off_and_resume(configure_detection(*options, f"output={tmp_path / 'broken'}"), core_loop, "detection_losses")
    resumed, _ = read_weights(tmp_path / "broken" / "detector.safetensors")
    assert [key for key in written if not torch.equal(written[key], resumed[key])] == []


def test_a_run_is_not_resumed_on_other_images(configure_detection, tmp_path, write_coco):
    options = ("optim.epochs=4", "log.checkpoint_every=2")
    train_detector(configure_detection(*options))
    (tmp_path / "run" / "detector.safetensors").unlink()
    assert json.loads((tmp_path / "run" / "data.json").read_text())["images"] == 7
    other = write_coco(tmp_path / "other", train=5)
    with pytest.raises(UserError, match=r"was started on other images .*7 images then, 8 now"):
        train_detector(configure_detection(*options, f"data.path={other}"), resume=True)


def decays(config, **optim) -> dict[str, float]:
    model = build_mask_rcnn(trunk_of(config, None).vit, 3, config.model, config.sampling, config.test)
    groups = parameter_groups(model, weight_decay=0.1, layer_decay=0.5, **optim)
    found = {name: group["weight_decay"] for group in groups for name in group["param_names"]}
    assert set(found) == {name for name, _ in model.named_parameters()}
    assert all(len(group["params"]) == len(group["param_names"]) for group in groups)
    assert {group["lr_scale"] for group in groups} == {0.5**k for k in range(8)}
    return found


def test_what_vitdet_decays_by_accident_is_decayed_on_request_only(configure_detection):
    config = configure_detection(
        "model.pyramid=simple", "model.norm=ln", "model.window=3", "model.relative_positions=decomposed"
    )
    ours, published = decays(config), decays(config, decayed="vitdet")
    accidents = {name.removeprefix("backbone.") for name in ours if ours[name] != published[name]}
    assert "vit.blocks.0.attn.rel_pos_h" in accidents and "vit.blocks.0.mlp.fc1.bias" in accidents
    assert "pyramid.stages.0.1.weight" in accidents and "roi_heads.mask_head.0.1.weight" in accidents
    assert not any("pos_embed" in name or ".norm1." in name for name in accidents)
    assert all(published[f"backbone.{name}" if name[:3] in ("vit", "pyr") else name] == 0.1 for name in accidents)
    assert all(ours[name] == 0 for name in ours if name.endswith("bias"))
    assert set(decays(config, decayed="all").values()) == {0.1}
