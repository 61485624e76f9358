"""``fast`` gives a tokenizer of the tokenizers library with the same ids and text."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

import pytest
from conftest import STORY

from folio.data.decoding import decode
from folio.data.tokenizers import Bytes, Characters, Tiktoken, Tokenizer, named

tokenizers = pytest.importorskip("tokenizers")

BPE = "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"  # vocab.bpe, as tiktoken's cache names it
WIDE = "The ferry – naïve, 渡し船, 🚢 – didn't  leave .\n\ttwice  \r\n\x00\u0301 \U0010ffff 1234567 \n"
EVERY = WIDE + "".join(map(chr, range(0x250)))
KINDS = ("characters", "bytes", "gpt2", "file")


@pytest.fixture
def kind(request: pytest.FixtureRequest) -> Tokenizer:
    makers: dict[str, Callable[[], Tokenizer]] = {
        "characters": lambda: Characters("".join(sorted(set(EVERY)))),
        "bytes": Bytes,
        "gpt2": lambda: request.getfixturevalue("gpt2"),
        "file": lambda: named(str(request.getfixturevalue("tok"))),
    }
    return makers[request.param]()


def through_a_file(ours: Tokenizer) -> tokenizers.Tokenizer:
    """The tokenizer as another program reads it."""
    return tokenizers.Tokenizer.from_str(ours.fast().to_str())


@pytest.mark.parametrize("kind", KINDS, indirect=True)
def test_the_same_ids_and_text(kind) -> None:
    """The whole text, and random pieces; the sizes are the same too."""
    fast = through_a_file(kind)
    assert fast.get_vocab_size() == kind.size
    rng = random.Random(5)
    texts = ["", " ", "\n", WIDE, EVERY, *("".join(rng.choices(WIDE, k=rng.randrange(40))) for _ in range(200))]
    for text in texts:
        ids = fast.encode(text).ids
        assert ids == kind.encode(text).tolist(), text
        assert fast.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("kind", KINDS, indirect=True)
def test_any_ids_are_the_same_text(kind) -> None:
    """Random ids, as a model may sample: half a character, or an end-of-text."""
    fast = through_a_file(kind)
    rng = random.Random(6)
    for _ in range(200):
        ids = rng.choices(range(kind.size), k=rng.randrange(1, 20))
        assert fast.decode(ids, skip_special_tokens=False) == decode(kind, ids)


@pytest.mark.parametrize("kind", ["gpt2", "file"], indirect=True)
def test_the_end_of_text_is_special(kind) -> None:
    fast, end = through_a_file(kind), "<|endoftext|>"
    assert fast.token_to_id(end) == kind.eot
    assert fast.get_added_tokens_decoder()[kind.eot].special
    text = f"a\n{end} b {end}{end}"
    assert fast.encode(text).ids == kind.encode(text, special=True).tolist()
    assert fast.decode(fast.encode(text).ids) == "a\n b "


def test_a_character_outside_the_vocabulary() -> None:
    """It is refused, as by Folio, and not left out."""
    with pytest.raises(Exception, match="UNK"):  # the library raises plain Exceptions
        Characters("ab").fast().encode("abc")


# GPT-2's


def test_the_merges_are_openais(gpt2, shared_data) -> None:
    """All 50,000, in the order of vocab.bpe; the ids are those of encoder.json."""
    model = json.loads(gpt2.fast().to_str())["model"]
    lines = (shared_data / "tiktoken" / BPE).read_text(encoding="utf-8").splitlines()[1:]
    assert [" ".join(merge) for merge in model["merges"]] == lines
    assert len(lines) == 50_000
    assert gpt2.eot == model["vocab"]["<|endoftext|>"] == 50256
    (encoder,) = (p for p in (shared_data / "tiktoken").iterdir() if p.name != BPE)
    assert model["vocab"] == json.loads(encoder.read_text(encoding="utf-8"))


def test_real_documents(gpt2, shared_data) -> None:
    fast = through_a_file(gpt2)
    records = (shared_data / "wikitext2_valid.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(record)["text"] for record in records[:20]]
    assert sum(map(len, texts)) > 100_000
    for text, found in zip(texts, fast.encode_batch(texts), strict=True):
        assert found.ids == gpt2.encode(text).tolist()


@pytest.mark.parametrize("encoding", ["r50k_base", "cl100k_base", "o200k_base"])
def test_other_patterns_of_tiktoken(gpt2, monkeypatch, encoding) -> None:
    """Words are split as by tiktoken; the tables here are GPT-2's."""
    from tiktoken import registry
    from tiktoken_ext import openai_public

    ranks = gpt2._encoding._mergeable_ranks
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: ranks)
    monkeypatch.setattr(registry, "ENCODINGS", {})
    ours = Tiktoken(encoding)
    fast = through_a_file(ours)
    for text in (EVERY, STORY.read_text(encoding="utf-8")[:3000], "I'LL  \n\n a//b\r\n /x\n", "12 1234 1234567"):
        assert fast.encode(text).ids == ours.encode(text).tolist()
