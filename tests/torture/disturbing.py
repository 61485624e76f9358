"""Disturbs the runs of ``starts.RUNS`` by named faults."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torture.starts import RUNS, Ended, Server, arguments, results

from folio.checkpoints import checkpoint
from folio.records import run_folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("server")) as made:
        yield made


@pytest.fixture(scope="module")
def undisturbed(server: Server) -> dict[str, dict[str, Any]]:
    """The results of the runs that are disturbed here, by name."""
    found = {}
    for name in ("alone", "two ranks", "shards"):
        out = server.folder / name
        assert not any(server.start(*arguments(server, RUNS[name], out), ranks=RUNS[name].ranks).codes)
        found[name] = results(RUNS[name], out)
    return found


def go(server: Server, name: str, out: Path, *faults: str, more: tuple[str, ...] = (), **how: int) -> Ended:
    """Runs one of ``RUNS`` with these faults."""
    argv = [*arguments(server, RUNS[name], out), *more]
    ended = server.start(*argv, ranks=RUNS[name].ranks, faults=faults, **how)
    assert "Traceback" not in ended.said
    return ended


def whole(out: Path) -> list[int]:
    """The steps of the checkpoints, all whole, with nothing unfinished beside them."""
    steps = run_folder.steps(out)
    assert all(checkpoint.verify(run_folder.checkpoint_folder(out, step)) for step in steps)
    assert not list(out.glob("checkpoints/.*"))
    return steps
