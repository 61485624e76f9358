"""Text ⇄ token ids: one protocol and four tokenizers, which are saved as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from folio.errors import UserError, first_line
from folio.files import parse_json, read_text

if TYPE_CHECKING:
    import tokenizers

Ids = NDArray[np.integer[Any]]
_LARGEST_FILE = 1 << 28  # bytes
_MOST_IDS = 1 << 22  # tokens of a vocabulary
IDS_ONLY = {"kind": "ids"}  # instead of a tokenizer, where only the number of ids is known
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")


class Tokenizer(Protocol):
    """Ids are 0 … size − 1. ``eot`` is the end-of-text token that separates documents, if there is one.

    ``special`` are the ids of special tokens, which have no text; ``eot`` is one. ``divisible``: a text that is cut at
    places from ``folio.preparation.documents.find_cut`` has the same ids in parts as in one piece.
    """

    size: int
    eot: int | None
    special: Collection[int]
    divisible: bool

    def encode(self, text: str, *, special: bool = False) -> Ids:
        """Text → ids (n). ``special``: the name of a special token in the text becomes that token.

        Raises:
            ValueError: a character has no id. UnicodeEncodeError: a character is half of a surrogate pair.
        """
        ...

    def bytes(self, ids: Iterable[int]) -> bytes:
        """Ids → UTF-8 bytes. One id may be part of a character; an id below ``size`` without a token gives no bytes."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Ids → text; bytes that are not UTF-8 become U+FFFD."""
        return self.bytes([int(i) for i in ids]).decode("utf-8", errors="replace")

    def to_json(self) -> dict[str, Any]:
        """A description from which ``from_json`` makes the same tokenizer."""
        ...

    def fast(self) -> tokenizers.Tokenizer:
        """An equivalent tokenizer of Hugging Face's tokenizers library."""
        ...


class MissingCharactersError(UserError):
    """A text has characters that the vocabulary lacks; ``lack`` names them, without a remedy."""

    @property
    def lack(self) -> str:
        return str(self.args[0])

    def __str__(self) -> str:
        return f"{self.lack}: remove such characters from the text"


class Characters(Tokenizer):
    """One id for each character of a fixed, sorted vocabulary, as nanoGPT's shakespeare_char."""

    eot: int | None = None
    special: Collection[int] = ()
    divisible = True

    def __init__(self, characters: str) -> None:
        self.characters = characters
        self.size = len(characters)
        codes = _codes(characters)
        self._ids = np.full(int(codes.max(initial=0)) + 2, -1, dtype=np.int32)  # the last one is for all higher codes
        self._ids[codes] = np.arange(self.size)

    def encode(self, text: str, *, special: bool = False) -> Ids:
        codes = _codes(text)
        ids = self._ids[np.minimum(codes, len(self._ids) - 1)]
        if (ids < 0).any():
            missing = sorted(set(text) - set(self.characters))
            raise MissingCharactersError(
                f"the vocabulary of {self.size} characters lacks {', '.join(map(repr, missing[:5]))}"
                f"{' …' if len(missing) > 5 else ''}"
            )
        return ids

    def bytes(self, ids: Iterable[int]) -> bytes:
        return "".join(self.characters[i] for i in ids).encode()

    def to_json(self) -> dict[str, Any]:
        return {"kind": "characters", "characters": self.characters}

    def fast(self) -> tokenizers.Tokenizer:
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

        fast = Tokenizer(models.WordLevel({c: i for i, c in enumerate(self.characters)}))
        fast.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        fast.decoder = decoders.Fuse()
        return fast


