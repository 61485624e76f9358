"""Starts processes of Folio in milliseconds: imports everything once, and forks each of them.

Each line of stdin is one start, as JSON. The server runs this command line with its faults on one or more ranks, waits
until all have ended, and prints their exit codes; that of a signal is negative.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import resource
import signal
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from by_hand import by_hand_variables, free_port

PATIENCE = 240.0  # seconds until a process that hangs is killed
GRACE = 20.0  # seconds until the other ranks of one that failed are killed, as by a launcher


def main() -> None:
    import torch._dynamo  # which every optimizer imports
    import torch._inductor.compile_fx  # noqa: F401

    from folio.commands import prepare, train  # noqa: F401
    from folio.data.tokenizers import Tiktoken
    from folio.preparation import job  # noqa: F401
    from folio.training import loop, start  # noqa: F401

    for name in sys.argv[1:]:
        Tiktoken(name)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), flush=True)


def run(argv: list[str], ranks: int, **how: Any) -> list[int]:
    """The exit codes of the ranks, by rank."""
    port = free_port()
    processes: dict[int, int] = {}  # process → rank
    leader = 0  # of their process group: the last rank
    for rank in reversed(range(ranks)):
        if (process := os.fork()) == 0:
            os.setpgid(0, leader)
            if ranks > 1:
                os.environ |= by_hand_variables(rank, ranks, port)
            begin(argv, **how)
        leader = leader or process
        with suppress(ProcessLookupError):  # it has ended
            os.setpgid(process, leader)  # it does so too, perhaps after the next one needs the group
        processes[process] = rank
    codes: dict[int, int] = {}
    end, failed = time.monotonic() + PATIENCE, math.inf
    try:
        while processes:
            for process in list(processes):
                if (found := os.waitpid(process, os.WNOHANG))[0]:
                    codes[processes.pop(process)] = code = os.waitstatus_to_exitcode(found[1])
                    failed = min(failed, time.monotonic() if code else math.inf)
            if processes and time.monotonic() > failed + GRACE:
                os.killpg(leader, signal.SIGKILL)
            if time.monotonic() > end:
                raise SystemExit(f"hangs: {' '.join(argv)}")
            time.sleep(0.001)
    finally:
        if processes:  # also if a signal ends this process, which does not reach theirs
            os.killpg(leader, signal.SIGKILL)
    return [codes[rank] for rank in range(ranks)]


def begin(
    argv: list[str], log: str, faults: list[list[str]], chance: list[Any] | None, limit: int = 0, block: int = 2**11
) -> NoReturn:
    """Runs a command in this process. A preparation reads and commits blocks of ``block`` bytes.

    Files can have at most ``limit`` bytes; 0: any number.
    """
    from torture.faults import Chance, Fault, Plan

    from folio import cli
    from folio.preparation import job, sources

    job.COMMIT_EVERY, sources.BLOCK = 0.0, block

    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    faulthandler.dump_traceback_later(PATIENCE - 10)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    Plan([Fault(*f) for f in faults], Chance(*chance) if chance else None, Path(f"{log}.faults")).install()
    sys.argv = ["folio", *argv]
    code = 1
    try:
        cli.main()
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # at once: the interpreter needs half a second to exit


if __name__ == "__main__":
    main()
