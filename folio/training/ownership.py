"""Distinguishes the files of an earlier run from those of other programs, which a run never replaces."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from folio import files
from folio.checkpoints import pt_files
from folio.errors import UserError
from folio.records import metrics, run_folder
from folio.records.log_txt import LINE
from folio.records.run_folder import (
    BEST,
    CHECKPOINTS,
    CONFIG,
    EVALUATIONS,
    LOG_TXT,
    MEMORY,
    METRICS,
    MODEL,
    MOVING,
    NANOGPT,
    OPERATIONS,
    OPTIMIZER,
    PICTURE,
    PROFILE,
    STATE,
    TENSORBOARD,
    TRACE,
    checkpoint_folder,
    next_previous,
    steps,
)

_NAMES = (
    CONFIG,
    METRICS,
    f"{METRICS}.damaged*",
    EVALUATIONS,
    BEST,
    CHECKPOINTS,
    PROFILE,
    TENSORBOARD,
    NANOGPT,
    PICTURE,
)
_OVERWRITTEN = (METRICS, BEST)  # by a resumed run, besides the config.json that it reads
_STEP = re.compile(r"step-\d{8,}(\.damaged)?")


def refuse_foreign(out_dir: Path, log_txt: bool, resuming: bool) -> None:
    """Checks that every file that a run would overwrite or move belongs to an earlier run, by the file's own content.

    nanoGPT's ``ckpt.pt`` and a ``log.txt`` in a known format count as files of a run. ``resuming``: the run resumes
    from the checkpoints, or the ``ckpt.pt``, that may be there.

    Raises:
        UserError: a file belongs to another program, or no file says that it belongs to a run; names it and the
            remedy.
    """
    names = (name for name in _NAMES if not (resuming and name == NANOGPT))
    owned = {path: _is_ours(path) for path in _existing(out_dir, names)}
    ours = any(mine for path, mine in owned.items() if path.name != NANOGPT)
    if resuming and any(_has_state(checkpoint_folder(out_dir, step)) for step in steps(out_dir)):
        ours, owned = True, {path: mine for path, mine in owned.items() if path.name in _OVERWRITTEN}
    owned |= {path: _is_log(path) for path in _existing(out_dir, [LOG_TXT] if log_txt else [])}
    for path, mine in owned.items():
        if not (ours if mine is None else mine):
            raise UserError(
                f"{path} was not written by a run of Folio, and this run would replace it: choose another --out_dir, "
                "or move it away"
            )


def move_aside(out_dir: Path, log_txt: bool) -> str:
    """Moves the files of an earlier run, all or none, to the first free ``previous-N``; returns a note, or ""."""
    there = _existing(out_dir, [*_NAMES, *[LOG_TXT] * log_txt])
    if not there:
        return ""
    moving = out_dir / MOVING
    files.make_folder(moving)
    for path in there:
        files.rename(path, moving / path.name)
    aside = next_previous(out_dir)
    files.rename(moving, aside)
    files.sync(out_dir)
    return f"an earlier run was in {out_dir}: its files were moved to {aside}"


def _existing(out_dir: Path, names: Iterable[str]) -> list[Path]:
    """The paths that exist, without empty folders."""
    paths = (path for name in names for path in sorted(out_dir.glob(name)))
    return [path for path in paths if not (path.is_dir() and not any(path.iterdir()))]


def _is_ours(path: Path) -> bool | None:
    """Whether a file or folder belongs to a run, by its own content; None if its content does not say."""
    if path.is_dir() != (path.name in (CHECKPOINTS, PROFILE, TENSORBOARD)):
        return False
    try:
        match path.name:
            case run_folder.CHECKPOINTS:
                return _are_checkpoints(path)
            case run_folder.PROFILE:
                return _only(path, {TRACE, OPERATIONS, MEMORY}.__contains__)
            case run_folder.TENSORBOARD:
                return _only(path, lambda name: name.startswith("events.out.tfevents"))
            case run_folder.CONFIG:
                return files.read_sealed(path)[0].keys() >= {"run", "asked"}
            case run_folder.BEST:
                best, sealed = files.read_sealed(path)
                return sealed or (None if best.keys() == {"step", "loss"} else False)
            case run_folder.METRICS | run_folder.EVALUATIONS:
                return metrics.holds_records(path)
            case run_folder.NANOGPT:
                pt_files.read(path)
                return True
    except (ValueError, OSError):
        return False if path.name == NANOGPT else None
    return None


def _only(path: Path, known: Callable[[str], bool]) -> bool | None:
    """None for a folder with known names only, which other programs may use as well; False for any other."""
    return None if all(known(child.name) for child in path.iterdir() if not child.name.startswith(".")) else False


def _are_checkpoints(path: Path) -> bool | None:
    """False for a folder with foreign files, True if a ``state.json`` is one of a run, None otherwise."""
    parts = {MODEL, OPTIMIZER, STATE}
    folders = [child for child in path.iterdir() if not child.name.startswith(".")]
    for child in folders:
        if not _STEP.fullmatch(child.name) or not child.is_dir() or _only(child, parts.__contains__) is False:
            return False
    return any(_has_state(child) for child in folders) or None


def _has_state(path: Path) -> bool:
    try:
        return bool(files.read_json(path / STATE).keys() >= {"run", "sha256"})
    except (ValueError, OSError, AttributeError):
        return False


def _is_log(path: Path) -> bool:
    """Whether the first line of a ``log.txt`` is in one of the known formats."""
    try:
        with files.open_regular(path) as file:
            return bool(LINE.fullmatch(file.readline(1 << 16)))
    except (ValueError, OSError):
        return False


def unwritable(out_dir: Path, error: OSError) -> OSError:
    """The error for a folder that cannot be written, with the remedy."""
    room = "make room there, or " * (error.errno in (errno.ENOSPC, errno.EDQUOT))
    return OSError(f"out_dir={out_dir} cannot be written ({error.strerror}): {room}choose another --out_dir")
