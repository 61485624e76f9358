"""What a source of documents is: a sequence of blocks of spans.

A block can be named by its position, from which reading can begin again. A source can be divided among processes: the
parts 0 … N − 1, one after another, hold the blocks of the whole in their order.
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
    """What a worker reads at once, and the position (JSON) after it."""

    spans: Spans
    after: Any
    size: int  # bytes on disk that it stands for
    split: Split | None = None  # if the source decides it


class Piece(NamedTuple):
    """A span of a file and where it lies: bytes ``at`` … ``at + size`` on disk."""

    span: Span
    at: int
    size: int
    split: Split | None = None


class Source(Protocol):
    """What can be cut into blocks."""

    @property
    def size(self) -> int | None:
        """Bytes on disk, if known beforehand."""
        ...

    def describe(self) -> dict[str, Any]:
        """What identifies this source and its state, as JSON."""
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
