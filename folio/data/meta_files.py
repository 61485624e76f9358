"""The files that describe token files: ``meta.json``, nanoGPT's ``meta.pkl``, datatrove's ``.metadata``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from folio.data import pickles
from folio.data.token_files import (
    AGAIN,
    META,
    SPLITS,
    Eot,
    Split,
    TokenFile,
    bare_file,
    datatrove_metadata,
    npy_file,
)
from folio.data.tokenizers import IDS_ONLY
from folio.errors import UserError
from folio.files import is_name, read_bytes, read_json, read_sealed, require_file, sha256

_REHASH = 64 * 2**20  # bytes: data sets up to this size, and changed files, are hashed when they are opened


class Meta(NamedTuple):
    """The content of ``meta.json``, checked; ``raw`` is all of it."""

    splits: dict[Split, tuple[TokenFile, ...]]
    vocab_size: int
    dtype: str
    tokenizer: dict[str, Any]
    eot: Eot
    raw: dict[str, Any]


def read_meta_json(path: Path) -> Meta:
    """The ``meta.json`` of a folder, and the files that it lists, each opened and compared with it.

    Raises:
        FileNotFoundError: a listed file is missing. ValueError: the meta file or a listed file is damaged.
    """
    meta = path / META
    try:
        raw, _ = read_sealed(meta)
        dtype, eot = raw["dtype"], raw["eot"]
        if set(raw["splits"]) != set(SPLITS) or dtype not in ("uint16", "uint32"):
            raise UserError("its splits or dtype are unknown")
        vocab_size = whole_number(raw["vocab_size"], "vocab_size", 1, np.iinfo(dtype).max + 1)
        if eot not in ("before", "after", "none"):
            raise UserError(f"eot={str(eot)[:20]}")
        listed = {split: [_entry(entry) for entry in raw["splits"][split]["files"]] for split in SPLITS}
        if not all(listed.values()) or not all(is_name(name) for files in listed.values() for name, *_ in files):
            raise UserError("its splits list no files, or files outside the folder")
        tokenizer = dict(raw["tokenizer"])
        if not isinstance(tokenizer["kind"], str):
            raise UserError("its tokenizer's kind is not text")
        _check_counts(raw)
    except FileNotFoundError:
        raise FileNotFoundError(f"{meta} is a link to a file that is not there: {AGAIN}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{meta}: not a meta file of Folio: {error}; {AGAIN}") from None
    tokens = sum(count for split in SPLITS for _, count, _ in listed[split])
    small = tokens * np.dtype(dtype).itemsize <= _REHASH
    splits = {
        split: tuple(_listed(path, np.dtype(dtype), small, *entry) for entry in listed[split]) for split in SPLITS
    }
    return Meta(splits, vocab_size, dtype, tokenizer, eot, raw)


def _entry(entry: Mapping[str, Any]) -> tuple[str, int, str]:
    return str(entry["name"]), whole_number(entry["tokens"], "tokens", 0), str(entry["sha256"])


def _check_counts(raw: Mapping[str, Any]) -> None:
    """Raises ValueError if a number that is only displayed is not a count."""
    if not isinstance(skipped := raw.get("skipped", {}), dict):
        raise UserError("its skipped is not an object")
    counts = [("text_bytes", raw.get("text_bytes")), *((f"skipped {reason[:80]}", n) for reason, n in skipped.items())]
    counts += [("documents", raw["splits"][split].get("documents")) for split in SPLITS]
    for name, count in counts:
        if count is not None:
            whole_number(count, name, 0)


def _listed(folder: Path, dtype: np.dtype[Any], small: bool, name: str, tokens: int, digest: str) -> TokenFile:
    """A file that ``meta.json`` lists. Raises FileNotFoundError or ValueError if it is not as listed.

    Its hash is compared if the data set is ``small``, or if the file is small and was changed after ``meta.json``.
    """
    path = folder / name
    if not os.path.lexists(path) or path.is_dir():
        raise FileNotFoundError(f"{path} is missing: {AGAIN}")
    require_file(path)
    file = npy_file(path) if path.suffix == ".npy" else bare_file(path, dtype)
    if file.tokens != tokens or file.dtype != dtype:
        raise UserError(f"{path}: {file.tokens:,} tokens, but its {META} says {tokens:,}: {AGAIN}")
    stat = path.stat()
    changed = stat.st_mtime_ns > path.with_name(META).stat().st_mtime_ns
    if (small or changed) and stat.st_size <= _REHASH and sha256(path) != digest:
        raise UserError(f"{path} is not what its {META} describes: {AGAIN}")
    return file._replace(sha256=digest)


def read_meta_pkl(path: Path) -> tuple[int, dict[str, Any]]:
    """The vocabulary size and the tokenizer in nanoGPT's ``meta.pkl``; nothing in the file is executed.

    The tokenizer is one of characters if ``itos`` has a character for each id, else ``IDS_ONLY``: training needs only
    the size.

    Raises:
        ValueError: it has more than plain values, or no size. FileNotFoundError: it is a broken link.
    """
    raw = _read_pickle(path)
    try:
        size = raw["vocab_size"]
        vocab_size = whole_number(
            size[0] if isinstance(size, list) and len(size) == 1 else size, "vocab_size", 1, 2**32
        )
    except (LookupError, TypeError, ValueError) as error:
        reason = f"it has no {error}" if isinstance(error, LookupError) else error
        raise UserError(f"{path}: not nanoGPT's meta.pkl ({reason}): {AGAIN}") from None
    itos = raw.get("itos")
    characters = []
    if isinstance(itos, (dict, list)) and len(itos) >= vocab_size:
        found = (itos.get(i) if isinstance(itos, dict) else itos[i] for i in range(vocab_size))
        characters = [c for c in found if isinstance(c, str) and len(c) == 1 and not "\ud800" <= c <= "\udfff"]
    if len(set(characters)) < vocab_size:
        return vocab_size, IDS_ONLY
    return vocab_size, {"kind": "characters", "characters": "".join(characters)}


def whole_number(value: object, name: str, least: int, most: int = 2**63 - 1) -> int:
    """An integer from a file; 3.0 is 3. Raises ValueError for other values, and for integers out of bounds."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not int or not least <= value <= most:
        shown = f"{value:,}" if type(value) is int and value.bit_length() < 128 else str(type(value).__name__)
        raise UserError(f"{name}={shown} is not a whole number from {least} to {most:,}")
    return value


def _read_pickle(path: Path) -> Any:
    """A pickle as plain values; nothing that it names is imported or called."""
    try:
        return pickles.loads(read_bytes(path, pickles.MOST))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is a link to a file that is not there: {AGAIN}") from None
    except ValueError as error:
        raise UserError(f"{path}: refused: {str(error).removeprefix(f'{path} ')}; {AGAIN}") from None


def datatrove_tokenizer(path: Path) -> dict[str, Any] | None:
    """The tokenizer that ``.metadata`` names, as JSON; None, which means GPT-2's, if it names that or is missing."""
    name, _ = datatrove_metadata(path)
    if name in ("", "gpt2", "openai-community/gpt2", "Unknown Tokenizer"):
        return None
    if ".." in Path(name).parts:
        raise UserError(f"{path}.metadata names the tokenizer {name[:80]!r}, outside of this folder: {AGAIN}")
    if Path(name).is_file():
        return {"kind": "tokenizers", "file": read_json(Path(name))}
    return {"kind": "datatrove", "name": name}
