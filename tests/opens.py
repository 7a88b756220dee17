"""How often a command opens each file for its tensors; as a program, the same on a rank.

    python -m tests.opens '[["mae_core.cli.main:app", ["finetune", ...], 29501], ...]'

calls one entry point after another, its ranks meeting at the port, and prints a line ``opens [{...}, ...]``.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from mae_core.weights import files


def count_opens(replace: Callable[[object, str, Any], None] = setattr) -> Counter[str]:
    """Count from now on, by the file's name."""
    opened: Counter[str] = Counter()

    def counting(real: Callable[..., Any]) -> Callable[..., Any]:
        def count(path: Path, *arguments: Any) -> Any:
            opened[Path(path).name] += 1
            return real(path, *arguments)

        return count

    for name in ("_read_safetensors", "_read_torch", "_read_pickle"):
        replace(files, name, counting(getattr(files, name)))
    return opened


def main() -> None:
    """Run the commands of the command line."""
    opened, found = count_opens(), []
    for entry, arguments, port in json.loads(sys.argv[1]):
        os.environ["MASTER_PORT"] = str(port)
        opened.clear()
        options = {"standalone_mode": False} if entry.endswith(":app") else {}
        resolve_name(entry)(arguments, **options)
        found.append(dict(opened))
    print("opens", json.dumps(found))


if __name__ == "__main__":
    main()
