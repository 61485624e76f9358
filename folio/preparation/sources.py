"""Where documents come from: files, the datasets library, text in hand. Each is a sequence of blocks of spans.

A block can be named by its position and begun at again, and a source can be shared out: parts I of N, one after
another, hold the blocks of the whole in their order.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import hashlib
import io
import json
import os
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

from folio.data.token_files import Split
from folio.errors import UserError
from folio.files import other_encoding, require_file
from folio.preparation.workers import LONGEST_LINE, Span, Spans, cut
from folio.records.console import say

BLOCK = 4 * 2**20  # bytes of text that a worker takes at once
_HELD_ROW_GROUP = 64 * 2**20  # bytes: larger row groups are read here, piece by piece


class Block(NamedTuple):
    """What one worker takes at once, and the position (JSON) after it."""

    spans: Spans
    after: Any
    size: int  # bytes on disk that it stands for
    split: Split | None = None  # where the source decides it


class Source(Protocol):
    """What can be cut into blocks."""

    @property
    def size(self) -> int | None:
        """Bytes on disk, where they are known beforehand."""
        ...

    def describe(self) -> dict[str, Any]:
        """What tells this source from another or a changed one, as JSON."""
        ...

    def blocks(self, position: Any = None, part: tuple[int, int] = (0, 1)) -> Iterator[Block]:
        """The blocks of part I of N from a position on.

        Raises:
            ValueError, OSError: name what cannot be read.
        """
        ...


@dataclass(frozen=True)
class Texts:
    """Texts in hand, by split; each is a document."""

    made_of: dict[str, Any]
    splits: Mapping[Split, Sequence[str]]

    @property
    def size(self) -> int:
        return sum(len(text) for texts in self.splits.values() for text in texts)

    def describe(self) -> dict[str, Any]:
        return self.made_of

    def blocks(self, position: Any = None, part: tuple[int, int] = (0, 1)) -> Iterator[Block]:
        every = [(split, i, text) for split, texts in self.splits.items() for i, text in enumerate(texts)]
        for n, (split, i, text) in enumerate(every):
            if n >= (position or 0) and n * part[1] // len(every) == part[0]:
                yield Block((Span(split, "texts", i, held=[text]),), n + 1, len(text), split)


# Files


class Piece(NamedTuple):
    """A span of a file and where it lies: bytes ``at`` … ``at + size`` on disk."""

    span: Span
    at: int
    size: int
    split: Split | None = None


@dataclass(frozen=True)
class Files:
    """Text, JSON lines and parquet, plain or compressed, in the order in which they were named.

    ``val_fraction``: the share of a corpus of one text file that is for validation, cut from its end.
    ``divisible``: large texts may be cut, as the tokenizer allows.
    """

    paths: tuple[Path, ...]
    names: tuple[str, ...]  # relative to what was named
    text_key: str = "text"
    val_fraction: float = 0.0
    divisible: bool = True

    @property
    def size(self) -> int:
        return sum(path.stat().st_size for path in self.paths)

    @property
    def single(self) -> bool:
        """Whether the corpus is one document, which no split by documents can divide."""
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
        """Whether line ends and byte order marks as they are, which is how texts were once read, make no difference."""
        for path in self._texts():
            with path.open("rb") as file:
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
                    full = sum(p.size for p in held) + piece.size > BLOCK
                    # A document goes on with the block before, so that nothing else can stand before its rest
                    if held and (full or held[0].split != piece.split or piece.span.continues):
                        yield block([number, i])
                    held.append(piece)
            before += size
        if held:
            yield block([len(self.paths), 0])


def _part(at: int, total: int, parts: int) -> int:
    return min(at * parts // max(total, 1), parts - 1)


def _text(source: Files, path: Path) -> Iterator[Piece]:
    """A file is a document; a large one is cut where that does not change its tokens."""
    size, name = path.stat().st_size, str(path)
    if size <= BLOCK and not source.single:
        yield Piece(Span(name, "text", 0, size), 0, size)
        return
    if wrong := _invalid(path):
        line, what = wrong
        yield Piece(Span(f"{name}:{line}", "flaw", held=what), 0, size)
        return
    with path.open("rb") as file:
        val = _divided(file, int(size * (1 - source.val_fraction)), size) if source.single else size
        ends = _ends(file, size) if source.divisible else []
    marks = sorted({0, val, size, *ends})
    for start, stop in pairwise(marks):
        begins, ends_here = start in (0, val), stop in (val, size)
        span = Span(name, "text", start, stop, continues=not begins, more=not ends_here)
        split: Split | None = ("val" if start >= val else "train") if source.single else None
        yield Piece(span, start, stop - start, split)


def _ends(file: BinaryIO, size: int) -> list[int]:
    """The first places after each block at which a text can be cut."""
    ends = [0]
    while (at := (ends[-1] // BLOCK + 1) * BLOCK) < size:  # what was searched already is not searched again
        ends.append(cut(file, at, size))
    return ends


def _divided(file: BinaryIO, at: int, size: int) -> int:
    """Where a text is cut for validation: between tokens, or where there is no such place between characters."""
    if (place := cut(file, at, size)) < size:
        return place
    file.seek(max(at - 1, 0))
    before, raw = (file.read(1) if at else b""), file.read(4)
    if before == b"\r" and raw.startswith(b"\n"):
        return at + 1
    return at + next((i for i, byte in enumerate(raw) if byte & 0xC0 != 0x80), 0)


def _invalid(path: Path) -> tuple[int, str] | None:
    """The line on which a file is no longer UTF-8, and what is said of that."""
    line = 1
    with path.open("rb") as file:
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
    for start in range(0, size, BLOCK):
        stop = min(start + BLOCK, size)
        yield Piece(Span(str(path), "lines", start, stop), start, stop - start)


def _packed_lines(source: Files, path: Path) -> Iterator[Piece]:
    """Compressed files cannot be read from the middle: they are unpacked here."""
    number, told, held = 1, 0, bytearray()

    def piece() -> Piece:
        nonlocal number, told, held
        made = Piece(Span(str(path), "lines", number, held=bytes(held)), 0, packed.tell() - told)
        number, told, held = number + held.count(b"\n"), packed.tell(), bytearray()
        return made

    with path.open("rb") as packed:
        try:
            for line in _lines(_unpack(path, packed)):
                held += line
                if len(held) >= BLOCK:
                    yield piece()
            if held:
                yield piece()
        except (OSError, EOFError, zlib.error, _zstd_error()) as error:
            if held:
                yield piece()
            kind = "gzip" if path.suffix.lower() == ".gz" else "zstandard"
            yield Piece(Span(f"{path}:{number}", "flaw", held=f"corrupt {kind} from here on ({error})"), 0, 0)


def _lines(unpacked: BinaryIO) -> Iterator[bytes]:
    """Each line with its end; of one that is too long, no more than tells so."""
    while line := unpacked.readline(LONGEST_LINE + 1):
        rest = line
        while rest and not rest.endswith(b"\n"):
            rest = unpacked.readline(2**20)
        yield line if rest is line or not rest else line + b"\n"


def _unpack(path: Path, packed: BinaryIO) -> BinaryIO:
    raw: Any = gzip.GzipFile(fileobj=packed) if path.suffix.lower() == ".gz" else _Frames(packed)
    return io.BufferedReader(raw, 2**20)


class _Frames(io.RawIOBase):
    """Zstandard frames, unpacked; raises EOFError within one, which the library's own reader takes for the end."""

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
            raw = (over and self._frame and self._frame.unused_data) or self._packed.read(
                2**10
            )  # which can hold 32 MiB
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


