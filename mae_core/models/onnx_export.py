"""An encoder as ONNX, compared with torch before it is kept."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mae_core.atomic import atomic_path
from mae_core.errors import UserError

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
ONNX_TOLERANCE = 1e-4


def require_onnx() -> None:
    """Raise ``UserError``, with the line that installs them, where packages of the ONNX export are missing."""
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"ONNX needs {', '.join(missing)}; install them with pip install 'mae-transfer[onnx]'")


def export_onnx(encoder: nn.Module, example: Tensor, path: Path) -> float:
    """Write ``encoder.encode`` as ONNX, any batch size, and return its largest difference from torch, measured with
    onnxruntime on images of another batch size.

    Raises ``UserError`` where the packages are missing, ``path`` exists, or the difference is above 1e-4: then nothing
    is written.
    """
    require_onnx()
    if path.exists():
        raise UserError(f"{path} exists; choose another --out")
    wrapped = _Encode(encoder).eval()
    with atomic_path(path) as temporary:
        any_batch = {"images": {0: torch.export.Dim("batch", min=1)}}
        program = onnx_program(wrapped, example, ["tokens"], dynamic_shapes=any_batch)
        program.save(str(temporary), external_data=False)
        images = torch.cat([example, example.flip(0) * 0.5, example[:1] * 2])
        with torch.no_grad():
            expected = wrapped(images)
        difference = float((run_onnx(temporary, "tokens", images) - expected).abs().max())
        if difference > ONNX_TOLERANCE:
            raise UserError(f"the ONNX model differs by {difference:.1e} from torch's, more than {ONNX_TOLERANCE:g}")
    return difference


def onnx_program(model: nn.Module, example: Tensor, outputs: Sequence[str], **options: Any) -> Any:
    """The ONNX program of ``model`` on images like ``example``; ``options``: what else ``torch.onnx.export`` takes."""
    names = {"input_names": ["images"], "output_names": list(outputs)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(model, (example,), dynamo=True, verbose=False, **names, **options)
    assert program is not None
    return program


def run_onnx(path: Path, output: str, images: Tensor) -> Tensor:
    """One output of an ONNX file on images (B, C, H, W), by onnxruntime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run([output], {"images": images.numpy()})[0])


class _Encode(nn.Module):
    """``encode`` as a forward pass."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 1 + N, D)."""
        return self.encoder.forward_features(images)
