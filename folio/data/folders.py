"""Data sets on disk: a folder, or the files that a glob finds, and what is known of their ids.

These can be read: Folio's folders (``meta.json``), nanoGPT's ``train.bin`` and ``val.bin`` with or without
``meta.pkl``, and shards of any format.
"""

from __future__ import annotations

import glob
import hashlib
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from folio.config.declare import TokenDtype
from folio.config.options import Data
from folio.data.file_names import missing_split, note_of_others, one_line, select, select_by_glob, split_of, token_files
from folio.data.headerless import refuse_other_types
from folio.data.meta_files import datatrove_tokenizer, read_meta_json, read_meta_pkl
from folio.data.token_files import (
    AGAIN,
    CLONE,
    META,
    META_PKL,
    SPLITS,
    UNFINISHED,
    Array,
    Eot,
    Split,
    TokenFile,
    open_file,
)
from folio.data.tokenizers import IDS_ONLY, from_json
from folio.errors import UserError
from folio.files import open_regular

_ALSO = {"fineweb_edu": ("edu_fineweb10B",)}  # the names that other programs give to a data set


@dataclass(frozen=True)
class Folder:
    """A data set on disk: its files by split, and what is known of their ids."""

    path: Path
    splits: dict[Split, tuple[TokenFile, ...]]
    vocab_size: int | None = None
    tokenizer: dict[str, Any] | None = None  # None: not stated; GPT-2's, as nanoGPT assumes
    eot: Eot | None = None
    meta: dict[str, Any] = field(default_factory=dict)  # all of meta.json
    note: str = ""  # for the user: what was left out or assumed

    def fingerprint(self, split: Split) -> str:
        """A hash of a split: of its files' SHA-256, or of their lengths, first and last tokens."""
        digest = hashlib.sha256()
        for file in self.splits[split]:
            digest.update((file.sha256 or _hash_of_ends(file.map())).encode())
        return digest.hexdigest()


def _hash_of_ends(data: Array, count: int = 2**15) -> str:
    digest = hashlib.sha256(str(len(data)).encode())
    digest.update(data[:count].tobytes())
    digest.update(data[-count:].tobytes())
    return digest.hexdigest()


def open_folder(path: Path, token_dtype: TokenDtype = "auto") -> Folder:
    """The data set in a folder, or that a glob finds. ``token_dtype``: the type of ``.bin`` files without a header.

    Raises:
        FileNotFoundError: there is none. ValueError: its files are damaged or do not fit together, or there are several
            data sets. Both name the file and the remedy.
    """
    if path.is_dir() and os.path.lexists(path / META):
        return _of_stated_type(_of_meta_json(path), token_dtype)
    if (path / UNFINISHED).is_dir():
        raise FileNotFoundError(f"{path}: its preparation is not finished: {AGAIN} to continue")
    paths, note = select(path) if path.is_dir() else select_by_glob(path)
    where = path if path.is_dir() else paths[0].parent
    if os.path.lexists(where / META) and (own := _part_chosen(_of_meta_json(where), paths)):
        return replace(_of_stated_type(own, token_dtype), path=path, note=note)
    vocab_size, tokenizer = read_meta_pkl(pickled) if os.path.lexists(pickled := where / META_PKL) else (None, None)
    files = [open_file(p, token_dtype) for p in paths]
    if token_dtype == "auto":
        refuse_other_types(files, vocab_size)
    _refuse_mixture(files)
    splits = _by_split(path, files)
    if paths[0].suffix == ".ds":
        return _of_datatrove(path, splits, paths, note)
    if vocab_size is None:
        return Folder(path, splits, note=note)
    if tokenizer == IDS_ONLY:
        note = one_line(path, note, f"{META_PKL} says how many token ids there are, but not what they mean")
    return Folder(path, splits, vocab_size, tokenizer, "none", note=note)


def _of_stated_type(own: Folder, token_dtype: TokenDtype) -> Folder:
    """The folder, unchanged. Raises ValueError if its meta file states another type than ``token_dtype``."""
    meta, dtype = own.path / META, own.meta["dtype"]
    if token_dtype not in ("auto", dtype):
        raise UserError(
            f"token_dtype={token_dtype}: {meta} states the type of its files, {dtype}: remove --token_dtype"
        )
    return own


def _part_chosen(own: Folder, paths: list[Path]) -> Folder | None:
    """The part of a data set that a glob finds; None if it finds only other files. Raises ValueError for a mixture."""
    wanted = set(paths)
    splits = {split: tuple(file for file in own.splits[split] if file.path in wanted) for split in SPLITS}
    found = {file.path for files in splits.values() for file in files}
    if not found:
        return None
    if odd := next((p for p in paths if p not in found), None):
        raise UserError(f"{odd} is not in {own.path / META}, as {min(found).name} is: name the folder, or other files")
    for split in SPLITS:
        if not splits[split]:
            raise missing_split(own.path, split, paths[-1])
    return replace(own, splits=splits)


