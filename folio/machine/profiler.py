"""Profiles some steps with PyTorch's profiler, and summarizes their time and memory."""

from __future__ import annotations

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from folio import files
from folio.machine.shares import local_part
from folio.records.console import silent_stderr
from folio.records.run_folder import MEMORY, OPERATIONS, TRACE

WARM_UP = 2  # steps before the first profiled one: they compile, and create AdamW's moments
Event = dict[str, Any]
Events = list[Event]  # of a trace; times are microseconds
_ROWS = 10
_WITH_EVENTS = {"cpu": 0, "cuda": 1}  # devices whose allocators are in a trace, and their number there


class Peak(NamedTuple):
    """Bytes of a device's tensors at the moment when their sum is largest."""

    weights: int
    optimizer: int
    gradients: int
    activations: int  # and the rest: logits, copies of weights, the batch

    @property
    def total(self) -> int:
        return sum(self)


class Profiler:
    """Profiles this process between ``start`` and ``finish``, and writes to ``folder``:

    - ``trace.json``, for chrome://tracing and ui.perfetto.dev;
    - ``operations.txt``: the operations with the most time of their own, without the operations that they call; on
      a GPU, the time of their kernels;
    - ``memory.json``: bytes by kind at the peak, the largest sum of the allocator's events in the trace. Weights
      and optimizer are sums over the tensors, or shards, of this process. Gradients are those that were allocated
      at the peak: all of them from the second micro step on, fewer in the first, where they replace activations.
      Activations are the rest. On a CPU the events count from ``start``, so tensors that are older, and neither
      weights, optimizer state nor gradients, are left out. On other devices than CPUs and CUDA there are no events,
      and the file is not written.

    A step ends with an update of ``optimizer``. Profiling does not change the results, to the bit.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device, folder: Path) -> None:
        self._optimizer, self._device, self._folder = optimizer, device, folder
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._updates: list[list[tuple[int, int]]] = []  # for each update, (address of storage, bytes) of the gradients
        self.peak: Peak | None = None

    def start(self) -> None:
        """Raises OSError if the folder cannot be written."""
        try:
            files.make_folder(self._folder)
            self._unfinished().cleanup()
        except OSError as error:
            raise OSError(
                f"{self._folder} cannot be written ({error.strerror}): move away what is there, or write elsewhere"
            ) from None
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else it prints a line on stderr at each start and stop
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self._device.type == "cuda")
        self._profile = profile(activities=activities, profile_memory=True)
        self._hook = self._optimizer.register_step_pre_hook(self._note_gradients)
        earlier = torch.empty(1)
        self._profile.start()
        with silent_stderr():  # torch warns of the first tensor, of a thousand, that is older than the profile
            del earlier

    def _note_gradients(self, *_: Any) -> None:
        gradients = [local_part(p.grad) for p in self._parameters if p.grad is not None]
        self._updates.append([(g.untyped_storage().data_ptr(), g.nbytes) for g in gradients])

    def finish(self) -> str:
        """Ends the profile, writes its files and returns a summary. Raises OSError if they cannot be written."""
        self._profile.stop()
        self._hook.remove()
        with self._unfinished() as unfinished:
            trace = Path(unfinished, TRACE)
            self._profile.export_chrome_trace(str(trace))
            try:
                events = json.loads(files.read_bytes(trace, 1 << 33))["traceEvents"]
            except (ValueError, FileNotFoundError):  # the profiler does not report a full disk
                raise OSError(f"{self._folder} could not be written: make room there, or write elsewhere") from None
            text = self._operations()
            files.write(trace.with_name(OPERATIONS), text.encode())
            self.peak = peak = self._find_peak(events)
            if peak:
                files.write_json(trace.with_name(MEMORY), {**peak._asdict(), "total": peak.total})
                text += peak_table(peak)
            for path in trace.parent.iterdir():
                files.rename(path, self._folder / path.name)
        return f"{text}wrote {self._folder / TRACE}: open it in chrome://tracing or ui.perfetto.dev"

    def _unfinished(self) -> TemporaryDirectory[str]:
        return TemporaryDirectory(prefix=".profile-", dir=self._folder)

    def _operations(self) -> str:
        """A table of the operations with the most time of their own."""
        of = "self_device_time_total" if self._device.type == "cuda" else "self_cpu_time_total"
        times = {e.key: (getattr(e, of), e.count) for e in self._profile.key_averages() if e.device_type.name == "CPU"}
        total = sum(time for time, _ in times.values())
        steps = len(self._updates)
        lines = [
            f"the costliest operations of {steps} step{'s' * (steps != 1)}",
            f"{'ms':>12}  {'share':>6}  {'calls':>9}",
        ]
        costliest = sorted(times.items(), key=lambda item: -item[1][0])[:_ROWS]
        lines += [
            f"{time / 1000:>12,.2f}  {time / max(total, 1):>6.1%}  {calls:>9,}  {name}"
            for name, (time, calls) in costliest
        ]
        return "\n".join([*lines, ""])

    def _find_peak(self, events: Events) -> Peak | None:
        """Bytes by kind at the largest sum of the allocator's events; None if there are no events."""
        kind = _WITH_EVENTS.get(self._device.type)
        found = [(e["ts"], e["args"]) for e in events if e["name"] == "[memory]" and e["args"]["Device Type"] == kind]
        if not found:
            return None
        found.sort(key=lambda event: event[0])
        moment, fullest = max(found, key=lambda event: event[1]["Total Allocated"])
        total = fullest["Total Allocated"]
        step = f"Optimizer.step#{type(self._optimizer).__name__}.step"  # Muon's has another one inside
        updates = sorted(
            (e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") == "user_annotation" and e["name"] == step
        )
        both = zip(updates, self._updates, strict=True)
        update, noted = next((u for u in both if u[0][1] > moment), ((moment, moment), []))
        allocated = {args["Addr"]: at for at, args in found if args["Bytes"] > 0 and at < update[0]}
        gradients = sum(size for address, size in noted if allocated.get(address, 0) <= moment)
        weights = sum(local_part(p).nbytes for p in self._parameters)
        states = self._optimizer.state.values()
        slots = sum(local_part(t).nbytes for state in states for t in state.values() if isinstance(t, Tensor))
        if self._device.type == "cpu":  # where events count from the start, or from an earlier profile's
            first = found[0][1]
            older = sum(size for address, size in noted if address not in allocated)
            total += weights + slots + older - (first["Total Allocated"] - first["Bytes"])
        return Peak(weights, slots, gradients, total - weights - slots - gradients)


def peak_table(peak: Peak) -> str:
    """Lines with the memory by kind."""
    words = ("weights", "optimizer", "gradients", "activations and the rest", "total")
    lines = [f"{size / 1e6:>12,.1f} MB  {kind}" for kind, size in zip(words, (*peak, peak.total), strict=True)]
    return "\n".join(["memory at its peak", *lines, ""])
