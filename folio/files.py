"""Reads and replaces whole files. A written file appears whole or not at all, and survives a loss of power.

Every change that Folio makes to the file system, other than its locks, is one of the functions under "Changes". A test
replaces these functions by their names, so that a change fails, or the process dies before, in or after it.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import math
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import IO, Any, Literal

from folio.errors import UserError

WINDOWS = sys.platform == "win32"  # where a folder is not synced or replaced, nor an open file removed
_TOKENS = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[^\s"]++')  # of JSON: strings, and the tokens between them
_MOST = 1 << 28  # bytes of a file that is read whole, or downloaded; it may contain a tokenizer
_MOST_TEXT = 1 << 30  # bytes of a text that is read whole
_MOST_VALUES = 1 << 22  # of a JSON text: three bytes of it can become a value of a hundred bytes
_DEEPEST = 64  # levels of lists and objects in a JSON text
_KINDS = {"a folder": stat.S_ISDIR, "a pipe": stat.S_ISFIFO, "a socket": stat.S_ISSOCK}


def write(path: Path, content: bytes) -> None:
    """Replaces a file atomically and durably, or leaves the old one unchanged. Raises OSError, with the path."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        make_folder(path.parent)
        discard(unfinished)
        with open_to_write(unfinished, "xb") as file:
            write_to(file, content)
            sync_open(file)
        rename(unfinished, path)
        sync(path.parent)
    except OSError as error:
        discard(unfinished)
        raise OSError(error.errno, error.strerror, str(path)) from None


def write_json(path: Path, value: Any) -> None:
    """Replaces a JSON file."""
    write(path, f"{json.dumps(value, indent=1)}\n".encode())


def write_sealed(path: Path, value: dict[str, Any]) -> None:
    """Replaces a JSON file by one that ``read_sealed`` verifies: its ``sha256`` contains a checksum of the file itself.

    That is the SHA-256 of its text without white space between tokens, and without the digits of this checksum.
    """
    value = {**value, "sha256": {**value.get("sha256", {}), path.name: ""}}
    value["sha256"][path.name] = _checksum(json.dumps(value))
    write_json(path, value)


def read_sealed(path: Path) -> tuple[dict[str, Any], bool]:
    """The object in a JSON file, and whether the file has a checksum of itself, which is verified.

    Raises:
        FileNotFoundError: nothing is there. ValueError: its checksum does not match, or as ``read_json``.
    """
    content = read_bytes(path)
    try:
        value = parse_json(content)
        if not isinstance(value, dict):
            raise UserError("it is not a JSON object")
        hashes = value.get("sha256", {})
        if not isinstance(hashes, dict):
            raise UserError("its sha256 is not a JSON object")
        if path.name not in hashes:
            return value, False
        own = hashes[path.name]
        if not isinstance(own, str) or _checksum(content.decode("utf-8-sig"), own) != own:
            raise UserError("its text does not match its checksum")
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    return value, True


def _checksum(text: str, own: str = "") -> str:
    return hashlib.sha256("".join(_TOKENS.findall(text)).replace(own, "").encode("utf-8", "surrogatepass")).hexdigest()


def require_file(path: Path) -> Path:
    """Returns the path if it is a regular file, or a link to one.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a folder, pipe, socket or device, or a path with characters that no file's name can have.
    """
    try:
        found = path.stat()
    except ValueError:
        raise UserError(f"{str(path)[:80]!r} has characters that no file's name can have") from None
    _require_regular(path, found.st_mode)
    return path


def _require_regular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = next((kind for kind, is_it in _KINDS.items() if is_it(mode)), "a device")
        raise UserError(f"{path} is {kind}, not a file")


