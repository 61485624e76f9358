"""Updates that were left out: why, how many, and when they end the run."""

from __future__ import annotations

import math
from collections.abc import Sequence

from folio.records.log import counted
from folio.training.run import Run
from folio.training.stopping import not_finite_error

MOST_IN_A_ROW = 10  # with --on_nonfinite=skip; single batches do not cause a longer row


def skip_update(run: Run, step: int, rate: float, loss: float, norm: float, norms: Sequence[float]) -> None:
    """Counts and logs an update that was left out.

    ``rate`` is its learning rate, ``norm`` that of the whole gradient, ``norms`` those of each parameter's. A gradient
    that overflows float16 is not counted: the scaler handles it.

    Raises:
        FloatingPointError: the loss or the gradient is not finite, and this ends the run.
    """
    why = "loss" if not math.isfinite(loss) else "gradient" if not math.isfinite(norm) else "spike"
    if why == "gradient" and run.runtime.scaler.is_enabled():
        return
    skipped, skips = run.skipped, run.config.optimizer.on_nonfinite == "skip"
    skipped.in_a_row = 0 if why == "spike" else skipped.in_a_row + 1
    if skipped.in_a_row >= (MOST_IN_A_ROW if skips else 1):
        raise not_finite_error(run, _failure(run, why, step, rate, norms), step + 1 - skipped.in_a_row)
    skipped.updates += 1
    what = f"loss {loss:.4f} is a spike" if why == "spike" else f"the {why} is not finite"
    run.log.say(f"iter {step}: {what}, so its update is left out ({counted(skipped.updates, 'update')} so far)")
    run.log.write({"kind": "skipped", "step": step, "why": why})


def _failure(run: Run, why: str, step: int, rate: float, norms: Sequence[float]) -> str:
    """What is not finite, and in which parameter first. Every process must call this."""
    first = run.runtime.find_not_finite(run.model, run.optimizer)
    if not first and (name := run.runtime.gradient_not_finite(run.model, norms)):
        first = f"the gradient of {name}"
    row = f", the last of {run.skipped.in_a_row} in a row" if run.skipped.in_a_row > 1 else ""
    return f"the {why} of step {step} is not finite (learning rate {rate:g}{first and f'; first in {first}'}{row})"
