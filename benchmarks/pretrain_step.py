"""One pre-training step (forward, backward, AdamW), ours beside others, in turns.

    python -m benchmarks.pretrain_step --cases tiny96 base224 --dtypes fp32 bf16 --out benchmarks/results/pretrain_step
    python -m benchmarks.pretrain_step --cases tiny96 --official ~/mae    # beside your checkout of the authors' code
    python -m benchmarks.pretrain_step --cases base224 --mmpretrain ~/mmpretrain

``ours`` is set up as ``mae pretrain`` does; ``timm`` is a MAE of timm's blocks and ``transformers`` is ViTMAE, as
anyone would use them. ``official`` is a checkout of facebookresearch/mae: its models on blocks that multiply out
attention, as the timm 0.3.2 that it names. ``mmpretrain`` is a checkout of open-mmlab/mmpretrain, of which only the
files of its MAE are imported; they need mmcv, mmengine and einops. How it is measured: ``benchmarks.side_by_side``.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import types
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm.models.vision_transformer as timm_vit
import torch
from torch import Tensor, nn

from benchmarks.side_by_side import (
    DTYPES,
    MATMUL,
    Contestant,
    Prepared,
    compare,
    counted,
    machine_lines,
    matmul,
    new_results,
    parser_of,
    serve,
    table,
    write_results,
)
from mae_core import build_mae
from mae_core.models.sizes import size_of
from mae_core.models.timm_trunk import compile_blocks
from mae_core.patches import patchify
from mae_core.pos_embed import sincos_2d
from mae_core.training.precision import choose_precision, prepare_process


@dataclass(frozen=True)
class Case:
    """What is trained, and how many images a step."""

    size: str
    image: int
    patch: int
    decoder: tuple[int, int, int]
    """Width, depth, heads."""
    batch: int


CASES = {
    "base224": Case("base", 224, 16, (512, 8, 16), 16),
    "large224": Case("large", 224, 16, (512, 8, 16), 8),
    "tiny96": Case("tiny", 96, 8, (128, 4, 4), 64),
    "nano32": Case("nano", 32, 8, (32, 1, 2), 2),
}
"""``nano32`` is for the test of this file."""
LossOf = Callable[[Tensor], Tensor]


class PlainMAE(nn.Module):
    """The masked autoencoder as its paper describes it, of timm's own blocks: all that everyone writes, no more."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        shape, (width, depth, heads) = size_of(case.size), case.decoder
        side, self.patch = case.image // case.patch, case.patch
        self.embed = timm_vit.PatchEmbed(case.image, case.patch, 3, shape.width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, shape.width))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("positions", sincos_2d(shape.width, side, side))
        self.register_buffer("decoder_positions", sincos_2d(width, side, side))
        self.blocks = nn.Sequential(
            *(timm_vit.Block(shape.width, shape.heads, qkv_bias=True) for _ in range(shape.depth))
        )
        self.norm, self.decoder_embed = nn.LayerNorm(shape.width), nn.Linear(shape.width, width)
        self.decoder_blocks = nn.Sequential(*(timm_vit.Block(width, heads, qkv_bias=True) for _ in range(depth)))
        self.decoder_norm, self.head = nn.LayerNorm(width), nn.Linear(width, case.patch**2 * 3)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> the loss at a mask ratio of 0.75."""
        x = self.embed(images) + self.positions[:, 1:]
        B, N, D = x.shape
        order = torch.rand(B, N, device=x.device).argsort(dim=1)
        back, keep = order.argsort(dim=1), order[:, : N // 4]
        x = x.gather(1, keep[:, :, None].expand(-1, -1, D))
        x = torch.cat([(self.cls_token + self.positions[:, :1]).expand(B, -1, -1), x], dim=1)
        x = self.decoder_embed(self.norm(self.blocks(x)))
        hidden = self.mask_token.to(x.dtype).expand(B, N - keep.shape[1], -1)
        whole = torch.cat([x[:, 1:], hidden], dim=1).gather(1, back[:, :, None].expand(-1, -1, x.shape[2]))
        x = torch.cat([x[:, :1], whole], dim=1) + self.decoder_positions
        predicted = self.head(self.decoder_norm(self.decoder_blocks(x)))[:, 1:]
        truth = patchify(images, self.patch)
        truth = (truth - truth.mean(-1, keepdim=True)) / (truth.var(-1, keepdim=True) + 1e-6).sqrt()
        mask = torch.ones(B, N, device=x.device).scatter(1, keep, 0.0)
        return ((predicted - truth).square().mean(-1) * mask).sum() / mask.sum()


def ours(case: Case, _: argparse.Namespace) -> tuple[nn.Module, LossOf]:
    """This project, as ``mae pretrain`` runs it: masks come with the images, as its loader draws them."""
    width, depth, heads = case.decoder
    model = build_mae(
        case.size,
        image_size=case.image,
        patch_size=case.patch,
        decoder_width=width,
        decoder_depth=depth,
        decoder_heads=heads,
    )
    mask = model.masker(case.batch, model.encoder.grid, None)
    return model, lambda images: model(images, mask=mask.to(images.device), predict_visible=False).loss


def timm_blocks(case: Case, _: argparse.Namespace) -> tuple[nn.Module, LossOf]:
    """``PlainMAE``."""
    model = PlainMAE(case)
    return model, model


def transformers(case: Case, _: argparse.Namespace) -> tuple[nn.Module, LossOf]:
    """Hugging Face's ViTMAE."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    shape, (width, depth, heads) = size_of(case.size), case.decoder
    model = ViTMAEForPreTraining(
        ViTMAEConfig(
            hidden_size=shape.width,
            num_hidden_layers=shape.depth,
            num_attention_heads=shape.heads,
            intermediate_size=4 * shape.width,
            image_size=case.image,
            patch_size=case.patch,
            decoder_hidden_size=width,
            decoder_num_hidden_layers=depth,
            decoder_num_attention_heads=heads,
            decoder_intermediate_size=4 * width,
            norm_pix_loss=True,
        )
    )
    return model, lambda images: model(images).loss


