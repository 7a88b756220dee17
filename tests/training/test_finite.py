"""Losses, gradients and pixels that are not finite, injected: the step is skipped, its cause is named, and nothing
with NaN is ever written."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mae_core.config.load import load_config
from mae_core.data.config import FinetuneData, PretrainData
from mae_core.data.images import ImageFiles, Statistics
from mae_core.data.labelled import LabelledPaths, TestImages
from mae_core.data.unlabelled import CentreViews
from mae_core.errors import UserError
from mae_core.layout import complete_checkpoints
from mae_core.masking import MASKERS, SampleMasks
from mae_core.patches import PatchGrid
from mae_core.training import deciding
from mae_core.training import pretrain as pretraining
from mae_core.training.finite import SkippedSteps, bad_samples, gradient_norm, non_finite, refuse_non_finite
from mae_core.training.pretrain import pretrain
from mae_core.training.pretrain_config import PretrainConfig
from mae_core.training.replay import replay
from mae_core.weights.files import read_weights
from transfer.detection.annotations import Category
from transfer.detection.coco import CocoImage, CocoSet
from transfer.detection.config import DetectionData
from transfer.detection.samples import TrainingSamples, WholeImages


def entries(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.fixture
def options(tmp_path, write_images, pretrain_options) -> list[str]:
    write_images(tmp_path / "images", 8)
    return [*pretrain_options, f"data.path={tmp_path / 'images'}", f"output={tmp_path / 'run'}", "optim.epochs=12"]


def config(*options: str) -> PretrainConfig:
    return load_config(PretrainConfig, None, options)


@pytest.fixture
def spoil(monkeypatch):
    """(what: loss or gradient, steps, when) -> pre-training's losses, spoiled in the given steps."""

    def install(what: str, steps: set[int], when=lambda: True) -> None:
        real, count = pretraining.pretrain_loss, [0]

        def spoiled(model: nn.Module, batch) -> dict[str, Tensor]:
            losses = real(model, batch)
            count[0] += 1
            if count[0] in steps and when():
                if what == "loss":
                    return {"loss": losses["loss"] * float("nan")}
                losses["loss"].register_hook(lambda gradient: gradient * float("nan"))
            return losses

        monkeypatch.setattr(pretraining, "pretrain_loss", spoiled)

    return install


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_is_skipped_and_recorded_and_every_file_is_finite(tmp_path, options, spoil, what):
    spoil(what, {7})
    pretrain(
        config(*options, "log.checkpoint_every=1", "log.keep_checkpoints=3", "optim.clip_grad=1", "optim.epochs=4")
    )
    run = tmp_path / "run"
    (event,) = [entry for entry in entries(run) if "event" in entry]
    assert event["event"] == f"non-finite {what}, step skipped" and event["step"] == 7
    assert event["numbers"]["gradient_norm"] == "nan" and "files" not in event
    states = [read_weights(folder / "model.safetensors")[0] for folder in complete_checkpoints(run)]
    assert len(states) == 3 and not any(map(non_finite, states))
    for name, tensor in states[0].items():  # after step 6, and after step 7, which was not taken
        assert torch.equal(tensor, states[1][name])
    assert not non_finite(read_weights(run / "encoder.safetensors")[0])


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_steps_decided_on_the_device_are_those_decided_on_the_host(tmp_path, options, spoil, monkeypatch, what):
    found = []
    for name, devices in (("host", ()), ("device", ("cpu",))):
        monkeypatch.setattr(deciding, "DEFERRED_ON", devices)
        with pytest.MonkeyPatch.context() as patch:
            real, count = pretraining.pretrain_loss, [0]

            def spoiled(model: nn.Module, batch, real=real, count=count) -> dict[str, Tensor]:
                losses = real(model, batch)
                count[0] += 1
                if count[0] in (3, 8):  # the last of all too
                    factor = float("nan")
                    if what == "loss":
                        return {"loss": losses["loss"] * factor}
                    losses["loss"].register_hook(lambda gradient: gradient * factor)
                return losses

            patch.setattr(pretraining, "pretrain_loss", spoiled)
            output = f"output={tmp_path / name}"
            pretrain(config(*options, output, "optim.epochs=4", "optim.clip_grad=1", "log.checkpoint_every=3"))
        log = [
            {k: v for k, v in e.items() if k in ("event", "step", "numbers", "loss")} for e in entries(tmp_path / name)
        ]
        weights = (tmp_path / name / "encoder.safetensors").read_bytes()
        found.append((weights, [e for e in log if "event" in e], [e for e in log if "loss" in e]))
    (one, events, losses), (other, same_events, same_losses) = found
    assert one == other and [event["step"] for event in events] == [3, 8] and events == same_events
    assert [str(entry) for entry in losses] == [str(entry) for entry in same_losses]


