"""The number format of a run, chosen for its device and printed with the reason; settings made once at its start."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from mae_core.errors import UserError, first_line

CPU_FLAGS = ("amx_bf16", "avx512_bf16")
"""Instructions that multiply bfloat16, as Linux names them. Without them bf16 is emulated: several times slower."""
LARGEST_ERROR = 2e-6
"""Relative error that a float32 product of a few hundred terms stays below; with bfloat16 inside it is about 3e-3."""
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


class Precision(NamedTuple):
    """dtype: that of the forward pass; reason: why, to be printed."""

    dtype: torch.dtype
    reason: str

    @property
    def mixed(self) -> bool:
        """Whether products are computed in less than float32."""
        return self.dtype != torch.float32

    def autocast(self, device: torch.device) -> torch.autocast:
        """A context for a forward pass."""
        return torch.autocast(device.type, self.dtype, enabled=self.mixed)

    def __str__(self) -> str:
        return f"{'bf16' if self.mixed else 'fp32'} ({self.reason})"


def choose_precision(wanted: str, device: torch.device) -> Precision:
    """``auto``: bf16 where the device multiplies it, else fp32; ``bf16``, ``fp32`` and ``tf32`` (fp32, whose products a
    GPU may round to TF32) as asked."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        has_it = torch.cuda.is_bf16_supported(including_emulation=False)
        found = "this GPU has it" if has_it else "this GPU has no bf16"
    else:
        flag = cpu_flag()
        has_it = flag is not None
        found = f"this CPU has {flag}" if has_it else f"this CPU has neither {' nor '.join(CPU_FLAGS)}"
    if wanted == "auto":
        return Precision(torch.bfloat16 if has_it else torch.float32, found)
    if wanted == "bf16":
        slow = "" if has_it else f", but {found}: it is emulated and slower than fp32"
        return Precision(torch.bfloat16, f"asked for{slow}")
    return Precision(torch.float32, "asked for" if wanted == "fp32" else "with TF32 products on a GPU, asked for")


def cpu_flag(info: str | None = None) -> str | None:
    """The best of ``CPU_FLAGS`` in a text like /proc/cpuinfo, which is read when None; None where there is none."""
    flags = _said_of_cpu("flags", info)
    return next((flag for flag in CPU_FLAGS if flag in flags), None)


def is_amd(info: str | None = None) -> bool:
    """Whether a text like /proc/cpuinfo, which is read when None, is of a CPU of AMD's."""
    return "AuthenticAMD" in _said_of_cpu("vendor_id", info)


def _said_of_cpu(what: str, info: str | None) -> set[str]:
    """The words of the lines that begin with ``what``; none on systems that do not tell."""
    if info is None:
        try:
            info = Path("/proc/cpuinfo").read_text()
        except OSError:
            return set()
    return {word for line in info.splitlines() if line.startswith(what) for word in line.split()}


def prepare_process(device: torch.device, wanted: str = "auto") -> None:
    """Set what makes this process fast on ``device`` and changes no result beyond the rounding of float32."""
    torch.set_float32_matmul_precision("high" if wanted == "tf32" and device.type == "cuda" else "highest")
    if device.type == "cpu":
        if is_amd():
            _multiply_by_onednn()
        keep_pages()


def _multiply_by_onednn() -> None:
    """float32 products by oneDNN where torch offers it: 1.2 to 1.7 times as fast on AMD's CPUs, where MKL is slow. On
    Intel's MKL is ahead, up to twice in the gradients of a linear layer. Chosen by the maker and not by the clock, so
    that a resumed run computes what the run did.

    What torch calls "medium" permits bfloat16 inside, but oneDNN makes use of that on AMX alone: one product shows it,
    and there it is taken back.
    """
    a, b = torch.randn(2, 512, 512, generator=torch.Generator().manual_seed(0))
    exact = a.double() @ b.double()
    torch.set_float32_matmul_precision("medium")
    if float((a @ b - exact).norm() / exact.norm()) > LARGEST_ERROR:
        torch.set_float32_matmul_precision("highest")


def check_compiler(device: torch.device) -> None:
    """Raise ``UserError`` where torch cannot compile for ``device``: it lacks a compiler, or triton."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:  # of the compiler, of its process, of the loader
        raise UserError(
            f"model.compile=true, but torch cannot compile here ({first_line(error)[:200]}); install a C++ compiler "
            "such as g++ (on a GPU triton too), or set model.compile=false"
        ) from None


def keep_pages() -> bool:
    """Have glibc keep freed memory for the next step, which otherwise starts by clearing every page again; whether it
    does. Other systems and allocators are left as they are."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        set_option = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(set_option(M_MMAP_MAX, 0) and set_option(M_TRIM_THRESHOLD, 2**31 - 1))
