"""Every row of the paper's Table 1 at small scale, the same budget each; writes a table beside the paper's numbers.

    python benchmarks/table1.py DATA OUT [--epochs 12] [--finetune-epochs 5] [--rows 1a,1f]

DATA holds train/<class>/* and val/<class>/*, such as imagenette. A row is what its file in configs/pretrain/table1
says, on top of benchmarks/table1.yaml; its encoder is measured by k-NN and by a short fine-tuning: a comparison of
encoders as `mae compare` runs it. Stopped, the same command goes on. OUT/table1.md and .json hold the numbers.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mae_core.atomic import write_json, write_text
from mae_core.config.load import config_differences, load_config
from mae_core.data.labelled import read_image_folder
from mae_core.errors import UserError, user_errors
from mae_core.layout import TOKENIZER
from mae_core.training.finetune_config import FinetuneConfig
from mae_core.training.plan import cost_of
from mae_core.training.pretrain import build_pretrain_model
from mae_core.training.pretrain_config import PretrainConfig
from mae_core.training.run import commit
from transfer.chain import Job, Stage
from transfer.compare.config import CompareConfig
from transfer.compare.run import compare

ROOT = Path(__file__).resolve().parents[1]
ROW_FILES = ROOT / "configs" / "pretrain" / "table1"
SMALL, FINETUNE = "benchmarks/table1.yaml", "benchmarks/table1_finetune.yaml"
SHORTEST = "96"
ABREAST = 2
WIDTH_SCALE = 8
COMPONENTS = 24
NEIGHBOURS = 20
BASELINE = "baseline"


class Row(NamedTuple):
    """A row of Table 1: its part, the paper's words, its file, and the published accuracies in percent."""

    part: str
    label: str
    name: str
    finetuned: float
    linear: float


ROWS = (
    Row("1a", "decoder of 1 block", "a_depth_1", 84.8, 65.5),
    Row("1a", "2 blocks", "a_depth_2", 84.9, 70.0),
    Row("1a", "4 blocks", "a_depth_4", 84.9, 71.9),
    Row("1a", "8 blocks", BASELINE, 84.9, 73.5),
    Row("1a", "12 blocks", "a_depth_12", 84.4, 73.3),
    Row("1b", "decoder 128 wide", "b_width_128", 84.9, 69.1),
    Row("1b", "256 wide", "b_width_256", 84.8, 71.3),
    Row("1b", "512 wide", BASELINE, 84.9, 73.5),
    Row("1b", "768 wide", "b_width_768", 84.4, 73.1),
    Row("1b", "1024 wide", "b_width_1024", 84.3, 73.1),
    Row("1c", "encoder with mask tokens", "c_mask_tokens_in_encoder", 84.2, 59.6),
    Row("1c", "encoder without", BASELINE, 84.9, 73.5),
    Row("1d", "pixels, not normalised", BASELINE, 84.9, 73.5),
    Row("1d", "pixels, normalised", "d_normalized_pixels", 85.4, 73.9),
    Row("1d", "PCA coefficients", "d_pca", 84.6, 72.3),
    Row("1d", "dVAE tokens", "d_tokens", 85.3, 71.6),
    Row("1e", "no augmentation", "e_no_augmentation", 84.0, 65.7),
    Row("1e", "crop, fixed size", "e_fixed_crop", 84.7, 73.1),
    Row("1e", "crop, random size", BASELINE, 84.9, 73.5),
    Row("1e", "crop and colour jitter", "e_color_jitter", 84.3, 71.9),
    Row("1f", "random, 75 %", BASELINE, 84.9, 73.5),
    Row("1f", "block, 50 %", "f_block_50", 83.9, 72.3),
    Row("1f", "block, 75 %", "f_block_75", 82.8, 63.9),
    Row("1f", "grid, 75 %", "f_grid_75", 84.0, 66.0),
)
"""The published numbers: ViT-L/16, 800 epochs on ImageNet-1K, fine-tuned and by linear probing."""


