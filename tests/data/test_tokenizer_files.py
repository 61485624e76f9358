"""Files of the tokenizers library, and characters: the same ids and bytes as theirs."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL, STORY, make_pipe
from tokenizer_kinds import SPELLINGS
from vocabularies import decoders, models, pre, words

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

tokenizers = pytest.importorskip("tokenizers")


WIDE = "The ferry – naïve, 渡し船, 🚢 – left.\n\ttwice  \r\n\x00\u0301 \U0010ffff"
EVERY = WIDE + "".join(map(chr, range(0x250)))


def test_a_trained_vocabulary_is_one_of_the_library(tok) -> None:
    """It has the requested size, all bytes and an end-of-text; the library gives the same ids as Folio."""
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
    """With ``special`` they are tokens. Calls with and without do not affect each other."""
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
    """A file's settings for batches do not apply to a corpus."""
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
    """Also if the text of an id depends on the ids before it."""
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
    """Random ids, special tokens included; decoded at once and as a stream."""
    ours, chance = named(str(spelling(name))), random.Random(name)
    lone = [i for i in range(ours.size) if ours._fast.id_to_token(i) in ours._lone]
    for count in (1, 2, 9, 80):
        ids = chance.choices([i for i in range(ours.size) if i not in lone[128:]], k=count)
        assert decode(ours, ids) == ours._fast.decode(ids, skip_special_tokens=False)
        assert "".join(stream(ours, ids)) == decode(ours, ids)


@pytest.mark.parametrize("name", SPELLINGS)
def test_special_and_unused_ids_have_no_text(spelling, name) -> None:
    """Special tokens, ids without a token, and the space that the tokenizer puts before a document."""
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
    """Also with byte fallback. A text may be cut within a character."""
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
    """Some encodings skip ids, which a model with a padded vocabulary may still sample."""
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
    """Without an unknown token it is a UserError."""
    fast = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1}))
    fast.pre_tokenizer = pre.Whitespace()
    ours = TokenizersFile(fast.to_str())
    assert ours.encode("a b").tolist() == [0, 1]
    with pytest.raises(ValueError, match="UNK"):
        ours.encode("a c")


def test_a_pattern_that_takes_too_long() -> None:
    """The library panics, which is not an Exception; it becomes a UserError."""
    fast = words()
    fast.pre_tokenizer = pre.Split(tokenizers.Regex("(a+)+$"), "isolated")
    with pytest.raises(ValueError, match=r"the tokenizer cannot encode it: .*retry-limit"):
        TokenizersFile(fast.to_str()).encode("a" * 50 + "!")


NAMES = {
    "deep.json": ["deep.json", "nested too deeply"],
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
def test_names_that_are_no_tokenizer(folio, tmp_path, monkeypatch, name) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder.json").mkdir()
    for other, content in {"empty.json": b"", "other.json": b'{"vocab": 3}', "binary.json": b"\xff\xfe"}.items():
        Path(other).write_bytes(content)
    Path("deep.json").write_text('{"model": ' + '{"a":' * 10**5)
    Path("large.json").touch()
    os.truncate("large.json", 300_000_000)
    make_pipe("pipe.json")
    Path("zero.json").symlink_to("/dev/zero")
    code, _, err = folio("prepare", STORY, f"--tokenizer={name}", "--data_dir=out")
    assert (code, err.count("\n")) == (2, 1), err
    assert all(word in err for word in NAMES[name]), err
    assert not Path("out").exists()


def test_another_file_of_the_same_size_is_another_recipe(folio, tok, tmp_path) -> None:
    """A data set of one vocabulary is not finished for another one."""
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
    """The data set and the checkpoint contain the vocabulary, so its file may be removed."""
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
def test_a_vocabulary_is_learned_from_texts_as_they_are_prepared(folio, tmp_path, end) -> None:
    """With any line ends, and a byte order mark or none, the same merges."""
    for name, text in (("a", STORY.read_text(encoding="utf-8")), ("b", "\ufeff" + STORY.read_text(encoding="utf-8"))):
        (tmp_path / f"{name}.txt").write_bytes(text.replace("\n", "\n" if name == "a" else end).encode())
        argv = ("tokenizer", "train", tmp_path / f"{name}.txt", "--vocab_size=400", f"--out={tmp_path / name}.json")
        assert folio(*argv).code == 0
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


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
