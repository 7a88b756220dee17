"""The benchmark of a pre-training step runs, and writes what it found."""

from __future__ import annotations

import json

import pytest

from benchmarks.pretrain_step import main


@pytest.mark.slow
def test_the_benchmark_of_a_step_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", ".")
    out = tmp_path / "folder" / "step"
    main(["--cases", "nano32", "--rounds", "2", "--only", "timm", "--out", str(out)])
    (entry,) = json.loads(out.with_suffix(".json").read_text())["measured"]
    assert (entry["case"], entry["dtype"], entry["rounds"]) == ("nano32", "fp32", 2)
    ours, timm = entry["contestants"]["ours"], entry["contestants"]["timm"]
    assert 0 < ours["fastest"] <= ours["seconds"] <= ours["slowest"]
    assert ours["flops"] < timm["flops"], "hidden patches alone pass the decoder's last block"
    text = capsys.readouterr().out
    assert "## nano32, fp32: 2 rounds" in text and "Default against default, nano32" in text
