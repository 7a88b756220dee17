"""The pyramid backbone as detectron2 knows backbones: by name in a config, by call in a LazyConfig."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone

from mae_core.models.sizes import AnySize, size_of
from transfer.backbone import DenseViT
from transfer.pyramid import NORMS, PYRAMIDS, Norm, PyramidBackbone
from transfer.timm_backbone import Dense
from transfer.trunk import load_pretrained


class MAECoreBackbone(PyramidBackbone, Backbone):
    """``PyramidBackbone`` with detectron2's account of its outputs; images are padded to squares of ``square`` pixels,
    or, where that is 0, to the coarsest stride."""

    def __init__(
        self, vit: Dense, *, kind: str = "four_stage", channels: int = 256, norm: Norm | None, square: int = 0
    ) -> None:
        super().__init__(vit, kind=kind, channels=channels, norm=norm)
        self.square = square
        self._out_features = [level.name for level in self.levels]

    @property
    def padding_constraints(self) -> dict[str, int]:
        """What detectron2 pads the images of a batch to."""
        return {"size_divisibility": self.levels[-1].stride, "square_size": self.square}

    @property
    def size_divisibility(self) -> int:
        """The coarsest stride."""
        return self.levels[-1].stride

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and strides by the names of the maps."""
        return {level.name: ShapeSpec(channels=level.channels, stride=level.stride) for level in self.levels}


def mae_core_backbone(
    size: AnySize = "base",
    *,
    image_size: int | Sequence[int] = 1024,
    position_size: int | Sequence[int] | None = None,
    patch_size: int | None = None,
    in_chans: int = 3,
    pyramid: str = "simple",
    channels: int = 256,
    norm: str = "ln",
    square: int | None = None,
    weights: str | None = None,
    **options: Any,
) -> MAECoreBackbone:
    """A backbone from plain values, for ``LazyCall``; the defaults are ViTDet's.

    ``image_size``: what global tables of relative positions, and the stored positions where ``position_size`` is not
    given, are made for. ``square``: what batches are padded to, ``image_size`` when None. ``weights``: an encoder of
    any known format. ``options``: what else ``DenseViT`` takes, such as window, relative_positions and drop_path.
    """
    vit = DenseViT(
        size,
        image_size=image_size if position_size is None else position_size,
        relative_size=image_size,
        patch_size=patch_size,
        in_chans=in_chans,
        taps=PYRAMIDS[pyramid].taps(size_of(size)),
        **options,
    )
    if weights:
        load_pretrained(vit, weights).print()
    if square is None:
        square = image_size if isinstance(image_size, int) else max(image_size)
    return MAECoreBackbone(vit, kind=pyramid, channels=channels, norm=NORMS[norm], square=square)


def add_mae_core_config(cfg: CfgNode) -> None:
    """Add ``MODEL.MAE_CORE``, the arguments of ``mae_core_backbone``, to a config of detectron2's older kind."""
    cfg.MODEL.MAE_CORE = CfgNode(
        {
            "SIZE": "base",
            "IMAGE_SIZE": 1024,
            "PYRAMID": "simple",
            "CHANNELS": 256,
            "NORM": "ln",
            "WINDOW": 14,
            "RELATIVE_POSITIONS": "decomposed",
            "DROP_PATH": 0.1,
            "CHECKPOINTING": False,
            "WEIGHTS": "",
        }
    )


@BACKBONE_REGISTRY.register()
def build_mae_core_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> MAECoreBackbone:
    """``MODEL.BACKBONE.NAME: build_mae_core_backbone``, after ``add_mae_core_config``."""
    values = {name.lower(): value for name, value in cfg.MODEL.MAE_CORE.items()}
    return mae_core_backbone(in_chans=input_shape.channels, **values)
