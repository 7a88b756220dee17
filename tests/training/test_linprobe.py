"""The linear probe: its optimizer and its norm as written, its crop, its trunk to the bit, its cache and its sweep."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms import v2

from mae_core.config.load import load_config
from mae_core.data.labelled import LabelledBatch
from mae_core.data.views import SingleDrawCrop
from mae_core.errors import UserError
from mae_core.layout import complete_checkpoints
from mae_core.models.probe import AttentivePool, AttentiveProbe, LinearProbe
from mae_core.training.classify_images import load_classifier
from mae_core.training.evaluate import evaluate
from mae_core.training.frozen_config import EvaluateConfig, LinprobeConfig, ProbeOptim
from mae_core.training.frozen_trunk import trunk_from
from mae_core.training.linprobe import lars, linprobe, probe_loss, probe_optimizer
from mae_core.weights.classifier import classifier_of
from mae_core.weights.files import read_weights, write_weights
from mae_core.weights.load import load_encoder, read_encoder

OPTIONS = ("data.workers=0", "optim.batch_size=6", "optim.warmup_epochs=0", "log.every=1", "device=cpu")


def configuration(*options: str) -> LinprobeConfig:
    return load_config(LinprobeConfig, None, [*OPTIONS, *options])


@pytest.fixture(scope="module")
def data(tmp_path_factory, write_classes) -> Path:
    return write_classes(tmp_path_factory.mktemp("classes"))


def test_the_defaults_are_table_10():
    optim = ProbeOptim()
    assert optim.lr == pytest.approx(6.4)
    assert (optim.batch_size, optim.epochs, optim.warmup_epochs) == (16384, 90, 10)
    assert (optim.momentum, optim.weight_decay, optim.trust_coefficient, optim.min_lr) == (0.9, 0.0, 0.001, 0.0)
    config = LinprobeConfig()
    assert (config.model.pooling, config.data.crop_scale, config.data.hflip) == ("cls", (0.08, 1.0), 0.5)


@pytest.mark.parametrize("weight_decay", [0.0, 0.02])
def test_a_step_of_lars_is_the_written_formula(weight_decay):
    """Against the formula written out, over steps, for a weight, a bias, a weight of zeros, and another rate."""
    torch.manual_seed(0)
    optim = ProbeOptim(base_lr=0.1, sweep=(0.4,), weight_decay=weight_decay, trust_coefficient=0.001, momentum=0.9)
    probe = LinearProbe(None, 5, 3, heads=2)
    nn.init.normal_(probe.heads[0].bias)
    nn.init.zeros_(probe.heads[1].weight)
    optimizer = lars(probe, optim, lr=2.0)
    for group in optimizer.param_groups:
        group["lr"] = 2.0 * group["lr_scale"]  # as the schedule does
    expected = {name: p.detach().clone() for name, p in probe.named_parameters()}
    velocity = {name: torch.zeros_like(p) for name, p in expected.items()}
    for _ in range(3):
        for name, parameter in probe.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            gradient, weight = parameter.grad.clone(), expected[name]
            if weight.ndim > 1:
                gradient = gradient + weight_decay * weight
                gradient = gradient * (0.001 * weight.norm() / gradient.norm() if weight.norm() > 0 else 1.0)
            velocity[name] = 0.9 * velocity[name] + gradient
            expected[name] = weight - 2.0 * (4.0 if "heads.1" in name else 1.0) * velocity[name]
        optimizer.step()
    for name, parameter in probe.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-5, atol=1e-7)


def test_the_head_starts_and_the_norm_computes_as_written():
    torch.manual_seed(0)
    probe = LinearProbe(None, 256, 200, heads=2)
    assert float(probe.heads[0].weight.detach().std()) == pytest.approx(0.01, rel=0.02)
    assert not probe.heads[0].bias.any() and torch.equal(probe.heads[0].weight, probe.heads[1].weight)
    assert not list(probe.norm.parameters()) and probe.norm.eps == 1e-6 and probe.norm.momentum == 0.1
    features = torch.randn(32, 256) * 3 + 1
    standardised = (features - features.mean(0)) / (features.var(0, unbiased=False) + 1e-6).sqrt()
    torch.testing.assert_close(probe.train()(features)[0], probe.heads[0](standardised), rtol=1e-4, atol=1e-5)
    weight, bias = probe.eval().folded(1)
    torch.testing.assert_close(features @ weight.T + bias, probe(features)[1], rtol=1e-4, atol=1e-5)


def test_the_trunk_is_in_eval_mode_and_without_gradients(pretrained):
    trunk, _ = trunk_from(read_encoder(pretrained), pooling="cls")
    probe = LinearProbe(trunk, 128, 3).train()
    assert probe.training and probe.norm.training and not any(module.training for module in trunk.modules())
    probe(torch.randn(4, 3, 32, 32)).sum().backward()
    assert all(parameter.grad is None for parameter in trunk.parameters())
    assert probe.heads[0].weight.grad is not None


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_features_are_the_encoders(pretrained, pooling):
    trunk, report = trunk_from(read_encoder(pretrained), pooling=pooling)
    encoder = load_encoder(pretrained)
    images = torch.randn(2, 3, 32, 32)
    tokens = encoder.blocks(encoder._pos_embed(encoder.patch_embed(images)))
    pooled = tokens[:, 0] if pooling == "cls" else tokens[:, 1:].mean(dim=1)
    torch.testing.assert_close(trunk(images), encoder.norm(pooled))
    assert not report.new and not report.unused


def test_the_crop_is_drawn_once_and_clamped():
    """Areas and ratios as drawn, where torchvision would try again; at the edges the crop is clamped to the image."""
    crop = SingleDrawCrop((16, 16), (0.08, 1.0))
    torch.manual_seed(0)
    boxes = [crop.box(40, 100) for _ in range(300)]
    for top, left, rows, cols in boxes:
        assert 0 <= top and top + rows <= 40 and 0 <= left and left + cols <= 100
    assert sum(rows == 40 for _, _, rows, _ in boxes) > 30  # clamped, for 4:3 of all of it is higher than the image
    torch.manual_seed(7)
    scale = float(torch.empty(()).uniform_(0.08, 1.0))
    ratio = math.exp(float(torch.empty(()).uniform_(math.log(3 / 4), math.log(4 / 3))))
    torch.manual_seed(7)
    _, _, rows, cols = crop.box(64, 64)
    area = 64 * 64 * scale
    assert (rows, cols) == (min(64, round(math.sqrt(area / ratio))), min(64, round(math.sqrt(area * ratio))))
    picture = Image.effect_noise((100, 40), 50)
    assert crop(picture).size == (16, 16)
    torch.manual_seed(3)
    top, left, rows, cols = crop.box(40, 100)
    torch.manual_seed(3)
    expected = v2.functional.resized_crop(picture, top, left, rows, cols, [16, 16], v2.InterpolationMode.BICUBIC)
    assert crop(picture).tobytes() == expected.tobytes()


def digest(state: dict[str, torch.Tensor]) -> str:
    return hashlib.sha256(b"".join(state[name].numpy().tobytes() for name in sorted(state))).hexdigest()


def test_a_probe_leaves_the_trunk_to_the_bit_and_learns(tmp_path, data, pretrained):
    run = tmp_path / "run"
    options = [f"weights={pretrained}", f"data.path={data}", f"output={run}", "optim.epochs=20", "optim.base_lr=4000"]
    metrics = linprobe(configuration(*options))
    assert json.loads((run / "metrics.json").read_text()) == metrics and metrics["images"] == 9
    before = read_weights(pretrained / "encoder.safetensors")[0]
    after, metadata = read_weights(run / "classifier.safetensors")
    assert after.keys() == before.keys() | {"head.weight", "head.bias"}
    assert digest({name: after[name] for name in before}) == digest(before)
    assert metadata["pooling"] == "cls" and metadata["classes"] == ["ash", "birch", "cedar"]
    losses = [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines() if '"loss"' in line]
    assert losses[0] == pytest.approx(math.log(3), rel=0.05) and min(losses) < 0.8 * losses[0]


def test_the_saved_classifier_is_the_best_head_of_the_sweep(tmp_path, data, pretrained, monkeypatch):
    probes = []
    original = LinearProbe.__init__
    monkeypatch.setattr(
        LinearProbe, "__init__", lambda self, *a, **k: (original(self, *a, **k), probes.append(self))[0]
    )
    run = tmp_path / "run"
    options = [f"weights={pretrained}", f"data.path={data}", f"output={run}", "optim.epochs=8"]
    metrics = linprobe(configuration(*options, "optim.base_lr=0.001", "optim.sweep=[1,3000,0.001]"))
    assert list(metrics["sweep"]) == ["0.001", "1", "3000"]
    best = max(metrics["sweep"].values(), key=lambda each: each["top1"])
    assert metrics["top1"] == best["top1"]
    (probe,) = probes
    source = read_encoder(run)
    model, _ = classifier_of(source)
    images = torch.randn(5, 3, 32, 32)
    number = ["0.001", "1", "3000"].index(f"{metrics['base_lr']:g}")
    torch.testing.assert_close(model(images), probe.eval()(images)[number], rtol=1e-4, atol=1e-5)
    assert source.metadata["classes"] == ["ash", "birch", "cedar"]


def test_heads_of_a_sweep_are_those_of_single_runs(tmp_path, data, pretrained):
    options = [f"weights={pretrained}", f"data.path={data}", "optim.epochs=3"]
    both = linprobe(configuration(*options, "optim.base_lr=1", "optim.sweep=[3000]", f"output={tmp_path / 'both'}"))
    for rate in ("1", "3000"):
        alone = linprobe(configuration(*options, f"optim.base_lr={rate}", f"output={tmp_path / rate}"))
        assert alone["sweep"][rate] == both["sweep"][rate]


def test_a_rate_that_is_too_high_does_not_stop_the_others():
    torch.manual_seed(0)
    probe = LinearProbe(None, 4, 3, heads=3).train()
    with torch.no_grad():
        probe.heads[1].weight.fill_(float("inf"))
    batch = LabelledBatch(torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2]), [])
    losses = probe_loss(probe, batch)
    torch.testing.assert_close(losses["loss"], losses["loss_0"] + losses["loss_2"])
    losses["loss"].backward()
    assert probe.heads[0].weight.grad.isfinite().all() and probe.heads[2].weight.grad.abs().sum() > 0
    with torch.no_grad():
        for head in probe.heads:
            head.weight.fill_(float("nan"))
    assert not probe_loss(probe, batch)["loss"].isfinite()


def test_cached_features_are_computed_once_and_train_the_same_head(tmp_path, data, pretrained, monkeypatch):
    options = [f"weights={pretrained}", f"data.path={data}", f"cache={tmp_path / 'cache'}", "optim.epochs=3"]
    options += ["model.pooling=mean", "optim.base_lr=3000"]
    first = linprobe(configuration(*options, f"output={tmp_path / 'first'}"))
    assert len(list((tmp_path / "cache").iterdir())) == 2
    state, _ = read_weights(min((tmp_path / "cache").iterdir(), key=lambda path: path.stat().st_size))
    assert state["values"].shape == (9, 128) and state["indices"].tolist() == list(range(9))

    def unexpected(*_: object) -> None:
        raise AssertionError("features were computed again")

    with monkeypatch.context() as patch:
        patch.setattr("mae_core.training.features.predict", unexpected)
        assert linprobe(configuration(*options, f"output={tmp_path / 'second'}")) == first
    one, other = (tmp_path / name / "classifier.safetensors" for name in ("first", "second"))
    assert one.read_bytes() == other.read_bytes()
    linprobe(configuration(*options, f"output={tmp_path / 'cls'}", "model.pooling=cls"))
    assert len(list((tmp_path / "cache").iterdir())) == 4
    linprobe(configuration(*options, f"output={tmp_path / 'pages'}", "data.pages=first"))
    assert len(list((tmp_path / "cache").iterdir())) == 6, "other pages are other pixels"


def break_off(monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    """Run a probe that is interrupted at its first measurement."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mae_core.training.linprobe.measure_heads", stop)
        with pytest.raises(KeyboardInterrupt):
            linprobe(configuration(*options))


