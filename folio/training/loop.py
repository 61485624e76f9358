"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor

from folio.machine import shortage
from folio.machine.graphs import read_later
from folio.machine.runtime import Runtime
from folio.machine.wrap import Loss
from folio.training.batches import MicroBatch, batches
from folio.training.memory_advice import advise_on_memory
from folio.training.run import Figures, Run
from folio.training.schedule import learning_rate
from folio.training.signals import save_on_signal
from folio.training.skipping import skip_update
from folio.training.stopping import STOP_REQUESTS, agreed_signal, as_numbers, finished, requested, stop_request
from folio.training.work import measure_once, run_scheduled_work


def fit(run: Run, read: Callable[[Run], AbstractContextManager[Iterator[list[MicroBatch]]]] = batches) -> str:
    """Trains until there is a ``stop_reason``, and returns it; a read-only run measures the loss once instead.

    Step N means N updates done: work scheduled at N sees the weights after N updates.

    Raises:
        FloatingPointError: the loss or the gradient is not finite; weights and checkpoints stay as they were before.
    """
    if run.read_only:
        measure_once(run)
        return run.stop
    config, state, runtime = run.config.optimizer, run.state, run.runtime
    advice = partial(advise_on_memory, run.config, run.model.config, runtime)
    with shortage.explained("training", advice), save_on_signal(run), read(run) as steps:
        run.log.start(state.step, run.tokens_per_step)
        run.clock.begin_lap(state.step)
        while True:
            run.stop = stop_reason(run)
            run_scheduled_work(run)
            if run.stop:
                runtime.wait_for_write()  # a signal between micro steps may find this step's checkpoint being written
                return run.stop

            sums = accumulate(run, next(steps))
            if sums is None:
                continue
            sums = runtime.reduce(torch.cat([sums, as_numbers(stop_request(run), runtime.device)]))
            rate = learning_rate(state.step, config)
            result = runtime.step(run.optimizer, rate, config.grad_clip, sums[:2])

            log_step(run)  # the step before; on a GPU this one still runs
            figures = read_later(torch.cat([sums, result]))
            run.pending = Figures(state.step, rate, time.perf_counter(), figures)
            state.step += 1
            state.rows += run.rows_per_step
            state.tokens += run.tokens_per_step


def accumulate(run: Run, micro_batches: list[MicroBatch]) -> Tensor | None:
    """The micro steps of a step: their sum of [nats, tokens counted], (2,), on the device.

    None if any rank received a signal between two of them, which stops the run: a step may take minutes, and a launcher
    kills a process half a minute after its signal. The resumed run makes the whole step.
    """
    runtime, sums = run.runtime, torch.zeros(2, device=run.runtime.device)
    for number, batch in enumerate(micro_batches, 1):
        if number > 1 and (signal := agreed_signal(run)):
            log_step(run)
            run.stop = signal
            return None
        sums += micro_step(runtime, run.loss, batch, run.tokens_per_step, number == len(micro_batches))
    return sums


def micro_step(runtime: Runtime, loss: Loss, batch: MicroBatch, tokens_per_step: int, last: bool = True) -> Tensor:
    """One forward and backward: adds to the gradients, and returns [nats, tokens counted], (2,), on the device.

    The next micro step may overwrite the result. Over all micro steps and ranks the gradients are those of the mean
    over ``tokens_per_step``. The ranks exchange them in the ``last`` micro step of a step.
    """
    runtime.seed(batch.seed)
    with runtime.sync(loss, last):
        return runtime.differentiate(loss, *batch[:3], scale=runtime.world / tokens_per_step)


def stop_reason(run: Run) -> str:
    """Why to stop at this step, the same on every rank, or "". The last loss is read before work that waits."""
    alone = stop_request(run) if run.runtime.world == 1 else ""  # several ranks learn of it with the loss, together
    if finished(run) or alone or any(work.waits and work.scheduled(run) for work in run.work):
        log_step(run)
    return finished(run) or run.stop or alone


def log_step(run: Run) -> None:
    """Reads the last step's figures, logs them, and stops the run if any rank requested it.

    Raises:
        FloatingPointError: as ``skip_update``.
    """
    if run.pending is None:
        return
    (step, rate, at, read), run.pending = run.pending, None
    nats, tokens, *more = read()
    loss, requests, (left_out, norm, *norms) = nats / tokens, more[: len(STOP_REQUESTS)], more[len(STOP_REQUESTS) :]
    if left_out:
        skip_update(run, step, rate, loss, norm, norms)
    else:
        run.skipped.in_a_row = 0
    run.stop = requested(requests)
    if step % run.config.logging.log_interval == 0:
        run.clock.end_lap(step + 1, at)
        run.log.advance(step + 1, loss, run.tokens_per_second)
        run.log.write(
            {
                "kind": "train",
                "step": step,
                "loss": loss,
                "lr": rate,
                "grad_norm": norm,
                "tokens": run.state.tokens,
                "tokens_per_second": run.tokens_per_second,
                "mfu": run.mfu,
                "seconds": run.clock.seconds(at),
            }
        )
