"""Tokenizers: images -> one id per patch, for the token target (paper, Table 1d and 7).

Two are here: a small discrete VAE that ``mae train-tokenizer`` trains, and the encoder of the published DALL-E dVAE,
which BEiT and the paper use.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mae_core.errors import UserError
from mae_core.patches import PatchGrid, patchify, unpatchify

START_SCALE = 30.0
"""Of cosines to logits: large enough that the first tokens drawn already tell patches apart. It is learned."""


class Tokenizer(Protocol):
    """What the token target calls.

    Where it has them, these are used too: ``stride`` (pixels per token) and ``channels``, to refuse early what does not
    fit; ``decode(ids (B, rows, cols)) -> (B, C, H, W)``, to draw predictions; ``describe()``, to rebuild it from a
    checkpoint. A tokenizer that is a ``nn.Module`` is frozen, and stored with the model's weights.
    """

    @property
    def vocabulary(self) -> int:
        """How many tokens there are; ids are below it."""
        ...

    def __call__(self, images: Tensor) -> Tensor:
        """(B, C, H, W), pixels as read (8-bit files: 0..1) -> (B, N) or (B, rows, cols) int64, in raster order."""
        ...


class VAELoss(NamedTuple):
    """Scalars of a batch.

    loss            what is minimised
    reconstruction  mean squared error of the standardised pixels
    divergence      of the chance of each token over the batch from the uniform distribution, in nats
    used            tokens in use: the exponential of the entropy of those drawn
    """

    loss: Tensor
    reconstruction: Tensor
    divergence: Tensor
    used: Tensor


class DiscreteVAE(nn.Module):
    """A small discrete VAE with one token per patch, after Ramesh et al. 2021 (section 2.1), far smaller.

    A linear embedding of each ``stride`` x ``stride`` patch and residual 3x3 convolutions on the grid of patches; the
    logits of a token are the cosine to its code, scaled; the decoder is the encoder's mirror image. Any patch size, any
    number of channels.
    """

    kind: ClassVar[str] = "dvae"
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        *,
        vocabulary: int,
        stride: int,
        width: int,
        depth: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        self.vocabulary, self.stride, self.width, self.depth = vocabulary, stride, width, depth
        self.channels = len(mean)
        values = stride * stride * self.channels
        self.embed = nn.Linear(values, width)
        self.encoder = nn.Sequential(*(_Residual(width) for _ in range(depth)))
        self.query = nn.Conv2d(width, width, 1)
        self.codebook = nn.Embedding(vocabulary, width)
        self.log_scale = nn.Parameter(torch.tensor(START_SCALE).log())
        self.decoder = nn.Sequential(*(_Residual(width) for _ in range(depth)))
        self.pred = nn.Linear(width, values)
        self.register_buffer("mean", torch.tensor([*mean], dtype=torch.float32)[:, None, None])
        self.register_buffer("std", torch.tensor([*std], dtype=torch.float32)[:, None, None])

    def logits(self, images: Tensor) -> Tensor:
        """(B, C, rows*stride, cols*stride), pixels as read -> (B, vocabulary, rows, cols)."""
        grid = PatchGrid.of(tuple(images.shape[2:]), self.stride)
        tokens = self.embed(patchify((images - self.mean) / self.std, self.stride))
        query = self.query(self.encoder(tokens.transpose(1, 2).unflatten(2, (grid.rows, grid.cols))))
        codes = F.normalize(self.codebook.weight, dim=1)
        return torch.einsum("bdrc,vd->bvrc", F.normalize(query, dim=1), codes) * self.log_scale.exp()

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, rows*stride, cols*stride), pixels as read -> the likeliest tokens, (B, rows*cols) int64."""
        return self.logits(images).argmax(dim=1).flatten(1)

    def decode(self, ids: Tensor) -> Tensor:
        """(B, rows, cols) int64 -> (B, C, rows*stride, cols*stride), pixels as read."""
        return self._pixels(self.codebook(ids).permute(0, 3, 1, 2)) * self.std + self.mean

    def _pixels(self, codes: Tensor) -> Tensor:
        """(B, width, rows, cols) -> (B, C, rows*stride, cols*stride), standardised."""
        grid = PatchGrid(codes.shape[2], codes.shape[3], self.stride)
        return unpatchify(self.pred(self.decoder(codes).flatten(2).transpose(1, 2)), grid)

    def loss(self, images: Tensor, *, temperature: float, divergence_weight: float) -> VAELoss:
        """Reconstruct from tokens drawn with a straight-through Gumbel-softmax, by the global generator.

        images: (B, C, rows*stride, cols*stride), pixels as read. The divergence is that of the whole batch, not of each
        patch: a patch may be certain of its token, but all tokens are to be used.
        """
        logits = self.logits(images).float()
        choice = F.gumbel_softmax(logits, tau=temperature, hard=True, dim=1)
        codes = torch.einsum("bvrc,vd->bdrc", choice, self.codebook.weight)
        reconstruction = (self._pixels(codes).float() - (images - self.mean) / self.std).square().mean()
        divergence = math.log(self.vocabulary) - _entropy(logits.softmax(dim=1).mean(dim=(0, 2, 3)))
        used = _entropy(choice.detach().mean(dim=(0, 2, 3))).exp()
        return VAELoss(reconstruction + divergence_weight * divergence, reconstruction, divergence, used)

    def describe(self) -> dict[str, Any]:
        """Its shape; JSON values."""
        shape = ("kind", "vocabulary", "stride", "width", "depth", "channels")
        return {name: getattr(self, name) for name in shape}

    @classmethod
    def rebuild(cls, described: Mapping[str, Any]) -> DiscreteVAE:
        """With random weights, of a described shape."""
        zeros, ones = ([value] * described["channels"] for value in (0.0, 1.0))
        shape = {name: described[name] for name in ("vocabulary", "stride", "width", "depth")}
        return cls(**shape, mean=zeros, std=ones)


