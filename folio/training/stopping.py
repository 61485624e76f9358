"""Why a run stops: its stop reasons, the signals, and what is not finite."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from folio.records import run_folder
from folio.training.run import Run

_SIGNALS = [s for s in signal.Signals if s.name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")]  # those of this system
EXIT = {s.name: 128 + s for s in _SIGNALS}  # stop reason → exit code of the process, else 0
ENDS = ("max_iters", "patience", "max_minutes")  # stop reasons at which everything is measured once more
# summed over the ranks, of which there are fewer than 2¹⁴, the largest tells; float32 has powers of two exactly
WISHES = {"SIGTERM": 2.0**56, "SIGHUP": 2.0**42, "SIGUSR1": 2.0**28, "SIGINT": 2.0**14, "max_minutes": 1.0}


def finished(run: Run) -> str:
    """Why nothing is left to be done, or ""."""
    patience = run.config.optimizer.patience
    if run.state.step >= run.config.optimizer.max_iters:
        return "max_iters"
    return "patience" if 0 < patience <= run.state.evaluations_without_improvement else ""


def wish(run: Run) -> str:
    """Why this rank would stop, or ""."""
    return run.signal or ("max_minutes" if time.perf_counter() > run.until else "")


def largest(wishes: float) -> str:
    """Of the wishes that the ranks summed up, the one that counts; "" where there is none."""
    return next((name for name, mark in WISHES.items() if wishes >= mark), "")


def not_finite(run: Run, what: str, updates: int) -> FloatingPointError:
    """What is said after so many ``updates``; before the first of this process its weights are the cause."""
    kept = run_folder.steps(run.out_dir)
    remedy = "lower --learning_rate, " + (f"or resume from step {kept[-1]}" if kept else "there is no checkpoint yet")
    if updates == run.begun:
        earlier = [step for step in kept if step < updates]
        remedy = "that is of the weights with which it began: " + (
            f"move {run_folder.checkpoint_folder(run.out_dir, updates)} away and resume from step {earlier[-1]}"
            if earlier
            else "begin with others, or with another --dtype"
        )
    return FloatingPointError(f"{what}, training stopped there: {remedy}")


@contextmanager
def signals(run: Run) -> Iterator[None]:
    """A signal ends the run after the step, with a checkpoint; a second SIGINT ends it at once.

    Those are SIGINT, SIGTERM, SIGHUP (a connection that is lost) and SIGUSR1 (Slurm's warning). One that the caller
    has ignored, as nohup does SIGHUP, stays ignored; but a shell ignores SIGINT for every job in the background.
    """

    def receive(number: int, frame: Any) -> None:
        if run.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        run.signal = signal.Signals(number).name
        with suppress(RuntimeError):  # in the middle of another line
            run.log.say(f"{run.signal}: finishing the step and saving; Ctrl-C to leave at once")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = [s for s in _SIGNALS if s == signal.SIGINT or signal.getsignal(s) != signal.SIG_IGN]
    before = {s: signal.signal(s, receive) for s in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
