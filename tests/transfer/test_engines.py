import sys

import pytest

from mae_core.errors import UserError
from transfer import engines
from transfer.engines import DETECTION, ENGINES, SEGMENTATION, installed, require


def test_an_engine_that_is_here_is_accepted():
    require("torchvision")


def test_a_missing_package_is_named_with_its_install_line(monkeypatch):
    monkeypatch.setattr(engines, "installed", lambda package: package != "pycocotools")
    with pytest.raises(UserError, match=r'torchvision needs pycocotools, .*pip install "mae-transfer\[detection\]"'):
        require("torchvision")


def test_an_unknown_engine_lists_the_known_ones():
    with pytest.raises(UserError, match="unknown engine 'mmdet'; known: torchvision, detectron2, mmseg"):
        require("mmdet")


def test_a_bare_folder_is_no_install(tmp_path, monkeypatch):
    (tmp_path / "hollow_engine").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not installed("hollow_engine")
    (tmp_path / "hollow_engine" / "__init__.py").touch()
    sys.modules.pop("hollow_engine", None)
    assert installed("hollow_engine")


def test_a_package_that_does_not_exist_is_not_installed():
    assert not installed("no_such_package_at_all")


def test_every_engine_has_a_task_and_an_install_line():
    assert set(DETECTION) == {"torchvision", "detectron2"}
    assert set(SEGMENTATION) == {"mmseg"}
    assert all(engine.install.startswith("pip install") for name, engine in ENGINES.items() if name != "detectron2")
    assert "https://detectron2.readthedocs.io/" in ENGINES["detectron2"].install  # not on the package index
