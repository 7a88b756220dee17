"""What a run computes in: chosen by the hardware, said with the reason, exact to resume; what a run's start sets."""

from __future__ import annotations

import importlib
import json
import shutil

import pytest
import torch

from mae_core.config.load import load_config
from mae_core.training import precision
from mae_core.training.precision import CPU_FLAGS, LARGEST_ERROR, choose_precision, keep_pages, prepare_process
from mae_core.training.pretrain import pretrain
from mae_core.training.pretrain_config import PretrainConfig

CPU, GPU = torch.device("cpu"), torch.device("cuda")
read_flag = importlib.util.spec_from_file_location("precision_of_its_own", precision.__file__)
FLAGS = "processor\t: 0\nmodel name\t: avx512_bf16 in a name\nflags\t\t: fpu sse2 {}\nbugs\t\t: amx_bf16\n"


@pytest.mark.parametrize(
    "text, flag",
    [
        (FLAGS.format("avx512f avx512_bf16"), "avx512_bf16"),
        (FLAGS.format("avx512_bf16 amx_tile amx_bf16"), "amx_bf16"),
        (FLAGS.format("avx2 avx512_bf16x"), None),
        ("", None),
    ],
)
def test_the_flags_of_a_cpu(text, flag):
    fresh = importlib.util.module_from_spec(read_flag)  # the suite's own has been given a CPU without bf16
    read_flag.loader.exec_module(fresh)
    assert fresh.cpu_flag(text) == flag


@pytest.mark.parametrize("flag", [*CPU_FLAGS, None])
def test_auto_takes_what_the_cpu_has_and_says_why(monkeypatch, flag):
    monkeypatch.setattr(precision, "cpu_flag", lambda: flag)
    auto = choose_precision("auto", CPU)
    assert auto.dtype == (torch.bfloat16 if flag else torch.float32)
    wanted = f"bf16 (this CPU has {flag})" if flag else "fp32 (this CPU has neither amx_bf16 nor avx512_bf16)"
    assert str(auto) == wanted
    assert choose_precision("fp32", CPU).dtype == choose_precision("tf32", CPU).dtype == torch.float32
    asked = choose_precision("bf16", CPU)
    assert asked.dtype == torch.bfloat16 and ("emulated" in asked.reason) == (flag is None)


@pytest.mark.parametrize("has_it", [True, False])
def test_auto_takes_what_the_gpu_has(monkeypatch, has_it):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_it)
    assert choose_precision("auto", GPU).mixed == has_it
    assert choose_precision("bf16", GPU).mixed


@pytest.mark.parametrize("maker, amd", [("AuthenticAMD", True), ("GenuineIntel", False)])
def test_the_maker_of_a_cpu(maker, amd):
    assert precision.is_amd(f"processor\t: 0\nvendor_id\t: {maker}\nmodel name\t: AuthenticAMD's\n") == amd


def test_products_stay_float32(monkeypatch):
    """On Intel's CPUs by torch's own means; elsewhere whatever it makes of "medium" here, and where that is bfloat16,
    it is taken back."""
    before = torch.get_float32_matmul_precision()
    a, b = torch.randn(2, 300, 300)
    monkeypatch.setattr(precision, "is_amd", lambda: False)
    try:
        prepare_process(CPU)
        assert torch.get_float32_matmul_precision() == "highest"
        monkeypatch.setattr(precision, "is_amd", lambda: True)
        prepare_process(CPU)
        exact = a.double() @ b.double()
        assert (a @ b - exact).norm() / exact.norm() < LARGEST_ERROR
        monkeypatch.setattr(precision, "LARGEST_ERROR", 0.0)  # as if this one were an AMX machine's
        prepare_process(CPU)
        assert torch.get_float32_matmul_precision() == "highest"
        for wanted, set_to in (("tf32", "high"), ("auto", "highest")):
            prepare_process(GPU, wanted)
            assert torch.get_float32_matmul_precision() == set_to
    finally:
        torch.set_float32_matmul_precision(before)


def test_an_allocator_that_is_not_glibcs_is_left_alone(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(precision.ctypes, "CDLL", missing)
    assert keep_pages() is False
    monkeypatch.setattr(precision.sys, "platform", "darwin")
    assert keep_pages() is False


def test_a_run_in_bf16_says_so_and_resumes_to_the_bit(tmp_path, monkeypatch, capsys, write_images, pretrain_options):
    monkeypatch.setattr(precision, "cpu_flag", lambda: "avx512_bf16")
    write_images(tmp_path / "images", 8)
    options = [*pretrain_options, f"data.path={tmp_path / 'images'}", "optim.epochs=3", "log.checkpoint_every=2"]

    def run(name, *more, resume=False):
        pretrain(load_config(PretrainConfig, None, [*options, f"output={tmp_path / name}", *more]), resume=resume)
        return tmp_path / name

    whole = run("whole")
    assert "precision: bf16 (this CPU has avx512_bf16)" in capsys.readouterr().out
    assert json.loads((whole / "environment.json").read_text())["precision"].startswith("bf16")
    broken = tmp_path / "broken"
    shutil.copytree(whole, broken)
    text = (broken / "config.yaml").read_text().replace(str(whole), str(broken))
    (broken / "config.yaml").write_text(text)
    shutil.rmtree(broken / "checkpoints" / "step_00000006")
    (broken / "encoder.safetensors").unlink()
    run("broken", resume=True)
    assert (broken / "encoder.safetensors").read_bytes() == (whole / "encoder.safetensors").read_bytes()
    full = run("full", "precision=fp32")
    assert (full / "encoder.safetensors").read_bytes() != (whole / "encoder.safetensors").read_bytes()
