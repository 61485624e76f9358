"""Vocabularies from files and of one's own, and where a text can be cut without changing its tokens."""

from __future__ import annotations

import io
import itertools
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex
from conftest import SMALL, SPELLINGS, STORY

from folio.data.decoding import decode, stream, text_size
from folio.data.tokenizers import (
    END_OF_TEXT,
    Bytes,
    Characters,
    Tiktoken,
    TokenizersFile,
    from_json,
    named,
)
from folio.files import decode_text
from folio.preparation import sources
from folio.preparation.documents import cut

tokenizers = pytest.importorskip("tokenizers")
models, pre, decoders = tokenizers.models, tokenizers.pre_tokenizers, tokenizers.decoders

WIDE = "The ferry – naïve, 渡し船, 🚢 – left.\n\ttwice  \r\n\x00\u0301 \U0010ffff"
EVERY = WIDE + "".join(map(chr, range(0x250)))


def words(decoder: Any = None, **more: Any) -> Any:
    """A tokenizer of whole words that a space marks, as those made from sentencepiece."""
    vocabulary = {w: i for i, w in enumerate(["[UNK]", "▁the", "▁ferry", "▁left", "s", "<0xE6>", "<0xB8>", "<0xA1>"])}
    made = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre.Metaspace(**more)
    made.decoder = decoder or decoders.Metaspace()
    return made


# Files of the library


def test_a_trained_vocabulary_is_one_of_the_library(tok) -> None:
    """Of the size that was asked for, with all bytes and an end of text; the library encodes with it as Folio does."""
    fast = tokenizers.Tokenizer.from_file(str(tok))
    assert fast.get_vocab_size() == 500
    ours = named(str(tok))
    assert (ours.size, ours.eot, ours.divisible) == (500, fast.token_to_id("<|endoftext|>"), True)
    for text in (STORY.read_text(encoding="utf-8"), EVERY, ""):
        assert ours.encode(text).tolist() == fast.encode(text).ids
    assert len(ours.encode("the ferry")) < len("the ferry")  # it learned something


def test_bytes_of_ids(tok) -> None:
    """A single id may be part of a character, and there is one for each byte."""
    ours = named(str(tok))
    assert {ours.bytes([i]) for i in range(ours.size)} >= {bytes([b]) for b in range(256)}
    for text in (EVERY, WIDE, "", " ", "é" * 50):
        ids = ours.encode(text)
        assert ids.dtype.kind == "u"
        assert ours.bytes(ids.tolist()) == b"".join(ours.bytes([i]) for i in ids.tolist()) == text.encode()
        assert "".join(stream(ours, ids.tolist())) == decode(ours, ids.tolist()) == text


def test_through_json(tok) -> None:
    ours = named(str(tok))
    again = from_json(json.loads(json.dumps(ours.to_json())))
    assert isinstance(again, TokenizersFile)
    assert (again.size, again.eot, again.divisible) == (ours.size, ours.eot, ours.divisible)
    assert again.to_json() == ours.to_json()
    assert np.array_equal(again.encode(EVERY), ours.encode(EVERY))


@pytest.mark.parametrize("name", END_OF_TEXT)
def test_special_tokens_are_text_in_a_text(tok, name) -> None:
    """And the token itself when that is asked for; in any order."""
    spec = json.loads(tok.read_text().replace("<|endoftext|>", name))
    ours = TokenizersFile(json.dumps(spec))
    assert ours.eot == 0
    for _ in range(2):
        plain = ours.encode(f"a{name}b").tolist()
        assert 0 not in plain
        assert ours.bytes(plain) == f"a{name}b".encode()
        special = ours.encode(f"a{name}b", special=True).tolist()
        assert special == [*ours.encode("a").tolist(), 0, *ours.encode("b").tolist()]
        assert ours.bytes(special) == f"a{name}b".encode()


def test_a_vocabulary_without_end_of_text() -> None:
    assert TokenizersFile(words().to_str()).eot is None


def test_truncation_padding_and_templates_are_left_out(tok) -> None:
    """What a file says of batches is not for a corpus."""
    fast = tokenizers.Tokenizer.from_file(str(tok))
    whole = fast.encode(WIDE).ids
    fast.enable_truncation(3)
    fast.enable_padding(length=5)
    fast.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    assert fast.encode(WIDE).ids != whole
    assert TokenizersFile(fast.to_str()).encode(WIDE).tolist() == whole


