"""Token files in every format that people have, as flat arrays: which files a data set is, and what they hold.

Nothing is loaded: each file is a memmap. Known are this program's own folders (``meta.json``), nanoGPT's
``train.bin`` and ``val.bin`` with or without ``meta.pkl``, ``.npy`` shards (build-nanogpt, GPT-from-scratch),
``.bin`` shards with the header of llm.c and modded-nanogpt, and datatrove's ``.ds``.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from tokenize import TokenError
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from folio.files import sha256
from folio.tokenizer import from_json

Split = Literal["train", "val"]
Array = NDArray[np.integer[Any]]
Eot = Literal["before", "after", "none"]

CLONE = Path(__file__).resolve().parent.parent
SPLITS: tuple[Split, ...] = ("train", "val")
META = "meta.json"
UNFINISHED = ".preparing"  # the folder inside a data set's in which it is made
GPT2 = {"kind": "tiktoken", "name": "gpt2"}
GPT2_SIZES = range(50257, 50305)  # its token ids, and those that vocabularies are padded to for speed
_AGAIN = "prepare the data set again"
_REHASH = 64 * 2**20  # bytes: a changed file up to this size is hashed again when it is opened
_NAMED = {
    split: re.compile(rf"(?<![a-z])(?:{words})(?![a-z])", re.IGNORECASE)
    for split, words in (("train", "train|training"), ("val", "val|valid|validation"))
}
_HEADERS: dict[int, np.dtype[Any]] = {
    20240520: np.dtype("<u2"),
    20240801: np.dtype("<u4"),
}  # llm.c's magic numbers: dev/data/data_common.py
_HEADER = 256 * 4  # bytes


class TokenFile(NamedTuple):
    """One file: ``tokens`` ids of ``dtype`` from byte ``offset`` on; ``sha256`` of the whole file if it is known."""

    path: Path
    dtype: np.dtype[Any]
    offset: int
    tokens: int
    sha256: str | None = None

    def map(self) -> Array:
        """The ids (n), read as they are needed."""
        return np.memmap(self.path, self.dtype, "r", self.offset, (self.tokens,))


@dataclass(frozen=True)
class Folder:
    """A data set as it lies: its files by split, and what is known of their ids."""

    path: Path
    splits: dict[Split, tuple[TokenFile, ...]]
    vocab_size: int | None = None
    tokenizer: dict[str, Any] | None = None  # None: not said, so GPT-2's, as nanoGPT assumes
    eot: Eot | None = None
    meta: dict[str, Any] = field(default_factory=dict)  # all of meta.json
    note: str = ""  # what a reader should know of how it was read

    def fingerprint(self, split: Split) -> str:
        """A hash of a split: of its files' SHA-256, or of their lengths and both of their ends."""
        digest = hashlib.sha256()
        for file in self.splits[split]:
            digest.update((file.sha256 or _ends(file.map())).encode())
        return digest.hexdigest()


def open_folder(path: Path) -> Folder:
    """The data set in a folder, or that a glob finds.

    Raises:
        FileNotFoundError: there is none; ValueError: its files do not fit together or are damaged. Both name the
            file and the remedy.
    """
    if path.is_dir() and (path / META).is_file():
        return _own(path)
    if (path / UNFINISHED).is_dir():
        raise FileNotFoundError(f"{path}: its preparation is not finished: {_AGAIN} to go on")
    paths = _token_files(path)
    files = [_FORMATS[p.suffix](p) for p in paths]
    _refuse_mixture(files)
    splits = _divided(path, files)
    if paths[0].suffix == ".ds":
        return _of_datatrove(path, splits, paths)
    where = path if path.is_dir() else paths[0].parent
    if (where / META).is_file():  # a glob of a data set's own files: what it says of them holds
        own = _own(where)
        listed = {file.path: file for found in own.splits.values() for file in found}
        if all(p in listed for p in paths):
            return replace(own, path=path, splits={s: tuple(listed[f.path] for f in splits[s]) for s in SPLITS})
    if (pickled := where / "meta.pkl").is_file():
        vocabulary = characters(pickled)
        return Folder(path, splits, len(vocabulary), {"kind": "characters", "characters": vocabulary}, "none")
    return Folder(path, splits)


def _token_files(path: Path) -> list[Path]:
    """Those of one format in a folder, or that a glob finds, in the order of their names."""
    pattern = str(Path(glob.escape(str(path)), "*")) if path.is_dir() else str(path)
    files = [p for p in map(Path, sorted(glob.glob(pattern))) if p.suffix in _FORMATS and p.is_file()]
    if path.is_dir() and not any(map(_split_of, files)):
        files += [p for split in SPLITS for p in sorted((path / split).glob("*.ds"))]
    if not files:
        raise FileNotFoundError(f"{path} holds no token files (.bin, .npy, .ds): prepare it")
    if len(suffixes := sorted({p.suffix for p in files})) > 1:
        first = ", ".join(next(p.name for p in files if p.suffix == s) for s in suffixes)
        raise ValueError(
            f"{path} holds {' and '.join(suffixes)} files, {first}: name those of one format with a glob, such as "
            f"--data_dir='{files[0].parent / '*'}{suffixes[0]}'"
        )
    return files