class Bench:
    """Folders and commands of one benchmark."""

    def __init__(self, out: Path, *, epochs: float, finetune_epochs: float, seed: int) -> None:
        self.out, self.epochs, self.finetune_epochs, self.seed = out, epochs, finetune_epochs, seed
        self.data, self.pca, self.tokenizer = out / "data", out / "pca.safetensors", out / "tokenizer"

    def overrides(self, name: str) -> list[str]:
        """What differs in a row from the baseline, scaled: widths by 1/8, files and tokens of this benchmark's own."""
        baseline, row = (load_config(PretrainConfig, ROW_FILES / f"{n}.yaml") for n in (BASELINE, name))
        changed = [line.partition(": ") for line in config_differences(baseline, row)]
        found = {key: values.rpartition(" -> ")[2] for key, _, values in changed}
        scaled = {
            "decoder.width": lambda value: str(int(value) // WIDTH_SCALE),
            "target.pca": lambda _: str(self.pca),
            "target.tokenizer": lambda _: str(self.tokenizer),
        }
        found.pop("target.tokenizer_image_size", None)  # its own tokenizer has the model's grid
        return [f"{key}={scaled.get(key, str)(value)}" for key, value in found.items()]

    def options(self, name: str) -> list[str]:
        """Of the pre-training of a row."""
        given = [f"data.path={self.data / 'train'}", f"optim.epochs={self.epochs:g}", f"seed={self.seed}"]
        return [str(ROOT / SMALL), *given, *self.overrides(name)]

    def preparations(self, names: Sequence[str], source: Path) -> list[Job]:
        """What comes first: smaller images, since to decode large ones would take most of the time; and what the rows
        on PCA and tokens need."""
        data = f"data.path={self.data / 'train'}"
        jobs = [
            Job(f"shrink {part}", ["mae", "shrink", str(source / part), str(self.data / part), "--shortest", SHORTEST])
            for part in ("train", "val")
            if not (self.data / part).is_dir()
        ]
        if "d_pca" in names and not self.pca.is_file():
            fit = ["mae", "fit-pca", str(ROOT / SMALL), data, "--out", str(self.pca), "--components", str(COMPONENTS)]
            jobs.append(Job("fit pca", fit))
        if "d_tokens" in names:
            train = ["mae", "train-tokenizer", data, "data.image_size=48", "data.workers=0", "model.patch_size=8"]
            train += ["model.vocabulary=256", "model.width=128", "optim.batch_size=64", "optim.base_lr=4e-3"]
            epochs = [f"optim.epochs={self.epochs:g}", f"seed={self.seed}"]
            command = [*train, *epochs, f"output={self.tokenizer}"]
            jobs.append(Job("train tokenizer", command, self.tokenizer, TOKENIZER))
        return jobs

    def configuration(self, names: Sequence[str]) -> CompareConfig:
        """The rows as encoders, k-NN and fine-tuning as tasks."""
        images = len(read_image_folder(self.data)[0].paths)
        batch = load_config(FinetuneConfig, ROOT / FINETUNE, ["from_scratch=true"]).optim.batch_size
        knn = ["data.image_size=48", "data.workers=0", f"k=[{NEIGHBOURS}]", "model.pooling=mean", "data.test_crop=1"]
        tasks = [
            {"kind": "knn", "data": str(self.data), "options": knn},
            {"kind": "finetune", "data": str(self.data), "recipe": str(ROOT / FINETUNE)},
        ]
        encoders = [{"name": name, "command": shlex.join(["mae", "pretrain", *self.options(name)])} for name in names]
        budget = {"seeds": 1, "steps": max(1, round(self.finetune_epochs * images / batch))}
        grid = {"rates": [1.0], "layer_decays": [0.75]}
        entries = {"title": "Table 1 at small scale", "output": str(self.out), "encoders": encoders, "tasks": tasks}
        return CompareConfig.model_validate({**entries, **budget, **grid, "jobs": ABREAST})


def run_all(bench: Bench, rows: Sequence[Row], source: Path) -> dict[str, Any]:
    """Run what is not done yet -> what was measured."""
    names = list(dict.fromkeys(row.name for row in rows))
    preparations = bench.preparations(names, source)
    Stage(bench.out, parallel=1, threads=1).run(preparations)
    compare(bench.configuration(names))
    found = json.loads((bench.out / "report.json").read_text(encoding="utf-8"))
    scores = {(entry["encoder"], entry["task"]): entry["scores"][0] for entry in found["results"]}
    flops = {name: flops_of(bench, name) for name in dict.fromkeys([BASELINE, *names])}
    measured = []
    for row in rows:
        numbers = {
            "finetuned": scores[row.name, "finetune"],
            "knn": scores[row.name, "knn"],
            "flops": flops[row.name] / flops[BASELINE],
        }
        measured.append({**row._asdict(), "difference": bench.overrides(row.name), "measured": numbers})
    images = len(read_image_folder(bench.data)[1].paths)
    return {
        "rows": measured,
        "images": images,
        "standard_error": round(100 * math.sqrt(0.25 / images), 2),
        "epochs": bench.epochs,
        "finetune_epochs": bench.finetune_epochs,
        "seed": bench.seed,
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit(),
        "machine": found["environment"],
    }


def flops_of(bench: Bench, name: str) -> int:
    """Forward and backward of one image."""
    file, *overrides = bench.options(name)
    config = load_config(PretrainConfig, file, overrides)
    return cost_of(build_pretrain_model(config), config, torch.float32).total


def markdown(found: dict[str, Any]) -> str:
    """The table, and how it came about."""
    machine = found["machine"]
    lines = [
        "# Table 1 at small scale",
        "",
        f"`{found['command']}` at commit {found['commit']}, on {machine['processor']}, one thread a row; torch "
        f"{machine['torch']}, timm {machine['timm']}.",
        "",
        f"Here: ViT-nano, 48 pixels, {found['epochs']:g} epochs, then {found['finetune_epochs']:g} epochs of "
        f"fine-tuning, or {NEIGHBOURS}-NN on frozen features; one seed. Top-1 on {found['images']} images, so that a "
        f"single number has a standard error of up to {found['standard_error']:.1f} points. The paper: ViT-L/16, 224 "
        f"pixels, 800 epochs on ImageNet-1K. Decoder widths are an eighth of the paper's, PCA keeps {COMPONENTS} of "
        "192 numbers (the paper's 96 of 768), and the tokens are of a small discrete VAE with 256 words, trained on "
        "the same images, where the paper's are DALL-E's.",
        "",
        "| table | row | paper, fine-tuned | here, fine-tuned | paper, linear | here, k-NN | FLOPs here |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in found["rows"]:
        here, mark = row["measured"], "**" if row["name"] == BASELINE else ""
        lines.append(
            f"| {row['part']} | {mark}{row['label']}{mark} | {row['finetuned']:.1f} | {here['finetuned']:.1f} | "
            f"{row['linear']:.1f} | {here['knn']:.1f} | {here['flops']:.2f}x |"
        )
    return "\n".join([*lines, "", "Bold rows are one and the same run, the paper's default.", ""])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", type=Path, help="train/<class>/* and val/<class>/*")
    parser.add_argument("out", type=Path, help="the folder of all runs and of the table")
    parser.add_argument("--epochs", type=float, default=12, help="of pre-training, each row")
    parser.add_argument("--finetune-epochs", type=float, default=5)
    parser.add_argument(
        "--rows", default="", help="parts of the table, such as 1a,1f, or files, such as f_grid_75; all"
    )
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with user_errors():
        wanted = [word for word in given.rows.split(",") if word]
        unknown = [word for word in wanted if not any(word in (row.part, row.name) for row in ROWS)]
        if unknown:
            raise UserError(f"--rows {unknown[0]} is no part of Table 1 (1a to 1f) and no file in {ROW_FILES}")
        rows = [row for row in ROWS if not wanted or row.part in wanted or row.name in wanted]
        out = given.out.resolve()
        bench = Bench(out, epochs=given.epochs, finetune_epochs=given.finetune_epochs, seed=given.seed)
        read_image_folder(given.data)
        found = run_all(bench, rows, given.data.resolve())
        write_json(out / "table1.json", found)
        write_text(out / "table1.md", markdown(found))
        print(markdown(found))
        print(f"wrote {out / 'table1.md'} and table1.json")


if __name__ == "__main__":
    main()