@pytest.mark.parametrize("kind", ["file", "bytes", "characters"])
def test_half_of_a_surrogate_pair_is_refused(tok, kind) -> None:
    made = {"file": lambda: named(str(tok)), "bytes": Bytes, "characters": lambda: Characters("ab")}[kind]()
    with pytest.raises(UnicodeEncodeError):
        made.encode("a\ud800b")


BYTE_FALLBACK = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]


@pytest.mark.parametrize(
    "fast",
    [
        pytest.param(words(), id="metaspace"),
        pytest.param(words(decoders.Sequence(BYTE_FALLBACK)), id="sentencepiece"),
        pytest.param(words(decoders.WordPiece()), id="wordpiece"),
    ],
)
def test_a_stream_is_the_text_of_its_ids(fast) -> None:
    """Also where what an id says depends on those before it."""
    ours = TokenizersFile(fast.to_str())
    for ids in ([1, 2, 3], [1, 2, 4, 3], [1, 1, 0, 2], [1, 5, 6, 7, 2], []):
        assert "".join(stream(ours, ids)) == decode(ours, ids) == fast.decode(ids)


@pytest.mark.parametrize("name", SPELLINGS)
def test_windows_have_the_bytes_of_the_whole(spelling, name) -> None:
    """Cut at any id, also within a character, a text has as many bytes in its windows as in one piece."""
    ours = named(str(spelling(name)))
    text = " ".join(STORY.read_text(encoding="utf-8").split())[:1500] + (" 渡し船 🚢 é" if name == "fallback" else "")
    ids = ours.encode(text)
    whole = text_size(ours, ids)
    assert whole == len(ours._fast.decode(ids.tolist()).encode())
    if name != "wordpiece":  # which puts spaces around hyphens
        assert whole == len(text.encode())
    for width in (1, 2, 3, 7, 100):
        rows = [ids[start : start + width + 1] for start in range(0, len(ids) - 1, width)]
        parts = [text_size(ours, row) - text_size(ours, row[:1]) for row in rows]
        assert sum(parts) == whole - text_size(ours, ids[:1])


@pytest.mark.parametrize("name", SPELLINGS)
def test_any_ids_are_the_librarys_text(spelling, name) -> None:
    """Words torn apart, special tokens, and one at a time as they are sampled."""
    ours, chance = named(str(spelling(name))), random.Random(name)
    lone = [i for i in range(ours.size) if ours._fast.id_to_token(i) in ours._lone]
    for count in (1, 2, 9, 80):
        ids = chance.choices([i for i in range(ours.size) if i not in lone[128:]], k=count)
        assert decode(ours, ids) == ours._fast.decode(ids, skip_special_tokens=False)
        assert "".join(stream(ours, ids)) == decode(ours, ids)


@pytest.mark.parametrize("name", SPELLINGS)
def test_what_is_no_text_has_no_bytes(spelling, name) -> None:
    """Special tokens, ids that no token has, and the space before a document, which only the tokenizer put there."""
    ours = named(str(spelling(name)))
    first, second = (ours.encode(text).tolist() for text in ("the ferry left", "and the ship"))
    padding = [ours.size, ours.size + 999, max(ours.special)]
    between = [] if ours.eot is None else [ours.eot]
    ids = np.array([*between, *first, *padding, *between, *second, *between, *between])
    sizes = [len("the ferry left"), len("and the ship") + (not between)]
    assert text_size(ours, ids) == sum(sizes)
    assert text_size(ours, ids[:0]) == 0
    assert text_size(ours, ids[:1]) == len(ours.bytes(first[:1])) * (not between)


def test_parts_of_characters_are_bytes(spelling) -> None:
    """Those of a vocabulary that falls back to bytes as well; as many documents as there are may be cut there."""
    ours = named(str(spelling("fallback")))
    ids = ours.encode("a 渡 b\0c 🚢").tolist()
    byte = ids[ids.index(ours._fast.token_to_id("<0xE6>"))]
    assert ours.bytes([byte]) == b"\xe6"
    assert ours.bytes(ids).decode() == "a 渡 b\0c 🚢"
    for place in range(1, len(ids)):
        assert len(ours.bytes(ids[:place])) <= len(ours.bytes(ids))
    assert "".join(stream(ours, ids)) == "a 渡 b\0c 🚢"
    assert decode(ours, [byte]) == "\ufffd"