def official(case: Case, given: argparse.Namespace) -> tuple[nn.Module, LossOf]:
    """facebookresearch/mae from the user's checkout, on stand-ins for what today's timm and numpy lack."""
    sys.path.insert(0, str(given.official))
    np.float = float  # type: ignore[attr-defined]

    class Block(timm_vit.Block):
        def __init__(self, *args: Any, qk_scale: None = None, **options: Any) -> None:
            super().__init__(*args, **options)
            self.attn.fused_attn = False

    before, timm_vit.Block = timm_vit.Block, Block  # type: ignore[misc]
    try:
        from models_mae import MaskedAutoencoderViT
    finally:
        timm_vit.Block = before  # type: ignore[misc]
    shape, (width, depth, heads) = size_of(case.size), case.decoder
    model = MaskedAutoencoderViT(
        img_size=case.image,
        patch_size=case.patch,
        embed_dim=shape.width,
        depth=shape.depth,
        num_heads=shape.heads,
        decoder_embed_dim=width,
        decoder_depth=depth,
        decoder_num_heads=heads,
        norm_pix_loss=True,
    )
    return model, lambda images: model(images)[0]


def mmpretrain(case: Case, given: argparse.Namespace) -> tuple[nn.Module, LossOf]:
    """open-mmlab/mmpretrain from the user's checkout. Its packages import all that they hold, much of it for other
    versions of other libraries; here they are empty, and the files of the MAE are imported one by one."""
    sys.path.insert(0, str(given.mmpretrain))
    for name in ("", *(f".models{part}" for part in ("", ".backbones", ".selfsup", ".necks", ".heads", ".losses"))):
        package = types.ModuleType(f"mmpretrain{name}")
        package.__path__ = [str(given.mmpretrain.joinpath(*package.__name__.split(".")))]
        sys.modules[package.__name__] = package
    trunk = importlib.import_module("mmpretrain.models.backbones.vision_transformer").VisionTransformer
    for name in ("VisionTransformer", "HiViT"):  # of the second there is only the name, which its mae.py asks for
        setattr(sys.modules["mmpretrain.models"], name, trunk)
    for name in ("selfsup.mae", "necks.mae_neck", "heads.mae_head", "losses.reconstruction_loss"):
        importlib.import_module(f"mmpretrain.models.{name}")
    from mmpretrain.registry import MODELS

    shape, (width, depth, heads) = size_of(case.size), case.decoder
    trunk_shape = {"embed_dims": shape.width, "num_layers": shape.depth, "num_heads": shape.heads}
    trunk_shape["feedforward_channels"] = 4 * shape.width
    sides = {"patch_size": case.patch}
    decoder = {"decoder_embed_dim": width, "decoder_depth": depth, "decoder_num_heads": heads}
    loss = {"type": "PixelReconstructionLoss", "criterion": "L2"}
    model = MODELS.build(
        {
            "type": "MAE",
            "backbone": {"type": "MAEViT", "arch": trunk_shape, "img_size": case.image, **sides},
            "neck": {
                "type": "MAEPretrainDecoder",
                "num_patches": (case.image // case.patch) ** 2,
                "embed_dim": shape.width,
                **sides,
                **decoder,
            },
            "head": {"type": "MAEPretrainHead", "norm_pix": True, "loss": loss, **sides},
        }
    )
    return model, lambda images: model.loss(images, [])["loss"]


CONTESTANTS = {
    "ours": ours,
    "timm": timm_blocks,
    "transformers": transformers,
    "official": official,
    "mmpretrain": mmpretrain,
}
CHECKOUTS = ("official", "mmpretrain")
"""Contestants that are the user's own checkouts, each given by an option of its name."""


def train_step(
    name: str,
    case: Case,
    dtype: torch.dtype,
    device: torch.device,
    given: argparse.Namespace,
    *,
    compiled: bool = False,
) -> Callable[[], Tensor]:
    """A contestant's step on one batch of noise, as the one who measures calls it; it returns the loss."""
    with device:  # initialised there: on a CPU that takes longer than the step
        model, loss_of = CONTESTANTS[name](case, given)
    model.to(device).train()
    fused = {"fused": True} if name == "ours" else {}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, **fused)
    images = torch.randn(case.batch, 3, case.image, case.image, device=device)
    if compiled and name == "ours":
        compile_blocks(model)
    elif compiled:
        loss_of = torch.compile(loss_of)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = loss_of(images)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def work(given: argparse.Namespace) -> None:
    """A contestant's process."""
    case, dtype, device = CASES[given.cases[0]], DTYPES[given.dtypes[0]], torch.device(given.device)
    torch.manual_seed(0)
    if given.worker in ("ours", MATMUL):
        prepare_process(device)

    def prepare() -> Prepared:
        if given.worker == MATMUL:
            return matmul(dtype, device)
        step = train_step(given.worker, case, dtype, device, given)
        return Prepared(step, lambda: counted(step))

    serve(prepare, device)


