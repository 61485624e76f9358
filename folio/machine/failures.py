"""Which process of a job reports an error: the first that failed, in one line."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist

from folio.machine import launch


class Verdict(NamedTuple):
    """Whether this process failed before all others, and the ranks that have not reported an error."""

    first: bool
    silent: list[str]


# the last error and its verdict, since the store is asked only once per error
_LAST: list[tuple[BaseException, Verdict]] = []


def first_error(line: str, error: BaseException) -> str:
    """The message about this process's error: ``line`` if this is the first process to fail, else "".

    It may take some seconds, in which the other processes can report theirs.
    """
    rank = os.environ.get("RANK", "")
    if not rank.isdecimal():
        return line
    if not _LAST or _LAST[0][0] is not error:
        _LAST[:] = [(error, _ask_store(error))]
    first, silent = _LAST[0][1]
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


def _ask_store(error: BaseException) -> Verdict:
    """Reports this error to the store of the job, and reads there which processes have reported one.

    A rank above 0 waits a second first, so that rank 0 reports an error that all have. A rank that failed only because
    another is gone waits two, so that the other can report its own error. Without a store, each process counts as the
    first.
    """
    rank = os.environ["RANK"]
    found: list[Verdict] = []

    def ask() -> None:
        with contextlib.suppress(LookupError, ValueError, RuntimeError):
            store, ranks = launch.start_store(), range(int(os.environ["WORLD_SIZE"]))
            store.set(f"failed/{rank}", "")
            time.sleep(2.0 if _is_lost(error) else 1.0 * (rank != "0"))
            first = store.compare_set("failed/first", "", rank).decode() == rank
            found.append(Verdict(first, [str(r) for r in ranks if not store.check([f"failed/{r}"])]))
            store.set(f"heard/{rank}", "")
            if rank == "0" and not launch.store_outlives_processes():  # the others still need this process's store
                store.wait([f"heard/{r}" for r in ranks], timedelta(seconds=3))

    thread = threading.Thread(target=ask, daemon=True)  # a store behind a broken link never answers
    thread.start()
    thread.join(10)
    return found[0] if found else Verdict(True, [])
