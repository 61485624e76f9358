"""Token files of every format, as flat arrays of ids.

A file is mapped, not loaded. The formats are nanoGPT's bare ``.bin``, ``.bin`` with the header of llm.c and
modded-nanogpt, ``.npy`` (build-nanogpt, GPT-from-scratch) and datatrove's ``.ds``.
"""

from __future__ import annotations

import io
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from tokenize import TokenError
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from folio.config.declare import TokenDtype
from folio.errors import UserError
from folio.files import open_regular, require_file

Split = Literal["train", "val"]
Array = NDArray[np.integer[Any]]
Eot = Literal["before", "after", "none"]

CLONE = Path(__file__).resolve().parents[2]  # the folder of train.py
SPLITS: tuple[Split, ...] = ("train", "val")
META, META_PKL = "meta.json", "meta.pkl"
UNFINISHED = ".preparing"  # the folder inside a data set's folder in which the data set is prepared
GPT2 = {"kind": "tiktoken", "name": "gpt2"}
GPT2_SIZES = range(50257, 50305)  # the number of GPT-2's token ids, and what vocabularies are padded to for speed
AGAIN = "prepare the data set again"
BARE = np.dtype("<u2")  # the type that nanoGPT writes
_HEADERS: dict[int, tuple[np.dtype[Any], tuple[int, ...]]] = {
    20240520: (np.dtype("<u2"), (1,)),
    20240801: (np.dtype("<u4"), (1, 7)),
}  # llm.c's magic numbers, types and versions: dev/data/data_common.py
_HEADER = 256 * 4  # bytes
_NPY_HEADER = 1 << 14  # bytes, more than the longest header that numpy itself reads
_LINE = 4096  # bytes
_DATES = range(20240101, 20241232)  # magic numbers of llm.c's other files, such as models, are dates
_OTHERS = {
    b"\x93NUMPY": "a .npy file",
    b"PK\x03\x04": "a zip file",
    b"\x1f\x8b\x08": "a gzip file",
    b"LITPKDS": "a packed file of lit-gpt",
}


class TokenFile(NamedTuple):
    """One file: ``tokens`` ids of ``dtype`` from byte ``offset`` on; the file's ``sha256`` if it is known."""

    path: Path
    dtype: np.dtype[Any]
    offset: int
    tokens: int
    sha256: str | None = None

    def map(self) -> Array:
        """The ids (n) as a memmap. Raises ValueError if the file has become shorter than it was."""
        with open_regular(self.path) as file:
            try:
                return np.memmap(file, self.dtype, "r", self.offset, (self.tokens,))
            except ValueError:  # longer than the file
                raise self._cut() from None

    def require_whole(self, ids: Array) -> None:
        """Raises ValueError if the file of a map has become shorter: reading the map would end the process."""
        if isinstance(ids.base, mmap.mmap) and ids.base.size() < self.offset + ids.nbytes:
            raise self._cut()

    def _cut(self) -> UserError:
        return UserError(f"{self.path} became shorter while it was in use: {AGAIN}")


