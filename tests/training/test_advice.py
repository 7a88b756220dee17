"""What a message advises works when it is followed."""

from __future__ import annotations

import pytest

from mae_core.config.load import load_config
from mae_core.errors import UserError
from mae_core.training.pretrain import pretrain
from mae_core.training.pretrain_config import PretrainConfig


def test_a_lower_rate_in_another_folder_after_losses_that_are_not_finite(pretrain_options, tmp_path, write_images):
    write_images(tmp_path / "images", 8)
    options = [*pretrain_options, f"data.path={tmp_path / 'images'}", "optim.warmup_epochs=0", "optim.epochs=12"]
    options += ["log.checkpoint_every=1"]

    def run(rate: str, folder: str, **more) -> None:
        config = load_config(PretrainConfig, None, [*options, f"optim.base_lr={rate}", f"output={tmp_path / folder}"])
        pretrain(config, **more)

    with pytest.raises(UserError, match=r"not finite .* start again with a lower optim.base_lr, in another folder"):
        run("1e30", "first")
    with pytest.raises(UserError, match="not finite"):
        run("1e-3", "first", resume=True)  # "if that does not help": the checkpoint's weights are too large
    run("1e-3", "second")
    assert (tmp_path / "second" / "encoder.safetensors").is_file()
