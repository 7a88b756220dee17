import json
import os
import shutil

import pytest
import torch
from torch import nn

from mae_core.errors import UserError
from mae_core.layout import complete_checkpoints, is_complete, resolve_weights, stated_format
from mae_core.training.checkpoints import load_checkpoint, save_checkpoint
from mae_core.weights.files import write_weights


def trained(steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for step in range(steps):
        model(torch.full((2, 4), float(step))).sum().backward()
        optimizer.step()
    return model, optimizer


def save(run, step: int, keep: int = 5):
    model, optimizer = trained(step)
    return save_checkpoint(run, step, model.state_dict(), optimizer.state_dict(), {"note": "x"}, keep=keep)


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


def test_the_marker_names_the_size_of_each_file(tmp_path):
    folder = save(tmp_path, 1)
    sizes = json.loads((folder / "COMPLETE").read_text())
    assert sizes == {name: (folder / name).stat().st_size for name in ("model.safetensors", "training.pt")}


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
