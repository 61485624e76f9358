"""Files that appear whole or not at all, stay through a loss of power, and have one writer at a time."""

from __future__ import annotations

import codecs
import errno
import hashlib
import json
import math
import os
import re
import shutil
import socket
import stat
import time
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from folio.errors import UserError

_TOKENS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[^\s"]+')  # of JSON: texts, and what stands between them
_TAKEN = {errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES}
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


def write(path: Path, content: bytes) -> None:
    """Replaces a file, or leaves it as it was. Raises OSError."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError:
        with suppress(OSError):
            unfinished.unlink()
        raise
    sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replaces a JSON file."""
    write(path, f"{json.dumps(value, indent=1)}\n".encode())


def write_sealed(path: Path, value: dict[str, Any]) -> None:
    """Replaces a JSON file by one that ``read_sealed`` verifies: its ``sha256`` names a sum of the file itself.

    That is the SHA-256 of its text without the white space between the tokens, and without the digits of this sum.
    """
    value = {**value, "sha256": {**value.get("sha256", {}), path.name: ""}}
    value["sha256"][path.name] = _sum(json.dumps(value))
    write_json(path, value)


def read_sealed(path: Path) -> tuple[dict[str, Any], bool]:
    """The object in a JSON file, and whether the file holds a sum of itself, which is verified.

    Raises:
        FileNotFoundError: nothing is there. ValueError: its checksum does not match, or as ``read_json``.
    """
    content = _content(path, 1 << 28)
    try:
        value = parse_json(content)
        if not isinstance(value, dict):
            raise UserError("it holds no object")
        hashes = value.get("sha256", {})
        if not isinstance(hashes, dict):
            raise UserError("its sha256 is no object")
        if path.name not in hashes:
            return value, False
        own = hashes[path.name]
        if not isinstance(own, str) or _sum(content.decode("utf-8-sig"), own) != own:
            raise UserError("its text does not match its checksum")
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    return value, True


def _sum(text: str, own: str = "") -> str:
    return hashlib.sha256("".join(_TOKENS.findall(text)).replace(own, "").encode("utf-8", "surrogatepass")).hexdigest()


def require_file(path: Path) -> Path:
    """The path itself, once it is known to be a file that ends, or a link to one.

    Raises:
        FileNotFoundError: nothing is there. ValueError: a folder, pipe, socket or device, which may never end.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kinds = {"a folder": stat.S_ISDIR, "a pipe": stat.S_ISFIFO, "a socket": stat.S_ISSOCK}
        kind = next((kind for kind, is_it in kinds.items() if is_it(mode)), "a device")
        raise UserError(f"{path} is {kind}, not a file")
    return path


def read_json(path: Path, most: int = 1 << 28) -> Any:
    """The value in a JSON file, with or without a byte order mark.

    Raises:
        FileNotFoundError: nothing is there. ValueError: it is no file, longer than ``most`` bytes, not JSON, nested too
            deeply, or holds a number that is not finite; names the file.
    """
    content = _content(path, most)
    try:
        return parse_json(content)
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def read_text(path: Path, most: int | None = None) -> str:
    """The text of a UTF-8 file, as ``decode_text`` reads it.

    Raises:
        OSError: it cannot be read. ValueError: it is no file, longer than ``most`` bytes, or not UTF-8; names the file.
    """
    size = require_file(path).stat().st_size
    if most is not None and size > most:
        raise UserError(f"{path} has {size:,} bytes, more than the {most:,} that such a text can have")
    raw = path.read_bytes()
    try:
        return decode_text(raw)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text at byte {error.start}{other_encoding(raw)}") from None


def decode_text(raw: bytes) -> str:
    """UTF-8 → text as nanoGPT's ``open(path, "r")`` reads it: the line ends \\r\\n and \\r become \\n.

    Raises:
        UnicodeDecodeError: it is not UTF-8.
    """
    return raw.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")


def other_encoding(raw: bytes) -> str:
    """What to do about bytes that are not UTF-8, where their byte order mark tells what they are; else nothing."""
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return " but UTF-16: iconv -f UTF-16 -t UTF-8 makes UTF-8 of it"
    return ""


def _content(path: Path, most: int) -> bytes:
    if (size := require_file(path).stat().st_size) > most:
        raise UserError(f"{path} has {size:,} bytes, more than the {most:,} that such a file can have")
    return path.read_bytes()


def parse_json(text: str | bytes) -> Any:
    """A JSON value. Raises ValueError where it is none, is nested too deeply or holds a number that is not finite."""
    try:
        text = text if isinstance(text, str) else text.decode("utf-8-sig")
        return json.loads(text, parse_float=_finite, parse_constant=_finite)
    except RecursionError:
        raise UserError("it is nested too deeply") from None


def _finite(digits: str) -> float:
    if not math.isfinite(number := float(digits)):
        raise UserError(f"{digits[:20]} is not a finite number")
    return number


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """Where to write a file, or make a folder, that becomes ``path`` at the end, or nothing if it fails.

    Raises:
        FileExistsError: something is there. OSError: the disk is full or not writable.
    """
    if not path.name or (path.exists() and not (path.is_dir() and not any(path.iterdir()))):
        raise FileExistsError(f"{path} is there already: remove it, or choose another name")
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(unfinished)
        yield unfinished
        for part in (*unfinished.rglob("*"), unfinished):
            sync(part)
        unfinished.replace(path)
    except BaseException as error:
        with suppress(OSError):  # its folder may be none
            _remove(unfinished)
        reason = error if isinstance(error, SafetensorError) else getattr(error, "strerror", None)
        if reason:
            raise OSError(f"{path} could not be written ({reason}): make room, or choose another") from None
        if isinstance(error, OSError):
            raise OSError(str(error).replace(str(unfinished), str(path))) from None
        raise
    sync(path.parent)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def download(url: str, digest: str, path: Path, remedy: str) -> None:
    """Fetches a file of a known SHA-256.

    Raises:
        ValueError: it could not be fetched, or is another; ends with the ``remedy``.
    """
    import http.client
    import urllib.error
    import urllib.request

    remedy = f"fetch {url} by other means and {remedy}"
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            content = response.read()
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        raise UserError(f"the download of {url} failed ({error}): {remedy}") from None
    if (actual := hashlib.sha256(content).hexdigest()) != digest:
        raise UserError(f"the download has SHA-256 {actual}, not {digest}: {remedy}")
    write(path, content)


def sync(path: Path) -> None:
    """Makes a file's content durable, or a folder's entries."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
            told = parse_json(os.pread(handle, 4096, 0))
            who = f" (host {told['host']}, process {told['pid']}, since {told['since']})"
            return "".join(c if c.isprintable() else "?" for c in who[:200])
        time.sleep(0.02)  # it may have it for a moment only
    return ""


def _let_go(handle: int, path: Path, made: list[Path]) -> None:
    if _is(path, handle):
        with suppress(OSError):
            path.unlink()
    os.close(handle)
    for folder in made:
        with suppress(OSError):
            folder.rmdir()
