"""The loss on images kept out and the k-NN accuracy: reproducible, without a trace in the training."""

import json
import re

import pytest
import torch

from mae_core.config.load import load_config
from mae_core.data.sources import open_source
from mae_core.errors import UserError
from mae_core.layout import best_checkpoint, complete_checkpoints, resolve_weights
from mae_core.training import distributed, watch
from mae_core.training.pretrain import pretrain
from mae_core.training.pretrain_config import PretrainConfig
from mae_core.training.run import Run
from mae_core.training.watch import held_out_loss, labelled_top1, probe_top1, split_images
from mae_core.weights.load import load_mae


def log_of(run) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.fixture
def options(tmp_path, write_images, pretrain_options) -> list[str]:
    write_images(tmp_path / "images", 12)
    return [*pretrain_options, f"data.path={tmp_path / 'images'}", "optim.epochs=2", "watch.every_epochs=1"]


def configured(options, *more) -> PretrainConfig:
    return load_config(PretrainConfig, None, [*options, *more])


def test_parts_are_disjoint_complete_and_the_same_every_time(options):
    config = configured(options, "watch.share=0.25")
    source = open_source(config.data)
    watched, again = split_images(config, source), split_images(config, source)
    kept = set(watched.held_out.names)
    assert len(kept) == 3 and kept.isdisjoint(watched.training.names)
    assert kept | set(watched.training.names) == set(source.names)
    assert watched.held_out.names == again.held_out.names
    other = split_images(configured(options, "watch.share=0.25", "seed=1"), source)
    assert kept != set(other.held_out.names)


def test_a_run_measures_every_so_often_and_what_it_measures_can_be_measured_again(
    options, tmp_path, write_classes, capsys
):
    labelled = write_classes(tmp_path / "labelled")
    (tmp_path / "images" / "000.png").write_bytes(b"broken")
    config = configured(
        options, "watch.share=0.4", f"watch.labelled={labelled}", "watch.neighbours=2", f"output={tmp_path / 'run'}"
    )
    pretrain(config)
    lines = re.findall(
        r"^step (\d)/4  loss \S+( \(kept out \S+\))?  lr .*  \d\.\d GiB  ", capsys.readouterr().out, re.M
    )
    config = load_config(PretrainConfig, tmp_path / "run" / "config.yaml")  # with the mean and std that it measured
    entries = [entry for entry in log_of(tmp_path / "run") if "held_out_loss" in entry]
    assert [entry["step"] for entry in entries] == [2, 4] and all("knn_top1" in entry for entry in entries)
    assert [(int(step), bool(text)) for step, text in lines] == [(1, False), (2, False), (3, True), (4, True)]
    assert f"(kept out {entries[0]['held_out_loss']:.4f})" in lines[2][1]

    run = Run(config, distributed.Place(1, 1, torch.device("cpu")))  # writes nothing, and says nothing
    run.rank = 0
    model = load_mae(tmp_path / "run")
    watched = split_images(config, open_source(config.data))
    assert held_out_loss(model, watched.held_out, config, run) == pytest.approx(entries[-1]["held_out_loss"], rel=1e-6)
    assert labelled_top1(model, watched.labelled, config, run) == {"knn_top1": pytest.approx(entries[-1]["knn_top1"])}
    small = config.model_copy(update={"watch": config.watch.model_copy(update={"batch": 1})})
    assert held_out_loss(model, watched.held_out, small, run) == pytest.approx(entries[-1]["held_out_loss"], rel=1e-5)


def test_to_be_watched_changes_nothing(options, tmp_path, write_classes, write_images):
    write_images(tmp_path / "other", 3)
    labelled = write_classes(tmp_path / "labelled")
    plain, watched = tmp_path / "plain", tmp_path / "watched"
    pretrain(configured(options, f"output={plain}"))
    watch = [f"watch.path={tmp_path / 'other'}", f"watch.labelled={labelled}", "watch.neighbours=3"]
    watch += ["watch.probes=[linear,attentive]", "watch.probe_epochs=2"]
    pretrain(configured(options, f"output={watched}", *watch))
    assert (plain / "encoder.safetensors").read_bytes() == (watched / "encoder.safetensors").read_bytes()
    assert sum({"knn_top1", "linear_top1", "attentive_top1"} <= entry.keys() for entry in log_of(watched)) == 2


def test_nearest_neighbours_of_classes_that_differ_are_found(options, tmp_path):
    from PIL import Image

    for split, count in (("train", 5), ("val", 2)):
        for shade in (20, 230):
            folder = tmp_path / "shades" / split / str(shade)
            folder.mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (32, 32), (shade + number, shade, shade)).save(folder / f"{number}.png")
    config = configured(options, f"watch.labelled={tmp_path / 'shades'}", "watch.neighbours=5", "optim.epochs=1")
    pretrain(config.model_copy(update={"output": tmp_path / "run"}))
    assert log_of(tmp_path / "run")[-1].get("knn_top1", 100.0) == 100.0
    assert [e["knn_top1"] for e in log_of(tmp_path / "run") if "knn_top1" in e] == [100.0]


@pytest.mark.parametrize("kind, of_cls, of_patches", [("linear", 100.0, 50.0), ("attentive", 50.0, 100.0)])
def test_a_probe_learns_what_its_tokens_tell_and_the_same_every_time(options, kind, of_cls, of_patches):
    """Two classes that differ in the cls token alone, or in one patch token alone; learned to the end on any CPU."""
    config = configured(options, "watch.probe_epochs=200")
    generator = torch.Generator().manual_seed(0)
    for place, expected in ((0, of_cls), (3, of_patches)):
        rows = 0.1 * torch.randn(80, 5, 16, generator=generator)
        labels = torch.arange(80) % 2
        rows[:, place, 0] += 4.0 * labels
        train, val = (rows[:60], labels[:60]), (rows[60:], labels[60:])
        before = torch.random.get_rng_state()
        found = [probe_top1(kind, train, val, 2, config, torch.device("cpu")) for _ in range(2)]
        assert found[0] == found[1] and torch.equal(torch.random.get_rng_state(), before)
        assert found[0] == pytest.approx(expected, abs=25 if expected < 100 else 0)


