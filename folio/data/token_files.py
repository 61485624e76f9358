"""Token files in every format that people have, as flat arrays: which files a data set is, and what they hold.

Nothing is loaded: each file is a memmap. Known are this program's own folders (``meta.json``), nanoGPT's
``train.bin`` and ``val.bin`` with or without ``meta.pkl``, ``.npy`` shards (build-nanogpt, GPT-from-scratch),
``.bin`` shards with the header of llm.c and modded-nanogpt, and datatrove's ``.ds``.

A folder holds one data set: nanoGPT's two files where both are there, else the one family of files whose names differ
in nothing but the split and a number. Other files are left alone, and named in ``Folder.note``. A glob means every
file that it finds.
"""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import io
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from tokenize import TokenError
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from folio.config.options import TokenDtype
from folio.data import pickles
from folio.data.tokenizers import IDS_ONLY, from_json
from folio.errors import UserError
from folio.files import read_json, require_file, sha256

Split = Literal["train", "val"]
Array = NDArray[np.integer[Any]]
Eot = Literal["before", "after", "none"]

CLONE = Path(__file__).resolve().parents[2]
SPLITS: tuple[Split, ...] = ("train", "val")
META, META_PKL = "meta.json", "meta.pkl"
NANOGPT = ("train.bin", "val.bin")
UNFINISHED = ".preparing"  # the folder inside a data set's in which it is made
GPT2 = {"kind": "tiktoken", "name": "gpt2"}
GPT2_SIZES = range(50257, 50305)  # its token ids, and those that vocabularies are padded to for speed
_AGAIN = "prepare the data set again"
_REHASH = 64 * 2**20  # bytes: a changed file up to this size is hashed again when it is opened
_NAMED = {
    split: re.compile(rf"(?<![a-z])(?:{words})(?![a-z])", re.IGNORECASE)
    for split, words in (("train", "train|training"), ("val", "val|valid|validation"))
}
_NUMBER = re.compile(
    r"[-_. ]?(?<![^\W_])(\d+)(?:[-_. ]of[-_. ](\d+))?(?![^\W_])"
)  # stands alone, as 000001 and 3-of-10
_HEADERS: dict[int, tuple[np.dtype[Any], tuple[int, ...]]] = {
    20240520: (np.dtype("<u2"), (1,)),
    20240801: (np.dtype("<u4"), (1, 7)),
}  # llm.c's magic numbers, types and versions: dev/data/data_common.py
_HEADER = 256 * 4  # bytes
_NPY_HEADER = 1 << 14  # bytes, more than numpy itself reads of one
_LINE = 4096  # characters
_BARE = np.dtype("<u2")  # what nanoGPT writes
_LOOKS = (2**12, 2**20)  # values of 16 bits at which a file without a header is looked at, first few and then more
_FEWEST, _FEWEST_BYTES = 16, 2**11  # of which something can be told, of their zeros and of their frequencies
_OPTIONS = {"|u1": "uint8", "<u4": "uint32", "<i4": "int32", "<i8": "int64"}
_DATES = range(20240101, 20241232)  # the magic numbers of llm.c's other files, such as models
_OTHERS = {
    b"\x93NUMPY": "a .npy file",
    b"PK\x03\x04": "a zip file",
    b"\x1f\x8b\x08": "a gzip file",
    b"LITPKDS": "lit-gpt's",
}


class TokenFile(NamedTuple):
    """One file: ``tokens`` ids of ``dtype`` from byte ``offset`` on; ``sha256`` of the whole file if it is known."""

    path: Path
    dtype: np.dtype[Any]
    offset: int
    tokens: int
    sha256: str | None = None

    def map(self) -> Array:
        """The ids (n), read as they are needed; as long as it is there, the process has a file open."""
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


