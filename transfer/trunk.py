"""The trunk of a dense task: from an encoder's file to a ``DenseViT``, and its parameters as an optimizer takes them.

The same loader, the same report and the same groups for every engine of detection and segmentation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import nn

from mae_core.config.schema import Size
from mae_core.config.sections import OF_OUR_VIT
from mae_core.errors import UserError
from mae_core.models.sizes import AnySize, ViTSize, alike, size_of
from mae_core.training.groups import layer_decay_groups
from mae_core.weights.encoder_file import EncoderFile
from mae_core.weights.load import fit_state, opened_once, settled
from mae_core.weights.report import LoadReport
from transfer.backbone import DenseViT
from transfer.timm_backbone import Dense, DenseTimm, dense_timm

PLAIN_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d, nn.SyncBatchNorm)
"""The classes that ViTDet's optimizer recognises as norms; its own ``LayerNorm2d`` is missing from them."""
PRETRAINED_SIZE = 224
"""Images that the positions of a trunk from scratch belong to where they are stored as a file's would be."""

Decayed = Literal["weights", "vitdet", "all"]


class Trunk(NamedTuple):
    """The backbone, and the report of its weights (None from scratch)."""

    vit: Dense
    report: LoadReport | None


def dense_trunk(
    trunk: str | None,
    *,
    size: AnySize = "base",
    image_size: Size,
    taps: Callable[[ViTSize], Sequence[int]],
    patch_size: int | None = None,
    in_chans: int = 3,
    **options: Any,
) -> Dense:
    """A new trunk for a dense task: ``timm:NAME``, or a ``DenseViT`` of ``size`` where ``trunk`` is None.

    ``image_size``: what its positions are stored for. ``taps``: from its size to the blocks that are read. ``options``:
    what else ``DenseViT`` takes; of a trunk of timm those in ``OF_OUR_VIT`` are left out.
    """
    shared: dict[str, Any] = {"image_size": image_size, "patch_size": patch_size, "in_chans": in_chans}
    if trunk is None:
        return DenseViT(size, taps=taps(size_of(size)), **shared, **options)
    kept = {name: value for name, value in options.items() if name not in OF_OUR_VIT}
    return dense_timm(trunk, taps=taps, **shared, **kept)


def build_trunk(
    source: EncoderFile | None,
    *,
    trunk: str | None = None,
    size: AnySize | None = None,
    patch_size: int | None = None,
    in_chans: int = 3,
    taps: Callable[[ViTSize], Sequence[int]],
    positions: Size | None = None,
    allow_missing: Sequence[str] = (),
    trainable_blocks: int | None = None,
    **options: Any,
) -> Trunk:
    """A dense trunk that holds the encoder of ``source``, or a random one where that is None.

    ``trunk``: ``timm:NAME`` of a random one. ``size``, ``patch_size`` and ``in_chans`` must be those of ``source``;
    without one, size is base when None. ``taps``: from a size to the blocks that are read. ``positions``: image size
    that the learned positions are stored for, that of ``source`` when None. ``trainable_blocks``: how many of the last
    blocks learn; None: all. ``options``: see ``dense_trunk``. Raises ``UserError`` where these contradict ``source``.
    """
    if source is None:
        stored = PRETRAINED_SIZE if positions is None else positions
        vit = dense_trunk(
            trunk,
            size=size or "base",
            image_size=stored,
            patch_size=patch_size,
            in_chans=in_chans,
            taps=taps,
            **options,
        )
        vit.freeze(trainable_blocks)
        return Trunk(vit, None)
    given = {"size": None if size is None else size_of(size).name, "patch_size": patch_size, "in_chans": in_chans}
    found = {"size": source.size, "patch_size": source.patch_size, "in_chans": source.in_chans}
    if size is not None and source.info.timm is None and alike(size, source.shape):
        given["size"] = source.size
    settled(source.path, given, must=found)
    vit = dense_trunk(
        source.info.timm,
        size=source.shape if source.info.timm is None else "",
        image_size=source.image_size if positions is None else positions,
        patch_size=source.patch_size,
        in_chans=source.in_chans,
        taps=taps,
        **options,
    )
    report = load_pretrained(vit, source, allow_missing=allow_missing)
    vit.freeze(trainable_blocks)
    return Trunk(vit, report)


