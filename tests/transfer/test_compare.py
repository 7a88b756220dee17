"""``mae compare``: what a specification may say, what is trained, what is chosen on which labels, and the report."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

import mae_core
from mae_core.config.load import load_config
from mae_core.errors import UserError
from transfer import chain
from transfer.compare import run as comparing
from transfer.compare.config import CompareConfig
from transfer.compare.encoders import encoders_of
from transfer.compare.kinds import KINDS
from transfer.compare.labelled_sets import ClassFolders, Coco
from transfer.compare.report import Cell, EncoderRow, Results, headline, rivals, write_results
from transfer.compare.trainings import Choice, Task
from transfer.report import Picture

SMALL = ["model.size=nano", "model.patch_size=8", "data.image_size=32"]
QUICK = ["data.workers=0", "device=cpu", "optim.batch_size=4"]


@pytest.fixture
def classes(tmp_path, write_classes) -> Path:
    return write_classes(tmp_path / "classes", train=8, val=2)


@pytest.fixture
def spec(tmp_path, classes, pretrained):
    """(changes of the specification) -> the configuration that its file says."""

    def write(**changes) -> CompareConfig:
        content = {
            "output": str(tmp_path / "out"),
            "encoders": [{"name": "own", "weights": str(pretrained)}, {"name": "random", "scratch": True}],
            "tasks": [
                {"kind": "knn", "data": str(classes), "options": ["data.workers=0"]},
                {"kind": "finetune", "data": str(classes), "options": ["data.image_size=32", *QUICK]},
            ],
            "seeds": 2,
            "steps": 2,
            "rates": [1, 2],
            "layer_decays": [1],
            **changes,
        }
        path = tmp_path / "spec.yaml"
        path.write_text(yaml.safe_dump(content))
        return load_config(CompareConfig, path)

    return write


@pytest.fixture
def run_here(monkeypatch):
    """Stands in for the processes: a run of a command is its metrics, best at a rate of 0.004; one of a rate of 1 or
    more is no longer finite. Gives the commands, in words."""
    commands: list[list[str]] = []

    def execute(command, place, surroundings, read) -> int:
        commands.append([*command])
        options = dict(word.split("=", 1) for word in command if "=" in word)
        rate, run = float(options.get("optim.base_lr", 0)), Path(options["output"])
        if rate >= 1:
            read("error: the loss is not finite\n")
            return 2
        run.mkdir(parents=True)
        score = 50.0 - 1000 * abs(rate - 0.004)
        (run / "metrics.json").write_text(json.dumps({"top1": {"20": 44.0} if command[1] == "knn" else score}))
        (run / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
        return 0

    cost = {"parameters": 10, "flops": 10, "images_per_second": 1.0, "image_size": [32, 32]}
    monkeypatch.setattr(chain, "execute", execute)
    monkeypatch.setattr(comparing, "cost_of", lambda *given: cost)
    return commands


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"taskz": []}, r"unknown key 'taskz'; did you mean 'tasks"),
        (
            {"encoders": [{"name": "a", "weight": "x"}]},
            r"unknown key 'encoders.weight'; did you mean 'encoders.weights'",
        ),
        ({"tasks": [{"kind": "fintune", "data": "x"}]}, r"unknown name 'fintune'; did you mean 'finetune'\?"),
        ({"encoders": [{"name": "a", "scratch": True}, {"name": "A", "scratch": True}]}, "two encoders are called 'A'"),
        ({"tasks": [{"kind": "knn", "data": "x"}, {"kind": "knn", "data": "y"}]}, "two tasks are called 'knn'"),
        ({"rates": []}, "rates is empty; give at least one entry"),
        ({"layer_decays": []}, "layer_decays is empty"),
        ({"encoders": []}, "encoders is empty"),
        ({"encoders": [{"name": "a"}]}, "give one of weights, command and scratch: true for encoder 'a', not none"),
        (
            {"encoders": [{"name": "a", "command": "rm -r x"}]},
            "write a command that begins with mae pretrain or",
        ),
        ({"encoders": [{"name": "a", "command": "mae pretrain x output=y"}]}, "leave output= and --resume out"),
        (
            {"tasks": [{"kind": "knn", "data": "x", "encoders": ["b"]}]},
            "names encoder 'b'; the encoders are own, r",
        ),
        ({"rates": [0]}, "greater than 0"),
    ],
)
def test_what_a_specification_cannot_say(spec, changes, message):
    with pytest.raises(UserError, match=message):
        spec(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"encoders": [{"name": "a", "weights": "nowhere.pth"}]},
            "encoder 'a': weights file nowhere.pth does not",
        ),
        ({"tasks": [{"kind": "knn", "data": "nowhere"}]}, r"task 'knn': .*nowhere has no train/ folder"),
        (
            {"tasks": [{"kind": "detection", "data": "nowhere"}]},
            "task 'detection': .*_train.json does not exist",
        ),
        (
            {"encoders": [{"name": "a", "command": "mae pretrain optim.epoch=2"}]},
            "encoder 'a': .*key 'optim.epoch'",
        ),
        ({"encoders": [{"name": "a", "command": "mae finetune from_scratch=true"}]}, "add model.pooling=cls"),
        (
            {"encoders": [{"name": "a", "scratch": True}]},
            "encoder 'a' is read frozen, and no encoder with w",
        ),
    ],
)
def test_wrong_inputs_are_said_before_any_work(spec, run_here, changes, message, tmp_path):
    with pytest.raises(UserError, match=message) as said:
        comparing.compare(spec(**changes))
    assert not run_here and not (tmp_path / "out").exists() and "\n" not in str(said.value)


def test_options_that_do_not_validate_name_their_task(spec, classes, run_here):
    task = {"kind": "finetune", "data": str(classes), "options": ["optim.base_rl=1"]}
    with pytest.raises(
        UserError, match=r"task 'finetune': .*unknown key 'optim.base_rl'; did you mean 'optim.base_lr'"
    ):
        comparing.compare(spec(tasks=[task]))
    assert not run_here


def test_the_plan_counts_trainings_and_writes_nothing(spec, run_here, tmp_path, capsys):
    assert comparing.compare(spec(), dry_run=True) is None
    said = capsys.readouterr().out
    assert "knn (knn, nothing is trained; 24 labelled training images): 0 trainings for the grid and 2 to score" in said
    assert "finetune (finetune, 2 steps each; 24 labelled training images): 4 trainings for the grid and 4 to" in said
    assert "trainings left: 10; time: not known yet" in said and "dry run: nothing was written" in said
    assert not run_here and not (tmp_path / "out").exists()


def test_a_comparison_is_run_and_continued(spec, run_here, tmp_path, capsys, classes):
    path = comparing.compare(spec(), command="mae compare spec.yaml")
    assert path == tmp_path / "out" / "report.html"
    assert len(run_here) == 2 + 4 + 4
    grid = [words for words in run_here if "_held_out_6" in " ".join(words)]
    assert len(grid) == 4 and all(f"data.path={classes}" in words for words in run_here if words not in grid)
    rates = {word for words in grid for word in words if "base_lr" in word}
    assert rates == {"optim.base_lr=0.002", "optim.base_lr=0.004"}
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    shown = [(row["encoder"], row["task"], row["scores"]) for row in found["results"]]
    assert shown[:2] == [("own", "knn", [44.0]), ("random", "knn", [44.0])]  # nothing of it is random
    assert shown[2:] == [("own", "finetune", [50.0, 50.0]), ("random", "finetune", [50.0, 50.0])]
    assert found["results"][2]["choice"] == {"rate": 2.0, "decay": 1.0}
    assert "Licence of the weights" in path.read_text() and "| own |" in (tmp_path / "out" / "report.md").read_text()
    assert not [run for run in (tmp_path / "out" / "runs").iterdir() if "rate" in run.name], "the grid's runs stay"

    comparing.compare(spec(seeds=3))
    assert len(run_here) == 10 + 2  # the third seed of each; nothing again
    capsys.readouterr()
    comparing.compare(spec(seeds=3, steps=3), dry_run=True)
    said = capsys.readouterr().out
    assert "trainings left: 10; time: not known yet" in said and "6 to score, 10 of them left" in said


def test_an_edited_recipe_is_another_training(spec, run_here, tmp_path, classes, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {size: nano, patch_size: 8}")
    task = {"kind": "finetune", "data": str(classes), "recipe": str(recipe), "options": QUICK}
    comparing.compare(spec(tasks=[task], rates=[1]))
    done = len(run_here)
    recipe.write_text("model: {size: nano, patch_size: 8, drop_path: 0.2}")
    comparing.compare(spec(tasks=[task], rates=[1]), dry_run=True)
    assert done == 4 and "trainings left: 4" in capsys.readouterr().out


def test_a_rate_too_high_is_a_result_and_all_of_them_are_refused(spec, run_here, tmp_path):
    comparing.compare(spec(rates=[2, 1000]))
    results = json.loads((tmp_path / "out" / "report.json").read_text())["results"]
    assert [entry["score"] for entry in results[2]["grid"]] == [50.0, None] and results[2]["choice"]["rate"] == 2
    tried = len(run_here)
    comparing.compare(spec(rates=[2, 1000]))
    assert len(run_here) == tried
    with pytest.raises(UserError, match="no training of the grid kept finite numbers for own on finetune; lower the"):
        comparing.compare(spec(rates=[1000, 2000]))


def test_a_comparison_of_real_trainings(spec, run_in_process, tmp_path, classes):
    pretraining = f"mae pretrain data.path={classes / 'train'} optim.epochs=0.1 decoder.width=32 decoder.depth=1"
    made = {"name": "made", "command": " ".join([pretraining, *SMALL, *QUICK, "optim.warmup_epochs=0"])}
    probe = {"kind": "linprobe", "data": str(classes), "options": ["data.image_size=32", *QUICK]}
    path = comparing.compare(spec(encoders=[made], tasks=[probe], seeds=1, rates=[1], steps=1))
    found = json.loads(path.with_name("report.json").read_text())
    assert 0 <= found["results"][0]["scores"][0] <= 100 and found["encoders"][0]["licence"] == "made here"
    encoder = mae_core.load_encoder(tmp_path / "out" / "encoders" / "made")
    assert found["encoders"][0]["parameters"] == sum(weights.numel() for weights in encoder.parameters())
    assert found["encoders"][0]["image_size"] == [32, 32] and found["encoders"][0]["flops"] > 1e6
    page = path.read_text()
    assert page.count('<svg role="img"') == 1 and "100.0% of the model" in page and "mae linprobe small_data" in page


def test_subsets_are_nested_hold_all_classes_and_never_the_validation_set(tmp_path, classes, detection_root):
    labelled = ClassFolders(classes)
    first, again, other = labelled.order(0), labelled.order(0), labelled.order(1)
    assert first == again and first != other and sorted(first) == sorted(other) and len(first) == 24
    for count in (3, 6, 12):
        found = [path.parent.name for path in first[:count]]
        assert {name: found.count(name) for name in found} == dict.fromkeys(("ash", "birch", "cedar"), count // 3)
    labelled.write(tmp_path / "held", first[:6], first[6:9])
    labelled.write(tmp_path / "final", first[:9], None)

    def files(folder):
        return sorted(path.resolve() for path in folder.rglob("*.png"))

    assert files(tmp_path / "held" / "train") == sorted(first[:6])
    assert files(tmp_path / "held" / "val") == sorted(first[6:9])
    scored = [path for name in ("ash", "birch", "cedar") for path in files(tmp_path / "final" / "val" / name)]
    assert scored == files(classes / "val")

    coco = Coco(detection_root)
    ids = coco.order(0)
    coco.write(tmp_path / "coco", ids[:2], ids[2:3])
    for name, chosen in (("train", ids[:2]), ("val", ids[2:3])):
        content = json.loads((tmp_path / "coco" / f"{name}.json").read_text())
        assert {image["id"] for image in content["images"]} == set(chosen)
        assert {entry["image_id"] for entry in content["annotations"]} == set(chosen)


def test_every_kind_is_a_command_that_parses(spec, detection_root, classes, pretrained):
    """Each with an encoder from a file, one from scratch and a trunk of timm, which is passed on as an option."""
    config = spec(
        tasks=[
            *({"kind": kind, "data": str(classes)} for kind in ("knn", "linprobe", "attentive", "finetune")),
            {"kind": "detection", "data": str(detection_root)},
        ]
    )
    for task in (Task(each, config) for each in config.tasks):
        for encoder in encoders_of(config).values():
            words = task.training(encoder, 1.0, 1, Choice(2.0, 0.75), held_out=False).words
            options = [word for word in words if "=" in word]
            task.validate(
                [word for word in options if word.startswith(("weights", "from_scratch", "model.", "optim."))]
            )
            assert encoder.name == "own" or task.kind.frozen or "from_scratch=true" in words
            assert ("optim.layer_decay=0.75" in words) == (task.spec.kind in ("finetune", "detection"))
            assert ("seed=1" in words) == (task.spec.kind != "knn")


def test_a_trunk_of_timm_is_passed_to_every_command(spec, pretrained, classes):
    config = spec(encoders=[{"name": "dino", "weights": str(pretrained), "trunk": "timm:vit_small_patch14_dinov2"}])
    (encoder,) = encoders_of(config).values()
    for name, kind in KINDS.items():
        key = "trunk" if name == "segmentation" else "model.trunk"
        assert encoder.words(kind) == [f"weights={pretrained}", f"{key}=timm:vit_small_patch14_dinov2"]
    finetuning = Task(spec().tasks[1], spec())
    finetuning.validate(encoder.words(KINDS["finetune"]))  # over a recipe that states a size


def cell(encoder: str, scores: list[float], task: str = "photos", **more) -> Cell:
    return Cell(task, "top-1 accuracy (%)", encoder, more.pop("share", 1.0), 100, scores, **more)


def results(cells: list[Cell]) -> Results:
    names = dict.fromkeys(each.encoder for each in cells)
    rows = [EncoderRow(name, "file", "Apache-2.0", 5_400_000, 350_000_000, 99.5, (96, 96)) for name in names]
    facts = {"processor": "P", "threads": "1", "torch": "2"}
    return Results("Which?", rows, cells, 10.0, len(cells), 2, 0.25, facts)


def test_an_encoder_is_ahead_where_the_difference_is_larger_than_the_spread():
    assert rivals([cell("a", [60.0, 62.0]), cell("b", [59.5, 58.5]), cell("c", [50.0, 50.0])]) == ["b"]
    assert headline(results([cell("a", [60.0, 62.0]), cell("b", [50.0, 51.0])])) == (
        "a is ahead of every other in one of one: photos."
    )
    said = headline(
        results([cell("a", [60.0]), cell("b", [50.0]), *(cell(n, [9.0, 1.0], "cells") for n in ("a", "b"))])
    )
    assert said == "No encoder is ahead by more than the spread in photos (a) and cells (a and b)."


def test_the_report_shows_pictures_curves_and_labels(tmp_path):
    from PIL import Image

    Image.linear_gradient("L").resize((300, 60)).save(tmp_path / "drawn.png")
    picture = Picture("photos, a", "", tmp_path / "drawn.png")
    grid = [{"rate": rate, "decay": 1.0, "score": 10.0 * rate} for rate in (1.0, 2.0)] + [
        {"rate": 9.0, "decay": 1.0, "score": None}
    ]
    few = [cell(name, [40.0, 41.0], share=0.5) for name in "ab"]
    cells = [cell(name, [60.0, 62.0], curve=[(1, 2.0), (2, 1.0)], grid=grid, picture=picture) for name in "ab"]
    page = write_results(results([*few, *cells]), tmp_path).read_text()
    assert page.count("data:image/png") == 1 + 2 and page.count('<svg role="img"') == 2 + 1
    assert "photos, 50% of the labels" in page and "Apache-2.0" in page
    numbers = json.loads((tmp_path / "report.json").read_text())
    text = (tmp_path / "report.md").read_text()
    assert "| a | " in text and "the same grid of rates and decays" in text and "the same grid of rates" in page
    write_results(results(few), tmp_path)
    assert "nothing was searched" in (tmp_path / "report.md").read_text()
    assert numbers["results"][0]["share"] == 0.5 and numbers["results"][2]["range"] == 2.0


def test_the_example_of_the_page_and_the_recipe_are_specifications(tmp_path):
    page = Path(__file__).parents[2] / "docs" / "compare.md"
    (example,) = re.findall(r"```yaml\n(.*?)```", page.read_text(), flags=re.DOTALL)
    (tmp_path / "example.yaml").write_text(example)
    config = load_config(CompareConfig, tmp_path / "example.yaml")
    assert [task.kind for task in config.tasks] == ["knn", "linprobe", "finetune", "detection", "segmentation"]
    recipe = load_config(CompareConfig, "small_data", ["seeds=1"])
    assert len(recipe.encoders) == 4 and recipe.seeds == 1
    assert {f"`{kind}`" for kind in KINDS} == set(re.findall(r"^\| (`\w+`) \|", page.read_text(), flags=re.MULTILINE))