def open_folder(path: Path, token_dtype: TokenDtype = "auto") -> Folder:
    """The data set in a folder, or that a glob finds; ``token_dtype``: what ``.bin`` files without a header hold.

    Raises:
        FileNotFoundError: there is none; ValueError: its files do not fit together or are damaged, or it is not clear
            which are meant. Both name the file and the remedy.
    """
    if path.is_dir() and os.path.lexists(path / META):
        return _as_said(_own(path), token_dtype)
    if (path / UNFINISHED).is_dir():
        raise FileNotFoundError(f"{path}: its preparation is not finished: {_AGAIN} to go on")
    paths, note = _data_set(path) if path.is_dir() else _found_by_glob(path)
    where = path if path.is_dir() else paths[0].parent
    if os.path.lexists(where / META) and (own := _chosen_of(_own(where), paths)):
        return replace(_as_said(own, token_dtype), path=path, note=note)
    vocab_size, tokenizer = read_meta_pkl(pickled) if os.path.lexists(pickled := where / META_PKL) else (None, None)
    files = [_open(p, token_dtype) for p in paths]
    if token_dtype == "auto":
        _refuse_other_types(files, vocab_size)
    _refuse_mixture(files)
    splits = _divided(path, files)
    if paths[0].suffix == ".ds":
        return _of_datatrove(path, splits, paths, note)
    if vocab_size is None:
        return Folder(path, splits, note=note)
    if tokenizer == IDS_ONLY:
        note = _line(path, note, f"{META_PKL} says how many token ids there are, but not what they mean")
    return Folder(path, splits, vocab_size, tokenizer, "none", note=note)


# Which files


class _Name(NamedTuple):
    """What a file's name says: its split, what it shares with the others of its data set, its number of so many."""

    split: Split | None
    family: str
    number: int | None
    of: int | None


def _name(path: Path) -> _Name:
    """``edufineweb_train_000001.npy`` → train, ``edufineweb_*.npy``, 1.

    The number is the last after the split's word, else one at the very beginning; in names without a split the first.
    """
    split = _split_of(path)
    stem = path.stem
    if split:
        stem = path.stem if _NAMED[split].search(path.stem) else f"{path.parent.name}/{path.stem}"
        stem = _NAMED[split].sub("*", stem, count=1)
    numbers = list(_NUMBER.finditer(stem))
    after = [n for n in numbers if n.start() > stem.find("*")] if split else numbers[:1]
    found = after[-1:] or [n for n in numbers if n.start() == 0]
    if not found:
        return _Name(split, stem + path.suffix, None, None)
    (one,) = found
    stem = f"{stem[: one.start()]}{stem[one.end() :]}"
    return _Name(split, stem + path.suffix, int(one[1]), int(one[2]) if one[2] else None)


def _split_of(path: Path) -> Split | None:
    """Which split a file's name says; a folder's where datatrove's names say none."""
    for name in (path.name, path.parent.name if path.suffix == ".ds" else ""):
        found = [split for split in SPLITS if _NAMED[split].search(name)]
        if len(found) > 1:
            raise UserError(f"{path} has both train and val in its name: rename it after the one that it is")
        if found:
            return found[0]
    return None


def _token_files(pattern: str) -> list[Path]:
    """All of any format that a glob finds, in the order of their names."""
    return [p for p in map(Path, sorted(glob.glob(pattern))) if p.suffix in _FORMATS and not p.is_dir()]


def _found_by_glob(pattern: Path) -> tuple[list[Path], str]:
    """The files that a user named, whatever their families; and a note of what that takes together or leaves out."""
    files = _token_files(str(pattern))
    if not files:
        raise FileNotFoundError(f"{pattern} contains no token files (.bin, .npy, .ds): prepare it")
    if len(suffixes := sorted({p.suffix for p in files})) > 1:
        first = ", ".join(next(p.name for p in files if p.suffix == s) for s in suffixes)
        raise UserError(
            f"{pattern} finds {' and '.join(suffixes)} files, {first}: name those of one format, such as "
            f"--data_dir='{files[0].parent / '*'}{suffixes[0]}'"
        )
    named = [p for p in files if _split_of(p)]
    if not named:
        return files, ""
    families = sorted({_name(p).family for p in named})
    together = f"files of several names are used as one data set: {_some(families)}" if len(families) > 1 else ""
    return named, _line(pattern, together, _left_alone(files, named))