def _refuse_mixture(files: list[TokenFile]) -> None:
    """Raises ValueError where files of one format differ in their type or header."""
    one = files[0]
    for other in files[1:]:
        if other.dtype != one.dtype:
            raise ValueError(f"{one.path} holds {one.dtype}, {other.path.name} {other.dtype}: give those of one type")
        if (other.offset > 0) != (one.offset > 0):
            bare, headed = sorted((one, other), key=lambda file: file.offset)
            raise ValueError(f"{bare.path} has no header, {headed.path.name} has one: give those of one format")


def _split_of(path: Path) -> Split | None:
    """Which split a file's name says; a folder's where datatrove's names say none."""
    for name in (path.name, path.parent.name if path.suffix == ".ds" else ""):
        found = [split for split in SPLITS if _NAMED[split].search(name)]
        if len(found) > 1:
            raise ValueError(f"{path} has both train and val in its name: rename it after the one that it is")
        if found:
            return found[0]
    return None


def _divided(path: Path, files: list[TokenFile]) -> dict[Split, tuple[TokenFile, ...]]:
    """By name; of datatrove's files, which say none, the last documents of the last one are for validation."""
    named = {split: tuple(f for f in files if _split_of(f.path) == split) for split in SPLITS}
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
            given = files[-1].path
            missing = path / f"{split}.bin" if given.name in ("train.bin", "val.bin") else f"{path}: {split}"
            raise FileNotFoundError(f"{missing} is missing: {_AGAIN}, or name a file …_{split}_000000{given.suffix}")
    return named


