"""Write a trained detector for other programs.

    python transfer/detection/export.py runs/detector --out detector.onnx [--size HEIGHT WIDTH] [--half]

ONNX for images of one size: pixels (RGB, 0 to 255) in; boxes, scores, labels and masks out, best first, after
suppression, thresholds as in the training. It is run on images beside the original before it is kept, and the largest
difference is printed.

What the file lacks: resizing (an image must be resized to the size, and the boxes scaled back), several images at once,
and pasting masks into the image. Detectors of engine detectron2 are exported where torchvision has their network.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mae_core.atomic import atomic_path
from mae_core.errors import UserError, user_errors
from mae_core.models.exporting import check_out, round_weights, save_onnx
from mae_core.patches import as_pair
from transfer.detection.detector import Detector, load_detector

TOLERANCE = 1e-3
"""The largest difference of boxes (in pixels), scores and masks that an export may show."""
OPSET = 17
TRIES = 3


class OneImage(nn.Module):
    """A detector of the torchvision engine from pixels to what it finds, for one image that fills its canvas."""

    def __init__(self, detector: Detector, size: tuple[int, int]) -> None:
        super().__init__()
        self.network, self.size = detector.model, size
        for name, values in detector.statistics._asdict().items():
            self.register_buffer(name, 255 * torch.tensor(values)[:, None, None])
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """(1, C, H, W), 0 to 255 -> boxes (n, 4), scores (n,), labels (n,) and, with a mask head, masks (n, 28, 28)."""
        (found,) = self.network((images - self.mean) / self.std, [self.size])
        return tuple(found[name] for name in ("boxes", "scores", "labels", "masks") if name in found)


class _GroupNorm(nn.Module):
    """A group norm that onnxruntime runs on no region at all, as where nothing is found: the exporter writes torch's
    own with a size that is to be inferred of an empty tensor."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, maps: Tensor) -> Tensor:
        """(n, C, H, W) -> the same shape."""
        _, C, H, W = (int(side) for side in maps.shape)
        groups = maps.reshape(-1, self.norm.num_groups, C // self.norm.num_groups * H * W)
        centred = groups - groups.mean(dim=2, keepdim=True)
        scaled = centred * torch.rsqrt(centred.square().mean(dim=2, keepdim=True) + self.norm.eps)
        weight, bias = self.norm.weight[:, None, None], self.norm.bias[:, None, None]
        return scaled.reshape(-1, C, H, W) * weight + bias


def _without_group_norms(network: nn.Module) -> None:
    """Replace every ``nn.GroupNorm`` by one that computes the same."""
    for owner in list(network.modules()):
        for name, child in list(owner.named_children()):
            if isinstance(child, nn.GroupNorm) and not isinstance(owner, _GroupNorm):
                setattr(owner, name, _GroupNorm(child))


def export(weights: Path | str, out: Path | str, *, size: Sequence[int] | None = None, half: bool = False) -> str:
    """Write the detector of a run or file as ONNX -> a line with the parity, by onnxruntime.

    ``images`` (1, C, H, W) float32, RGB, 0 to 255 -> ``boxes`` (n, 4) float32, x1 y1 x2 y2 in the image's pixels,
    ``scores`` (n,), ``labels`` (n,) int64 from 1, and ``masks`` (n, 28, 28) in 0..1 over their boxes. The categories
    are metadata.

    size  (height, width) of the images; the canvas of the training by default
    half  store weights in 16 bits: half the file; the computation stays in 32

    Raises ``UserError`` for an ``out`` that exists or does not end in .onnx, missing packages, a network that
    torchvision does not have, and outputs that differ from torch's: nothing is written then.
    """
    out = Path(out)
    check_out(out, ".onnx")
    if size is not None and min(size) < 1:
        raise UserError(f"--size is {size[0]} {size[1]}; give two positive numbers")
    # TorchScript's exporter has torchvision's operators; the newer one has no suppression.
    detector = load_detector(weights, device="cpu", overrides=["engine=torchvision", "precision=fp32"])
    height, width = as_pair(detector.config.data.image_size) if size is None else (size[0], size[1])
    if half:
        round_weights(detector.model)
    _without_group_norms(detector.model)
    model = OneImage(detector, (height, width))
    outputs = ["boxes", "scores", "labels", *(["masks"] if "masks" in detector.head.outputs else [])]
    channels = len(detector.statistics.mean)
    images = 255 * torch.rand((1 + TRIES, 1, channels, height, width), generator=torch.Generator().manual_seed(0))
    facts = {"categories": [list(category) for category in detector.categories]}
    with atomic_path(out) as temporary:
        _write(model, images[0], temporary, outputs, facts, half)
        found = max(_difference(model, temporary, _smooth(image)) for image in images[1:])
        if not found <= TOLERANCE:
            raise UserError(f"the exported detector differs from torch's by {found:.1e}, so nothing was written")
    written = f"wrote {out} for images of {height}x{width}: {', '.join(outputs)}"
    return f"{written}; they differ from torch's by {found:.1e} at most"


def _smooth(images: Tensor) -> Tensor:
    """Coarse patches in place of single pixels, where a detector finds more."""
    coarse = nn.functional.avg_pool2d(images, 8, ceil_mode=True)
    return nn.functional.interpolate(255 * (coarse > coarse.mean()).float(), size=images.shape[-2:])


def _write(
    model: OneImage, example: Tensor, path: Path, outputs: Sequence[str], facts: dict[str, Any], half: bool
) -> None:
    import onnx

    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (example,),
            str(path),
            dynamo=False,
            opset_version=OPSET,
            input_names=["images"],
            output_names=list(outputs),
        )
    save_onnx(onnx.load(str(path)), path, facts, half)


def _difference(model: OneImage, path: Path, images: Tensor) -> float:
    """The largest difference between an object that one finds and the nearest that the other finds, in any output;
    infinite where another number is found. Objects of equal scores may stand in another order."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = [torch.from_numpy(values) for values in session.run(None, {"images": images.numpy()})]
    with torch.no_grad():
        expected = model(images)
    if [values.shape for values in found] != [values.shape for values in expected]:
        return float("inf")
    if not len(expected[0]):
        return 0.0
    ours, theirs = (
        torch.cat([x.reshape(len(x), -1).double() for x in outputs], dim=1) for outputs in (found, expected)
    )
    distances = torch.cdist(ours, theirs, p=float("inf"))
    return max(float(distances.amin(dim=side).max()) for side in (0, 1))


def main(arguments: Sequence[str] | None = None, prog: str = "export.py") -> None:
    """The command; exits with code 2 on a mistake of the user's."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("detector", type=Path, metavar="DETECTOR", help="a run directory, or its detector.safetensors")
    add("--out", type=Path, required=True, metavar="FILE", help="the new file, which ends in .onnx")
    add("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="of the images; the training's canvas otherwise")
    add("--half", action="store_true", help="store weights in 16 bits: half the file, computed in 32 bits")
    given = parser.parse_args(arguments)
    with user_errors():
        print(export(given.detector, given.out, size=given.size, half=given.half))


if __name__ == "__main__":
    main()