def _data_set(folder: Path) -> tuple[list[Path], str]:
    """The files of the one data set in a folder, and a note of what is left alone or missing in their sequence."""
    here = glob.escape(str(folder))
    files = _token_files(f"{here}/*")
    both = [p for p in files if all(_NAMED[split].search(p.name) for split in SPLITS)]
    named = [p for p in files if p not in both and _split_of(p)]
    if not named and not both:
        named = [p for split in SPLITS for p in _token_files(f"{here}/{split}/*.ds")]
        files += named
    if not files:
        raise FileNotFoundError(f"{folder} contains no token files (.bin, .npy, .ds): prepare it")
    exact = [p for p in named if p.name in NANOGPT]
    if len(exact) < len(NANOGPT):
        families = _families(named)
        candidates = [f for f in families.values() if {_name(p).split for p in f} == set(SPLITS)]
        if not named and not both:
            candidates = list(_families([p for p in files if p.suffix == ".ds"]).values())
        if exact and not any(p in f for p in exact for f in candidates):
            candidates += [exact] if candidates else []
        if len(candidates) > 1:
            raise _ambiguous(folder, candidates)
        if not candidates:
            raise _incomplete(folder, named, [*both, *files])
        exact = candidates[0]
        _refuse_twins(exact)
    return exact, _line(folder, _missing_numbers(exact), _left_alone(files, exact))


def _families(files: Sequence[Path]) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for p in files:
        found.setdefault(_name(p).family, []).append(p)
    return found


def _ambiguous(folder: Path, families: list[list[Path]]) -> UserError:
    """With a glob that finds the files of one family and no others, where there is one."""
    names = [p.name for family in families for p in family]
    example = ""
    for family in families:
        own, stem = [p.name for p in family], _name(family[0]).family
        if pattern := next((p for p in (stem, f"*{stem}") if fnmatch.filter(names, p) == own), None):
            example = f", such as --data_dir='{glob.escape(str(folder))}/{pattern}'"
            break
    return UserError(
        f"{folder} holds several data sets ({_some([family[0].name for family in families])}): name the files of "
        f"one with a glob{example}, or move the others away"
    )


def _incomplete(folder: Path, named: list[Path], files: list[Path]) -> Exception:
    """Why no files of a folder are both to train on and to validate."""
    firsts = {split: next((p for p in named if _split_of(p) == split), None) for split in SPLITS}
    if (train := firsts["train"]) and (val := firsts["val"]):
        return UserError(
            f"{train} and {val.name} are not of one data set, since their names differ in more than the split and a "
            "number: rename them, or name both with a glob as --data_dir"
        )
    if not named:
        _split_of(files[0])
    return _missing(folder, "val" if firsts["train"] else "train", (named or files)[-1])


def _missing(path: Path, split: Split, given: Path) -> FileNotFoundError:
    missing = given.with_name(f"{split}.bin") if given.name in NANOGPT else f"{path}: {split}"
    return FileNotFoundError(f"{missing} is missing: {_AGAIN}, or name a file …_{split}_000000{given.suffix}")


def _refuse_twins(family: list[Path]) -> None:
    """Raises ValueError where two files of a split bear the same number, or one of several bears none."""
    seen: dict[tuple[Split | None, int | None], Path] = {}
    first: dict[Split | None, Path] = {}
    for path in family:
        split, _, number, _ = _name(path)
        twin = seen.get((split, number)) or seen.get((split, None)) or (first.get(split) if number is None else None)
        if twin:
            raise UserError(
                f"{twin} and {path.name} cannot both be in one data set, by their numbers: remove one of them, "
                "or choose files with a glob as --data_dir"
            )
        seen[split, number] = path
        first.setdefault(split, path)


