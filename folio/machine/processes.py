"""The processes of a job: how they meet, how they exchange values, which of them reports an error, how they end.

A launcher, torchrun, starts them. It sets variables with the rank of each, and keeps a store of keys that outlives
them.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from folio.errors import UserError
from folio.records.console import say

T = TypeVar("T")
PATIENCE = timedelta(minutes=30)  # until the first step is done: compiling and reading may take long
_CLEANUP = 30.0  # seconds after which a process that cannot leave its group ends without
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass
class Job:
    """What this process knows of the job that it belongs to, for as long as the process lives."""

    groups: list[dist.ProcessGroup] = field(default_factory=list)  # that were joined, also after they were left
    stores: dict[str, Any] = field(default_factory=dict)  # of the "job", which may be restarted, and of this "start"
    threads: int = field(default_factory=torch.get_num_threads)  # before the processes of a machine divide the cores
    failure: tuple[BaseException, tuple[bool, list[str]]] | None = None  # the last error, and what _ask_others found


JOB = Job()


def place() -> tuple[int, int, int]:
    """(rank, world, local rank) from the launcher's environment; a run without one is alone.

    Raises:
        ValueError: a variable is missing or invalid; names it.
    """
    if "RANK" not in os.environ and "LOCAL_RANK" not in os.environ:
        return 0, 1, 0
    if missing := [name for name in _LAUNCHER if name not in os.environ]:
        raise UserError(f"{missing[0]} is not set, but {', '.join(_LAUNCHER)} go together: use torchrun")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "LOCAL_WORLD_SIZE"):
        if not (value := os.environ.get(name, "1")).isdecimal() or (name.endswith("SIZE") and int(value) == 0):
            raise UserError(f"{name}={value}: must be a whole number, as torchrun sets it")
    rank, world, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if not max(rank, local_rank) < world:
        raise UserError(f"RANK={rank}, LOCAL_RANK={local_rank}: both must be below WORLD_SIZE={world}")
    return rank, world, local_rank


def meet(rank: int, world: int, patience: timedelta) -> Any:
    """Waits for the other processes of this start of the job; the store over which they form groups.

    Raises:
        DistError: not all came in time, or the port is taken.
    """
    store, *_ = next(rendezvous("env://", timeout=patience))
    job = JOB.stores["job"] = _under("folio", store)
    JOB.stores["start"] = _under(_name_of_this_start(job, rank, world, patience), job)
    return JOB.stores["start"]


def remember(number: int, run: str) -> None:
    """Stores a run's id for ``former_run``, in case the launcher restarts this job."""
    if "job" in JOB.stores:
        JOB.stores["job"].set(f"run/{number}", run)


def former_run(number: int) -> str | None:
    """The id of the job's run of this number before the restart (see ``remember``); None where there was none yet.

    "" where no launcher keeps the store: then only its count of restarts shows that there was a run.
    """
    if not _launched():
        return "" if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" else None
    store = _job()
    key = f"run/{number}"
    return str(store.get(key).decode()) if store.check([key]) else None


def first_error(line: str, error: BaseException) -> str:
    """The message of this process's error: the ``line`` if this is the first process to fail, else "".

    It may take some seconds, in which the other processes can report theirs.
    """
    rank = os.environ.get("RANK", "")
    if not rank.isdecimal():
        return line
    first, silent = _first_to_fail(error)
    if not first:
        return ""
    if isinstance(error, dist.DistNetworkError) and "EADDRINUSE" in str(error):  # its class has no error number
        line = f"MASTER_PORT={os.environ['MASTER_PORT']} is taken: choose another"
    elif _is_lost(error):
        reason = str(error).strip().splitlines()[0].split("] ", 1)[-1].split(". This is", 1)[0]
        who = f"rank {', '.join(silent)}" if silent else "another process"
        line = f"{who} does not answer ({reason}): --timeout sets how long to wait, --init_from=resume continues"
    return line if rank == "0" else f"rank {rank}: {line}"


def _is_lost(error: BaseException) -> bool:
    """Whether an error means only that another process is gone or late."""
    words = ("gloo", "pair closure")  # gloo raises RuntimeErrors, which have no class of their own
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def _first_to_fail(error: BaseException) -> tuple[bool, list[str]]:
    """``_ask_others``, once for each error."""
    if JOB.failure is None or JOB.failure[0] is not error:
        JOB.failure = error, _ask_others(error)
    return JOB.failure[1]


