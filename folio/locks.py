"""Lock files: a folder has one writer at a time."""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
import sys
import time
import warnings
import weakref
from contextlib import suppress
from pathlib import Path

from folio import files
from folio.errors import UserError

_TAKEN = {errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES}
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_LOCKED_BYTE = 1 << 30  # on Windows: beyond the content, since nobody else can read a locked byte


class InUseError(UserError):
    """Another process, or another thread of this one, holds a lock."""


class Lock:
    """A lock file with one holder at a time. It contains the holder's host, process and start time.

    The lock is ``flock``'s, on Windows a locked byte: the kernel releases it when the process ends in any way. NFS
    makes it a byte-range lock, so it works between machines too. Child processes do not hold it. A system or a file
    system without locks causes one warning, and every process gets the lock.

    Raises:
        InUseError: another process holds it; the message has the folder, ``taken``, the holder, and the ``remedy``.
        UserError: a link, a folder or the like has its name. OSError: the file cannot be created.
    """

    def __init__(self, path: Path, taken: str, remedy: str) -> None:
        made = [folder for folder in path.parents if not folder.exists()]
        for _ in range(100):  # the holder may remove the file and the folder between two of these calls
            try:
                files.make_folder(path.parent)
            except FileExistsError:
                if path.parent.is_symlink() or path.parent.is_file():
                    raise
                continue
            with suppress(FileNotFoundError):
                if not stat.S_ISREG(path.lstat().st_mode):
                    raise UserError(f"{path} is not a file of its own, as a lock must be: remove it")
            try:
                handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
            except FileNotFoundError:
                continue
            try:
                held, here = _try_to_lock(handle, path), files.is_same_file(path, handle)
                who = "" if held or not here else _describe_holder(handle)
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
        self._end = weakref.finalize(self, _release, handle, path, made)
        _HELD.add(self)

    def release(self) -> None:
        """Removes the file, and those folders created for it that are empty."""
        self._end()


_HELD: weakref.WeakSet[Lock] = weakref.WeakSet()


def release_all() -> None:
    """Releases every lock of this process, before it ends by ``os._exit``."""
    for lock in list(_HELD):
        lock.release()


def _close_inherited() -> None:
    """Closes the parent's locks in a child process, so that the parent's end releases them."""
    for lock in list(_HELD):
        if had := lock._end.detach():
            os.close(had[2][0])


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_inherited)


def _try_to_lock(handle: int, path: Path) -> bool:
    """Whether this process has the lock now; True if the file system has no locks."""
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(handle, _LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
            os.lseek(handle, 0, os.SEEK_SET)
        else:
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


def _describe_holder(handle: int) -> str:
    """The host, process and start time of a lock's holder, in parentheses; "" if the file does not have them."""
    for _ in range(10):
        with suppress(ValueError, LookupError, TypeError):
            os.lseek(handle, 0, os.SEEK_SET)
            holder = files.parse_json(os.read(handle, 4096))
            who = f" (host {holder['host']}, process {holder['pid']}, since {holder['since']})"
            return "".join(c if c.isprintable() else "?" for c in who[:200])
        time.sleep(0.02)  # the holder may not have written it yet
    return ""


def _release(handle: int, path: Path, made: list[Path]) -> None:
    if files.WINDOWS:  # which does not remove a file that this process, or the next holder, has open
        os.close(handle)
        files.discard(path)
    else:
        if files.is_same_file(path, handle):
            files.discard(path)
        os.close(handle)
    for folder in made:
        with suppress(OSError):
            files.remove_empty(folder)
