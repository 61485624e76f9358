"""The training loop."""

from __future__ import annotations

import math
import time
from functools import partial

import torch

from folio.machine import shortage
from folio.training.batches import batches
from folio.training.memory_advice import what_fits
from folio.training.run import Figures, Run
from folio.training.schedule import learning_rate
from folio.training.stopping import WISHES, finished, largest, not_finite, signals, wish
from folio.training.work import do_what_is_due


def fit(run: Run) -> str:
    """Trains until ``stop_reason``, and returns it; with ``eval_only`` measures once instead.

    Step N means N updates done: what is due at N sees the weights after N updates.

    Raises:
        FloatingPointError: the loss is not finite; weights and checkpoints stay as they were before.
    """
    if run.config.evaluation.eval_only:
        (_, measure), *_ = run.work  # the loss
        run.log.write(*measure(run))
        return run.stop
    config, state, runtime = run.config.optimizer, run.state, run.runtime
    advice = partial(what_fits, run.config, run.model.config, runtime)
    with shortage.explained("training", advice), signals(run), batches(run) as steps:
        run.log.start(state.step, run.tokens_per_step)
        run.lap = (state.step, time.perf_counter())
        while True:
            run.stop = stop_reason(run)
            do_what_is_due(run)
            if run.stop:
                return run.stop

            rate = learning_rate(state.step, config)
            for group in run.optimizer.param_groups:
                group["lr"] = rate
            totals = torch.zeros(2, device=runtime.device)
            micro_batches = next(steps)
            for batch in micro_batches:
                runtime.seed(batch.seed)
                with runtime.sync(run.loss, last=batch is micro_batches[-1]):
                    nats, counted = run.loss(batch.idx, batch.targets, batch.documents)
                    runtime.backward(nats * (runtime.world / run.tokens_per_step))
                totals += torch.stack([nats.detach(), counted])
            stop = torch.full((1,), WISHES.get(wish(run), 0.0), device=runtime.device)
            totals = runtime.reduce(torch.cat([totals, stop]))
            norm = runtime.clip(run.optimizer, config.grad_clip)
            runtime.update(run.optimizer, totals[0], norm)

            settle(run)  # the step before; on a GPU this one still runs
            figures = runtime.later(torch.cat([totals, norm[None]]))
            run.pending = Figures(state.step, rate, time.perf_counter(), figures)
            state.step += 1
            state.rows += run.rows_per_step
            state.tokens += run.tokens_per_step


def stop_reason(run: Run) -> str:
    """Why to stop here, the same on every rank, or "". Nothing is due before the last loss is known."""
    alone = wish(run) if run.runtime.world == 1 else ""  # several ranks learn of it with the loss, together
    if finished(run) or alone or any(due(run) for due, _ in run.work):
        settle(run)
    return finished(run) or run.stop or alone


def settle(run: Run) -> None:
    """Reads the last step's figures: writes its line, and takes up a signal that any rank received."""
    if run.pending is None:
        return
    (step, rate, at, read), run.pending = run.pending, None
    nats, counted, received, norm = read()
    loss = nats / counted
    # float16 overflows now and then, which its scaler takes care of
    if not math.isfinite(loss) or not (math.isfinite(norm) or run.runtime.scaler.is_enabled()):
        what = "loss" if not math.isfinite(loss) else "gradient"
        raise not_finite(run, f"the {what} of step {step} is not finite", step)
    run.stop = largest(received)
    if step % run.config.logging.log_interval == 0:
        run.speed = run.tokens_per_step * (step + 1 - run.lap[0]) / (at - run.lap[1] - run.aside)
        run.lap, run.aside = (step + 1, at), 0.0
        run.log.advance(step + 1, loss, run.speed)
        run.log.write(
            {
                "kind": "train",
                "step": step,
                "loss": loss,
                "lr": rate,
                "grad_norm": norm,
                "tokens": run.state.tokens,
                "tokens_per_second": run.speed,
                "mfu": run.mfu,
                "seconds": at - run.started,
            }
        )
