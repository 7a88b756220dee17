"""What runs have recorded: read from any run directory, compared by mae compare-runs, shown by mae report."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from mae_core.cli.configuring import published
from mae_core.cli.main import app
from mae_core.errors import UserError
from mae_core.layout import DATA, ENCODER, LOG
from mae_core.training.recorded import read_recorded
from mae_core.weights.files import read_weights, write_weights
from transfer.report.runs import MOST_POINTS, short_names, thinned


def mae(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def copy(pretrained, tmp_path) -> Path:
    shutil.copytree(pretrained, tmp_path / "copy")
    return tmp_path / "copy"


def change_log(run: Path, step: int, **values: object) -> None:
    lines = [json.loads(line) for line in (run / LOG).read_text().splitlines()]
    lines = [{**line, **values} if line.get("step") == step else line for line in lines]
    (run / LOG).write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_run_and_its_copy_are_equal(pretrained, copy):
    (copy / "config.yaml").write_text(re.sub(r"output: .*", "output: elsewhere", (copy / "config.yaml").read_text()))
    change_log(copy, 2, time=0.0, images_per_second=1.0)
    result = mae("compare-runs", pretrained, copy)
    assert result.exit_code == 0 and "DIFFERS" not in result.output
    assert "same  loss: equal in all 4 logged steps until 4" in result.output
    assert re.search(r"encoder.safetensors: all \d+ tensors are equal", result.output)


def change_config(run: Path) -> None:
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(re.sub(r"base_lr: \S+", "base_lr: 0.5", text))


def change_data(run: Path) -> None:
    (run / DATA).write_text(json.dumps({**json.loads((run / DATA).read_text()), "images": 9}))


def change_weights(run: Path) -> None:
    state, metadata = read_weights(run / ENCODER)
    state["cls_token"] = state["cls_token"] + 1.0
    (run / ENCODER).unlink()
    write_weights(run / ENCODER, state, metadata)


@pytest.mark.parametrize(
    "change, told",
    [
        (change_config, r"config: optim\.base_lr: \S+ -> 0\.5"),
        (change_data, r"data: 8 -> 9 images"),
        (lambda run: change_log(run, 3, loss=7.5), r"loss: equal until step 3, where loss is \S+ -> 7\.5"),
        (change_weights, r"encoder\.safetensors: 1 of \d+ tensors differ, the first cls_token by"),
        (
            lambda run: (run / LOG).write_text((run / LOG).read_text()[:-20]),
            r"loss: .* 3; the logs end at 4 -> 3",
        ),
    ],
)
def test_the_first_difference_is_named(pretrained, copy, change, told):
    change(copy)
    result = mae("compare-runs", pretrained, copy)
    assert result.exit_code == 1 and result.output.count("DIFFERS") == 1
    assert re.search(rf"DIFFERS  {told}", result.output), result.output


def test_a_difference_may_be_small_enough(pretrained, copy):
    loss = read_recorded(pretrained).series("loss")[-1][1]
    change_log(copy, 4, loss=loss * (1 + 1e-6))
    assert mae("compare-runs", pretrained, copy).exit_code == 1
    assert mae("compare-runs", pretrained, copy, "--tolerance", "1e-5").exit_code == 0


@pytest.mark.parametrize("command", ["compare-runs", "report"])
def test_what_is_no_run_is_refused(pretrained, tmp_path, command):
    for place, told in ((tmp_path, "holds no run"), (tmp_path / "none", "is not a run directory")):
        result = mae(command, pretrained, place, *(["--out", tmp_path / "x.html"] if command == "report" else []))
        assert result.exit_code == 2 and told in result.stderr


def test_an_engines_python_config_is_read_and_not_run(tmp_path):
    code = "import os\nbatch = 4\nwrong = os.mkdir('made')\nmodel = dict(a=[dict(b=-1)], c={'d': None})\nf'{batch}'\n"
    (tmp_path / "config.py").write_text(code)
    (tmp_path / LOG).write_text('{"step": 1, "loss": 2.0}\nno json\n[1]\n{"step": 2, "loss": NaN}\n')
    run = read_recorded(tmp_path)
    assert run.config == {"batch": 4, "model.a": [{"b": -1}], "model.c.d": None}
    assert not (tmp_path / "made").exists() and not Path("made").exists()
    assert run.series("loss") == [(1, 2.0)] and run.last_step == 2


def test_the_page_holds_all_of_the_runs(pretrained, copy, tmp_path):
    with (copy / LOG).open("a") as log:
        log.write(json.dumps({"event": "unreadable", "path": "<b>.png", "reason": "torn"}) + "\n")
    change_config(copy)
    page = tmp_path / "runs.html"
    result = mae("report", pretrained, copy, "--out", page)
    assert result.exit_code == 0 and result.output == f"wrote {page}\n"
    html = page.read_text()
    for text in ("Training loss", "Norm of the gradient", "optim.base_lr", "unreadable", "torch", "not finished"):
        assert (text in html) == (text != "not finished"), text
    assert "&lt;b&gt;.png" in html and "<b>.png" not in html
    assert html.count("data:image/png;base64") >= 3 and "<script" not in html
    assert not re.findall(r'(?:src|href)="(?!data:)', html), "nothing is fetched"
    assert len(re.findall(r'class="series"', html)) >= 8
    again = mae("report", pretrained, "--out", page)
    assert again.exit_code == 2 and "choose another file with --out" in again.stderr


def test_options_are_compared_with_the_papers(pretrained):
    run = read_recorded(pretrained)
    command, paper = published(run.config)
    assert command == "pretrain" and paper["optim.base_lr"] == 1.5e-4 and paper["model.size"] == "base"
    assert published({**run.config, "model.size": "large"})[1]["model.size"] == "large"
    assert published({"model": 1, "optim_wrapper.type": 2}) == ("segment", {})
    assert published({}) == ("unknown", {})


def test_long_logs_are_thinned_and_runs_told_apart(tmp_path):
    points = [(float(step), 0.0) for step in range(10 * MOST_POINTS + 3)]
    few = thinned(points)
    assert len(few) <= MOST_POINTS + 1 and few[0] == points[0] and few[-1] == points[-1]
    assert thinned(points[:5]) == points[:5]
    assert short_names([Path("/a/x/run"), Path("/a/y/run"), Path("/b")]) == ["x/run", "y/run", "/b"]


def test_damaged_files_count_as_missing(copy):
    (copy / DATA).write_text("{")
    (copy / "pictures" / "step_9.png").write_bytes(b"torn")
    assert read_recorded(copy).data == {}
    with pytest.raises(UserError, match="is not YAML"):
        (copy / "config.yaml").write_text("a: [")
        read_recorded(copy)
    assert torch.is_tensor(read_weights(copy / ENCODER)[0]["cls_token"])
