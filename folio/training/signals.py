"""Signals: training finishes the micro step, saves and exits; before the first update the process exits at once."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from folio import locks
from folio.records.console import say

if TYPE_CHECKING:
    from folio.training.run import Run

# those that this system has
_SIGNALS = [s for s in signal.Signals if s.name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")]
EXIT_CODES = {s.name: 128 + s for s in _SIGNALS}  # stop reason → exit code of the process, else 0
_TO_AGREE = 6.0  # seconds in which a run without updates may end by itself, together with the other ranks
_TO_UNWIND = 1.0  # seconds in which a second SIGINT may end the run by KeyboardInterrupt
_WATCHERS: list[_Watcher] = []  # at most one


class _Watcher:
    """A thread that ends the process after a signal if the main thread does not.

    The main thread may wait for a compiler or for another rank, in C code, in which Python calls no signal handler. The
    kernel tells this thread of each signal by ``signal.set_wakeup_fd``.
    """

    def __init__(self) -> None:
        self.run: Run | None = None  # the last that was in ``save_on_signal``
        self.training = False  # that run is in there now
        self._over = threading.Event()
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()
        self._before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)

    def close(self) -> None:
        signal.set_wakeup_fd(self._before)
        self._over.set()
        self._writer.close()
        self._thread.join()
        self._reader.close()

    def _watch(self) -> None:
        numbers, first = {int(s): s.name for s in _SIGNALS}, True
        while byte := self._reader.recv(1):
            if not (name := numbers.get(byte[0])):
                continue  # of another handler
            # ``fit`` has just ended by a signal, and the process is about to exit
            ended = self.run is not None and (self.run.signal or self.run.stop in EXIT_CODES)
            if first and not self.training and not ended:
                _exit(name)
            elif first:
                self._exit_later(name, _TO_AGREE, self._has_no_update)
            elif name == "SIGINT":
                self._exit_later(name, _TO_UNWIND, lambda: True)
            first = False

    def _has_no_update(self) -> bool:
        return self.run is not None and self.run.state.step == self.run.begun

    def _exit_later(self, name: str, seconds: float, still: Callable[[], bool]) -> None:
        def wait() -> None:
            if not self._over.wait(seconds) and still():
                _exit(name)

        threading.Thread(target=wait, daemon=True).start()


@contextmanager
def exit_on_signal() -> Iterator[None]:
    """Inside, a signal ends this process at once, with 128 plus its number, except in ``save_on_signal``.

    There is nothing to save then. If several ranks get the signal, one of them reports it. Only for a process of a
    command, since its other threads end too. Outside of the main thread, this does nothing.
    """
    if _WATCHERS or threading.current_thread() is not threading.main_thread():
        yield
        return
    with _handling(lambda number, frame: None):
        _WATCHERS.append(_Watcher())
        try:
            yield
        finally:
            _WATCHERS.pop().close()


@contextmanager
def save_on_signal(run: Run) -> Iterator[None]:
    """Inside, a signal ends the run after the micro step, with a checkpoint; a second SIGINT ends it at once.

    The signals are SIGINT, SIGTERM, SIGHUP (a lost connection) and SIGUSR1 (Slurm's warning). Inside
    ``exit_on_signal``, the process also exits if it makes no update within seconds, since compiling may take minutes.
    """

    def receive(number: int, frame: Any) -> None:
        if run.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        run.signal = signal.Signals(number).name
        with suppress(RuntimeError):  # the signal came while another line was being written
            run.log.say(f"{run.signal}: finishing the micro step and saving; press Ctrl-C to exit at once")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with _handling(receive):
        for watcher in _WATCHERS:
            watcher.run, watcher.training = run, True
        try:
            yield
        finally:
            for watcher in _WATCHERS:
                watcher.training = False


@contextmanager
def _handling(receive: Callable[[int, Any], None]) -> Iterator[None]:
    """Inside, ``receive`` handles the signals.

    A signal that the caller ignores stays ignored, as nohup ignores SIGHUP. SIGINT does not, since a shell ignores it
    for every background job.
    """
    handled = [s for s in _SIGNALS if s == signal.SIGINT or signal.getsignal(s) != signal.SIG_IGN]
    before = {s: signal.signal(s, receive) for s in handled}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit(name: str) -> None:
    """Ends the process without waiting for the main thread."""
    reporter = threading.Thread(target=_report, args=(name,), daemon=True)
    reporter.start()
    reporter.join(4)  # seconds: the output may be a full pipe, and another rank may not answer
    locks.release_all()
    os._exit(EXIT_CODES[name])


def _report(name: str) -> None:
    line = "interrupted" if name == "SIGINT" else f"{name}: ended at once, since there was nothing new to save"
    if failures := sys.modules.get("folio.machine.failures"):
        line = failures.first_error(line, SystemExit(EXIT_CODES[name]))
    elif os.environ.get("RANK", "0") != "0":
        line = ""
    if line:
        say(line, sys.stderr)
    from rich.console import Console

    Console().show_cursor()  # which a progress bar hides


def _forget() -> None:
    """In a forked child: restores the usual handlers, so that a signal ends it and not its parent."""
    while _WATCHERS:
        _WATCHERS.pop()
        signal.set_wakeup_fd(-1)
        for number in _SIGNALS:
            if callable(signal.getsignal(number)):  # what the caller ignores stays ignored
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
