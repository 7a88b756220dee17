"""Probes of a frozen trunk: batch norm without affine and one linear layer (paper, A.1, Table 10), on one feature of
the trunk or on patch tokens that learned queries pool."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from mae_core.errors import UserError
from mae_core.models.timm_trunk import Encoder

NORM_EPS = 1e-6


class Probe(nn.Module):
    """Heads on what a frozen trunk says; several heads, for several learning rates, share its pass.

    ``heads`` are the parts that learn, one a learning rate. Without a ``trunk`` the input is what the trunk would say.
    The trunk is no part of the module's state: checkpoints name its digest alone, and refuse another trunk. Nor does
    ``to`` move it.
    """

    heads: nn.ModuleList

    def __init__(self, trunk: Encoder | None) -> None:
        super().__init__()
        self._trunk = () if trunk is None else (trunk.requires_grad_(False).eval(),)  # a tuple: no submodule

    def _note_trunk(self) -> None:
        for trunk in self._trunk:
            self._digest = digest_of(trunk)
            self.register_buffer("trunk_digest", self._digest.clone())
            self.register_load_state_dict_post_hook(_check_trunk)

    def features(self, inputs: Tensor) -> Tensor:
        """What the trunk says of (B, C, H, W) images; without a trunk the inputs are that already."""
        for trunk in self._trunk:
            with torch.no_grad():
                inputs = trunk(inputs)
        return inputs.float()

    def exported(self, number: int) -> dict[str, Tensor]:
        """The tensors of head ``number`` after training, its batch norm folded into ``head.weight``, ``head.bias``."""
        raise NotImplementedError


class LinearProbe(Probe):
    """One linear layer a head, on features (B, D).

    Features are standardised by the batch while training and by running statistics after (momentum 0.1); the norm has
    nothing to learn, so that all heads share it too.
    """

    def __init__(
        self, trunk: Encoder | None, width: int, num_classes: int, *, heads: int = 1, batch_norm: bool = True
    ) -> None:
        super().__init__(trunk)
        self.norm = standardiser(width, batch_norm)
        start = nn.init.trunc_normal_(torch.empty(num_classes, width), std=0.01)  # the same for all, however many
        self.heads = nn.ModuleList(nn.Linear(width, num_classes) for _ in range(heads))
        for head in self.heads:
            head.load_state_dict({"weight": start, "bias": torch.zeros(num_classes)})
        self._note_trunk()

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, C, H, W) images, or (B, D) features without a trunk -> (heads, B, classes)."""
        standardised = self.norm(self.features(inputs))
        return torch.stack([head(standardised) for head in self.heads])

    def folded(self, number: int) -> tuple[Tensor, Tensor]:
        """Weight (classes, D) and bias of one linear layer that does what batch norm and head ``number`` do after
        training."""
        head = self.heads[number]
        return fold(self.norm, head.weight, head.bias)

    def exported(self, number: int) -> dict[str, Tensor]:
        """See ``Probe.exported``."""
        weight, bias = self.folded(number)
        return {"head.weight": weight, "head.bias": bias}


