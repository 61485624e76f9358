"""Token ids → text: all at once, as a stream, or only the size of the text."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator

import numpy as np

from folio.data.tokenizers import Ids, Tokenizer, TokenizersFile


def decode(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """Ids → text; bytes that are not UTF-8 become U+FFFD."""
    return tokenizer.bytes(ids).decode("utf-8", errors="replace")


def text_size(tokenizer: Tokenizer, ids: Ids) -> int:
    """The bytes of text that consecutive ids (n) stand for.

    The ids of a document are decoded together: in a vocabulary that is not byte-level, the space between two words
    belongs to neither id. Special tokens, such as end-of-text, and ids without a token have no text.
    """
    starts = np.flatnonzero(ids == (-1 if tokenizer.eot is None else tokenizer.eot))
    kept = ~np.isin(ids, list(tokenizer.special)) & (ids < tokenizer.size)
    documents = zip(np.split(ids, starts), np.split(kept, starts), strict=True)
    return sum(len(tokenizer.bytes(document[here].tolist())) for document, here in documents)


def stream(tokenizer: Tokenizer, ids: Iterable[int], after: Iterable[int] = ()) -> Iterator[str]:
    """The text of each id, in whole characters, as ids arrive. ``after``: ids before the first, as context."""
    if isinstance(tokenizer, TokenizersFile) and not tokenizer.by_bytes:
        yield from _in_context(tokenizer, ids, list(after))
        return
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for i in ids:
        yield decoder.decode(tokenizer.bytes([i]))
    yield decoder.decode(b"", final=True)


def _in_context(tokenizer: Tokenizer, ids: Iterable[int], before: list[int]) -> Iterator[str]:
    """As ``stream``, for tokenizers whose text of an id depends on the ids before it (the space between words)."""
    fresh: list[int] = []
    for i in ids:
        fresh.append(i)
        text = decode(tokenizer, [*before, *fresh])
        if text.endswith("\ufffd"):
            yield ""
            continue
        yield text[len(decode(tokenizer, before)) :]
        before, fresh = fresh, []
    yield decode(tokenizer, [*before, *fresh])[len(decode(tokenizer, before)) :] if fresh else ""