def test_too_many_steps_decided_on_the_device_end_the_run(tmp_path, options, monkeypatch):
    monkeypatch.setattr(deciding, "DEFERRED_ON", ("cpu",))
    with pytest.raises(UserError, match=r"not finite for 10 steps.*lower optim.base_lr"):
        pretrain(config(*options, "optim.base_lr=1e30", "log.checkpoint_every=2"))
    assert not (tmp_path / "run" / "encoder.safetensors").exists()


def test_a_rate_that_is_too_high_ends_without_a_file_that_is_not_finite(tmp_path, options):
    with pytest.raises(UserError, match=r"not finite for 10 steps.*lower optim.base_lr"):
        pretrain(config(*options, "optim.base_lr=1e30", "log.checkpoint_every=2"))
    assert not (tmp_path / "run" / "encoder.safetensors").exists()
    for folder in complete_checkpoints(tmp_path / "run"):
        assert not non_finite(read_weights(folder / "model.safetensors")[0])


def test_the_advice_to_resume_with_a_lower_rate_works_and_a_higher_one_is_refused(tmp_path, options, spoil):
    rate = [1e-3]
    spoil("gradient", set(range(9, 50)), when=lambda: rate[0] == 1e-3)
    options = [*options, "log.checkpoint_every=4"]
    with pytest.raises(
        UserError, match=r"gradient was not finite for 10 steps in a row, up to step 18; continue .* --resume"
    ):
        pretrain(config(*options, "optim.base_lr=1e-3"))
    with pytest.raises(UserError, match=r"optim.base_lr: 0.001 -> 0.002.* may change, and optim.base_lr.* be lowered"):
        pretrain(config(*options, "optim.base_lr=2e-3"), resume=True)
    rate[0] = 1e-4
    pretrain(config(*options, "optim.base_lr=1e-4", "optim.clip_grad=1"), resume=True)
    assert (tmp_path / "run" / "encoder.safetensors").is_file()
    assert max(entry["lr"] for entry in entries(tmp_path / "run")[-8:] if "lr" in entry) < 1e-4
    assert "base_lr: 0.0001" in (tmp_path / "run" / "config.yaml").read_text()


@pytest.mark.parametrize("what", ["forward", "backward"])
def test_a_dump_names_the_module_and_is_replayed(tmp_path, options, monkeypatch, capsys, what):
    """A block that makes NaN in every step, as one would whose weights are broken."""
    from mae_core.models import mae as models

    real, bad = models.MaskedAutoencoder.forward, [False]

    def forward(self, *args, **more):
        layer = self.encoder.blocks[3].mlp.fc1
        hook = layer.register_forward_hook(spoil, prepend=True) if bad[0] else None
        try:
            return real(self, *args, **more)
        finally:
            if hook is not None:
                hook.remove()

    def spoil(module, inputs, output):
        if what == "forward":
            return output * float("nan")
        output.register_hook(lambda gradient: gradient * float("inf"))
        return None

    monkeypatch.setattr(models.MaskedAutoencoder, "forward", forward)
    bad[0], run = True, tmp_path / "run"
    place = re.escape(str(run / "events" / "nonfinite_00000010.pt"))
    with pytest.raises(UserError, match=rf"encoder.blocks.3.mlp.fc1 is the first that is not.*; mae replay {place}"):
        pretrain(config(*options))
    dump = run / "events" / "nonfinite_00000010.pt"
    content = torch.load(dump, weights_only=True)
    assert content["ranks"][0]["files"] and len(content["ranks"][0]["places"]) == 4
    assert complete_checkpoints(run)[-1].name == "step_00000010"
    assert replay(dump) and "as in the run" in capsys.readouterr().out
    bad[0] = False
    assert not replay(dump) and "all outputs and gradients of modules are finite" in capsys.readouterr().out
    for content in (b"", b"PK", (run / "config.yaml").read_bytes()):
        (tmp_path / "other.pt").write_bytes(content)
        with pytest.raises(UserError, match="is no dump of a step"):
            replay(tmp_path / "other.pt")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="is gone, with whose weights"):
        replay(dump)


