"""A source of documents: a sequence of blocks of spans.

Reading can begin again at the position after any block. A source can be divided among processes: the blocks of parts
0 … N − 1, one part after another, are those of the whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

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

    def describe(self) -> dict[str, Any]:
        """What identifies this source and its current content, as JSON."""
        ...

    def blocks(self, position: Any = None, part: tuple[int, int] = (0, 1)) -> Iterator[Block]:
        """The blocks of part I of N from a position on.

        Raises:
            ValueError, OSError: something cannot be read; the error names it.
        """
        ...


@dataclass(frozen=True)
class Texts:
    """Texts in memory, by split; each is a document."""

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