def _codes(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le"), dtype="<u4")


class Bytes(Tokenizer):
    """The 256 bytes of UTF-8 text."""

    size: int = 256
    eot: int | None = None
    special: Collection[int] = ()
    divisible = True

    def encode(self, text: str, *, special: bool = False) -> Ids:
        return np.frombuffer(text.encode(), dtype=np.uint8)

    def bytes(self, ids: Iterable[int]) -> bytes:
        return bytes(ids)

    def to_json(self) -> dict[str, Any]:
        return {"kind": "bytes"}

    def fast(self) -> tokenizers.Tokenizer:
        return _by_bytes({c: b for b, c in byte_characters().items()}, [], pattern=None)


class Tiktoken(Tokenizer):
    """A byte-pair encoding by its name in tiktoken, such as gpt2.

    tiktoken fetches its tables from the network unless they are in its cache (TIKTOKEN_CACHE_DIR).

    Raises:
        ValueError: no encoding of that name.
        FileNotFoundError: its tables are not cached and could not be fetched.
    """

    divisible = True  # all its patterns end a token before a space, and look no further ahead

    def __init__(self, name: str = "gpt2") -> None:
        import tiktoken

        try:
            self._encoding = tiktoken.get_encoding(name)
        except ValueError:
            raise UserError(
                f"no tokenizer {name!r}: char, bytes, a file of the tokenizers library (FILE.json), or an encoding of "
                f"tiktoken: {', '.join(tiktoken.list_encoding_names())}"
            ) from None
        except OSError as error:  # requests' errors are OSErrors
            raise FileNotFoundError(
                f"the tables of tokenizer {name!r} are not cached and could not be fetched "
                f"({type(error).__name__}): set TIKTOKEN_CACHE_DIR to a folder that holds them; "
                "folio prepare --tokenizer=bytes needs none"
            ) from None
        self.name = name
        self.size = self._encoding.n_vocab
        self.special: Collection[int] = frozenset(self._encoding._special_tokens.values())
        self._special = {"<|endoftext|>"} & self._encoding.special_tokens_set
        self.eot: int | None = self._encoding.eot_token if self._special else None

    def encode(self, text: str, *, special: bool = False) -> Ids:
        return self._encoding.encode_to_numpy(
            text, allowed_special=self._special if special else set(), disallowed_special=()
        )

    def bytes(self, ids: Iterable[int]) -> bytes:
        ids = list(ids)
        try:
            return self._encoding.decode_bytes(ids)
        except KeyError:  # an id has no token
            tokens = {*self._encoding._mergeable_ranks.values(), *self.special}
            return self._encoding.decode_bytes([i for i in ids if i in tokens or i >= self.size])

    def to_json(self) -> dict[str, Any]:
        return {"kind": "tiktoken", "name": self.name}

    def fast(self) -> tokenizers.Tokenizer:
        from tokenizers import AddedToken

        characters = byte_characters()
        ranks = self._encoding._mergeable_ranks
        shown = {token: "".join(characters[b] for b in token) for token in ranks}
        merges = [(shown[a], shown[b]) for a, b in _merges(ranks)]
        pattern = "" if self.name == "gpt2" else self._encoding._pat_str
        # a + after {1,3} makes it possessive in tiktoken, but repeats it again in the library
        pattern = re.sub(r"(\{\d+,\d+\})\+", r"\1", pattern)
        special = self._encoding._special_tokens
        fast = _by_bytes({shown[token]: rank for token, rank in ranks.items()} | special, merges, pattern)
        fast.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
        return fast


class TokenizersFile(Tokenizer):
    """A tokenizer of Hugging Face's tokenizers library, from the text of its ``tokenizer.json``.

    Raises:
        ValueError: the library cannot read the text.
    """

    def __init__(self, text: str) -> None:
        import tokenizers

        with _refused("not a file of the tokenizers library"):
            spec = parse_json(text)
            self._fast = tokenizers.Tokenizer.from_str(text)  # which also takes lists for objects
            pattern, decoder = dict(spec.get("pre_tokenizer") or {}), dict(spec.get("decoder") or {})
            added = [(token["id"], token["special"]) for token in spec.get("added_tokens") or []]
            kinds = [part.get("type") for part in decoder.get("decoders", [decoder])]
        self._fast.no_truncation()
        self._fast.no_padding()
        self._text = text
        self.size = max(self._fast.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if self.size > _MOST_IDS:
            raise UserError(f"it has the token id {self.size - 1:,}, above the {_MOST_IDS:,} of any tokenizer")
        found = (self._fast.token_to_id(name) for name in END_OF_TEXT)
        self.eot: int | None = next((i for i in found if i is not None), None)
        gpt2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
        found_anywhere = not all(special for _, special in added)  # these tokens match across spaces too
        self.divisible = not (spec.get("normalizer") or found_anywhere) and gpt2.items() <= pattern.items()
        self.special: Collection[int] = frozenset(i for i, special in added if special)
        self.by_bytes = kinds == ["ByteLevel"]
        self._bytes = {c: b for b, c in byte_characters().items()}
        self._lone = {f"<0x{b:02X}>": b for b in range(256)} if "ByteFallback" in kinds else {}

    def encode(self, text: str, *, special: bool = False) -> Ids:
        text.encode()  # raises for half of a surrogate pair, for which the library raises a TypeError
        self._fast.encode_special_tokens = not special  # True: they are encoded as text
        with _refused("the tokenizer cannot encode it"):
            return np.array(self._fast.encode(text, add_special_tokens=False).ids, dtype=np.uint32)

    def bytes(self, ids: Iterable[int]) -> bytes:
        pieces = [piece for i in ids if (piece := self._fast.id_to_token(i)) is not None]
        if self.by_bytes:
            return b"".join(
                bytes(self._bytes[c] for c in piece) if self._bytes.keys() >= set(piece) else piece.encode()
                for piece in pieces
            )
        if self._fast.decoder is None:
            return " ".join(pieces).encode()
        with _refused("the tokenizer cannot decode it"):
            return self._decoded(self._fast.decoder, pieces)

    def _decoded(self, decoder: Any, pieces: list[str]) -> Any:
        lone = [self._lone[piece] for piece in pieces if piece in self._lone]
        text: str = decoder.decode(["<0x00>" if piece in self._lone else piece for piece in pieces])
        between = text.encode().split(b"\0")  # the library's decoder replaces parts of characters
        if len(between) != len(lone) + 1:
            whole: str = decoder.decode(pieces)
            return whole.encode()
        return between[0] + b"".join(bytes([byte]) + rest for byte, rest in zip(lone, between[1:], strict=True))

    def to_json(self) -> dict[str, Any]:
        return {"kind": "tokenizers", "file": json.loads(self._text)}

    def fast(self) -> tokenizers.Tokenizer:
        import tokenizers

        return tokenizers.Tokenizer.from_str(self._text)


@contextmanager
def _refused(what: str) -> Iterator[None]:
    """Raises ValueError instead of the tokenizers library's plain Exceptions and its panics, as from a slow pattern."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise UserError(f"{what}: {first_line(error)[:200]}") from None
        raise


def byte_characters() -> dict[int, str]:
    """The printable character that stands for each byte in byte-level vocabularies (GPT-2's encoder.py)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (b for b in range(256) if b not in plain)
    return {b: chr(b) for b in plain} | {b: chr(0x100 + i) for i, b in enumerate(others)}


def _by_bytes(vocab: dict[str, int], merges: list[tuple[str, str]], pattern: str | None) -> tokenizers.Tokenizer:
    """BPE over UTF-8 bytes, within the words that ``pattern`` matches; "": GPT-2's pattern, None: the whole text."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    fast = Tokenizer(models.BPE(vocab, merges))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern == "")
    words = [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
    fast.pre_tokenizer = pre_tokenizers.Sequence([*words, level]) if words else level
    fast.decoder = decoders.ByteLevel()
    return fast


def _merges(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """For each token of several bytes, in order of rank, the two tokens of lower rank from which it was merged."""
    for token in sorted(ranks, key=ranks.__getitem__):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks)))
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:
            yield parts[0], parts[1]


def named(name: str) -> Tokenizer:
    """The tokenizer of a name: "bytes", a tiktoken encoding, or a file of the tokenizers library.

    Raises:
        ValueError, FileNotFoundError: there is none of that name; the error lists the names.
    """
    if name == "bytes":
        return Bytes()
    if not name.endswith(".json"):
        return Tiktoken(name)
    try:
        return TokenizersFile(read_text(Path(name), _LARGEST_FILE).removeprefix("\ufeff"))
    except OSError as error:
        raise FileNotFoundError(f"tokenizer {name}: {error.strerror}: folio tokenizer train makes one") from None
    except ValueError as error:
        raise UserError(f"tokenizer {name}: {error}") from None


def from_json(spec: dict[str, Any]) -> Tokenizer:
    """The tokenizer that ``to_json`` described. Raises ValueError if its kind is unknown."""
    match spec:
        case {"kind": "characters", "characters": str(characters)}:
            return Characters(characters)
        case {"kind": "bytes"}:
            return Bytes()
        case {"kind": "tiktoken", "name": str(name)}:
            return Tiktoken(name)
        case {"kind": "tokenizers", "file": dict(file)}:
            return TokenizersFile(json.dumps(file))
        case {"kind": "ids"}:
            raise UserError(
                "nothing says what the token ids mean: the meta.pkl of the data does not have a character for each, so "
                "they cannot be decoded"
            )
    raise UserError(f"unknown tokenizer {str(spec)[:80]}: characters, bytes, tiktoken and tokenizers are known")


def dtype_for(size: int) -> np.dtype[Any]:
    """The dtype of token files whose ids are below ``size``."""
    return np.dtype(np.uint16 if size <= 2**16 else np.uint32)
