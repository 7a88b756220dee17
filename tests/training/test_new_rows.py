"""A masking and a target with an option of their own: one class and one row each, and no other file is touched."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from typer.testing import CliRunner

from mae_core.cli.main import app
from mae_core.config.load import load_config
from mae_core.config.schema import ConfigError
from mae_core.errors import UserError
from mae_core.masking import MASKERS, RandomMasking, build_masker, keep_lowest, num_visible
from mae_core.targets import TARGETS, PixelTarget
from mae_core.training.plan import differences_from_paper
from mae_core.training.pretrain import pretrain
from mae_core.training.pretrain_config import PretrainConfig
from mae_core.weights.load import load_mae


@dataclass(frozen=True)
class StripeMasking(RandomMasking):
    """Hide the first columns of each group of ``period``."""

    period: int = 2
    phase: float = 0.0

    def __call__(self, batch, grid, generator=None):
        cols = torch.arange(grid.num_patches) % grid.cols
        order = ((self.period - 1 - cols % self.period) * grid.num_patches + cols).double()
        return keep_lowest(order.expand(batch, -1), num_visible(grid.num_patches, self.ratio))


class PowerTarget(PixelTarget):
    """Pixels to a power, sign kept."""

    name = "power"

    def __init__(self, exponent: float, offset: float = 0.0) -> None:
        super().__init__()
        self.exponent, self.offset = exponent, offset

    def forward(self, images, patch):
        pixels = super().forward(images, patch)
        return pixels.sign() * pixels.abs() ** self.exponent + self.offset


@pytest.fixture(autouse=True)
def rows(monkeypatch):
    monkeypatch.setitem(MASKERS, "stripes", StripeMasking)
    monkeypatch.setitem(TARGETS, "power", PowerTarget)


OPTIONS = ("masking.kind=stripes", "masking.options.period=4", "target.kind=power", "target.options.exponent=0.5")


def test_options_travel_from_the_command_line_to_the_picture(pretrain_options, tmp_path, write_images, capsys):
    write_images(tmp_path / "images", 8)
    file = tmp_path / "mine.yaml"
    file.write_text("masking: {kind: stripes, options: {period: 2}}\ntarget: {kind: power, options: {exponent: 0.5}}\n")
    arguments = [*pretrain_options, "masking.options.period=4", f"data.path={tmp_path / 'images'}"]
    config = load_config(PretrainConfig, file, [*arguments, f"output={tmp_path / 'run'}", "optim.epochs=1"])
    assert config.masking.options == {"period": 4, "phase": 0.0}
    assert config.target.options == {"exponent": 0.5, "offset": 0.0}
    pretrain(config)
    recorded = load_config(PretrainConfig, tmp_path / "run" / "config.yaml")
    assert (recorded.masking, recorded.target) == (config.masking, config.target)
    model = load_mae(tmp_path / "run")
    assert model.masker == StripeMasking(config.masking.ratio, period=4)
    assert isinstance(model.target, PowerTarget) and model.target.exponent == 0.5
    described = model.describe()
    assert described["masking_options"] == {"period": 4, "phase": 0.0} and described["masking"] == "stripes"
    assert described["target_options"] == {"exponent": 0.5, "offset": 0.0} and described["target"] == "power"
    arguments = ["reconstruct", str(tmp_path / "run"), str(tmp_path / "images"), "--out", str(tmp_path / "x.png")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "x.png").is_file()
    lines = differences_from_paper(config)
    assert "  masking.options.period: None -> 4" in lines and "  target.options.exponent: None -> 0.5" in lines


@pytest.mark.parametrize(
    "given, message",
    [
        (["masking.options.perod=4"], "masking.options: unknown option 'perod'; did you mean 'period'?"),
        (["masking.options.period=often"], "masking.options: period: input should be a valid integer"),
        (["masking.options.ratio=0.5"], "masking.options: unknown option 'ratio'"),
        (["masking.kind=random"], "masking.options: unknown option 'period'; known: nothing"),
        (["target.options.exponnt=2"], "unknown option 'exponnt'; did you mean 'exponent'?"),
        (["target.kind=pixels"], "target.options: unknown option 'exponent'; known: nothing"),
        (["target.kind=pca", "target.pca=x"], "target.options: unknown option 'exponent'; known: nothing"),
    ],
)
def test_an_option_that_is_not_the_rows_is_refused(given, message):
    with pytest.raises(ConfigError) as refused:
        load_config(PretrainConfig, None, [*OPTIONS, *given])
    assert message in str(refused.value)


def test_an_option_without_a_default_must_be_given():
    with pytest.raises(ConfigError, match=r"target\.options: exponent: field required"):
        load_config(PretrainConfig, None, ["target.kind=power"])


def test_a_masking_of_a_file_with_other_options_is_refused(monkeypatch):
    from mae_core.models.mae import build_mae

    small = {"image_size": 32, "patch_size": 8, "decoder_depth": 1, "decoder_width": 32, "decoder_heads": 2}
    model = build_mae("nano", masking=build_masker("stripes", 0.75, {"period": 4}), **small)
    assert model.masker == StripeMasking(0.75, 4)
    with pytest.raises(UserError, match=r"masking 'stripes' does not take the options .*; it has period, phase"):
        build_masker("stripes", 0.75, {"step": 4})
