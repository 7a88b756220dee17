"""The ``mae`` command: its help, what it prints, and one sentence with exit code 2 for what a user gets wrong."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from mae_core.cli.main import app
from mae_core.models.encoder import ViTEncoder
from mae_core.weights.encoder_file import describe_encoder
from mae_core.weights.files import write_weights

COMMANDS = (
    *("pretrain", "fit-pca", "train-tokenizer", "finetune", "linprobe", "knn", "features", "evaluate"),
    *("reconstruct", "inspect", "convert", "export", "digits", "data-stats"),
    *("shrink", "doctor", "verify-resume", "replay", "slurm", "map", "report", "compare-runs", "bench-data", "compare"),
)
SCRATCH = ("from_scratch=true", "model.size=nano", "model.patch_size=8", "data.image_size=32", "data.workers=0")


def mae(*arguments: str | Path) -> Result:
    """Run the command in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def error_of(result: Result) -> str:
    """The sentence of a refused command: alone on stderr, exit code 2."""
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    match = re.fullmatch(r"error: (.+)\n", result.stderr)
    assert match, result.stderr
    return match[1]


@pytest.fixture
def images(tmp_path, write_images) -> Path:
    write_images(tmp_path / "images", 6)
    return tmp_path / "images"


@pytest.fixture
def pretrain_mae(tmp_path, images, pretrain_options):
    """(more overrides) -> result of a tiny pre-training of tmp_path/images into tmp_path/run."""

    def run(*overrides: str) -> Result:
        options = [*pretrain_options, "optim.epochs=1", f"data.path={images}", f"output={tmp_path / 'run'}"]
        return mae("pretrain", *options, *overrides)

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_help_lists_every_command_with_a_sentence():
    result = mae("--help")
    assert result.exit_code == 0
    for command in COMMANDS:
        assert re.search(rf"\b{command} +\S+ \S+", result.output), command
    assert {command.name or command.callback.__name__ for command in app.registered_commands} == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_explains_every_option(command):
    result = mae(command, "--help")
    assert result.exit_code == 0
    assert result.output.count("Usage:") == 1
    blocks = re.findall(r"^│ +\*? *(?:--|[A-Z\[])\S.*$", result.output, flags=re.MULTILINE)
    assert blocks
    for option in re.findall(r"│ +(--[a-z-]+)", result.output):
        line = next(line for line in result.output.splitlines() if option in line)
        assert len(re.findall(r"[A-Za-z]{2,}", line)) >= 3, f"{option} is not explained: {line}"


def test_no_arguments_print_the_help():
    assert "Usage:" in mae().output


def test_pretrain_writes_an_encoder_that_the_other_commands_take(tmp_path, images, pretrain_mae):
    result = pretrain_mae()
    assert result.exit_code == 0, result.output
    assert "6 images, 32x32x3" in result.stdout and "12 of 16 patches hidden" in result.stdout
    assert re.search(r"step 2/2 +loss \d\.\d+ .*images/s +\d+\.\d GiB +waiting for data \d+% +0:00 left", result.stdout)
    assert not result.stderr

    described = mae("inspect", tmp_path / "run")
    assert described.exit_code == 0 and "ViT-nano" in described.stdout and "finetune" in described.stdout

    options = ["--out", tmp_path / "strips.png", "--most", "3", "--ratio", "0.5"]
    drawn = mae("reconstruct", tmp_path / "run", images, *options)
    assert drawn.exit_code == 0, drawn.output
    picture = Image.open(tmp_path / "strips.png")
    assert picture.width > 4 * 32 and picture.height > 3 * 32


def test_a_config_file_and_overrides_may_come_in_any_order(tmp_path, images, pretrain_mae):
    (tmp_path / "mine.yaml").write_text("optim: {epochs: 7}\nseed: 5\n")
    assert pretrain_mae(str(tmp_path / "mine.yaml"), "seed=6").exit_code == 0
    stored = (tmp_path / "run" / "config.yaml").read_text()
    assert "epochs: 1.0" in stored and "seed: 6" in stored


