"""The demo: its command line, what it refuses, and that every command it would run is one that exists."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEMO = runpy.run_path(str(ROOT / "examples" / "demo" / "run.py"))


@pytest.mark.parametrize("start", [["examples/demo/run.py"], ["-m", "transfer.demo"]])
def test_both_ways_to_start_the_demo_show_the_same_options(run_forked, start):
    result = run_forked([*start, "--help"])
    assert result.returncode == 0, result.stderr
    assert "--seeds" in result.stdout and "--out" in result.stdout


def test_a_demo_without_a_seed_is_refused(run_forked, tmp_path):
    result = run_forked(["examples/demo/run.py", "--seeds", "0", "--out", tmp_path / "demo"])
    assert result.returncode == 2 and not (tmp_path / "demo").exists()
    assert result.stderr == "error: --seeds 0: at least one run of each arm is needed, two to see a spread\n"


def test_the_two_arms_of_a_task_differ_in_their_start_alone(tmp_path):
    tasks = DEMO["digit_tasks"](tmp_path)
    assert [task.name for task in tasks] == ["classification", "detection", "segmentation"]
    for task in tasks:
        encoder, output = tmp_path / "pretrain", tmp_path / "run"
        scratch = task.command_line(encoder=None, output=output, seed=1)
        pretrained = task.command_line(encoder=encoder, output=output, seed=1)
        shared = [part for part in pretrained if part in scratch]
        assert [part for part in scratch if part not in shared] in ([], ["from_scratch=true"])
        assert str(encoder) in " ".join(part for part in pretrained if part not in shared)
