"""Lock files: a folder has one writer at a time."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
import warnings
import weakref
from contextlib import suppress
from pathlib import Path

from folio import files
from folio.errors import UserError

_TAKEN = {errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES}
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


class InUseError(UserError):
    """Another process, or another thread of this one, holds a lock."""


class Lock:
    """A file that one holder has at a time, and that tells who: host, process, since when.

    It is held by ``flock``, which the kernel ends with the process, however that ends; NFS makes it a lock of bytes, so
    that it holds between machines too. Children of the process do not hold it. Where a file system has no locks, one
    warning says so, and whoever comes goes on.

    Raises:
        InUseError: another has it; the line is made of the folder, ``taken``, who, and the ``remedy``.
        OSError: the file cannot be made.
    """

    def __init__(self, path: Path, taken: str, remedy: str) -> None:
        made = [folder for folder in path.parents if not folder.exists()]
        for _ in range(100):  # who had it may take it away, and the folder with it, between two of these steps
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
            except FileNotFoundError:
                continue
            try:
                held, here = _flock(handle, path), _is(path, handle)
                who = "" if held or not here else _holder(handle)
            except BaseException:
                os.close(handle)
                raise
            if held and here:
                break
            os.close(handle)
            if here:
                raise InUseError(f"{path.parent}: {taken}{who}: {remedy}")
        else:
            raise InUseError(f"{path.parent}: {taken}: {remedy}")
        with suppress(OSError):  # a full disk
            os.ftruncate(handle, 0)
            now = time.strftime("%Y-%m-%d %H:%M:%S %z")
            os.write(handle, json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": now}).encode())
        self._end = weakref.finalize(self, _let_go, handle, path, made)
        _HELD.add(self)

    def release(self) -> None:
        """Removes the file, and the folders that were made for it, as far as nothing else came into them."""
        self._end()


_HELD: weakref.WeakSet[Lock] = weakref.WeakSet()


def _forget() -> None:
    """What a child process has of its parent's locks, it closes, or they would outlive the parent."""
    for lock in list(_HELD):
        if had := lock._end.detach():
            os.close(had[2][0])


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _flock(handle: int, path: Path) -> bool:
    """Whether this one has the lock now; also where there are none to have."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _TAKEN:
            return False
        if error.errno not in _NO_LOCKS:
            raise
        warnings.warn(
            f"{path.parent}: no file locks there ({error.strerror}): make sure that no other process writes there",
            stacklevel=4,
        )
    except ModuleNotFoundError:
        warnings.warn(
            f"{path.parent}: no file locks on this system: make sure that no other process writes there", stacklevel=4
        )
    return True


def _is(path: Path, handle: int) -> bool:
    """Whether a path still leads to the open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def _holder(handle: int) -> str:
    """Who holds a lock, in brackets; "" where that does not say it."""
    for _ in range(10):
        with suppress(ValueError, LookupError, TypeError):
            told = files.parse_json(os.pread(handle, 4096, 0))
            who = f" (host {told['host']}, process {told['pid']}, since {told['since']})"
            return "".join(c if c.isprintable() else "?" for c in who[:200])
        time.sleep(0.02)  # it may have it for a moment only
    return ""


def _let_go(handle: int, path: Path, made: list[Path]) -> None:
    if _is(path, handle):
        files.discard(path)
    os.close(handle)
    for folder in made:
        with suppress(OSError):
            files.remove_empty(folder)
