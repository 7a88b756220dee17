"""Two tiny ViTs under names of timm's: BEiT's tables of relative positions, and DINOv3's rotary positions with
registers."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from timm.models import beit, eva, register_model
from timm.models.beit import Beit
from timm.models.eva import Eva
from torch import nn

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def _built(family: type[nn.Module], options: dict, **given) -> nn.Module:
    for name in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        given.pop(name, None)
    model = family(**{**options, **given})
    model.pretrained_cfg = {"input_size": (3, 32, 32), "mean": (0.5, 0.4, 0.3), "std": (0.3, 0.2, 0.1)}
    return model


def tiny_beit(pretrained: bool = False, **given) -> nn.Module:
    return _built(Beit, {**TINY, "use_abs_pos_emb": False, "use_rel_pos_bias": True, "init_values": 0.1}, **given)


def tiny_dinov3(pretrained: bool = False, **given) -> nn.Module:
    rotary = {"use_rot_pos_emb": True, "use_abs_pos_emb": False, "rope_type": "dinov3", "rope_rotate_half": True}
    norms = {"use_fc_norm": False, "num_reg_tokens": 4, "init_values": 0.1, "swiglu_mlp": True}
    return _built(Eva, {**TINY, **rotary, **norms}, **given)


for made, home in ((tiny_beit, beit), (tiny_dinov3, eva)):
    made.__module__ = home.__name__  # whose checkpoint_filter_fn converts their files
    home.default_cfgs[made.__name__] = next(iter(home.default_cfgs.values()))
    setattr(home, made.__name__, made)
    register_model(made)


def weights_of(name: str, folder: Path) -> Path:
    """A file of the tiny model, as timm saves one with a head of five classes."""
    torch.manual_seed(0)
    path = folder / f"{name}.safetensors"
    save_file(timm.create_model(name, num_classes=5).state_dict(), path)
    return path