class AttentivePool(nn.Module):
    """Cross-attention of learned queries over tokens: (B, N, D) -> (B, D), as efficient probing (arXiv 2506.10178).

    The weights of query m are softmax(tokens . query_m / sqrt(D)) over the tokens; it averages its own D / queries
    of the channels of the values, a linear map of the tokens. There are no projections of keys and output: the queries
    and the linear layer that follows can take their place.
    """

    def __init__(self, width: int, queries: int) -> None:
        super().__init__()
        if width % queries:
            raise UserError(f"probe.queries={queries} does not divide a width of {width}; give a number that does")
        self.queries = nn.Parameter(nn.init.trunc_normal_(torch.empty(queries, width), std=0.02))
        self.value = nn.Linear(width, width, bias=False)
        nn.init.xavier_uniform_(self.value.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) -> (B, D)."""
        M, D = self.queries.shape
        weights = (tokens @ self.queries.t() * D**-0.5).softmax(dim=1)
        averages = weights.transpose(1, 2) @ tokens  # (B, M, D): the map of an average is the average of the map
        return torch.einsum("bmd,mkd->bmk", averages, self.value.weight.view(M, D // M, D)).flatten(1)


class AttentiveHead(nn.Module):
    """Learned pooling, batch norm, and a linear layer."""

    def __init__(self, width: int, num_classes: int, queries: int, batch_norm: bool) -> None:
        super().__init__()
        self.pool = AttentivePool(width, queries)
        self.norm = standardiser(width, batch_norm)
        self.linear = nn.Linear(width, num_classes)
        nn.init.trunc_normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) -> (B, classes)."""
        logits: Tensor = self.linear(self.norm(self.pool(tokens)))
        return logits


class AttentiveProbe(Probe):
    """An ``AttentiveHead`` a learning rate, on the patch tokens of a trunk without pooling and not on the
    ``prefix`` tokens before them."""

    def __init__(
        self,
        trunk: Encoder | None,
        width: int,
        num_classes: int,
        *,
        queries: int,
        heads: int = 1,
        batch_norm: bool = True,
        prefix: int = 1,
    ) -> None:
        super().__init__(trunk)
        self.prefix = prefix
        self.heads = nn.ModuleList(AttentiveHead(width, num_classes, queries, batch_norm) for _ in range(heads))
        for head in self.heads[1:]:
            head.load_state_dict(self.heads[0].state_dict())
        self._note_trunk()

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, C, H, W) images, or (B, prefix + N, D) tokens without a trunk -> (heads, B, classes)."""
        patches = self.features(inputs)[:, self.prefix :]
        return torch.stack([head(patches) for head in self.heads])

    def exported(self, number: int) -> dict[str, Tensor]:
        """See ``Probe.exported``; with ``pool.queries`` (M, D) and ``pool.value.weight`` (D, D)."""
        head = self.heads[number]
        weight, bias = fold(head.norm, head.linear.weight, head.linear.bias)
        pool = {f"pool.{name}": tensor for name, tensor in head.pool.state_dict().items()}
        return {**pool, "head.weight": weight, "head.bias": bias}


class AttentiveClassifier(nn.Module):
    """What an attentive probe leaves: a trunk without pooling, learned queries that pool its patch tokens, and a linear
    layer, into which the batch norm was folded. The trunk is a part of it, under the names of its file."""

    def __init__(self, trunk: Encoder, num_classes: int, queries: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.pool = AttentivePool(trunk.num_features, queries)
        self.head = nn.Linear(trunk.num_features, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, classes)."""
        logits: Tensor = self.head(self.pool(self.trunk(images)[:, self.trunk.prefix :].float()))
        return logits


def standardiser(width: int, batch_norm: bool) -> nn.Module:
    """Batch norm with nothing to learn, or nothing."""
    return nn.BatchNorm1d(width, affine=False, eps=NORM_EPS) if batch_norm else nn.Identity()


def fold(norm: nn.Module, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of one linear layer that does what ``norm`` of ``standardiser`` does after training, and then a
    linear layer."""
    if not isinstance(norm, nn.BatchNorm1d):
        return weight, bias
    assert norm.running_var is not None and norm.running_mean is not None
    weight = weight / (norm.running_var + NORM_EPS).sqrt()
    return weight, bias - weight @ norm.running_mean


def digest_of(model: nn.Module) -> Tensor:
    """(32,) uint8 on the CPU: SHA-256 of the names and values of a model's tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)


def _check_trunk(probe: Probe, _: object) -> None:
    if not torch.equal(probe.trunk_digest.cpu(), probe._digest):
        raise UserError(
            "this probe was trained on another trunk: the weights file has changed since; restore it, or "
            "start again in another output folder"
        )
