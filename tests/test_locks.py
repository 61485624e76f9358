"""A folder has one writer at a time, and its lock is released with the process."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from children import Spawn
from conftest import NO_POSIX, ROOT, make_pipe

from folio.errors import UserError
from folio.locks import InUseError, Lock

fcntl = pytest.importorskip("fcntl", reason=NO_POSIX)
HOLDER = """
import sys, time, os, subprocess
from pathlib import Path
from folio.locks import Lock
lock = Lock(Path(sys.argv[1]), "taken", "wait")
{then}
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(spawn: Spawn) -> Callable[..., Any]:
    """Starts a process that takes a lock and then runs more code."""

    def start(path: Path, then: str = "") -> Any:
        child = spawn("-c", HOLDER.replace("{then}", then), str(path))
        child.wait_until(lambda: "held" in child.output())
        return child

    return start


def taken(path: Path) -> Lock:
    return Lock(path, "another is there", "wait")


def test_a_lock_has_one_holder_until_its_process_ends(holder: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "lock"
    child = holder(path)
    with pytest.raises(InUseError) as refusal:
        taken(path)
    who = rf"host {socket.gethostname()}, process {child.process.pid}, since 20"
    assert str(refusal.value).startswith(f"{path.parent}: another is there ({who}")
    assert str(refusal.value).endswith("): wait")
    child.kill()
    child.end()
    lock = taken(path)
    assert json.loads(path.read_text())["pid"] == os.getpid()
    lock.release()
    assert not path.exists()


def test_a_released_lock_leaves_only_the_folders_of_others(tmp_path: Path) -> None:
    for others in ([], ["new/file"]):
        lock = taken(tmp_path / "new" / "folder" / "lock")
        for name in others:
            (tmp_path / name).write_text("")
        lock.release()
        lock.release()
        assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == (
            ["new", *others] if others else []
        )


@pytest.mark.parametrize(
    "then",
    [
        "if os.fork() == 0:\n    print('child', os.getpid(), flush=True)\n    time.sleep(600)",
        "print('child', subprocess.Popen(['sleep', '600'], close_fds=False).pid, flush=True)",
    ],
    ids=["forked", "started"],
)
def test_a_child_does_not_hold_the_lock(holder: Callable[..., Any], tmp_path: Path, then: str) -> None:
    """A worker or a tracker's service may outlive the killed process."""
    child = holder(tmp_path / "lock", then)
    child.wait_until(lambda: "child" in child.output())
    other = int(child.output().split("child ")[1].split()[0])
    child.kill([child.process.pid])
    child.end()
    try:
        os.kill(other, 0)
        time.sleep(0.1)
        taken(tmp_path / "lock").release()
    finally:
        os.kill(other, signal.SIGKILL)


def test_a_childs_end_does_not_release_the_lock(tmp_path: Path) -> None:
    lock = taken(tmp_path / "lock")
    script = "import sys; sys.exit(0)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True).returncode == 0
    if (child := os.fork()) == 0:
        lock.release()
        os._exit(0)
    os.waitpid(child, 0)
    with pytest.raises(InUseError):
        taken(tmp_path / "lock")
    lock.release()


def test_one_of_many_threads_gets_the_lock(tmp_path: Path) -> None:
    """Although its folder is created and removed with the lock."""
    path, together = tmp_path / "new" / "lock", threading.Barrier(8)
    held, most, errors = [0], [0], []

    def often() -> None:
        together.wait()
        for _ in range(100):
            try:
                lock = taken(path)
            except InUseError:
                continue
            except BaseException as error:
                errors.append(error)
                raise
            held[0] += 1
            most[0] = max(most[0], held[0])
            time.sleep(0.0002)
            held[0] -= 1
            lock.release()

    threads = [threading.Thread(target=often) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most[0], errors) == (1, [])
    assert not path.exists()


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One warning, and the run continues; any other error is raised."""

    def failing(number: int) -> Callable[..., None]:
        def fail(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        return fail

    for number in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
        monkeypatch.setattr(fcntl, "flock", failing(number))
        with pytest.warns(UserWarning, match="no file locks there") as told:
            taken(tmp_path / "lock").release()
        assert len(told) == 1
    monkeypatch.setattr(fcntl, "flock", failing(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        taken(tmp_path / "lock")


@pytest.mark.parametrize(
    "content", ["", "[]", '{"host": 1}', "[" * 5000, '{"host": "\\u001b[2J", "pid": 1, "since": ""}']
)
def test_a_lock_file_without_a_holders_name(content: str, tmp_path: Path) -> None:
    lock = taken(tmp_path / "lock")
    (tmp_path / "lock").write_text(content)
    with pytest.raises(InUseError) as refusal:
        taken(tmp_path / "lock")
    assert str(refusal.value).isprintable()
    lock.release()


def test_a_lock_file_that_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"director|exists"):
        taken(tmp_path / "file" / "lock")


@pytest.mark.parametrize("other", ["folder", "link", "pipe", "socket"])
def test_something_else_has_the_name_of_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path may not be long
    with socket.socket(socket.AF_UNIX) as there:
        make: dict[str, Callable[[str], object]] = {
            "folder": os.mkdir,
            "link": lambda name: os.symlink(tmp_path / "elsewhere", name),
            "pipe": make_pipe,
            "socket": there.bind,
        }
        make[other]("lock")
        with pytest.raises(UserError, match=r"lock is not a file of its own, as a lock must be: remove it$"):
            taken(tmp_path / "lock")
    assert not (tmp_path / "elsewhere").exists()
