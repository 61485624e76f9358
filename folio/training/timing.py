"""The speed of training: rounds of steps in turn with other programs, and the time of a step's parts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from folio.machine.profiler import WARM_UP, Peak, Profiler
from folio.training.batches import MicroBatch, batches
from folio.training.loop import fit
from folio.training.run import Run, Work
from folio.training.signals import EXIT_CODES

OURS = "Folio"
PARTS = ("rows", "forward", "backward", "update", "host", "other")
_SECONDS, _STEPS = 0.5, 20  # of a round, at most, but at least one step


def in_turn(
    run: Run, others: Mapping[str, Callable[[], object]], rounds: int, limit: float = 60.0, count: int = 0
) -> dict[str, list[float]]:
    """Seconds a step of the run and of the ``others``, by round: the run trains, then each of them makes as many steps.

    A round has ``count`` steps; 0: as many as take half a second. After ``limit`` seconds only the first round begins.
    Steps before it, which compile and make AdamW's moments, do not count.
    """
    times: dict[str, list[float]] = {name: [] for name in (OURS, *others)}
    start = time.perf_counter()
    began, steps = start, 0

    def between() -> int:
        nonlocal began, steps
        if steps:
            wait_for(run.runtime.device)
            times[OURS].append((time.perf_counter() - began) / steps)
            for name, step in others.items():
                times[name].append(seconds_of(step, steps, run.runtime.device))
        done = len(times[OURS]) - 1  # without the warm-up
        if done == rounds or (done > 0 and time.perf_counter() - start > limit):
            return 0
        steps = count or (max(1, min(_STEPS, int(_SECONDS / times[OURS][-1]))) if steps else WARM_UP)
        began = time.perf_counter()
        return steps

    _train(run, partial(run.runtime.broadcast, between))
    return {name: each[1:] for name, each in times.items()}


def seconds_of(step: Callable[[], object], count: int, device: torch.device) -> float:
    """The mean of so many calls, to the end of their work on the device."""
    began = time.perf_counter()
    for _ in range(count):
        step()
    wait_for(device)
    return (time.perf_counter() - began) / count


def parts(run: Run, steps: int) -> dict[str, float]:
    """Seconds of each of ``PARTS`` in a step, the mean of so many; the run waits for the device after each part.

    ``rows`` is the wait for the thread that reads them, and their copy to the device; ``host`` is the processor's time
    for the rest of the loop; ``other`` what remains, such as the time in which other processes had the processor.
    CUDA graphs, which have no parts, end here.
    """
    run.runtime.stop_graphs()
    watch = _Stopwatch(run.runtime.device)
    marks: list[tuple[float, float]] = []

    def between() -> int:
        marks.append((time.perf_counter(), time.thread_time()))
        return steps if len(marks) == 1 else 0

    runtime = run.runtime
    with (
        watch.timing(run.loss, "forward", "forward"),
        watch.timing(runtime, "backward", "backward"),
        watch.timing(runtime, "step", "update"),
    ):
        _train(run, between, watch.batches)
    (first, first_cpu), (last, last_cpu) = marks
    found = {**watch.seconds, "host": last_cpu - first_cpu - watch.cpu}
    found["other"] = max(0.0, last - first - sum(found.values()))
    return {part: found[part] / steps for part in PARTS}


def profile(run: Run, steps: int, folder: Path) -> tuple[str, Peak | None]:
    """Profiles so many steps into a folder; returns a summary, and the memory at its peak if the device shows it."""
    run.runtime.stop_graphs()
    profiler = Profiler(run.optimizer, run.runtime.device, folder)
    counts = iter((WARM_UP, steps, 0))
    summary = ""

    def between() -> int:
        nonlocal summary
        count = next(counts)
        if count == 0:
            summary = run.runtime.broadcast(profiler.finish)
        elif count == steps:
            run.runtime.broadcast(profiler.start)
        return count

    _train(run, between)
    return summary, profiler.peak


def _train(run: Run, between: Callable[[], int], read: Callable[..., Any] = batches) -> None:
    """Trains; calls ``between`` before the first step, and then after as many steps as it returned, until it is 0."""
    due = run.state.step

    def do(run: Run) -> tuple[()]:
        nonlocal due
        count = between()
        due += count
        run.stop = "" if count else "max_iters"
        return ()

    run.work = [Work(lambda run: run.state.step >= due, do)]
    why, run.stop = fit(run, read), ""
    if why in EXIT_CODES:
        raise SystemExit(EXIT_CODES[why])


class _Stopwatch:
    """Adds up the wall time in functions, by part, and the processor's time of this thread in all of them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds = dict.fromkeys(PARTS[:4], 0.0)
        self.cpu = 0.0

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            wait_for(self._device)
            wall, cpu = time.perf_counter(), time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                wait_for(self._device)
                self.seconds[part] += time.perf_counter() - wall
                self.cpu += time.thread_time() - cpu

        return call

    @contextmanager
    def timing(self, owner: Any, method: str, part: str) -> Iterator[None]:
        """Inside, calls of the owner's method count as this part."""
        setattr(owner, method, self.timed(part, getattr(owner, method)))
        try:
            yield
        finally:
            delattr(owner, method)  # the class's own method remains

    @contextmanager
    def batches(self, run: Run) -> Iterator[Iterator[list[MicroBatch]]]:
        with batches(run) as steps:
            yield iter(self.timed("rows", partial(next, steps)), None)


def wait_for(device: torch.device) -> None:
    """Waits until the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