def test_resuming_gives_the_same_probe(tmp_path, data, pretrained, monkeypatch):
    options = [f"weights={pretrained}", f"data.path={data}", "optim.epochs=4", "log.checkpoint_every=3"]
    linprobe(configuration(*options, f"output={tmp_path / 'whole'}"))

    break_off(monkeypatch, *options, f"output={tmp_path / 'cut'}")
    assert [path.name for path in complete_checkpoints(tmp_path / "cut")] == ["step_00000003", "step_00000006"]
    linprobe(configuration(*options, f"output={tmp_path / 'cut'}"), resume=True)
    one, other = (tmp_path / name / "classifier.safetensors" for name in ("whole", "cut"))
    assert one.read_bytes() == other.read_bytes()


def test_a_checkpoint_has_the_heads_and_refuses_another_trunk(tmp_path, data, pretrained):
    weights = tmp_path / "encoder.safetensors"
    shutil.copy(pretrained / "encoder.safetensors", weights)
    options = [f"weights={weights}", f"data.path={data}", f"output={tmp_path / 'run'}", "optim.epochs=1"]
    linprobe(configuration(*options))
    state, _ = read_weights(complete_checkpoints(tmp_path / "run")[-1] / "model.safetensors")
    assert {name.partition(".")[0] for name in state} == {"norm", "heads", "trunk_digest"}
    before = (tmp_path / "run" / "classifier.safetensors").read_bytes()
    tensors, metadata = read_weights(weights)
    tensors["blocks.3.mlp.fc1.weight"][0, 0] += 1
    write_weights(weights, tensors, metadata)
    with pytest.raises(UserError, match="trained on another trunk: the weights file has changed"):
        linprobe(configuration(*options), resume=True)
    assert (tmp_path / "run" / "classifier.safetensors").read_bytes() == before


