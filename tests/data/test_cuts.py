"""A text that is cut has the ids of the whole text."""

from __future__ import annotations

import io
import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex
from conftest import STORY
from vocabularies import pre, words

from folio.data.tokenizers import (
    named,
)
from folio.files import decode_text
from folio.preparation import sources
from folio.preparation.documents import find_cut

tokenizers = pytest.importorskip("tokenizers")


TEXTS = {
    "prose": STORY.read_text(encoding="utf-8")[:2000],
    "wikitext": " = A Heading = \n \n The <unk> ( 1 @,@ 234 , 5 @.@ 6 % ) 's end . \n \n = = Another = = \n" * 5,
    "code": Path(__file__).read_text(encoding="utf-8")[:1500] + "\tif a//b:\n\t\treturn\n/* c */\n// d\n/\n/e\n",
    "blank lines": "one\n\ntwo\n\n\nthree.\n\n\n\n four\n \n \n\nfive,\n\n\tsix\n",
    "spaces and tabs": "a  b   c    d \t e\t\tf \t \t\tg      \n   h\t\n\ti  .  !   ",
    "no spaces": "渡し船は左へ。二度と来ない、と彼は言った！" * 20 + "\n" + "渡し船" * 50,
    "emoji": "🚢🚢 👩‍👩‍👧‍👦 ❤️ \n👍🏽\n\n🇯🇵 🇯🇵🇯🇵 e\u0301 \u0301 x\u200b y",
    "mixed line ends": "one\r\ntwo\nthree\rfour\r\n\r\nfive\n\rsix \r\n seven.\r\n\neight!\n",
    "no line ends": "It's 12345 o'clock, they'll say; WE'RE 'LATE'... (1,000,000.00) don't" * 10,
    "other spaces": "a\x1cb\x1d c\x1f\nd\x85e\xa0f\u2028g\u2029 h\u3000i\n\u3000j\u2003 k\x0bl\x0c\nm\u180e n",
}
_rng = random.Random(3)


TEXTS |= {
    f"chance {n}": "".join(
        _rng.choices(["a", "É", "'s", "'LL", "9", ".", "/", "渡", "\u0301", *" \n\r\t\x85\x1c"], k=300)
    )
    for n in range(8)
}


def cuts(text: str) -> list[int]:
    """All places at which a text may be cut. Each is at or after the requested place."""
    raw = text.encode()
    found = {at: find_cut(io.BytesIO(raw), at, len(raw)) for at in range(len(raw) + 1)}
    assert all(at <= place for at, place in found.items())
    return sorted(set(found.values()) - {0, len(raw)})


def assert_divisible(encode: Callable[[str], list[Any]], text: str) -> None:
    """Two pieces, cut at any place, and the largest number of pieces have the tokens of the whole text."""
    raw, places = text.encode(), cuts(text)
    whole = encode(decode_text(raw))
    for place in places:
        first, second = decode_text(raw[:place]), decode_text(raw[place:])
        assert encode(first) + encode(second) == whole, raw[place - 20 : place + 20]
    pieces = [decode_text(raw[a:b]) for a, b in itertools.pairwise([0, *places, len(raw)])]
    assert [token for piece in pieces for token in encode(piece)] == whole


def test_texts_are_cut_often_enough() -> None:
    """At most spaces, and at line ends in texts without spaces."""
    assert len(cuts(TEXTS["prose"])) > 250
    for end in ("\n", "\r\n", "\r"):
        text = TEXTS["no spaces"].replace("\n", end)
        assert len(text.partition(end)[0].encode()) + len(end) in cuts(text)
    assert cuts("渡し船" * 200) == []


@pytest.mark.parametrize("name", TEXTS)
def test_pieces_have_the_ids_of_gpt2(gpt2, name) -> None:
    assert_divisible(lambda text: gpt2.encode(text).tolist(), TEXTS[name])


@pytest.mark.parametrize("name", TEXTS)
def test_pieces_have_the_ids_of_a_file(tok, name) -> None:
    ours = named(str(tok))
    assert_divisible(lambda text: ours.encode(text).tolist(), TEXTS[name])


