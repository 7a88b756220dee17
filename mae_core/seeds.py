"""Randomness as a function of where we are, never of who computes it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

SHUFFLE, AUGMENT, MASK, STEP, MIX, HELD_OUT, SPLIT = range(7)
"""Streams: two uses of randomness at the same place never share a seed."""


def derive_seed(seed: int, *place: int) -> int:
    """A 63-bit seed for a place in a run, such as ``(stream, epoch, index)``: equal input, equal output, on every
    machine."""
    return int(np.random.SeedSequence([seed, *place]).generate_state(1, np.uint64)[0] >> 1)


def generator_at(seed: int, *place: int) -> torch.Generator:
    """A CPU generator for a place in a run."""
    return torch.Generator().manual_seed(derive_seed(seed, *place))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run the body with torch's (CPU), numpy's and Python's global generators seeded, and put their states back after.

    For libraries that draw from the global generators, such as timm's RandAugment and torchvision's transforms.
    """
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.random.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)


@contextmanager
def torch_seeded(seed: int) -> Iterator[None]:
    """The same for torch's (CPU) global generator alone, in a thirtieth of the time: for what draws from no other."""
    state = torch.get_rng_state()
    torch.random.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)
