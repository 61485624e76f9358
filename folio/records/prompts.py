"""Reads the lines that a user types: on a terminal with a history and Ctrl-C, else from standard input to its end."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, ModuleType

from folio import files
from folio.records.console import put

_REMEMBERED = 1000  # lines of the history


class Prompts:
    """The user's lines, one at a time; for the main thread.

    ``on_terminal``: both standard streams are a terminal. Then ``sign`` precedes each line, the arrow keys edit it and
    bring back earlier ones, and Ctrl-C does not end the program: it clears the line, or between two lines sets
    ``interrupted``. Otherwise lines come from standard input as UTF-8, and Ctrl-C ends the program as usual.
    """

    def __init__(self, sign: str = "> ") -> None:
        self.on_terminal = bool(sys.stdin and sys.stdin.isatty() and sys.stdout and sys.stdout.isatty())
        self.interrupted = False
        self._sign, self._reading = sign, False

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Inside, ``read`` may be called."""
        if isinstance(sys.stdin, io.TextIOWrapper):
            encoding = None if self.on_terminal else "utf-8-sig"
            sys.stdin.reconfigure(encoding=encoding, errors="surrogateescape")
        if not self.on_terminal:
            yield
            return
        before = signal.signal(signal.SIGINT, self._interrupt)
        try:
            with _history():
                yield
        finally:
            signal.signal(signal.SIGINT, before)

    def read(self) -> str | None:
        """The next line without its end; None at the end, which is Ctrl-D on a terminal."""
        if not self.on_terminal:
            line = sys.stdin.readline() if sys.stdin else ""
            return line.removesuffix("\n") if line else None
        while True:
            try:
                self._reading = True
                line = input(self._sign)
            except KeyboardInterrupt:
                put("\n")
                continue
            except EOFError:
                put("\n")
                return None
            finally:
                self._reading = False
            self.interrupted = False
            return line

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._reading:
            self._reading = False  # so that a second signal cannot interrupt the answer to this one
            raise KeyboardInterrupt
        self.interrupted = True


@contextmanager
def _history() -> Iterator[None]:
    """Inside, ``input`` has a history, where Python has readline; ``history_file`` keeps it for the next session."""
    readline, path = _readline(), history_file()
    if readline is None or not path.is_absolute():
        yield
        return
    with suppress(OSError, ValueError):
        readline.read_history_file(files.require_file(path))
    readline.set_history_length(_REMEMBERED)
    try:
        yield
    finally:
        with suppress(OSError):
            files.make_folder(path.parent)
            files.write_with(path, readline.write_history_file)  # only this user may read it


def _readline() -> ModuleType | None:
    try:
        import readline
    except ModuleNotFoundError:
        return None
    return readline


def history_file() -> Path:
    """Below XDG_STATE_HOME, else ~/.local/state (XDG Base Directory Specification); relative without a home folder."""
    given = os.environ.get("XDG_STATE_HOME", "")
    return Path(given if os.path.isabs(given) else os.path.expanduser("~/.local/state"), "folio", "prompts")
