"""Finds an earlier run in the folder and resumes it."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from folio import files
from folio.checkpoints import checkpoint, find, pt_files
from folio.checkpoints.pt_files import PtFile
from folio.checkpoints.safetensors_files import Tensors
from folio.checkpoints.state import Skipped, State
from folio.config.compose import over_files
from folio.config.options import TrainConfig
from folio.config.table import flat
from folio.config.values import COMMAND_LINE
from folio.errors import UserError
from folio.machine import launch
from folio.machine.shares import AVERAGE
from folio.model.config import GPTConfig
from folio.records import run_folder
from folio.records.metrics import rewind
from folio.records.run_folder import METRICS, NANOGPT
from folio.training import ownership
from folio.training.ownership import unwritable
from folio.training.run import FormerRun, Run

_SHAPE = tuple(f.name for f in fields(GPTConfig) if f.name != "dropout")


_PARTS = {"model", "data", "scaler", "resolved"} | {f.name for f in fields(State)}  # the keys of every state.json


def has_run(out_dir: Path) -> bool:
    """Whether there is a run that ``init_from=resume`` or ``auto`` would resume."""
    return bool(run_folder.steps(out_dir)) or (out_dir / NANOGPT).is_file()


def find_former_run(out_dir: Path, init_from: str, known: str = "") -> FormerRun | None:
    """The run that ``init_from`` resumes; only the run with the ``known`` id, if one is given.

    Raises:
        FileNotFoundError: there is none, and ``init_from`` is ``resume``.
        UserError: every checkpoint is damaged.
    """
    if init_from not in ("resume", "auto"):
        return None
    have = run_folder.steps(out_dir)
    if not have and (out_dir / NANOGPT).exists():
        nanogpt = pt_files.read(out_dir / NANOGPT)
        return FormerRun(nanogpt.state["run"], nanogpt)
    if not have:
        if init_from == "auto":
            return None
        raise FileNotFoundError(f"nothing to resume in {out_dir}: no checkpoint is there; use --init_from=scratch")
    path = out_dir / run_folder.CONFIG
    try:
        run_id, asked, sealed = run_folder.read_config(out_dir)
        notes = (
            () if sealed else (f"{path} has no checksum, since an older version wrote it: it is used without a check",)
        )
    except FileNotFoundError:
        run_id, asked = "", {}
        notes = (f"{path} is missing: options that are not given now take their defaults",)
    for step in reversed(have):
        path = run_folder.existing_folder(out_dir, step)
        try:
            state, _ = checkpoint.state_of(path)
        except ValueError:
            continue
        if state.keys() >= _PARTS:
            found = FormerRun(run_id or state["run"], checkpoint.Checkpoint(path, state, asked), notes)
            return None if known and found.id != known else found
    raise UserError(f"every checkpoint in {out_dir} is damaged: start afresh with --init_from=scratch")


def overlay(config: TrainConfig, former: FormerRun) -> tuple[TrainConfig, list[str]]:
    """The config, by defaults < files < the former run's options < command line; and notes about that run.

    Raises:
        UserError: the command line gives another depth, or another limit of its operations.
    """
    asked, notes = former.found.asked, list(former.notes)
    for name in ("depth", "max_flops") if asked else ():
        mine, theirs = getattr(config, name), asked.get(name, 0)
        if config.sources.get(name) == COMMAND_LINE and mine != theirs:
            more = ": set --max_iters" * (name == "max_flops")
            raise UserError(f"--{name}={mine:g} does not fit the checkpoint, which has {name}={theirs:g}{more}")
    merged, overridden = over_files(config, asked)
    notes += overridden
    o = merged.optimizer
    longer = o.max_iters > max(asked.get("max_iters", o.max_iters), o.lr_decay_iters)
    if longer and o.decay_lr and not o.restart_interval and o.lr_decay_iters == asked.get("lr_decay_iters"):
        notes.append(
            f"max_iters grew from {asked['max_iters']} to {o.max_iters}: beyond lr_decay_iters={o.lr_decay_iters} "
            f"the learning rate stays at min_lr={o.min_lr:g}"
        )
    return merged, notes


def shape_of(given: GPTConfig, config: TrainConfig, former: FormerRun | None) -> tuple[GPTConfig, list[str]]:
    """The given model's shape with this run's dropout and, if asked for, fewer positions or more token ids; and notes.

    Raises:
        UserError: the command line changes the shape in any other way.
    """
    notes = []
    chosen: dict[str, Any] = {"dropout": config.model.dropout}
    for name in _SHAPE:
        mine, theirs, source = getattr(config.model, name), getattr(given, name), config.sources.get(name)
        # the former run asked for this crop, and ended before its first checkpoint
        was_asked = name == "block_size" and former and former.found.asked.get(name) == mine
        if mine == theirs or mine == "auto" or not (source or was_asked):
            continue
        cropped = name == "block_size" and mine < theirs and (source == COMMAND_LINE or was_asked or not former)
        grown = name == "vocab_size" and mine > theirs and not former
        if cropped or grown:
            chosen[name] = mine
            notes.append(f"{name} {'cropped' if cropped else 'grown'} from {theirs} to {mine}")
        elif source == COMMAND_LINE:
            raise UserError(f"--{name}={mine} does not fit the checkpoint, which has {name}={theirs}")
        else:
            notes.append(f"{name}={theirs} from the checkpoint, not {mine} from {source}")
    return replace(given, **chosen), notes


def restore(run: Run, former: FormerRun) -> list[str]:
    """Loads weights, optimizer and position of the newest checkpoint that verifies; returns notes.

    Raises:
        UserError: no checkpoint is whole, or its tensors do not fit.
    """
    found, notes = _whole_checkpoint(run, former)
    state, positions = found.state, run.model.config.block_size

    def cropped(tensors: Tensors) -> Tensors:
        for name, tensor in tensors:
            yield name, tensor[:positions] if name.startswith("transformer.wpe.weight") and tensor.dim() else tensor

    checkpoint.load_weights(run.model, cropped(found.weights()))
    theirs, mine = state.get("optimizer", "AdamW"), type(run.optimizer).__name__
    if mine == theirs:
        kept = run.config.optimizer.ema_decay > 0
        slots = ((name, slot) for name, slot in found.slots() if kept or not name.endswith(f"/{AVERAGE}"))
        checkpoint.load_slots(run.optimizer, run.model, cropped(slots))
    else:
        notes.append(f"the checkpoint's optimizer is {theirs}, that of this run {mine}: its state starts from zero")
    if name := run.runtime.find_not_finite(run.model, run.optimizer):
        raise found.not_finite(name)
    if state["scaler"]:  # empty unless that run was in float16
        run.runtime.scaler.load_state_dict(state["scaler"])
    try:
        run.state, run.owed = State.of(state), set(state.get("owed", ()))
        run.skipped = Skipped.of(state.get("skipped", {}))
    except (TypeError, ValueError) as error:
        raise UserError(f"{found.path} is damaged: {error}; start afresh with --init_from=scratch") from None
    if mine != theirs:
        run.owed.discard("ema")  # the average starts again too, after the next update
    run.runtime.guard.restore(run.skipped.losses)
    run.begun = run.saved = run.state.step
    run.clock.started -= run.state.seconds
    notes.append(f"resuming {found.path if isinstance(found, PtFile) else run.out_dir} at step {run.begun}")
    if run.begun and mine == theirs and not run.optimizer.state:
        notes.append("the checkpoint has no optimizer state: Adam's moments start from zero")
    return notes + _compare(run, found)


def _whole_checkpoint(run: Run, former: FormerRun) -> tuple[checkpoint.Checkpoint, list[str]]:
    """The checkpoint to restore, and notes about damaged ones, which are set aside unless the run is read-only."""
    if isinstance(former.found, PtFile):
        return former.found, []
    found, notes = run.runtime.broadcast(lambda: find.latest(run.out_dir, former.id, aside=not run.read_only))
    if found is None:
        raise UserError(
            f"{'; '.join(notes)}: no checkpoint in {run.out_dir} is whole; start afresh with --init_from=scratch"
        )
    return found, notes


def _compare(run: Run, found: checkpoint.Checkpoint) -> list[str]:
    """Adapts the position to this run's rows; returns notes on what differs from the run that made the checkpoint."""
    state, notes, row = found.state, [], run.tokens.block_size
    if (before := state.get("row", found.config().block_size)) != row:
        notes.append(
            f"a row had {before} tokens and has {row}: the data continues at the same token, "
            "and the best evaluation is reset"
        )
        run.state.rows = run.state.rows * before // row
        run.state.best, run.state.evaluations_without_improvement = None, 0
    why = run.runtime.choices.differences(state["resolved"])
    if state["data"] is None:
        notes.append("the data continues in this program's order: which rows the other program read is unknown")
    elif state["data"] != run.tokens.fingerprint():
        why.append(f"the data in {run.tokens.name} changed")
    if why:
        notes.append(f"exact to rounding only: {'; '.join(why)}")
    return notes


def take_folder(run: Run, former: FormerRun | None) -> list[str]:
    """Makes the run's folder its own: a new run moves an earlier one aside, a resumed one rewinds its metrics.

    Returns notes. Raises OSError if the folder cannot be written.
    """
    out_dir, notes = run.out_dir, []
    try:
        if former and not run.state.best:
            files.remove(out_dir / run_folder.BEST)
        if former:
            imported = former.found.state["data"] is None  # so this program measured nothing yet
            interval = 0 if imported else former.found.asked.get("log_interval", 1)
            notes = rewind(out_dir / METRICS, run.begun, run.owed, interval)
        else:
            notes = [*filter(None, [ownership.move_aside(out_dir, bool(run.config.logging.log_txt))])]
        run_folder.write_config(out_dir, run.id, flat(run.config))
        launch.remember_run(run.number, run.id)
    except OSError as error:
        raise unwritable(out_dir, error) from None
    return notes