def _missing_numbers(files: list[Path]) -> str:
    """Which shards a sequence lacks: of both splits in one count, as build-nanogpt numbers them, or of each."""
    names = [name for name in map(_name, files) if name.number is not None]
    sets = [{name.number for name in names if name.split == split} for split in (*SPLITS, None)]
    apart = any(name.of for name in names) or bool(sets[0] & sets[1])
    missing: list[int] = []
    count = 0
    for split in (*SPLITS, None) if apart else ("both",):
        numbers = sorted(name.number or 0 for name in names if split in (name.split, "both"))
        if not numbers:
            continue
        most = max((name.of or 0) for name in names if split in (name.split, "both"))
        begin = numbers[-1] >= most if most else numbers[0]
        for before, after in pairwise([begin - 1, *numbers, begin + most if most else numbers[-1] + 1]):
            count += max(0, after - before - 1)
            missing += range(before + 1, min(after, before + 4))
    shards = "shard is" if count == 1 else "shards are"
    return f"{count:,} {shards} missing from the sequence: {_some(list(map(str, missing)), count)}" if count else ""


def _left_alone(files: list[Path], chosen: list[Path]) -> str:
    kept = set(chosen)
    others = [p.name for p in files if p not in kept]
    return f"not part of the data set, and left alone: {_some(others)}" if others else ""


def _some(names: Sequence[str], count: int = 0) -> str:
    more = (count or len(names)) - 3
    return ", ".join(names[:3]) + (f" and {more:,} more" if more > 0 else "")


def _line(path: Path, *said: str) -> str:
    """One line about a data set; those parts that are empty, or said of it already, add nothing."""
    told = "; ".join(part.removeprefix(f"{path}: ") for part in said if part)
    return f"{path}: {told}" if told else ""


def _refuse_mixture(files: list[TokenFile]) -> None:
    """Raises ValueError where files of one format differ in their type or header."""
    one = files[0]
    for other in files[1:]:
        if other.dtype != one.dtype:
            raise UserError(f"{one.path} holds {one.dtype}, {other.path.name} {other.dtype}: give those of one type")
        if (other.offset > 0) != (one.offset > 0):
            bare, headed = sorted((one, other), key=lambda file: file.offset)
            raise UserError(f"{bare.path} has no header, {headed.path.name} has one: give those of one format")


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
            raise _missing(path, split, files[-1].path)
    return named


