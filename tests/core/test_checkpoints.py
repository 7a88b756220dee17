import json
import os
import shutil
import zlib

import pytest
import torch
from torch import nn

from mae_core.errors import UserError
from mae_core.layout import complete_checkpoints, is_complete, resolve_weights, stated_format
from mae_core.training.checkpoints import Keep, load_checkpoint, save_checkpoint
from mae_core.weights.files import write_weights


def trained(steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for step in range(steps):
        model(torch.full((2, 4), float(step))).sum().backward()
        optimizer.step()
    return model, optimizer


def save(run, step: int, keep: int = 5, measured=None, **more):
    model, optimizer = trained(step)
    return save_checkpoint(
        run, step, model.state_dict(), optimizer.state_dict(), {"note": "x"}, keep=Keep(keep, **more), measured=measured
    )


def same_as(checkpoint, step: int) -> bool:
    model, optimizer = trained(step)
    weights = all(torch.equal(checkpoint.model[name], tensor) for name, tensor in model.state_dict().items())
    moments = optimizer.state_dict()["state"]
    state = all(
        torch.equal(checkpoint.optimizer["state"][index][name], value)
        for index, entry in moments.items()
        for name, value in entry.items()
    )
    return checkpoint.step == step and weights and state and len(moments) == 2


def test_a_checkpoint_comes_back_whole(tmp_path):
    folder = save(tmp_path, 3)
    assert folder.name == "step_00000003"
    assert sorted(p.name for p in folder.iterdir()) == ["COMPLETE", "model.safetensors", "training.pt"]
    assert same_as(load_checkpoint(tmp_path), 3)


def test_the_last_one_counts_and_old_ones_are_deleted(tmp_path):
    for step in (2, 9, 10, 100):
        save(tmp_path, step, keep=2)
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["step_00000010", "step_00000100"]
    assert same_as(load_checkpoint(tmp_path), 100)


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 2)
    assert same_as(load_checkpoint(tmp_path), 2)
    save(tmp_path, 2)
    assert same_as(load_checkpoint(tmp_path), 2)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000002"]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "COMPLETE").unlink(),
        lambda folder: (folder / "COMPLETE").write_text(""),
        lambda folder: (folder / "COMPLETE").write_text((folder / "COMPLETE").read_text()[:-3]),
        lambda folder: (folder / "COMPLETE").write_text("{}"),
        lambda folder: (folder / "COMPLETE").write_bytes(b"\xff\xfe\x80"),
        lambda folder: (folder / "COMPLETE").write_text("[1]"),
        lambda folder: (folder / "training.pt").unlink(),
        lambda folder: truncate(folder / "training.pt"),
        lambda folder: truncate(folder / "model.safetensors"),
        lambda folder: (folder / "model.safetensors").open("ab").write(b"more"),
    ],
)
def test_a_torn_checkpoint_is_passed_over(tmp_path, damage):
    save(tmp_path, 1)
    torn = save(tmp_path, 2)
    damage(torn)
    assert not is_complete(torn)
    assert same_as(load_checkpoint(tmp_path), 1)
    assert resolve_weights(tmp_path).parent.name == "step_00000001"
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000001")
    with pytest.raises(UserError, match="no complete checkpoint"):
        load_checkpoint(tmp_path)


def test_other_things_in_the_folder_do_not_disturb(tmp_path):
    save(tmp_path, 1)
    for name in ("step_old", "step_00000001.bak", "step_", ".writing_step_00000002"):
        (tmp_path / "checkpoints" / name).mkdir()
    (tmp_path / "checkpoints" / "step_00000009").write_text("a file")
    assert same_as(load_checkpoint(tmp_path), 1)
    save(tmp_path, 2)
    assert not (tmp_path / "checkpoints" / ".writing_step_00000002").exists()
    assert same_as(load_checkpoint(tmp_path), 2)


def test_torn_folders_are_not_counted_among_the_kept(tmp_path):
    save(tmp_path, 1, keep=1)
    (save(tmp_path, 2, keep=9) / "COMPLETE").unlink()
    save(tmp_path, 3, keep=2)
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["step_00000001", "step_00000003"]


class DiskFull:
    """A function that works ``allowed`` times, then finds the disk full."""

    def __init__(self, real, allowed: int) -> None:
        self.real, self.left, self.failed = real, allowed, False

    def __call__(self, *args, **kwargs):
        if self.left == 0:
            self.failed = True
            raise OSError(28, "No space left on device")
        self.left -= 1
        return self.real(*args, **kwargs)


