"""The benchmark of the loader runs, and its pixels are those of the pipeline that it is compared with."""

from __future__ import annotations

import json

import pytest

from benchmarks.loader import main


@pytest.mark.slow
def test_the_benchmark_of_the_loader_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", ".")
    out = tmp_path / "loader"
    main(["--batch", "4", "--image-size", "96", "--rounds", "1", "--out", str(out)])
    found = json.loads(out.with_suffix(".json").read_text())
    assert found.keys() == {"command", "commit", "machine", "measured"}
    (entry,) = found["measured"]
    assert not entry["failed"] and {"authors", "ours", "ours, to floats", "ours, scaled"} <= entry["contestants"].keys()
    assert entry["mean_absolute_difference"]["ours"] < 1
    assert "Faster than the authors' pipeline" in capsys.readouterr().out == out.with_suffix(".md").read_text()