@pytest.mark.parametrize("encoding", ["r50k_base", "p50k_base", "cl100k_base", "o200k_base"])
def test_pieces_have_the_words_of_tiktokens_patterns(monkeypatch, encoding) -> None:
    """For all encodings of tiktoken, pieces are split into the same words by its pattern."""
    from tiktoken_ext import openai_public

    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: {})  # the tables are not needed
    patterns = {name: make()["pat_str"] for name, make in openai_public.ENCODING_CONSTRUCTORS.items() if name != "gpt2"}
    assert set(patterns.values()) == {patterns[n] for n in ("r50k_base", "p50k_base", "cl100k_base", "o200k_base")}
    pattern = regex.compile(patterns[encoding])
    for text in TEXTS.values():
        assert "".join(pattern.findall(text)) == text
        assert_divisible(pattern.findall, text)


@pytest.mark.slow
def test_a_real_corpus_in_pieces(gpt2, shared_data) -> None:
    """Shakespeare and Wikipedia, cut every few hundred bytes."""
    records = (shared_data / "wikitext2_valid.jsonl").read_text(encoding="utf-8").splitlines()
    for text in ((shared_data / "tinyshakespeare.txt").read_text(), "\n".join(json.loads(r)["text"] for r in records)):
        raw = text.encode()
        places = [find_cut(io.BytesIO(raw), at, len(raw)) for at in range(0, len(raw), 313)]
        pieces = [raw[a:b].decode() for a, b in itertools.pairwise([*places, len(raw)])]
        assert len(pieces) > 3000
        assert np.array_equal(np.concatenate([gpt2.encode(piece) for piece in pieces]), gpt2.encode(text))


def _added(tok: Path) -> str:
    fast = tokenizers.Tokenizer.from_file(str(tok))
    fast.add_tokens(["the ferry", "\n\n"])
    return fast.to_str()


def _normalized(tok: Path) -> str:
    fast = tokenizers.Tokenizer.from_file(str(tok))
    fast.normalizer = tokenizers.normalizers.Replace("ferry", "the ferry")
    return fast.to_str()


def _prefixed(tok: Path) -> str:
    fast = tokenizers.Tokenizer.from_file(str(tok))
    fast.pre_tokenizer = pre.ByteLevel(add_prefix_space=True)
    return fast.to_str()


def _whole(tok: Path) -> str:
    fast = tokenizers.Tokenizer.from_file(str(tok))
    fast.pre_tokenizer = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    return fast.to_str()


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(_added, id="a token with a space"),
        pytest.param(_normalized, id="a normalizer"),
        pytest.param(_prefixed, id="a space before each text"),
        pytest.param(_whole, id="no words"),
        pytest.param(lambda _: words().to_str(), id="metaspace"),
        pytest.param(lambda tok: tok.read_text(), id="byte-level"),
    ],
)
def test_a_large_text_has_the_ids_of_the_whole(folio, tok, tmp_path, monkeypatch, make) -> None:
    """With any tokenizer file, whether Folio cuts the text or not."""
    (tmp_path / "any.json").write_text(make(tok), encoding="utf-8")
    text = "the ferry left\nthe ferry.\n\nthe ferry left the  ferry\n" * 40
    (tmp_path / "text").mkdir()
    for n, content in enumerate(("the ferry", text)):
        (tmp_path / "text" / f"{n}.txt").write_text(content)
    monkeypatch.setattr(sources, "BLOCK", 50)
    out = tmp_path / "out"
    argv = ("prepare", tmp_path / "text", f"--tokenizer={tmp_path / 'any.json'}", f"--data_dir={out}")
    assert folio(*argv, "--val_documents=1").code == 0
    fast = tokenizers.Tokenizer.from_file(str(tmp_path / "any.json"))
    end = [fast.token_to_id("<|endoftext|>")] if fast.token_to_id("<|endoftext|>") is not None else []
    assert np.fromfile(out / "train.bin", np.uint16).tolist() == fast.encode(text).ids + end


@pytest.mark.parametrize(("character", "before"), [("a", 0), ("é", 1), ("\r\n", 1), ("\n", 0)])
def test_a_text_without_a_place_to_cut(character: str, before: int) -> None:
    """It is cut between any characters, but not within one or within a line end, so that it is never read whole."""
    raw = (character * 2**20).encode() * 3
    at = 2**19 + before
    place = find_cut(io.BytesIO(raw), at, len(raw))
    assert at <= place <= at + 1
    assert raw[:place].decode() + raw[place:].decode() == raw.decode()
    assert not (raw[:place].endswith(b"\r") and raw[place:].startswith(b"\n"))
    assert find_cut(io.BytesIO(raw), len(raw) - 2**19, len(raw)) == len(raw)