def open_regular(path: Path, mode: str = "rb", buffering: int = -1) -> Any:
    """Opens a regular file, in a binary mode. It waits for no pipe or device, and writes through no link.

    Every file that Folio itself reads or writes is opened here, except its locks.

    Raises:
        FileNotFoundError: nothing is there. ValueError: a folder, pipe, socket or device; for writing also a link.
    """
    reads = mode == "rb"
    if not reads and path.is_symlink():
        raise UserError(f"{path} is a link, and a file is not written through links: remove it")
    if reads or path.exists():
        require_file(path)

    def opened(name: str, flags: int) -> int:  # the path may have become a pipe or a link meanwhile
        no_link = 0 if reads else getattr(os, "O_NOFOLLOW", 0)
        return os.open(name, flags | no_link | getattr(os, "O_NONBLOCK", 0), 0o666)

    file = open(path, mode, buffering, opener=opened)  # noqa: SIM115
    try:
        _require_regular(path, os.fstat(file.fileno()).st_mode)
    except ValueError:
        file.close()
        raise
    return file


def is_same_file(path: Path, handle: int) -> bool:
    """Whether the path still leads to the open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except (FileNotFoundError, NotADirectoryError):
        return False


def is_name(text: str) -> bool:
    """Whether a text is the name of something in a folder, and not a path that may lead out of it."""
    return Path(text).name == text and text not in ("", "..") and "\0" not in text


def require_own_folder(path: Path) -> Path:
    """Returns the path of a folder that will be written to. Raises ValueError if it is a link."""
    if path.is_symlink():
        raise UserError(
            f"{path} is a link, and files are not written through links: remove it; the folder {path.parent} itself "
            "may be a link to another disk"
        )
    return path


def read_bytes(path: Path, most: int = _MOST) -> bytes:
    """The content of a regular file.

    Raises:
        FileNotFoundError: nothing is there. ValueError: it is not a file, or is longer than ``most`` bytes.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise UserError(f"{path} has {size:,} bytes, more than the {most:,} that such a file can have")
        content: bytes = file.read(max(size, 1 << 16))  # files in /proc and /sys have a size of 0
    return content


def read_json(path: Path, most: int = _MOST) -> Any:
    """The value in a JSON file, with or without a byte order mark.

    Raises:
        FileNotFoundError: nothing is there. ValueError: it is not a file, longer than ``most`` bytes, not JSON, nested
            too deeply, or has a number that is not finite; names the file.
    """
    content = read_bytes(path, most)
    try:
        return parse_json(content)
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def read_text(path: Path, most: int = _MOST_TEXT) -> str:
    """The text of a UTF-8 file, as ``decode_text`` reads it.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a file, longer than ``most`` bytes, or not UTF-8; names the file.
    """
    raw = read_bytes(path, most)
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
    """The remedy for bytes with the byte order mark of UTF-16; "" for others."""
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return " but UTF-16: iconv -f UTF-16 -t UTF-8 makes UTF-8 of it"
    return ""


def parse_json(text: str | bytes) -> Any:
    """A JSON value.

    Raises:
        ValueError: it is not JSON, has more than four million values or 64 levels, or a number that is not finite.
    """
    try:
        text = text if isinstance(text, str) else text.decode("utf-8-sig")
        if sum(map(text.count, ",[{")) > _MOST_VALUES:
            raise UserError(f"it has more than {_MOST_VALUES:,} values")
        value = json.loads(text, parse_float=_finite, parse_constant=_finite)
    except RecursionError:
        raise UserError("it is nested too deeply") from None
    level = [value]
    for _ in range(_DEEPEST):
        level = [part for whole in level for part in _parts(whole) if isinstance(part, (dict, list))]
        if not level:
            return value
    raise UserError("it is nested too deeply")


