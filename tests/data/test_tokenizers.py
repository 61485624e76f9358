"""Every tokenizer: text to ids and back, and through JSON."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from folio.data import decoding, tokenizers
from folio.data.tokenizers import Bytes, Characters, Tiktoken, Tokenizer
from folio.preparation.recipes import named_by_user

TEXT = "The ferry – naïve, 渡し船, 🚢 – left.\n\ttwice  \r\n"


@pytest.fixture(params=["characters", "bytes", "gpt2"])
def each(request: pytest.FixtureRequest) -> Tokenizer:
    """Each kind in turn."""
    if request.param == "gpt2":
        return request.getfixturevalue("gpt2")
    return Characters("".join(sorted(set(TEXT)))) if request.param == "characters" else Bytes()


def test_round_trip(each: Tokenizer) -> None:
    """Decoding gives the same text; ids are integers below the size."""
    ids = each.encode(TEXT)
    assert np.issubdtype(ids.dtype, np.integer)
    assert int(ids.max()) < each.size
    assert decoding.decode(each, ids.tolist()) == TEXT
    assert each.bytes(ids.tolist()) == TEXT.encode()
    assert len(each.encode("")) == 0


def test_json_round_trip(each: Tokenizer) -> None:
    """from_json makes the same tokenizer from to_json."""
    again = tokenizers.from_json(each.to_json())
    assert type(again) is type(each)
    assert (again.size, again.eot, again.to_json()) == (each.size, each.eot, each.to_json())
    assert np.array_equal(again.encode(TEXT), each.encode(TEXT))


def test_stream_holds_back_unfinished_characters(each: Tokenizer) -> None:
    """A character of several ids is yielded whole, and the pieces are the text."""
    pieces = list(decoding.stream(each, each.encode(TEXT).tolist()))
    assert "".join(pieces) == TEXT
    assert "\ufffd" not in "".join(pieces)
    assert pieces[0] == decoding.decode(each, each.encode(TEXT).tolist()[:1])  # at once, not at the end


def test_stream_of_bytes_by_hand() -> None:
    """A character of three bytes, an invalid byte, and a character that is cut off."""
    euro = "€".encode()
    assert list(decoding.stream(Bytes(), [*euro, 65])) == ["", "", "€", "A", ""]
    assert "".join(decoding.stream(Bytes(), [0xFF, 65, *euro[:2]])) == "\ufffdA\ufffd"


def test_unknown_characters_are_named() -> None:
    """The first five of them, and how many the vocabulary has."""
    with pytest.raises(ValueError, match=r"2 characters lacks 'c', 'd': remove such characters"):
        Characters("ab").encode("abdc")
    with pytest.raises(ValueError, match=r"lacks 'c', 'd', 'e', 'f', 'g' …"):
        Characters("ab").encode("gfedcbazyx")


def test_unknown_kinds_are_refused() -> None:
    """The error names the kind, and the known kinds."""
    with pytest.raises(ValueError, match=r"unknown tokenizer .*sentencepiece.*bytes, tiktoken and tokenizers"):
        tokenizers.from_json({"kind": "sentencepiece"})
    with pytest.raises(ValueError, match="unknown tokenizer"):
        tokenizers.from_json({"kind": "characters"})


def test_gpt2_is_gpt2(gpt2: Tiktoken) -> None:
    """50,257 ids, the last of which ends a document."""
    assert (gpt2.size, gpt2.eot) == (50257, 50256)
    assert gpt2.encode("Hello world").tolist() == [15496, 995]
    assert gpt2.encode("a<|endoftext|>", special=True).tolist() == [64, 50256]
    assert gpt2.encode("a<|endoftext|>").tolist() == [
        64,
        27,
        91,
        437,
        1659,
        5239,
        91,
        29,
    ]  # without ``special`` it is text


def test_gpt2_without_tables_or_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One error that names the remedy."""
    import tiktoken

    def unreachable(name: str) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
    with pytest.raises(FileNotFoundError, match=r"not cached .*TIKTOKEN_CACHE_DIR.* --tokenizer=bytes needs none"):
        Tiktoken("gpt2")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt: no such file"):  # said before the tables are sought
        named_by_user(["nowhere.txt"], "corpus")
