"""The folder of a run: every name in it, its lock, and what ``config.json`` keeps."""

from __future__ import annotations

import itertools
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from folio import __version__, files
from folio.config.compose import checked_value
from folio.config.options import TrainConfig
from folio.config.table import options_with
from folio.errors import UserError
from folio.locks import Lock

CONFIG = "config.json"  # the options that were given, and the run's id
METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"  # of `folio eval`
BEST = "best.json"  # step and loss of the best evaluation
CHECKPOINTS = "checkpoints"
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"  # in a folder of CHECKPOINTS
PICTURE = "loss.png"
REPORT = "report.html"
COMPARISON = "compare"  # the stem of a picture or page about several runs, in the working folder
LOG_TXT = "log.txt"
TENSORBOARD = "tensorboard"
PROFILE = "profile"
TRACE, OPERATIONS, MEMORY = "trace.json", "operations.txt", "memory.json"  # in the folder PROFILE
NANOGPT = "ckpt.pt"  # nanoGPT's checkpoint
MOVING = ".previous.unfinished"  # holds the files of an earlier run while they are moved to previous-N
REPLACED = ".replaced"  # suffix of a checkpoint while a new one of the same step replaces it
_LOCK = ".folio.lock"


def checkpoint_folder(out_dir: Path, step: int) -> Path:
    return out_dir / CHECKPOINTS / f"step-{step:08d}"


def output_of(out_dirs: Sequence[Path], name: str) -> Path:
    """Where the picture or page of this name goes: beside its run; that of several runs into the working folder."""
    several = len({out_dir.resolve() for out_dir in out_dirs}) > 1
    return Path(COMPARISON).with_suffix(Path(name).suffix) if several else out_dirs[0] / name


def replaced_folder(out_dir: Path, step: int) -> Path:
    """The place of an old checkpoint while a new one of the same step replaces it."""
    return out_dir / CHECKPOINTS / f".step-{step:08d}{REPLACED}"


def steps(out_dir: Path) -> list[int]:
    """The steps that have a checkpoint, under its own name or moved aside, in order. They are not verified."""
    pattern = re.compile(rf"\.?step-([0-9]{{8,18}})(?:{re.escape(REPLACED)})?")
    try:
        with os.scandir(out_dir / CHECKPOINTS) as entries:  # read once: a run may remove checkpoints meanwhile
            names = [entry.name for entry in entries if entry.is_dir()]
    except OSError:
        return []
    found = {(int(m[1]), name) for name in names if (m := pattern.fullmatch(name))}
    folders = (checkpoint_folder, replaced_folder)
    return sorted({step for step, name in found if name in [folder(out_dir, step).name for folder in folders]})


def existing_folder(out_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step is now: under its own name, or moved aside by a ``save`` that is not complete.

    A reader calls this, since only ``hold``, under the run's lock, may move the checkpoint back.
    """
    final, replaced = checkpoint_folder(out_dir, step), replaced_folder(out_dir, step)
    return replaced if replaced.is_dir() and not final.exists() else final


def remove_checkpoint(path: Path) -> None:
    """Renames a checkpoint, then deletes its files, so that no reader finds half a checkpoint. Warns if that fails."""
    gone = path.with_name(f".{path.name.removeprefix('.')}.gone")
    try:
        files.remove(gone)
        files.rename(path, gone)
    except OSError as error:
        _warn_of_rest(path, error)
    else:
        delete(gone)


def delete(path: Path) -> None:
    """Deletes a file or folder that no reader looks at. Warns if that fails."""
    try:
        files.remove(path)
    except OSError as error:
        _warn_of_rest(path, error)


def _warn_of_rest(path: Path, error: OSError) -> None:
    warnings.warn(f"{path} could not be removed ({files.reason(error)}), and takes up disk space", stacklevel=3)


def hold(out_dir: Path) -> Lock:
    """Locks the folder for one run until the lock is released. Undoes moves that a killed run did not finish.

    Raises:
        InUseError: another run has the lock; names it. UserError: one of its folders is a link.
        OSError: the folder cannot be written.
    """
    for name in (CHECKPOINTS, MOVING, PROFILE, TENSORBOARD):
        files.require_own_folder(out_dir / name)
    lock = Lock(out_dir / _LOCK, "another run trains there", "wait for its end, or choose another --out_dir")
    try:
        _put_back_files(out_dir)
        _put_back_checkpoints(out_dir)
    except BaseException:
        lock.release()
        raise
    return lock


def _put_back_files(out_dir: Path) -> None:
    """Undoes an unfinished move to ``previous-N``. Files whose names are taken again are moved to ``previous-N``."""
    moving = out_dir / MOVING
    if not moving.is_dir():
        return
    for path in list(moving.iterdir()):
        if not os.path.lexists(out_dir / path.name):
            files.rename(path, out_dir / path.name)
    if any(moving.iterdir()):
        files.rename(moving, next_previous(out_dir))
    else:
        files.remove_empty(moving)


def _put_back_checkpoints(out_dir: Path) -> None:
    """Undoes the replacement of a checkpoint if the new one is not in its place; otherwise removes the old one."""
    for replaced in list((out_dir / CHECKPOINTS).glob(f".step-*{REPLACED}")):
        final = replaced.with_name(replaced.name.removeprefix(".").removesuffix(REPLACED))
        if final.exists():
            remove_checkpoint(replaced)
        else:
            files.rename(replaced, final)


def next_previous(out_dir: Path) -> Path:
    """The first free ``previous-N``."""
    return next(p for n in itertools.count(1) if not os.path.lexists(p := out_dir / f"previous-{n}"))


class RunConfig(NamedTuple):
    """The content of ``config.json``."""

    run: str  # its id
    options: dict[str, Any]  # those that were given, by flat name
    sealed: bool  # the file has a checksum of itself; older files have none


def read_config(out_dir: Path) -> RunConfig:
    """Reads ``config.json``; checks the options' types and bounds. Options that no longer exist are kept unchecked.

    Raises:
        FileNotFoundError: there is no ``config.json``.
        ValueError: its checksum does not match, or its content is not valid; names the remedy.
    """
    path = out_dir / CONFIG
    try:
        raw, sealed = files.read_sealed(path)
        if not sealed and raw.keys() != {"run", "folio", "asked"}:
            raise UserError(f"{path}: its keys are {', '.join(raw) or 'none'}, not run, folio and asked")
        if not isinstance(raw["run"], str) or not isinstance(raw["asked"], dict):
            raise UserError(f"{path}: its 'run' is not text, or its 'asked' is not an object")
        options = {name: checked_value(path, name, value) for name, value in raw["asked"].items()}
        return RunConfig(raw["run"], options, sealed)
    except FileNotFoundError:
        raise
    except OSError as error:
        why = f"{path} cannot be read: {error.strerror or error}"
    except LookupError as error:
        why = f"{path} is damaged: it has no {error}"
    except ValueError as error:  # which names the file
        why = str(error)
    raise UserError(
        f"{why}: restore a copy of that file, or remove it and repeat the run's options with --init_from=resume; "
        f"--init_from={out_dir} loads the weights alone"
    )


def write_config(out_dir: Path, run_id: str, options: dict[str, Any]) -> None:
    """Writes ``config.json``, without the options that apply to one call only."""
    of_this_call = options_with(TrainConfig, role="call")
    kept = {name: value for name, value in options.items() if name not in of_this_call}
    files.write_sealed(out_dir / CONFIG, {"run": run_id, "folio": __version__, "asked": kept})
