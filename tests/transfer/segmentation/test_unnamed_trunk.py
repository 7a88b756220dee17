"""A trunk that no row of the sizes names goes through a segmentation, its weights opened once."""

from __future__ import annotations

from pathlib import Path

import pytest

from mae_core.errors import UserError
from mae_core.models.encoder import ViTEncoder
from mae_core.models.sizes import ViTSize
from mae_core.weights.encoder_file import describe_encoder
from mae_core.weights.files import write_weights
from transfer.segmentation.train_net import evaluate_segmenter, train_segmenter

DIGITS = Path(__file__).parents[3] / "configs/segmentation/digits.py"


def test_a_trunk_that_no_row_names(tmp_path, tiny, opens):
    weights = tmp_path / "own.safetensors"
    encoder = ViTEncoder(ViTSize(192, 3, 6, norm_eps=1e-5), image_size=32, patch_size=8)
    write_weights(weights, encoder.state_dict(), describe_encoder(encoder))
    options = {**tiny, "iterations": 6, "width": 192}
    with pytest.raises(UserError, match=r"backbone\.size nano was asked for, but the file has 192x3"):
        train_segmenter(DIGITS, weights=weights, work_dir=tmp_path / "refused", cfg_options=options)
    opens.clear()
    options["model.backbone.size"] = None
    train_segmenter(DIGITS, weights=weights, work_dir=tmp_path / "run", cfg_options=options)
    assert opens[weights.name] == 1
    opens.clear()
    found = evaluate_segmenter(DIGITS, tmp_path / "run", work_dir=tmp_path / "again", cfg_options=options)
    assert "mIoU" in found and opens["segmenter.safetensors"] == 1
