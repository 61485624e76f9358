"""The tokenizer of a Hugging Face folder, from any of its files, gives the ids of transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import STORY, make_pipe
from tokenizer_kinds import WIDE

from folio.data import tokenizer_folder
from folio.data.decoding import decode
from folio.data.token_files import GPT2
from folio.data.tokenizers import Tokenizer, from_json

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

TEXTS = [WIDE, "Ære være: «blåbær» 42", " a  b\n\nc", "the <s> end</s> <extra> of<|endoftext|> it", "渡し船"]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vocab.json and merges.txt of another language, as the tokenizers library saves them."""
    folder = tmp_path_factory.mktemp("bpe")
    learned = tokenizers.ByteLevelBPETokenizer()
    learned.train([str(STORY)], vocab_size=600, special_tokens=["<s>", "</s>", "<|endoftext|>"], show_progress=False)
    learned.save_model(str(folder))
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "model"))


def read(folder: Path) -> Tokenizer:
    spec = tokenizer_folder.read(folder)
    assert spec is not None
    return from_json(spec)


def configured(folder: Path, name: str, **content: Any) -> Path:
    (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def assert_as(ours: Tokenizer, theirs: Any) -> None:
    for text in TEXTS:
        ids = ours.encode(text, special=True).tolist()
        assert ids == theirs(text, add_special_tokens=False)["input_ids"], text
        wanted = theirs.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert decode(ours, ids) == wanted


CONFIGS: dict[str, dict[str, dict[str, Any]]] = {
    "nothing besides": {},
    "special tokens": {"special_tokens_map": {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}}},
    "a config": {"tokenizer_config": {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": "</s>"}},
    "a space before": {"tokenizer_config": {"tokenizer_class": "GPT2TokenizerFast", "add_prefix_space": True}},
    "added tokens": {"added_tokens": {"<extra>": 600}},
    "tokens by id": {
        "tokenizer_config": {
            "tokenizer_class": "GPT2Tokenizer",
            "added_tokens_decoder": {
                "0": {"content": "<s>", "special": True, "lstrip": False, "rstrip": False, "normalized": False},
                "600": {"content": "<extra>", "special": True, "lstrip": True, "rstrip": False, "normalized": False},
            },
        }
    },
}


@pytest.mark.parametrize("files", CONFIGS.values(), ids=CONFIGS)
def test_byte_pairs(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    """vocab.json, merges.txt and the files of special tokens, as transformers' GPT2Tokenizer reads them."""
    for name, content in files.items():
        configured(folder, name, **content)
    ours = read(folder)
    assert_as(ours, transformers.GPT2Tokenizer.from_pretrained(folder))
    assert ours.size == 600 + ("<extra>" in str(files))
    assert ours.eot == ours.fast().token_to_id("<|endoftext|>")


@pytest.mark.parametrize("lower", [True, False])
def test_word_pieces(tmp_path: Path, lower: bool) -> None:
    """vocab.txt, as transformers' BertTokenizer reads it."""
    learned = tokenizers.BertWordPieceTokenizer(lowercase=lower)
    learned.train([str(STORY)], vocab_size=500, show_progress=False)
    learned.save_model(str(tmp_path))
    configured(tmp_path, "tokenizer_config", tokenizer_class="BertTokenizer", do_lower_case=lower)
    ours, theirs = read(tmp_path), transformers.BertTokenizer.from_pretrained(tmp_path)
    for text in (STORY.read_text(encoding="utf-8")[:3000], "Ære [MASK] 渡し船", WIDE):
        assert ours.encode(text, special=True).tolist() == theirs(text, add_special_tokens=False)["input_ids"]


def openai_s(folder: Path, shared_data: Path) -> Path:
    """Its own files, as tiktoken caches them."""
    folder.mkdir()
    for file in (shared_data / "tiktoken").iterdir():
        shutil.copy(file, folder / ("vocab.json" if file.read_bytes()[:1] == b"{" else "merges.txt"))
    return folder


def test_openai_s_own_files_are_gpt2(tmp_path: Path, shared_data: Path, gpt2: Tokenizer) -> None:
    folder = openai_s(tmp_path / "gpt2", shared_data)
    assert tokenizer_folder.read(folder) == GPT2
    configured(folder, "tokenizer_config", tokenizer_class="GPT2Tokenizer", model_max_length=1024)
    assert tokenizer_folder.read(folder) == GPT2
    configured(folder, "added_tokens", **{"<extra>": 50257})
    more = read(folder)  # not GPT-2's any more, but with the same ids for this text
    assert more.size == 50258
    assert more.encode(WIDE).tolist() == gpt2.encode(WIDE).tolist()


@pytest.mark.parametrize("change", ["an id", "a merge", "a space before"])
def test_what_only_resembles_gpt2_is_not(tmp_path: Path, shared_data: Path, change: str) -> None:
    """Two ids swapped, two merges swapped, or another way to split words."""
    folder = openai_s(tmp_path / "gpt2", shared_data)
    if change == "an id":
        vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
        (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    elif change == "a merge":
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        lines[5:7] = lines[6:4:-1]
        (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    else:
        configured(folder, "tokenizer_config", add_prefix_space=True)
    assert_as(read(folder), transformers.GPT2Tokenizer.from_pretrained(folder))


LACKS: dict[str, tuple[dict[str, str], list[str]]] = {
    "nothing": ({}, ["neither a tokenizer.json nor vocab.json and merges.txt"]),
    "SentencePiece": ({"spiece.model": "x"}, ["its spiece.model cannot be read", "AutoTokenizer"]),
    "half": ({"vocab.json": "{}"}, ["its vocab.json cannot be read"]),
    "the other half": ({"merges.txt": ""}, ["its merges.txt cannot be read"]),
    "another class": (
        {"vocab.json": "{}", "merges.txt": "", "tokenizer_config.json": '{"tokenizer_class": "CLIPTokenizer"}'},
        ["merges.txt and vocab.json, of a CLIPTokenizer, cannot be read"],
    ),
    "words of another class": (
        {"vocab.txt": "a", "tokenizer_config.json": '{"tokenizer_class": "JapaneseTokenizer"}'},
        ["vocab.txt, of a JapaneseTokenizer, cannot be read"],
    ),
}


@pytest.mark.parametrize("lack", LACKS)
def test_folders_without_a_readable_tokenizer(tmp_path: Path, lack: str) -> None:
    files, words = LACKS[lack]
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert tokenizer_folder.read(tmp_path) is None
    assert all(word in tokenizer_folder.lack(tmp_path) for word in words)


DAMAGES: dict[str, tuple[str, str, str]] = {
    "vocabulary no JSON": ("vocab.json", "{", "vocab.json cannot be read"),
    "vocabulary a list": ("vocab.json", "[]", "vocab.json: it is not a JSON object"),
    "vocabulary too deep": ("vocab.json", "[" * 100_000, "nested too deeply"),
    "an id no number": ("vocab.json", '{"a": "b"}', "vocab.json: the id of 'a' is not a whole number"),
    "an id below 0": ("vocab.json", '{"a": -1}', "vocab.json: the id of 'a' is not a whole number"),
    "not byte-level": ("vocab.json", '{"a</w>": 0}', "vocab.json is not byte-level, since it lacks 256"),
    "a merge of three": ("merges.txt", "a b c", "'a b c' is not a pair of tokens"),
    "merges not UTF-8": ("merges.txt", "", "merges.txt: not UTF-8"),
    "an added token far off": ("added_tokens.json", '{"<x>": 700}', "'<x>' has the id 700, and not the next one, 600"),
    "an added token in place of another": ("added_tokens.json", '{"<x>": 3}', "'<x>' has the id 3"),
    "a config no JSON": ("tokenizer_config.json", "{", "tokenizer_config.json cannot be read"),
    "tokens that are none": (
        "tokenizer_config.json",
        '{"added_tokens_decoder": {"0": 1}}',
        "entry that is not a token",
    ),
    "a superscript for an id": (
        "tokenizer_config.json",
        '{"added_tokens_decoder": {"²": {"content": "x"}}}',
        "not a token",
    ),
    "a list of tokens": ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "entry that is not a token"),
    "an added id no number": ("added_tokens.json", '{"<x>": "600", "<s>": 0}', "added_tokens.json: the id of '<x>' is"),
    "an added id a list": ("added_tokens.json", '{"<x>": [600]}', "added_tokens.json: the id of '<x>' is not"),
    "an id given twice": ("vocab.json", '{"a": 3, "b": 3}', "vocab.json: two of its 2 tokens have the same id"),
    "a tokenizer.json that is a list": ("tokenizer.json", "[]", "not a file of the tokenizers library"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files(folder: Path, damage: str) -> None:
    name, content, words = DAMAGES[damage]
    (folder / name).write_bytes(content.encode() or b"\xff\xfe")
    with pytest.raises(ValueError, match=words.replace("(", r"\(")) as error:
        tokenizer_folder.read(folder)
    assert str(error.value).startswith(str(folder))


def test_a_pipe_in_place_of_a_file(folder: Path) -> None:
    (folder / "merges.txt").unlink()
    make_pipe(folder / "merges.txt")
    with pytest.raises(ValueError, match=r"merges\.txt is a pipe"):
        tokenizer_folder.read(folder)