def _entropy(chances: Tensor) -> Tensor:
    """(V,) -> nats."""
    return torch.special.entr(chances.clamp(min=1e-12)).sum()


class _Residual(nn.Module):
    """(B, width, rows, cols) -> the same shape."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, width)
        self.mix = nn.Conv2d(width, width, 3, padding=1)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(F.gelu(self.mix(self.norm(x))))


class DalleEncoder(nn.Module):
    """The encoder of OpenAI's published dVAE (8192 tokens of 8x8 pixels), under the names of its published weights.

    It has no decoder here, so its tokens cannot be drawn.
    """

    kind: ClassVar[str] = "dalle"
    stride: ClassVar[int] = 8
    groups: ClassVar[int] = 4

    def __init__(self, *, vocabulary: int = 8192, channels: int = 3, width: int = 256, blocks: int = 2) -> None:
        super().__init__()
        self.vocabulary, self.channels, self.width, self.blocks_per_group = vocabulary, channels, width, blocks
        gain = 1 / (self.groups * blocks) ** 2
        parts: OrderedDict[str, nn.Module] = OrderedDict(input=_Convolution(channels, width, 7))
        before = width
        for group in range(self.groups):
            after = width * 2**group
            layers: OrderedDict[str, nn.Module] = OrderedDict()
            for block in range(blocks):
                layers[f"block_{block + 1}"] = _DalleBlock(after if block else before, after, gain)
            if group < self.groups - 1:
                layers["pool"] = nn.MaxPool2d(2)
            parts[f"group_{group + 1}"] = nn.Sequential(layers)
            before = after
        parts["output"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=_Convolution(before, vocabulary, 1)))
        self.blocks = nn.Sequential(parts)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, rows*8, cols*8), pixels in 0..1 -> (B, rows*cols) int64."""
        return self.blocks(0.8 * images.clamp(0, 1) + 0.1).argmax(dim=1).flatten(1)

    def describe(self) -> dict[str, Any]:
        """Its shape; JSON values."""
        return {
            "kind": self.kind,
            "vocabulary": self.vocabulary,
            "channels": self.channels,
            "width": self.width,
            "blocks": self.blocks_per_group,
        }

    @classmethod
    def rebuild(cls, described: Mapping[str, Any]) -> DalleEncoder:
        """With random weights, of a described shape."""
        return cls(**{name: described[name] for name in ("vocabulary", "channels", "width", "blocks")})

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> DalleEncoder:
        """With published weights, whose shapes say what it is. Raises ``UserError`` where they are not its own."""
        try:
            width, channels = state["blocks.input.w"].shape[:2]
            vocabulary = state["blocks.output.conv.w"].shape[0]
            model = cls(
                vocabulary=vocabulary,
                channels=channels,
                width=width,
                blocks=len({name.split(".")[2] for name in state if name.startswith("blocks.group_1.")}),
            )
            model.load_state_dict(dict(state))
        except (KeyError, ValueError, IndexError, RuntimeError) as error:
            raise UserError(f"these are not the weights of DALL-E's encoder ({str(error).splitlines()[0]})") from None
        return model


class _Convolution(nn.Module):
    """A convolution of odd kernel that keeps the size, under DALL-E's parameter names."""

    def __init__(self, channels: int, width: int, kernel: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(width, channels, kernel, kernel) / (channels * kernel**2) ** 0.5)
        self.b = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.w, self.b, padding=self.w.shape[-1] // 2)


class _DalleBlock(nn.Module):
    """Bottleneck residual block; its branch is scaled down by ``gain``."""

    def __init__(self, channels: int, width: int, gain: float) -> None:
        super().__init__()
        self.gain = gain
        self.id_path = _Convolution(channels, width, 1) if channels != width else nn.Identity()
        widths, kernels = (channels, width // 4, width // 4, width // 4, width), (3, 3, 3, 1)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for number, kernel in enumerate(kernels):
            layers[f"relu_{number + 1}"] = nn.ReLU()
            layers[f"conv_{number + 1}"] = _Convolution(widths[number], widths[number + 1], kernel)
        self.res_path = nn.Sequential(layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.id_path(x) + self.gain * self.res_path(x)


TOKENIZERS: dict[str, type[DiscreteVAE] | type[DalleEncoder]] = {row.kind: row for row in (DiscreteVAE, DalleEncoder)}
"""Kind in a file -> tokenizer. To add one: a class that describes and rebuilds itself, and a row."""


def rebuild_tokenizer(described: Mapping[str, Any]) -> DiscreteVAE | DalleEncoder:
    """A tokenizer of a described shape, to load weights into. Raises ``UserError`` for an unknown kind."""
    kind = described.get("kind")
    if kind not in TOKENIZERS:
        raise UserError(
            f"a tokenizer of kind {kind!r} cannot be rebuilt from a file; known kinds: {', '.join(TOKENIZERS)}"
        )
    return TOKENIZERS[kind].rebuild(described)
