"""The tokenizer of a Hugging Face folder, as the JSON that ``folio.data.tokenizers.from_json`` reads.

``tokenizer.json`` is used as it is. Older folders have ``vocab.json`` and ``merges.txt`` (byte pairs over the bytes of
UTF-8, as GPT-2's) or ``vocab.txt`` (WordPiece, as BERT's), and small files that name the special tokens. Source:
transformers' ``GPT2Tokenizer`` and ``BertTokenizer``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from folio import files
from folio.data.token_files import GPT2
from folio.data.tokenizers import byte_characters
from folio.errors import UserError

FILES = (
    *("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt"),
    *("added_tokens.json", "special_tokens_map.json", "tokenizer_config.json"),
)
_GPT2 = "a57a62dc1129bcacabd1fdaf6bba1ecdb18d0c62b8bf410d55f50ce76a9a278c"  # digest of GPT-2's vocabulary and merges
_BYTE_LEVEL = ("GPT2", "Roberta", "Bart")  # classes that read vocab.json and merges.txt in the same way
_ROLES = ("unk_token", "bos_token", "eos_token", "pad_token", "sep_token", "cls_token", "mask_token")
_MOST = 2**26  # bytes that are read of a text file


def read(folder: Path) -> dict[str, Any] | None:
    """The folder's tokenizer, or None if it has none that can be read (``lack`` gives the reason).

    Raises:
        ValueError: a file is damaged; the error names it.
    """
    path = folder / "tokenizer.json"
    if path.exists():
        if not isinstance(spec := files.read_json(path), dict):
            raise UserError(f"{path}: not a file of the tokenizers library: it is not a JSON object")
        return {"kind": "tokenizers", "file": spec}
    config = _object(folder / "tokenizer_config.json")
    kind = _kind(config)
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists() and kind in ("", *_BYTE_LEVEL):
        return _byte_pairs(folder, config)
    if (folder / "vocab.txt").exists() and kind in ("", "Bert"):
        return {"kind": "tokenizers", "file": _word_pieces(folder, config)}
    return None


def lack(folder: Path) -> str:
    """The reason why a folder has no tokenizer that can be read."""
    kind = _kind(_object(folder / "tokenizer_config.json"))
    found = [p.name for p in sorted(folder.iterdir()) if p.suffix == ".model" or p.stem in ("vocab", "merges")]
    if not found:
        return "it has neither a tokenizer.json nor vocab.json and merges.txt"
    of = f", of a {kind}Tokenizer," if kind else ""
    return f"its {' and '.join(found[:3])}{of} cannot be read: transformers' AutoTokenizer saves them as tokenizer.json"


def _kind(config: dict[str, Any]) -> str:
    return str(config.get("tokenizer_class") or "").removesuffix("Fast").removesuffix("Tokenizer")


def _object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, or an empty one if there is no file."""
    if not path.exists():
        return {}
    if not isinstance(value := files.read_json(path), dict):
        raise UserError(f"{path}: it is not a JSON object")
    return value


def _lines(path: Path) -> list[str]:
    return files.read_text(path, _MOST).removesuffix("\n").split("\n")


