"""Files that appear whole or not at all, and stay through a loss of power."""

from __future__ import annotations

import codecs
import hashlib
import json
import math
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


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


def require_file(path: Path) -> Path:
    """The path itself, once it is known to be a file that ends, or a link to one.

    Raises:
        FileNotFoundError: nothing is there. ValueError: a folder, pipe, socket or device, which may never end.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kinds = {"a folder": stat.S_ISDIR, "a pipe": stat.S_ISFIFO, "a socket": stat.S_ISSOCK}
        kind = next((kind for kind, is_it in kinds.items() if is_it(mode)), "a device")
        raise ValueError(f"{path} is {kind}, not a file")
    return path


def read_json(path: Path, most: int = 1 << 28) -> Any:
    """The value in a JSON file, with or without a byte order mark.

    Raises:
        FileNotFoundError: nothing is there. ValueError: it is no file, longer than ``most`` bytes, not JSON, nested too
            deeply, or holds a number that is not finite; names the file.
    """
    if (size := require_file(path).stat().st_size) > most:
        raise ValueError(f"{path} has {size:,} bytes, more than the {most:,} that such a file can have")
    try:
        return parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def read_text(path: Path, most: int | None = None) -> str:
    """The text of a UTF-8 file, as ``decode_text`` reads it.

    Raises:
        OSError: it cannot be read. ValueError: it is no file, longer than ``most`` bytes, or not UTF-8; names the file.
    """
    size = require_file(path).stat().st_size
    if most is not None and size > most:
        raise ValueError(f"{path} has {size:,} bytes, more than the {most:,} that such a text can have")
    raw = path.read_bytes()
    try:
        return decode_text(raw)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text at byte {error.start}{other_encoding(raw)}") from None


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


def parse_json(text: str | bytes) -> Any:
    """A JSON value. Raises ValueError where it is none, is nested too deeply or holds a number that is not finite."""
    try:
        text = text if isinstance(text, str) else text.decode("utf-8-sig")
        return json.loads(text, parse_float=_finite, parse_constant=_finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _finite(digits: str) -> float:
    if not math.isfinite(number := float(digits)):
        raise ValueError(f"{digits[:20]} is not a finite number")
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
        raise ValueError(f"the download of {url} failed ({error}): {remedy}") from None
    if (actual := hashlib.sha256(content).hexdigest()) != digest:
        raise ValueError(f"the download has SHA-256 {actual}, not {digest}: {remedy}")
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
