"""What goes wrong in a training of the mmseg engine, injected."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mae_core.errors import UserError
from transfer.segmentation.train_net import train_segmenter

pytest.importorskip("mmseg", reason="mmseg is not installed; pip install mae-transfer[segmentation]")
pytest.importorskip("transfer.segmentation.engine_mmseg", reason="mmseg is here without mmcv or mmengine")

from mmengine.optim import OptimWrapper

from mae_core.training.finite import non_finite
from transfer.segmentation.engine_mmseg.checkpoints import load_safely

DIGITS = Path(__file__).parents[3] / "configs" / "segmentation" / "digits.py"


def test_a_step_whose_gradient_is_not_finite_is_skipped(tmp_path, tiny, monkeypatch):
    real, count = OptimWrapper.backward, [0]

    def spoiled(self, loss, **more):
        real(self, loss, **more)
        count[0] += 1
        if count[0] == 2:
            next(p for group in self.param_groups for p in group["params"] if p.grad is not None).grad[0] = torch.nan

    monkeypatch.setattr(OptimWrapper, "backward", spoiled)
    options = {**tiny, "iterations": 3, "default_hooks.checkpoint.interval": 1}
    train_segmenter(DIGITS, work_dir=tmp_path / "run", cfg_options=options)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "non-finite gradient" in line.get("event", "")] == [2]
    assert not non_finite(load_file(tmp_path / "run" / "segmenter.safetensors"))


def test_a_rate_that_is_too_high_ends_without_a_file_that_is_not_finite(tmp_path, tiny):
    options = {**tiny, "iterations": 30, "lr": 1e30, "default_hooks.checkpoint.interval": 1}
    with pytest.raises(UserError, match=r"start again with a lower optim_wrapper.optimizer.lr, in another --work-dir"):
        train_segmenter(DIGITS, work_dir=tmp_path / "run", cfg_options=options)
    assert not (tmp_path / "run" / "segmenter.safetensors").exists()
    for file in (tmp_path / "run").glob("iter_*.pth"):
        assert not non_finite(load_safely(str(file), "cpu")["state_dict"])