def _last_documents(file: TokenFile) -> int:
    """Tokens of the whole documents in about the last tenth of a datatrove file, ten million at most."""
    index = file.path.with_name(file.path.name + ".index")
    ends = np.memmap(index, "<u8", "r")
    if (ends[1:] < ends[:-1]).any():
        raise UserError(f"{index}: a document in it ends before the one that it follows: {_AGAIN}")
    wanted = file.tokens - min(max(1, file.tokens // 10), 10_000_000)
    least = max(0, 2 * wanted - file.tokens)  # no more than twice what is wanted
    near = ends[np.searchsorted(ends, least) : np.searchsorted(ends, file.tokens)].astype(np.int64)
    return file.tokens - (int(near[np.abs(near - wanted).argmin()]) if len(near) else wanted)


# Formats


def _open(path: Path, token_dtype: TokenDtype = "auto") -> TokenFile:
    """Any file by its suffix. Raises ValueError where it is none, and where it says another type than is asked for."""
    try:
        require_file(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is a link to a file that is not there: {_AGAIN}") from None
    bare = np.dtype("uint16" if token_dtype == "auto" else token_dtype).newbyteorder("<")
    file = _bin(path, bare) if path.suffix == ".bin" else _FORMATS[path.suffix](path)
    if token_dtype != "auto" and file.dtype != bare:
        raise UserError(f"token_dtype={token_dtype}: {path} states its own type, {file.dtype}: remove --token_dtype")
    return file


def _raw(path: Path, dtype: np.dtype[Any], offset: int = 0) -> TokenFile:
    size = path.stat().st_size - offset
    if size <= 0:
        raise UserError(f"{path} is empty: {_AGAIN}")
    if size % dtype.itemsize:
        raise UserError(
            f"{path}: {size} bytes are not whole {dtype} tokens: it is cut short or of another type; {_AGAIN}"
            + (", or say the type with --token_dtype" if not offset else "")
        )
    return TokenFile(path, dtype, offset, size // dtype.itemsize)


def _bin(path: Path, bare: np.dtype[Any] = _BARE) -> TokenFile:
    """Ids alone as in nanoGPT's, or 256 int32 before them: magic number, version, count."""
    with path.open("rb") as file:
        head = file.read(12)
    if other := next((what for magic, what in _OTHERS.items() if head.startswith(magic)), None):
        raise UserError(f"{path} is {other}, not a .bin file of token ids: {_AGAIN}")
    magic, version, count = np.frombuffer(head, "<i4").tolist() if len(head) == 12 else (0, 0, 0)
    if magic not in _HEADERS:
        if magic in _DATES:
            raise UserError(f"{path}: its header, {magic}, is that of another kind of llm.c's files, without tokens")
        return _raw(path, bare)
    if path.stat().st_size < _HEADER:
        raise UserError(f"{path}: {path.stat().st_size} bytes are not even its header: it is cut short; {_AGAIN}")
    dtype, versions = _HEADERS[magic]
    if version not in versions:
        raise UserError(
            f"{path}: its header, {magic}, is of version {version}, and only {' and '.join(map(str, versions))} can "
            f"be read: {_AGAIN}"
        )
    found = _raw(path, dtype, _HEADER)
    _same_count(path, found.tokens, count)
    return found


def _same_count(path: Path, tokens: int, said: int) -> None:
    if tokens != said:
        why = "is cut short" if tokens < said else "holds more than that"
        raise UserError(f"{path}: {tokens:,} tokens, but its header says {said:,}: it {why}; {_AGAIN}")


def _npy(path: Path) -> TokenFile:
    try:
        with path.open("rb") as whole:
            file = io.BytesIO(whole.read(_NPY_HEADER))
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
        offset = file.tell()
    except (ValueError, OSError, SyntaxError, TokenError, TypeError, RecursionError, MemoryError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:80]
        raise UserError(f"{path}: not a .npy file ({reason}): {_AGAIN}") from None
    if len(shape) != 1 or dtype.kind not in "ui":
        raise UserError(f"{path}: an array of {dtype} with {len(shape)} dimensions, not a row of token ids; {_AGAIN}")
    found = _raw(path, dtype, offset)
    _same_count(path, found.tokens, shape[0])
    return found


def _datatrove(path: Path) -> TokenFile:
    """Bare ids; how wide they are follows from the last document's end in ``….ds.index`` (uint64)."""
    index = path.with_name(path.name + ".index")
    if not index.is_file() or index.stat().st_size < 8:
        raise FileNotFoundError(f"{index} is missing: datatrove writes it with save_index=True")
    if index.stat().st_size % 8:
        raise UserError(f"{index}: {index.stat().st_size} bytes are not a multiple of 8: it is cut short; {_AGAIN}")
    with index.open("rb") as file:
        file.seek(-8, io.SEEK_END)
        tokens = int.from_bytes(file.read(8), "little")
    width, rest = divmod(path.stat().st_size, max(tokens, 1))
    said = _datatrove_says(path)[1]
    if rest or width not in (2, 4) or said not in ("", str(width)):
        raise UserError(
            f"{path}: {path.stat().st_size} bytes for the {tokens:,} tokens of its index: it is cut short; {_AGAIN}"
        )
    return _raw(path, np.dtype("<u2" if width == 2 else "<u4"))


_FORMATS: dict[str, Callable[[Path], TokenFile]] = {".bin": _bin, ".npy": _npy, ".ds": _datatrove}


def _of_datatrove(path: Path, splits: dict[Split, tuple[TokenFile, ...]], files: list[Path], note: str) -> Folder:
    if not any(map(_split_of, files)):
        note = _line(path, f"the last {splits['val'][0].tokens:,} tokens of {files[-1].name} are for validation", note)
    tokenizer = _datatrove_tokenizer(files[0])
    size = from_json(tokenizer).size if tokenizer and tokenizer["kind"] == "tokenizers" else None
    return Folder(path, splits, size, tokenizer, note=note)


def _datatrove_tokenizer(path: Path) -> dict[str, Any] | None:
    """GPT-2's if the ``.metadata`` beside it is missing or says so; else its name, which only datatrove knows."""
    name, _ = _datatrove_says(path)
    if name in ("", "gpt2", "openai-community/gpt2", "Unknown Tokenizer"):
        return None
    if Path(name).is_file():
        return {"kind": "tokenizers", "file": read_json(Path(name))}
    return {"kind": "datatrove", "name": name}


def _datatrove_says(path: Path) -> tuple[str, str]:
    """Name of the tokenizer and bytes of a token, from the first line of ``.metadata``; empty where it is missing."""
    metadata = path.with_name(path.name + ".metadata")
    if not os.path.lexists(metadata):
        return "", ""
    with require_file(metadata).open(encoding="utf-8", errors="replace") as file:
        first = file.readline(_LINE).rstrip("\n")
    name, _, width = first.rpartition("|")
    return name, width


# The type of files that do not say it


def _refuse_other_types(files: list[TokenFile], vocab_size: int | None) -> None:
    """Raises ValueError where files without a header are not nanoGPT's uint16, by the first million of their values."""
    bare = [file for file in files if file.path.suffix == ".bin" and not file.offset]
    if not bare:
        return
    if vocab_size and vocab_size > 2**16:
        raise UserError(
            f"{bare[0].path}: {META_PKL} says {vocab_size:,} token ids, for which nanoGPT's uint16 is too narrow: say "
            "the type with --token_dtype, such as --token_dtype=uint32"
        )
    seen = [_type_seen(file.path, vocab_size) for file in bare]
    odd = next((i for i, dtype in enumerate(seen) if dtype != _BARE), None)
    if odd is None:
        return
    dtype, path = seen[odd], bare[odd].path
    if len(set(seen)) > 1:
        other = next(i for i, found in enumerate(seen) if found != dtype)
        said = f"and {bare[other].path.name} {_described(seen[other])}: write them again as one type"
    elif (name := _OPTIONS.get(dtype.str)) is None:
        fit, option = ("<u2", "makes") if dtype.itemsize == 2 else ("<u4", "and --token_dtype=uint32 make")
        said = f"which is not read: np.fromfile(FILE, {dtype.str!r}).astype({fit!r}).tofile(FILE) {option} it fit"
    else:
        said = f"not uint16 as nanoGPT's: set --token_dtype={name}"
    raise UserError(f"{path} seems to hold {_described(dtype)}, {said}; --token_dtype=uint16 reads it as uint16 anyway")


def _type_seen(path: Path, vocab_size: int | None) -> np.dtype[Any]:
    """uint16, unless a look at the beginning, and then at more of it, shows the ids of another type."""
    found = _BARE
    for count in _LOOKS:
        found = _looks_like(np.fromfile(path, "u1", 2 * count), vocab_size)
        if found == _BARE:
            break
    return found


def _looks_like(content: NDArray[np.uint8], vocab_size: int | None) -> np.dtype[Any]:
    """The type of the ids in these bytes.

    Wider types have every second or fourth 16 bits zero, or small where the vocabulary is above 65,536. Ids of all
    types are whole numbers in the vocabulary, where its size is known, which read as another type they are not.
    """
    ids = content[: len(content) // 8 * 8].view("<u2")
    if len(ids) < _FEWEST or ids.min() == ids.max():
        return _BARE
    for name in ("<i8", "<i4", "<f8", "<f4", ">i8", ">i4"):
        wide = ids.view(name)
        if not _are_ids(wide, vocab_size) or np.count_nonzero(wide) < _FEWEST // 2:
            continue
        if (np.abs(wide) < 2**16).all() or (np.abs(wide) % 2**16).max() >= 2**15:
            return np.dtype(name if wide.min() < 0 else name.replace("i4", "u4"))
    limit = vocab_size or GPT2_SIZES.stop
    swapped = ids.byteswap()
    if swapped.max() < 2**8 or (swapped.max() < limit <= ids.max() and (vocab_size or len(ids) > _FEWEST_BYTES)):
        return np.dtype(">u2")
    fits = not vocab_size or content.max() < vocab_size <= ids.max()
    told = len(content) >= _FEWEST_BYTES or (len(content) >= 8 * _FEWEST and content.max() < 2**7)
    return np.dtype("u1") if fits and told and _alike(content[::2], content[1::2]) else _BARE


def _are_ids(values: NDArray[Any], vocab_size: int | None) -> bool:
    with np.errstate(invalid="ignore"):
        return bool((values < (vocab_size or 2**20)).all() and (values > -(2**15)).all() and not (values % 1).any())


def _alike(even: NDArray[np.uint8], odd: NDArray[np.uint8]) -> bool:
    """Whether both halves of 16 bits are the same kind of bytes, as in text: not all as likely, and seldom zero."""
    first, second = (np.bincount(half, minlength=256) / len(half) for half in (even, odd))
    differing = np.abs(first - second).sum() / 2
    return bool(differing < 0.2 + 3 / len(odd) ** 0.5 and second.max() > 4 / 256 and second[0] < 3 / 4)


def _described(dtype: np.dtype[Any]) -> str:
    return f"{dtype.name}{' in big-endian order' if dtype.str.startswith('>') else ''}"


# Meta files


def _as_said(own: Folder, token_dtype: TokenDtype) -> Folder:
    """The folder, unless another type is asked for than its meta file says; then raises ValueError."""
    meta, dtype = own.path / META, own.meta["dtype"]
    if token_dtype not in ("auto", dtype):
        raise UserError(
            f"token_dtype={token_dtype}: {meta} states the type of its files, {dtype}: remove --token_dtype"
        )
    return own


def _chosen_of(own: Folder, paths: list[Path]) -> Folder | None:
    """The part of a data set that a glob finds, None where it finds other files alone; raises ValueError for both."""
    wanted = set(paths)
    splits = {split: tuple(file for file in own.splits[split] if file.path in wanted) for split in SPLITS}
    found = {file.path for files in splits.values() for file in files}
    if not found:
        return None
    if odd := next((p for p in paths if p not in found), None):
        raise UserError(f"{odd} is not in {own.path / META}, as {min(found).name} is: name the folder, or other files")
    for split in SPLITS:
        if not splits[split]:
            raise _missing(own.path, split, paths[-1])
    return replace(own, splits=splits)


def _own(path: Path) -> Folder:
    """A folder with ``meta.json``: exactly the files that it lists, as long as it says; a note names any others."""
    meta = path / META
    try:
        raw = read_json(meta)
        dtype, eot = raw["dtype"], raw["eot"]
        if set(raw["splits"]) != set(SPLITS) or dtype not in ("uint16", "uint32"):
            raise UserError("its splits or dtype are unknown")
        vocab_size = whole(raw["vocab_size"], "vocab_size", 1, np.iinfo(dtype).max + 1)
        if eot not in ("before", "after", "none"):
            raise UserError(f"eot={str(eot)[:20]}")
        listed = {split: [_entry(entry) for entry in raw["splits"][split]["files"]] for split in SPLITS}
        if not all(listed.values()) or any(Path(name).name != name for files in listed.values() for name, *_ in files):
            raise UserError("its splits list no files, or files elsewhere")
        tokenizer = dict(raw["tokenizer"])
        _check_counts(raw)
    except FileNotFoundError:
        raise FileNotFoundError(f"{meta} is a link to a file that is not there: {_AGAIN}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{meta}: not a meta file of this program: {error}; {_AGAIN}") from None
    splits = {
        split: tuple(_listed(path / name, np.dtype(dtype), tokens, digest) for name, tokens, digest in listed[split])
        for split in SPLITS
    }
    own = [file.path for files in splits.values() for file in files]
    note = _line(path, _left_alone(_token_files(f"{glob.escape(str(path))}/*"), own))
    return Folder(path, splits, vocab_size, tokenizer, eot, raw, note)


def _entry(entry: Mapping[str, Any]) -> tuple[str, int, str]:
    return str(entry["name"]), whole(entry["tokens"], "tokens", 0), str(entry["sha256"])


def _check_counts(raw: Mapping[str, Any]) -> None:
    """Of what is only told: raises ValueError where it is not what is told."""
    whole(raw.get("text_bytes") or 0, "text_bytes", 0)
    for reason, count in dict(raw.get("skipped") or {}).items():
        whole(count, f"skipped {reason}", 0)
    for split in SPLITS:
        whole(raw["splits"][split].get("documents") or 0, "documents", 0)


def _listed(path: Path, dtype: np.dtype[Any], tokens: int, digest: str) -> TokenFile:
    if not os.path.lexists(path) or path.is_dir():
        raise FileNotFoundError(f"{path} is missing: {_AGAIN}")
    require_file(path)
    file = _npy(path) if path.suffix == ".npy" else _raw(path, dtype)
    if file.tokens != tokens or file.dtype != dtype:
        raise UserError(f"{path}: {file.tokens:,} tokens, but its {META} says {tokens:,}: {_AGAIN}")
    stat = path.stat()
    changed = stat.st_mtime_ns > path.with_name(META).stat().st_mtime_ns
    if changed and stat.st_size <= _REHASH and sha256(path) != digest:
        raise UserError(f"{path} is not what its {META} describes: {_AGAIN}")
    return file._replace(sha256=digest)


def read_meta_pkl(path: Path) -> tuple[int, dict[str, Any]]:
    """What nanoGPT's ``meta.pkl`` says: how many token ids there are, and the tokenizer; nothing in the file is run.

    The tokenizer is of characters where ``itos`` gives one for each id, else ``IDS_ONLY``: training needs the size
    alone.

    Raises:
        ValueError: it holds more than plain values, or no size; FileNotFoundError: it is a link to nothing.
    """
    raw = _read_pickle(path)
    try:
        size = raw["vocab_size"]
        vocab_size = whole(size[0] if isinstance(size, list) and len(size) == 1 else size, "vocab_size", 1, 2**32)
    except (LookupError, TypeError, ValueError) as error:
        reason = f"it has no {error}" if isinstance(error, LookupError) else error
        raise UserError(f"{path}: not nanoGPT's meta.pkl ({reason}): {_AGAIN}") from None
    itos = raw.get("itos")
    characters = []
    if isinstance(itos, (dict, list)) and len(itos) >= vocab_size:
        found = (itos.get(i) if isinstance(itos, dict) else itos[i] for i in range(vocab_size))
        characters = [c for c in found if isinstance(c, str) and len(c) == 1 and not "\ud800" <= c <= "\udfff"]
    if len(set(characters)) < vocab_size:
        return vocab_size, IDS_ONLY
    return vocab_size, {"kind": "characters", "characters": "".join(characters)}


def whole(value: object, name: str, least: int, most: int = 2**63 - 1) -> int:
    """A count out of a file, where a float may stand for it. Raises ValueError where it is none, or out of bounds."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not int or not least <= value <= most:
        told = f"{value:,}" if type(value) is int and value.bit_length() < 128 else str(type(value).__name__)
        raise UserError(f"{name}={told} is not a whole number from {least} to {most:,}")
    return value


def _read_pickle(path: Path) -> Any:
    """Plain values; nothing that the pickle names is imported or called."""
    try:
        if (size := require_file(path).stat().st_size) > pickles.MOST:
            raise UserError(f"it has {size:,} bytes, more than the {pickles.MOST:,} that such a file can have")
        return pickles.loads(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is a link to a file that is not there: {_AGAIN}") from None
    except ValueError as error:
        raise UserError(f"{path}: refused: {str(error).removeprefix(f'{path} ')}; {_AGAIN}") from None


def _ends(data: Array, count: int = 2**15) -> str:
    digest = hashlib.sha256(str(len(data)).encode())
    digest.update(data[:count].tobytes())
    digest.update(data[-count:].tobytes())
    return digest.hexdigest()