def _parquet(source: Files, path: Path) -> Iterator[Piece]:
    """A span for each row group; the documents of very large ones in hand."""
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
    "packed": _packed_lines,
    "parquet": _parquet,
}
_PACKED = ("", ".gz", ".zst")
_TABLE = (
    "python -c \"import pandas; pandas.read_csv('FILE', sep={}).to_json('FILE.jsonl', orient='records', lines=True)\" "
    "makes JSON lines of it"
)
_KINDS = {
    ".txt": "text",
    ".md": "text",
    **{f"{end}{packed}": "packed" if packed else "lines" for end in (".jsonl", ".ndjson") for packed in _PACKED},
    ".json.gz": "packed",
    ".json.zst": "packed",
    ".parquet": "parquet",
}
_REMEDIES = {  # for files of other kinds, by the end of their name
    ".json": "jq -c '.[]' FILE.json > FILE.jsonl makes JSON lines of a list",
    ".csv": _TABLE.format("','"),
    ".tsv": _TABLE.format("'\\t'"),
    **dict.fromkeys((".gz", ".zst", ".zip", ".tar", ".tgz", ".bz2", ".xz", ".7z"), "unpack it first"),
}


def kind_of(path: Path) -> str | None:
    """How a file is read, by the end of its name in small letters or capitals; None for files of no known kind."""
    return next((kind for end, kind in _KINDS.items() if path.name.lower().endswith(end)), None)


