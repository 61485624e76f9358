"""A run: all its parts, its clock, and how it ends."""

from __future__ import annotations

import functools
import math
import shlex
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from folio.checkpoints.checkpoint import Checkpoint
from folio.checkpoints.state import Skipped, State
from folio.config.compose import typed
from folio.config.options import Sampling, TrainConfig
from folio.data.rows import Tokens
from folio.data.token_files import SPLITS, Split
from folio.data.tokenizers import Tokenizer, from_json
from folio.errors import UserError
from folio.evaluation.loss import measure
from folio.generation.sampling import continuations
from folio.locks import Lock
from folio.machine import launch
from folio.machine.flops import mfu
from folio.machine.runtime import Runtime
from folio.machine.wrap import Loss
from folio.model.gpt import GPT
from folio.records.log import Log, counted
from folio.records.record import Record


class Work(NamedTuple):
    """A kind of work between updates: whether it is done at this step, and a function that returns its records."""

    scheduled: Callable[[Run], bool]
    do: Callable[[Run], Iterable[Record]]
    waits: bool = True  # for the last step, whose loss is read before


class FormerRun(NamedTuple):
    """An earlier run: its id, and its newest checkpoint with a readable state."""

    id: str
    found: Checkpoint
    notes: tuple[str, ...] = ()  # for the user


class Figures(NamedTuple):
    """The results of a step, which may not have been copied from the device yet."""

    step: int
    learning_rate: float
    requested_at: float  # time.perf_counter when the step had been sent to the device
    read: Callable[[], list[float]]  # [nats, tokens, one number per stop request, the result of Runtime.step]


@dataclass
class Clock:
    """The wall time of a run, its limit, and the speed of its updates without the work between them; in seconds."""

    # when this process began, less the seconds of earlier processes
    started: float = field(default_factory=time.perf_counter)
    deadline: float = math.inf
    steps_per_second: float = math.nan  # of the last lap
    _lap: tuple[int, float] = field(default=(0, 0.0), init=False)  # step and time at which this lap began
    _paused: float = field(default=0.0, init=False)  # seconds of this lap inside ``pause``

    def seconds(self, at: float | None = None) -> float:
        """Since the run began, those of earlier processes included; now or ``at`` a time of ``time.perf_counter``."""
        return (time.perf_counter() if at is None else at) - self.started

    @property
    def expired(self) -> bool:
        return time.perf_counter() > self.deadline

    def begin(self, seconds: float) -> None:
        """Goes on from so many seconds of the run, those of earlier processes included."""
        self.started = time.perf_counter() - seconds

    def limit(self, minutes: float) -> None:
        """Expires so many minutes from now."""
        self.deadline = time.perf_counter() + 60 * minutes

    def begin_lap(self, step: int) -> None:
        self._lap, self._paused = (step, time.perf_counter()), 0.0

    def end_lap(self, step: int, at: float) -> None:
        """Measures the speed since the lap began, and begins the next one."""
        first, began = self._lap
        self.steps_per_second = (step - first) / (at - began - self._paused)
        self._lap, self._paused = (step, at), 0.0

    @contextmanager
    def pause(self) -> Iterator[None]:
        """The time inside does not count for the speed."""
        began = time.perf_counter()
        yield
        self._paused += time.perf_counter() - began