def test_a_corrupt_image_is_named_skipped_and_counted(tmp_path, images, pretrain_mae, write_images):
    (bad,) = write_images(images / "more", 1, size=(300, 300), suffix=".jpg")
    bad.write_bytes(bad.read_bytes()[:2000])
    result = pretrain_mae("optim.epochs=2")
    assert result.exit_code == 0, result.output
    assert result.stdout.count(str(bad)) == 1 and "1 unreadable images were skipped" in result.stdout
    entries = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    (noted,) = [entry for entry in entries if entry.get("event") == "unreadable"]
    assert noted["path"] == str(bad) and noted["reason"]
    assert (tmp_path / "run" / "encoder.safetensors").is_file()


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_a_corrupt_image_refuses_the_run_where_asked_to(tmp_path, write_classes, pretrain_mae, command):
    data = write_classes(tmp_path / "data")
    bad = data / "val" / "birch" / "001.png"
    bad.write_bytes(bad.read_bytes()[:100])
    options = [f"data.path={data}", "data.on_error=raise"]
    if command == "pretrain":
        result = pretrain_mae(*options)
    else:
        result = mae("finetune", *SCRATCH, *options, f"output={tmp_path / 'run'}")
    message = error_of(result)
    assert str(bad) in message and "cannot be read" in message and "data.on_error=skip" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            ["data.path={root}/missing"],
            "image folder {root}/missing does not exist; name a folder of images, or one image file",
        ),
        (["data.path={root}/empty"], "no images below {root}/empty"),
        (["data.path={root}/notes.md"], "is a file, and .md is not an image's ending; name a folder of images"),
        (["masking.ration=0.5"], "command line: unknown key 'masking.ration'; did you mean 'masking.ratio'?"),
        (["data.image_size=36"], "image size 36x36 does not split into 8x8 patches; use 40x40"),
        (["masking.ratio=1.5"], "masking.ratio: input should be less than 1"),
        (["masking.ratio=0"], "masking.ratio: input should be greater than 0"),
        (["masking.ratio=0.99"], "mask ratio 0.99 keeps 0 of 16 patches"),
        (["optim.epochs=many"], "optim.epochs: input should be a valid number"),
        (["decoder.width=30"], "decoder width 30 must be divisible by its heads"),
        (["nowhere.yaml"], "config file nowhere.yaml does not exist"),
        (["a.yaml", "b.yaml"], "one configuration file at a time, got a.yaml, b.yaml"),
        (["output={root}/images/000.png"], "000.png is a file; choose a folder with output=FOLDER"),
        (["output={root}/notes.md/run"], "notes.md/run: Not a directory; choose another with output=FOLDER"),
    ],
)
def test_wrong_input_to_pretrain(tmp_path, pretrain_mae, overrides, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.md").write_text("")
    before = contents(tmp_path)
    result = pretrain_mae(*(override.format(root=tmp_path) for override in overrides))
    assert message.format(root=tmp_path) in error_of(result)
    assert contents(tmp_path) == before and not (tmp_path / "run").exists()


def test_several_errors_come_at_once(tmp_path, pretrain_mae):
    result = pretrain_mae("maskin.ratio=0.5", "optim.epochs=-1")
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert result.stderr.startswith("error: 2 problems:\n") and len(result.stderr.splitlines()) == 3
    assert not (tmp_path / "run").exists()


def test_a_gpu_that_is_not_there_is_refused(tmp_path, pretrain_mae, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "torch sees no GPU" in error_of(pretrain_mae("device=cuda"))
    assert not (tmp_path / "run").exists()


def test_a_folder_of_unreadable_images_is_refused(tmp_path, images, pretrain_mae):
    for path in images.iterdir():
        path.write_bytes(b"damaged")
    assert "none of 6 images can be read" in error_of(pretrain_mae())
    assert not (tmp_path / "run").exists()


def test_an_output_folder_that_holds_a_run_is_left_alone(tmp_path, pretrain_mae):
    assert pretrain_mae().exit_code == 0
    before = contents(tmp_path / "run")
    message = error_of(pretrain_mae())
    assert f"output folder {tmp_path / 'run'} already holds a run" in message and "--resume" in message
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("place", ["images", "images/run", "link/run"])
def test_an_output_folder_among_the_images_is_refused(tmp_path, images, pretrain_mae, place):
    """Its pictures would be images of the next run."""
    (tmp_path / "link").symlink_to(images)
    before = contents(images)
    message = error_of(pretrain_mae(f"output={tmp_path / place}"))
    assert message.startswith(f"output folder {tmp_path / place} ") and "with output=FOLDER" in message
    assert contents(images) == before


def test_nothing_to_resume(tmp_path, pretrain_mae):
    assert "nothing to resume" in error_of(pretrain_mae("--resume"))
    assert not (tmp_path / "run").exists()


@pytest.fixture
def classes(tmp_path, write_classes) -> Path:
    return write_classes(tmp_path / "classes", train=2, val=1)


def other_architecture(path: Path) -> None:
    """A ViT-nano with patches of 4 under our own names."""
    encoder = ViTEncoder("nano", image_size=16, patch_size=4)
    write_weights(path, encoder.state_dict(), describe_encoder(encoder))


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["weights={root}/none.pth"], "weights file {root}/none.pth does not exist"),
        (["weights={root}/cut.safetensors"], "{root}/cut.safetensors is truncated or not a safetensors file"),
        (["weights={root}/cut.pth"], "{root}/cut.pth is truncated or not a weights file"),
        (["weights={root}/other.safetensors", "model.patch_size=8"], "architecture: patch_size 8 was asked for"),
        (["weights={root}/other.safetensors", "model.size=base"], "another architecture: size base was asked for"),
        (["weights={root}/other.safetensors", "data.image_size=33"], "33x33 does not split into 4x4 patches"),
        (["weights={root}/classes"], "holds no weights and no complete checkpoint"),
        (["weights={root}"], "and no complete checkpoint; give {root}/cut.safetensors, which lies in it"),
        (["weights={root}/a", "from_scratch=true"], "give either weights=FILE or from_scratch=true"),
        ([], "give either weights=FILE or from_scratch=true"),
        ([*SCRATCH, "data.path={root}/none"], "{root}/none has no train/ folder (the folder does not exist)"),
        ([*SCRATCH, "data.path={root}/classes/train"], "has no train/ folder (it holds ash, birch, cedar)"),
        ([*SCRATCH, "optim.layer_decy=0.5"], "did you mean 'optim.layer_decay'?"),
        ([*SCRATCH, "data.image_size=36"], "does not split into 8x8 patches"),
        ([*SCRATCH, "data.auto_augment=nonsense"], "data.auto_augment"),
        ([*SCRATCH, "optim.batch_size=3"], "mixup and cutmix need an even number"),
    ],
)
def test_wrong_input_to_finetune(tmp_path, classes, pretrained, overrides, message):
    other_architecture(tmp_path / "other.safetensors")
    content = (pretrained / "encoder.safetensors").read_bytes()
    for name in ("cut.safetensors", "cut.pth"):
        (tmp_path / name).write_bytes(content[: len(content) // 2])
    before = contents(tmp_path)
    options = [f"data.path={classes}", f"output={tmp_path / 'run'}", "data.image_size=32", "device=cpu"]
    result = mae("finetune", *options, *(override.format(root=tmp_path) for override in overrides))
    assert message.format(root=tmp_path) in error_of(result)
    assert contents(tmp_path) == before and not (tmp_path / "run").exists()


def test_finetune_prints_the_report_and_its_accuracy(tmp_path, classes, pretrained):
    options = [f"data.path={classes}", f"output={tmp_path / 'run'}", "data.image_size=32", "data.workers=0"]
    options += ["device=cpu", "optim.epochs=1", "optim.batch_size=2", f"weights={pretrained / 'encoder.safetensors'}"]
    result = mae("finetune", *options)
    assert result.exit_code == 0, result.output
    assert "newly initialised" in result.stdout and "of the model's" in result.stdout
    assert re.search(r"step 3: top-1 \d+\.\d\d %, top-5 100.00 % on 3 images", result.stdout)
    assert "already holds a run" in error_of(mae("finetune", *options))
    for place in (classes, classes / "train" / "run", classes / "val"):
        assert "with output=FOLDER" in error_of(mae("finetune", *options, f"output={place}"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["{run}", "{root}/images", "--ratio", "1.5"], "mask ratio 1.5 is outside (0, 1)"),
        (["{run}", "{root}/images", "--ratio", "0.99"], "mask ratio 0.99 keeps 0 of 16 patches"),
        (["{run}", "{root}/none"], "{root}/none"),
        (["{run}", "{root}/none.png"], "{root}/none.png"),
        (["{run}", "{root}/empty"], "no images below {root}/empty"),
        (["{run}", "{root}/bad.jpg"], "image {root}/bad.jpg cannot be read (not an image)"),
        (["{run}/encoder.safetensors", "{root}/images"], "has no decoder"),
        (["{root}/none.safetensors", "{root}/images"], "{root}/none.safetensors does not exist"),
        (["{root}/cut.safetensors", "{root}/images"], "{root}/cut.safetensors is truncated"),
        (["{root}/empty", "{root}/images"], "no complete checkpoint"),
        (
            ["{run}", "{root}/images", "--out", "{root}/strip.txt"],
            "strip.txt is not the name of a picture; end it in .png",
        ),
        (["{run}", "{root}/images", "--out", "{root}/images/000.png"], "000.png exists"),
        (["{run}", "{root}/images", "--out", "{root}/bad.jpg/x.png"], "cannot write {root}/bad.jpg/x.png"),
    ],
)
def test_wrong_input_to_reconstruct(tmp_path, images, pretrained, arguments, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    (tmp_path / "cut.safetensors").write_bytes((pretrained / "encoder.safetensors").read_bytes()[:5000])
    before = contents(tmp_path)
    given = [argument.format(root=tmp_path, run=pretrained) for argument in arguments]
    if "--out" not in given:
        given += ["--out", str(tmp_path / "strip.png")]
    assert message.format(root=tmp_path) in error_of(mae("reconstruct", *given))
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "does not exist"),
        (b"", "is truncated or not a weights file"),
        (b"some text", "is truncated or not a weights file"),
    ],
)
def test_wrong_input_to_inspect(tmp_path, content, message):
    file = tmp_path / "x.pth"
    if content is not None:
        file.write_bytes(content)
    assert f"{file} {message}" in error_of(mae("inspect", file)).removeprefix("weights file ")


