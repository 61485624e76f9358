"""Writes all terminal output: escapes control characters, and drops a stream that fails instead of ending the run."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import unicodedata
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

_CONTROL = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # Unicode's categories: control, format, surrogate, line and paragraph ends
_KEPT = "\n\t\u200c\u200d"  # the last two join letters and emoji
_LOST: weakref.WeakSet[Any] = weakref.WeakSet()  # streams that failed


def printable(text: str) -> str:
    """The text with its control characters, except line ends and tabs, as escapes such as ``\\x1b``."""
    if text.isprintable():
        return text
    return "".join(c.encode("unicode_escape").decode() if _is_control(c) else c for c in text)


def _is_control(c: str) -> bool:
    return c not in _KEPT and not c.isprintable() and unicodedata.category(c) in _CONTROL


def say(text: str = "", stream: Any = None) -> None:
    """Prints a line of progress, on standard output by default. A stream that fails is dropped with one warning."""
    _try_write(f"{printable(text)}\n", sys.stdout if stream is None else stream)


def show(text: str = "") -> None:
    """Prints a line of a command's result on standard output. Raises OSError if it cannot be written."""
    put(f"{printable(text)}\n")


def put(text: str) -> None:
    """Writes a command's result unchanged; on a terminal, control characters are escaped.

    Raises:
        BrokenPipeError: the reader has closed the pipe. OSError: standard output cannot be written.
    """
    stream = sys.stdout
    if stream is None:
        return
    try:
        _write(printable(text) if stream.isatty() else text, stream)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(f"standard output cannot be written: {error.strerror or error}") from None


def show_styled(text: str) -> None:
    """Writes text that Folio itself styled with escape sequences. Raises OSError if that fails."""
    if sys.stdout is not None:
        _write(text, sys.stdout)


def best_effort(stream: Any) -> Any:
    """The stream as a file for progress bars; a stream that fails is dropped, as by ``say``."""
    return _BestEffort(stream)


class _BestEffort(io.TextIOBase):
    def __init__(self, stream: Any) -> None:
        self._stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        return self._stream is not None and self._stream not in _LOST and bool(self._stream.isatty())

    def write(self, text: str) -> int:
        _try_write(text, self._stream)
        return len(text)


def _try_write(text: str, stream: Any) -> None:
    if stream is None or stream in _LOST:
        return
    try:
        _write(text, stream)
    except (OSError, ValueError) as error:  # ValueError: the stream is closed
        _LOST.add(stream)
        silence(stream)
        name = str(getattr(stream, "name", "the console")).strip("<>")
        reason = getattr(error, "strerror", None) or error
        warnings.warn(f"{name} cannot be written ({reason}): continuing without it", stacklevel=3)


def _write(text: str, stream: Any) -> None:
    """Writes the text; characters that the stream's encoding lacks are escaped."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
    stream.flush()


def silence(stream: Any) -> None:
    """Sends the stream's unwritten output to the null device, so that Python's exit raises no error."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, stream.fileno())
        finally:
            os.close(nowhere)


def open_streams() -> None:
    """Makes the standard streams writable, even if the caller closed them, and in any encoding.

    A closed stream becomes the null device. Otherwise the next file that is opened would get its descriptor, and the
    output of C code would end up in that file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def flush() -> None:
    """Flushes both streams. Raises OSError, once, if standard output cannot be written."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        silence(sys.stdout)
        raise
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()


@contextlib.contextmanager
def silent_stderr() -> Iterator[None]:
    """Discards writes to stderr, also those of C++ code and child processes."""
    before, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)
