"""Where text comes from, and how it becomes token files.

Each module here but ``write`` is a data set: its name is the data set's, ``prepare(folder, source)`` makes it.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from pathlib import Path


def names() -> list[str]:
    """The data sets that can be prepared."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name != "write")


def prepare(name: str, folder: Path, source: Path | None = None) -> None:
    """Makes the data set's token files in ``folder``, from ``source`` instead of its usual place if given.

    Raises:
        FileNotFoundError, ValueError: no such data set; a source that is missing, fails or is not what it was.
    """
    if name not in names():
        close = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(names())}"
        raise ValueError(f"no data set {name!r} to prepare: {hint}")
    importlib.import_module(f"{__name__}.{name}").prepare(folder, source)
