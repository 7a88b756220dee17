"""Pre-training beside a larger encoder: the distance of attention maps, its trainings, files and refusals."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from mae_core.config.load import load_config
from mae_core.config.schema import ConfigError
from mae_core.errors import UserError
from mae_core.masking import PatchMask
from mae_core.models.distillation import AttentionDistillation
from mae_core.models.encoder import ViTEncoder
from mae_core.models.mae import build_mae
from mae_core.training.memory import fixed_bytes
from mae_core.training.plan import print_plan
from mae_core.training.pretrain import build_pretrain_model, pretrain
from mae_core.training.pretrain_config import PretrainConfig
from mae_core.weights.encoder_file import EncoderInfo
from mae_core.weights.files import write_weights
from mae_core.weights.load import load_encoder, load_mae

STUDENT = {"width": 24, "depth": 2, "heads": 3, "patch_size": 8}
TEACHER = {"width": 32, "depth": 3, "heads": 2, "patch_size": 8}


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory):
    torch.manual_seed(3)
    encoder = ViTEncoder(TEACHER, image_size=32)
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    facts = EncoderInfo.of(encoder, mean=[0.3, 0.4, 0.5], std=[0.2] * 3)
    write_weights(path, encoder.state_dict(), facts.to_metadata())
    return path


@pytest.fixture
def config_of(tmp_path, write_images, pretrain_options, teacher_file):
    write_images(tmp_path / "images", 8)
    shape = [f"model.{name}={value}" for name, value in STUDENT.items()]
    plain = [word for word in pretrain_options if not word.startswith("model.")]
    known = [*plain, *shape, f"data.path={tmp_path / 'images'}", "data.image_size=32"]

    def make(*more: str, output: str = "run", teacher=teacher_file) -> PretrainConfig:
        asked = [] if teacher is None else [f"distill.teacher={teacher}"]
        return load_config(PretrainConfig, None, [*known, *asked, *more, f"output={tmp_path / output}"])

    return make


@pytest.mark.parametrize("blocks", [1, 2])
def test_the_distance_is_that_of_the_attention_maps_of_transformers(tmp_path, blocks):
    """Both encoders by transformers' ViTMAE; MAE-Lite's loss (arXiv 2205.14443) written out."""
    from transformers import ViTMAEConfig, ViTMAEModel

    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    hidden = torch.tensor([[1, 1, 0, 1, 1, 1, 0, 1, 1, 0, 1, 1, 1, 1, 1, 0]]).bool().repeat(2, 1)
    noise = torch.arange(16) / 16 + hidden
    maps, encoders = {}, {}
    for name, size in {"student": STUDENT, "teacher": TEACHER}.items():
        torch.manual_seed(len(name) + size["width"])
        shape = {"hidden_size": size["width"], "num_hidden_layers": size["depth"], "num_attention_heads": size["heads"]}
        more = {"intermediate_size": 4 * size["width"], "image_size": 32, "patch_size": 8, "initializer_range": 0.3}
        theirs = ViTMAEModel._from_config(ViTMAEConfig(**shape, **more), attn_implementation="eager").eval()
        theirs.save_pretrained(tmp_path / name)
        with torch.no_grad():
            maps[name] = theirs(images, noise=noise, output_attentions=True).attentions[-blocks:]
        encoders[name] = load_encoder(tmp_path / name)

    distil = AttentionDistillation(encoders["teacher"], encoders["student"], blocks=blocks, weight=0.7)
    mask = PatchMask.from_hidden(hidden)
    outputs = encoders["student"].visible_outputs(images, mask, distil.inputs_of(encoders["student"]))
    wanted = sum(
        ((torch.einsum("oi,bimn->bomn", mix.weight[:, :, 0, 0], ours) - theirs) ** 2).mean()
        for mix, ours, theirs in zip(distil.mix, maps["student"], maps["teacher"], strict=True)
    )
    found = distil(images, mask, encoders["student"], outputs)
    assert found > 1e-3
    torch.testing.assert_close(found, 0.7 * wanted, rtol=1e-5, atol=0)


def test_a_copy_of_the_student_is_no_distance_away():
    model = build_mae(STUDENT, image_size=32, decoder_width=16, decoder_depth=1, decoder_heads=2)
    teacher = ViTEncoder(STUDENT, image_size=32)
    teacher.load_state_dict(model.encoder.state_dict())
    model.distillation = AttentionDistillation(teacher, model.encoder, blocks=2)
    for mix in model.distillation.mix:
        torch.nn.init.dirac_(mix.weight)
    images = torch.randn(2, 3, 32, 32)
    assert model(images).distillation < 1e-12
    assert model.eval()(images).distillation is None, "which is of training alone"


def test_a_training_learns_the_teachers_attention_and_resumes_exactly(tmp_path, config_of):
    """Its files are those of any run: the teacher is in none of them."""
    longer = ("distill.weight=100", "optim.epochs=3", "optim.base_lr=0.1", "log.checkpoint_every=3")
    whole = config_of(*longer, output="whole")
    pretrain(whole)
    lines = [json.loads(line) for line in (whole.output / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "distillation" in line]
    assert steps[-1]["distillation"] < steps[0]["distillation"]
    for line in steps:
        assert line["loss"] == pytest.approx(line["reconstruction"] + line["distillation"], rel=1e-4)
    plain = config_of("optim.epochs=3", output="plain", teacher=None)
    pretrain(plain)
    files = [load_file(run.output / "encoder.safetensors") for run in (whole, plain)]
    assert files[0].keys() == files[1].keys()
    assert not torch.equal(files[0]["blocks.1.attn.qkv.weight"], files[1]["blocks.1.attn.qkv.weight"])

    cut = config_of(*longer, output="cut")
    shutil.copytree(whole.output, cut.output)
    (cut.output / "encoder.safetensors").unlink()
    shutil.rmtree(cut.output / "checkpoints" / "step_00000006")
    pretrain(cut, resume=True)
    for name, tensor in load_file(cut.output / "encoder.safetensors").items():
        assert torch.equal(tensor, files[0][name]), name

    assert load_mae(whole.output).distillation is None
    on = config_of(f"weights={whole.output}", output="on", teacher=None)
    pretrain(on)
    assert "distillation.mix.0.weight" in (on.output / "loading.json").read_text()


def test_a_teacher_of_other_statistics_and_patches_is_adapted(config_of, teacher_file):
    """It computes of an image what its file says, whatever numbers standardise the student's pixels."""
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def standardised(mean, std):
        return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]

    mean, std = [0.1, 0.2, 0.3], [0.4, 0.3, 0.2]
    model = build_pretrain_model(config_of(f"data.mean={mean}", f"data.std={std}"))
    with torch.no_grad():
        found = model.distillation.teacher.encode(standardised(mean, std))
        wanted = load_encoder(teacher_file).encode(standardised([0.3, 0.4, 0.5], [0.2] * 3))
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)
    numbers = {"data.mean": mean, "data.std": std, "model.patch_size": 4}
    small = build_pretrain_model(config_of(*(f"{name}={value}" for name, value in numbers.items())))
    assert small.distillation.teacher.grid.patch == 4