def _byte_pairs(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer of ``vocab.json`` and ``merges.txt``: GPT-2's, or another byte-level BPE."""
    path = folder / "vocab.json"
    vocabulary = _object(path)
    if odd := [token for token, i in vocabulary.items() if type(i) is not int or not 0 <= i < 2**31]:
        raise UserError(f"{path}: the id of {odd[0][:80]!r} is not a whole number from 0 to 2**31 - 1")
    if len(set(vocabulary.values())) < len(vocabulary):
        raise UserError(f"{path}: two of its {len(vocabulary):,} tokens have the same id")
    if lacking := [c for c in byte_characters().values() if c not in vocabulary]:
        raise UserError(
            f"{path} is not byte-level, since it lacks {len(lacking)} of the 256 bytes, such as {lacking[0]!r}: "
            "put a tokenizer.json there"
        )
    merges = [line.rstrip("\r") for line in _lines(folder / "merges.txt")]
    merges = [line for line in merges if line and not line.startswith("#version")]
    if wrong := [line for line in merges if len(line.split(" ")) != 2]:
        raise UserError(f"{folder / 'merges.txt'}: {wrong[0][:80]!r} is not a pair of tokens")
    added = _added(folder, config, vocabulary, default="<|endoftext|>")
    prefix = bool(config.get("add_prefix_space", False))
    if not prefix and digest(vocabulary, merges) == _GPT2 and len(added) == 1:
        return GPT2
    level = {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": vocabulary, "merges": merges}
    return {"kind": "tokenizers", "file": _file(added, model, pre_tokenizer=level, decoder=level)}


def digest(vocabulary: dict[str, int], merges: list[str]) -> str:
    """A hash of all tokens and their ids, and of the merges in order."""
    content = json.dumps([sorted(vocabulary.items()), merges], ensure_ascii=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _word_pieces(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer of a ``vocab.txt`` with one token per line."""
    vocabulary = {token.rstrip("\r"): i for i, token in enumerate(_lines(folder / "vocab.txt"))}
    if "[UNK]" not in vocabulary:
        raise UserError(
            f"{folder / 'vocab.txt'} is not a WordPiece vocabulary, since it lacks [UNK]: put a tokenizer.json there"
        )
    normalizer = {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": bool(config.get("tokenize_chinese_chars", True)),
        "strip_accents": config.get("strip_accents"),
        "lowercase": bool(config.get("do_lower_case", True)),
    }
    model = {
        "type": "WordPiece",
        "unk_token": "[UNK]",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
        "vocab": vocabulary,
    }
    return _file(
        _added(folder, config, vocabulary, default="[UNK] [SEP] [PAD] [CLS] [MASK]"),
        model,
        normalizer=normalizer,
        pre_tokenizer={"type": "BertPreTokenizer"},
        decoder={"type": "WordPiece", "prefix": "##", "cleanup": True},
    )


def _file(added: list[dict[str, Any]], model: dict[str, Any], **parts: Any) -> dict[str, Any]:
    """The content of an equivalent ``tokenizer.json``."""
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    return {"version": "1.0", "added_tokens": added, **empty, **parts, "model": model}


def _added(folder: Path, config: dict[str, Any], vocabulary: dict[str, int], default: str) -> list[dict[str, Any]]:
    """The added tokens, which are matched first, in the order of their ids: special tokens and further words."""
    special = dict.fromkeys(default.split(" "), True)
    special |= dict.fromkeys(_special({**_object(folder / "special_tokens_map.json"), **config}), True)
    path = folder / "added_tokens.json"
    ids: dict[str, Any] = dict(_object(path))
    if odd := [token for token, i in ids.items() if type(i) is not int]:
        raise UserError(f"{path}: the id of {odd[0][:80]!r} is not a whole number")
    flags: dict[str, dict[str, Any]] = {}
    decoder = config.get("added_tokens_decoder") or {}
    for i, token in decoder.items() if isinstance(decoder, dict) else [("", None)]:
        if (
            not isinstance(token, dict)
            or not isinstance(content := token.get("content"), str)
            or not re.fullmatch("[0-9]{1,9}", i)
        ):
            raise UserError(
                f"{folder / 'tokenizer_config.json'}: added_tokens_decoder has an entry that is not a token"
            )
        ids[content], flags[content] = int(i), token
        special[content] = bool(token.get("special", False))
    ids = {token: i for token, i in vocabulary.items() if token in special} | ids
    made = [
        {
            "id": i,
            "content": token,
            "special": special.get(token, False),
            **{flag: bool(flags.get(token, {}).get(flag, False)) for flag in ("single_word", "lstrip", "rstrip")},
            "normalized": bool(flags.get(token, {}).get("normalized", not special.get(token, False))),
        }
        for token, i in sorted(ids.items(), key=lambda item: item[1])
    ]
    following = max(vocabulary.values(), default=-1) + 1
    for token in made:
        if vocabulary.get(token["content"]) == token["id"]:
            continue
        if token["id"] != following:
            raise UserError(
                f"{folder}: the added token {token['content'][:80]!r} has the id {token['id']}, and not the next one, "
                f"{following}: put a tokenizer.json there"
            )
        following += 1
    return made


def _special(config: dict[str, Any]) -> Iterator[str]:
    """The special tokens in a config; each is a string or an object with a ``content``."""
    more = config.get("additional_special_tokens") or []
    for token in (*(config.get(role) for role in _ROLES), *(more if isinstance(more, list) else [])):
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str):
            yield content
