"""A detector's and a segmenter's training step, ours beside others, in turns; and a training of the small recipe.

    python -m benchmarks.dense --out benchmarks/results/dense
    python -m benchmarks.dense --parts detector --detectron2 ~/env/bin/python    # an interpreter that has detectron2
    python -m benchmarks.dense --parts small_data --data NUCLEI --baseline ~/before    # beside another checkout

``detector``: ViTDet's Mask R-CNN on one image. ``ours`` is engine torchvision; ``ours in detectron2`` and
``detectron2`` have the same heads of detectron2, on our trunk and pyramid and on its own. ``segmenter``: UperNet on two
images, as few as its batch norm takes, with our trunk and with mmseg's MAE. ``small_data``: images a second of
configs/detection/small_data.yaml on a COCO folder, each round a short training from scratch of each checkout. The sizes
are rows of ``CASES``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.detector_memory import CLASSES, random_targets
from benchmarks.side_by_side import (
    DTYPES,
    Contestant,
    Prepared,
    compare,
    counted,
    machine_lines,
    new_results,
    parser_of,
    serve,
    table,
    write_results,
)
from mae_core.config.load import load_config
from mae_core.layout import LOG
from mae_core.models.sizes import size_of
from mae_core.training.loop import seed_everything
from mae_core.training.precision import prepare_process
from transfer.detection.config import DetectionConfig
from transfer.detection.engine import build_network, load_engine
from transfer.engines import installed

ROOT = Path(__file__).resolve().parents[1]
RECIPE = Path("configs") / "detection" / "small_data.yaml"
OBJECTS = 20
"""On each image of noise."""


@dataclass(frozen=True)
class Case:
    """A trunk, and the side of the images of the two tasks."""

    size: str
    image: int
    window: int = 14
    head_width: int = 256


CASES = {
    "base256": Case("base", 256),
    "base512": Case("base", 512),
    "base1024": Case("base", 1024),
    "nano64": Case("nano", 64, 3, 16),
}
"""``nano64`` is for the test of this file."""
Step = Callable[[], Tensor]


def step_of(model: nn.Module, loss_of: Callable[[], Tensor], dtype: torch.dtype, device: torch.device) -> Step:
    """Forward, backward, AdamW."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-5, fused=True)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = loss_of()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def detector_config(case: Case, engine: str, *more: str) -> DetectionConfig:
    """ViTDet's recipe at the size of a case."""
    width = case.head_width
    sizes = f"model.size={case.size} model.window={case.window} data.image_size={case.image} model.fpn_channels={width}"
    heads = f"model.head_channels={width} model.box_features={4 * width} model.drop_path=0"
    options = [*sizes.split(), *heads.split(), "from_scratch=true", "data.statistics=imagenet", f"engine={engine}"]
    return load_config(DetectionConfig, ROOT / "configs" / "detection" / "vitdet_vit_base.yaml", [*options, *more])


def detector(
    config: DetectionConfig, dtype: torch.dtype, device: torch.device, images: int = 1, *, theirs: bool = False
) -> Step:
    """A step of a configuration's detector on noise; ``theirs``: on detectron2's trunk and pyramid instead of ours."""
    seed_everything(0)
    model = build_network(config, load_engine(config.engine), CLASSES).network
    height, width = side = (config.data.image_size,) * 2  # type: ignore[misc]
    if theirs:
        model.backbone = their_backbone(config)
    model.to(device).train()
    targets = [{k: x.to(device) for k, x in one.items()} for one in random_targets(images, OBJECTS, height, width)]
    if config.engine == "torchvision":
        pixels = torch.randn(images, 3, height, width, device=device)
        losses_of: Callable[[], dict[str, Tensor]] = lambda: model(pixels, [side] * images, targets)  # noqa: E731
    else:
        records = [their_record(target, height, width) for target in targets]

        def losses_of() -> dict[str, Tensor]:
            from detectron2.utils.events import EventStorage

            with EventStorage():
                return model(records)

    return step_of(model, lambda: torch.stack(list(losses_of().values())).sum(), dtype, device)


def their_backbone(config: DetectionConfig) -> nn.Module:
    """detectron2's ViT and simple feature pyramid in the sizes of a configuration."""
    from detectron2.modeling.backbone.fpn import LastLevelMaxPool
    from detectron2.modeling.backbone.vit import SimpleFeaturePyramid, ViT

    class Pyramid(SimpleFeaturePyramid):
        """Says what its images are padded to where our network asks for it."""

        @property
        def size_divisibility(self) -> int:
            return self._size_divisibility

    model, shape, side = config.model, size_of(config.model.size or "base"), config.data.image_size
    vit = ViT(
        img_size=side,
        patch_size=model.patch_size or shape.patch_size,
        embed_dim=shape.width,
        depth=shape.depth,
        num_heads=shape.heads,
        drop_path_rate=model.drop_path,
        window_size=model.window or 0,
        window_block_indexes=[n for n in range(shape.depth) if n not in shape.quarter_taps],
        norm_layer=partial(nn.LayerNorm, eps=shape.norm_eps),
        use_rel_pos=model.relative_positions == "decomposed",
        out_feature="last_feat",
    )
    return Pyramid(
        vit,
        in_feature="last_feat",
        out_channels=model.fpn_channels,
        scale_factors=(4.0, 2.0, 1.0, 0.5),
        top_block=LastLevelMaxPool(),
        norm="LN",
        square_pad=side,
    )


