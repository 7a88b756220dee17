"""What a user runs to know the machine and the toolkit: doctor, verify-resume, the benchmark of faults."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mae_core.cli.main import app
from mae_core.config.load import load_config
from mae_core.errors import UserError
from mae_core.training import doctor, resuming_proof
from mae_core.training.doctor import Finding, examine
from mae_core.training.pretrain_config import PretrainConfig
from mae_core.training.resuming_proof import Proof, differences
from mae_core.weights.files import write_weights

ROOT = Path(__file__).parents[2]


@pytest.fixture
def quick(monkeypatch):
    """Without the two parts that take seconds."""
    for name in ("_processes", "_training"):
        monkeypatch.setattr(doctor, name, lambda *args, name=name: Finding(name[1:], "ok", "tried"))


def test_doctor_says_what_there_is(tmp_path, quick):
    result = CliRunner().invoke(app, ["doctor", str(tmp_path)])
    assert result.exit_code == 0 and "everything works" in result.output
    for part in ("torch", "processor: ", "precision: fp32", "Pillow", f"GiB free in {tmp_path}", "training: tried"):
        assert part in result.output
    assert "engine torchvision" in result.output and "engine detectron2" in result.output


@pytest.mark.parametrize("free, state", [(1 << 20, "broken"), (1 << 30, "note"), (100 << 30, "ok")])
def test_doctor_knows_a_full_disk(tmp_path, quick, monkeypatch, free, state):
    usage = shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    found = {name: found for name, found, _ in examine(tmp_path)}
    assert found["disk"] == state


def test_doctor_fails_where_a_training_does(tmp_path, quick, monkeypatch):
    monkeypatch.setattr(doctor, "_training", lambda folder: torch.zeros(2) @ torch.zeros(3))
    result = CliRunner().invoke(app, ["doctor", str(tmp_path)])
    assert result.exit_code == 1 and "broken  training: RuntimeError: " in result.output
    assert "1 of these do not work" in result.output


@pytest.mark.slow
def test_doctor_trains_five_steps(tmp_path):
    assert doctor._training(tmp_path).state == "ok" and not list(tmp_path.iterdir())


def test_tensors_are_compared_bitwise(tmp_path):
    one = {"a": torch.ones(4), "b": torch.arange(3)}
    write_weights(tmp_path / "one.safetensors", one, {})
    write_weights(tmp_path / "two.safetensors", {**one, "a": torch.tensor([1.0, 1, 1, 1.01])}, {})
    assert differences(tmp_path / "one.safetensors", tmp_path / "one.safetensors") == (2, {})
    number, found = differences(tmp_path / "one.safetensors", tmp_path / "two.safetensors")
    assert number == 2 and found == {"a": pytest.approx(0.005, rel=1e-3)}
    resuming_proof._judge(Proof([], 0, 2, found), 0.01)
    with pytest.raises(UserError, match=r"1 of 2 tensors differ .* a by 0.005 of its size; a resume is not exact"):
        resuming_proof._judge(Proof([], 0, 2, found), 0.0)


@pytest.mark.slow
def test_verify_resume_kills_and_proves(tmp_path, write_images, pretrain_options, capsys):
    write_images(tmp_path / "images", 8)
    options = [*pretrain_options, f"data.path={tmp_path / 'images'}", f"output={tmp_path / 'not_used'}"]
    config = load_config(PretrainConfig, None, options)
    kept = tmp_path / "kept"
    proof = resuming_proof.verify_resume(config, steps=6, kills=1, deterministic=False, seed=0, keep=kept)
    assert len(proof.kills) == 1 and not proof.differing
    assert "bitwise equal to the uninterrupted run's" in capsys.readouterr().out
    assert not (tmp_path / "not_used").exists() and (kept / "killed" / "encoder.safetensors").is_file()


@pytest.mark.slow
def test_a_small_benchmark_of_faults_ends_as_promised(tmp_path, run_python):
    """10 mutations of each kind, and some kills; the whole table is benchmarks/results/faults.md."""
    names = ["pre-training, 2 workers", "fine-tuning"]
    command = ["benchmarks/faults.py", tmp_path / "faults", "--share", "0.02", "--tasks", *names]
    result = run_python([ROOT / command[0], *command[1:]])
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("tensors bitwise equal") == len(names)
    # a mutation that changes nothing, such as zeros over zeros, leaves the checkpoint as it was written
    assert re.search(
        r"checkpoints of a pre-training \| 10 \| (\d the one before, \d as written|10 the one before) \|",
        result.stdout,
    )
