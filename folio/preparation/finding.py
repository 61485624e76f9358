"""Files, folders and globs that a user names → the files that can be read."""

from __future__ import annotations

import glob
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from folio.errors import UserError
from folio.files import require_file
from folio.records.console import say

_PACKED = ("", ".gz", ".zst")
_TABLE = (
    "python -c \"import pandas; pandas.read_csv('FILE', sep={}).to_json('FILE.jsonl', orient='records', lines=True)\" "
    "makes JSON lines of it"
)
_KINDS = {
    ".txt": "text",
    ".md": "text",
    **{f"{end}{packed}": "packed" if packed else "lines" for end in (".jsonl", ".ndjson") for packed in _PACKED},
    ".json.gz": "packed",
    ".json.zst": "packed",
    ".parquet": "parquet",
}
_REMEDIES = {  # for files of other kinds, by the end of their name
    ".json": "jq -c '.[]' FILE.json > FILE.jsonl makes JSON lines of a list",
    ".csv": _TABLE.format("','"),
    ".tsv": _TABLE.format("'\\t'"),
    **dict.fromkeys((".gz", ".zst", ".zip", ".tar", ".tgz", ".bz2", ".xz", ".7z"), "unpack it first"),
}


def kind_of(path: Path) -> str | None:
    """How a file is read, by the end of its name in any case; None if the kind is unknown."""
    return next((kind for end, kind in _KINDS.items() if path.name.lower().endswith(end)), None)


def find(named: Sequence[str]) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """Files, folders (with all subfolders) and globs → the files that can be read, and their relative names.

    A file with several names or links is used once. Files that are left out are reported.

    Raises:
        FileNotFoundError: nothing has that name.
        ValueError: it is a pipe, a device or a file of an unknown kind, or a folder has no file of a known kind.
        OSError: a folder cannot be read.
    """
    found: dict[Path, str] = {}
    for name in named:
        path = Path(name)
        if path.is_dir():
            here = {p: p.relative_to(path).as_posix() for p in _below(path)}
        elif path.exists():
            if kind_of(require_file(path)) is None:
                raise UserError(f"{path}: not a known kind of text file: {', '.join(_KINDS)}{_remedy([path])}")
            here = {path: path.name}
        else:
            here = {p: p.name for p in map(Path, sorted(glob.glob(name, recursive=True))) if not p.is_dir()}
            if not any(p.exists() for p in here):
                raise FileNotFoundError(f"{name}: no such file or folder, and no glob that finds one")
        taken = sorted((p for p in here if kind_of(p) and p.is_file()), key=Path.as_posix)
        others = [p for p in here if not (kind_of(p) and p.is_file())]
        if not taken:
            has = f" ({_counted(others)})" if others else ""
            known = f"of a known kind: {', '.join(_KINDS)}{_remedy(others)}"
            raise UserError(f"{name}: none of its {len(here)} files{has} is {known}")
        if others:
            say(f"{name}: other files, left out: {len(others)} ({_counted(others)})")
        for p in taken:
            found.setdefault(p.resolve(), here[p])
    return tuple(found), tuple(found.values())


def _below(root: Path) -> Iterator[Path]:
    """The files below a folder, without hidden ones. Each folder is listed once; links to folders come last."""
    seen = {(at.stat().st_dev, at.stat().st_ino) for at in root.resolve().parents}  # a link may lead back to them
    folders, links = deque([root]), deque[Path]()
    while folders or links:
        folder = folders.popleft() if folders else links.popleft()
        which = folder.stat().st_dev, folder.stat().st_ino
        if which in seen:
            continue
        seen.add(which)
        for path in sorted(folder.iterdir()):
            if path.name.startswith("."):
                continue
            if path.is_dir():
                (links if path.is_symlink() else folders).append(path)
            else:
                yield path


def _counted(paths: Sequence[Path]) -> str:
    """The number of files of each kind, for messages."""
    kinds = Counter(sorted(map(_ending, paths))).most_common()
    return ", ".join(f"{count:,} {kind}" for kind, count in kinds[:8]) + (", …" if len(kinds) > 8 else "")


def _ending(path: Path) -> str:
    if not path.is_file():
        return "pipe, socket or device" if path.exists() else "broken link"
    return (
        "".join(path.suffixes[-2:] if path.suffix.lower() in (".gz", ".zst") else path.suffixes[-1:])
        or "without an end"
    )


def _remedy(paths: Sequence[Path]) -> str:
    """How to make a readable file of one of these, or ""."""
    ends = (path.suffix.lower() for path in paths)
    return next((f"; {end}: {_REMEDIES[end]}" for end in ends if end in _REMEDIES), "")
