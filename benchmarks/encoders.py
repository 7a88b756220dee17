"""A step of fine-tuning, detection and segmentation for every format of an encoder's file and every kind of timm's
ViTs, with random weights, by the commands that a user types; and whether every tensor of the file is accounted for.

    python benchmarks/encoders.py --out runs/encoders                        all of them
    python benchmarks/encoders.py dino timm:vit_base_patch16_clip_384        some, or any ViT of timm

Networks of their full size on small images. That features are timm's is what the tests show (test_timm_trunk.py,
test_other_encoders.py). Stopped, the same command continues.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from mae_core.atomic import write_json, write_text
from mae_core.data.digits import write_digits
from mae_core.errors import UserError, user_errors
from mae_core.models.timm_trunk import described

State = dict[str, Tensor]
ROOT = Path(__file__).resolve().parents[1]
TIMMS = (
    "vit_tiny_patch16_224",
    "deit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "deit3_small_patch16_224",
    "beit_base_patch16_224",
    "beitv2_base_patch16_224",
    "eva_large_patch14_196",
    "eva02_tiny_patch14_224",
    "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "vit_small_patch16_dinov3",
    "vit_tiny_patch16_dinov3_qkvb",
    "vit_base_patch16_siglip_224",
    "vit_base_patch16_siglip_gap_224",
    "vit_base_patch32_clip_224",
    "vit_small_patch16_rope_mixed_224",
    "vit_relpos_small_patch16_224",
    "samvit_base_patch16",
)
SMALL, BEIT, BEIT_2 = "vit_small_patch16_224", "beit_base_patch16_224", "beitv2_base_patch16_224"


# Files.


def behind(prefix: str, state: Mapping[str, Tensor]) -> State:
    """With a prefix before every name."""
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


MOCO_HEAD = {
    "head.0.weight": torch.ones(3, 128),
    "head.1.running_mean": torch.ones(3),
    "head.7.num_batches_tracked": torch.tensor(2),
}
DINO_HEAD = {"head.mlp.0.weight": torch.ones(4, 128), "head.last_layer.weight_g": torch.ones(3, 1)}
IBOT_HEAD = {**DINO_HEAD, "head.last_layer2.weight_v": torch.ones(3, 4), "head.last_norm.running_mean": torch.ones(3)}


def moco(wanted: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, Any]:
    """MoCo v3's checkpoint: two encoders with heads, of which the momentum encoder is wanted, and a predictor."""
    return {
        "epoch": 300,
        "arch": "vit_base",
        "state_dict": {
            **behind("module.base_encoder.", {**other, **MOCO_HEAD}),
            **behind("module.momentum_encoder.", {**wanted, **MOCO_HEAD}),
            "module.predictor.0.weight": torch.ones(2, 3),
        },
    }


def dino(wanted: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, Any]:
    """DINO's full checkpoint: student and teacher with heads, of which the teacher is wanted."""
    return _taught(wanted, other, DINO_HEAD)


def ibot(wanted: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, Any]:
    """iBOT's full checkpoint: DINO's, with a token for hidden patches and further heads."""
    return _taught(wanted, other, {"backbone.masked_embed": torch.ones(1, 128), **IBOT_HEAD})


def _taught(teacher: Mapping[str, Tensor], student: Mapping[str, Tensor], more: Mapping[str, Tensor]) -> dict[str, Any]:
    taught, teaching = ({**behind("backbone.", each), **more} for each in (student, teacher))
    return {"student": behind("module.", taught), "teacher": teaching, "epoch": 100}


def beside_another(make: Callable[[State, State], dict[str, Any]]) -> Callable[[State], dict[str, Any]]:
    """``make`` for the tensors of one encoder, the other of the file having other numbers."""
    return lambda state: make(state, {name: tensor + 1 for name, tensor in state.items()})


def below_model(state: State) -> dict[str, Any]:
    """The published files of DeiT and BEiT."""
    return {"model": state}


def deit_3(state: State) -> dict[str, Any]:
    """DeiT III names layer scale as BEiT does."""
    return below_model({re.sub(r"ls(\d)\.gamma", r"gamma_\1", name): tensor for name, tensor in state.items()})


def beit_pretrained(state: State) -> dict[str, Any]:
    """BEiT before it is fine-tuned has a token for hidden patches and a head of visual tokens."""
    return below_model({**state, "mask_token": torch.zeros(1, 1, 768), "lm_head.weight": torch.zeros(8192, 768)})