def _parts(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _finite(digits: str) -> float:
    if not math.isfinite(number := float(digits)):
        raise UserError(f"{digits[:20]} is not a finite number")
    return number


@contextmanager
def written_atomically(path: Path) -> Iterator[Path]:
    """Yields a path to write a file or folder to. It is renamed to ``path`` at the end, or removed after an error.

    Raises:
        FileExistsError: ``path`` exists and is not an empty folder. OSError: the disk is full or not writable.
    """
    empty = path.is_dir() and not path.is_symlink() and not any(path.iterdir())
    if not path.name or (os.path.lexists(path) and not empty):
        raise FileExistsError(f"{path} is there already: remove it, or choose another name")
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        make_folder(path.parent)
        discard(unfinished)
        yield unfinished
        for part in (*unfinished.rglob("*"), unfinished):
            sync(part)
        rename(unfinished, path)
    except BaseException as error:
        discard(unfinished)
        if why := reason(error):
            raise UnwrittenError(path, why, "make room, or choose another place") from None
        raise
    sync(path.parent)


def reason(error: BaseException) -> str:
    """Why a file could not be written; "" if the error is of another kind."""
    match error:
        case UnwrittenError():
            return error.reason
        case Exception() if type(error).__name__ == "SafetensorError":  # its import would slow down every command
            return str(error)
        case OSError():
            return error.strerror or ""
    return ""


class UnwrittenError(OSError):
    """A file or folder that could not be written."""

    def __init__(self, path: Path | str, reason: str, remedy: str) -> None:
        super().__init__(f"{path} could not be written ({reason}): {remedy}")
        self.path, self.reason, self.remedy = path, reason, remedy

    def __reduce__(self) -> tuple[type[UnwrittenError], tuple[Path | str, str, str]]:
        return UnwrittenError, (self.path, self.reason, self.remedy)


def download(url: str, digest: str, path: Path, remedy: str) -> None:
    """Downloads a file with a known SHA-256.

    Raises:
        ValueError: the download failed, or has another checksum; ends with the ``remedy``.
    """
    import http.client
    import urllib.error
    import urllib.request

    remedy = f"download {url} by other means and {remedy}"
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            content = response.read(_MOST)
            if response.length:
                raise http.client.IncompleteRead(content, response.length)
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        raise UserError(f"the download of {url} failed ({error}): {remedy}") from None
    if (actual := hashlib.sha256(content).hexdigest()) != digest:
        raise UserError(f"the download has SHA-256 {actual}, not {digest}: {remedy}")
    write(path, content)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Changes


def make_folder(path: Path) -> None:
    """Makes a folder, and those above it, if it does not exist. Raises OSError."""
    path.mkdir(parents=True, exist_ok=True)


def open_to_write(path: Path, mode: Literal["wb", "xb", "ab", "a+b", "r+b"]) -> FileIO:
    """Opens as ``open_regular``, without a buffer, so that ``write_to`` reports a full disk at once.

    Raises:
        OSError: it cannot be opened. ValueError: as ``open_regular``.
    """
    file: FileIO = open_regular(path, mode, buffering=0)
    return file


def write_to(file: FileIO, content: bytes) -> None:
    """Writes to an open file. After an OSError, a part of it may have been written."""
    while content:
        content = content[file.write(content) :]


def write_with(path: Path, write: Callable[[Path], object]) -> None:
    """Calls another library's function, which writes a file. After an error, a part of it may have been written."""
    write(path)


def rename(source: Path, target: Path) -> None:
    """Renames a file or folder atomically, over a file or an empty folder of that name. Raises OSError.

    On Windows, the empty folder is removed first.
    """
    if WINDOWS and target.is_dir() and not target.is_symlink():
        target.rmdir()
    source.replace(target)


def remove(path: Path) -> None:
    """Removes a file or link, or a folder with its content, if it exists. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def discard(path: Path) -> None:
    """Removes like ``remove``, but ignores errors."""
    with suppress(OSError):
        remove(path)


def remove_empty(folder: Path) -> None:
    """Removes an empty folder. Raises OSError if it is not empty."""
    folder.rmdir()


def sync(path: Path) -> None:
    """Makes the content of a file durable, or the entries of a folder, except on Windows. Raises OSError."""
    if WINDOWS and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if WINDOWS else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_open(file: IO[Any]) -> None:
    """Makes the content of an open file durable. Raises OSError."""
    file.flush()
    os.fsync(file.fileno())
