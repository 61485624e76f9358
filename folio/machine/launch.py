"""How the processes of a job meet: the launcher's variables, and the key-value store that they share.

A launcher such as torchrun sets variables with the rank of each process, and keeps a store that outlives the processes.
"""

from __future__ import annotations

import os
import secrets
import sys
import time
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from folio.errors import UserError

_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass
class Job:
    """The job that this process belongs to, for as long as the process lives."""

    groups: list[dist.ProcessGroup] = field(default_factory=list)  # all that it joined, also those it has left
    # "job": keys that survive a restart by the launcher; "start": keys of this start only
    stores: dict[str, Any] = field(default_factory=dict)
    runs: int = 0  # that this process has begun
    threads: int = field(default_factory=torch.get_num_threads)  # before the processes of a machine divide the cores


JOB = Job()


def read_ranks() -> tuple[int, int, int]:
    """(rank, world, local rank) from the launcher's variables; (0, 1, 0) if there is no launcher.

    Raises:
        UserError: a variable is missing or invalid; names it.
    """
    if "RANK" not in os.environ and "LOCAL_RANK" not in os.environ:
        return 0, 1, 0
    if missing := [name for name in _VARIABLES if name not in os.environ]:
        raise UserError(f"{missing[0]} is not set, but a launcher sets all of {', '.join(_VARIABLES)}: use torchrun")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "LOCAL_WORLD_SIZE"):
        if not (value := os.environ.get(name, "1")).isdecimal() or (name.endswith("SIZE") and int(value) == 0):
            raise UserError(f"{name}={value}: must be a whole number, as torchrun sets it")
    rank, world, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if not max(rank, local_rank) < world:
        raise UserError(f"RANK={rank}, LOCAL_RANK={local_rank}: both must be below WORLD_SIZE={world}")
    return rank, world, local_rank


def meet(rank: int, world: int, timeout: timedelta) -> Any:
    """Waits for the other processes of this start of the job; returns the store with which they form groups.

    Raises:
        DistError: not all processes joined in time, or the port is taken.
    """
    store, *_ = next(rendezvous("env://", timeout=timeout))
    job = JOB.stores["job"] = _under("folio", store)
    JOB.stores["start"] = _under(_name_this_start(job, rank, world, timeout), job)
    return JOB.stores["start"]


def _name_this_start(job: Any, rank: int, world: int, timeout: timedelta) -> str:
    """A name that all processes of this start of the job share, and that no other start has.

    A launcher keeps its store when it restarts a job, and the launchers of several machines count restarts differently.
    So each other process publishes a random key, and rank 0 stores the name of the start under it, until all have read
    the name.

    Raises:
        DistStoreError: not all processes joined in time.
    """
    mine = secrets.token_hex(8)
    if rank:
        job.set(f"here/{rank}", mine)
        job.wait([f"start/{mine}"], timeout)
        start = str(job.get(f"start/{mine}").decode())
        job.add(f"{start}/met", 1)
        return start
    answered: set[bytes] = set()
    here, end = [f"here/{r}" for r in range(1, world)], time.monotonic() + timeout.total_seconds()
    while (met := job.add(f"{mine}/met", 0)) < world - 1:
        if time.monotonic() > end:
            raise dist.DistStoreError(
                f"only {met + 1} of {world} processes joined within {timeout.total_seconds():.0f} s"
            )
        for other in set(job.multi_get(here)) - answered if job.check(here) else ():
            job.set(f"start/{other.decode()}", mine)
            answered.add(other)
        time.sleep(0.02)
    return mine


def begin_run() -> str | None:
    """Counts a run that this process begins; returns its id if it began before the launcher restarted the job.

    None: it had not begun. "": the launcher counts a restart, so it may have begun, but rank 0 kept the store and the
    id is lost.
    """
    JOB.runs += 1
    if not store_outlives_processes():
        return "" if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" else None
    store = _job_store()
    key = f"run/{JOB.runs}"
    return str(store.get(key).decode()) if store.check([key]) else None


def remember_run(number: int, run: str) -> None:
    """Stores the id of a run of this process, in case the launcher restarts this job (see ``begin_run``)."""
    if "job" in JOB.stores:
        JOB.stores["job"].set(f"run/{number}", run)


def store_outlives_processes() -> bool:
    """Whether a launcher keeps the store, also while it restarts a job; else rank 0 does."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def start_store() -> Any:
    """The store of this start; before the processes have met, one whose name is made of the launcher's variables.

    Raises:
        LookupError: the processes have not met, and no launcher keeps the store.
    """
    counts = (os.environ.get(name, "0") for name in ("TORCHELASTIC_RESTART_COUNT", "WORLD_SIZE"))
    return JOB.stores.get("start") or _under("/".join(counts), _job_store())


def _job_store() -> Any:
    """The store of the job; raises LookupError before the processes have met, if no launcher keeps the store."""
    if "job" not in JOB.stores and store_outlives_processes():
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(*address, is_master=False, timeout=timedelta(seconds=30))  # type: ignore[attr-defined]
        JOB.stores["job"] = _under("folio", store)
    return JOB.stores["job"]


def _under(name: str, store: Any) -> Any:
    return dist.PrefixStore(name, store)  # type: ignore[attr-defined]


def exit_process(code: int) -> NoReturn:
    """Ends the process with this code; at once if it joined a group, without destructors (see ``Ranks.close``)."""
    if JOB.groups:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