def load_pretrained(
    backbone: Dense, source: EncoderFile | Path | str, *, allow_missing: Sequence[str] = ()
) -> LoadReport:
    """Load an encoder into ``backbone``: one that was read, or a weights file, run directory or checkpoint; returns the
    report.

    Positions are resized to the backbone's stored grid. ``allow_missing``: patterns of tensors that the file may lack
    and that are newly initialised. Raises ``UserError`` where the file is broken or of another architecture: a backbone
    never starts half loaded.
    """
    source = opened_once(source)
    check_same_trunk(backbone, source)
    unused = {
        "norm.*": "dense maps take no final norm",
        "fc_norm.*": "a classifier's norm",
        "head.*": "a classifier's head",
        "neck.*": "behind the last block",
    }
    if isinstance(backbone, DenseViT) and backbone.cls_token is None:
        unused["cls_token"] = "this backbone has no cls token"
    last = backbone.taps[-1]
    for index in range(last + 1, backbone.shape.depth):
        unused[f"blocks.{index}.*"] = f"behind block {last}, the last whose output is used"
    return fit_state(
        backbone, source, grid=backbone.grid[:2], new=backbone.may_be_new, unused=unused, allow_missing=allow_missing
    )


def check_same_trunk(backbone: Dense, source: EncoderFile) -> None:
    """Raise ``UserError`` where the backbone computes other features from the file's tensors than they were trained
    for: no shape tells heads, epsilon and activation."""
    built = backbone.trunk if isinstance(backbone, DenseTimm) else None
    if built != source.info.timm:
        of_file, of_backbone = (name or "the toolkit's own ViT" for name in (source.info.timm, built))
        raise UserError(f"{source.path} is read as {of_file}, and this backbone is {of_backbone}; give both alike")
    if built is not None:
        return
    for name in ("heads", "norm_eps", "activation"):
        built, found = getattr(backbone.shape, name), getattr(source.shape, name)
        if built != found and backbone.embed_dim == source.shape.width:
            raise UserError(
                f"{source.path} was trained with {name}={found}, and this backbone has {name}={built}; build it from "
                "the file's shape, read_encoder(FILE).shape"
            )


def parameter_groups(
    model: nn.Module, *, layer_decay: float, weight_decay: float, decayed: Decayed = "weights"
) -> list[dict[str, Any]]:
    """Groups of a model with ``backbone.vit`` for AdamW: learning rates by layer, and what is exempt from weight decay.

    ``decayed`` says what is decayed. "weights": biases, norms and positions are exempt. "vitdet" repeats ViTDet's code
    for ViT-B and ViT-L, which recognises only torch's own norm classes: the channel norms of pyramid and heads, all
    biases of other layers, and relative positions are decayed. "all" repeats its code for ViT-H, which exempts nothing.
    """
    groups = layer_decay_groups(
        model,
        model.backbone.vit,
        trunk="backbone.vit.",
        layer_decay=layer_decay,
        weight_decay=weight_decay,
    )
    if decayed == "weights":
        return groups
    exempt: set[int] = set()
    if decayed == "vitdet":
        exempt = {id(p) for m in model.modules() if type(m) in PLAIN_NORMS for p in m.parameters(recurse=False)}
        exempt |= {id(p) for name, p in model.named_parameters() if name.endswith("pos_embed")}
    split: list[dict[str, Any]] = []
    for group in groups:
        for free in (False, True):
            kept = [n for n, parameter in enumerate(group["params"]) if (id(parameter) in exempt) == free]
            if kept:
                chosen = {key: [group[key][n] for n in kept] for key in ("params", "param_names")}
                split.append({**group, **chosen, "weight_decay": 0.0 if free else weight_decay})
    return split
