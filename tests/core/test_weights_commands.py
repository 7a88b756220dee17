"""``mae convert``, ``inspect``, ``export`` and ``weights`` as a user types them, and the proof behind a conversion."""

from __future__ import annotations

import hashlib
import http.server
import importlib.util
import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor
from typer.testing import CliRunner

import mae_core
from mae_core.cli.main import app
from mae_core.errors import UserError
from mae_core.models import exporting
from mae_core.weights import catalogue, writing
from mae_core.weights.catalogue import CATALOGUE, get_weights
from mae_core.weights.encoder_file import describe_encoder
from mae_core.weights.features import Geometry
from mae_core.weights.files import read_weights, write_weights
from mae_core.weights.rename import Reading
from mae_core.weights.tools.check import compare_features, runner_of
from mae_core.weights.tools.convert import convert_file
from tests.independent_vit import OwnReading

EVERY = ("official", "mae_core", "timm", "huggingface", "huggingface_5", "mmseg", "mmpretrain", "detectron2",
         "mae_segmentation")  # fmt: skip


def mae(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(scope="module")
def state(official_state) -> dict[str, Tensor]:
    return official_state(128, 6, grid=(4, 4), patch=8, decoder=64)


@pytest.fixture(scope="module")
def file(state, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("official") / "full.pth"
    torch.save({"model": state}, path)
    return path


@pytest.mark.parametrize("target", EVERY)
def test_convert_proves_itself(tmp_path, file, target):
    out = tmp_path / "out.safetensors"
    text = mae("convert", file, "--to", target, "--out", out, "--check")
    assert "checked: largest feature difference" in text and f"wrote {out}" in text
    assert inspect(out)["format"] == target
    back = mae("convert", out, "--to", "official", "--out", tmp_path / "back.pth", "--check")
    assert "checked" in back


@pytest.fixture(scope="module")
def classifier(official_state) -> dict[str, Tensor]:
    """The names of a fine-tuned file: a norm after pooling and a head, no final norm."""
    trunk = official_state(64, 2, grid=(3, 3), decoder=None)
    pooled = {f"fc_norm.{leaf}": trunk.pop(f"norm.{leaf}") for leaf in ("weight", "bias")}
    return {**trunk, **pooled, "head.weight": torch.randn(5, 64), "head.bias": torch.randn(5)}


@pytest.fixture(scope="module")
def starts(official_state, classifier) -> dict[str, dict[str, Tensor]]:
    """A file of every format, and a fine-tuned one."""
    mae = official_state(64, 2, grid=(3, 3), decoder=16)
    return {**{name: mae_core.convert(mae, "official", name)[0] for name in EVERY}, "fine-tuned": classifier}


LIBRARY_OF = {"official": "timm", "mae_core": "timm", "timm": "timm", "mmseg": "mmseg", "huggingface": "transformers",
              "huggingface_5": "transformers"}  # fmt: skip


HUB = "official"
PAIRS = [(name, HUB) for name in EVERY] + [(HUB, name) for name in EVERY[1:]] + [("fine-tuned", name) for name in EVERY]
"""Every conversion goes through our names, so that each format to and from one hub runs all that 90 pairs would."""


@pytest.mark.parametrize("start, target", PAIRS)
def test_every_format_proves_itself(tmp_path, starts, start, target):
    write_weights(tmp_path / "x.safetensors", starts[start], {"heads": 4})
    _, comparison = convert_file(tmp_path / "x.safetensors", target, tmp_path / "out.safetensors", check=True)
    assert comparison is not None and comparison.difference < 1e-5
    library = LIBRARY_OF.get(target)
    if library and importlib.util.find_spec(library) and "detectron2" not in (start, target):
        assert comparison.target == library  # without detectron2: it has no cls token, which those cannot leave out


def test_a_fine_tuned_file_goes_to_every_format_and_back(classifier):
    for target in EVERY:
        there, report = mae_core.convert(classifier, "official", target)
        back, _ = mae_core.convert(there, target, "official")
        kept = {name: tensor for name, tensor in classifier.items() if name not in report.unused}
        assert back.keys() == kept.keys() and all(torch.equal(back[name], kept[name]) for name in kept), target
        holds_it_all = target in ("official", "mae_core", "timm", "mmpretrain")
        assert holds_it_all == (kept.keys() == classifier.keys()) and all(report.unused.values())


def inspect(path: Path) -> dict:
    return json.loads(mae("inspect", path, "--json"))


@pytest.mark.parametrize("target", EVERY)
def test_a_wrong_conversion_is_not_written(tmp_path, file, target, monkeypatch):
    """The value rows of every qkv are exchanged with the key rows: no name and no shape tells."""
    right = writing.write_parts

    def wrong(parts, *arguments):
        for name in [name for name in parts.tensors if name.endswith("blocks.2.attn.qkv.weight")]:
            query, key, value = parts.tensors[name].chunk(3)
            parts.tensors[name] = torch.cat([query, value, key])
        return right(parts, *arguments)

    monkeypatch.setattr(writing, "write_parts", wrong)
    out = tmp_path / "out.safetensors"
    text = mae("convert", file, "--to", target, "--out", out, "--check", code=2)
    assert "features of source and target differ by" in text and "nothing was written" in text
    assert not list(tmp_path.iterdir())


def test_sizes_change_on_the_way(tmp_path, file):
    out = tmp_path / "out.safetensors"
    options = ["--image-size", 48, 96, "--patch-size", 16, "--in-chans", 13, "--check"]
    report = tmp_path / "report.json"
    text = mae("convert", file, "--to", "timm", "--out", out, "--report", report, *options)
    assert "not a frozen feature" in " ".join(text.split())
    account = json.loads(report.read_text())
    assert account["resized"]["pos_embed"] == "4x4 -> 3x6"
    assert account["resized"]["patch_embed.proj.weight"] == "patch 8 -> 16 (bicubic), channels 3 -> 13 (mean_tile)"
    assert account["check"]["difference"] < 1e-4
    assert read_weights(out)[0]["patch_embed.proj.weight"].shape == (128, 13, 16, 16)
    found = inspect(out)
    assert found["grid"] == [3, 6] and found["in_chans"] == 13 and found["image_size"] == [48, 96]
    encoder = mae_core.load_encoder(out)
    assert encoder.grid == (3, 6, 16) and encoder.in_channels == 13


def test_every_refusal_is_one_sentence_and_writes_nothing(tmp_path, file):
    out = tmp_path / "out.pth"
    for arguments, told in [
        (["--to", "onnx", "--out", out], "unknown format 'onnx'"),
        (["--to", "mmseg", "--out", tmp_path / "folder"], "has to end in .safetensors or .pth"),
        (["--to", "timm", "--out", out, "--channels", "mean"], "--channels mean is not known; use sum, mean_tile, new"),
        (["--to", "timm", "--out", out, "--in-chans", 4, "--channels", "sum"], "sum makes one channel of several"),
        (["--to", "timm", "--out", out, "--image-size", 50, 50], "does not split into 8x8 patches"),
        (["--to", "timm", "--out", out, "--from", "mmseg"], "blocks"),
        (["--to", "timm", "--out", file], "exists; choose another --out"),
        (["--to", "official", "--out", out, "--drop", "mask_token"], "decoder is not complete"),
    ]:
        text = mae("convert", file, *arguments, code=2)
        assert told in text and "Traceback" not in text
    assert "does not exist" in mae("convert", tmp_path / "none.pth", "--to", "timm", "--out", out, code=2)
    assert not list(tmp_path.iterdir())


def test_a_grid_that_nobody_states_has_to_be_named(tmp_path, official_state):
    torch.save(official_state(64, 2, grid=(2, 3), decoder=None), tmp_path / "x.pth")
    arguments = ["convert", tmp_path / "x.pth", "--to", "timm", "--out", tmp_path / "out.safetensors", "--heads", 4]
    assert "--grid ROWS COLS" in mae(*arguments, "--check", code=2)
    mae(*arguments, "--check", "--grid", 2, 3)
    assert inspect(tmp_path / "out.safetensors")["grid"] == [2, 3]


@pytest.mark.parametrize("channels, grid", [(3, (4, 4)), (13, (2, 5)), (1, (3, 3))])
def test_timm_opens_its_folder(tmp_path, official_state, channels, grid):
    state = official_state(128, 3, grid=grid, patch=8, channels=channels, decoder=None)
    torch.save({"model": state, "metadata": {"grid": list(grid)}}, tmp_path / "x.pth")
    mae("export", tmp_path / "x.pth", "--timm", "--out", tmp_path / "folder", "--check")
    model = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    images = torch.randn(2, channels, grid[0] * 8, grid[1] * 8)
    with torch.no_grad():
        assert model.eval().forward_features(images).shape == (2, 1 + grid[0] * grid[1], 128)
    card = (tmp_path / "folder" / "README.md").read_text()
    assert "library_name: timm" in card and f"{channels} channels" in card


@pytest.mark.extra("transformers")
def test_transformers_opens_its_folder(tmp_path, file, official_state):
    from transformers import AutoModelForPreTraining, ViTModel

    mae("export", file, "--huggingface", "--out", tmp_path / "mae")
    model, info = AutoModelForPreTraining.from_pretrained(tmp_path / "mae", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.layer_norm_eps == 1e-6 and model.config.decoder_num_hidden_layers == 1
    state = official_state(128, 3, grid=(2, 5), patch=8, channels=13, decoder=None)
    torch.save({"model": state, "metadata": {"grid": [2, 5]}}, tmp_path / "x.pth")
    mae("export", tmp_path / "x.pth", "--huggingface", "--out", tmp_path / "vit", "--check")
    vit, info = ViTModel.from_pretrained(tmp_path / "vit", output_loading_info=True)
    assert all(name.startswith("pooler") for name in info["missing_keys"]) and not info["unexpected_keys"]
    assert torch.equal(vit.embeddings.position_embeddings, state["pos_embed"])


@pytest.mark.extra("transformers")
def test_a_fine_tuned_file_opens_in_timm_and_without_its_head_in_transformers(tmp_path, classifier):
    from transformers import AutoModel

    torch.save({"model": classifier, "metadata": {"heads": 4}}, tmp_path / "x.pth")
    mae("export", tmp_path / "x.pth", "--timm", "--out", tmp_path / "timm")
    model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True)
    assert model.global_pool == "avg" and model.state_dict().keys() == classifier.keys()
    images = torch.randn(2, 3, 12, 12)
    pooled = model.forward_intermediates(images, norm=False, output_fmt="NLC", intermediates_only=True)[-1].mean(1)
    pooled = F.layer_norm(pooled, (64,), classifier["fc_norm.weight"], classifier["fc_norm.bias"], 1e-6)
    expected = F.linear(pooled, classifier["head.weight"], classifier["head.bias"])
    assert torch.allclose(model.eval()(images), expected, atol=1e-5)
    mae("export", tmp_path / "x.pth", "--huggingface", "--out", tmp_path / "vit")
    assert json.loads((tmp_path / "vit" / "config.json").read_text())["architectures"] == ["ViTModel"]
    vit, info = AutoModel.from_pretrained(tmp_path / "vit", output_loading_info=True)
    assert all(name.startswith(("pooler", "layernorm")) for name in info["missing_keys"])
    assert torch.equal(vit.embeddings.position_embeddings, classifier["pos_embed"])


@pytest.mark.parametrize(
    "name, normalised, told",
    [
        ("mae_visualize_vit_base.pth", False, "the published file of that name predicts pixels"),
        ("mae_pretrain_vit_base_full.pth", True, "the published file of that name predicts normalized_pixels"),
        ("mine.pth", True, "norm_pix_loss is written as true"),
    ],
)
def test_the_pixel_target_reaches_transformers(tmp_path, state, name, normalised, told):
    torch.save({"model": state}, tmp_path / name)
    report, _ = convert_file(tmp_path / name, "huggingface", tmp_path / "folder")
    assert json.loads((tmp_path / "folder" / "config.json").read_text())["norm_pix_loss"] is normalised
    assert any(told in note for note in report.notes)


def test_transformers_mae_cannot_hold_every_grid(tmp_path, official_state):
    torch.save({"model": official_state(128, 1, grid=(2, 3)), "metadata": {"grid": [2, 3]}}, tmp_path / "x.pth")
    text = mae("export", tmp_path / "x.pth", "--huggingface", "--out", tmp_path / "out", code=2)
    assert "square number of patches, not 2x3" in text and not (tmp_path / "out").exists()


@pytest.mark.extra("transformers")
def test_what_transformers_saves_comes_back(tmp_path, state):
    """transformers 5 renames the decoder's layers when it saves; the file is read all the same."""
    from transformers import ViTMAEForPreTraining

    torch.save({"model": state}, tmp_path / "x.pth")
    convert_file(tmp_path / "x.pth", "huggingface", tmp_path / "ours")
    ViTMAEForPreTraining.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    convert_file(tmp_path / "theirs", "official", tmp_path / "back.pth")
    back = read_weights(tmp_path / "back.pth")[0]
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)


@pytest.fixture(scope="module")
def classifiers(official_state, tmp_path_factory) -> dict[str, Path]:
    """Pooling -> a trained classifier of five classes; and its encoder."""
    folder = tmp_path_factory.mktemp("classifiers")
    file = folder / "one_block.pth"
    torch.save({"model": official_state(192, 1, grid=(4, 4), patch=8, decoder=None)}, file)
    found = {"encoder": file}
    for pooling in ("mean", "cls"):
        torch.manual_seed(0)
        model = mae_core.build_classifier(file, 5, pooling=pooling, heads=2)
        torch.nn.init.normal_(model.head.weight)
        facts = {"classes": list("abcde"), "mean": [0.5] * 3, "std": [0.25] * 3}
        found[pooling] = folder / f"{pooling}.safetensors"
        write_weights(found[pooling], model.state_dict(), {**describe_encoder(model), **facts})
    return found


def run_program(path: Path, images: Tensor) -> tuple[Tensor, dict[str, object]]:
    """The output of an exported file, and what it states."""
    if path.suffix == ".onnx":
        onnxruntime = pytest.importorskip("onnxruntime")
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        facts = session.get_modelmeta().custom_metadata_map
        (found,) = session.run(None, {"images": images.numpy()})
        return torch.from_numpy(found), {name: json.loads(value) for name, value in facts.items()}
    extra = {"facts.json": ""}
    program = torch.export.load(path, extra_files=extra)
    return program.module()(images), json.loads(extra["facts.json"])


@pytest.mark.parametrize(
    "kind, ending, half",
    [("encoder", ".onnx", True), ("mean", ".onnx", False), ("encoder", ".pt2", False), ("cls", ".pt2", True)],
)
def test_an_exported_program_computes_what_torch_does(tmp_path, classifiers, kind, ending, half):
    """Encoders to their tokens, and classifiers, of both poolings, to their logits."""
    if ending == ".onnx":
        pytest.importorskip("onnxruntime", reason="pip install mae-transfer[onnx]")
    out, source = tmp_path / f"model{ending}", classifiers[kind]
    command = ("export",) if kind == "encoder" else ("classify", "export")
    option = {".onnx": "--onnx", ".pt2": "--torch-export"}[ending]
    text = mae(*command, source, option, "--out", out, "--heads", 2, *(["--half"] * half))
    assert "an encoder: images to" in text if kind == "encoder" else "a classifier: images to the logits of 5" in text
    model = mae_core.load_encoder(source, heads=2) if kind == "encoder" else mae_core.load_classifier(source).model
    stored = sum(tensor.numel() for tensor in model.parameters())
    assert (out.stat().st_size < 3.5 * stored) == half
    images = torch.randn(3, 3, 32, 32)  # another number than the export saw
    with torch.no_grad():
        expected = model.encode(images) if kind == "encoder" else model(images)
        found, facts = run_program(out, images)
    if half:
        assert 1e-6 < (found - expected).abs().max() < 0.05
    else:
        assert (found - expected).abs().max() < 1e-4
    if kind != "encoder":
        assert facts["classes"] == list("abcde") and facts["mean"] == [0.5] * 3 and facts["image_size"] == [32, 32]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--onnx", "--out", "x.pt2"], "--out x.pt2 has to end in .onnx for --onnx"),
        (["--torch-export", "--out", "x.onnx"], "--out x.onnx has to end in .pt2 for --torch-export"),
        (["--timm", "--half", "--out", "x"], "--half is for --onnx and --torch-export"),
        (["--half", "--out", "x"], "choose what to write: one of --onnx, --torch-export, --timm and --huggingface"),
    ],
)
def test_what_no_export_writes_is_refused(file, options, message):
    assert message in mae("export", file, *options, code=2)