def test_the_plan_counts_the_teacher(config_of, capsys):
    print_plan(config_of())
    assert "teacher: " in capsys.readouterr().out
    numbers = ("data.mean=[0,0,0]", "data.std=[1,1,1]")
    models = [build_pretrain_model(config_of(*numbers)), build_pretrain_model(config_of(*numbers, teacher=None))]
    teacher = sum(parameter.numel() * 4 for parameter in models[0].distillation.teacher.parameters())
    mixed = sum(parameter.numel() * 16 for parameter in models[0].distillation.parameters())
    assert fixed_bytes(models[0]) - fixed_bytes(models[1]) == teacher + mixed


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("distill.blocks=3",), "distill.blocks=3, but one of teacher and model has 2 blocks; lower it"),
        (("model.cls_token=false",), "choose another teacher"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(config_of, options, words):
    with pytest.raises(UserError, match=words):
        build_pretrain_model(config_of("data.mean=[0,0,0]", "data.std=[1,1,1]", *options))


def test_a_teacher_that_is_no_encoder_is_refused(tmp_path, config_of):
    with pytest.raises(UserError, match="does not exist"):
        pretrain(config_of(teacher=tmp_path / "none.safetensors"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("masking.mask_tokens_in_encoder=true",), "leave one of them out"),
        (("distributed=fsdp",), "set distributed=ddp"),
    ],
)
def test_options_that_exclude_a_teacher_are_refused(config_of, options, words):
    with pytest.raises(ConfigError, match=words):
        config_of(*options)
    assert config_of(*options, teacher=None).distill.teacher is None, "as the message advises"


def test_options_of_distillation_without_a_teacher_are_refused(config_of):
    with pytest.raises(ConfigError, match=r"distill\.teacher=FILE"):
        config_of("distill.blocks=2", teacher=None)