@pytest.mark.parametrize(
    "function, allowed",
    [
        ("mae_core.weights.files.save_file", 0),
        ("torch.save", 0),
        ("os.replace", 0),
        ("os.replace", 1),
        ("os.replace", 2),
        ("os.fsync", 0),
        ("os.fsync", 2),
        ("os.fsync", 4),
    ],
)
def test_a_failure_while_saving_leaves_the_previous_checkpoint(tmp_path, monkeypatch, function, allowed):
    save(tmp_path, 1, keep=1)
    real = {"torch.save": torch.save, "os.replace": os.replace, "os.fsync": os.fsync}.get(function)
    fault = DiskFull(real, allowed)
    with monkeypatch.context() as patch:
        patch.setattr(function, fault)
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path, 2, keep=1)
    assert fault.failed
    assert same_as(load_checkpoint(tmp_path), 1)
    save(tmp_path, 3, keep=1)
    assert same_as(load_checkpoint(tmp_path), 3)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000003"]


def test_the_marker_names_the_size_and_the_checksum_of_each_file(tmp_path):
    folder = save(tmp_path, 1)
    files = {}
    for name in ("model.safetensors", "training.pt"):
        content = (folder / name).read_bytes()
        files[name] = {"bytes": len(content), "crc32": f"{zlib.crc32(content):08x}"}
    assert json.loads((folder / "COMPLETE").read_text()) == {"format": 1, "step": 1, "files": files}


def without_checksums(folder):
    """As earlier versions wrote the marker: sizes alone."""
    sizes = {name: (folder / name).stat().st_size for name in ("model.safetensors", "training.pt")}
    (folder / "COMPLETE").write_text(json.dumps(sizes))


def flip(path, place: float):
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)


def edit_state(folder, change):
    state = torch.load(folder / "training.pt", weights_only=True)
    change(state)
    torch.save(state, folder / "training.pt")
    without_checksums(folder)


def set_moment(state, value):
    state["optimizer"]["state"][0]["exp_avg"] = value


@pytest.mark.parametrize(
    "damage, reason",
    [
        *(((lambda folder, x=x: flip(folder / "training.pt", x)), "checksum") for x in (0.1, 0.5, 0.9)),
        *(((lambda folder, x=x: flip(folder / "model.safetensors", x)), "checksum") for x in (0.1, 0.9)),
        (lambda folder: (folder / "COMPLETE").unlink(), "not written to the end"),
        (lambda folder: edit_state(folder, lambda state: state.update(step=3)), "holds the state of steps 3 and 2"),
        (lambda folder: edit_state(folder, lambda state: state.pop("optimizer")), "cannot be read"),
        (lambda folder: edit_state(folder, lambda s: set_moment(s, torch.zeros(3, 5))), "another shape"),
        (lambda folder: edit_state(folder, lambda s: set_moment(s, torch.zeros(0))), "another shape"),
        (
            lambda folder: edit_state(folder, lambda state: set_moment(state, torch.zeros(1).expand(3, 4))),
            "claims more",
        ),
        (
            lambda folder: edit_state(folder, lambda state: set_moment(state, torch.full((3, 4), torch.nan))),
            "not finite",
        ),
        (lambda folder: edit_state(folder, lambda state: set_moment(state, "text")), "no tensor"),
        (lambda folder: edit_state(folder, lambda s: s["optimizer"]["state"].pop(0)["step"]), None),
        (lambda folder: edit_state(folder, lambda s: s["optimizer"]["state"][1].pop("exp_avg")), "other parameters"),
        (
            lambda folder: edit_state(folder, lambda s: s["optimizer"]["state"][0].update(step=1e9)),
            "is not its step count",
        ),
        (lambda folder: edit_state(folder, lambda s: s["optimizer"]["param_groups"].clear()), "other parameter groups"),
        (lambda folder: edit_state(folder, lambda s: s["optimizer"]["param_groups"][0].update(eps=1.0)), "eps=1.0"),
        (lambda folder: edit_state(folder, lambda s: s.update(optimizer=[1])), "another optimizer"),
        (lambda folder: (folder / "training.pt").write_bytes(b"x") and without_checksums(folder), "cannot be read"),
    ],
)
def test_a_damaged_or_edited_checkpoint_is_passed_over_with_its_reason(tmp_path, damage, reason, capsys):
    save(tmp_path, 1)
    damage(save(tmp_path, 2))
    model, optimizer = trained(0)
    optimizer_of_two_steps = load_checkpoint(tmp_path, model, optimizer)
    said = capsys.readouterr().out
    if reason is None:  # a parameter that never had a gradient has no state
        assert optimizer_of_two_steps.step == 2 and not said
        return
    assert same_as(optimizer_of_two_steps, 1)
    assert "step_00000002 is passed over" in said and reason in said


