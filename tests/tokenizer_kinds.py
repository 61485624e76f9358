"""Every kind of tokenizer, small and trained on the committed text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import STORY

from folio import cli
from folio.commands import tokenizer as learn
from folio.data.tokenizers import Bytes, Characters, Tokenizer, named

WIDE = "The ferry – naïve, 渡し船, 🚢 – didn't  leave .\n\ttwice !  \U0010ffff it 's\n"
KINDS = {"characters": None, "bytes": 256, "gpt2": 50304, "file": 512}  # their vocab_size; None: the number of tokens


@pytest.fixture(scope="session")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of ``folio tokenizer train``, in a folder that did not exist."""
    out = tmp_path_factory.mktemp("tok") / "new" / "tok.json"
    argv = ["train", str(STORY), "--vocab_size=500", f"--out={out}"]
    learn.main(cli.parse(learn.Options, argv, "folio tokenizer", files=False))
    return out


SPELLINGS = ["metaspace", "fallback", "unigram", "wordpiece"]


@pytest.fixture(scope="session")
def spelling(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Files of tokenizers whose ids do not map to bytes, like those of sentencepiece and BERT."""
    tokenizers = pytest.importorskip("tokenizers")
    models, pre, decoders, trainers = (
        getattr(tokenizers, name) for name in ("models", "pre_tokenizers", "decoders", "trainers")
    )
    folder = tmp_path_factory.mktemp("spelling")

    def made(name: str) -> Path:
        path = folder / f"{name}.json"
        if path.exists():
            return path
        kinds = {"unigram": models.Unigram(), "wordpiece": models.WordPiece(unk_token="[UNK]")}
        fast = tokenizers.Tokenizer(kinds.get(name) or models.BPE(unk_token="<unk>", byte_fallback=name == "fallback"))
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"] if name == "wordpiece" else ["<unk>", "<s>", "</s>"]
        how = {"special_tokens": special, "show_progress": False, "vocab_size": 900}
        if name == "wordpiece":
            fast.normalizer = tokenizers.normalizers.BertNormalizer()
            fast.pre_tokenizer, fast.decoder = pre.BertPreTokenizer(), decoders.WordPiece()
            trainer = trainers.WordPieceTrainer(**how)
        elif name == "unigram":
            fast.pre_tokenizer, fast.decoder = pre.Metaspace(), decoders.Metaspace()
            trainer = trainers.UnigramTrainer(unk_token="<unk>", **how)
        else:
            fast.pre_tokenizer, fast.decoder = pre.Metaspace(), decoders.Metaspace()
            how["special_tokens"] += [f"<0x{b:02X}>" for b in range(256)] if name == "fallback" else []
            trainer = trainers.BpeTrainer(**how)
        fast.train([str(STORY)], trainer)
        spec = json.loads(fast.to_str())
        if name == "fallback":  # like Llama's file: byte tokens are not special, and the decoder joins them
            spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] in special[:3]]
            parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
            fast.decoder = decoders.Sequence(parts)
            spec["decoder"] = json.loads(fast.to_str())["decoder"]
        path.write_text(json.dumps(spec), encoding="utf-8")
        return path

    return made


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> tuple[Tokenizer, int]:
    """Each kind of tokenizer with a vocab_size, which is padded where that is usual."""
    makers: dict[str, Callable[[], Tokenizer]] = {
        "characters": lambda: Characters("".join(sorted(set(WIDE + STORY.read_text(encoding="utf-8"))))),
        "bytes": Bytes,
        "gpt2": lambda: request.getfixturevalue("gpt2"),
        "file": lambda: named(str(request.getfixturevalue("tok"))),
    }
    made = makers[request.param]()
    return made, KINDS[request.param] or made.size