def test_a_rate_alone_is_a_sweep():
    assert configuration("optim.sweep=0.3").optim.sweep == (0.3,)
    with pytest.raises(UserError, match=r"optim.sweep.*greater than 0"):
        configuration("optim.sweep=-1")


def test_the_image_size_is_the_files_unless_asked(tmp_path, data, pretrained):
    options = [f"weights={pretrained}", f"data.path={data}", f"output={tmp_path / 'run'}", "optim.epochs=1"]
    linprobe(configuration(*options))
    stored = load_config(LinprobeConfig, tmp_path / "run" / "config.yaml")
    assert stored.data.image_size == (32, 32)


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "no weights given; set weights=FILE"),
        (["weights={run}", "cache={run}/config.yaml"], "config.yaml is a file; give a folder"),
        (["weights={run}", "cache={run}/config.yaml/deeper"], r"config\.yaml is not writable; give another folder"),
        (["weights={run}", "optim.batch_size=1"], "batch norm needs at least two images per micro-batch"),
        (["weights={run}", "optim.micro_batch=5"], "batch norm needs at least two images per micro-batch"),
        (["weights={run}", "data.channels=1"], "the file has 3"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(tmp_path, data, pretrained, options, message):
    given = [option.format(run=pretrained) for option in options]
    with pytest.raises(UserError, match=message):
        linprobe(configuration(f"data.path={data}", f"output={tmp_path / 'run'}", *given))
    assert not (tmp_path / "run").exists()


# ---- attentive probe


@pytest.mark.parametrize("queries", [2, 4])
def test_attentive_pooling_is_attention_with_these_queries(queries):
    """Against torch's own: a head a query, keys that are the tokens, values that are the query's share of the map."""
    torch.manual_seed(0)
    width, tokens = 8, torch.randn(3, 5, 8)
    pool, share = AttentivePool(width, queries), width // queries
    nn.init.normal_(pool.queries)
    theirs = nn.MultiheadAttention(queries * width, queries, bias=False, kdim=width, vdim=width, batch_first=True)
    with torch.no_grad():
        theirs.q_proj_weight.copy_(torch.eye(queries * width))
        theirs.k_proj_weight.copy_(torch.eye(width).repeat(queries, 1))
        theirs.out_proj.weight.copy_(torch.eye(queries * width))
        theirs.v_proj_weight.zero_()
        for number in range(queries):
            rows = pool.value.weight[number * share : (number + 1) * share]
            theirs.v_proj_weight[number * width : number * width + share] = rows
    query = pool.queries.flatten().expand(3, 1, -1)
    attended, _ = theirs(query, tokens, tokens)
    expected = attended.view(3, queries, width)[:, :, :share].flatten(1)
    torch.testing.assert_close(pool(tokens), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("batch_norm", [True, False])
def test_an_exported_attentive_head_computes_what_the_probe_does(batch_norm):
    torch.manual_seed(0)
    probe = AttentiveProbe(None, 8, 3, queries=2, heads=2, batch_norm=batch_norm)
    tokens = torch.randn(6, 5, 8)
    one, other = probe.train()(tokens)
    assert torch.equal(one, other)  # the same start
    nn.init.normal_(probe.heads[1].linear.weight)
    found = probe.eval().exported(1)
    assert found.keys() == {"pool.queries", "pool.value.weight", "head.weight", "head.bias"}
    pooled = probe.heads[1].pool(tokens[:, 1:])  # without the cls token
    expected = pooled @ found["head.weight"].T + found["head.bias"]
    torch.testing.assert_close(probe(tokens)[1], expected, rtol=1e-4, atol=1e-5)
    changed = tokens.clone()
    changed[:, 0] += 1
    assert torch.equal(probe(changed), probe(tokens))


def test_batch_norm_can_be_turned_off():
    probe = LinearProbe(None, 4, 3, batch_norm=False)
    features = torch.randn(1, 4)
    weight, bias = probe.train().folded(0)
    torch.testing.assert_close(probe(features)[0], features @ weight.T + bias)
    assert not list(probe.buffers())


def test_a_step_of_sgd_is_torchs(tmp_path):
    torch.manual_seed(0)
    optim = ProbeOptim(kind="sgd", base_lr=0.1, sweep=(0.4,), weight_decay=0.02, momentum=0.9)
    probe = LinearProbe(None, 5, 3, heads=2)
    optimizer = probe_optimizer(probe, optim, lr=2.0)
    before = {name: p.detach().clone() for name, p in probe.named_parameters()}
    for group in optimizer.param_groups:
        group["lr"] = 2.0 * group["lr_scale"]
    for parameter in probe.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, parameter in probe.named_parameters():
        decay = 0.02 * before[name] if parameter.ndim > 1 else 0.0
        expected = before[name] - 2.0 * (4.0 if "heads.1" in name else 1.0) * (1.0 + decay)
        torch.testing.assert_close(parameter.detach(), expected)


ATTENTIVE = ("probe.kind=attentive", "probe.queries=4", "optim.epochs=4")


def test_an_attentive_probe_sweeps_caches_and_can_be_evaluated_and_used(tmp_path, data, pretrained):
    options = [f"weights={pretrained}", f"data.path={data}", f"cache={tmp_path / 'cache'}", *ATTENTIVE]
    options += ["optim.base_lr=1", "optim.sweep=[30]"]
    first = linprobe(configuration(*options, f"output={tmp_path / 'first'}"))
    kept = [read_weights(path)[0]["values"] for path in (tmp_path / "cache").iterdir()]
    assert {values.shape[1:] for values in kept} == {(17, 128)}
    assert list(first["sweep"]) == ["1", "30"]
    assert linprobe(configuration(*options, f"output={tmp_path / 'second'}")) == first
    linprobe(configuration(*options[:3], "optim.epochs=1", f"output={tmp_path / 'linear'}"))
    assert len(list((tmp_path / "cache").iterdir())) == 4  # features of the cls token are not its tokens

    state, metadata = read_weights(tmp_path / "first" / "attentive_classifier.safetensors")
    before, _ = read_weights(pretrained / "encoder.safetensors")
    assert state.keys() == before.keys() | {"pool.queries", "pool.value.weight", "head.weight", "head.bias"}
    assert metadata["pooling"] == "4 queries over patch tokens" and metadata["classes"] == ["ash", "birch", "cedar"]
    for number, given in enumerate((tmp_path / "first", tmp_path / "first" / "attentive_classifier.safetensors")):
        places = [f"weights={given}", f"data.path={data / 'val'}", f"output={tmp_path / str(number)}", "device=cpu"]
        again = evaluate(load_config(EvaluateConfig, None, places))
        assert again["top1"] == first["top1"] and again["images"] == first["images"]
    classifier = load_classifier(tmp_path / "first", device="cpu")
    files = sorted((data / "val").glob("*/*.png"))
    right = sum(answer.name == file.parent.name for file, answer in zip(files, classifier.predict(files), strict=True))
    assert 100 * right / len(files) == pytest.approx(first["top1"], abs=0.01)
    with pytest.raises(UserError, match="it is a classifier with attentive pooling; give the encoder"):
        linprobe(configuration(f"weights={tmp_path / 'first'}", f"data.path={data}", f"output={tmp_path / 'no'}"))


def test_an_attentive_probe_of_augmented_images_resumes_to_the_bit(tmp_path, data, pretrained, monkeypatch):
    options = [f"weights={pretrained}", f"data.path={data}", *ATTENTIVE, "log.checkpoint_every=3", "optim.kind=sgd"]
    linprobe(configuration(*options, f"output={tmp_path / 'whole'}"))

    break_off(monkeypatch, *options, f"output={tmp_path / 'cut'}")
    linprobe(configuration(*options, f"output={tmp_path / 'cut'}"), resume=True)
    one, other = (tmp_path / name / "attentive_classifier.safetensors" for name in ("whole", "cut"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    "options, message",
    [
        (["probe.kind=attentive", "probe.queries=3"], "probe.queries=3 does not divide a width of 128"),
        (["probe.kind=attentive", "model.pooling=mean"], "pools the patch tokens itself; leave model.pooling out"),
        (["probe.queries=4"], "probe.queries applies only to probe.kind=attentive"),
    ],
)
def test_options_of_the_probe_that_do_not_go_together_are_refused(tmp_path, data, pretrained, options, message):
    places = [f"weights={pretrained}", f"data.path={data}", f"output={tmp_path / 'run'}"]
    with pytest.raises(UserError, match=message):
        linprobe(configuration(*places, *options))
    assert not (tmp_path / "run").exists()


def test_tokens_that_do_not_fit_are_not_cached(tmp_path, data, pretrained, monkeypatch):
    monkeypatch.setattr("mae_core.training.features.available_memory", lambda device: 1000)
    options = [f"weights={pretrained}", f"data.path={data}", f"output={tmp_path / 'run'}", *ATTENTIVE]
    with pytest.raises(UserError, match=r"tokens of 21 images take 0.0 GiB and .* leave cache out"):
        linprobe(configuration(*options, f"cache={tmp_path / 'cache'}"))
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()