@pytest.mark.parametrize(
    ("more", "kept"),
    [
        ({}, [6, 7]),
        ({"every": 3}, [3, 6, 7]),
        ({"best": "held_out_loss"}, [2, 6, 7]),
        ({"best": "knn_top1", "every": 5}, [4, 5, 6, 7]),
        ({"best": "linear_top1"}, [6, 7]),
    ],
)
def test_checkpoints_are_kept_by_number_by_step_and_by_measure(tmp_path, more, kept):
    """The loss is lowest at step 2, and again at 5; k-NN is best at step 4; no probe was measured."""
    measured = {2: {"held_out_loss": 0.5}, 4: {"held_out_loss": 0.7, "knn_top1": 60.0}, 5: {"held_out_loss": 0.5}}
    for step in range(1, 8):
        save(tmp_path, step, 2, measured=measured.get(step), **more)
    assert [int(folder.name[-8:]) for folder in complete_checkpoints(tmp_path)] == kept
    assert same_as(load_checkpoint(tmp_path), 7)
    (tmp_path / "checkpoints" / "step_00000007" / "COMPLETE").unlink()
    assert same_as(load_checkpoint(tmp_path), 6)


def test_weights_that_are_not_finite_or_of_another_model_are_passed_over(tmp_path, capsys):
    save(tmp_path, 1)
    model, optimizer = trained(2)
    state = {**model.state_dict(), "bias": torch.full((3,), torch.nan)}
    save_checkpoint(tmp_path, 2, state, optimizer.state_dict(), {}, keep=Keep(9))
    save_checkpoint(tmp_path, 3, {"weight": torch.zeros(3, 4)}, optimizer.state_dict(), {}, keep=Keep(9))
    save_checkpoint(tmp_path, 4, {**state, "bias": torch.zeros(4)}, optimizer.state_dict(), {}, keep=Keep(9))
    assert same_as(load_checkpoint(tmp_path, model, optimizer), 1)
    said = capsys.readouterr().out
    assert "NaN or infinity in 1 tensors, such as bias" in said
    assert "other tensors than the model has, such as bias" in said and "bias in another shape" in said


def test_a_renamed_folder_is_passed_over(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2).rename(tmp_path / "checkpoints" / "step_00000009")
    assert same_as(load_checkpoint(tmp_path), 1)


def test_checkpoints_without_checksums_load_and_newer_formats_are_refused(tmp_path):
    folder = save(tmp_path, 2)
    without_checksums(folder)
    assert same_as(load_checkpoint(tmp_path, *trained(0)), 2)
    folder = save(tmp_path, 3)
    marker = json.loads((folder / "COMPLETE").read_text())
    (folder / "COMPLETE").write_text(json.dumps({**marker, "format": 99}))
    with pytest.raises(UserError, match=r"has format 99, and this version .* reads formats up to 1"):
        load_checkpoint(tmp_path)


def test_weights_of_a_damaged_checkpoint_are_not_resolved(tmp_path):
    save(tmp_path, 1)
    folder = save(tmp_path, 2)
    flip(folder / "model.safetensors", 0.9)
    assert resolve_weights(tmp_path).parent.name == "step_00000001"
    with pytest.raises(UserError, match="not complete, or damaged"):
        resolve_weights(folder)


class Malice:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_nothing_in_a_checkpoint_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path, 1)
    edit_state(save(tmp_path, 2), lambda state: state.update(more=1))
    folder = tmp_path / "checkpoints" / "step_00000002"
    torch.save({"step": 2, "optimizer": Malice()}, folder / "training.pt")
    without_checksums(folder)
    assert same_as(load_checkpoint(tmp_path), 1)
    assert not (tmp_path / "executed").exists()


def test_nothing_to_resume_is_said(tmp_path):
    with pytest.raises(UserError, match="nothing to resume"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("kind", ["detector", "pose_estimator"])
def test_a_file_that_says_it_is_another_network_is_named_by_it(tmp_path, kind):
    file = tmp_path / "run" / f"{kind}.safetensors"
    file.parent.mkdir()
    write_weights(file, {"x": torch.zeros(1)}, {"format": f"mae_core_{kind}"})
    for path in (file, file.parent):
        with pytest.raises(
            UserError, match=f"no MAE encoder in it, it is a {kind.replace('_', ' ')}; give the encoder"
        ):
            resolve_weights(path)
    write_weights(file.parent / "encoder.safetensors", {"x": torch.zeros(1)}, {"format": "mae_core"})
    assert resolve_weights(file.parent).name == "encoder.safetensors"


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 40, b"\x02" + b"\x00" * 7 + b"[]"])
def test_what_is_no_safetensors_file_says_nothing_of_itself(tmp_path, content):
    (tmp_path / "x.bin").write_bytes(content)
    assert stated_format(tmp_path / "x.bin") == ""
