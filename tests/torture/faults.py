"""Faults: each makes one change of the file system go wrong, and has a name by which it can be repeated.

The name is four words, ``OPERATION PLACE COUNT EFFECT``:

- the function of ``folio.files`` that makes the change, or ``*``;
- a pattern of the last two parts of the path: ``checkpoints/step-00000010``, ``*/metrics.jsonl``;
- which of such changes in this process, from 1; ``3+`` is the third and all after it;
- what happens: ``kill`` (before the change), ``half`` (a kill after half of it), ``0.012`` (a kill so many seconds
  after it), or an error such as ``ENOSPC`` (after half of it). ``kill-all`` kills all ranks at once, ``kill-last`` only
  the last one; so with ``half`` and ``0.012``. Before a change, ``SIGTERM`` or another signal is sent to this
  process, and ``hang`` is a disk that does not answer.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from fnmatch import fnmatchcase
from io import FileIO
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from folio import files

OPERATIONS = ("make_folder", "open_to_write", "write_to", "write_with", "rename", "remove", "remove_empty")
OPERATIONS += ("sync", "sync_open")
DOING = {  # a function on the stack → what a process was doing
    "_compile": "compilation",
    "evaluate": "evaluation",
    "prune": "pruning",
    "save_checkpoint": "checkpoint",
    "fit": "step",
    "build": "start",
    "finish": "end",
    "prepare": "preparation",
}


class Fault(NamedTuple):
    """One thing that goes wrong."""

    operation: str
    place: str
    count: str
    effect: str

    def __str__(self) -> str:
        return " ".join(self)

    @classmethod
    def named(cls, name: str) -> Fault:
        """The fault of this name. Raises ValueError if no fault has it."""
        match name.split():
            case [operation, place, count, effect] if (
                operation in ("*", *OPERATIONS)
                and re.fullmatch(r"[1-9][0-9]*\+?", count)
                and (
                    re.fullmatch(r"(kill|half|[0-9.]*[0-9])(-all|-last)?", effect) or effect in errno.errorcode.values()
                )
            ):
                return cls(operation, place, count, effect)
        raise ValueError(f"{name!r} is no fault: it is like 'rename checkpoints/step-00000010 1 kill'")


class Chance(NamedTuple):
    """Draws faults from a seed: at each change one with probability ``rate``; a share ``errors`` of them are errors."""

    seed: str
    rate: float
    errors: float
    longest: float  # seconds between a change and the kill that follows it
    whom: tuple[str, ...] = ("",)  # ends of an effect

    def draws(self) -> Callable[[], str]:
        """A function that draws an effect, or ""."""
        random = Random(self.seed)

        def draw() -> str:
            if random.random() > self.rate:
                return ""
            if random.random() < self.errors:
                return random.choice(["ENOSPC", "EIO"])
            late = f"{random.uniform(0, self.longest):.3f}"
            return random.choice(["kill", "half", late, late]) + random.choice(self.whom)

        return draw


class Plan:
    """The faults of this process. Those that happen are written to ``notes``: name, tab, what the process was doing."""

    def __init__(self, faults: list[Fault], chance: Chance | None, notes: Path) -> None:
        self.faults, self.draw, self.notes = faults, chance.draws() if chance else str, notes
        self.counts = Counter[Any]()

    def install(self) -> None:
        """Replaces the functions of ``folio.files``."""
        for name in OPERATIONS:
            setattr(files, name, self._faulty(name, getattr(files, name)))

    def _faulty(self, operation: str, change: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*args: Any) -> Any:
            path = args[1] if operation == "rename" else args[0]
            path = Path(path.name if isinstance(path, FileIO) else path)
            place = f"{path.parent.name}/{path.name}"
            if fault := self._due(operation, place):
                return self._happen(fault, path, change, args)
            return change(*args)

        return changed

    def _due(self, operation: str, place: str) -> Fault | None:
        for fault in self.faults:
            if fault.operation in ("*", operation) and fnmatchcase(place, fault.place):
                self.counts[fault] += 1
                first = int(fault.count.removesuffix("+"))
                if self.counts[fault] == first or (fault.count.endswith("+") and self.counts[fault] > first):
                    return fault
        self.counts[operation, place] += 1
        effect = self.draw()
        return Fault(operation, place, str(self.counts[operation, place]), effect) if effect else None

    def _happen(self, fault: Fault, path: Path, change: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        how, _, whom = fault.effect.partition("-")
        if number := getattr(errno, how, None):
            self._note(fault, sys._getframe())
            if change.__name__.startswith("write"):
                _half(change, args)
            named = [] if change.__name__.startswith(("write", "sync")) else [str(path)]
            raise OSError(number, os.strerror(number), *named)
        if how.startswith("SIG"):
            self._note(fault, sys._getframe())
            os.kill(os.getpid(), signal.Signals[how])
            return change(*args)
        if how == "hang":
            time.sleep(3600)
        if how == "half" and whom != "last":
            _half(change, args)
        if how in ("kill", "half"):
            self._note(fault, sys._getframe())
            kill(whom)
            return change(*args)  # the last rank was killed, and this one lives
        main = threading.main_thread().ident or 0

        def late() -> None:
            self._note(fault, sys._current_frames()[main])
            kill(whom)

        result = change(*args)
        timer = threading.Timer(float(how), late)
        timer.daemon = True
        timer.start()
        return result

    def _note(self, fault: Fault, frame: Any) -> None:
        while frame and (outer := frame.f_code.co_qualname.split(".")[0]) not in DOING:
            frame = frame.f_back
        doing = DOING[outer] if frame else "start"
        with self.notes.open("a") as file:
            file.write(f"{fault}\t{doing}\n")


def kill(whom: str = "") -> None:
    """SIGKILL to this process, to ``all`` of its ranks, or to the ``last``, which leads their process group."""
    if whom == "all":
        os.killpg(0, signal.SIGKILL)
    with suppress(ProcessLookupError):  # the last rank may have ended
        os.kill(os.getpgrp() if whom == "last" else os.getpid(), signal.SIGKILL)


def _half(change: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Makes half of a change, as a full disk would, or all of it if it is atomic."""
    match change.__name__, args:
        case "write_to", (file, content):
            change(file, content[: len(content) // 2])
        case "write_with", (path, _):
            change(*args)
            os.truncate(path, path.stat().st_size // 2)
        case "remove", (path,) if path.is_dir() and (inside := sorted(path.iterdir())):
            change(inside[0])
        case _:
            change(*args)
