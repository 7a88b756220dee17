"""Small models under the names of timm and their files; and two tiny ones of their own: BEiT's tables of relative
positions, and DINOv3's rotary positions with registers."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from timm.models import beit, eva, register_model
from timm.models.beit import Beit
from timm.models.eva import Eva
from torch import nn

from benchmarks.encoders import TIMMS

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


SMALL = {"depth": 2, "embed_dim": 96, "num_heads": 3}
NAMES = TIMMS


def small(name: str) -> dict:
    """What makes a small model of a name."""
    sam = {"global_attn_indexes": (1,), "embed_dim": 32, "num_heads": 1}
    return {**SMALL, **(sam if name.startswith("samvit") else {})}


def filled(model: torch.nn.Module) -> torch.nn.Module:
    """With random numbers everywhere, tables and layer scale too, which timm starts at nearly nothing."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1 if parameter.ndim > 1 else 0.5)
    return model.eval()


def file_of(name: str, folder, **options):
    """A weights file of ``name`` at its own size, as timm saves it."""
    path = folder / f"{name}.safetensors"
    if not path.exists():
        save_file(filled(timm.create_model(name, **small(name), **options)).state_dict(), path)
    return path