def _ask_others(error: BaseException) -> tuple[bool, list[str]]:
    """Whether this process failed before all others, and the ranks that have not reported an error.

    A rank > 0 waits a little, so that rank 0 tells what all meet. One that only lost another waits longer, for the
    word of that one. Without a place where they met, each speaks.
    """
    rank = os.environ["RANK"]
    heard: list[tuple[bool, list[str]]] = []

    def ask() -> None:
        with contextlib.suppress(LookupError, ValueError, RuntimeError):
            store, ranks = _start(), range(int(os.environ["WORLD_SIZE"]))
            store.set(f"failed/{rank}", "")
            time.sleep(2.0 if _is_lost(error) else 1.0 * (rank != "0"))
            first = store.compare_set("failed/first", "", rank).decode() == rank
            heard.append((first, [str(r) for r in ranks if not store.check([f"failed/{r}"])]))
            store.set(f"heard/{rank}", "")
            if rank == "0" and not _launched():  # the others still ask the store, which this process keeps
                store.wait([f"heard/{r}" for r in ranks], timedelta(seconds=3))

    thread = threading.Thread(target=ask, daemon=True)  # a store behind a broken link never answers
    thread.start()
    thread.join(10)
    return heard[0] if heard else (True, [])


def leave(code: int) -> NoReturn:
    """Ends the process with this code, at once where it had a group (see ``Ranks.close``)."""
    if JOB.groups:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _launched() -> bool:
    """Whether a launcher keeps the store, also while it restarts a job."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _under(name: str, store: Any) -> Any:
    return dist.PrefixStore(name, store)  # type: ignore[attr-defined]


def _job() -> Any:
    """The job's part of the store; raises LookupError before the processes met, if no launcher keeps the store."""
    if "job" not in JOB.stores and _launched():
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(*place, is_master=False, timeout=timedelta(seconds=30))  # type: ignore[attr-defined]
        JOB.stores["job"] = _under("folio", store)
    return JOB.stores["job"]


def _start() -> Any:
    """The keys of this start; before the processes met, under a name made of the launcher's variables."""
    counts = (os.environ.get(name, "0") for name in ("TORCHELASTIC_RESTART_COUNT", "WORLD_SIZE"))
    return JOB.stores.get("start") or _under("/".join(counts), _job())


def _name_of_this_start(job: Any, rank: int, world: int, patience: timedelta) -> str:
    """A name that all processes of this start of the job share, and none of another.

    A launcher keeps its store when it restarts a job, and the launchers of several machines count restarts differently.
    So each process publishes a name of its own, and rank 0 answers it with the name of the start, until all have it.

    Raises:
        DistStoreError: not all came.
    """
    mine = secrets.token_hex(8)
    if rank:
        job.set(f"here/{rank}", mine)
        job.wait([f"start/{mine}"], patience)
        start = str(job.get(f"start/{mine}").decode())
        job.add(f"{start}/met", 1)
        return start
    answered: set[bytes] = set()
    here, end = [f"here/{r}" for r in range(1, world)], time.monotonic() + patience.total_seconds()
    while (met := job.add(f"{mine}/met", 0)) < world - 1:
        if time.monotonic() > end:
            raise dist.DistStoreError(f"{met + 1} of {world} processes came in {patience.total_seconds():.0f} s")
        for other in set(job.multi_get(here)) - answered if job.check(here) else ():
            job.set(f"start/{other.decode()}", mine)
            answered.add(other)
        time.sleep(0.02)
    return mine


