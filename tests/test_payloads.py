"""No file that a command takes runs code: pickles, torch files of both kinds, arrays of objects and YAML tags, each
with a payload, in every place of every command that takes a file."""

from __future__ import annotations

import io
import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from typer.main import get_command
from typer.testing import CliRunner

from mae_core.atomic import atomic_path, checksum
from mae_core.cli.main import app
from mae_core.data.digits import write_digits

DIGITS = Path(__file__).parents[1] / "configs" / "segmentation" / "digits.py"
SMALL = "model.size=nano model.patch_size=8 data.image_size=32 data.workers=0 device=cpu"
TUNED = f"from_scratch=true {SMALL} data.path={{classification}}"
CASES = {
    "pretrain": [
        f"{SMALL} data.path={{bad}} output={{new}}",
        "weights={file} data.path={images} data.workers=0 output={new}",
        f"{SMALL} data.path={{images}} target.kind=tokens target.tokenizer={{file}} output={{new}}",
        f"{SMALL} data.path={{images}} target.kind=pca target.pca={{file}} output={{new}}",
        "{started} --resume",
        "{yaml} data.path={images} output={new}",
    ],
    "fit-pca": [f"{SMALL} data.path={{bad}} --out {{new}}", "{yaml}"],
    "train-tokenizer": ["model.patch_size=8 data.path={bad} output={new}", "{yaml}"],
    "finetune": [
        "weights={file} data.path={classification} output={new}",
        f"from_scratch=true {SMALL} data.path={{bad}} output={{new}}",
        f"{TUNED} output={{run}} --resume",
        "model.trunk=timm:vit_tiny_patch16_224 weights={file} data.path={classification} output={new}",
        "{yaml}",
    ],
    "linprobe": [
        "weights={file} data.path={classification} output={new}",
        "weights={run} data.path={classification} output={new}",
    ],
    "knn": ["weights={file} data.path={classification} output={new}"],
    "features": ["weights={file} data.path={images} output={new}", "weights={weights} data.path={bad} output={new}"],
    "evaluate": [
        "weights={file} data.path={classification} output={new}",
        "weights={run} data.path={classification} output={new}",
    ],
    "reconstruct": [
        "{file} {images} --out {new}.png",
        "{weights} {bad} --out {new}.png",
        "{run} {images} --out {new}.png",
    ],
    "map": ["{file} {images} --out {new}.html", "{weights} {bad} --out {new}.html"],
    "data-stats": ["{bad}"],
    "replay": ["{file}"],
    "slurm": ["{yaml}"],
    "report": ["{run} --out {new}.html"],
    "compare-runs": ["{run} {run}"],
    "shrink": ["{bad} {new}"],
    "bench-data": ["pretrain/tiny_96 data.path={bad} data.workers=0 --seconds 0.1", "{yaml}"],
    "verify-resume": ["{yaml} --steps 2 --kills 1"],
    "inspect": ["{file}"],
    "convert": ["{file} --to timm --out {new}"],
    "export": ["{file} --timm --out {new}", "{run} --timm --out {new}"],
    "compare": ["{yaml}"],
    "check images": ["{bad}", "{images} --weights {file}"],
    "check folders": ["{bad}"],
    "check coco": ["{json} {images}"],
    "check labels": ["--images {images} --label-maps {bad} --num-classes 2 --reduce-zero-label no"],
    "classify train": ["weights={file} data.path={classification} output={new}"],
    "classify evaluate": ["weights={file} data.path={classification} output={new}"],
    "classify predict": ["{file} {images} --out {new}", "{run} {images} --out {new}"],
    "classify export": ["{file} --timm --out {new}"],
    "classify check": ["{bad}"],
    "config show": ["{yaml}"],
    "detect train": [
        "weights={file} data.path={detection} output={new}",
        "model.size=nano from_scratch=true data.path={bad_coco} output={new}",
        "model.size=nano from_scratch=true data.path={detection} output={run} --resume",
        "{yaml}",
    ],
    "detect evaluate": [
        "weights={file} data.path={detection} output={new}",
        "weights={run} data.path={detection} output={new}",
    ],
    "detect predict": ["{file} {images} --out {new}", "{run} {images} --out {new}"],
    "detect export": ["{file} --out {new}.onnx"],
    "detect check": ["{json} {images}"],
    "segment train": [
        "{digits} data_root={segmentation} weights={file} output={new}",
        "{digits} data_root={segmentation} output={mmrun} --resume",
    ],
    "segment evaluate": ["{digits} data_root={segmentation} weights={file} output={new}"],
    "segment predict": ["{file} {images} --out {new}"],
    "segment export": ["{file} --to mmseg --out {new}.pth"],
    "segment check": ["--images {images} --label-maps {bad} --num-classes 2 --reduce-zero-label no"],
    "labels convert": ["{json} {new}", "{bad_coco} {new}"],
    "labels tile": ["{json} {new}", "{bad_coco} {new}"],
}
"""Command -> what it is called with; every place that takes a file, or a folder of files, with a payload in it."""
TAKE_NO_FILE = ("digits", "doctor", "config schema", "config keys", "config recipes", "weights list", "weights get")
"""``weights get`` reads what it downloaded as bytes, and compares the hash that the catalogue has."""


