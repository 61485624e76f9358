"""The documents in the spans of a source, one by one, and the flaws of those that cannot be used."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from folio.errors import UserError
from folio.files import decode_text, open_regular, other_encoding

_SEARCHED = 2**20  # bytes in which a place to cut a text is searched
LONGEST_LINE = 2**27  # bytes: a longer line is a mistake or an attack, not a document

# Where a text can be cut: in the patterns of GPT-2, cl100k and o200k, no token crosses from a non-space to a space, or
# from a single line end to a non-space, and no pattern looks further ahead. Every line end becomes \n.
_BETWEEN_TOKENS = re.compile(r"\S(?:(?= )|(?:\r?\n|\r)(?=[^\s/]))|[ぁ-ゖァ-ヺ㐀-鿿](?=[、。，！？；：」])")


class Span(NamedTuple):
    """Consecutive documents: a reference to them if they can be read from the middle of a file, else their content.

    By ``kind``:

    - ``lines``: lines of JSON, those that begin within bytes ``start`` … ``stop``, or the bytes ``held``, whose first
      line is number ``start``.
    - ``text``: the bytes ``start`` … ``stop`` of a text file.
    - ``parquet``: the row group ``start``, whose first row is number ``stop``.
    - ``texts``: the list ``held``, whose first text is number ``start``.
    - ``flaw``: a flaw that the source found; ``held`` describes it.
    """

    path: str
    kind: Literal["lines", "text", "parquet", "texts", "flaw"]
    start: int = 0
    stop: int = 0
    held: Any = None
    continues: bool = False  # its first document began in the previous span
    more: bool = False  # its last document continues in the next span


Spans = tuple[Span, ...]


class Flaw(NamedTuple):
    """Why a document cannot be used. Flaws are counted by ``what``; ``more`` is about this document only."""

    what: str
    more: str = ""


@dataclass(frozen=True)
class WorkerSettings:
    """The settings of a preparation that its workers need."""

    tokenizer: dict[str, Any]  # the argument of from_json
    eot: Literal["before", "after", "none"]
    text_key: str = "text"
    skip: bool = False  # count documents with a flaw, instead of raising an error
    keep_empty: bool = False  # an empty document becomes an end-of-text token


Numbered = Iterator[tuple[int, str | Flaw]]  # with the number of the line or document


def documents(span: Span, settings: WorkerSettings) -> Numbered:
    """The documents of a span, in order, each as its text or its flaw."""
    for i, text in _READERS[span.kind](span, settings.text_key):
        yield i, Flaw("an empty document") if text == "" and not settings.keep_empty else text


def _text(span: Span, key: str) -> Numbered:
    with open_regular(Path(span.path)) as file:
        file.seek(span.start)
        raw = file.read(span.stop - span.start)
    try:
        text = decode_text(raw)
    except UnicodeDecodeError as error:
        yield raw[: error.start].count(b"\n") + 1, Flaw("not UTF-8", other_encoding(raw))
        return
    yield 1, text if span.start else text.removeprefix("\ufeff")


def _lines(span: Span, key: str) -> Numbered:
    """One document per line, ``{"text": …}``. Blank lines are skipped."""
    raw = span.held if span.held is not None else _own_lines(span)
    for i, line in enumerate(raw.split(b"\n")):
        if line and not line.isspace():
            yield i, _value(line, key)


def _own_lines(span: Span) -> bytes:
    """The lines that begin within a span. A line that is too long is cut just above the limit."""
    with open_regular(Path(span.path)) as file:
        if span.start:
            file.seek(span.start - 1)
            if not file.readline(span.stop - span.start + 1).endswith(b"\n"):
                return b""  # the span is the middle of a line
        raw = file.read(max(0, span.stop - file.tell()))
        return raw + file.readline(LONGEST_LINE) if raw and not raw.endswith(b"\n") else raw


def _value(line: bytes, key: str) -> str | Flaw:
    if len(line) > LONGEST_LINE:
        return Flaw(f"a line of more than {LONGEST_LINE:,} bytes")
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return Flaw("not UTF-8", other_encoding(line))
    except (ValueError, RecursionError):
        return Flaw("not JSON", ": each line must be an object of its own")
    if isinstance(record, dict) and key in record:
        return _typed(record[key], key)
    if not isinstance(record, dict):
        more = f": the line is not an object but {_KINDS.get(type(record), 'a number')}"
    else:
        names = ", ".join(repr(name[:40]) for name in list(record)[:8]) + (" …" if len(record) > 8 else "")
        more = f": its keys are {names}: --text_key names another" if record else ""
    return Flaw(f"no text under the key {key!r}", more)


def _typed(value: Any, key: str) -> str | Flaw:
    if isinstance(value, str):
        return value
    return Flaw(f"no text under the key {key!r}", f" but {_KINDS.get(type(value), 'a number')}")


_KINDS: dict[type, str] = {
    dict: "an object",
    list: "a list",
    str: "a text",
    bytes: "bytes",
    bool: "true or false",
    type(None): "null",
}


def _parquet(span: Span, key: str) -> Numbered:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(span.path) as file:
            held = file.read_row_group(span.start, columns=[key], use_threads=False).column(0).to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        yield 0, Flaw(f"unreadable parquet: {str(error).splitlines()[0]}")
        return
    yield from _texts(span._replace(held=held), key)


def _texts(span: Span, key: str) -> Numbered:
    for i, text in enumerate(span.held):
        yield i, _typed(text, key)


def _flaw(span: Span, key: str) -> Numbered:
    yield 0, Flaw(span.held)


_READERS: dict[str, Callable[[Span, str], Numbered]] = {
    "lines": _lines,
    "text": _text,
    "parquet": _parquet,
    "texts": _texts,
    "flaw": _flaw,
}


def find_cut(file: BinaryIO, at: int, size: int) -> int:
    """The first byte from ``at`` on where a text can be cut without changing its tokens; ``size`` if none.

    If there is none in a megabyte, which no language has, it is the first byte of a character: some tokens may change
    there, but the memory that is needed does not grow with the text.
    """
    if at <= 0 or at >= size:
        return min(max(at, 0), size)
    length = 2**12
    while True:
        file.seek(at)
        raw = file.read(length)
        lead = next((i for i, byte in enumerate(raw) if byte & 0xC0 != 0x80), len(raw))
        text = raw[lead:].decode("utf-8", errors="ignore")
        if found := _BETWEEN_TOKENS.search(text):
            return at + lead + len(text[: found.end()].encode())
        if at + length >= size:
            return size
        if length >= _SEARCHED:
            return at + lead + raw.startswith(b"\n")  # perhaps of \r\n
        length *= 2


def refusal(span: Span, i: int, flaw: Flaw) -> UserError:
    """The error for a flaw in the i-th line or document of a span."""
    return UserError(f"{place(span, i)}: {flaw.what}{flaw.more} (--on_error=skip leaves such documents out)")


def place(span: Span, i: int) -> str:
    """The place of the i-th line or document of a span, in the form that editors open."""
    match span.kind:
        case "lines":
            first = span.start if span.held is not None else _line_number(span.path, span.start)
            return f"{span.path}:{first + i}"
        case "text":
            return f"{span.path}:{i}"
        case "parquet":
            return f"{span.path}: row {span.stop + i}"
        case "texts":
            return f"{span.path}: document {span.start + i}"
    return span.path


def _line_number(path: str, start: int) -> int:
    """The number, from 1, of the first line that begins at byte ``start`` or later."""
    count, last = 0, b"\n"
    with open_regular(Path(path)) as file:
        while start > 0 and (raw := file.read(min(start, 2**24))):
            start -= len(raw)
            count, last = count + raw.count(b"\n"), raw[-1:]
    return count + 1 + (last != b"\n")
