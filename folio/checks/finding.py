"""A finding of a check, and the commands that it suggests."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple


class Finding(NamedTuple):
    """A line of the table. ``remedy`` is a command to paste; empty if there is none."""

    mark: Literal["ok", "note", "missing"]
    subject: str
    text: str
    remedy: str = ""


Check = Callable[[], Iterator[Finding]]


def findings(subject: str, check: Check) -> Iterator[Finding]:
    """The findings of a check. An error that the machine may cause becomes a note; any other is raised."""
    try:
        yield from check()
    except (OSError, ValueError, RuntimeError, ImportError) as error:  # torch raises RuntimeErrors
        yield Finding("note", subject, f"this check failed: {error}")


def python_command(arguments: str) -> str:
    """A command line that runs this Python, by the name under which the shell finds it."""
    names = (name for name in ("python", "python3") if (path := shutil.which(name)) and _is_this_python(path))
    return f"{next(names, shlex.quote(sys.executable))} {arguments}"


def _is_this_python(path: str) -> bool:
    """Compares the folders too: the Pythons of several virtual environments may be links to one file."""
    here = Path(sys.executable)
    return os.path.samefile(Path(path).parent, here.parent) and os.path.samefile(path, here)


def gigabytes(*sizes: float) -> str:
    """``"1.5 of 8.0 GB"`` of sizes in bytes."""
    return f"{' of '.join(f'{size / 1e9:,.1f}' for size in sizes)} GB"
