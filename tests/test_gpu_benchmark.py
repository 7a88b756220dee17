"""The benchmark for a GPU, rehearsed on the CPU: every section measures; one that fails or takes too long is named."""

from __future__ import annotations

import json
import subprocess
import time
from dataclasses import replace

import pytest

from benchmarks import gpu, gpu_sections
from benchmarks.gpu_sections import SECTIONS, Record, Section, Setting


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("gpu")


@pytest.fixture(scope="module")
def setting(out):
    return replace(Setting.of(out, "cpu", "tiny", None, None), deadline=time.monotonic() + 600)


EXPECTED = {
    "device": {"fact", "matmul"},
    "numerics": {"precision"},
    "steps": {"size"},
    "loader": {"workers"},
    "waits": {"failed"},
    "distributed": {"what", "check"},
    "dense": {"task"},
    "training": {"photos", "trained_epochs", "measure"},
}


@pytest.mark.parametrize("name", SECTIONS)
def test_a_section_measures(name, setting, monkeypatch):
    monkeypatch.delitem(gpu_sections.CONTESTANTS, "transformers", raising=False)  # its import takes most of the time
    monkeypatch.setattr(gpu_sections, "run_command", in_this_process)
    record = Record(setting.out / f"{name}.json")
    SECTIONS[name].measure(setting, record)
    assert json.loads(record.path.read_text()) == {"measured": record.entries}
    assert {next(iter(entry)) for entry in record.entries} == EXPECTED[name]
    failed = [entry for entry in record.entries if "failed" in entry and name != "waits" and "SyncBN" not in str(entry)]
    assert not failed
    if name == "numerics":
        assert [entry["loss_error"] < 1e-2 for entry in record.entries] == [True] * 5
    if name == "steps":
        assert all(0 < entry["share_of_peak"] for entry in record.entries), "the device came first"
    section = {"section": name, "state": "done", "seconds": 1.0, "measured": record.entries}
    text = gpu.page({"device": "cpu", "scale": "tiny", "sections": [section]})
    assert text.count("|---|") >= len(EXPECTED[name])


def in_this_process(setting, name, *arguments):
    """As ``run_command``, without a new interpreter."""
    from mae_core.cli.main import app

    output = setting.out / name
    app([*arguments, f"output={output}", f"device={setting.device}"], standalone_mode=False)
    return output


def test_a_section_that_fails_and_one_that_takes_too_long_are_named(tmp_path, monkeypatch, capsys):
    started = []

    def popen(command, **options):
        name = command[command.index("--section") + 1]
        started.append(name)
        (tmp_path / f"{name}.json").write_text('{"measured": [{"fact": "a|b", "value": 1.5}]}')
        script = {"device": "echo the reason; exit 3", "numerics": "sleep 60", "steps": "exit 0"}[name]
        return subprocess_popen(["sh", "-c", script], **options)

    subprocess_popen = subprocess.Popen
    monkeypatch.setattr(gpu.subprocess, "Popen", popen)
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(
        gpu, "SECTIONS", {name: Section(SECTIONS[name].measure, 1) for name in ("device", "numerics", "steps")}
    )
    gpu.main(["--out", str(tmp_path), "--minutes", "0.02", "--device", "cpu", "--scale", "tiny"])
    assert started == ["device", "numerics", "steps"]
    states = [json.loads((tmp_path / f"{name}.json").read_text())["state"] for name in started]
    assert states[0] == "failed: the reason" and states[1].startswith("stopped: its ") and states[2] == "done"
    text = (tmp_path / gpu.SUMMARY).read_text()
    assert "## device: failed: the reason" in text and "| a/b | 1.5 |" in text
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path)])
    assert "holds the results of another run; give another --out" in capsys.readouterr().err


def test_time_that_is_left_is_shared_by_what_waits():
    waiting = list(SECTIONS)
    assert gpu.limits(100.0, waiting[-1:]) == 100.0
    assert sum(gpu.limits(1.0, [name, *[n for n in waiting if n != name]]) for name in waiting) == pytest.approx(1.0)
