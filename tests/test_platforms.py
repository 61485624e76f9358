"""What Folio needs of a system. These tests run on Linux and are no test of Windows or macOS (docs/platforms.md)."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import LINUX, SMALL, STORY, python

WITHOUT_POSIX = """
import importlib.abc, os, signal, sys
import numpy, torch  # which choose what they use of the system by sys.platform

MODULES = {"fcntl", "grp", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty"}
OS = '''O_DIRECTORY O_NOFOLLOW O_NONBLOCK chown chroot fchmod fork forkpty getegid geteuid getgid getgroups getloadavg
    getpgid getpgrp getpriority getuid killpg mkfifo mknod nice pread pwrite register_at_fork sched_getaffinity
    sched_setaffinity setpgid setsid sysconf'''
SIGNALS = '''SIGALRM SIGCHLD SIGCONT SIGHUP SIGKILL SIGPIPE SIGQUIT SIGSTOP SIGTSTP SIGUSR1 SIGUSR2 alarm pause
    pthread_kill pthread_sigmask setitimer sigwait'''

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in MODULES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

for name in MODULES:
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Refuse())
for module, names in ((os, OS), (signal, SIGNALS)):
    for name in names.split():
        delattr(module, name)
"""
# Windows's rules for files, as far as Linux can tell what this process has open
OPEN_FILES = """
import os
from pathlib import Path
from folio import files

files.WINDOWS = True

def opened():
    handles = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
    maps = (line.split(maxsplit=5)[5:] for line in Path("/proc/self/maps").read_text().splitlines())
    return {os.readlink(path) for path in handles if os.path.lexists(path)} | {name for name, *_ in filter(None, maps)}

def refusing(function):
    def call(*paths, **how):
        for path in map(os.path.abspath, paths):
            if how.get("dir_fd") is None and any(f"{name}/".startswith(f"{path}/") for name in opened()):
                raise PermissionError(13, "The process cannot access the file", path)
        return function(*paths, **how)
    return call

def open_(path, flags, *more, open=os.open, **how):
    if os.path.isdir(path) and "dir_fd" not in how:
        raise PermissionError(13, "Permission denied", path)
    return open(path, flags, *more, **how)

def replace(source, target, replace=os.replace):
    if os.path.isdir(target):
        raise PermissionError(13, "Access is denied", target)
    return replace(source, target)

def fsync(handle, fsync=os.fsync):
    flags = Path(f"/proc/self/fdinfo/{handle}").read_text().split("flags:")[1].split()[0]
    if int(flags, 8) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(9, "Bad file descriptor")
    return fsync(handle)

import shutil
shutil._use_fd_functions = False  # Windows has none
os.replace, os.fsync, os.open = refusing(replace), fsync, open_
os.unlink, os.remove, os.rmdir, os.rename = map(refusing, (os.unlink, os.remove, os.rmdir, os.rename))
"""
RUN = """
from folio import cli

def folio(*argv):
    sys.argv = ["folio", *argv]
    try:
        cli.main()
    except SystemExit as end:
        assert end.code == 0, (argv, end.code)
    gc.collect()  # closes what the end of a process would close

import gc, sys
story, small = sys.argv[1], sys.argv[2:]
folio("prepare", story, "--name=story", "--tokenizer=char")
folio("train", "--dataset=story", *small)
folio("train", "--dataset=story", *small, "--max_iters=20", "--init_from=resume")
folio("train", "--dataset=story", *small)  # which moves the run aside
folio("sample", "--num_samples=2", "--max_new_tokens=20", "--device=cpu", "--interactive", "--start=The")
folio("eval", "--eval_iters=2", "--device=cpu")
folio("plan", *small, "--dataset=story")
folio("prepare", story, "--name=story", "--tokenizer=bytes", "--overwrite")
folio("doctor")
"""


def run(before: str, folder: Path) -> list[str]:
    """The warnings of all commands, after this code has changed the process; nothing unfinished is left."""
    done = python("-c", before + RUN, STORY, *SMALL, "--keep_checkpoints=1", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not [p for p in folder.rglob("*") if p.name.startswith(".") or "lock" in p.name]
    return done.stderr.splitlines()


@pytest.mark.slow
def test_a_python_without_its_posix_parts_which_is_not_windows(tmp_path: Path) -> None:
    """Each command that writes says that there are no locks; nothing else is missing."""
    no_locks = "no file locks on this system: make sure that no other process writes there"
    found = set(run(WITHOUT_POSIX, tmp_path)) - {"warning: only soft file lock is available"}  # of the package filelock
    assert found == {f"warning: {name}: {no_locks}" for name in ("data/story/.preparing", "out")}


@pytest.mark.slow
@LINUX
def test_a_linux_that_removes_no_open_file_which_is_not_windows(tmp_path: Path) -> None:
    """Everything is removed and replaced that the commands remove and replace, without a warning."""
    assert run(OPEN_FILES, tmp_path) == []