STILL_WORK = ("report", "compare-runs", "data-stats", "check images", "check folders", "classify check")
"""Commands that say what is wrong with a file, or leave it out, and go on; the others refuse it with exit code 2."""


class Malice:
    """Unpickled, it leaves a file behind."""

    def __init__(self, trace: Path) -> None:
        self.trace = str(trace)

    def __reduce__(self):
        return open, (self.trace, "w")


def payloads(trace: Path) -> dict[str, bytes]:
    """Each kind of file that could run code when it is read carelessly."""
    kinds: dict[str, bytes] = {"pkl": pickle.dumps({"model": Malice(trace)})}
    for name, zipped in (("pth", True), ("legacy.pth", False)):
        buffer = io.BytesIO()
        torch.save({"model": {"x": Malice(trace)}}, buffer, _use_new_zipfile_serialization=zipped)
        kinds[name] = buffer.getvalue()
    for name, write in (("npy", np.save), ("npz", np.savez)):
        buffer = io.BytesIO()
        write(buffer, np.array([Malice(trace)], dtype=object), allow_pickle=True)
        kinds[name] = buffer.getvalue()
    kinds["yaml"] = f"output: !!python/object/apply:builtins.open ['{trace}', 'w']\n".encode()
    return kinds


@pytest.fixture(scope="module")
def places(tmp_path_factory, write_images, pretrained) -> tuple[dict[str, list[Path]], Path]:
    """Name of a place -> the paths that stand there one after another; and the trace that no command leaves."""
    root = tmp_path_factory.mktemp("payloads")
    trace = root / "executed"
    kinds = payloads(trace)
    write_digits(
        root / "digits", seed=0, image_size=32, num_unlabelled=1, num_train=4, num_test=4, clutter=0.0, workers=1
    )
    write_images(root / "images", 3)
    files = root / "files"
    files.mkdir()
    for name, content in {**kinds, "safetensors": kinds["pth"], "json": kinds["pkl"]}.items():
        (files / f"x.{name}").write_bytes(content)
    for part in ("", "train/a", "train/b", "val/a", "val/b"):
        (root / "bad" / part).mkdir(parents=True, exist_ok=True)
        for suffix in ("png", "jpg", "tif", "npy", "npz", "tar"):
            (root / "bad" / part / f"1.{suffix}").write_bytes(kinds.get(suffix, kinds["pkl"]))
    bad_coco = shutil.copytree(root / "digits" / "detection", root / "bad_coco")
    for file in bad_coco.rglob("*.*"):
        file.write_bytes(kinds["pkl"])
    run = root / "run"
    for name in ("encoder", "classifier", "detector", "segmenter", "tokenizer"):
        with atomic_path(run / f"{name}.safetensors") as file:
            file.write_bytes(kinds["pth"])
    for name in ("log.jsonl", "metrics.json", "data.json", "environment.json", "loading.json", "features.npz"):
        (run / name).write_bytes(kinds["pkl"])
    (run / "config.yaml").write_bytes(kinds["yaml"])
    started = shutil.copytree(pretrained, root / "started")
    for folder in (started / "checkpoints").iterdir():
        marker = json.loads((folder / "COMPLETE").read_text())
        (folder / "training.pt").write_bytes(kinds["pth"])
        marker["files"]["training.pt"] = {"bytes": len(kinds["pth"]), "crc32": checksum(folder / "training.pt")}
        (folder / "COMPLETE").write_text(json.dumps(marker))
    config = (started / "config.yaml").read_text().replace(f"output: {pretrained}", f"output: {started}")
    (root / "started.yaml").write_text(config)
    segmentation = root / "mmrun"
    segmentation.mkdir()
    (segmentation / "iter_2.pth").write_bytes(kinds["pth"])
    (segmentation / "last_checkpoint").write_text(str(segmentation / "iter_2.pth"))
    data = {name: [root / "digits" / name] for name in ("classification", "detection", "segmentation")}
    return {
        **data,
        "file": [path for path in sorted(files.iterdir()) if path.suffix in (".pkl", ".pth", ".safetensors", ".npz")],
        "yaml": [files / "x.yaml"],
        "json": [files / "x.json"],
        **{name: [root / name] for name in ("bad", "bad_coco", "run", "images", "mmrun", "new")},
        "started": [root / "started.yaml"],
        "weights": [pretrained],
        "digits": [DIGITS],
    }, trace