@pytest.mark.parametrize("name", ["cl100k_base", "gpt2"])
def test_ids_between_tiktokens_have_no_text(gpt2, monkeypatch, name) -> None:
    """Some encodings leave ids out, which a padded model may still draw."""
    import tiktoken

    own = tiktoken.get_encoding("gpt2")
    sparse = tiktoken.Encoding(
        "sparse",
        pat_str=own._pat_str,
        mergeable_ranks=own._mergeable_ranks,
        special_tokens={"<|endoftext|>": 50_300, "<|more|>": 50_400},
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda _: sparse)
    ours = Tiktoken(name)
    ids = [*ours.encode("The ferry – 渡").tolist(), 50_256, 50_299, 50_399]
    assert ours.bytes(ids).decode() == "The ferry – 渡"
    assert text_size(ours, np.array([*ids, 50_300, 50_401, 10**9, 50_400, *ids])) == 2 * len("The ferry – 渡".encode())


def test_a_word_that_the_vocabulary_lacks() -> None:
    """With no token for the unknown it is an error that a user can read."""
    fast = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1}))
    fast.pre_tokenizer = pre.Whitespace()
    ours = TokenizersFile(fast.to_str())
    assert ours.encode("a b").tolist() == [0, 1]
    with pytest.raises(ValueError, match="UNK"):
        ours.encode("a c")


def test_a_pattern_that_takes_too_long() -> None:
    """The library panics, which is no Exception; it is a line of ours."""
    fast = words()
    fast.pre_tokenizer = pre.Split(tokenizers.Regex("(a+)+$"), "isolated")
    with pytest.raises(ValueError, match=r"the tokenizer cannot encode it: .*retry-limit"):
        TokenizersFile(fast.to_str()).encode("a" * 50 + "!")


NAMES = {
    "deep.json": ["deep.json", "recursion limit"],
    "large.json": ["large.json", "300,000,000 bytes, more than"],
    "pipe.json": ["pipe.json", "a pipe, not a file"],
    "zero.json": ["zero.json", "a device, not a file"],
    "nowhere.json": ["nowhere.json", "No such file", "folio tokenizer train"],
    "folder.json": ["folder.json", "a folder, not a file"],
    "empty.json": ["empty.json", "not a file of the tokenizers library"],
    "other.json": ["other.json", "not a file of the tokenizers library"],
    "binary.json": ["binary.json"],
    "gpt5": ["'gpt5'", "gpt2", "cl100k_base", "FILE.json"],
    "tok.bin": ["'tok.bin'", "FILE.json"],
}


@pytest.mark.parametrize("name", NAMES)
def test_a_tokenizer_that_is_none(folio, tmp_path, monkeypatch, name) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder.json").mkdir()
    for other, content in {"empty.json": b"", "other.json": b'{"vocab": 3}', "binary.json": b"\xff\xfe"}.items():
        Path(other).write_bytes(content)
    Path("deep.json").write_text('{"model": ' + '{"a":' * 10**5)
    Path("large.json").touch()
    os.truncate("large.json", 300_000_000)
    os.mkfifo("pipe.json")
    Path("zero.json").symlink_to("/dev/zero")
    code, _, err = folio("prepare", STORY, f"--tokenizer={name}", "--data_dir=out")
    assert (code, err.count("\n")) == (2, 1), err
    assert all(word in err for word in NAMES[name]), err
    assert not Path("out").exists()


def test_another_file_of_the_same_size_is_another_recipe(folio, tok, tmp_path) -> None:
    """A data set that one vocabulary made is not taken for that of another."""
    argv = ("prepare", STORY, f"--data_dir={tmp_path / 'out'}")
    assert folio(*argv, f"--tokenizer={tok}").code == 0
    (tmp_path / "a.txt").write_text(STORY.read_text(encoding="utf-8").upper(), encoding="utf-8")
    other = tmp_path / "other.json"
    assert folio("tokenizer", "train", tmp_path / "a.txt", "--vocab_size=500", f"--out={other}").code == 0
    assert named(str(other)).size == named(str(tok)).size
    code, _, err = folio(*argv, f"--tokenizer={other}")
    assert (code, err.count("\n")) == (2, 1), err
    assert "tokenizer" in err


