"""The folder of a run: every name in it, its lock, and what ``config.json`` keeps."""

from __future__ import annotations

import itertools
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from folio import __version__, files
from folio.config.compose import possible
from folio.config.options import TrainConfig
from folio.config.table import those
from folio.errors import UserError

CONFIG = "config.json"  # the options that were given, and the run's id
METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"  # of `folio eval`
BEST = "best.json"  # step and loss of the best evaluation
CHECKPOINTS = "checkpoints"
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"  # in a folder of CHECKPOINTS
PICTURE = "loss.png"
LOG_TXT = "log.txt"
TENSORBOARD = "tensorboard"
PROFILE = "profile"
TRACE, OPERATIONS, MEMORY = "trace.json", "operations.txt", "memory.json"  # in the folder PROFILE
NANOGPT = "ckpt.pt"  # nanoGPT's checkpoint
MOVING = ".previous.unfinished"
_LOCK = ".folio.lock"


def checkpoint_folder(out_dir: Path, step: int) -> Path:
    return out_dir / CHECKPOINTS / f"step-{step:08d}"


def steps(out_dir: Path) -> list[int]:
    """The steps that have a checkpoint, in order; not verified."""
    there = [p for p in (out_dir / CHECKPOINTS).glob("step-*") if re.fullmatch("step-[0-9]{8,18}", p.name)]
    return sorted(step for p in there if p == checkpoint_folder(out_dir, step := int(p.name[5:])) and p.is_dir())


def hold(out_dir: Path) -> files.Lock:
    """Locks the folder for one run until the lock is released, and puts back files that a killed run was moving aside.

    Raises:
        InUseError: another run has the lock; names it. OSError: the folder cannot be written.
    """
    lock = files.Lock(out_dir / _LOCK, "another run trains there", "wait for its end, or choose another --out_dir")
    try:
        if (moving := out_dir / MOVING).is_dir():
            for path in list(moving.iterdir()):
                if not os.path.lexists(out_dir / path.name):
                    path.rename(out_dir / path.name)
            moving.rename(next_previous(out_dir)) if any(moving.iterdir()) else moving.rmdir()
    except BaseException:
        lock.release()
        raise
    return lock


def next_previous(out_dir: Path) -> Path:
    """The first free ``previous-N``."""
    return next(p for n in itertools.count(1) if not os.path.lexists(p := out_dir / f"previous-{n}"))


class Asked(NamedTuple):
    """What ``config.json`` says."""

    run: str  # its id
    options: dict[str, Any]  # that it was asked for, by flat name
    sealed: bool  # a sum bears it out, as older files have none


def asked(out_dir: Path) -> Asked:
    """What a run was asked for, held to the types and bounds of the options; those that are no more are passed over.

    Raises:
        FileNotFoundError: there is no ``config.json``.
        ValueError: its checksum does not match, or its content is not valid; names the remedy.
    """
    path = out_dir / CONFIG
    try:
        raw, sealed = files.read_sealed(path)
        if not sealed and raw.keys() != {"run", "folio", "asked"}:
            raise UserError(f"{path}: it holds {', '.join(raw) or 'nothing'}")
        if not isinstance(raw["run"], str) or not isinstance(raw["asked"], dict):
            raise UserError(f"{path}: its run is not text, or its asked is not an object")
        return Asked(raw["run"], {name: possible(path, name, value) for name, value in raw["asked"].items()}, sealed)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, LookupError) as error:
        why = str(error).removeprefix(f"{path}").lstrip(": ")
        raise UserError(
            f"{path} is damaged ({why}): restore a copy of it, or remove it and repeat the run's options with "
            f"--init_from=resume; --init_from={out_dir} loads the weights alone"
        ) from None


def keep_asked(out_dir: Path, run_id: str, options: dict[str, Any]) -> None:
    """Writes what ``asked`` reads, without the options that hold for one call."""
    passed_over = those(TrainConfig, role="call")
    kept = {name: value for name, value in options.items() if name not in passed_over}
    files.write_sealed(out_dir / CONFIG, {"run": run_id, "folio": __version__, "asked": kept})