def find(named: Sequence[str]) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """Files, folders (all that lies below) and globs → the files that can be read, and their relative names.

    A file that several names or links lead to is taken once. What is left out is told.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: a pipe or device, a file of no known kind, or none of one in a folder.
        OSError: a folder that cannot be read.
    """
    found: dict[Path, str] = {}
    for name in named:
        path = Path(name)
        if path.is_dir():
            here = {p: p.relative_to(path).as_posix() for p in _below(path)}
        elif path.exists():
            if kind_of(require_file(path)) is None:
                raise UserError(f"{path}: not a known kind of text file: {', '.join(_KINDS)}{_remedy([path])}")
            here = {path: path.name}
        else:
            here = {p: p.name for p in map(Path, sorted(glob.glob(name, recursive=True))) if not p.is_dir()}
            if not any(p.exists() for p in here):
                raise FileNotFoundError(f"{name}: no such file or folder, and no glob that finds one")
        taken = sorted((p for p in here if kind_of(p) and p.is_file()), key=Path.as_posix)
        others = [p for p in here if not (kind_of(p) and p.is_file())]
        if not taken:
            has = f" ({_counted(others)})" if others else ""
            known = f"of a known kind: {', '.join(_KINDS)}{_remedy(others)}"
            raise UserError(f"{name}: none of its {len(here)} files{has} is {known}")
        if others:
            say(f"{name}: other files, left out: {len(others)} ({_counted(others)})")
        for p in taken:
            found.setdefault(p.resolve(), here[p])
    return tuple(found), tuple(found.values())


def _below(root: Path) -> Iterator[Path]:
    """All that is no folder below one, hidden names left out; links to folders are followed last, each folder once."""
    seen = {(at.stat().st_dev, at.stat().st_ino) for at in root.resolve().parents}  # which a link may lead back to
    folders, links = deque([root]), deque[Path]()
    while folders or links:
        folder = folders.popleft() if folders else links.popleft()
        which = folder.stat().st_dev, folder.stat().st_ino
        if which in seen:
            continue
        seen.add(which)
        for path in sorted(folder.iterdir()):
            if path.name.startswith("."):
                continue
            if path.is_dir():
                (links if path.is_symlink() else folders).append(path)
            else:
                yield path


def _counted(paths: Sequence[Path]) -> str:
    """How many there are of each kind, for a reader."""
    kinds = Counter(sorted(map(_ending, paths))).most_common()
    return ", ".join(f"{count:,} {kind}" for kind, count in kinds[:8]) + (", …" if len(kinds) > 8 else "")


def _ending(path: Path) -> str:
    if not path.is_file():
        return "pipe, socket or device" if path.exists() else "broken link"
    return (
        "".join(path.suffixes[-2:] if path.suffix.lower() in (".gz", ".zst") else path.suffixes[-1:])
        or "without an end"
    )