def contestant(name: str, case: str, dtype: str, given: argparse.Namespace) -> Contestant:
    """A process of ``work``."""
    command = [sys.executable, "-m", "benchmarks.pretrain_step", "--worker", name, "--cases", case, "--dtypes", dtype]
    command += ["--device", given.device]
    for option in CHECKOUTS:
        if path := getattr(given, option):
            command += [f"--{option}", str(path)]
    return Contestant(name, command, None if name == MATMUL else CASES[case].batch)


def page(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = ["# A pre-training step", "", *machine_lines(results["machine"])]
    for entry in results["measured"]:
        lines += table(f"{entry['case']}, {entry['dtype']}", entry, "ours")
    return "\n".join([*lines, *defaults(results["measured"])])


def defaults(measured: list[dict[str, Any]]) -> list[str]:
    """Ours as it chooses its precision here, beside the others in float32."""
    mine = "bf16" if choose_precision("auto", torch.device("cpu")).mixed else "fp32"
    by_place = {(entry["case"], entry["dtype"]): entry["contestants"] for entry in measured}
    lines = []
    for case in {entry["case"]: None for entry in measured}:
        if {(case, mine), (case, "fp32")} <= by_place.keys() and "ours" in by_place[case, mine]:
            ours_takes = by_place[case, mine]["ours"]["seconds"]
            others = {n: row["seconds"] for n, row in by_place[case, "fp32"].items() if n not in ("ours", MATMUL)}
            texts = ", ".join(f"{name} {seconds / ours_takes:.2f}" for name, seconds in others.items())
            lines.append(f"Default against default, {case} (ours {mine}, theirs fp32), ours is faster by: {texts}.\n")
    return lines


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = parser_of(__doc__)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=["tiny96", "base224"])
    parser.add_argument("--official", type=Path, help="a checkout of facebookresearch/mae")
    parser.add_argument("--mmpretrain", type=Path, help="a checkout of open-mmlab/mmpretrain")
    parser.add_argument("--only", nargs="+", choices=list(CONTESTANTS), help="beside ours")
    given = parser.parse_args(arguments)
    if given.worker:
        work(given)
        return
    absent = [name for name in CHECKOUTS if not getattr(given, name)]
    others = [name for name in given.only or CONTESTANTS if name not in ("ours", *absent)]
    results = new_results(given)
    deadline = time.monotonic() + 60 * given.minutes
    for case in given.cases:
        for dtype in given.dtypes:
            if time.monotonic() > deadline:
                break
            contestants = [contestant(name, case, dtype, given) for name in (MATMUL, "ours", *others)]
            found = compare(contestants, rounds=given.rounds, deadline=deadline)
            results["measured"].append({"case": case, **asdict(CASES[case]), "dtype": dtype, **found})
            write_results(results, given.out)
    print(page(results))


if __name__ == "__main__":
    main()
