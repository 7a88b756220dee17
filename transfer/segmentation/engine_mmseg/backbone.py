"""The backbone that is registered with mmseg: ``DenseViT``, or any ViT of timm, under mmseg's conventions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmengine.dist import is_main_process
from mmseg.registry import MODELS
from torch import Tensor

from mae_core.errors import UserError
from mae_core.models.sizes import AnySize, ViTSize, size_of
from mae_core.weights.encoder_file import EncoderFile
from mae_core.weights.report import LoadReport
from transfer.backbone import DenseViT
from transfer.timm_backbone import DenseTimm, dense_timm
from transfer.trunk import load_pretrained

PUBLISHED_TAPS = {"base": (3, 5, 7, 11), "large": (7, 11, 15, 23)}
"""The blocks that BEiT's UperNet reads, which the MAE paper took over (A.4); other sizes: the last of each quarter."""


class LoadsWeights:
    """A backbone that mmengine asks to load its weights.

    weights  a file, run directory or checkpoint; None for a random start
    source   what was read of it before, so that it is read once
    """

    weights: str | None = None
    source: EncoderFile | None = None
    allow_missing: tuple[str, ...] = ()
    loading: LoadReport | None = None

    def init_weights(self) -> None:
        """Load ``weights``, unless that is done, and print the report; called by mmengine before training.

        timm's method of this name would initialise the whole trunk again. Raises ``UserError`` if it does not fit.
        """
        if self.weights is not None:
            backbone: Any = self
            self.loading = load_pretrained(backbone, self.source or self.weights, allow_missing=self.allow_missing)
            if is_main_process():
                self.loading.print()


class MAECoreTimm(LoadsWeights, DenseTimm):
    """``DenseTimm`` as an mmseg backbone: what ``MAECoreViT`` is with ``trunk``."""

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """(B, C, H, W) -> a (B, D, ceil(H/patch), ceil(W/patch)) map per tap."""
        return tuple(super().forward(images))


def taps_of(shape: ViTSize) -> Sequence[int]:
    """The blocks that UperNet reads."""
    return PUBLISHED_TAPS.get(shape.name, shape.quarter_taps)


@MODELS.register_module()
class MAECoreViT(LoadsWeights, DenseViT):
    """``DenseViT`` as an mmseg backbone: global attention, the cls token kept in the sequence, four maps of one stride.

    taps                0-based blocks whose output is emitted; ``PUBLISHED_TAPS`` or the quarter taps when None
    relative_positions  ``table``: BEiT's biases with entries for the cls token, a table a block, from zero; ``none``
    layer_scale         initial value of LayerScale, None for none; 1.0 starts as the pre-trained trunk is
    weights             a file, run directory or checkpoint that ``init_weights`` loads; None for a random start
    trunk               ``timm:NAME``: a ``MAECoreTimm`` is made, which has no relative positions and layer scale to add
    trainable_blocks    number of last blocks that learn, the others stay as in ``weights``; 0: none, None: all
    allow_missing       patterns of tensors that ``weights`` may lack; they are newly initialised

    ``image_size`` is the crop that positions and tables are stored for; they are resized for any other size.
    """

    def __new__(cls, *sizes: AnySize, trunk: str | None = None, **options: Any) -> Any:
        """This class, or with ``trunk`` a ``MAECoreTimm``; see ``timm_backbone``."""
        return super().__new__(cls) if trunk is None else timm_backbone(trunk, **options)

    def __init__(
        self,
        size: AnySize = "base",
        *,
        image_size: int | Sequence[int] = 512,
        patch_size: int | None = None,
        in_chans: int | None = None,
        taps: Sequence[int] | None = None,
        relative_positions: str = "table",
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        checkpointing: bool = False,
        trainable_blocks: int | None = None,
        weights: str | None = None,
        allow_missing: Sequence[str] = (),
        trunk: None = None,
    ) -> None:
        super().__init__(
            size,
            image_size=image_size,
            patch_size=patch_size,
            in_chans=in_chans or 3,
            taps=taps_of(size_of(size)) if taps is None else taps,
            relative_positions=relative_positions,
            layer_scale=layer_scale,
            cls_token=size_of(size).cls_token,
            drop_path=drop_path,
            checkpointing=checkpointing,
        )
        check_number_of_blocks(trainable_blocks)
        if trainable_blocks is not None:
            self.freeze(trainable_blocks)
        self.weights, self.allow_missing = weights, tuple(allow_missing)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """(B, C, H, W) -> a (B, D, ceil(H/patch), ceil(W/patch)) map per tap."""
        return tuple(super().forward(images))


def is_ours(backbone: Any) -> bool:
    """Whether a backbone is one of this file's."""
    return isinstance(backbone, LoadsWeights)


def check_number_of_blocks(trainable_blocks: int | None) -> None:
    """Raise ``UserError`` unless it is a number of blocks, or None."""
    if (
        isinstance(trainable_blocks, bool)
        or not isinstance(trainable_blocks, int | None)
        or (trainable_blocks or 0) < 0
    ):
        raise UserError(f"trainable_blocks is {trainable_blocks!r}; give a number of blocks, 0 for none")


def timm_backbone(
    trunk: str,
    *,
    image_size: int | Sequence[int] = 512,
    taps: Sequence[int] | None = None,
    in_chans: int | None = None,
    relative_positions: str = "none",
    layer_scale: float | None = None,
    trainable_blocks: int | None = None,
    weights: str | None = None,
    allow_missing: Sequence[str] = (),
    size: AnySize | None = None,
    **options: Any,
) -> MAECoreTimm:
    """The backbone ``timm:NAME``; arguments as ``MAECoreViT``'s, of which ``size`` is not read. Raises ``UserError``
    for what only the toolkit's own ViT has."""
    if relative_positions != "none" or layer_scale is not None:
        raise UserError(
            f"relative_positions={relative_positions} and layer_scale={layer_scale} are added to the toolkit's own ViT "
            f"alone; with {trunk} set model.backbone.relative_positions=none and model.backbone.layer_scale=None, or "
            f"trunk={trunk} of a recipe, which leaves them out"
        )
    check_number_of_blocks(trainable_blocks)
    chosen = taps_of if taps is None else lambda _: taps
    shared = {"image_size": image_size, "in_chans": in_chans or 3, **options}
    vit = dense_timm(trunk, taps=chosen, surface=MAECoreTimm, **shared)
    assert isinstance(vit, MAECoreTimm)
    vit.freeze(trainable_blocks)
    vit.weights, vit.allow_missing = weights, tuple(allow_missing)
    return vit