def _last_documents(file: TokenFile) -> int:
    """Tokens of the whole documents in about the last tenth of a datatrove file, ten million at most."""
    ends = np.fromfile(file.path.with_name(file.path.name + ".index"), dtype="<u8").astype(np.int64)
    wanted = file.tokens - min(max(1, file.tokens // 10), 10_000_000)
    near = ends[(ends >= 2 * wanted - file.tokens) & (ends < file.tokens)]  # no more than twice what is wanted
    return file.tokens - (int(near[np.abs(near - wanted).argmin()]) if len(near) else wanted)


# Formats


def _raw(path: Path, dtype: np.dtype[Any], offset: int = 0) -> TokenFile:
    size = path.stat().st_size - offset
    if size <= 0:
        raise ValueError(f"{path} is empty: {_AGAIN}")
    if size % dtype.itemsize:
        raise ValueError(
            f"{path}: {size} bytes are not whole {dtype} tokens: it is cut short or of another type; {_AGAIN}"
        )
    return TokenFile(path, dtype, offset, size // dtype.itemsize)


def _bin(path: Path) -> TokenFile:
    """Bare uint16 as nanoGPT's, or 256 int32 before the ids: magic number, version, count."""
    head = np.fromfile(path, dtype="<i4", count=3)
    if len(head) < 3 or int(head[0]) not in _HEADERS:
        return _raw(path, np.dtype("<u2"))
    if path.stat().st_size < _HEADER:
        raise ValueError(f"{path}: {path.stat().st_size} bytes are not even its header: it is cut short; {_AGAIN}")
    file = _raw(path, _HEADERS[int(head[0])], _HEADER)
    if file.tokens != int(head[2]):
        raise ValueError(
            f"{path}: {file.tokens:,} tokens, but its header says {int(head[2]):,}: it is cut short; {_AGAIN}"
        )
    return file


def _npy(path: Path) -> TokenFile:
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
            offset = file.tell()
    except (ValueError, OSError, SyntaxError, TokenError) as error:
        raise ValueError(f"{path}: not a .npy file ({str(error).splitlines()[0]}): {_AGAIN}") from None
    if len(shape) != 1 or dtype.kind not in "ui":
        raise ValueError(f"{path}: an array of {dtype} with {len(shape)} dimensions, not a row of token ids; {_AGAIN}")
    if path.stat().st_size != offset + shape[0] * dtype.itemsize:
        held = (path.stat().st_size - offset) // dtype.itemsize
        raise ValueError(f"{path}: {held:,} tokens, but its header says {shape[0]:,}: it is cut short; {_AGAIN}")
    if not shape[0]:
        raise ValueError(f"{path} is empty: {_AGAIN}")
    return TokenFile(path, dtype, offset, shape[0])


def _datatrove(path: Path) -> TokenFile:
    """Bare ids; how wide they are follows from the last document's end in ``….ds.index`` (uint64)."""
    index = path.with_name(path.name + ".index")
    if not index.is_file() or index.stat().st_size < 8:
        raise FileNotFoundError(f"{index} is missing: datatrove writes it with save_index=True")
    with index.open("rb") as file:
        file.seek(-8, io.SEEK_END)
        tokens = int.from_bytes(file.read(8), "little")
    width, rest = divmod(path.stat().st_size, max(tokens, 1))
    said = _datatrove_says(path)[1]
    if rest or width not in (2, 4) or said not in ("", str(width)):
        raise ValueError(
            f"{path}: {path.stat().st_size} bytes for the {tokens:,} tokens of its index: it is cut short; {_AGAIN}"
        )
    return _raw(path, np.dtype("<u2" if width == 2 else "<u4"))


_FORMATS: dict[str, Callable[[Path], TokenFile]] = {".bin": _bin, ".npy": _npy, ".ds": _datatrove}


def _of_datatrove(path: Path, splits: dict[Split, tuple[TokenFile, ...]], files: list[Path]) -> Folder:
    named = any(map(_split_of, files))
    note = f"{path}: the last {splits['val'][0].tokens:,} tokens of {files[-1].name} are for validation"
    tokenizer = _datatrove_tokenizer(files[0])
    size = from_json(tokenizer).size if tokenizer and tokenizer["kind"] == "tokenizers" else None
    return Folder(path, splits, size, tokenizer, note="" if named else note)


def _datatrove_tokenizer(path: Path) -> dict[str, Any] | None:
    """GPT-2's if the ``.metadata`` beside it is missing or says so; else its name, which only datatrove knows."""
    name, _ = _datatrove_says(path)
    if name in ("", "gpt2", "openai-community/gpt2", "Unknown Tokenizer"):
        return None
    if Path(name).is_file():
        return {"kind": "tokenizers", "file": json.loads(Path(name).read_text(encoding="utf-8"))}
    return {"kind": "datatrove", "name": name}


def _datatrove_says(path: Path) -> tuple[str, str]:
    """Name of the tokenizer and bytes of a token, from the first line of ``.metadata``; empty where it is missing."""
    metadata = path.with_name(path.name + ".metadata")
    first = next(iter(metadata.read_text(encoding="utf-8").splitlines()), "") if metadata.is_file() else ""
    name, _, width = first.rpartition("|")
    return name, width


# Meta files


def _own(path: Path) -> Folder:
    """A folder with ``meta.json``: exactly the files that it lists, as long as it says."""
    meta = path / META
    try:
        raw = json.loads(meta.read_text(encoding="utf-8"))
        dtype, vocab_size, eot = raw["dtype"], int(raw["vocab_size"]), raw["eot"]
        if set(raw["splits"]) != set(SPLITS) or dtype not in ("uint16", "uint32"):
            raise ValueError("its splits or dtype are unknown")
        if vocab_size < 1 or eot not in ("before", "after", "none"):
            raise ValueError(f"vocab_size={vocab_size}, eot={eot}")
        listed = {
            split: [(str(f["name"]), int(f["tokens"]), str(f["sha256"])) for f in raw["splits"][split]["files"]]
            for split in SPLITS
        }
        if not all(listed.values()) or any(Path(name).name != name for files in listed.values() for name, *_ in files):
            raise ValueError("its splits list no files, or files elsewhere")
        tokenizer = dict(raw["tokenizer"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{meta}: not a meta file of this program: {error}; {_AGAIN}") from None
    splits = {
        split: tuple(_listed(path / name, np.dtype(dtype), tokens, digest) for name, tokens, digest in listed[split])
        for split in SPLITS
    }
    return Folder(path, splits, vocab_size, tokenizer, eot, raw)


def _listed(path: Path, dtype: np.dtype[Any], tokens: int, digest: str) -> TokenFile:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {_AGAIN}")
    file = _npy(path) if path.suffix == ".npy" else _raw(path, dtype)
    if file.tokens != tokens or file.dtype != dtype:
        raise ValueError(f"{path}: {file.tokens:,} tokens, but its {META} says {tokens:,}: {_AGAIN}")
    stat = path.stat()
    changed = stat.st_mtime_ns > path.with_name(META).stat().st_mtime_ns
    if changed and stat.st_size <= _REHASH and sha256(path) != digest:
        raise ValueError(f"{path} is not what its {META} describes: {_AGAIN}")
    return file._replace(sha256=digest)


def characters(path: Path) -> str:
    """The vocabulary of nanoGPT's ``meta.pkl``, as one text; nothing in the file is run.

    Raises:
        ValueError: the file asks for more than dicts, lists, text and numbers, or holds something else.
    """
    raw = _read_pickle(path)
    try:
        itos = raw["itos"]
        found = [itos[i] for i in range(int(raw["vocab_size"]))]
        if not all(isinstance(c, str) and len(c) == 1 for c in found):
            raise ValueError("its itos holds more than characters")
        return "".join(found)
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not nanoGPT's meta.pkl ({error}): {_AGAIN}") from None


class _NothingImported(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which would run code")


def _read_pickle(path: Path) -> Any:
    """A pickle of dicts, lists, text and numbers; nothing it names is imported or called."""
    try:
        return _NothingImported(io.BytesIO(path.read_bytes())).load()
    except Exception as error:  # damaged pickles raise anything
        raise ValueError(f"{path}: refused: {error}; {_AGAIN}") from None


def _ends(data: Array, count: int = 2**15) -> str:
    digest = hashlib.sha256(str(len(data)).encode())
    digest.update(data[:count].tobytes())
    digest.update(data[-count:].tobytes())
    return digest.hexdigest()
