"""Boards beside TensorBoard, with modules of the same calls in the places of wandb and mlflow."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mae_core.config.load import ConfigError, load_config
from mae_core.errors import UserError
from mae_core.training.boards import Boards, Logged
from mae_core.training.pretrain import pretrain
from mae_core.training.pretrain_config import PretrainConfig


class Service(ModuleType):
    """Notes the calls that a board makes; ``fails`` is the name of one that raises."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None, origin=f"{name}.py")
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.fails = ""

    def note(self, call: str, *args: Any, **words: Any) -> Any:
        self.calls.append((call, args, words))
        if call == self.fails:
            raise ConnectionError("no route\nto host")

    def of(self, call: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        return [(args, words) for name, args, words in self.calls if name == call]


@pytest.fixture
def wandb(monkeypatch) -> Service:
    module: Any = Service("wandb")

    def init(**words: Any) -> Any:
        module.note("init", **words)
        return SimpleNamespace(log=lambda *a, **w: module.note("log", *a, **w), finish=lambda: module.note("finish"))

    module.init, module.Image = init, lambda image: ("picture", image.shape)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


@pytest.fixture
def mlflow(monkeypatch) -> Service:
    module: Any = Service("mlflow")

    def start_run(**words: Any) -> Any:
        module.note("start_run", **words)
        return SimpleNamespace(info=SimpleNamespace(run_id=words["run_id"] or "run-7"))

    module.start_run = start_run
    for call in ("log_params", "log_metric", "log_image", "end_run"):
        setattr(module, call, lambda *args, call=call, **words: module.note(call, *args, **words))
    monkeypatch.setitem(sys.modules, "mlflow", module)
    return module


@pytest.fixture
def options(tmp_path, write_images, pretrain_options) -> list[str]:
    write_images(tmp_path / "images", 8)
    return [*pretrain_options, f"data.path={tmp_path / 'images'}", f"output={tmp_path / 'run'}", "optim.epochs=1"]


def test_a_run_is_shown_on_every_board_and_goes_on_there(tmp_path, options, wandb, mlflow):
    shown = [*options, "log.to=[tensorboard,wandb,mlflow]"]
    pretrain(load_config(PretrainConfig, None, shown))
    ((_, started),) = wandb.of("init")
    assert started["name"] == "run" and started["config"]["optim.epochs"] == 1 and started["resume"] == "allow"
    losses = [(args[0]["loss"], words["step"]) for args, words in wandb.of("log") if "loss" in args[0]]
    metrics = [(args[1], words["step"]) for args, words in mlflow.of("log_metric") if args[0] == "loss"]
    assert losses == metrics and [step for _, step in losses] == [1, 2]
    pictures = [args[0]["step"] for args, _ in wandb.of("log") if "step" in args[0]]
    assert pictures and pictures[0][0] == "picture" and pictures[0][1][2] == 3
    assert mlflow.of("log_image")[0][0][1] == "step/step_00000002.png"
    assert mlflow.of("log_params")[0][0][0]["model.size"] == "nano"
    assert wandb.of("finish") and mlflow.of("end_run") and list((tmp_path / "run" / "tensorboard").iterdir())
    (tmp_path / "run" / "encoder.safetensors").unlink()
    pretrain(load_config(PretrainConfig, None, shown), resume=True)
    again = wandb.of("init")[-1:]
    assert all(words["id"] == started["id"] for _, words in again)


def test_a_resumed_run_has_its_names(tmp_path, wandb, mlflow):
    for _ in range(2):
        Boards(["wandb", "mlflow"], Logged(tmp_path, {"a": 1}, None), print).close()
    first, second = (words["id"] for _, words in wandb.of("init"))
    assert first == second
    assert [words["run_id"] for _, words in mlflow.of("start_run")] == [None, "run-7"]
    assert len(mlflow.of("log_params")) == 1, "parameters are logged once"


@pytest.mark.parametrize("service", ["wandb", "mlflow"])
def test_a_service_that_is_not_installed_is_said_before_anything_is_written(tmp_path, options, service, monkeypatch):
    monkeypatch.setattr("mae_core.training.boards.find_spec", lambda name: ModuleSpec(name, None, is_package=True))
    with pytest.raises(UserError, match=rf"log\.to={service} needs {service}.*pip install 'mae-transfer\[{service}\]'"):
        pretrain(load_config(PretrainConfig, None, [*options, f"log.to=[{service}]"]))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_a_service_that_fails_is_left_out(tmp_path, wandb, mlflow, capsys, fails):
    wandb.fails = fails
    boards = Boards(["wandb", "mlflow"], Logged(tmp_path, {}, None), print)
    boards.add_scalar("top1 (%)", 1.0, 1)
    boards.add_scalar("loss", 2.0, 2)
    boards.add_image("step", np.zeros((2, 2, 3), np.uint8), 2)
    boards.close()
    assert capsys.readouterr().out == ("wandb failed and is left out from here on (ConnectionError: no route)\n")
    assert [args[0] for args, _ in mlflow.of("log_metric")] == ["top1 ___", "loss"] and mlflow.of("end_run")


def test_another_board_is_refused():
    with pytest.raises(ConfigError, match="'tensorboard', 'wandb' or 'mlflow'"):
        load_config(PretrainConfig, None, ["log.to=[comet]", "output=x"])
