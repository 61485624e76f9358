"""Which files of a folder are one data set, by their names.

A folder has one data set: nanoGPT's two files if both are there, else one family of files, whose names differ only in
the split and a number. Other files are ignored, and a note names them. A glob selects every file that it finds.
"""

from __future__ import annotations

import fnmatch
import glob
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from folio.data.token_files import AGAIN, FORMATS, SPLITS, Split
from folio.errors import UserError

_NANOGPT = ("train.bin", "val.bin")
_NAMED = {
    split: re.compile(rf"(?<![a-z])(?:{words})(?![a-z])", re.IGNORECASE)
    for split, words in (("train", "train|training"), ("val", "val|valid|validation"))
}
# a number that is not part of a word, such as 000001 and 3-of-10
_NUMBER = re.compile(r"[-_. ]?(?<![^\W_])(\d+)(?:[-_. ]of[-_. ](\d+))?(?![^\W_])")


class _Name(NamedTuple):
    """The parts of a file's name: split, number, total (the 10 of 3-of-10); ``family`` is the rest of the name."""

    split: Split | None
    family: str
    number: int | None
    of: int | None


def _name(path: Path) -> _Name:
    """``edufineweb_train_000001.npy`` → train, ``edufineweb_*.npy``, 1.

    The number is the last one after the split's word, else one at the very beginning; in a name without a split, the
    first one.
    """
    split = split_of(path)
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


def split_of(path: Path) -> Split | None:
    """The split in a file's name; for datatrove's files also in their folder's name."""
    for name in (path.name, path.parent.name if path.suffix == ".ds" else ""):
        found = [split for split in SPLITS if _NAMED[split].search(name)]
        if len(found) > 1:
            raise UserError(f"{path} has both train and val in its name: rename it after its split")
        if found:
            return found[0]
    return None


def token_files(pattern: str) -> list[Path]:
    """The files of any format that a glob finds, in the order of their names."""
    return [p for p in map(Path, sorted(glob.glob(pattern))) if p.suffix in FORMATS and not p.is_dir()]


def select_by_glob(pattern: Path) -> tuple[list[Path], str]:
    """The files that a glob finds, whatever their families, and a note of what it combines or leaves out.

    Raises:
        FileNotFoundError: it finds none. ValueError: files of several formats.
    """
    files = token_files(str(pattern))
    if not files:
        raise FileNotFoundError(f"{pattern} contains no token files (.bin, .npy, .ds): prepare it")
    if len(suffixes := sorted({p.suffix for p in files})) > 1:
        first = ", ".join(next(p.name for p in files if p.suffix == s) for s in suffixes)
        raise UserError(
            f"{pattern} finds {' and '.join(suffixes)} files, {first}: name those of one format, such as "
            f"--data_dir='{files[0].parent / '*'}{suffixes[0]}'"
        )
    named = [p for p in files if split_of(p)]
    if not named:
        return files, ""
    families = sorted({_name(p).family for p in named})
    together = f"files of several names are used as one data set: {_first_three(families)}" if len(families) > 1 else ""
    return named, one_line(pattern, together, note_of_others(files, named))


def select(folder: Path) -> tuple[list[Path], str]:
    """The files of the one data set in a folder, and a note of other files and of shards missing from the sequence.

    Raises:
        FileNotFoundError: there are none, or a split is missing. ValueError: there are several data sets.
    """
    here = glob.escape(str(folder))
    files = token_files(f"{here}/*")
    both = [p for p in files if all(_NAMED[split].search(p.name) for split in SPLITS)]
    named = [p for p in files if p not in both and split_of(p)]
    if not named and not both:
        named = [p for split in SPLITS for p in token_files(f"{here}/{split}/*.ds")]
        files += named
    if not files:
        raise FileNotFoundError(f"{folder} contains no token files (.bin, .npy, .ds): prepare it")
    exact = [p for p in named if p.name in _NANOGPT]
    if len(exact) < len(_NANOGPT):
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
    return exact, one_line(folder, _missing_numbers(exact), note_of_others(files, exact))


def _families(files: Sequence[Path]) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for p in files:
        found.setdefault(_name(p).family, []).append(p)
    return found


def _ambiguous(folder: Path, families: list[list[Path]]) -> UserError:
    """The error for several families; it suggests a glob that finds exactly one of them, if there is one."""
    names = [p.name for family in families for p in family]
    example = ""
    for family in families:
        own, stem = [p.name for p in family], _name(family[0]).family
        if pattern := next((p for p in (stem, f"*{stem}") if fnmatch.filter(names, p) == own), None):
            example = f", such as --data_dir='{glob.escape(str(folder))}/{pattern}'"
            break
    return UserError(
        f"{folder} holds several data sets ({_first_three([family[0].name for family in families])}): name the "
        f"files of one with a glob{example}, or move the others away"
    )


def _incomplete(folder: Path, named: list[Path], files: list[Path]) -> Exception:
    """The error for a folder without one family that has both splits."""
    firsts = {split: next((p for p in named if split_of(p) == split), None) for split in SPLITS}
    if (train := firsts["train"]) and (val := firsts["val"]):
        return UserError(
            f"{train} and {val.name} are not of one data set, since their names differ in more than the split and a "
            "number: rename them, or name both with a glob as --data_dir"
        )
    if not named:
        split_of(files[0])
    return missing_split(folder, "val" if firsts["train"] else "train", (named or files)[-1])


def missing_split(path: Path, split: Split, given: Path) -> FileNotFoundError:
    """The error for a split without a file; ``given`` is a file of the other one."""
    name = given.with_name(f"{split}.bin") if given.name in _NANOGPT else f"{path}: {split}"
    return FileNotFoundError(f"{name} is missing: {AGAIN}, or name a file …_{split}_000000{given.suffix}")


def _refuse_twins(family: list[Path]) -> None:
    """Raises ValueError if two files of a split have the same number, or one of several has none."""
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
    """A note of the shards missing from a sequence. It runs over both splits, as build-nanogpt's, or over each."""
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
    return (
        f"{count:,} {shards} missing from the sequence: {_first_three(list(map(str, missing)), count)}" if count else ""
    )


def note_of_others(files: list[Path], chosen: list[Path]) -> str:
    """A note of the files that are not among the chosen ones, or ""."""
    kept = set(chosen)
    others = [p.name for p in files if p not in kept]
    return f"not part of the data set, and left alone: {_first_three(others)}" if others else ""


def _first_three(names: Sequence[str], count: int = 0) -> str:
    """The first three names, and how many more there are; ``count``: of all names, if not all are given."""
    more = (count or len(names)) - 3
    return ", ".join(names[:3]) + (f" and {more:,} more" if more > 0 else "")


def one_line(path: Path, *notes: str) -> str:
    """One line about a data set from several notes; empty ones are left out, and the path is not repeated."""
    joined = "; ".join(part.removeprefix(f"{path}: ") for part in notes if part)
    return f"{path}: {joined}" if joined else ""
