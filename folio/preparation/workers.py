"""A block of documents → ids. Runs in processes that import this module and the tokenizer, and no more."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import connection, parent_process
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np

from folio.data.tokenizers import Ids, Tokenizer, from_json, stored
from folio.errors import UserError
from folio.files import decode_text, other_encoding

LONGEST_LINE = 2**27  # bytes: a line that is longer is no document but a mistake, or an attack

# No token of GPT-2's, cl100k's or o200k's patterns reaches over a space that follows something else, nor over
# a single line end that something else follows; and none of them looks further ahead. Every line end becomes \n.
_BETWEEN_TOKENS = re.compile(r"\S(?:(?= )|(?:\r?\n|\r)(?=[^\s/]))|[ぁ-ゖァ-ヺ㐀-鿿](?=[、。，！？；：」])")


class Span(NamedTuple):
    """Documents that lie together, by reference where they can be read from the middle, else in hand.

    ``kind``: ``lines`` of JSON (those that begin within bytes ``start`` … ``stop``, or ``held`` bytes whose
    first line is number ``start``), the bytes ``start`` … ``stop`` of a ``text`` file, the row group ``start``
    of a ``parquet`` file, whose first row is number ``stop``, ``held`` ``texts`` of which the first is number
    ``start``, or a ``flaw`` that the source met, in words.
    """

    path: str
    kind: Literal["lines", "text", "parquet", "texts", "flaw"]
    start: int = 0
    stop: int = 0
    held: Any = None
    continues: bool = False  # its document began in the span before
    more: bool = False  # and goes on in the next


Spans = tuple[Span, ...]


class Flaw(NamedTuple):
    """What is wrong with a document that cannot be taken, by which it is counted, and more about this one."""

    what: str
    more: str = ""


@dataclass(frozen=True)
class Work:
    """What every worker has to know."""

    tokenizer: dict[str, Any]  # as from_json takes it
    eot: Literal["before", "after", "none"]
    text_key: str = "text"
    skip: bool = False  # documents with a flaw are counted, not an error
    keep_empty: bool = False  # as an end-of-text token alone


class Tokenised(NamedTuple):
    """The ids of a block's documents, one after another, and how many each has."""

    ids: Ids  # uint16, or uint32 where the vocabulary needs it
    lengths: Ids
    continues: bool  # the first document goes on with the last one of the block before
    size: int  # bytes of text in UTF-8
    skipped: Counter[str]


class Tokenise:
    """Spans → ``Tokenised``. Raises ValueError that names file and line of a flaw, unless those are skipped."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.tokenizer: Tokenizer = from_json(work.tokenizer)
        self.dtype = stored(self.tokenizer.size)
        self.eot = np.array([self.tokenizer.eot] if work.eot != "none" else [], dtype=self.dtype)

    def __call__(self, spans: Spans) -> Tokenised:
        none = self.eot[:0]
        pieces, lengths, size, skipped = [none], [], 0, Counter[str]()
        for span in spans:
            before = none if span.continues or self.work.eot == "after" else self.eot
            after = none if span.more or self.work.eot == "before" else self.eot
            for i, text in documents(span, self.work):
                if isinstance(text, str):
                    try:
                        size += len(text.encode())
                        ids = self.tokenizer.encode(text)
                    except UnicodeEncodeError:
                        text = Flaw("half of a surrogate pair")
                if isinstance(text, Flaw):
                    if not self.work.skip:
                        raise refusal(span, i, text)
                    skipped[text.what] += 1
                    continue
                pieces += before, ids, after
                lengths.append(len(before) + len(ids) + len(after))
        ids = np.concatenate(pieces, dtype=self.dtype, casting="unsafe")
        return Tokenised(ids, np.array(lengths, dtype=np.int64), spans[0].continues, size, skipped)


class Alphabet:
    """Spans → the distinct characters of their documents, sorted."""

    def __init__(self, work: Work) -> None:
        self.work = work

    def __call__(self, spans: Spans) -> str:
        texts = (text for span in spans for _, text in documents(span, self.work) if isinstance(text, str))
        return "".join(sorted(set().union(*texts) - {chr(c) for c in range(0xD800, 0xE000)}))


Numbered = Iterator[tuple[int, str | Flaw]]  # the line or the document that it is


def documents(span: Span, work: Work) -> Numbered:
    """The documents of a span, in order, each as its text or as what is wrong with it."""
    for i, text in _READERS[span.kind](span, work.text_key):
        yield i, Flaw("an empty document") if text == "" and not work.keep_empty else text


def _text(span: Span, key: str) -> Numbered:
    with open(span.path, "rb") as file:
        file.seek(span.start)
        raw = file.read(span.stop - span.start)
    try:
        text = decode_text(raw)
    except UnicodeDecodeError as error:
        yield raw[: error.start].count(b"\n") + 1, Flaw("not UTF-8", other_encoding(raw))
        return
    yield 1, text if span.start else text.removeprefix("\ufeff")


def _lines(span: Span, key: str) -> Numbered:
    """A document a line, ``{"text": …}``. Lines of white space are passed over."""
    raw = span.held if span.held is not None else _own_lines(span)
    for i, line in enumerate(raw.split(b"\n")):
        if line and not line.isspace():
            yield i, _value(line, key)


def _own_lines(span: Span) -> bytes:
    """The lines that begin within a span; of one that is too long, no more than tells so."""
    with open(span.path, "rb") as file:
        if span.start:
            file.seek(span.start - 1)
            if not file.readline(span.stop - span.start + 1).endswith(b"\n"):
                return b""  # all of it is the middle of a line
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


def cut(file: BinaryIO, at: int, size: int) -> int:
    """The first byte from ``at`` on where a text can be cut without changing its tokens; ``size`` if none."""
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
        length *= 2


def refusal(span: Span, i: int, flaw: Flaw) -> UserError:
    """What is said of the i-th line or document of a span where it ends the work."""
    return UserError(f"{place(span, i)}: {flaw.what}{flaw.more} (--on_error=skip leaves such documents out)")


def place(span: Span, i: int) -> str:
    """Where the i-th line or document of a span lies, as an editor finds it."""
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
    with open(path, "rb") as file:
        while start > 0 and (raw := file.read(min(start, 2**24))):
            start -= len(raw)
            count, last = count + raw.count(b"\n"), raw[-1:]
    return count + 1 + (last != b"\n")


# In a process of its own

_job: Callable[[Spans], Any]


def begin(job: Callable[[Work], Callable[[Spans], Any]], work: Work) -> None:
    """Makes this process a worker for one job, which ends when the process that began it does."""
    global _job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that began this one ends it
    _job = job(work)
    parent = parent_process()
    if parent is not None:

        def follow() -> None:
            connection.wait([parent.sentinel])
            os._exit(1)

        threading.Thread(target=follow, daemon=True).start()


def do(spans: Spans) -> Any:
    """The job that ``begin`` gave, on these spans."""
    return _job(spans)
