"""One pre-training step (forward, backward, AdamW), ours beside others, in turns.

    python -m benchmarks.pretrain_step --cases tiny96 base224 --dtypes fp32 bf16 --out benchmarks/results/pretrain_step
    python -m benchmarks.pretrain_step --cases tiny96 --official ~/mae    # beside your checkout of the authors' code

Each contestant lives in a process of its own and takes a step when it is its turn, round after round: what else the
machine does meets all of them alike, and what one sets for its process (allocator, oneDNN) helps no other. ``ours``
is set up as ``mae pretrain`` does; ``timm`` is a MAE of timm's blocks and ``transformers`` is ViTMAE, as anyone would
use them. ``official`` is a checkout of facebookresearch/mae: its models on blocks that multiply out attention, as the
timm 0.3.2 that it names. Peak memory is that of a process above what it held before it built its model. Writes
``OUT.json``, a case and dtype at a time, and ``OUT.md``.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm.models.vision_transformer as timm_vit
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mae_core import build_mae
from mae_core.atomic import write_json, write_text
from mae_core.models.sizes import size_of
from mae_core.patches import patchify
from mae_core.pos_embed import sincos_2d
from mae_core.training.precision import choose_precision, prepare_process
from mae_core.training.run import environment

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MATMUL = "matmul"
SIDE = 2048
"""The peak is measured with square matrices of this side."""


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
        order = torch.rand(B, N).argsort(dim=1)
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
        mask = torch.ones(B, N).scatter(1, keep, 0.0)
        return ((predicted - truth).square().mean(-1) * mask).sum() / mask.sum()


def ours(case: Case, _: argparse.Namespace) -> tuple[nn.Module, LossOf]:
    """This project, as ``mae pretrain`` runs it."""
    prepare_process(torch.device("cpu"))
    width, depth, heads = case.decoder
    model = build_mae(
        case.size,
        image_size=case.image,
        patch_size=case.patch,
        decoder_width=width,
        decoder_depth=depth,
        decoder_heads=heads,
    )
    return model, lambda images: model(images, predict_visible=False).loss


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


CONTESTANTS = {"ours": ours, "timm": timm_blocks, "transformers": transformers, "official": official}


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def work(given: argparse.Namespace) -> None:
    """A contestant: a step for each line that comes in, and what it took; its cost once there are no more."""
    case, dtype = CASES[given.cases[0]], DTYPES[given.dtypes[0]]
    torch.manual_seed(0)
    if given.worker == MATMUL:
        prepare_process(torch.device("cpu"))
        a, b = torch.randn(2, SIDE, SIDE).to(dtype)
        step: Callable[[], Any] = lambda: a @ b  # noqa: E731
        before, flops = resident(), 2 * SIDE**3
    else:
        before = resident()
        model, loss_of = CONTESTANTS[given.worker](case, given)
        model.train()
        fused = {"fused": True} if given.worker == "ours" else {}
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, **fused)
        images = torch.randn(case.batch, 3, case.image, case.image)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = loss_of(images)
            loss.backward()
            optimizer.step()

    for _ in sys.stdin:
        began, spent = time.perf_counter(), time.process_time()
        step()
        took = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - spent}
        print(json.dumps(took), flush=True)
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    if given.worker != MATMUL:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            step()
        flops = counter.get_total_flops()
    print(json.dumps({"peak_bytes": peak, "flops": flops}), flush=True)


def start(name: str, case: str, dtype: str, given: argparse.Namespace) -> subprocess.Popen[str]:
    """A process of ``work``."""
    command = [sys.executable, "-m", "benchmarks.pretrain_step", "--worker", name, "--cases", case, "--dtypes", dtype]
    command += ["--official", str(given.official)] if given.official else []
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def ask(process: subprocess.Popen[str]) -> dict[str, Any]:
    """One step of a contestant."""
    assert process.stdin is not None and process.stdout is not None
    print("step", file=process.stdin, flush=True)
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"{' '.join(map(str, process.args))} ended")  # type: ignore[arg-type]
    return json.loads(line)


def measure(case: str, dtype: str, names: list[str], given: argparse.Namespace, deadline: float) -> dict[str, Any]:
    """Rounds of one step each, after one that is not counted -> by contestant, what it took."""
    processes = {name: start(name, case, dtype, given) for name in names}
    try:
        taken: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for number in range(given.rounds + 1):
            for name, process in processes.items():
                found = ask(process)
                if number:
                    taken[name].append(found)
            if number and time.monotonic() > deadline:
                break
        ends = {name: json.loads(process.communicate()[0]) for name, process in processes.items()}
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    peak = ends[MATMUL]["flops"] / statistics.median(t["seconds"] for t in taken[MATMUL])
    rows = {}
    for name in names:
        seconds = sorted(t["seconds"] for t in taken[name])
        middle = statistics.median(seconds)
        rows[name] = {
            "seconds": middle,
            "fastest": seconds[0],
            "slowest": seconds[-1],
            "cpu_seconds": statistics.median(t["cpu_seconds"] for t in taken[name]),
            "images_per_second": CASES[case].batch / middle if name != MATMUL else None,
            "share_of_matmul_peak": ends[name]["flops"] / middle / peak,
            **ends[name],
        }
    return {"rounds": len(taken[names[0]]), "matmul_gflops": peak / 1e9, "contestants": rows}


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = ["# A pre-training step", "", *(f"* {name}: {text}" for name, text in results["machine"].items()), ""]
    head = "seconds (fastest to slowest)", "CPU seconds", "images/s", "ours is faster by", "peak GiB", "of matmul peak"
    for entry in results["measured"]:
        title = (
            f"{entry['case']}, {entry['dtype']}: {entry['rounds']} rounds, matmul {entry['matmul_gflops']:.0f} GFLOP/s"
        )
        lines += [f"## {title}", "", f"| | {' | '.join(head)} |", "|---|" + "---:|" * len(head)]
        mine = entry["contestants"]["ours"]["seconds"]
        for name, row in entry["contestants"].items():
            if name != MATMUL:
                lines.append(
                    f"| {name} | {row['seconds']:.3f} ({row['fastest']:.3f} to {row['slowest']:.3f}) "
                    f"| {row['cpu_seconds']:.3f} | {row['images_per_second']:.1f} | {row['seconds'] / mine:.2f} "
                    f"| {row['peak_bytes'] / 2**30:.2f} | {row['share_of_matmul_peak']:.0%} |"
                )
        lines.append("")
    return "\n".join([*lines, *defaults(results["measured"])])


def defaults(measured: list[dict[str, Any]]) -> list[str]:
    """Ours as it chooses its precision here, beside the others in float32."""
    mine = "bf16" if choose_precision("auto", torch.device("cpu")).mixed else "fp32"
    by_place = {(entry["case"], entry["dtype"]): entry["contestants"] for entry in measured}
    lines = []
    for case in {entry["case"]: None for entry in measured}:
        if {(case, mine), (case, "fp32")} <= by_place.keys():
            ours_takes = by_place[case, mine]["ours"]["seconds"]
            others = {n: row["seconds"] for n, row in by_place[case, "fp32"].items() if n not in ("ours", MATMUL)}
            texts = ", ".join(f"{name} {seconds / ours_takes:.2f}" for name, seconds in others.items())
            lines.append(f"Default against default, {case} (ours {mine}, theirs fp32), ours is faster by: {texts}.\n")
    return lines


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=["tiny96", "base224"])
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["fp32"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--minutes", type=float, default=60.0, help="no new round after so many")
    parser.add_argument("--official", type=Path, help="a checkout of facebookresearch/mae")
    parser.add_argument("--only", nargs="+", choices=list(CONTESTANTS), help="beside ours")
    parser.add_argument("--out", type=Path, help="writes OUT.json and OUT.md")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.worker:
        work(given)
        return
    others = [n for n in given.only or CONTESTANTS if n != "ours" and (n != "official" or given.official)]
    results: dict[str, Any] = {"machine": environment(torch.device("cpu")), "measured": []}
    deadline = time.monotonic() + 60 * given.minutes
    for case in given.cases:
        for dtype in given.dtypes:
            if time.monotonic() > deadline:
                break
            found = measure(case, dtype, [MATMUL, "ours", *others], given, deadline)
            results["measured"].append({"case": case, **asdict(CASES[case]), "dtype": dtype, **found})
            if given.out:
                given.out.parent.mkdir(parents=True, exist_ok=True)
                write_json(given.out.with_suffix(".json"), results)
                write_text(given.out.with_suffix(".md"), table(results))
    print(table(results))


if __name__ == "__main__":
    main()