def _of_meta_json(path: Path) -> Folder:
    """A folder with ``meta.json``: the files that it lists; a note names any others."""
    meta = read_meta_json(path)
    listed = [file.path for files in meta.splits.values() for file in files]
    others = note_of_others(token_files(f"{glob.escape(str(path))}/*"), listed)
    return Folder(path, meta.splits, meta.vocab_size, meta.tokenizer, meta.eot, meta.raw, one_line(path, others))


def _refuse_mixture(files: list[TokenFile]) -> None:
    """Raises ValueError if files of one format differ in their type or header."""
    one = files[0]
    for other in files[1:]:
        if other.dtype != one.dtype:
            raise UserError(f"{one.path} holds {one.dtype}, {other.path.name} {other.dtype}: give files of one type")
        if (other.offset > 0) != (one.offset > 0):
            bare, headed = sorted((one, other), key=lambda file: file.offset)
            raise UserError(f"{bare.path} has no header, {headed.path.name} has one: give files of one format")


def _by_split(path: Path, files: list[TokenFile]) -> dict[Split, tuple[TokenFile, ...]]:
    """The files of each split, by name. Of datatrove's unnamed files, the last documents are for validation."""
    named = {split: tuple(f for f in files if split_of(f.path) == split) for split in SPLITS}
    if not any(named.values()) and files[0].path.suffix == ".ds":
        *others, last = files
        val = _last_documents(last)
        begin = last.tokens - val
        return {
            "train": (*others, last._replace(tokens=begin)),
            "val": (last._replace(tokens=val, offset=begin * last.dtype.itemsize),),
        }
    for split in SPLITS:
        if not named[split]:
            raise missing_split(path, split, files[-1].path)
    return named


def _last_documents(file: TokenFile) -> int:
    """The tokens of the whole documents in about the last tenth of a datatrove file, at most ten million."""
    index = file.path.with_name(file.path.name + ".index")
    with open_regular(index) as opened:
        ends = np.memmap(opened, "<u8", "r")
    if (ends[1:] < ends[:-1]).any():
        raise UserError(f"{index}: a document in it ends before the one that it follows: {AGAIN}")
    wanted = file.tokens - min(max(1, file.tokens // 10), 10_000_000)
    least = max(0, 2 * wanted - file.tokens)  # so that validation has at most twice the tokens wanted
    near = ends[np.searchsorted(ends, least) : np.searchsorted(ends, file.tokens)].astype(np.int64)
    return file.tokens - (int(near[np.abs(near - wanted).argmin()]) if len(near) else wanted)


def _of_datatrove(path: Path, splits: dict[Split, tuple[TokenFile, ...]], files: list[Path], note: str) -> Folder:
    if not any(map(split_of, files)):
        note = one_line(
            path, f"the last {splits['val'][0].tokens:,} tokens of {files[-1].name} are for validation", note
        )
    tokenizer = datatrove_tokenizer(files[0])
    size = from_json(tokenizer).size if tokenizer and tokenizer["kind"] == "tokenizers" else None
    return Folder(path, splits, size, tokenizer, note=note)


def find(config: Data, name: str = "") -> Folder:
    """The data set in ``data_dir``, else in data/<dataset> here or in the clone, or in a folder <dataset>.

    ``name`` replaces both options. Raises FileNotFoundError or ValueError that name the file and the remedy.
    """
    dataset = name or config.dataset
    if config.data_dir and not name:
        places = [Path(config.data_dir)]
    else:
        names = (dataset, *_ALSO.get(dataset, ()))
        places = [folder / n for n in names for folder in (Path("data"), CLONE / "data", Path())]
    for place in places:
        if holds_tokens(place) if place.is_dir() else glob.glob(str(place)):
            return open_folder(place, config.token_dtype)
    missing = places[0] / "train.bin"
    if (places[0] / UNFINISHED).is_dir():
        raise FileNotFoundError(f"{places[0]} is not finished: run the same folio prepare again to continue")
    if not config.data_dir:
        raise FileNotFoundError(
            f"{missing} is missing: run python -m folio prepare {dataset} for a known data set, "
            f"or python -m folio prepare FILE_OR_FOLDER --name {dataset} for your own text"
        )
    raise FileNotFoundError(
        f"{missing} is missing, and no other token file is there: run python -m folio prepare FILE_OR_FOLDER "
        f"--data_dir {places[0]} to make them from your own text"
    )


def holds_tokens(folder: Path) -> bool:
    """Whether a folder looks like a data set."""
    patterns = ("*.bin", "*.npy", "*.ds", "*/*.ds", "meta.json")
    return any(next(folder.glob(pattern), None) for pattern in patterns)
