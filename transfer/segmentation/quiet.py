"""The engine talks while it is imported and built; what a user needs is printed by the commands themselves."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout


@contextmanager
def quietly() -> Iterator[None]:
    """Around imports and building: no warnings, and nothing on stdout, where mmseg says which packages are absent."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
