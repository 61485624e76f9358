"""A source of documents: a sequence of blocks of spans.

Reading can begin again at the position after any block. A source can be divided among processes: the blocks of parts
0 … N − 1, one part after another, are those of the whole.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from folio.errors import UserError
from folio.preparation.documents import Span, Spans

if TYPE_CHECKING:
    from folio.data.token_files import Split

BLOCK = 4 * 2**20  # bytes of text that a worker reads at once


class Block(NamedTuple):
    """The spans that a worker reads at once, and the position (JSON) after them."""

    spans: Spans
    after: Any
    size: int  # bytes on disk
    split: Split | None = None  # if the source decides the split


class Piece(NamedTuple):
    """A span of a file, which is its bytes ``at`` … ``at + size`` on disk."""

    span: Span
    at: int
    size: int
    split: Split | None = None


class Source(Protocol):
    """Documents that are read in blocks."""

    @property
    def size(self) -> int | None:
        """Bytes on disk, if known beforehand."""
        ...

    @property
    def once(self) -> bool:
        """It can be read only once, from its beginning, and what it holds is not known before."""
        ...

    def describe(self) -> dict[str, Any]:
        """What identifies this source and its current content, as JSON."""
        ...

    def blocks(self, position: Any = None, part: tuple[int, int] = (0, 1)) -> Iterator[Block]:
        """The blocks of part I of N from a position on.

        Raises:
            ValueError, OSError: something cannot be read; the error names it.
        """
        ...


class Given:
    """The texts of a program, each a document: of a sequence, or of another iterable, which is read only once.

    Raises:
        UserError: an item is not a text; gives its number.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = texts
        self._count = len(texts) if isinstance(texts, Sequence) else None
        blocks = self._read(0)
        first = list(itertools.islice(blocks, 3))  # so many are few, and one process tokenizes them
        self.size = sum(block.size for block in first) if len(first) < 3 else None
        self._blocks = itertools.chain(first, blocks)

    @property
    def once(self) -> bool:
        return self._count is None

    def describe(self) -> dict[str, Any]:
        if self.once:
            return {"texts": "an iterable"}
        digest = hashlib.sha256()
        for _, text in self._numbered(0):
            raw = text.encode("utf-8", "surrogatepass")
            digest.update(b"%d:" % len(raw) + raw)
        return {"texts": self._count, "sha256": digest.hexdigest()[:16]}

    def blocks(self, position: Any = None, part: tuple[int, int] = (0, 1)) -> Iterator[Block]:
        """Position: the number of texts that are done."""
        if part[1] > 1:
            raise UserError("texts cannot be shared by several processes: leave shard_of out")
        return self._blocks if self.once else self._read(position or 0)

    def _read(self, first: int) -> Iterator[Block]:
        held: list[str] = []
        size, end = 0, first
        for number, text in self._numbered(first):
            if held and size + len(text) > BLOCK:
                yield Block((Span("texts", "texts", number - len(held), held=held),), number, size)
                held, size = [], 0
            held.append(text)
            size, end = size + len(text), number + 1
        if held:
            yield Block((Span("texts", "texts", end - len(held), held=held),), end, size)

    def _numbered(self, first: int) -> Iterator[tuple[int, str]]:
        for number, text in enumerate(itertools.islice(self._texts, first, None), first):
            if not isinstance(text, str):
                raise UserError(f"texts: item {number} is of type {type(text).__name__}: each must be a str")
            yield number, text


@dataclass(frozen=True)
class Texts:
    """Texts in memory, by split; each is a document."""

    made_of: dict[str, Any]
    splits: Mapping[Split, Sequence[str]]
    once = False

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
