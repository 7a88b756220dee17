"""ViTDet detectors of detectron2's model zoo: their names as a table, and a network from such a file."""

from __future__ import annotations

import re

from torch import Tensor, nn

from mae_core.pos_embed import resize_pos_embed
from mae_core.weights.files import WeightsFile
from mae_core.weights.load import load_state
from mae_core.weights.report import LoadReport

ZOO_PREFIX = "backbone.net."
CONVOLUTIONS = {2: (4, 5), 3: (1, 2), 4: (0, 1), 5: (1, 2)}
"""Level of the simple pyramid -> places of its 1x1 and 3x3 convolutions in the zoo's files; they carry their norms."""
RENAMED = {ZOO_PREFIX: "backbone.vit."}
for _level, (_one, _three) in CONVOLUTIONS.items():
    _theirs, _ours = f"backbone.simfp_{_level}", f"backbone.pyramid.stages.{_level - 2}"
    RENAMED |= {
        f"{_theirs}.{_one}.norm.": f"{_ours}.{_one + 1}.",
        f"{_theirs}.{_one}.": f"{_ours}.{_one}.",
        f"{_theirs}.{_three}.norm.": f"{_ours}.{_three + 2}.",
        f"{_theirs}.{_three}.": f"{_ours}.{_three + 1}.",
        f"{_theirs}.": f"{_ours}.",
    }
"""Start of a name in the zoo's files -> ours; the first row that fits holds. All other names are detectron2's own."""
OF_CLASSES = r"roi_heads\.(box_predictor(\.\d)?\.(cls_score|bbox_pred)|mask_head\.predictor)\."
"""Layers whose size is the number of classes."""
NOT_WEIGHTS = ("pixel_mean", "pixel_std", "proposal_generator.anchor_generator.cell_anchors")
"""What older files hold besides weights."""


def is_zoo_file(file: WeightsFile) -> bool:
    """Whether a file holds a whole detector in the zoo's layout, by its names alone."""
    return all(any(name.startswith(start) for name in file.state) for start in (ZOO_PREFIX, "roi_heads."))


def our_name(name: str) -> str:
    """The name of a tensor of the zoo in our network."""
    for theirs, ours in RENAMED.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def load_zoo_detector(network: nn.Module, file: WeightsFile, *, other_classes: bool = False) -> LoadReport:
    """Load a ViTDet detector of the zoo into ``network``; positions are resized to its grid.

    With ``other_classes`` the layers whose size is the number of classes may differ, and stay as they are. Raises
    ``UserError`` where any other tensor is left over on either side or has another shape.
    """
    given, wanted = file.state, network.state_dict()
    report = LoadReport(str(file.path))
    tensors, new = {}, []
    for name, tensor in given.items():
        target = our_name(name)
        if target.endswith("pos_embed") and target in wanted:
            tensor = _resized(network, tensor, target, report)
        if other_classes and re.match(OF_CLASSES, target) and target in wanted and tensor.shape != wanted[target].shape:
            new.append(target)
        else:
            tensors[name] = tensor
    return load_state(
        network,
        tensors,
        file.path,
        new=new,
        unused={f"{name}*": "not a weight" for name in NOT_WEIGHTS},
        rename={name: our_name(name) for name in tensors},
        report=report,
        remedy="take the recipe of its size in configs/detection, with as many classes",
    )


def _resized(network: nn.Module, table: Tensor, name: str, report: LoadReport) -> Tensor:
    side = int((table.shape[1] - 1) ** 0.5)
    rows, cols = network.backbone.vit.grid[:2]
    if (rows, cols) != (side, side) and side * side == table.shape[1] - 1:
        report.resized[name] = f"{side}x{side} -> {rows}x{cols}"
        return resize_pos_embed(table, (side, side), (rows, cols))
    return table
