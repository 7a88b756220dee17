"""An encoder as ONNX, compared with torch before it is kept."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

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
    import onnxruntime

    wrapped = _Encode(encoder).eval()
    with atomic_path(path) as temporary:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                wrapped,
                (example,),
                dynamo=True,
                input_names=["images"],
                output_names=["tokens"],
                dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}},
                verbose=False,
            )
            assert program is not None
            program.save(str(temporary), external_data=False)
        images = torch.cat([example, example.flip(0) * 0.5, example[:1] * 2])
        with torch.no_grad():
            expected = wrapped(images)
        session = onnxruntime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])
        (tokens,) = session.run(["tokens"], {"images": images.numpy()})
        difference = float((torch.from_numpy(tokens) - expected).abs().max())
        if difference > ONNX_TOLERANCE:
            raise UserError(f"the ONNX model differs by {difference:.1e} from torch's, more than {ONNX_TOLERANCE:g}")
    return difference


class _Encode(nn.Module):
    """``encode`` as a forward pass."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 1 + N, D)."""
        return self.encoder.forward_features(images)