def their_record(target: dict[str, Tensor], height: int, width: int) -> dict[str, Any]:
    """An image of noise and its objects as detectron2 takes them."""
    from detectron2.structures import BitMasks, Boxes, Instances

    objects = Instances((height, width), gt_boxes=Boxes(target["boxes"]), gt_classes=target["labels"] - 1)
    objects.gt_masks = BitMasks(target["masks"])
    pixels = 255 * torch.rand(3, height, width, device=target["boxes"].device)
    return {"image": pixels, "height": height, "width": width, "instances": objects}


def segmenter(case: Case, dtype: torch.dtype, device: torch.device, images: int = 2, *, theirs: bool = False) -> Step:
    """A step of UperNet on noise, as the recipe for ViT-B has it; ``theirs``: on mmseg's MAE instead of our trunk."""
    from mmengine.config import ConfigDict
    from mmengine.model import revert_sync_batchnorm
    from mmengine.structures import PixelData
    from mmseg.registry import MODELS
    from mmseg.structures import SegDataSample
    from mmseg.utils import register_all_modules

    from transfer.segmentation.engine_mmseg.options import read_config

    seed_everything(0)
    register_all_modules()
    shape, side = size_of(case.size), case.image
    recipe = ROOT / "configs" / "segmentation" / "mae_vit_base_upernet_160k_ade20k_512x512.py"
    model = read_config(recipe, {"crop_size": side, "width": shape.width, "size": case.size}).model
    model.decode_head.channels, model.auxiliary_head.channels = min(shape.width, 3 * case.head_width), case.head_width
    if theirs:
        model.backbone = ConfigDict(
            type="MAE",
            img_size=(side, side),
            patch_size=shape.patch_size,
            embed_dims=shape.width,
            num_layers=shape.depth,
            num_heads=shape.heads,
            init_values=1.0,
            drop_path_rate=0.1,
            out_indices=[3, 5, 7, 11] if shape.depth == 12 else list(shape.quarter_taps),
        )
    network = revert_sync_batchnorm(MODELS.build(model)).to(device).train()
    pixels = torch.randn(images, 3, side, side, device=device)
    samples = []
    for _ in range(images):
        labels = torch.randint(0, model.decode_head.num_classes, (1, side, side), device=device)
        samples.append(SegDataSample(gt_sem_seg=PixelData(data=labels), metainfo={"img_shape": (side, side)}))
    return step_of(network, lambda: network.parse_losses(network.loss(pixels, samples))[0], dtype, device)


ENGINES = {"detectron2": "detectron2", "ours in detectron2": "detectron2", "ours": "torchvision"}
PARTS = {"detector": (1, tuple(ENGINES)), "segmenter": (2, ("ours", "mmseg"))}
"""Part -> images a step, contestants."""


def work(given: argparse.Namespace) -> None:
    """A contestant's process."""
    part, name = given.worker.split(":")
    case, dtype, device = CASES[given.cases[0]], DTYPES[given.dtypes[0]], torch.device(given.device)
    if name.startswith("ours"):
        prepare_process(device)

    def prepare() -> Prepared:
        if part == "segmenter":
            step = segmenter(case, dtype, device, theirs=name == "mmseg")
        else:
            step = detector(detector_config(case, ENGINES[name]), dtype, device, theirs=name == "detectron2")
        return Prepared(step, lambda: counted(step))

    serve(prepare, device)


def contestants(part: str, case: str, dtype: str, given: argparse.Namespace) -> list[Contestant]:
    """The processes of a part; those of detectron2 in the interpreter that has it."""
    found = []
    images, names = PARTS[part]
    for name in names:
        python = given.detectron2 if "detectron2" in name else sys.executable
        if python is not None and (part != "segmenter" or installed("mmseg")):
            command = [str(python), "-m", "benchmarks.dense", "--worker", f"{part}:{name}"]
            command += ["--cases", case, "--dtypes", dtype, "--device", given.device]
            found.append(Contestant(name, command, images, {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}))
    return found


