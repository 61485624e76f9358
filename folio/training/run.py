"""A run: all its parts, and how it ends."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from folio import files
from folio.checkpoints.checkpoint import State
from folio.config.options import TrainConfig
from folio.data.rows import Tokens
from folio.data.tokenizers import Tokenizer, from_json
from folio.errors import UserError
from folio.machine.flops import mfu
from folio.machine.runtime import Loss, Runtime
from folio.model.gpt import GPT
from folio.records.log import Log, counted
from folio.records.trackers import Record

Work = tuple[Callable[["Run"], bool], Callable[["Run"], Iterable[Record]]]  # due, function → records


class Figures(NamedTuple):
    """A step's [nats, tokens, signal, gradient norm], perhaps still on their way from the device."""

    step: int
    lr: float
    at: float  # when they were asked for
    read: Callable[[], list[float]]


@dataclass
class Run:
    """All parts of a run; ``work`` is what is done between updates, as (due, function → records)."""

    config: TrainConfig
    id: str
    model: GPT
    loss: Loss
    optimizer: torch.optim.AdamW
    tokens: Tokens
    tokenizer: dict[str, Any] | None  # as JSON; None where nothing says what the ids mean
    runtime: Runtime
    log: Log
    state: State
    lock: files.Lock | None = None  # on the folder, for all ranks
    work: list[Work] = field(default_factory=list)
    begun: int = 0  # the step this process began at
    until: float = math.inf  # when max_minutes are over
    stop: str = ""  # why the loop ends: one of ENDS or EXIT
    signal: str = ""  # that this rank received
    owed: set[str] = field(default_factory=set)  # measurements of this step that a signal ended
    late: bool = False  # some that an earlier process owed were made here
    pending: Figures | None = None  # of the last step, read one step late
    speed: float = math.nan  # tokens per second, without the work between updates
    started: float = field(default_factory=time.perf_counter)  # when this process began, less former seconds
    lap: tuple[int, float] = (0, 0.0)  # step and time of the last line
    aside: float = 0.0  # seconds of work between updates since then

    @property
    def out_dir(self) -> Path:
        return Path(self.config.output.out_dir)

    def vocabulary(self) -> Tokenizer:
        """Raises ValueError where nothing says what the token ids mean."""
        if self.tokenizer is None:
            raise UserError(
                f"nothing says what the token ids of {self.tokens.name} mean, so no text can be made of them: "
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
    def mfu(self) -> float:
        """Share of the devices' peak in use, NaN where that is unknown."""
        runtime = self.runtime
        return mfu(self.model, self.speed, runtime.device, runtime.dtype, runtime.world, self.tokens.block_size)


def finish(run: Run) -> None:
    """Says how it went, where it did, and gives everything back; belongs on every path."""
    state, max_iters, patience = run.state, run.config.optimizer.max_iters, run.config.optimizer.patience
    try:
        if run.stop == "max_iters" and run.begun == state.step > 0 and not run.late:
            run.log.say(f"nothing to do: the run is at step {state.step}: raise --max_iters={max_iters} above that")
        elif run.stop == "patience" and run.begun == state.step > 0 and not run.late:
            in_vain = counted(state.evaluations_without_improvement, "evaluation")
            run.log.say(f"nothing to do: no better loss in {in_vain}: raise --patience={patience} above that")
        elif run.stop:
            further = f", folio train --init_from=resume --out_dir={shlex.quote(str(run.out_dir))}"
            further += f" --patience={2 * patience}" if run.stop == "patience" else ""
            why = "" if run.stop == "max_iters" else f" ({run.stop}){f'{further} goes on' if state.step else ''}"
            best = (
                f"; best validation loss {state.best['loss']:.4f} at step {state.best['step']:.0f}"
                if state.best
                else ""
            )
            run.log.say(f"step {state.step} of {max_iters}{why}{best}")
        run.log.close()
    finally:
        try:
            run.runtime.close()
        finally:
            if run.lock:
                run.lock.release()