def test_inspect_of_a_torn_checkpoint_says_so(tmp_path, pretrained):
    torn = tmp_path / "step_00000004"
    shutil.copytree(next((pretrained / "checkpoints").iterdir()), torn)
    (torn / "COMPLETE").unlink()
    assert "is not complete" in error_of(mae("inspect", torn))


@pytest.mark.extra("sklearn")
def test_digits_into_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot write" in error_of(mae("digits", tmp_path / "file" / "digits", "--workers", "1"))


@pytest.mark.parametrize("arguments", [["pretrain", "--epochs=3"], ["train"], ["inspect"], ["reconstruct", "x"]])
def test_a_command_line_out_of_shape_is_refused(arguments):
    result = mae(*arguments)
    assert result.exit_code == 2 and "Traceback" not in result.output and "Usage:" in result.output


def test_the_real_process_answers_the_same(tmp_path, run_forked):
    result = run_forked(["-m", "mae_core.cli.main", "pretrain", "data.path=missing", f"output={tmp_path / 'run'}"])
    assert result.returncode == 2
    assert result.stderr == "error: image folder missing does not exist; name a folder of images, or one image file\n"
    assert not result.stdout and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "words",
    ["check images", "check folders", "check coco", "check labels", "data-stats", "shrink", "check labels data_root="],
)
def test_a_missing_folder_that_was_typed_is_named_without_an_option(words, tmp_path):
    """None of these takes data.path: the message says what was typed, and to give another."""
    pytest.importorskip("mmseg" if "labels" in words else "pycocotools")
    missing = tmp_path / "missing"
    given = [f"{words.split()[-1]}{missing}"] if "=" in words else [missing]
    more = [tmp_path / "out"] if words == "shrink" else []
    message = error_of(mae(*[word for word in words.split() if "=" not in word], *given, *more))
    assert f"{missing} " in message and "does not exist" in message and "data.path" not in message
