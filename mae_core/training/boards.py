"""Where the numbers and pictures of a run are shown beside its log: TensorBoard, Weights & Biases, MLflow."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from mae_core.atomic import write_json
from mae_core.errors import UserError, first_line

IDS = "boards.json"
"""File of a run folder with the names under which services know the run, so that a resumed one goes on there."""
LONGEST_PARAMETER = 500
"""Characters of a parameter that MLflow stores."""


class Board(Protocol):
    """What shows a run; the calls are TensorBoard's."""

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Show a number."""
        ...

    def add_image(self, name: str, image: np.ndarray, step: int, dataformats: str = "HWC") -> None:
        """Show a picture, (H, W, 3) bytes."""
        ...

    def close(self) -> None:
        """Send what is left."""
        ...


class Logged(NamedTuple):
    """A run that is shown: its folder, its options by dotted key, and, of a resumed one, its last step."""

    folder: Path
    options: Mapping[str, Any]
    resumed_after: int | None


def tensorboard(run: Logged) -> Board:
    """Files below the run folder."""
    from torch.utils.tensorboard import SummaryWriter

    purge = None if run.resumed_after is None else run.resumed_after + 1
    writer: Board = SummaryWriter(str(run.folder / "tensorboard"), purge_step=purge)
    return writer


class WandbBoard:
    """Weights & Biases: project and mode are those of its own environment variables (WANDB_PROJECT, WANDB_MODE)."""

    def __init__(self, run: Logged) -> None:
        self._library: Any = import_module("wandb")
        name = stored_id(run.folder, "wandb") or uuid.uuid4().hex[:12]
        self._run = self._library.init(
            id=name, name=run.folder.name, dir=str(run.folder), config=dict(run.options), resume="allow"
        )
        store_id(run.folder, "wandb", name)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """See ``Board``."""
        self._run.log({name: value}, step=step)

    def add_image(self, name: str, image: np.ndarray, step: int, dataformats: str = "HWC") -> None:
        """See ``Board``."""
        self._run.log({name: self._library.Image(image)}, step=step)

    def close(self) -> None:
        """See ``Board``."""
        self._run.finish()


class MLflowBoard:
    """MLflow: where it stores, and the experiment, are those of its own environment variables (MLFLOW_TRACKING_URI,
    MLFLOW_EXPERIMENT_NAME)."""

    def __init__(self, run: Logged) -> None:
        self._library: Any = import_module("mlflow")
        known = stored_id(run.folder, "mlflow")
        started = self._library.start_run(run_id=known, run_name=run.folder.name)
        store_id(run.folder, "mlflow", started.info.run_id)
        if known is None:
            self._library.log_params({key: str(value)[:LONGEST_PARAMETER] for key, value in run.options.items()})

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """See ``Board``."""
        self._library.log_metric(_allowed(name), value, step=step)

    def add_image(self, name: str, image: np.ndarray, step: int, dataformats: str = "HWC") -> None:
        """See ``Board``."""
        self._library.log_image(image, f"{_allowed(name)}/step_{step:08d}.png")

    def close(self) -> None:
        """See ``Board``."""
        self._library.end_run()


def _allowed(name: str) -> str:
    """A name of the characters that MLflow takes."""
    return re.sub(r"[^\w\-. /]", "_", name)


BOARDS: dict[str, Callable[[Logged], Board]] = {
    "tensorboard": tensorboard,
    "wandb": WandbBoard,
    "mlflow": MLflowBoard,
}
"""Name in ``log.to`` -> what opens it."""
SERVICES = ("wandb", "mlflow")
"""Those that come with an extra of the same name, and may fail while a run goes on without harm to it."""


def check_boards(names: Sequence[str]) -> None:
    """Raise ``UserError``, with the line that installs it, for a service of ``log.to`` that is not installed."""
    for name in names:
        spec = find_spec(name) if name in SERVICES else None
        if name in SERVICES and (spec is None or spec.origin is None):  # W&B itself makes folders of that name
            raise UserError(
                f"log.to={name} needs {name}, which is not installed; pip install 'mae-transfer[{name}]', or leave it "
                "out of log.to"
            )


class Boards:
    """All that show a run, as one. A service that fails is said once and left out; a disk that fails is not passed
    over."""

    def __init__(self, names: Sequence[str], run: Logged, say: Callable[[str], None]) -> None:
        self._say, self._open = say, {}
        for name in names:
            board = self._tried(name, lambda name=name: BOARDS[name](run))  # type: ignore[misc]
            if board is not None:
                self._open[name] = board

    def _tried(self, name: str, work: Callable[[], Any]) -> Any:
        if name not in SERVICES:
            return work()
        try:
            return work()
        except Exception as error:  # whatever a service and its network come up with
            self._say(f"{name} failed and is left out from here on ({type(error).__name__}: {first_line(error)})")
            self._open.pop(name, None)
            return None

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """See ``Board``."""
        for service, board in list(self._open.items()):
            self._tried(service, lambda board=board: board.add_scalar(name, value, step))  # type: ignore[misc]

    def add_image(self, name: str, image: np.ndarray, step: int, dataformats: str = "HWC") -> None:
        """See ``Board``."""
        for service, board in list(self._open.items()):
            self._tried(service, lambda board=board: board.add_image(name, image, step, dataformats=dataformats))  # type: ignore[misc]

    def close(self) -> None:
        """See ``Board``."""
        for service, board in list(self._open.items()):
            self._tried(service, board.close)


def stored_id(folder: Path, service: str) -> str | None:
    """The name under which a service knows the run in ``folder``."""
    try:
        found = json.loads((folder / IDS).read_text(encoding="utf-8")).get(service)
    except (OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found, str) else None


def store_id(folder: Path, service: str, name: str) -> None:
    """Store it."""
    known = {other: found for other in SERVICES if (found := stored_id(folder, other))}
    write_json(folder / IDS, {**known, service: name})