def test_onnx_without_its_packages_is_one_sentence(tmp_path, file, monkeypatch):
    monkeypatch.setattr(exporting, "ONNX_PACKAGES", ("onnx_that_nobody_has",))
    text = mae("export", file, "--onnx", "--out", tmp_path / "x.onnx", code=2)
    assert "ONNX needs onnx_that_nobody_has; install them with pip install 'mae-transfer[onnx]'" in text


@pytest.mark.extra("transformers")
def test_our_reading_is_the_libraries(state):
    """The forward pass that stands in for missing libraries, against timm's and transformers'."""
    geometry = Geometry((32, 32), 8, 3, 4)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for target in ("timm", "huggingface", "huggingface_5"):
        encoder = {name: t for name, t in state.items() if "decoder" not in name and name != "mask_token"}
        tensors = mae_core.convert(encoder, "official", target)[0]
        name, library = runner_of(target, cls=True)
        assert name in ("timm", "transformers")
        with torch.no_grad():
            one, other = library(tensors, geometry, images), OwnReading()(tensors, geometry, images)
        assert (one.normed - other.normed).abs().max() < 1e-5 and (one.raw - other.raw).abs().max() < 1e-5


def test_relative_positions_run_as_in_mmseg(official_state):
    pytest.importorskip("mmseg")
    from mae_core.weights.formats import FORMATS
    from mae_core.weights.resize import Adaptation
    from transfer.segmentation.engine_mmseg.published import run_backbone

    wide = Adaptation(grid=(2, 4))
    state = mae_core.convert(official_state(64, 2, grid=(2, 4), decoder=None), "official", "mmseg", adaptation=wide)[0]
    generator = torch.Generator().manual_seed(5)
    for index in (0, 1):
        state[f"layers.{index}.attn.relative_position_bias_table"] = torch.randn(3 * 7 + 3, 4, generator=generator)
        state[f"layers.{index}.gamma_1"] = torch.randn(64, generator=generator)
    geometry = Geometry((8, 16), 4, 3, 4)
    images = torch.randn(2, 3, 8, 16, generator=generator)
    with torch.no_grad():
        theirs, ours = run_backbone(state, geometry, images), OwnReading()(state, geometry, images)
    assert (theirs.raw - ours.raw[:, 1:]).abs().max() < 1e-5
    segmenter = mae_core.convert(state, "mmseg", "mae_segmentation", adaptation=wide)[0]
    readings = [Reading(FORMATS[name], FORMATS[name].layouts[0], "") for name in ("mmseg", "mae_segmentation")]
    assert compare_features((state, readings[0], geometry), (segmenter, readings[1], geometry)).difference < 1e-5