@pytest.mark.parametrize("broken_off", [False, True])
def test_the_best_checkpoint_is_saved_where_it_is_and_kept(options, tmp_path, monkeypatch, capsys, broken_off):
    """Losses 3, 1, 2, 4 of the held-out images after steps 2, 4, 6 and 7; other checkpoints come every 3 steps."""
    losses = {0: 3.0, 1: 1.0, 2: 2.0, 3: 4.0}
    steps = iter(range(9))
    monkeypatch.setattr(watch, "held_out_loss", lambda *_: losses[next(steps)])
    more = ["watch.share=0.4", "watch.keep_best=held_out_loss", "log.keep_checkpoints=1", f"output={tmp_path / 'run'}"]
    config = configured(options, *more, "optim.epochs=4", "log.checkpoint_every=3")
    if broken_off:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Run, "note_measured", broken_at(6))
            pretrain(config)
        steps = iter(range(2, 9))
    pretrain(config, resume="auto")
    best, last = complete_checkpoints(tmp_path / "run")
    assert (best.name, last.name) == ("step_00000004", "step_00000007")
    assert best_checkpoint(tmp_path / "run", "held_out_loss") == (best, 1.0)
    assert f"best held_out_loss: 1, in {best}" in capsys.readouterr().out
    assert resolve_weights(best) == best / "model.safetensors"


def broken_at(step: int):
    """``Run.note_measured`` that a user breaks off at a step."""
    real = Run.note_measured

    def note(self, at, values):
        if at == step:
            raise KeyboardInterrupt
        real(self, at, values)

    return note


@pytest.mark.parametrize(
    "more, message",
    [
        (["watch.probes=[linear]"], r"probes learn from labelled images; set watch.labelled=FOLDER"),
        (["watch.share=0.99"], "keeps 12 of 12 images out"),
        (["watch.path=/none"], "image folder /none does not exist"),
        (["watch.labelled=/none"], "has no train/ folder"),
        (["watch.share=0.1", "watch.path=/none"], "either share or path"),
        (["watch.keep_best=held_out_loss"], "held_out_loss is not measured; set watch.share or watch.path too"),
        (["watch.keep_best=knn_top1"], "knn_top1 is not measured; set watch.labelled=FOLDER too"),
        (["watch.keep_best=linear_top1"], r"set watch.labelled=FOLDER and watch.probes=\[linear\] too"),
    ],
)
def test_what_cannot_be_watched_is_refused_before_the_run(options, tmp_path, more, message):
    with pytest.raises(UserError, match=message):
        pretrain(configured(options, *more, f"output={tmp_path / 'run'}"))
    assert not (tmp_path / "run").exists()


def test_too_few_labelled_images_are_refused(options, tmp_path, write_classes):
    labelled = write_classes(tmp_path / "labelled")
    config = configured(options, f"watch.labelled={labelled}", f"output={tmp_path / 'run'}")
    with pytest.raises(UserError, match=r"watch\.neighbours=20 is more than the 12 images"):
        pretrain(config)


def test_tokens_of_too_many_labelled_images_are_refused(options, tmp_path, write_classes, monkeypatch):
    monkeypatch.setattr("mae_core.training.watch.available_memory", lambda device: 1000)
    more = [f"watch.labelled={write_classes(tmp_path / 'labelled')}", "watch.neighbours=2"]
    with pytest.raises(UserError, match=r"keeps the tokens of 21 images, .* lower watch.most_images"):
        pretrain(configured(options, *more, "watch.probes=[attentive]", f"output={tmp_path / 'run'}"))
    assert not (tmp_path / "run").exists()


def test_unreadable_labelled_images_refuse_the_run_before_it_where_asked_to(options, tmp_path, write_classes):
    labelled = write_classes(tmp_path / "labelled", train=6)
    bad = next((labelled / "val").rglob("*.png"))
    bad.write_bytes(b"broken")
    more = [f"watch.labelled={labelled}", "watch.neighbours=2", f"output={tmp_path / 'run'}"]
    with pytest.raises(UserError, match=rf"{bad} cannot be read"):
        pretrain(configured(options, *more, "data.on_error=raise"))
    assert not (tmp_path / "run").exists()
    for path in (labelled / "val").rglob("*.png"):
        path.write_bytes(b"broken")
    with pytest.raises(UserError, match="none of 9 images tried can be read"):
        pretrain(configured(options, *more))


def test_images_that_vanish_while_it_runs_leave_a_gap_not_a_number(
    options, tmp_path, write_images, monkeypatch, capsys
):
    others = write_images(tmp_path / "other", 3)
    config = configured(options, f"watch.path={tmp_path / 'other'}", f"output={tmp_path / 'run'}")
    from mae_core.training import pretrain as module

    def split_and_delete(*given):
        found = split_images(*given)
        [path.unlink() for path in others]
        return found

    monkeypatch.setattr(module, "split_images", split_and_delete)
    pretrain(config)
    assert "held_out_loss not measured, too few images can be read" in capsys.readouterr().out
    assert [entry["held_out_loss"] for entry in log_of(tmp_path / "run") if "held_out_loss" in entry] == [None, None]