@dataclass(repr=False)
class Run:
    """All parts of a run."""

    config: TrainConfig
    id: str
    model: GPT
    loss: Loss
    optimizer: torch.optim.Optimizer
    tokens: Tokens
    tokenizer: dict[str, Any] | None  # as JSON; None if the meaning of the token ids is unknown
    runtime: Runtime
    log: Log
    state: State
    lock: Lock | None = None  # on the folder, held by rank 0 for all ranks
    read_only: bool = False  # eval_only: measures the loss once and writes no file
    former: FormerRun | None = None  # that this one resumes
    objective: str = ""  # the name of the loss to train on, if it is a user's
    number: int = field(default_factory=lambda: launch.JOB.runs)  # of the runs that this process builds, from 1
    notes: list[str] = field(default_factory=list)  # for the user, shown when the run takes its folder
    work: list[Work] = field(default_factory=list)  # between updates
    clock: Clock = field(default_factory=Clock)
    skipped: Skipped = field(default_factory=Skipped)
    begun: int = 0  # the step this process began at
    worked: int = -1  # the last step at which this process did the scheduled work
    saved: int = 0  # the last step at which a checkpoint was to be written, or from which the run resumed; 0: none
    stop: str = ""  # why the loop ends: one of stopping.ENDS or signals.EXIT_CODES
    signal: str = ""  # the name of the one that this rank received
    owed: set[str] = field(default_factory=set)  # measurements of this step that a signal interrupted
    caught_up: bool = False  # this process made a measurement that an earlier one owed
    began: bool = False  # the folder is this run's own
    training: bool = False  # ``fit`` has been called and has not returned
    save_due: bool = False  # a callback asks for a checkpoint of this step
    write_checkpoint: Callable[[Run], Path] | None = None  # for ``save``
    left: Any = None  # how the folder was when the run released it
    failed: str = ""  # the error that ended training, after which the run cannot continue
    pending: Figures | None = None  # of the last step, read one step late

    @property
    def out_dir(self) -> Path:
        return Path(self.config.output.out_dir)

    def __repr__(self) -> str:
        why = f", {self.stop}" if self.stop else ""
        return f"<Run {self.out_dir}: step {self.state.step} of {self.config.optimizer.max_iters}{why}>"

    def generate(self, start: str = "\n", *, seed: int | None = None, **options: Any) -> list[str]:
        """Generates texts with the weights as they are now; each begins with the prompt ``start``.

        Options are those of ``folio.generate`` about what is drawn: ``num_samples``, ``max_new_tokens``,
        ``temperature``, ``top_k``, ``top_p``. Every rank must call this, and gets the same texts.

        >>> print(*run.generate("ROMEO:", num_samples=2, max_new_tokens=100))

        Raises:
            ValueError: one line that names the option, the value and the remedy.
        """
        self.runtime.require_group()
        how = typed("generate", Sampling(), {"start": start, **options})
        seed = self.config.system.seed if seed is None else seed
        return self.runtime.infer(lambda: continuations(self.model, self.make_tokenizer(), how, seed))

    def evaluate(self, split: Split = "val", eval_iters: int = 0) -> dict[str, Any]:
        """Measures cross entropy over a split of the run's data, with the weights as they are now.

        ``eval_iters`` batches, evenly spaced over the split; 0: every token once. The result is that of
        ``folio.evaluate``. Every rank must call this.

        >>> run.evaluate()["loss"]

        Raises:
            ValueError: one line that names the option, the value and the remedy.
            FloatingPointError: the loss is not finite.
        """
        self.runtime.require_group()
        if split not in SPLITS:
            raise UserError(f"evaluate: split = {split!r}: must be {' or '.join(SPLITS)}")
        if eval_iters < 0:
            raise UserError(f"evaluate: eval_iters = {eval_iters}: must be at least 0")
        size = self.config.data.batch_size
        return measure(self.model, self.loss, self.tokens, split, eval_iters * size, size, self.runtime, self.tokenizer)

    def save(self) -> Path:
        """Writes a checkpoint of this step and returns its folder; every rank must call this.

        In a callback, the checkpoint is written once the other callbacks of the step are done.

        >>> run.save()
        PosixPath('out/checkpoints/step-00000200')

        Raises:
            ValueError, OSError: one line that names the folder and the remedy.
        """
        assert self.write_checkpoint, "folio.build and folio.train make runs that can be saved"
        return self.write_checkpoint(self)

    def close(self) -> None:
        """Leaves the process group, if a launcher such as torchrun made one. A run of one process can go on."""
        close(self)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def make_tokenizer(self) -> Tokenizer:
        """The tokenizer of the data. Raises UserError if the meaning of the token ids is unknown."""
        if self.tokenizer is None:
            raise UserError(
                f"nothing says what the token ids of {self.tokens.name} mean, so they cannot be decoded to text: "
                "put a meta.json or meta.pkl beside the token files"
            )
        return from_json(self.tokenizer)

    @property
    def rows_per_step(self) -> int:
        return self.config.data.gradient_accumulation_steps * self.config.data.batch_size

    @property
    def tokens_per_step(self) -> int:
        return self.rows_per_step * self.tokens.block_size

    @property
    def tokens_per_second(self) -> float:
        """The speed of training; NaN before the first measurement."""
        return self.tokens_per_step * self.clock.steps_per_second

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization: share of the devices' peak in use; NaN if unknown."""
        return self.tokens_per_second * self._mfu_per_token

    @functools.cached_property
    def _mfu_per_token(self) -> float:
        """The share that one token a second uses."""
        runtime = self.runtime
        return mfu(self.model, 1.0, runtime.device, runtime.dtype, runtime.world, self.tokens.block_size)


def finish(run: Run) -> None:
    """Reports how the run ended, and releases its files, processes and lock; must be called on every path."""
    try:
        if run.stop:
            run.log.say(last_line(run))
    finally:
        close(run)


def close(run: Run) -> None:
    """Releases the files, the processes and the lock of a run."""
    try:
        leave_folder(run)
    finally:
        run.runtime.close()


def leave_folder(run: Run) -> None:
    """Closes the run's files, and releases its lock."""
    try:
        run.log.close()
        run.runtime.finish_writing()
    finally:
        if run.lock:
            run.lock.release()
            run.lock = None


def last_line(run: Run, again: str = "") -> str:
    """How the run ended. ``again``: what continues it, if it is not complete; by default a command."""
    state, max_iters, patience = run.state, run.config.optimizer.max_iters, run.config.optimizer.patience
    if run.begun == state.step > 0 and not run.caught_up and run.stop in ("max_iters", "patience"):
        return nothing_to_do(run)
    why = best = ""
    if run.stop != "max_iters":
        why = f" ({run.stop})"
        if state.step:
            more = f" --patience={2 * patience}" if run.stop == "patience" else ""
            command = f"folio train --init_from=resume --out_dir={shlex.quote(str(run.out_dir))}{more} resumes it"
            if run.objective:
                command = f"folio.train(loss={run.objective}, init_from='resume', …) resumes it"
            why += f", {command if more else again or command}"
    if state.best:
        best = f"; best validation loss {state.best['loss']:.4f} at step {state.best['step']:.0f}"
    return f"step {state.step} of {max_iters}{why}{best}"


def nothing_to_do(run: Run) -> str:
    """Why a complete run makes no step, and the option that lets it continue."""
    state, max_iters, patience = run.state, run.config.optimizer.max_iters, run.config.optimizer.patience
    if state.step >= max_iters:
        return f"nothing to do: the run is at step {state.step}: raise --max_iters={max_iters} above that"
    in_vain = counted(state.evaluations_without_improvement, "evaluation")
    return f"nothing to do: no better loss in {in_vain}: raise --patience={patience} above that"
