"""The backbone that is registered with mmseg: ``DenseViT`` under mmseg's conventions."""

from __future__ import annotations

from collections.abc import Sequence

from mmengine.dist import is_main_process
from mmseg.registry import MODELS
from torch import Tensor

from mae_core.errors import UserError
from mae_core.models.sizes import AnySize, size_of
from mae_core.weights.encoder_file import EncoderFile
from mae_core.weights.report import LoadReport
from transfer.backbone import DenseViT
from transfer.trunk import load_pretrained

PUBLISHED_TAPS = {"base": (3, 5, 7, 11), "large": (7, 11, 15, 23)}
"""The blocks that BEiT's UperNet reads, which the MAE paper took over (A.4); other sizes: the last of each quarter."""


@MODELS.register_module()
class MAECoreViT(DenseViT):
    """``DenseViT`` as an mmseg backbone: global attention, the cls token kept in the sequence, four maps of one stride.

    taps                0-based blocks whose output is emitted; ``PUBLISHED_TAPS`` or the quarter taps when None
    relative_positions  ``table``: BEiT's biases with entries for the cls token, a table a block, from zero; ``none``
    layer_scale         initial value of LayerScale, None for none; 1.0 starts as the pre-trained trunk is
    weights             a file, run directory or checkpoint that ``init_weights`` loads; None for a random start; the
                        attribute ``source`` is what was read of it before, so that it is read once
    trainable_blocks    number of last blocks that learn, the others stay as in ``weights``; 0: none, None: all
    allow_missing       patterns of tensors that ``weights`` may lack; they are newly initialised

    ``image_size`` is the crop that positions and tables are stored for; they are resized for any other size.
    """

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
    ) -> None:
        super().__init__(
            size,
            image_size=image_size,
            patch_size=patch_size,
            in_chans=in_chans or 3,
            taps=PUBLISHED_TAPS.get(size_of(size).name) if taps is None else taps,
            relative_positions=relative_positions,
            layer_scale=layer_scale,
            cls_token=size_of(size).cls_token,
            drop_path=drop_path,
            checkpointing=checkpointing,
        )
        if trainable_blocks is not None:
            if isinstance(trainable_blocks, bool) or not isinstance(trainable_blocks, int) or trainable_blocks < 0:
                raise UserError(f"trainable_blocks is {trainable_blocks!r}; give a number of blocks, 0 for none")
            self.freeze(trainable_blocks)
        self.weights = weights
        self.source: EncoderFile | None = None
        self.allow_missing = tuple(allow_missing)
        self.loading: LoadReport | None = None

    def init_weights(self) -> None:
        """Load ``weights``, unless that is done, and print the report; called by mmengine before training.

        timm's method of this name would initialise the whole trunk again. Raises ``UserError`` if it does not fit.
        """
        if self.weights is not None:
            self.loading = load_pretrained(self, self.source or self.weights, allow_missing=self.allow_missing)
            if is_main_process():
                self.loading.print()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """(B, C, H, W) -> a (B, D, ceil(H/patch), ceil(W/patch)) map per tap."""
        return tuple(super().forward(images))
