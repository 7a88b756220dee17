"""What happens to run folders on real machines: killed before a checkpoint, two processes at once, a full disk."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mae_core.config.load import load_config
from mae_core.errors import UserError
from mae_core.layout import complete_checkpoints
from mae_core.resuming import meaning, one_word
from mae_core.training import run as runs
from mae_core.training.lock import LOCK, claim, release
from mae_core.training.pretrain import pretrain
from mae_core.training.pretrain_config import PretrainConfig


@pytest.fixture
def options(tmp_path, write_images, pretrain_options) -> list[str]:
    write_images(tmp_path / "images", 4)
    return [*pretrain_options, f"data.path={tmp_path / 'images'}", f"output={tmp_path / 'run'}", "optim.epochs=4"]


def config(*options: str) -> PretrainConfig:
    return load_config(PretrainConfig, None, options)


# ---------------------------------------------------------------- --resume auto


@pytest.mark.parametrize(
    "words, found",
    [
        ("x --resume", "x --resume=yes"),
        ("--resume a.yaml", "--resume=yes a.yaml"),
        ("--resume auto a=b", "--resume=auto a=b"),
        ("--resume=auto", "--resume=auto"),
        ("auto -- --resume auto", "auto -- --resume auto"),
    ],
)
def test_resume_takes_auto_and_nothing_else(words, found):
    assert one_word(words.split()) == found.split()
    with pytest.raises(ValueError, match="--resume never"):
        meaning("never")


@pytest.mark.parametrize("form", [["--resume", "auto"], ["--resume=auto"]])
def test_one_command_starts_and_continues(tmp_path, options, form, monkeypatch):
    from typer.testing import CliRunner

    from mae_core.cli.main import app

    def start():
        return CliRunner().invoke(app, ["pretrain", *options, *form])

    with monkeypatch.context() as patch:  # killed before the first checkpoint
        patch.setattr(runs.Run, "checkpoint", lambda *args, **more: (_ for _ in ()).throw(KeyboardInterrupt))
        assert start().exit_code != 0
    run = tmp_path / "run"
    assert (run / "log.jsonl").is_file() and not complete_checkpoints(run)
    for resume, way in ((True, "--resume auto starts a run there"), (False, "add --resume auto to continue")):
        with pytest.raises(UserError, match=way):
            pretrain(config(*options), resume=resume)
    with pytest.raises(UserError, match="another configuration"):
        pretrain(config(*options, "seed=3"), resume="auto")
    first = start()
    assert first.exit_code == 0, first.output
    assert [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()] == [1, 2, 3, 4]
    weights = (run / "encoder.safetensors").read_bytes()
    again = start()
    assert again.exit_code == 0 and "after step 4" in again.output
    assert (run / "encoder.safetensors").read_bytes() == weights


def test_a_damaged_log_and_data_file_do_not_stop_a_resume(tmp_path, options, capsys):
    pretrain(config(*options))
    run = tmp_path / "run"
    (run / "data.json").write_text('{"images": ')
    with (run / "log.jsonl").open("ab") as log:
        log.write(b'\xff\xfe\n[1]\n{"step": "x"}\n{"st')
    pretrain(config(*options), resume=True)
    assert "data.json is missing or damaged" in capsys.readouterr().out
    assert json.loads((run / "data.json").read_text())["images"] == 4
    assert all(json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines())


# ---------------------------------------------------------------- the lock


@pytest.fixture
def other_process():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


def held_by(pid: int, folder: Path, host: str | None = None) -> None:
    from mae_core.training.lock import _start_of

    lock = {"host": host or socket.gethostname(), "pid": pid, "started": _start_of(pid)}
    (folder / LOCK).write_text(json.dumps(lock))


@pytest.mark.parametrize("resume", [False, True, "auto"])
def test_a_second_process_is_refused_while_the_first_lives(tmp_path, options, other_process, resume):
    run = tmp_path / "run"
    run.mkdir()
    if resume:
        pretrain(config(*options))
    held_by(other_process.pid, run)
    with pytest.raises(UserError, match=rf"is being written by process {other_process.pid} on {socket.gethostname()}"):
        pretrain(config(*options), resume=resume)
    assert (run / "encoder.safetensors").exists() == bool(resume)
    other_process.kill()
    other_process.wait()
    pretrain(config(*options), resume=resume)  # a dead one's lock is no lock
    assert (run / "encoder.safetensors").is_file() and not (run / LOCK).exists()


def test_a_lock_of_another_machine_says_what_to_remove(tmp_path):
    held_by(1, tmp_path, host="elsewhere")
    with pytest.raises(
        UserError, match=rf"process 1 on elsewhere, .* if it has ended, remove {tmp_path / LOCK} and start"
    ):
        claim(tmp_path)
    (tmp_path / LOCK).unlink()
    claim(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "\x00\xff"])
def test_a_lock_that_cannot_be_read_is_taken_over_and_one_of_a_reused_number_too(tmp_path, content):
    (tmp_path / LOCK).write_text(content)
    claim(tmp_path)
    claim(tmp_path)
    lock = json.loads((tmp_path / LOCK).read_text())
    (tmp_path / LOCK).write_text(json.dumps({**lock, "pid": 1, "started": "0"}))
    claim(tmp_path)
    release(tmp_path)
    assert not (tmp_path / LOCK).exists()


CLAIM = "import sys, pathlib; from mae_core.training.lock import claim; claim(pathlib.Path(sys.argv[1])); print(1)"


def test_of_two_at_once_one_wins(tmp_path):
    command, pipe = [sys.executable, "-c", f"{CLAIM}; sys.stdin.read()", str(tmp_path)], subprocess.PIPE
    pair = [subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) for _ in range(2)]
    deadline = time.monotonic() + 60
    while all(process.poll() is None for process in pair) and time.monotonic() < deadline:
        time.sleep(0.01)
    results = [process.communicate(timeout=60) for process in pair]  # ends the standard input that the winner reads
    assert sorted(process.returncode for process in pair) == [0, 1]
    assert sum("is being written by process" in errors for _, errors in results) == 1


# ---------------------------------------------------------------- the disk


def small_disk(folder: Path, size: str):
    folder.mkdir()
    if (
        shutil.which("mount") is None
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("no file system may be mounted here")


@pytest.mark.parametrize("size", ["9m", "34m"])
def test_a_full_disk_ends_in_one_sentence_and_leaves_what_was_saved(tmp_path, options, size, run_forked):
    disk = tmp_path / "disk"
    small_disk(disk, size)
    try:
        options = [*options, f"output={disk / 'run'}", "log.checkpoint_every=1", "log.keep_checkpoints=9"]
        result = run_forked(["-m", "mae_core.cli.main", "pretrain", *options])
        assert result.returncode == 2, result.stderr
        assert f"error: cannot write to {disk / 'run'}: No space left on device; " in result.stderr
        assert "Traceback" not in result.stderr
        saved = complete_checkpoints(disk / "run")
        assert bool(saved) == (size != "9m")
        assert not list((disk / "run").rglob(".*"))
        if saved:
            bigger = ["mount", "-o", "remount,size=200m", disk]
            subprocess.run(bigger, check=True)
            pretrain(config(*options), resume=True)
            assert (disk / "run" / "encoder.safetensors").is_file()
    finally:
        subprocess.run(["umount", "-l", disk], check=False)


def test_a_folder_that_is_deleted_meanwhile_ends_in_one_sentence(tmp_path, options, monkeypatch):
    real = runs.Run.checkpoint

    def delete_after(self, step, *args, **more):
        real(self, step, *args, **more)
        if step == 2:
            self.saving.join()
            shutil.rmtree(self.folder)

    monkeypatch.setattr(runs.Run, "checkpoint", delete_after)
    with pytest.raises(UserError, match=r"cannot write to .*run: No such file or directory; "):
        pretrain(config(*options, "log.checkpoint_every=1"))


@pytest.mark.parametrize("number", [13, 28, 30, 122])
def test_what_the_disk_refuses_is_said(tmp_path, options, monkeypatch, number):
    def refuse(*args, **more):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("mae_core.training.checkpoints.write_text", refuse)
    with pytest.raises(
        UserError, match=f"cannot write to .*: {os.strerror(number)}; .* earlier checkpoints are complete"
    ):
        pretrain(config(*options))
