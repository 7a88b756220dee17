"""``trunk=timm:NAME`` in the mmseg configs: a training, what it writes, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mae_core.errors import UserError
from tests.timm_models import weights_of
from transfer.compare.config import CompareConfig
from transfer.compare.encoders import encoders_of
from transfer.compare.kinds import KINDS
from transfer.compare.run import compare
from transfer.segmentation.segmenter import load_segmenter
from transfer.segmentation.train_net import evaluate_segmenter, train_segmenter

pytest.importorskip("mmseg", reason="mmseg is not installed; pip install mae-transfer[segmentation]")
pytest.importorskip("transfer.segmentation.engine_mmseg", reason="mmseg is here without mmcv or mmengine")

from transfer.segmentation.engine_mmseg.backbone import MAECoreTimm, MAECoreViT

DIGITS = Path(__file__).parents[3] / "configs" / "segmentation" / "digits.py"


@pytest.mark.parametrize("name", ["tiny_beit", "tiny_dinov3"])
def test_a_segmenter_trains_is_evaluated_and_predicts(name, tiny, tmp_path):
    run, options = tmp_path / "run", {**tiny, "trunk": f"timm:{name}", "iterations": 4}
    metrics = train_segmenter(DIGITS, weights=weights_of(name, tmp_path), work_dir=run, cfg_options=options)
    assert metrics["mIoU"] >= 0
    again = evaluate_segmenter(DIGITS, run, work_dir=tmp_path / "again", cfg_options=options)
    assert again["mIoU"] == metrics["mIoU"]
    segmenter = load_segmenter(run)
    assert segmenter.predict(np.zeros((24, 40, 3), dtype=np.uint8)) is not None


def test_a_comparison_with_the_own_vit(run_in_process, pretrained, scenes, write_classes, tmp_path):
    more = ["num_classes=3", "crop_size=32", "head_width=16", "batch_size=2", "workers=0", "warmup=1"]
    more += ["model.neck.rescales=[4,2,1,0.5]", "visualizer.vis_backends=[]"]
    quick = ["data.image_size=32", "data.workers=0", "device=cpu", "optim.batch_size=4"]
    own = {"name": "own", "weights": str(pretrained)}
    timms = {"name": "timm", "weights": str(weights_of("tiny_beit", tmp_path)), "trunk": "timm:tiny_beit"}
    content = {
        "output": str(tmp_path / "out"),
        "encoders": [own, timms],
        "tasks": [
            {"kind": "finetune", "data": str(write_classes(tmp_path / "classes")), "options": quick},
            {"kind": "segmentation", "data": str(scenes), "options": more},
        ],
        **{"seeds": 1, "steps": 3, "rates": [1], "layer_decays": [1]},
    }
    path = compare(CompareConfig.model_validate(content))
    found = json.loads(path.with_name("report.json").read_text())
    scores = {(row["encoder"], row["task"]): row["scores"] for row in found["results"]}
    assert len(scores) == 4 and all(0 <= score <= 100 for [score] in scores.values())
    assert [encoder["image_size"] for encoder in found["encoders"]] == [[32, 32]] * 2
    assert path.read_text().count("parameters come from") == 4, "of every training"
    trained = {"name": "again", "weights": str(next((path.parent / "runs").glob("finetune_timm*")))}
    (encoder,) = encoders_of(CompareConfig.model_validate({**content, "encoders": [trained]})).values()
    assert encoder.words(KINDS["finetune"])[1:] == ["model.trunk=timm:tiny_beit"], "the file says it"


def test_the_backbone_of_a_trunk_and_what_it_does_not_add():
    vit = MAECoreViT(trunk="timm:tiny_beit", image_size=32, taps=(0, 1))
    assert isinstance(vit, MAECoreTimm) and vit.taps == (0, 1)
    assert [found.shape[-2:] for found in vit(torch.zeros(1, 3, 32, 32))] == [(4, 4)] * 2
    with pytest.raises(UserError, match="added to the toolkit's own ViT alone"):
        MAECoreViT(trunk="timm:tiny_beit", image_size=32, relative_positions="table")


@pytest.mark.parametrize(
    ("option", "message"), [({"size": "tiny"}, "size was given"), ({"width": 99}, "width was given")]
)
def test_what_the_trunk_decides_is_refused_beside_it(option, message, tiny, tmp_path):
    options = {**tiny, "trunk": "timm:tiny_beit", **option}
    with pytest.raises(UserError, match=f"{message}, but trunk=timm:tiny_beit decides it"):
        train_segmenter(DIGITS, weights=weights_of("tiny_beit", tmp_path), work_dir=tmp_path / "w", cfg_options=options)
