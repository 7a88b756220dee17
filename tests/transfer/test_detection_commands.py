"""A command reads its weights once, and its messages name options that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from mae_core.config.load import load_config
from mae_core.config.schema import leaf_names
from mae_core.errors import UserError
from mae_core.weights import files
from transfer.detection.config import DetectionConfig
from transfer.detection.plan import print_plan
from transfer.detection.predict import predict
from transfer.detection.run import evaluate_detector, train_detector

SOURCES = sorted((Path(__file__).parents[2] / "transfer" / "detection").rglob("*.py"))


@pytest.fixture
def opened(monkeypatch):
    """Paths of safetensors files, once for each time that one is opened."""
    paths: list[Path] = []
    real = files.safe_open

    def counted(path, *arguments, **options):
        paths.append(Path(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(files, "safe_open", counted)
    return paths


def test_each_command_reads_its_weights_once(configure_detection, pretrained, tmp_path, opened, detection_root):
    encoder, run = pretrained / "encoder.safetensors", tmp_path / "run"
    config = configure_detection(f"weights={pretrained}", "optim.epochs=1", scratch=False)
    print_plan(config, 1, lambda _: None)
    assert opened.count(encoder) == 1
    opened.clear()
    train_detector(config)
    assert opened.count(encoder) == 1
    detector = run / "detector.safetensors"
    opened.clear()
    evaluate_detector(configure_detection(f"weights={run}", f"output={tmp_path / 'again'}", scratch=False))
    assert opened.count(detector) == 1
    opened.clear()
    predict(run, [detection_root / "val" / "000.png"], tmp_path / "out", overrides=["device=cpu"])
    assert opened.count(detector) == 1


def sentences() -> dict[str, str]:
    """Every text of the package that is no docstring -> where it stands."""
    found = {}
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise | ast.Call):
                for part in ast.walk(node):
                    if isinstance(part, ast.Constant) and isinstance(part.value, str):
                        found[part.value] = f"{path.name}:{part.lineno}"
    return found


def test_options_that_messages_name_exist():
    options = set(leaf_names(DetectionConfig))
    sections = {name.partition(".")[0] for name in options if "." in name}
    named = {
        (word, where)
        for text, where in sentences().items()
        for word in re.findall(rf"\b(?:{'|'.join(sections)})\.[a-z_]+(?=[ =,;)]|$)", text)
        if not word.endswith((".safetensors", ".yaml", ".json"))
    }
    assert len(named) > 8
    assert not {(word, where) for word, where in named if word not in options and not word.endswith("_")}


def test_advice_about_images_without_objects_is_followed(configure_detection, write_coco, tmp_path):
    import json

    root = write_coco(tmp_path / "empty", val_seed=0)
    path = root / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "annotations": []}))
    config = configure_detection(f"data.path={root}", "optim.epochs=1")
    with pytest.raises(UserError, match=r"has an object to learn; annotate some, or set data\.filter_empty=false"):
        train_detector(config)
    assert train_detector(configure_detection(f"data.path={root}", "optim.epochs=1", "data.filter_empty=false"))


def test_a_path_that_is_no_folder_is_named_and_the_way_to_name_one_json_works(configure_detection, detection_root):
    lines: list[str] = []
    for path, message in (
        ("nowhere", "data.path=nowhere does not exist; set it to the folder"),
        ("{json}", "is a file"),
    ):
        json_file = detection_root / "annotations" / "instances_train.json"
        with pytest.raises(UserError, match=message) as error:
            print_plan(configure_detection(f"data.path={path.format(json=json_file)}"), 1, lines.append)
    options = re.findall(r"data\.[a-z_]+=\S+(?=,| |$)", str(error.value).partition("set ")[2].replace(",", ""))
    assert len(options) == 2
    options.append(f"data.train_images={detection_root / 'train'}")
    print_plan(configure_detection(f"data.path={detection_root}", *options), 1, lines.append)
    assert any("3 training images" in line and "1 validation images" in line for line in lines)


@pytest.mark.parametrize("pyramid", ["four_stage", "simple"])
def test_a_canvas_without_a_cell_of_the_coarsest_map_is_refused_with_the_least_that_has_one(
    configure_detection, pyramid
):
    def plan(size: int) -> None:
        options = [f"data.image_size={size}", "model.patch_size=16", "optim.batch_size=1", f"model.pyramid={pyramid}"]
        print_plan(configure_detection(*options), 1, lambda _: None)

    for size in (16, 32):
        with pytest.raises(UserError, match=rf"data\.image_size is {size}x{size}, .*; set data\.image_size=64 or more"):
            plan(size)
    plan(64)


def test_a_dry_run_says_whether_its_output_folder_is_taken(configure_detection, tmp_path):
    (tmp_path / "run").mkdir()
    for taken in (False, True):
        lines: list[str] = []
        print_plan(configure_detection(), 1, lines.append)
        assert any("already holds a run (config.yaml); add" in line for line in lines) == taken
        (tmp_path / "run" / "config.yaml").touch()
    with pytest.raises(UserError, match=r"is that of the data \(data\.path\); choose another"):
        data = configure_detection().data.path
        train_detector(configure_detection(f"output={data}"))
    print_plan(configure_detection(), 1, lines.append, resume=True)
    assert sum("already holds" in line for line in lines) == 1


def test_a_recipe_from_scratch_is_the_same_recipe():
    folder = Path(__file__).parents[2] / "configs" / "detection"
    for path in folder.glob("*.yaml"):
        with_weights = load_config(DetectionConfig, path, ["weights=x"]).model_dump()
        scratch = load_config(DetectionConfig, path, ["from_scratch=true"]).model_dump()
        assert {k for k in scratch if scratch[k] != with_weights[k]} == {"weights", "from_scratch"}
