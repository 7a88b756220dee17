"""``python -m transfer.demo`` runs the demo of a clone of the repository, ``examples/demo/run.py``."""

from __future__ import annotations

import runpy

from mae_core.errors import UserError, user_errors
from transfer.chain import ROOT

if __name__ == "__main__":
    demo = ROOT / "examples" / "demo" / "run.py"
    with user_errors():
        if not demo.is_file():
            raise UserError(f"the demo runs from a clone of the repository; {demo} does not exist")
        runpy.run_path(str(demo), run_name="__main__")