def _remedy(paths: Sequence[Path]) -> str:
    """What can be done about files of other kinds, where that is known."""
    ends = (path.suffix.lower() for path in paths)
    return next((f"; {end}: {_REMEDIES[end]}" for end in ends if end in _REMEDIES), "")


# The datasets library


@dataclass(frozen=True)
class Hub:
    """A data set of the datasets library: a name on its hub, or a local file or folder of parquet or JSON lines.

    ``held_out``: the share of the documents that are validation, chosen and shuffled as nanoGPT's
    ``data/openwebtext/prepare.py`` does (``train_test_split``, seed 2357).
    """

    name: str
    config: str | None = None
    split: str = "train"
    streaming: bool = False
    text_key: str = "text"
    held_out: float = 0.0
    size: int | None = None

    def describe(self) -> dict[str, Any]:
        what = {"hub": self.name, "config": self.config, "split": self.split, "held_out": self.held_out}
        what["streaming"] = self.streaming  # which decides how it is shared out
        if Path(self.name).exists():
            del what["hub"]
            what |= Files(*find([self.name])).describe()
        return what

    def blocks(self, position: Any = None, part: tuple[int, int] = (0, 1)) -> Iterator[Block]:
        """Position: [split, documents done] in a table, the library's own state in a stream."""
        data = self._open()
        if self.streaming:
            yield from self._stream(data, position, part)
            return
        tables: list[tuple[Split | None, Any]] = [(None, data)]
        if self.held_out:
            both = data.train_test_split(test_size=self.held_out, seed=2357, shuffle=True)
            tables = [("val", both["test"]), ("train", both["train"])]
        first, done = position or (0, 0)
        for number, (split, table) in enumerate(tables[first:], first):
            begin, end = (len(table) * (part[0] + i) // part[1] for i in (0, 1))
            begin += done if number == first else 0
            for start in range(begin, end, 256):
                stop = min(start + 256, end)
                texts = table[start:stop][self.text_key]
                done_here = stop - len(table) * part[0] // part[1]
                yield Block((Span(self._label, "texts", start, held=texts),), [number, done_here], 0, split)

    def _stream(self, data: Any, position: Any, part: tuple[int, int]) -> Iterator[Block]:
        if part[1] > 1:
            if data.num_shards < part[1]:
                raise UserError(f"{self._label} has {data.num_shards} files: --shard_of takes as many parts at most")
            data = data.shard(num_shards=part[1], index=part[0], contiguous=True)
        number = 0
        if position:
            data.load_state_dict(position["state"])
            number = position["documents"]
        for batch in data.iter(batch_size=256):
            texts = batch[self.text_key]
            after = {"state": json.loads(json.dumps(data.state_dict())), "documents": number + len(texts)}
            yield Block((Span(self._label, "texts", number, held=texts),), after, 0)
            number += len(texts)

    @property
    def _label(self) -> str:
        return self.name if self.split == "train" else f"{self.name}[{self.split}]"

    def _open(self) -> Any:
        import datasets

        datasets.disable_progress_bars()
        local: dict[str, Any] = {}
        path = self.name
        if Path(path).exists():
            files = [str(p) for p in find([path])[0]]
            kinds = {kind_of(Path(f)) for f in files}
            if len(kinds) > 1 or not kinds <= {"lines", "packed", "parquet"}:
                raise UserError(f"{path}: the datasets library takes parquet or JSON lines, not a mixture or text")
            path, local = ("parquet" if kinds == {"parquet"} else "json"), {"data_files": {self.split: files}}
        config = None if local else self.config
        try:
            data = datasets.load_dataset(path, config, split=self.split, streaming=self.streaming, **local)
        except Exception as error:  # the library raises almost anything
            reason = next(iter(chain(str(error).splitlines(), [type(error).__name__])))
            raise UserError(f"hf:{self.name} cannot be loaded ({type(error).__name__}: {reason})") from None
        names = data.column_names
        if names and self.text_key not in names:
            raise UserError(f"hf:{self.name} has no column {self.text_key!r} but {', '.join(names)}: --text_key=…")
        return data.select_columns(self.text_key)
