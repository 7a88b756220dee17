"""The account of a conversion or a loading: where every tensor of a file went, where every tensor of a target came
from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass
class LoadReport:
    """Where every tensor of a file went and where every tensor of a model, or of the file written, came from.

    loaded    taken under the same name
    renamed   name in the file -> name in the target
    changed   name in the target -> how its values were put together: split, joined, folded, filled
    resized   name in the target -> from what size to what size
    new       tensors of the target that the file cannot have
    unused    tensors of the file that the target does not take -> why
    refused   tensors that fit nowhere -> why; a report with any never leaves the loader
    notes     what else the user should know: wrappers taken off, adapted stems, other readings of the names
    """

    path: str
    loaded: list[str] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)
    changed: dict[str, str] = field(default_factory=dict)
    resized: dict[str, str] = field(default_factory=dict)
    new: list[str] = field(default_factory=list)
    unused: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    loaded_parameters: int = 0
    total_parameters: int = 0

    def place(self, target: str, sources: Sequence[str]) -> None:
        """Account for ``target``, whose values are named ``sources`` in the file."""
        if target in self.resized and [*sources] == [target]:
            return
        if len(sources) > 1:
            self.changed[target] = f"joined from {', '.join(sources)}"
        elif sources[0] != target:
            self.renamed[sources[0]] = target
        else:
            self.loaded.append(target)

    @property
    def share(self) -> float:
        """Share of the target's parameters that came from the file."""
        return self.loaded_parameters / max(self.total_parameters, 1)

    def as_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        return {**asdict(self), "share": self.share}

    def print(self, console: Console | None = None, *, of: str = "the model's") -> None:
        """A table: one line a category, with examples; notes and the share of parameters below it."""
        table = Table(title=f"weights from {self.path}", title_justify="left")
        table.add_column("what")
        table.add_column("tensors", justify="right")
        table.add_column("which", overflow="fold")
        rows: list[tuple[str, Sequence[str]]] = [
            ("loaded", self.loaded),
            ("renamed", [f"{old} -> {new}" for old, new in self.renamed.items()]),
            ("changed", [f"{name} ({how})" for name, how in self.changed.items()]),
            ("resized", [f"{name} {how}" for name, how in self.resized.items()]),
            ("newly initialised", self.new),
            ("not used", [f"{name} ({why})" for name, why in self.unused.items()]),
            ("refused", [f"{name}: {why}" for name, why in self.refused.items()]),
        ]
        for label, names in rows:
            shown = ", ".join(names[:3]) + (f", ... ({len(names) - 3} more)" if len(names) > 3 else "")
            table.add_row(label, str(len(names)), shown or "-")
        console = console or Console()
        console.print(table)
        for note in self.notes:
            console.print(f"note: {note}", markup=False)
        console.print(f"{self.share:.1%} of {of} {self.total_parameters:,} parameters come from the file")