def test_an_image_whose_pixels_are_too_large_is_named(tmp_path, pretrain_options, capsys):
    """What the decoder lets through and the statistics of the set make too large."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for number in range(8):
        pixels = rng.random((40, 40, 3), dtype=np.float32)
        np.save(tmp_path / "images" / f"{number}.npy", pixels * (1e17 if number == 5 else 1))
    options = [*pretrain_options, f"data.path={tmp_path / 'images'}", f"output={tmp_path / 'run'}", "optim.epochs=24"]
    options += ["data.mean=[0.5,0.5,0.5]", "data.std=[1e-3,1e-3,1e-3]", "data.crop_scale=[0.9,1]"]
    with pytest.raises(UserError, match=r"remove or correct the images whose pixels are the cause: 5.npy"):
        pretrain(config(*options, "target.kind=pixels", "log.every=100"))
    named = [entry.get("files") for entry in entries(tmp_path / "run") if "event" in entry]
    assert named and all(files == ["5.npy"] for files in named)
    assert "the step is skipped; pixels that are not finite, or too large, in 5.npy" in capsys.readouterr().out


@pytest.mark.parametrize("value", [1e17, -1e13])
@pytest.mark.parametrize("reader", ["evaluation", "centre", "detection", "detection training"])
def test_what_no_training_step_sees_is_named_too(tmp_path, reader, value):
    """Values that a decoder lets through and mean and std of the run make too large, in every reader."""
    path = tmp_path / "big.npy"
    np.save(path, np.full((24, 24, 3), value, np.float32))
    usual = Statistics((0.5,) * 3, (1e-3,) * 3)
    if reader == "evaluation":
        data = FinetuneData(path=tmp_path, image_size=16)
        sample = TestImages(LabelledPaths([path], [0], ["a"]), data, (16, 16), usual)[0]
    elif reader == "centre":
        data = PretrainData(path=tmp_path, image_size=16, mean=usual.mean, std=usual.std)
        masks = SampleMasks(MASKERS["random"](0.75), PatchGrid(2, 2, 8))
        sample = CentreViews(ImageFiles([path], 3), data, 0, masks)[0]
    else:
        coco = CocoSet(path, (CocoImage(1, path, 24, 24, ()),), (Category(1, "a"),))
        data = DetectionData(path=tmp_path, image_size=32)
        whole = reader == "detection"
        sample = WholeImages(coco, data, usual)[0] if whole else TrainingSamples(coco, data, usual, 0)[(0, 0)]
    assert sample.pixels is None
    assert (
        "big.npy" in sample.unreadable[0].path
        and "after standardising with mean and std" in sample.unreadable[0].reason
    )


def test_a_quarter_of_the_steps_is_the_most():
    skipped = SkippedSteps(lambda entry: None, lambda text: None)
    for step in range(1, 61):
        skipped.skip(step, 1.0, float("inf")) if step % 4 == 0 else skipped.taken()
    with pytest.raises(UserError, match="16 of 61 steps"):
        skipped.skip(61, 1.0, float("inf"))


def test_running_statistics_are_as_before_a_skipped_step(tmp_path):
    from tests.training.test_loop import Numbers, batches_of, run_in, train

    model = nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2))
    train(run_in(tmp_path / "run"), [*batches_of(2, 5), Numbers(torch.full((5,), float("nan")))], model)
    assert not non_finite(model.state_dict()) and model[1].num_batches_tracked == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_the_norm_is_finite_where_all_gradients_can_be_squared(value):
    one, other, frozen = (nn.Parameter(torch.zeros(3)) for _ in range(3))
    one.grad, other.grad = torch.tensor([3.0, 0, 0]), torch.tensor([0, 4.0, 0])
    assert float(gradient_norm([one, other, frozen])) == pytest.approx(5.0)
    other.grad[2] = value
    assert not gradient_norm([one, other, frozen]).isfinite()


def test_weights_that_are_not_finite_are_refused_by_name():
    state = {"a": torch.ones(2), "b": torch.tensor([1.0, float("inf")]), "count": torch.tensor(3)}
    with pytest.raises(UserError, match=r"1 of 3 tensors .* such as b; encoder.safetensors is not written"):
        refuse_non_finite(state, "encoder.safetensors")
    assert bad_samples(torch.tensor([[1.0], [float("nan")], [1e12], [-5]])) == [1, 2]
