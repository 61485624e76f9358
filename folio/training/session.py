"""A run in a program or a notebook: it is built, trained as often as wanted, and used in between.

A run holds its folder only while it trains or saves. In between, it has no lock and no open file: a notebook may run
the same cells again, and a run that is dropped leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from folio.config.options import TrainConfig
from folio.errors import UserError
from folio.records import run_folder
from folio.training import loop, start
from folio.training.callbacks import Callback, work_of
from folio.training.objective import UserLoss
from folio.training.run import Run, last_line, leave_folder, nothing_to_do
from folio.training.stopping import finished
from folio.training.work import save_checkpoint


def build(config: TrainConfig, callbacks: Sequence[Callback] = (), loss: Callable[..., Tensor] | None = None) -> Run:
    """A run that was built and checked, and does not hold its folder yet, which stays as it is.

    Raises:
        UserError, FileNotFoundError, OSError: one line that names the option or file and the remedy.
    """
    if not isinstance(callbacks, Iterable):
        raise UserError(f"callbacks is of type {type(callbacks).__name__}: must be a list of pairs (due, function)")
    work = [work_of(number, callback) for number, callback in enumerate(callbacks)]
    run = start.assemble(config, work, None if loss is None else UserLoss(loss))
    if run.lock:
        run.left = _seen(run.out_dir)
        run.lock.release()
        run.lock = None
    run.write_checkpoint = save
    return run


def fit(run: Run, again: str = "folio.fit(run) continues it") -> str:
    """Trains until the run is complete, a limit is reached or a signal comes; returns the reason.

    Each call continues where the last one stopped, to the same bits as a run that was never stopped.

    ``again``: how to continue the run, for the last line.

    Raises:
        UserError: an error ended the run before; else as ``holding``. Whatever training raises.
    """
    _require_whole(run)
    if run.worked == run.state.step and not run.owed and (complete := finished(run)):
        run.log.say(nothing_to_do(run))
        return complete
    with holding(run):
        _continue(run)
        start.follow(run)
        run.training = True
        try:
            loop.fit(run)
        except BaseException as error:
            run.stop, run.failed = "", type(error).__name__
            raise
        finally:
            run.training = False
        run.log.say(last_line(run, again))
    return run.stop


def _continue(run: Run) -> None:
    """Prepares a run for its next steps, as if another process resumed it here."""
    run.stop = run.signal = ""
    if run.worked >= 0:  # it has trained before
        run.begun, run.caught_up = run.state.step, False
        run.runtime.drop_gradients(run.optimizer)  # a signal may have stopped it between two micro steps
    if minutes := run.config.optimizer.max_minutes:
        run.clock.limit(minutes)


@contextmanager
def holding(run: Run) -> Iterator[None]:
    """Inside, the run's folder is locked and its files are open.

    Raises:
        UserError: the run is training, so a callback called this; it has left its process group; another run holds
            the folder, or has changed it since this run used it. OSError: the folder cannot be written.
    """
    if run.training:
        raise UserError("this run is training: a callback cannot train it, but only generate, evaluate and save")
    run.runtime.require_group()
    run.clock.begin(run.state.seconds)
    try:
        _take(run)
        yield
    finally:
        run.state.seconds = run.clock.seconds()
        try:
            run.log.close()
            run.runtime.finish_writing()
            if run.lock:
                run.left = _seen(run.out_dir)
        finally:
            leave_folder(run)


def save(run: Run) -> Path:
    """Writes a checkpoint and returns its folder; in a callback, after the step's work.

    Raises:
        UserError: as ``fit``. OSError: it cannot be written.
    """
    _require_whole(run)
    if run.training:
        run.save_due = True
    else:
        why, run.stop = run.stop, "save"  # so that it waits, and that a write that fails is an error
        try:
            with holding(run):
                save_checkpoint(run)
        finally:
            run.stop = why
    return run_folder.checkpoint_folder(run.out_dir, run.state.step)


def _require_whole(run: Run) -> None:
    """Raises UserError if an error ended the run, perhaps in the middle of an update."""
    if run.failed:
        kept = run_folder.steps(run.out_dir)
        remedy = f", with init_from='resume', which continues from step {kept[-1]}" if kept else ""
        raise UserError(f"{run.failed} ended this run at step {run.state.step}: build it again{remedy}")


def _take(run: Run) -> None:
    if not run.read_only:
        run.runtime.broadcast(partial(_lock, run))
    if not run.began:
        start.begin(run)
    elif not run.read_only:
        start.open_files(run)


def _lock(run: Run) -> None:
    lock = start.hold(run.config)
    if _seen(run.out_dir) == run.left:
        run.lock = lock
        return
    if lock:
        lock.release()
    raise UserError(
        f"{run.out_dir} is not as this run left it, since another run was there: build the run again, with "
        "init_from='resume' to continue what is there"
    )


def _seen(out_dir: Path) -> tuple[Any, ...]:
    """What a run changes in its folder: the run's id, the newest checkpoint, the size of the records."""
    run_id, size = "", 0
    with suppress(OSError, ValueError):
        run_id = run_folder.read_config(out_dir).run
    with suppress(OSError):
        size = (out_dir / run_folder.METRICS).stat().st_size
    return run_id, run_folder.steps(out_dir)[-1:], size
