"""The processes of a run: how they exchange values, how long they wait for each other, how they end."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from folio.errors import UserError
from folio.machine import launch
from folio.machine.failures import first_error
from folio.records.console import say

T = TypeVar("T")
START_TIMEOUT = timedelta(minutes=30)  # until the first step is done: compiling and reading may take long
_CLEANUP = 30.0  # seconds after which a process that cannot leave its group exits anyway


class Ranks:
    """The processes of a run, seen from one of them: number ``rank`` of ``world``.

    ``backend`` is that of their group, "nccl" or "gloo"; None if no launcher started this process, which is then
    alone. Until ``first_step_done`` they wait ``START_TIMEOUT`` for each other, afterwards ``timeout`` seconds.
    """

    def __init__(self, rank: int, world: int, backend: str | None, timeout: float) -> None:
        self.rank, self.world = rank, world
        self._grouped, self._timeout, self._starting = backend is not None, timedelta(seconds=timeout), True
        self._writer = ThreadPoolExecutor(1, "writer")
        self._written: Future[None] | None = None
        if backend:
            self._join(backend)

    def _join(self, backend: str) -> None:
        timeout, groups = max(self._timeout, START_TIMEOUT), launch.JOB.groups
        store = launch.meet(self.rank, self.world, timeout)
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world, timeout=timeout)
        groups.append(dist.group.WORLD)  # type: ignore[arg-type]
        # this group always waits longer: work of rank 0 alone, such as writing a checkpoint, may exceed a step's time
        self._control = dist.new_group(backend="gloo", timeout=timeout)
        groups.append(self._control)
        self._hosts = dist.group.WORLD  # for numbers on the CPU
        if backend != "gloo":
            self._hosts = dist.new_group(backend="gloo", timeout=timeout)
            groups.append(self._hosts)
        dist.barrier(self._control)  # after it no rank needs the store, which may end with rank 0

    def extend_timeout(self) -> None:
        """Gives groups that were formed later, such as FSDP's, ``START_TIMEOUT`` until the first step too."""
        self._set_timeout(max(self._timeout, START_TIMEOUT))

    def first_step_done(self) -> None:
        """From here on a process that waits for another gives up after ``timeout`` seconds."""
        if self._starting and self._grouped:
            self._starting = False
            self._set_timeout(self._timeout)

    def _set_timeout(self, timeout: timedelta) -> None:
        for group in launch.JOB.groups:
            if group is not self._control:
                dist.distributed_c10d._set_pg_timeout(timeout, group)

    def require_group(self) -> None:
        """Raises UserError if this process has left its group, since it can do nothing for the run then."""
        if self._grouped and not dist.is_initialized():
            raise UserError(
                "this run is closed, and its processes have left each other: work inside of "
                "`with folio.build(…) as run:`"
            )

    def reduce(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum(self, number: float) -> float:
        """The sum of a number over all ranks, without waiting for the device."""
        if self.world == 1:
            return number
        tensor = torch.tensor(number, dtype=torch.float64)
        dist.all_reduce(tensor, group=self._hosts)
        return tensor.item()

    def broadcast(self, make: Callable[[], T]) -> T:
        """Calls ``make`` on rank 0, and returns its value, or raises its error, on every rank."""
        if self.world == 1:
            return make()
        box: list[Any] = [None, None]
        if self.rank == 0:
            try:
                box[0] = make()
            except Exception as error:  # of any kind, so that no rank waits for a value that will not come
                box[1] = error
        dist.broadcast_object_list(box, src=0, group=self._control)
        if box[1] is not None:
            raise box[1]
        return box[0]

    def wait_for_write(self) -> None:
        """Waits until the last ``write`` is done on rank 0; its error is raised on every rank."""

        def result() -> None:
            work, self._written = self._written, None
            if work:
                work.result()

        self.broadcast(result)

    def write(self, make: Callable[[], None], wait: bool) -> None:
        """Calls ``make`` on rank 0: with ``wait`` in the main thread, while the other ranks wait; else in a thread.

        Without ``wait``, call ``wait_for_write`` first.
        """
        if wait:
            self.broadcast(make)
        elif self.rank == 0:
            self._written = self._writer.submit(make)

    def finish_writing(self) -> None:
        """Waits until this process writes nothing, without an error and without the other ranks."""
        if self._written:
            wait([self._written])

    def gather(self, found: T) -> list[T]:
        """The values of all ranks, by rank, on every rank."""
        every: list[Any] = [found] * self.world
        if self.world > 1:
            dist.all_gather_object(every, found, group=self._control)
        return every

    def require_equal(self, found: dict[str, Any]) -> None:
        """Raises UserError, on every rank, if the ranks have different values under the same name."""
        every = self.gather(found)
        for rank, other in enumerate(every):
            if name := next((name for name in found if other[name] != every[0][name]), None):
                raise UserError(
                    f"{name} is {every[0][name]} on rank 0 and {other[name]} on rank {rank}: all processes need the "
                    "same options, data and out_dir"
                )

    def stack(self, tensor: Tensor) -> Tensor:
        """The tensors (N,) of all ranks, on every rank: (world, N)."""
        every = tensor.new_empty(self.world, len(tensor))
        dist.all_gather(list(every), tensor)
        return every

    def close(self) -> None:
        """Waits for the writer thread, and leaves the process group; exits if that takes too long.

        A process without a group can still do everything afterwards, since the next ``write`` starts the thread again.

        A failing rank reports its error before it leaves, since the others only see that it left.

        ``launch.JOB`` keeps the groups' C++ objects until the process ends. Their destructor holds the GIL while it
        waits for gloo's threads, and one of those may wait for the GIL to free a tensor (seen with torch 2.13).
        """
        error = sys.exception()
        line = first_error(str(error), error) if self._grouped and isinstance(error, Exception) else ""

        def give_up() -> None:
            if line:
                say(line, sys.stderr)
            os._exit(1)

        writer, self._writer = self._writer, ThreadPoolExecutor(1, "writer")
        writer.shutdown()
        if self._grouped and dist.is_initialized():
            guard = threading.Timer(_CLEANUP, give_up)
            guard.daemon = True
            guard.start()
            dist.destroy_process_group()
            guard.cancel()
