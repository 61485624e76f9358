"""Why a run stops: its stop reasons, and numbers that are not finite."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from folio.records import run_folder
from folio.training.run import Run

ENDS = ("max_iters", "patience", "max_minutes")  # stop reasons after which everything is measured once more
# reasons that one rank may have alone, the most urgent first; each has a number in the small reduction of a step
STOP_REQUESTS = ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGINT", "max_minutes")


def finished(run: Run) -> str:
    """Why the training is complete, or "": the same on every rank."""
    patience = run.config.optimizer.patience
    if run.state.step >= run.config.optimizer.max_iters:
        return "max_iters"
    return "patience" if 0 < patience <= run.state.evaluations_without_improvement else ""


def stop_request(run: Run) -> str:
    """Why this rank asks all ranks to stop, or ""."""
    return run.signal or ("max_minutes" if run.clock.expired else "")


def agreed_signal(run: Run) -> str:
    """The most urgent signal that any rank received, or "": the same on every rank, without waiting for the device."""
    if not run.runtime.sum(float(bool(run.signal))):
        return ""
    return most_urgent(run.runtime.gather(run.signal))


def as_numbers(request: str, device: torch.device) -> Tensor:
    """One number per stop request, (5,): 1 for this one, else 0. Summed over the ranks, they count the requests."""
    numbers = torch.zeros(len(STOP_REQUESTS), device=device)
    if request:
        numbers[STOP_REQUESTS.index(request)] = 1.0
    return numbers


def requested(counts: Sequence[float]) -> str:
    """The most urgent of the stop requests that were counted, or ""."""
    return most_urgent(name for name, count in zip(STOP_REQUESTS, counts, strict=True) if count)


def most_urgent(requests: Iterable[str]) -> str:
    return min(filter(None, requests), key=STOP_REQUESTS.index, default="")


def not_finite_error(run: Run, what: str, updates: int) -> FloatingPointError:
    """The error that reports ``what``, found after so many ``updates``, with a remedy.

    Before the first update of this process, the cause is the weights that it began with, not the learning rate.
    """
    kept = run_folder.steps(run.out_dir)
    remedy = "lower --learning_rate" + (
        f", or resume from step {kept[-1]}" if kept else "; there is no checkpoint yet to resume from"
    )
    if updates <= run.begun:
        earlier = [step for step in kept if step < run.begun]
        own = f"loss={run.objective} or " if run.objective else ""
        remedy = f"{own}the weights that the run began with are the cause: " + (
            f"move {run_folder.checkpoint_folder(run.out_dir, run.begun)} away and resume from step {earlier[-1]}"
            if earlier
            else "begin with other weights, or with another --dtype"
        )
    return FloatingPointError(f"{what}, so training stopped: {remedy}")