# The catalogue and its download.


class Ranges(http.server.BaseHTTPRequestHandler):
    """Serves one file, honours ranges, and hangs up after ``stop`` bytes when told to."""

    content = b""
    stop: int | None = None
    asked: list[str | None] = []

    def do_GET(self) -> None:
        cls = type(self)
        cls.asked.append(self.headers.get("Range"))
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        if start >= len(cls.content):
            self.send_error(416)
            return
        body = cls.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body if cls.stop is None else body[: cls.stop])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch):
    """(handler, url): a local server, and a row of the catalogue whose hash is that of what it serves."""

    class Handler(Ranges):
        content = bytes(range(256)) * 9000
        asked: list[str | None] = []

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        digest = hashlib.md5(Handler.content).hexdigest()
        url = f"http://127.0.0.1:{running.server_port}/mae_pretrain_vit_base.pth"
        row = replace(CATALOGUE["pretrain_base"], url=url, md5=digest[:6])
        monkeypatch.setitem(CATALOGUE, "pretrain_base", row)
        yield Handler
        running.shutdown()


def test_a_download_that_is_cut_off_goes_on(tmp_path, server):
    server.stop = 1_000_000
    assert "run the command again to continue" in mae("weights", "get", "pretrain_base", "--out", tmp_path, code=2)
    assert [path.name for path in tmp_path.iterdir()] == ["mae_pretrain_vit_base.pth.part"]
    server.stop = None
    text = mae("weights", "get", "pretrain_base", "--out", tmp_path)
    assert "no commercial use" in text and "md5 begins" in text
    assert server.asked == [None, "bytes=1000000-"]
    (path,) = tmp_path.iterdir()
    assert path.name == "mae_pretrain_vit_base.pth" and path.read_bytes() == server.content
    get_weights("pretrain_base", tmp_path)
    assert len(server.asked) == 2, "what is there already is checked, not loaded again"