def with_mask_token(state: State) -> State:
    """DINOv2's published files."""
    return {**state, "mask_token": torch.zeros(1, state["cls_token"].shape[-1])}


def filled(model: nn.Module) -> nn.Module:
    """With random numbers everywhere, tables and layer scale too, which timm starts at nearly nothing."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


def of_timm(name: str, **options: Any) -> nn.Module:
    """timm's model."""
    return timm.create_model(name, **options)


def of_torchvision() -> nn.Module:
    """torchvision's ViT-B/16."""
    from torchvision.models import vit_b_16

    return vit_b_16()


@dataclass(frozen=True)
class Row:
    """A kind of file.

    model    builds the library's own model
    wrap     its tensors -> the content of the file
    trunk    ``timm:NAME``, where the toolkit's own ViT is not it
    branch   which encoder of the file
    size     of the toolkit's own ViT
    patch    side of its patches; a pyramid needs one that 4 divides, to which others are converted
    """

    model: Callable[[], nn.Module]
    wrap: Callable[[State], dict[str, Any]] = dict
    trunk: str | None = None
    branch: str | None = None
    size: str = "small"
    patch: int = 16


SHARED = {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True, "use_fc_norm": False, "num_classes": 0}
BARE_SMALL = partial(of_timm, SMALL, num_classes=0)
FORMATS = {
    "moco_v3": Row(partial(BARE_SMALL, num_heads=12), beside_another(moco), branch="momentum_encoder"),
    "dino": Row(BARE_SMALL, beside_another(dino), branch="teacher"),
    "ibot": Row(BARE_SMALL, beside_another(ibot), branch="teacher"),
    "beit_pretrained": Row(partial(of_timm, BEIT, **SHARED), beit_pretrained, trunk=f"timm:{BEIT}"),
    "beit_fine_tuned": Row(partial(of_timm, BEIT), below_model, trunk=f"timm:{BEIT}"),
    "beit_v2": Row(partial(of_timm, BEIT_2), below_model, trunk=f"timm:{BEIT_2}"),
    "deit": Row(partial(of_timm, "deit_small_patch16_224"), below_model),
    "deit_3": Row(partial(of_timm, "deit3_small_patch16_224"), deit_3),
    "timm": Row(partial(of_timm, SMALL)),
    "torchvision": Row(of_torchvision, size="base"),
    "dinov2": Row(partial(of_timm, "vit_small_patch14_dinov2", num_classes=0), with_mask_token, patch=14),
}


def row_named(name: str) -> Row:
    """A format, or ``timm:NAME``. Raises ``UserError`` where there is none."""
    if name in FORMATS:
        return FORMATS[name]
    if not name.startswith("timm:"):
        raise UserError(f"unknown name {name!r}; give timm:NAME, or one of {', '.join(FORMATS)}")
    return Row(partial(of_timm, name.removeprefix("timm:")), trunk=name, patch=described(name).patch_size)


# Trainings.


def commands(row: Row, file: Path, data: Path, runs: Path) -> dict[str, list[str]]:
    """Task -> the words of ``mae``."""
    given = [f"weights={file}", *([f"branch={row.branch}"] if row.branch else [])]
    side = {"segment": 4 * (row.patch if row.trunk else 16), "detect": 64}
    dense = list(given)
    if row.trunk is not None:
        given.append(f"model.trunk={row.trunk}")
        own = {"detect": ["model.patch_size=16"] if row.patch % 4 else [], "segment": []}
    else:
        width = described(f"timm:vit_{row.size}_patch16_224").width
        patch = 16 if row.patch % 4 else row.patch
        own = {
            "detect": [f"model.size={row.size}", f"model.patch_size={patch}"],
            "segment": [f"size={row.size}", f"patch_size={patch}", f"width={width}"],
        }
    step = ["device=cpu", "data.workers=0", "optim.epochs=0.1", "optim.warmup_epochs=0"]
    small = [f"data.image_size={side['detect']}", "optim.batch_size=2", "test.num_pictures=1", "sampling.rois=16"]
    lists = [f"trunk={row.trunk}" if row.trunk else "", "iterations=3", "warmup=2", "batch_size=2", "workers=0"]
    return {
        "fine-tuning": [
            *("finetune", *given, *step, f"data.image_size=[{row.patch},{2 * row.patch}]"),
            *("optim.batch_size=4", f"data.path={data / 'classification'}", f"output={runs / 'fine-tuning'}"),
        ],
        "detection": [
            *("detect", "train", "small_data", *given, *own["detect"], *step, *small),
            *(f"data.path={data / 'detection'}", f"output={runs / 'detection'}"),
        ],
        "segmentation": [
            *("segment", "train", "small_data", *dense, *own["segment"], *filter(None, lists), "num_classes=5"),
            *(f"crop_size={side['segment']}", f"data.path={data / 'segmentation'}", f"output={runs / 'segmentation'}"),
        ],
    }


