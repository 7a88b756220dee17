"""Hides what the extras of setup.py install, from this process and from those it starts:

    PYTHONPATH=tests/without_extras python -m pytest tests/core tests/data tests/measures tests/training

A test that needs a hidden package asks for it with ``pytest.importorskip`` and is skipped; code of the core that
imports one fails. CI does the same with an install of the core alone.
"""

import importlib.machinery
import sys

EXTRAS = {
    *("pycocotools", "mmcv", "mmengine", "mmseg", "detectron2", "fvcore", "webdataset", "datasets", "sklearn"),
    *("onnx", "onnxscript", "onnxruntime", "transformers", "websocket", "imagecodecs", "peft"),
}
"""Import names of what ``pip install .`` does not bring."""


class WithoutExtras(importlib.machinery.PathFinder):
    """Python's own finder, to which the extras do not exist."""

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        """The spec of a module, or None where it is hidden or nowhere."""
        return None if fullname.partition(".")[0] in EXTRAS else super().find_spec(fullname, path, target)


sys.meta_path[:] = [WithoutExtras if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