def open_file(path: Path, token_dtype: TokenDtype = "auto") -> TokenFile:
    """A token file of any format, by its suffix. ``token_dtype``: the type of a ``.bin`` file without a header.

    Raises:
        FileNotFoundError: it is missing. ValueError: it is damaged, or states another type than ``token_dtype``.
    """
    try:
        require_file(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is a link to a file that is not there: {AGAIN}") from None
    bare = np.dtype("uint16" if token_dtype == "auto" else token_dtype).newbyteorder("<")
    file = _bin(path, bare) if path.suffix == ".bin" else FORMATS[path.suffix](path)
    if token_dtype != "auto" and file.dtype != bare:
        raise UserError(f"token_dtype={token_dtype}: {path} states its own type, {file.dtype}: remove --token_dtype")
    return file


def bare_file(path: Path, dtype: np.dtype[Any], offset: int = 0) -> TokenFile:
    """The ids from byte ``offset`` to the end. Raises ValueError if there are none, or the last one is cut."""
    size = path.stat().st_size - offset
    if size <= 0:
        raise UserError(f"{path} is empty: {AGAIN}")
    if size % dtype.itemsize:
        raise UserError(
            f"{path}: {size} bytes are not whole {dtype} tokens: it is cut short or of another type; {AGAIN}"
            + (", or say the type with --token_dtype" if not offset else "")
        )
    return TokenFile(path, dtype, offset, size // dtype.itemsize)


def _bin(path: Path, bare: np.dtype[Any] = BARE) -> TokenFile:
    """Ids alone as in nanoGPT's files, or after llm.c's header of 256 int32: magic number, version, count."""
    with open_regular(path) as file:
        head = file.read(12)
    if other := next((what for magic, what in _OTHERS.items() if head.startswith(magic)), None):
        raise UserError(f"{path} is {other}, not a .bin file of token ids: {AGAIN}")
    magic, version, count = np.frombuffer(head, "<i4").tolist() if len(head) == 12 else (0, 0, 0)
    if magic not in _HEADERS:
        if magic in _DATES:
            raise UserError(f"{path}: its header, {magic}, is that of an llm.c file without tokens, such as a model")
        return bare_file(path, bare)
    if path.stat().st_size < _HEADER:
        raise UserError(f"{path}: {path.stat().st_size} bytes are less than a header: it is cut short; {AGAIN}")
    dtype, versions = _HEADERS[magic]
    if version not in versions:
        raise UserError(
            f"{path}: its header, {magic}, is of version {version}, and only {' and '.join(map(str, versions))} can "
            f"be read: {AGAIN}"
        )
    found = bare_file(path, dtype, _HEADER)
    _check_count(path, found.tokens, count)
    return found


def _check_count(path: Path, tokens: int, stated: int) -> None:
    if tokens != stated:
        why = "is cut short" if tokens < stated else "is too long"
        raise UserError(f"{path}: {tokens:,} tokens, but its header says {stated:,}: it {why}; {AGAIN}")


def npy_file(path: Path) -> TokenFile:
    """A one-dimensional ``.npy`` array of integers. Raises ValueError for any other."""
    try:
        with open_regular(path) as whole:
            file = io.BytesIO(whole.read(_NPY_HEADER))
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
        offset = file.tell()
    except (ValueError, OSError, SyntaxError, TokenError, TypeError, RecursionError, MemoryError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:80]
        raise UserError(f"{path}: not a .npy file ({reason}): {AGAIN}") from None
    if len(shape) != 1 or dtype.kind not in "ui":
        raise UserError(f"{path}: an array of {dtype} with {len(shape)} dimensions, not a row of token ids; {AGAIN}")
    found = bare_file(path, dtype, offset)
    _check_count(path, found.tokens, shape[0])
    return found


def _datatrove(path: Path) -> TokenFile:
    """Ids alone. Their width follows from the number of tokens, which is the last uint64 of ``….ds.index``."""
    index = path.with_name(path.name + ".index")
    if not index.is_file() or index.stat().st_size < 8:
        raise FileNotFoundError(f"{index} is missing: datatrove writes it with save_index=True")
    if index.stat().st_size % 8:
        raise UserError(f"{index}: {index.stat().st_size} bytes are not a multiple of 8: it is cut short; {AGAIN}")
    with open_regular(index) as file:
        file.seek(-8, io.SEEK_END)
        tokens = int.from_bytes(file.read(8), "little")
    width, rest = divmod(path.stat().st_size, max(tokens, 1))
    stated = datatrove_metadata(path)[1]
    if rest or width not in (2, 4) or stated not in ("", str(width)):
        raise UserError(
            f"{path}: {path.stat().st_size} bytes for the {tokens:,} tokens of its index: it is cut short; {AGAIN}"
        )
    return bare_file(path, np.dtype("<u2" if width == 2 else "<u4"))


def datatrove_metadata(path: Path) -> tuple[str, str]:
    """The tokenizer's name and the bytes per token, from the first line of ``….ds.metadata``; "" if it is missing."""
    metadata = path.with_name(path.name + ".metadata")
    if not os.path.lexists(metadata):
        return "", ""
    with open_regular(metadata) as file:
        first = file.readline(_LINE).decode("utf-8", "replace").rstrip("\r\n")
    name, _, width = first.rpartition("|")
    return name, width


FORMATS: dict[str, Callable[[Path], TokenFile]] = {".bin": _bin, ".npy": npy_file, ".ds": _datatrove}  # by suffix
