"""Chains of commands: what is run again, what continues, what is kept."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from mae_core.errors import UserError
from transfer.chain import Job, Stage, executable


def fill(run: Path) -> list[str]:
    """A command that notes each of its calls in a run, and finishes it."""
    code = "import sys, pathlib; run = pathlib.Path(sys.argv[1]); run.mkdir(parents=True, exist_ok=True); "
    code += "(run / 'calls').open('a').write(' '.join(sys.argv[2:]) + ';'); (run / 'metrics.json').write_text('{}')"
    return ["python", "-c", code, str(run)]


@pytest.fixture
def stage(tmp_path) -> Stage:
    return Stage(tmp_path, parallel=2, threads=1)


def test_a_finished_run_is_used_again_and_one_that_is_gone_is_made(tmp_path, stage, capsys):
    jobs = [Job(name, fill(tmp_path / name), tmp_path / name) for name in ("one", "two")]
    stage.run(jobs)
    (tmp_path / "two" / "metrics.json").unlink()
    (tmp_path / "two" / "calls").unlink()
    stage.run(jobs)
    assert [(tmp_path / name / "calls").read_text() for name in ("one", "two")] == [";", ";"]
    assert "one: already finished, reused" in capsys.readouterr().out


def test_an_interrupted_run_continues(tmp_path, stage):
    run = tmp_path / "cut"
    checkpoint = run / "checkpoints" / "step_00000050"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(b"12")
    (checkpoint / "COMPLETE").write_text(json.dumps({"model.safetensors": 2}))
    stage.run([Job("cut", fill(run), run)])
    assert (run / "calls").read_text() == "--resume;" and checkpoint.exists()


def test_a_run_of_mmengine_continues(tmp_path, stage):
    run = tmp_path / "segmenter"
    run.mkdir()
    (run / "last_checkpoint").write_text("iter_20.pth")
    stage.run([Job("segmenter", fill(run), run)])
    assert (run / "calls").read_text() == "--resume;"


def test_what_has_no_checkpoint_is_begun_again_and_kept(tmp_path, stage):
    run = tmp_path / "begun"
    run.mkdir()
    (run / "notes.txt").write_text("mine")
    stage.run([Job("begun", fill(run), run)])
    assert (run / "calls").read_text() == ";" and not (run / "notes.txt").exists()
    assert (tmp_path / "begun.previous-1" / "notes.txt").read_text() == "mine"


def test_a_run_of_another_command_is_not_taken_for_this_one(tmp_path, stage):
    run = tmp_path / "one"
    stage.run([Job("one", fill(run), run)])
    with pytest.raises(UserError, match="was made by another command"):
        stage.run([Job("one", [*fill(run), "seed=1"], run)])
    assert (run / "calls").read_text() == ";"


def test_a_failed_command_names_its_log(tmp_path, stage):
    command = ["python", "-c", "print('out of luck'); raise SystemExit(3)"]
    with pytest.raises(UserError, match=r"one failed \(out of luck\); .*one\.txt"):
        stage.run([Job("one", command)])
    assert "out of luck" in (tmp_path / "logs" / "one.txt").read_text()


def test_a_job_waits_for_another_and_those_that_need_not_go_on(tmp_path, stage):
    """The first ends only once the second has begun: they run at once; the third finds what the first wrote."""
    note = """import os, pathlib, sys, time
pathlib.Path(sys.argv[2]).write_text(os.environ["OMP_NUM_THREADS"])
while not pathlib.Path(sys.argv[1]).exists():
    time.sleep(0.01)"""
    second, third = tmp_path / "second", tmp_path / "third"
    first = ["python", "-c", note, str(second), str(tmp_path / "first")]
    jobs = [
        Job("first", first, threads=3),
        Job("third", ["python", "-c", note, str(tmp_path / "first"), str(third)], after="first"),
        Job("second", ["python", "-c", note, str(second), str(second)]),
    ]
    stage.run(jobs)
    assert [(tmp_path / name).read_text() for name in ("first", "second", "third")] == ["3", "1", "1"]
    assert stage.seconds.keys() == {"first", "second", "third"}


def test_what_waits_for_a_job_that_failed_is_not_run(tmp_path, stage):
    failing = Job("first", ["python", "-c", "raise SystemExit('no')"])
    with pytest.raises(UserError, match="first failed"):
        stage.run([failing, Job("later", fill(tmp_path / "later"), tmp_path / "later", after="first")])
    assert not (tmp_path / "later").exists()


def test_commands_run_with_this_python():
    assert executable(["python", "x.py"]) == [sys.executable, "x.py"]
    assert executable(["mae", "knn"]) == [sys.executable, "-m", "mae_core.cli.main", "knn"]