def test_prepare_train_and_sample(folio, tok, tmp_path) -> None:
    """The data set and the checkpoint hold the vocabulary: nothing asks for its file again."""
    mine, out = tmp_path / "mine.json", tmp_path / "out"
    shutil.copy(tok, mine)
    assert folio("prepare", STORY, f"--tokenizer={mine}", f"--data_dir={tmp_path / 'data'}").code == 0
    mine.unlink()
    code, said, err = folio("train", *SMALL, f"--data_dir={tmp_path / 'data'}", f"--out_dir={out}", "--max_iters=2")
    assert (code, err) == (0, "")
    assert "vocab_size = 500" in said
    shutil.rmtree(tmp_path / "data")
    argv = ("sample", f"--out_dir={out}", "--device=cpu", "--start=The ferry", "--num_samples=2", "--max_new_tokens=9")
    code, said, err = folio(*argv)
    assert (code, err) == (0, "")
    assert said.count("The ferry") == 2
    assert len(said) > 2 * len("The ferry") + 20


@pytest.mark.parametrize("end", ["\r\n", "\r"])
def test_a_vocabulary_is_learnt_from_texts_as_they_are_prepared(folio, tmp_path, end) -> None:
    """With any line ends, and a byte order mark or none, the same merges."""
    for name, text in (("a", STORY.read_text(encoding="utf-8")), ("b", "\ufeff" + STORY.read_text(encoding="utf-8"))):
        (tmp_path / f"{name}.txt").write_bytes(text.replace("\n", "\n" if name == "a" else end).encode())
        argv = ("tokenizer", "train", tmp_path / f"{name}.txt", "--vocab_size=400", f"--out={tmp_path / name}.json")
        assert folio(*argv).code == 0
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


# Characters


def test_characters_are_places_in_the_vocabulary() -> None:
    """As a dictionary would find them, whatever planes they are of."""
    rng = random.Random(7)
    codes = [c for c in [*range(0x300), *range(0x4E00, 0x4F00), 0xFFFF, 0x10000, 0x1F6A2, 0x10FFFF] if c != 0x41]
    for count in (1, 2, 50, 300):
        vocabulary = "".join(sorted(map(chr, rng.sample(codes, count))))
        text = "".join(rng.choices(vocabulary, k=1000))
        made = Characters(vocabulary)
        ids = made.encode(text)
        assert ids.tolist() == [vocabulary.index(c) for c in text]
        assert made.bytes(ids.tolist()) == text.encode()
        for lacking in ("A", "\U000f0000"):
            with pytest.raises(ValueError, match=re.escape(f"{count} characters lacks {lacking!r}:")):
                made.encode(text + lacking)
    assert Characters("").encode("").tolist() == []
    with pytest.raises(ValueError, match="0 characters lacks 'A'"):
        Characters("").encode("A")


# Where a text can be cut

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
    """All the places at which a text may be cut; each at or after the place that was asked for."""
    raw = text.encode()
    found = {at: cut(io.BytesIO(raw), at, len(raw)) for at in range(len(raw) + 1)}
    assert all(at <= place for at, place in found.items())
    return sorted(set(found.values()) - {0, len(raw)})


def assert_divisible(encode: Callable[[str], list[Any]], text: str) -> None:
    """In two pieces, cut anywhere, and in as many as can be, a file of text has the tokens of the whole."""
    raw, places = text.encode(), cuts(text)
    whole = encode(decode_text(raw))
    for place in places:
        first, second = decode_text(raw[:place]), decode_text(raw[place:])
        assert encode(first) + encode(second) == whole, raw[place - 20 : place + 20]
    pieces = [decode_text(raw[a:b]) for a, b in itertools.pairwise([0, *places, len(raw)])]
    assert [token for piece in pieces for token in encode(piece)] == whole


def test_texts_are_cut_often_enough() -> None:
    """At most words, and at lines where there are no spaces."""
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
    """What tiktoken's own patterns split a text into, before any table is looked at; for all its encodings."""
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
        places = [cut(io.BytesIO(raw), at, len(raw)) for at in range(0, len(raw), 313)]
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
    """With any file, whether the program cuts the text or not."""
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
