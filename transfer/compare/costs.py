"""What an encoder costs: parameters, operations and images a second of a forward pass on this machine."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mae_core.atomic import write_json
from mae_core.config.load import load_config
from mae_core.config.schema import Size
from mae_core.patches import as_pair
from mae_core.training.distributed import device_of
from mae_core.training.finetune import build_model
from mae_core.training.finetune_config import FinetuneConfig
from mae_core.weights.encoder_file import HEADS
from transfer.compare.encoders import Encoder, facts_of
from transfer.compare.kinds import KINDS

BATCH, ROUNDS = 8, 5


def cost_of(encoder: Encoder, image_size: Size | None, cache: Path) -> dict[str, Any]:
    """Parameters of the trunk, FLOPs of an image's forward pass (a multiplication and an addition counted as two), and
    images/s, measured once and kept in ``cache``."""
    file = encoder.file or encoder.random
    if image_size is None and file is not None:
        image_size = facts_of(file, encoder.trunk).image_size
    words = [*encoder.words(KINDS["finetune"])]
    if image_size is not None:
        words.append("data.image_size=[{},{}]".format(*as_pair(image_size)))
    asked = {"words": words, "threads": torch.get_num_threads()}
    if cache.is_file() and (known := json.loads(cache.read_text(encoding="utf-8")))["asked"] == asked:
        return dict(known)
    config = load_config(FinetuneConfig, None, words)
    model = build_model(config, 1)[0].eval()
    found = {"asked": asked, **measured(model, config.data.channels, as_pair(config.data.image_size))}
    write_json(cache, found)
    return found


@torch.inference_mode()
def measured(model: nn.Module, channels: int, image_size: tuple[int, int]) -> dict[str, Any]:
    """Of a classifier without its head."""
    device = device_of()
    model.to(device)
    image = torch.zeros(1, channels, *image_size, device=device)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(image)
    images = image.expand(BATCH, -1, -1, -1).contiguous()
    seconds = []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        model(images)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return {
        "parameters": sum(p.numel() for name, p in model.named_parameters() if not name.startswith(HEADS)),
        "flops": counter.get_total_flops(),
        "images_per_second": round(BATCH / statistics.median(seconds[1:]), 1),
        "image_size": list(image_size),
    }