def small_copy(data: Path, folder: Path, images: int = 2) -> Path:
    """A COCO folder with few validation images, which share its files: a training that is measured ends soon."""
    (folder / "annotations").mkdir(parents=True)
    for name in ("train", "val"):
        (folder / name).symlink_to((data / name).resolve(), target_is_directory=True)
    train, val = (Path("annotations") / f"instances_{name}.json" for name in ("train", "val"))
    shutil.copy(data / train, folder / train)
    whole = json.loads((data / val).read_text())
    kept = {image["id"] for image in whole["images"][:images]}
    whole["images"] = whole["images"][:images]
    whole["annotations"] = [entry for entry in whole["annotations"] if entry["image_id"] in kept]
    (folder / val).write_text(json.dumps(whole))
    return folder


def rate_of_training(checkout: Path, data: Path, steps: int, output: Path, more: list[str]) -> float:
    """Images a second of ``steps`` steps of the small recipe after its first, as its log has them; one thread, no
    workers. Raises ``RuntimeError`` with the end of its output where it fails."""
    total = len(json.loads((data / "annotations" / "instances_train.json").read_text())["images"])
    command = [sys.executable, "transfer/detection/train_net.py", "--config-file", str(RECIPE), "from_scratch=true"]
    command += [f"data.path={data}", f"output={output}", f"optim.epochs={8 * (steps + 1) / total}", "data.workers=0"]
    command += ["log.every=1", "optim.warmup_epochs=0", *more]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    ended = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(f"{checkout}: {(ended.stderr or ended.stdout).strip().splitlines()[-1]}")
    entries = [json.loads(line) for line in (output / LOG).read_text().splitlines()]
    rates = [entry["images_per_second"] for entry in entries if "images_per_second" in entry]
    return statistics.harmonic_mean(rates[1:])


def small_data(given: argparse.Namespace, deadline: float) -> dict[str, Any]:
    """Rounds of short trainings of this checkout and of the baseline -> images a second."""
    checkouts = {"ours": ROOT, **({"baseline": given.baseline.resolve()} if given.baseline else {})}
    rates: dict[str, list[float]] = {name: [] for name in checkouts}
    with tempfile.TemporaryDirectory() as folder:
        data = small_copy(given.data, Path(folder) / "data")
        for number in range(given.rounds):
            for name, checkout in checkouts.items():
                output = Path(folder) / f"{name}_{number}"
                rates[name].append(rate_of_training(checkout, data, given.steps, output, given.option))
            if time.monotonic() > deadline:
                break
    rows = {name: {"median": statistics.median(r), "least": min(r), "most": max(r)} for name, r in rates.items()}
    return {"part": "small_data", "rounds": len(rates["ours"]), "steps": given.steps, "images_per_second": rows}


def page(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = ["# Dense tasks", "", *machine_lines(results["machine"])]
    for entry in results["measured"]:
        if entry["part"] != "small_data":
            lines += table(f"{entry['part']}, {entry['case']}, {entry['dtype']}", entry, "ours")
            continue
        rows, ours = entry["images_per_second"], entry["images_per_second"]["ours"]["median"]
        lines += [f"## small_data.yaml: {entry['rounds']} rounds of {entry['steps']} steps, one thread", ""]
        lines += ["| | images/s (least to most) | ours is faster by |", "|---|---:|---:|"]
        for name, row in rows.items():
            rate = f"{row['median']:.2f} ({row['least']:.2f} to {row['most']:.2f})"
            lines.append(f"| {name} | {rate} | {ours / row['median']:.2f} |")
        lines.append("")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = parser_of(__doc__)
    parser.add_argument("--parts", nargs="+", choices=[*PARTS, "small_data"], default=list(PARTS))
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=["base512"])
    parser.add_argument("--detectron2", type=Path, help="a Python that has detectron2, unless this one does")
    parser.add_argument("--data", type=Path, help="a COCO folder for small_data")
    parser.add_argument("--baseline", type=Path, help="another checkout, beside which small_data is measured")
    parser.add_argument("--steps", type=int, default=6, help="of each training of small_data")
    parser.add_argument("--option", nargs="*", default=[], metavar="key=value", help="of each training of small_data")
    given = parser.parse_args(arguments)
    if given.worker:
        work(given)
        return
    if "small_data" in given.parts and given.data is None:
        parser.error("small_data trains on a COCO folder; give --data FOLDER")
    if given.detectron2 is None and installed("detectron2"):
        given.detectron2 = Path(sys.executable)
    results = new_results(given)
    deadline = time.monotonic() + 60 * given.minutes
    for part in given.parts:
        pairs = [(case, dtype) for case in given.cases for dtype in given.dtypes] if part in PARTS else [("", "")]
        for case, dtype in pairs:
            if part == "small_data":
                found = small_data(given, deadline)
            else:
                running = contestants(part, case, dtype, given)
                found = compare(running, rounds=given.rounds, deadline=deadline) if running else None
                found = found and {"part": part, "case": case, **asdict(CASES[case]), "dtype": dtype, **found}
            if found is None:
                print(f"{part}: nothing that it needs is installed", file=sys.stderr)
                continue
            results["measured"].append(found)
            write_results(results, given.out)
    print(page(results))


if __name__ == "__main__":
    main()