class Ranks:
    """The processes of a run, of which this is number ``rank`` of ``world``: how they speak, and how they end.

    ``backend`` is that of their group, "nccl" or "gloo"; None where no launcher started this process, which is then
    alone. Until ``first_step_done`` they wait half an hour for each other, afterwards ``timeout`` seconds.
    """

    def __init__(self, rank: int, world: int, backend: str | None, timeout: float) -> None:
        self.rank, self.world = rank, world
        self._grouped, self._timeout, self._patient = backend is not None, timedelta(seconds=timeout), True
        self._writer = ThreadPoolExecutor(1, "writer")
        self._written: Future[None] | None = None
        if backend:
            self._join(backend)

    def _join(self, backend: str) -> None:
        patience = max(self._timeout, PATIENCE)
        store = meet(self.rank, self.world, patience)
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world, timeout=patience)
        JOB.groups.append(dist.group.WORLD)  # type: ignore[arg-type]
        # some work of rank 0 alone, such as writing a checkpoint, takes longer than a step
        self._control = dist.new_group(backend="gloo", timeout=patience)
        JOB.groups.append(self._control)
        self._hosts = dist.group.WORLD  # for numbers that are on no device
        if backend != "gloo":
            self._hosts = dist.new_group(backend="gloo", timeout=patience)
            JOB.groups.append(self._hosts)
        dist.barrier(self._control)  # from here on nobody needs the store, which may go with rank 0

    def be_patient(self) -> None:
        """For groups that were formed since: they too wait half an hour for the first step."""
        self._wait_at_most(max(self._timeout, PATIENCE))

    def first_step_done(self) -> None:
        """From here on a process that waits for another gives up after ``timeout`` seconds."""
        if self._patient and self._grouped:
            self._patient = False
            self._wait_at_most(self._timeout)

    def _wait_at_most(self, timeout: timedelta) -> None:
        for group in JOB.groups:
            if group is not self._control:
                dist.distributed_c10d._set_pg_timeout(timeout, group)

    def reduce(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def total(self, number: float) -> float:
        """The sum of a number over all ranks, without waiting for the device."""
        if self.world == 1:
            return number
        tensor = torch.tensor(number, dtype=torch.float64)
        dist.all_reduce(tensor, group=self._hosts)
        return tensor.item()

    def broadcast(self, make: Callable[[], T]) -> T:
        """Calls ``make`` on rank 0 and returns its value on every rank; an error of it is raised on every rank too.

        Raises:
            Exception: rank 0's.
        """
        if self.world == 1:
            return make()
        box: list[Any] = [None, None]
        if self.rank == 0:
            try:
                box[0] = make()
            except Exception as error:  # whatever it is, nobody must wait for a value that will not come
                box[1] = error
        dist.broadcast_object_list(box, src=0, group=self._control)
        if box[1] is not None:
            raise box[1]
        return box[0]

    def written(self) -> None:
        """Waits until rank 0 has written what it was given to ``write``; an error there is raised on every rank."""

        def wait() -> None:
            work, self._written = self._written, None
            if work:
                work.result()

        self.broadcast(wait)

    def write(self, make: Callable[[], None], wait: bool) -> None:
        """Calls ``make`` on rank 0: in its main thread while the others ``wait``, else in a thread of its own.

        In the second case ``written`` must be called first.
        """
        if wait:
            self.broadcast(make)
        elif self.rank == 0:
            self._written = self._writer.submit(make)

    def gather(self, found: T) -> list[T]:
        """The values of all ranks, in their order, on each of them."""
        every: list[Any] = [found] * self.world
        if self.world > 1:
            dist.all_gather_object(every, found, group=self._control)
        return every

    def agree(self, found: dict[str, Any]) -> None:
        """Raises ValueError, on every rank, where the ranks have different values under the same name."""
        every = self.gather(found)
        for rank, other in enumerate(every):
            if what := next((name for name in found if other[name] != every[0][name]), None):
                raise UserError(
                    f"{what} is {every[0][what]} on rank 0 and {other[what]} on rank {rank}: all processes need the "
                    "same options, data and out_dir"
                )

    def stack(self, tensor: Tensor) -> Tensor:
        """A tensor (N,) of every rank, in their order, on each of them: (world, N)."""
        every = tensor.new_empty(self.world, len(tensor))
        dist.all_gather(list(every), tensor)
        return every

    def close(self) -> None:
        """Waits for the writer thread, and leaves the process group; a process that cannot leave it exits.

        A failing rank reports its error before it leaves, since the others only notice that it left.

        The groups' C++ objects stay until the process ends: their destructor waits for gloo's threads with the
        GIL held, while one of those may be waiting for the GIL to let go of a tensor (seen with torch 2.13).
        """
        error = sys.exception()
        line = first_error(str(error), error) if self._grouped and isinstance(error, Exception) else ""

        def give_up() -> None:
            if line:
                say(line, sys.stderr)
            os._exit(1)

        self._writer.shutdown()
        if self._grouped and dist.is_initialized():
            guard = threading.Timer(_CLEANUP, give_up)
            guard.daemon = True
            guard.start()
            dist.destroy_process_group()
            guard.cancel()
