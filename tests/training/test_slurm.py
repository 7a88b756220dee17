"""Slurm: who a process is among the tasks of a step, and the batch file that starts and requeues a training."""

from __future__ import annotations

import re
import shlex
import subprocess

import pytest
from typer.testing import CliRunner

from mae_core.cli.main import app
from mae_core.config.load import load_config as REAL_LOAD
from mae_core.errors import EXIT_PREEMPTED, UserError
from mae_core.training import distributed, lock
from mae_core.training.slurm import adopt_step, first_host, translate
from tests.test_printed_commands import Parsed, check_mae, stop_after_parsing  # noqa: F401

STEP = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NODELIST": "gpu[03-05,9]",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "2(x4)",
    "SLURM_JOB_ID": "30012",
}
RANKS = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "gpu03",
    "MASTER_PORT": "15012",
}


def test_a_task_of_srun_is_a_rank(monkeypatch):
    for name in RANKS:
        monkeypatch.setenv(name, "")  # so that what is adopted is undone
        monkeypatch.delenv(name)
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    assert (distributed.announced_rank(), distributed.world_size()) == (5, 8)


@pytest.mark.parametrize(
    "others, adopted",
    [
        ({}, RANKS),
        ({"MASTER_ADDR": "head", "MASTER_PORT": "1234"}, {**RANKS, "MASTER_ADDR": "head", "MASTER_PORT": "1234"}),
        ({"RANK": "0", "WORLD_SIZE": "2"}, {}),  # torchrun, in a task of srun
        ({"SLURM_STEP_ID": None}, {}),  # the batch script itself: one process, whatever the job asked for
        ({"SLURM_STEP_NUM_TASKS": "1"}, {}),
    ],
)
def test_who_is_a_rank(others, adopted):
    environment = {name: value for name, value in {**STEP, **others}.items() if value is not None}
    before = dict(environment)
    adopt_step(environment)
    assert environment == {**before, **adopted}


def test_the_ranks_meet_on_the_first_node():
    hosts = [("one", "one"), ("a1,a2", "a1"), ("n[7]-ib,m", "n7-ib"), ("rack-2-[001-004]", "rack-2-001")]
    assert all(first_host(nodes) == first for nodes, first in hosts)
    with pytest.raises(UserError, match="SLURM_NODELIST is not set: Slurm did not start this process"):
        translate({name: "0" for name in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")})


def test_a_job_that_was_queued_again_takes_its_own_lock(tmp_path, monkeypatch):
    """On another node, where nobody can see that the process before has ended."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with monkeypatch.context() as before:
        before.setattr(lock.socket, "gethostname", lambda: "node1")
        before.setattr(lock.atexit, "register", lambda *args: None)
        lock.claim(tmp_path)
    with pytest.raises(UserError, match="on node1, and this machine cannot check"):
        lock.claim(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    lock.claim(tmp_path)
    lock.release(tmp_path)


def slurm(*words: str) -> str:
    result = CliRunner().invoke(app, ["slurm", *words])
    assert result.exit_code == 0, result.output
    return result.stdout


def requests(text: str) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", text, flags=re.MULTILINE))


RECIPES = [
    ("pretrain/base", "mae pretrain base"),
    ("table1/d_pca", "mae pretrain table1/d_pca"),
    ("finetune/base_table9", "mae finetune base_table9"),
    ("linprobe/base", "mae linprobe base"),
    ("detection/mask_rcnn_vit_base", "mae detect train mask_rcnn_vit_base"),
    ("configs/detection/mask_rcnn_vit_base.yaml", "mae detect train configs/detection/mask_rcnn_vit_base.yaml"),
    ("segmentation/own_data", "mae segment train own_data"),
]


@pytest.mark.parametrize("recipe, command", RECIPES)
def test_the_batch_file_runs_and_requeues_the_recipe(recipe, command, stop_after_parsing, monkeypatch):  # noqa: F811
    given = ["data.path=my images", "output=runs/x"]
    given += [] if "pretrain" in command else ["weights=runs/mine"]
    with monkeypatch.context() as unchanged:
        unchanged.setattr("mae_core.config.load.load_config", REAL_LOAD)
        text = slurm(recipe, *given, "--nodes", "4", "--option", "partition=gpu", "--grace", "120")
    assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).stderr == ""
    asked = requests(text)
    assert {name: asked[name] for name in ("nodes", "ntasks-per-node", "gpus-per-node", "partition", "signal")} == {
        "nodes": "4",
        "ntasks-per-node": "8",
        "gpus-per-node": "8",
        "partition": "gpu",
        "signal": "USR1@120",
    }
    assert "requeue" in asked and asked["open-mode"] == "append"
    line = re.search(r"^srun .*\\\n +(.*)$", text, flags=re.MULTILINE)
    assert line is not None and line[1].startswith(command + " ")
    words = shlex.split(line[1])
    assert words[-2:] == ["--resume", "auto"] and "data.path=my images" in words
    assert words[-3].endswith("stop_seconds=90")
    check_mae(words[1:])


def test_the_batch_file_is_queued_again_after_a_preemption_alone(tmp_path):
    """With stand-ins for Slurm's programs."""
    text = slurm("pretrain/tiny_96", "data.path=images", "output=runs/x", "--gpus", "0")
    assert "gpus-per-node" not in requests(text)
    (tmp_path / "scontrol").write_text("#!/bin/bash\necho scontrol $@\n")
    for code, queued in ((EXIT_PREEMPTED, "scontrol requeue 42\n"), (138, "scontrol requeue 42\n"), (2, ""), (0, "")):
        (tmp_path / "srun").write_text(f"#!/bin/bash\nexit {code}\n")
        for name in ("srun", "scontrol"):
            (tmp_path / name).chmod(0o755)
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "42"}
        ended = subprocess.run(["bash"], input=text, env=environment, capture_output=True, text=True)
        assert (ended.returncode, ended.stdout) == (code, queued)


@pytest.mark.parametrize(
    "words, told",
    [
        (
            ("pretrain/base", "output=x", "data.path=y", "--nodes", "3"),
            "batch size 4096 does not divide among 24 ranks",
        ),
        (("pretrain/base", "output=x", "data.pth=y"), "did you mean 'data.path'"),
        (("evaluate/imagenet",), "mae evaluate trains nothing that could be queued again"),
        (("small_data",), "write pretrain/small_data"),
        ((), "name a recipe"),
        (("pretrain/base", "output=x", "data.path=y", "--time", "1 day"), "is not a time"),
        (("pretrain/base", "output=x", "data.path=y", "--option", "x=1\n#"), "is not key=value"),
    ],
)
def test_what_could_not_run_is_refused(words, told):
    result = CliRunner().invoke(app, ["slurm", *words])
    assert result.exit_code == 2 and told in result.stderr


def test_a_recipe_of_ones_own_is_for_the_command_of_its_base(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("base: configs/finetune/base_table9.yaml\nweights: a\noutput: b\ndata: {path: c}\n")
    assert f"mae finetune {mine} log.stop_seconds=270 --resume auto" in slurm(str(mine))
    mine.write_text("output: b\n")
    result = CliRunner().invoke(app, ["slurm", str(mine)])
    assert result.exit_code == 2 and "say which command" in result.stderr
    assert f"mae pretrain {mine} data.path=c" in slurm(str(mine), "data.path=c", "--for", "pretrain")
