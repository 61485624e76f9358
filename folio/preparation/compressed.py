"""Compressed JSON lines. They cannot be read from the middle, so this process unpacks them for the workers."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from folio.files import open_regular
from folio.preparation import sources
from folio.preparation.documents import LONGEST_LINE, Span
from folio.preparation.sources import Piece


def packed_lines(path: Path) -> Iterator[Piece]:
    """The lines of a compressed file in pieces of about one block."""
    number, before, held = 1, 0, bytearray()

    def piece() -> Piece:
        nonlocal number, before, held
        made = Piece(Span(str(path), "lines", number, held=bytes(held)), 0, packed.tell() - before)
        number, before, held = number + held.count(b"\n"), packed.tell(), bytearray()
        return made

    with open_regular(path) as packed:
        try:
            for line in _lines(_unpack(path, packed)):
                held += line
                if len(held) >= sources.BLOCK:
                    yield piece()
            if held:
                yield piece()
        except (OSError, EOFError, zlib.error, _zstd_error()) as error:
            if held:
                yield piece()
            kind = "gzip" if path.suffix.lower() == ".gz" else "zstandard"
            yield Piece(Span(f"{path}:{number}", "flaw", held=f"corrupt {kind} from here on ({error})"), 0, 0)


def _lines(unpacked: BinaryIO) -> Iterator[bytes]:
    """Each line with its end. A line that is too long is cut just above the limit."""
    while line := unpacked.readline(LONGEST_LINE + 1):
        rest = line
        while rest and not rest.endswith(b"\n"):
            rest = unpacked.readline(2**20)
        yield line if rest is line or not rest else line + b"\n"


def _unpack(path: Path, packed: BinaryIO) -> BinaryIO:
    raw: Any = gzip.GzipFile(fileobj=packed) if path.suffix.lower() == ".gz" else _Frames(packed)
    return io.BufferedReader(raw, 2**20)


class _Frames(io.RawIOBase):
    """Unpacks Zstandard frames. Raises EOFError if a frame is cut short; the library's own reader does not notice."""

    def __init__(self, packed: BinaryIO) -> None:
        import zstandard

        self._packed, self._begin = packed, zstandard.ZstdDecompressor().decompressobj
        self._frame: Any = None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int:
        while not self._ready:
            over = self._frame is None or self._frame.eof
            # only 2**10 bytes, since they can unpack to 32 MiB
            raw = (over and self._frame and self._frame.unused_data) or self._packed.read(2**10)
            if not raw and over:
                return 0
            if not raw:
                raise EOFError("it ends within a frame")
            if over:
                self._frame = self._begin()
            self._ready = memoryview(self._frame.decompress(raw))
        count = min(len(into), len(self._ready))
        into[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


def _zstd_error() -> type[Exception]:
    try:
        from zstandard import ZstdError
    except ModuleNotFoundError:
        return EOFError
    return ZstdError
