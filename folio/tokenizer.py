"""Text ⇄ token ids: one protocol, three tokenizers, each saved as a few words of JSON."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class Tokenizer(Protocol):
    """Ids are 0 … size − 1; ``eot`` ends a document where the tokenizer has such a token."""

    size: int
    eot: int | None

    def encode(self, text: str) -> NDArray[np.integer[Any]]:
        """Text → ids (n). Raises ValueError where a character has no id."""
        ...

    def bytes(self, ids: Iterable[int]) -> bytes:
        """Ids → UTF-8 bytes; a single id may be part of a character."""
        ...

    def to_json(self) -> dict[str, Any]:
        """What ``from_json`` makes this tokenizer from again."""
        ...


class Characters:
    """One id for each character of a fixed, sorted vocabulary, as nanoGPT's shakespeare_char."""

    eot: int | None = None

    def __init__(self, characters: str) -> None:
        self.characters = characters
        self.size = len(characters)
        self._ids = {c: i for i, c in enumerate(characters)}

    def encode(self, text: str) -> NDArray[np.integer[Any]]:
        if missing := sorted(set(text) - self._ids.keys()):
            raise ValueError(
                f"the vocabulary of {self.size} characters lacks {', '.join(map(repr, missing[:5]))}"
                f"{' …' if len(missing) > 5 else ''}: leave them out of the text"
            )
        return np.fromiter(map(self._ids.__getitem__, text), dtype=np.uint32, count=len(text))

    def bytes(self, ids: Iterable[int]) -> bytes:
        return "".join(self.characters[i] for i in ids).encode()

    def to_json(self) -> dict[str, Any]:
        return {"kind": "characters", "characters": self.characters}


class Bytes:
    """The 256 bytes of UTF-8 text, and nothing to learn or lack."""

    size: int = 256
    eot: int | None = None

    def encode(self, text: str) -> NDArray[np.integer[Any]]:
        return np.frombuffer(text.encode(), dtype=np.uint8)

    def bytes(self, ids: Iterable[int]) -> bytes:
        return bytes(ids)

    def to_json(self) -> dict[str, Any]:
        return {"kind": "bytes"}


class Tiktoken:
    """A byte-pair encoding by its name in tiktoken, such as gpt2.

    The name is loaded when it is first needed, since tiktoken fetches its tables from the network unless they
    are in its cache (TIKTOKEN_CACHE_DIR).
    """

    def __init__(self, name: str = "gpt2") -> None:
        import tiktoken

        try:
            self._encoding = tiktoken.get_encoding(name)
        except OSError as error:  # requests' errors are OSErrors
            raise FileNotFoundError(
                f"the tables of tokenizer {name!r} are not cached and could not be fetched "
                f"({type(error).__name__}): set TIKTOKEN_CACHE_DIR to a folder that holds them"
            ) from None
        self.name = name
        self.size = self._encoding.n_vocab
        self.eot: int | None = self._encoding.eot_token

    def encode(self, text: str) -> NDArray[np.integer[Any]]:
        return np.array(self._encoding.encode(text, allowed_special={"<|endoftext|>"}), dtype=np.uint32)

    def bytes(self, ids: Iterable[int]) -> bytes:
        return self._encoding.decode_bytes(list(ids))

    def to_json(self) -> dict[str, Any]:
        return {"kind": "tiktoken", "name": self.name}


def from_json(spec: dict[str, Any]) -> Tokenizer:
    """The tokenizer that ``to_json`` described. Raises ValueError for a kind that is not known."""
    match spec:
        case {"kind": "characters", "characters": str(characters)}:
            return Characters(characters)
        case {"kind": "bytes"}:
            return Bytes()
        case {"kind": "tiktoken", "name": str(name)}:
            return Tiktoken(name)
    raise ValueError(f"unknown tokenizer {str(spec)[:80]}: characters, bytes and tiktoken are known")


def decode(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """Ids → text; bytes that are no UTF-8 become U+FFFD."""
    return tokenizer.bytes(ids).decode("utf-8", errors="replace")


def printable(text: str) -> str:
    """Text with control characters but line ends and tabs replaced, so that a terminal only shows it."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def stream(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Text as it comes, one id after another, whole characters only."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for i in ids:
        yield decoder.decode(tokenizer.bytes([i]))
    yield decoder.decode(b"", final=True)