def test_a_part_that_is_the_whole_file_is_taken(tmp_path, server):
    (tmp_path / "mae_pretrain_vit_base.pth.part").write_bytes(server.content)
    assert get_weights("pretrain_base", tmp_path).read_bytes() == server.content


def test_a_file_of_another_hash_is_refused_and_not_kept(tmp_path, server):
    server.content = b"an error page"
    text = mae("weights", "get", "pretrain_base", "--out", tmp_path, code=2)
    assert "is not the published pretrain_base: its md5 begins" in text
    assert not list(tmp_path.iterdir())


def test_a_server_that_does_not_answer_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="cannot download"):
        get_weights("full_base", tmp_path, url="http://127.0.0.1:9/none.pth")
    with pytest.raises(UserError, match="no published weights 'huge'; known: pretrain_base"):
        get_weights("huge", tmp_path)


def test_the_catalogue_names_the_published_files():
    text = mae("weights", "list")
    assert "8cad7c" in text and "CC BY-NC" in text and "no commercial use" in text
    rows = {row["name"]: row for row in json.loads(mae("weights", "list", "--json"))}
    assert len(catalogue.OF_MAE) == 13 and rows["visualize_huge"]["target"] == "pixels"
    assert rows["full_large"]["target"] == "normalized_pixels" == rows["pretrain_huge"]["target"]
    assert all(rows[name]["url"].startswith(catalogue.BASE_URL) for name in catalogue.OF_MAE)
    assert "sha256 begins b5f2ef4d, Apache 2.0" in text and rows["moco_v3_base"]["licence"] == catalogue.LICENCE
    assert all(row["licence"] and row["content"] and row["url"].startswith("https://") for row in rows.values())
    assert "by hand from https://github.com/bytedance/ibot" in mae("weights", "get", "ibot_base", code=2)