def commands(group: Any, before: str = "") -> list[str]:
    """Every command below ``group``, with the words that lead to it."""
    found = []
    for name, command in group.commands.items():
        found += commands(command, f"{before}{name} ") if hasattr(command, "commands") else [before + name]
    return found


def test_every_command_is_in_one_of_the_lists():
    assert sorted([*CASES, *TAKE_NO_FILE]) == sorted(commands(get_command(app)))


@pytest.mark.parametrize(("command", "words"), [(command, words) for command in CASES for words in CASES[command]])
def test_no_file_that_a_command_takes_runs_code(places, tmp_path, command, words):
    paths, trace = places
    if command.startswith("segment"):
        pytest.importorskip("mmseg", reason="mmseg is not installed; pip install mae-transfer[segmentation]")
    place = re.search(r"\{(file|bad|bad_coco|run|mmrun|started|json|yaml)\}", words)[1]
    files = paths[place] if command in ("inspect", "replay", "pretrain") else paths[place][:1]
    for path in files:
        chosen = {name: given[0] for name, given in paths.items()} | {place: path, "new": tmp_path / "new"}
        result = CliRunner().invoke(app, [word.format(**chosen) for word in (*command.split(), *words.split())])
        assert not trace.exists(), "the payload ran"
        assert isinstance(result.exception, SystemExit | None), result.exception
        if command in STILL_WORK:
            continue
        assert result.exit_code == 2
        said = result.stdout + result.stderr
        assert any(words in said for words in (str(path), "1.jpg", "holds more than", "mae check images says")), said
        assert "weights_only" not in said, "torch's advice to load it all the same"


def test_the_payloads_would_run(tmp_path):
    """Read carelessly, each of them does."""
    readers = {
        "pkl": lambda content: pickle.loads(content),
        "pth": lambda content: torch.load(io.BytesIO(content), weights_only=False),
        "legacy.pth": lambda content: torch.load(io.BytesIO(content), weights_only=False),
        "npy": lambda content: np.load(io.BytesIO(content), allow_pickle=True),
        "npz": lambda content: np.load(io.BytesIO(content), allow_pickle=True)["arr_0"],
        "yaml": lambda content: yaml.unsafe_load(content),
    }
    kinds = payloads(tmp_path / "executed")
    assert kinds.keys() == readers.keys()
    for name, content in kinds.items():
        readers[name](content)
        (tmp_path / "executed").unlink()