def run(words: Sequence[str]) -> str:
    """``mae`` with these words in this process -> the error that it printed; empty where it trained."""
    from typer.testing import CliRunner

    from mae_core.cli.main import app

    result = CliRunner().invoke(app, [*words])
    if result.exit_code == 0:
        return ""
    told = [line for line in result.output.splitlines() if "error" in line.lower()]
    return told[-1] if told else f"exit code {result.exit_code}: {result.exception!r}"


def unaccounted(run: Path, names: set[str]) -> list[str]:
    """Tensors of the file that the report of a training does not name as loaded or, with a reason, as left out."""
    report = json.loads((run / "loading.json").read_text(encoding="utf-8"))
    found = {name for part in ("loaded", "renamed", "changed", "resized") for name in report[part]}
    found |= {name for name, why in report["unused"].items() if why}
    return sorted(name for name in names - found if not any(name.endswith(f".{each}") for each in found))


def tensors_of(content: Mapping[str, Any]) -> set[str]:
    """Names of all tensors in the content of a file, without the words that lead to them."""
    names: set[str] = set()
    for name, value in content.items():
        names |= tensors_of(value) if isinstance(value, Mapping) else {name} if isinstance(value, Tensor) else set()
    return names


def tried(name: str, row: Row, data: Path, folder: Path) -> dict[str, Any]:
    """What came of the three trainings on a file of random weights: task -> "trained", or what was wrong."""
    shutil.rmtree(folder, ignore_errors=True)  # of a stopped command
    folder.mkdir(parents=True)
    file, found = folder / "weights.pth", {}
    torch.manual_seed(0)
    content = row.wrap(filled(row.model()).state_dict())
    names = tensors_of(content)
    torch.save(content, file)
    del content
    for task, words in commands(row, file, data, folder).items():
        if row.trunk is None and row.patch % 4 and task != "fine-tuning":
            other = folder / "converted.safetensors"
            if not other.exists() and (wrong := run(converting(row, file, other))):
                return {**found, task: wrong}
            words = [word.replace(str(file), str(other)) for word in words]
        wrong = run(words)
        lost = [] if wrong or "converted" in " ".join(words) else unaccounted(folder / task, names)
        found[task] = wrong or ("trained" if not lost else f"unaccounted for: {', '.join(lost)}")
        print(f"{name}: {task}: {found[task]}", flush=True)
    shutil.rmtree(folder)
    return {"tensors": len(names), **found}


def converting(row: Row, file: Path, other: Path) -> list[str]:
    """``mae convert`` to patches of 16."""
    return ["convert", str(file), "--to", "mae_core", "--patch-size", "16", "--out", str(other)]


def table_of(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The results in Markdown."""
    tasks = ("fine-tuning", "detection", "segmentation")
    lines = [f"| file | tensors | {' | '.join(tasks)} |", "|---|--:|---|---|---|"]
    for name, row in found.items():
        lines.append(f"| `{name}` | {row.get('tensors', '')} | {' | '.join(row.get(task, '') for task in tasks)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("names", nargs="*", help="formats, or timm:NAME; all formats and a name a kind when left out")
    parser.add_argument("--out", type=Path, default=Path("runs/encoders"), help="folder of files, runs and results")
    given = parser.parse_args(arguments)
    with user_errors():
        rows = {name: row_named(name) for name in given.names or [*FORMATS, *(f"timm:{each}" for each in TIMMS)]}
        given.out.mkdir(parents=True, exist_ok=True)
        results, data = given.out / "encoders.json", given.out / "digits"
        if not data.exists():
            write_digits(data, seed=0, image_size=48, num_unlabelled=1, num_train=40, num_test=10, workers=1)
        found = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {}
        for name, row in rows.items():
            if name not in found:
                found[name] = tried(name, row, data, given.out / name.replace(":", "_"))
                write_json(results, found)
        table = table_of({name: found[name] for name in rows})
        write_text(given.out / "encoders.md", f"{table}\n")
        print(table)


if __name__ == "__main__":
    main()
