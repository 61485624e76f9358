"""Files as a source of documents: text, JSON lines and parquet, plain or compressed."""

from __future__ import annotations

import codecs
import hashlib
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from folio.files import open_regular, other_encoding
from folio.preparation import sources
from folio.preparation.compressed import packed_lines
from folio.preparation.documents import Span, find_cut
from folio.preparation.finding import kind_of
from folio.preparation.sources import Block, Piece

if TYPE_CHECKING:
    from folio.data.token_files import Split

_HELD_ROW_GROUP = 64 * 2**20  # bytes: larger row groups are read in this process, in pieces


@dataclass(frozen=True)
class Files:
    """Text, JSON lines and parquet, plain or compressed, in the order of the arguments.

    ``val_fraction``: if the corpus is one text file, the fraction at its end that is for validation.
    ``divisible``: the tokenizer allows large texts to be cut.
    """

    paths: tuple[Path, ...]
    names: tuple[str, ...]  # relative to the folder that the user named
    text_key: str = "text"
    val_fraction: float = 0.0
    divisible: bool = True
    once = False

    @property
    def size(self) -> int:
        return sum(path.stat().st_size for path in self.paths)

    @property
    def single(self) -> bool:
        """Whether the corpus is one text file, which must be split within the document."""
        return len(self.paths) == 1 and kind_of(self.paths[0]) == "text"

    def describe(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for path, name in zip(self.paths, self.names, strict=True):
            stat = path.stat()
            digest.update(os.fsencode(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n"))
        described = {"files": len(self.paths), "bytes": self.size, "names_sizes_times": digest.hexdigest()[:16]}
        described |= {"val_fraction": self.val_fraction} if self.single else {}
        return described | ({"line_ends": "as \\n"} if any(self._texts()) else {})

    def reads_as_before(self) -> bool:
        """Whether no text has a \\r or a byte order mark, so that older versions, which kept them, read the same."""
        for path in self._texts():
            with open_regular(path) as file:
                start = True
                while raw := file.read(2**20):
                    if b"\r" in raw or (start and raw.startswith(codecs.BOM_UTF8)):
                        return False
                    start = False
        return True

    def _texts(self) -> Iterator[Path]:
        return (path for path in self.paths if kind_of(path) == "text")

    def blocks(self, position: Any = None, part: tuple[int, int] = (0, 1)) -> Iterator[Block]:
        """Position: [number of the file, spans of it that are done]."""
        first, done = position or (0, 0)
        total, before = self.size, 0
        held: list[Piece] = []

        def block(after: list[int]) -> Block:
            made = Block(tuple(p.span for p in held), after, sum(p.size for p in held), held[0].split)
            held.clear()
            return made

        for number, path in enumerate(self.paths):
            size = path.stat().st_size
            if number >= first and _part(before, total, part[1]) <= part[0] <= _part(before + size, total, part[1]):
                for i, piece in enumerate(_PIECES[str(kind_of(path))](self, path)):
                    if (number == first and i < done) or _part(before + piece.at, total, part[1]) != part[0]:
                        continue
                    full = sum(p.size for p in held) + piece.size > sources.BLOCK
                    # a piece that continues a document begins a new block
                    if held and (full or held[0].split != piece.split or piece.span.continues):
                        yield block([number, i])
                    held.append(piece)
            before += size
        if held:
            yield block([len(self.paths), 0])


def _part(at: int, total: int, parts: int) -> int:
    """The part to which byte ``at`` of ``total`` belongs."""
    return min(at * parts // max(total, 1), parts - 1)


def _text(source: Files, path: Path) -> Iterator[Piece]:
    """A file is a document. A large one is cut at places that do not change its tokens."""
    size, name = path.stat().st_size, str(path)
    if size <= sources.BLOCK and not source.single:
        yield Piece(Span(name, "text", 0, size), 0, size)
        return
    if wrong := _first_invalid_line(path):
        line, what = wrong
        yield Piece(Span(f"{name}:{line}", "flaw", held=what), 0, size)
        return
    with open_regular(path) as file:
        val = _validation_start(file, int(size * (1 - source.val_fraction)), size) if source.single else size
        cuts = _cuts(file, size) if source.divisible else []
    marks = sorted({0, val, size, *cuts})
    for start, stop in pairwise(marks):
        begins, ends_here = start in (0, val), stop in (val, size)
        span = Span(name, "text", start, stop, continues=not begins, more=not ends_here)
        split: Split | None = ("val" if start >= val else "train") if source.single else None
        yield Piece(span, start, stop - start, split)


def _cuts(file: BinaryIO, size: int) -> list[int]:
    """The first places after each block at which a text can be cut."""
    cuts, block = [0], sources.BLOCK
    while (at := (cuts[-1] // block + 1) * block) < size:  # no part is searched twice
        cuts.append(find_cut(file, at, size))
    return cuts


def _validation_start(file: BinaryIO, at: int, size: int) -> int:
    """The first byte for validation, at ``at`` or later: between tokens, if possible, else between characters."""
    if (place := find_cut(file, at, size)) < size:
        return place
    file.seek(max(at - 1, 0))
    before, raw = (file.read(1) if at else b""), file.read(4)
    if before == b"\r" and raw.startswith(b"\n"):
        return at + 1
    return at + next((i for i, byte in enumerate(raw) if byte & 0xC0 != 0x80), 0)


def _first_invalid_line(path: Path) -> tuple[int, str] | None:
    """The first line that is not UTF-8, and the reason to report."""
    line = 1
    with open_regular(path) as file:
        while raw := file.readline(2**24):
            try:
                raw.decode("utf-8")
            except UnicodeDecodeError as error:
                if error.reason != "unexpected end of data" or len(raw) < 2**24:
                    return line, f"not UTF-8{other_encoding(raw) if line == 1 else ''}"
                file.seek(error.start - len(raw), io.SEEK_CUR)
            line += raw.endswith(b"\n")
    return None


def _plain_lines(source: Files, path: Path) -> Iterator[Piece]:
    size = path.stat().st_size
    for start in range(0, size, sources.BLOCK):
        stop = min(start + sources.BLOCK, size)
        yield Piece(Span(str(path), "lines", start, stop), start, stop - start)


def _parquet(source: Files, path: Path) -> Iterator[Piece]:
    """A span for each row group; of a very large one, spans that hold its documents."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            if source.text_key not in file.schema_arrow.names:
                keys = ", ".join(file.schema_arrow.names[:8])
                what = f"no column {source.text_key!r}: it has {keys}; --text_key names another"
                yield Piece(Span(str(path), "flaw", held=what), 0, 0)
                return
            at, row = 4, 0
            for g in range(file.num_row_groups):
                group = file.metadata.row_group(g)
                columns = [group.column(c) for c in range(group.num_columns)]
                size = sum(c.total_compressed_size for c in columns)
                texts = (c for c in columns if c.path_in_schema.split(".")[0] == source.text_key)
                if sum(c.total_uncompressed_size for c in texts) <= _HELD_ROW_GROUP:
                    yield Piece(Span(str(path), "parquet", g, row), at, size)
                else:
                    yield from _held_rows(file, path, g, row, source.text_key, at, size)
                at, row = at + size, row + group.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        yield Piece(Span(str(path), "flaw", held=f"unreadable parquet: {str(error).splitlines()[0]}"), 0, 0)


def _held_rows(file: Any, path: Path, group: int, row: int, key: str, at: int, size: int) -> Iterator[Piece]:
    for batch in file.iter_batches(256, row_groups=[group], columns=[key], use_threads=False):
        held = batch.column(0).to_pylist()
        yield Piece(Span(str(path), "texts", row, held=held), at, size)
        row, size = row + len(held), 0


_PIECES: dict[str, Callable[[Files, Path], Iterator[Piece]]] = {
    "text": _text,
    "lines": _plain_lines,
    "packed": lambda _, path: packed_lines(path),
    "parquet": _parquet,
}
