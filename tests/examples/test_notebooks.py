"""The notebooks run from top to bottom, each in the folder of the one before it, with small numbers in place of theirs.

Their cells are executed here and not by nbclient: a kernel is a process that imports torch anew, three times, and
nothing in the notebooks is IPython's own. The cell tagged ``parameters`` is followed by the test's, as papermill does.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
DETECTOR = ["optim.epochs=1", "optim.batch_size=10", "optim.warmup_epochs=0", "sampling.proposals=20", "device=cpu"]
SMALL: dict[str, dict[str, Any]] = {
    "1_images_to_encoder": {"scenes": 40, "epochs": 1},
    "2_encoder_to_detector": {"options": DETECTOR},
    "3_features_and_map": {"neighbours": 2},
}


def cells_of(notebook: Path) -> list[dict[str, Any]]:
    return json.loads(notebook.read_text("utf-8"))["cells"]


def run(notebook: Path, parameters: dict[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    """Execute the code cells -> their names, and the value of the last expression of each cell."""
    names: dict[str, Any] = {"__name__": "__main__"}
    shown = []
    for number, cell in enumerate(cells_of(notebook)):
        if cell["cell_type"] != "code":
            continue
        tree = ast.parse("".join(cell["source"]))
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        where = f"{notebook.name}, cell {number}"
        exec(compile(tree, where, "exec"), names)
        if last is not None:
            shown.append(eval(compile(ast.Expression(last.value), where, "eval"), names))
        if "parameters" in cell["metadata"].get("tags", []):
            assert parameters.keys() <= names.keys()
            names.update(parameters)
    return names, shown


@pytest.mark.extra("sklearn", "pycocotools")
def test_the_notebooks_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    assert [notebook.stem for notebook in NOTEBOOKS] == list(SMALL)
    monkeypatch.chdir(tmp_path)
    found = {notebook.stem: run(notebook, SMALL[notebook.stem]) for notebook in NOTEBOOKS}
    encoder, shown = found["1_images_to_encoder"]
    assert encoder["vectors"].shape[0] == 8 and any(isinstance(value, Image.Image) for value in shown)
    detector, shown = found["2_encoder_to_detector"]
    assert 0 <= detector["metrics"]["bbox"]["AP"] <= 1 and isinstance(shown[-1], Image.Image)
    features, _ = found["3_features_and_map"]
    assert 0 <= features["accuracy"] <= 1 and features["queries"].shape[0] == 10
    assert (tmp_path / "runs" / "notebook_map.html").is_file() and "top-1 " in capsys.readouterr().out


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_of_the_format_and_holds_no_output(notebook):
    content = json.loads(notebook.read_text("utf-8"))
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5) and "kernelspec" in content["metadata"]
    ids = [cell["id"] for cell in content["cells"]]
    assert len(set(ids)) == len(ids) and content["cells"][0]["cell_type"] == "markdown"
    code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert sum("parameters" in cell["metadata"].get("tags", []) for cell in code) == 1
