"""A process that dies, hangs or errs: the whole job ends soon and says why in one line, or goes on by itself."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import (
    GROUP,
    ROOT,
    SMALL,
    Child,
    Outcome,
    Spawn,
    assert_refused,
    assert_same_bits,
    group,
    python,
    reached,
    timeless,
    to_its_end,
)

from folio import cli
from folio.checkpoints import checkpoint
from folio.commands import train
from folio.machine import processes
from folio.machine.runtime import Runtime
from folio.records import run_folder
from folio.training import loop

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no such signals")

JOBS: list[processes.Job] = []  # of this process, whose groups must not be destroyed (see Ranks.close)
STANDALONE = ("--standalone", "--nproc_per_node=3")
ENDLESS = ("--max_iters=100000", "--log_interval=1", "--timeout=4")
RUN = (*SMALL, "--max_iters=12", "--lr_decay_iters=12", "--eval_interval=4", "--dropout=0.1", "--learning_rate=1e-2")

# train.py, whose rank does what stands in the middle
FAULTY = """
import os, sys, time
from itertools import count
from folio import cli, files
from folio.checkpoints import checkpoint
from folio.machine.runtime import Runtime
rank = int(os.environ["RANK"])

def after_step(step, do):
    update, steps = Runtime.update, count()
    def wrapped(self, optimizer, *args):
        update(self, optimizer, *args)
        if next(steps) == step:
            do(optimizer)
    Runtime.update = wrapped

{fault}
cli.main("train")
"""


@pytest.fixture
def faulty(tmp_path: Path) -> Callable[[str], Path]:
    """A script that trains, once these lines were run."""

    def write(fault: str) -> Path:
        path = tmp_path / "train.py"
        path.write_text(FAULTY.replace("{fault}", fault))
        return path

    return write


def said_at_its_end(child: Child, timeout: float = 60) -> list[str]:
    """Our lines of a job that fails, which leaves no process behind, and no traceback through this package."""
    assert child.end(timeout) != 0, child.output()
    assert child.left() == []
    assert f'File "{ROOT / "folio"}' not in child.output(), child.output()
    return [line for line in child.output().splitlines() if line.startswith("train.py: ")]


def saved(out: Path) -> dict[str, bytes]:
    """The tensors of every checkpoint, and nothing unfinished beside them."""
    assert [p.name for p in (out / "checkpoints").iterdir() if p.name.startswith(".")] == []
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.glob("checkpoints/*/*.safetensors"))}


# Ranks that hang or err


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs(spawn: Spawn, story: Path, tmp_path: Path, rank: int) -> None:
    """The others wait for --timeout, then one of them names it and all end; so does it, should it wake up."""
    out = tmp_path / "out"
    child = spawn(*group(out, story, *ENDLESS), threads=1)
    child.wait_until(reached(out, 7))
    began = time.monotonic()
    stopped = sorted(child.family()[1:])[rank]
    child.kill([stopped], signal.SIGSTOP)
    child.wait_until(lambda: sorted(child.left()) == [child.process.pid, stopped], 30)
    assert time.monotonic() - began > 4
    child.kill([stopped], signal.SIGCONT)  # else the launcher kills it, half a minute later
    said = said_at_its_end(child)
    assert len(said) == 1, said
    assert f"rank {rank} does not answer" in said[0]
    assert "--timeout" in said[0]


@pytest.mark.slow
def test_a_rank_that_reads_what_is_wrong(spawn: Spawn, story: Path, tmp_path: Path) -> None:
    """A token id outside the vocabulary, in a row that rank 2 alone reads: its error, and nobody else's."""
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(story, data, ignore=shutil.ignore_patterns("meta.json"))
    tokens = np.memmap(data / "train.bin", dtype=np.uint16, mode="r+")
    tokens[(10 * 3 + 2) * 64 + 30] = 777  # in batch 2 of step 10, each 4 rows of 16
    tokens.flush()
    child = spawn(*group(out, data, *ENDLESS, "--sampling=sequential", "--vocab_size=64"), threads=1)
    said = said_at_its_end(child)
    assert len(said) == 1, said
    assert said[0].startswith(f"train.py: rank 2: {data / 'train.bin'}: token id 777 is outside the vocabulary of")
    assert [r["step"] for r in timeless(out) if r["kind"] == "train"] in (list(range(9)), list(range(10)))


@pytest.mark.slow
@pytest.mark.parametrize(("who", "speaks"), [("rank == 2", "rank 2: "), ("True", "")])
def test_ranks_that_never_join(
    spawn: Spawn, faulty: Callable[[str], Path], story: Path, tmp_path: Path, who: str, speaks: str
) -> None:
    """An error before they meet does not leave others waiting, and one speaks for all that have it."""
    script = faulty(f"{who} and sys.argv.append('--data_dir=nowhere')")
    child = spawn(*group(tmp_path / "out", story, script=script), threads=1)
    said = said_at_its_end(child)
    assert len(said) == 1, said
    assert said[0].startswith(f"train.py: {speaks}nowhere")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_defect_on_one_rank(spawn: Spawn, faulty: Callable[[str], Path], story: Path, tmp_path: Path) -> None:
    """Its traceback, once, and of the others nothing."""
    script = faulty("rank == 1 and after_step(5, lambda optimizer: optimizer.nothing)")
    child = spawn(*group(tmp_path / "out", story, *ENDLESS, script=script), threads=1)
    assert child.end(60) != 0
    assert child.left() == []
    output = child.output()
    assert output.count("rank 1: Traceback (most recent call last)") == 1
    assert output.count(f'File "{ROOT / "folio" / "training" / "loop.py"}", line') == 1  # in fit
    assert output.count("AttributeError: 'AdamW' object has no attribute 'nothing'") == 1
    assert "does not answer" not in output


@pytest.mark.slow
def test_a_rank_that_drifts(spawn: Spawn, faulty: Callable[[str], Path], story: Path, tmp_path: Path) -> None:
    """Weights that are no longer those of the others are told at once, and never saved."""
    out = tmp_path / "out"
    script = faulty(
        "def drift(optimizer):\n"
        "    optimizer.param_groups[0]['params'][1].data[3, 3] += 1e-6\n"
        "rank == 2 and after_step(9, drift)"
    )
    flags = (*ENDLESS, "--check_replicas_every=1", "--checkpoint_interval=5", "--eval_interval=100")
    said = said_at_its_end(spawn(*group(out, story, *flags, script=script), threads=1))
    assert len(said) == 1, said
    assert "the weights of rank 2 are no longer those of" in said[0]
    assert ", first transformer." in said[0]
    assert "resume from an earlier checkpoint" in said[0]
    assert run_folder.steps(out) == [5]


def test_a_process_that_cannot_leave_ends(tmp_path: Path) -> None:
    """Where the process group never lets go of a process, it ends, and its exit code says that it failed."""
    script = (
        "import time\nfrom folio.machine import processes, runtime\nfrom folio.machine.choices import resolve\n"
        "from folio.config.options import System\n"
        "processes._CLEANUP = 0.5\n"
        "processes.dist.destroy_process_group = lambda: time.sleep(600)\n"
        "made = runtime.Runtime(resolve(System(device='cpu')))\nprint('made', flush=True)\n"
        "made.close()\nprint('left', flush=True)\n"
    )
    done = python("-c", script, timeout=60, **by_hand(0, 1, free_port()))
    assert (done.returncode, done.stdout) == (1, "made\n"), done.stderr


# Processes that were started by hand, and do not find each other


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def by_hand(rank: int, world: int, port: int) -> dict[str, str]:
    there = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in there.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "port_is", "words"),
    [(0, "free", "1/2 clients joined"), (1, "free", "127.0.0.1"), (0, "taken", "is taken: choose another")],
)
def test_processes_that_do_not_meet(
    faulty: Callable[[str], Path], story: Path, tmp_path: Path, rank: int, port_is: str, words: str
) -> None:
    """Others that never come, a rank 0 that is not there, a port that is another program's: one line."""
    script = faulty(
        "from datetime import timedelta\nfrom folio.machine import processes\nprocesses.PATIENCE = timedelta(seconds=2)"
    )
    argv = (*SMALL, f"--data_dir={story}", f"--out_dir={tmp_path / 'out'}", "--timeout=1")
    port = free_port()
    with socket.socket() as other:
        if port_is == "taken":
            other.bind(("", port))
            other.listen()
        done = python(script, *argv, timeout=60, **by_hand(rank, 2, port))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
    assert len(said) == 1, done.stderr
    assert words in said[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_processes_that_were_asked_different_things(spawn: Spawn, story: Path, tmp_path: Path) -> None:
    """They do not train apart from each other: both end, and one of them says what differs."""
    port = free_port()
    argv = ("train.py", *SMALL, f"--data_dir={story}", f"--out_dir={tmp_path / 'out'}")
    children = [
        spawn(*argv, f"--learning_rate={rate}", threads=1, **by_hand(rank, 2, port))
        for rank, rate in enumerate((0.001, 0.002))
    ]
    assert [child.end(60) for child in children] == [2, 2]
    assert "".join(child.output() for child in children) == (
        "train.py: learning_rate is 0.001 on rank 0 and 0.002 on rank 1: all processes need the same knobs, data and "
        "out_dir\n"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "message",
    [
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.1]:2. This is …",
        "Application timeout caused pair closure",
    ],
)
def test_a_loss_is_known_by_what_gloo_says(monkeypatch: pytest.MonkeyPatch, message: str) -> None:
    """Both of its ways to tell it, seen where a cable broke, name who was not heard of; neither is a defect."""
    for name, value in by_hand(0, 2, 1).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes, "JOB", processes.Job(stores={"start": processes.dist.HashStore()}))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    code, line = cli._told(RuntimeError(message))
    assert code == 1
    assert line.startswith("rank 1 does not answer (")


# A launcher that starts all anew


@pytest.mark.slow
@pytest.mark.parametrize("before_a_checkpoint", [False, True])
def test_a_group_goes_on_by_itself(
    spawn: Spawn, undisturbed: Callable[[str], Path], story: Path, tmp_path: Path, before_a_checkpoint: bool
) -> None:
    """Ranks are killed one after the other; the same command line each time, and the same bits at the end."""
    out = tmp_path / "out"
    flags = ("--init_from=scratch", "--check_replicas_every=9")
    child = spawn(*group(out, story, *flags, launcher=(*STANDALONE, "--max_restarts=2")), threads=1)
    for step, rank in ((7, 0), (24, 2)) if before_a_checkpoint else ((24, 1), (47, 0)):
        child.wait_until(lambda: reached(out, step)() and (step < 20 or run_folder.steps(out) != []))  # noqa: B023
        child.kill([sorted(child.family()[1:])[rank]])
    said = to_its_end(child)
    assert child.left() == []
    assert said.count(f"resuming {out} at step ") == (1 if before_a_checkpoint else 2)
    assert_same_bits(out, undisturbed("group"))
    aside = sorted(p.name for p in out.iterdir() if p.name.startswith("previous"))
    assert aside == (["previous-1"] if before_a_checkpoint else [])


@pytest.mark.slow
def test_launchers_of_two_machines_go_on(spawn: Spawn, story: Path, tmp_path: Path) -> None:
    """One counts the restart and the other does not; still all meet again, and know the run that they were at."""
    out, port = tmp_path / "out", free_port()
    common = ("--nnodes=2", "--nproc_per_node=1", "--max_restarts=2", "--rdzv_id=9", "--rdzv_backend=c10d")
    launcher = (*common, f"--rdzv_endpoint=127.0.0.1:{port}", "--local_addr=127.0.0.1")
    flags = ("--init_from=scratch", "--gradient_accumulation_steps=2", "--log_interval=1")
    children = [spawn(*group(out, story, *flags, launcher=launcher), threads=1) for _ in range(2)]
    children[0].wait_until(lambda: reached(out, 24)() and run_folder.steps(out) != [])
    children[1].kill(children[1].family()[1:])
    said = "".join(to_its_end(child) for child in children)
    assert said.count(f"resuming {out} at step ") == 1
    assert [r["step"] for r in timeless(out) if r["kind"] == "train"] == list(range(70))
    assert not (out / "previous-1").exists()


def go(data: Path, out: Path, *flags: str) -> int:
    """A run in this process."""
    argv = [*RUN, f"--data_dir={data}", f"--out_dir={out}", *flags]
    return train.main(cli.parse(train.Options, argv, "folio train", files=True))


@pytest.fixture
def attempt(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """What the launcher tells the one process of a job, and in which step that dies; no launcher for ""."""
    update, stores = Runtime.update, {}

    def told(job: str, restarts: int = 0, dies_in: int | None = None) -> None:
        JOBS.append(processes.Job())  # as of a process that has just begun
        monkeypatch.setattr(processes, "JOB", JOBS[-1])
        monkeypatch.setattr(loop, "_NUMBERS", count())
        for name in (*by_hand(0, 1, 0), "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_USE_AGENT_STORE"):
            monkeypatch.delenv(name, raising=False)
        if job:
            if job not in stores:
                stores[job] = processes.dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            for name, value in by_hand(0, 1, stores[job].port).items():
                monkeypatch.setenv(name, value)
            monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))
            monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        steps = count()

        def die(self: Runtime, *args: Any) -> None:
            update(self, *args)
            if next(steps) == dies_in:
                raise KeyboardInterrupt

        monkeypatch.setattr(Runtime, "update", die)

    return told


@pytest.mark.parametrize("begin", ["scratch", "another run"])
def test_a_restart_goes_on_with_its_own_run(
    attempt: Callable[..., None], story: Path, tmp_path: Path, begin: str
) -> None:
    """Not with what the first attempt began from, also where it took another run's weights."""
    if begin == "another run":
        begin = str(tmp_path / "other")
        go(story, tmp_path / "other", "--seed=5")
    argv = (f"--init_from={begin}",)
    go(story, tmp_path / "undisturbed", *argv)
    for restarts, dies_in in enumerate((9, 1, None)):  # the second dies in step 9 too
        attempt("a", restarts, dies_in)
        if dies_in is None:
            go(story, tmp_path / "out", *argv)
        else:
            with pytest.raises(KeyboardInterrupt):
                go(story, tmp_path / "out", *argv)
    assert_same_bits(tmp_path / "out", tmp_path / "undisturbed")
    assert not (tmp_path / "out" / "previous-1").exists()


def test_a_count_of_restarts_is_enough(
    attempt: Callable[..., None], story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nobody keeps a store that would know the run."""
    out = tmp_path / "out"
    attempt("", dies_in=9)
    with pytest.raises(KeyboardInterrupt):
        go(story, out)
    attempt("")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    go(story, out)
    assert not (out / "previous-1").exists()
    assert [r["step"] for r in timeless(out) if r["kind"] == "train"] == list(range(12))


@pytest.mark.parametrize(("older", "restarts"), [("b", 1), ("b", 0), ("", 1)])
def test_what_an_older_job_left_is_not_gone_on_with(
    attempt: Callable[..., None], story: Path, tmp_path: Path, older: str, restarts: int
) -> None:
    """Neither by a restart whose first attempt died before it took the folder, nor by a first attempt."""
    out = tmp_path / "out"
    attempt(older, dies_in=9)
    with pytest.raises(KeyboardInterrupt):
        go(story, out)
    left = saved(out)
    attempt("a", restarts)
    go(story, out)
    assert saved(out / "previous-1") == left
    assert [r["step"] for r in timeless(out) if r["kind"] == "train"] == list(range(12))


# Checkpoints that are written meanwhile


@pytest.mark.parametrize("meanwhile", [True, False])
def test_a_checkpoint_that_is_written_slowly(
    story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, meanwhile: bool
) -> None:
    """Training goes on, or not; either way the file holds the step that it is named after."""
    flags = ("--keep_checkpoints=9", f"--async_checkpoint={meanwhile}")
    go(story, tmp_path / "fast", "--keep_checkpoints=9", "--async_checkpoint=False")
    out, save, went_on = tmp_path / "slow", checkpoint.save, []

    def slowly(*args: Any) -> None:
        before = len(timeless(out))
        time.sleep(0.5)
        went_on.append(len(timeless(out)) > before)
        save(*args)

    monkeypatch.setattr(checkpoint, "save", slowly)
    go(story, out, *flags)
    assert went_on == [meanwhile, meanwhile, False]  # the last one is waited for
    assert run_folder.steps(out) == [4, 8, 12]
    assert saved(out) == saved(tmp_path / "fast")
    assert timeless(out) == timeless(tmp_path / "fast")
    for step in (4, 8, 12):
        slow, fast = (
            json.loads((run_folder.checkpoint_folder(folder, step) / "state.json").read_text())
            for folder in (out, tmp_path / "fast")
        )
        for state in (slow, fast):
            state |= {"run": "", "seconds": 0}
            del state["sha256"]["state.json"]  # which is of these too
        assert slow == fast


@pytest.mark.parametrize(("fails", "kept"), [(4, []), (8, [4]), (12, [4, 8])])
def test_a_write_that_fails_in_the_thread(
    folio: Callable[..., Outcome],
    story: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fails: int,
    kept: list[int],
) -> None:
    """Ends the run at the next checkpoint, in one line, and leaves the former ones alone."""
    out, save_file = tmp_path / "out", checkpoint.save_file

    def full(tensors: Any, path: Path) -> None:
        if path.name == run_folder.OPTIMIZER and path.parent.name == f".step-{fails:08d}.unfinished":
            raise OSError(28, "No space left on device")
        save_file(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    argv = (*RUN, f"--data_dir={story}", f"--out_dir={out}", "--async_checkpoint=True")
    assert_refused(folio("train", *argv), run_folder.checkpoint_folder(out, fails), "No space left", "--out_dir")
    assert run_folder.steps(out) == kept
    assert all(checkpoint.verify(run_folder.checkpoint_folder(out, step)) for step in kept)
    saved(out)
    assert timeless(out)[-1]["step"] == min(fails + 4, 12)


@pytest.mark.slow
def test_a_write_that_fails_ends_all(spawn: Spawn, faulty: Callable[[str], Path], story: Path, tmp_path: Path) -> None:
    """Rank 0's thread meets it, rank 0 says it, and no rank waits for another."""
    out = tmp_path / "out"
    script = faulty(
        "def fail(*args):\n    raise OSError(28, 'No space left on device')\n"
        "if rank == 0:\n    checkpoint.save_file = fail"
    )
    said = said_at_its_end(spawn(*group(out, story, *ENDLESS, script=script), threads=1))
    assert len(said) == 1, said
    assert said[0].startswith(f"train.py: {run_folder.checkpoint_folder(out, 20)} could not be written")
    assert saved(out) == {}
    assert timeless(out)[-1]["step"] == 35


@pytest.mark.slow
def test_killed_while_a_checkpoint_is_written(
    spawn: Spawn, faulty: Callable[[str], Path], undisturbed: Callable[[str], Path], story: Path, tmp_path: Path
) -> None:
    """The former checkpoint counts, which was written when training was steps ahead of it."""
    out = tmp_path / "out"
    script = faulty(
        "save, sync = checkpoint.save, files.sync\n"
        "def late(*args):\n    time.sleep(1)\n    save(*args)\n"
        "def stuck(path):\n    time.sleep(600 if path.name == '.step-00000040.unfinished' else 0)\n    sync(path)\n"
        "checkpoint.save, files.sync = late, stuck"
    )
    child = spawn(*group(out, story, "--log_interval=1", script=script), threads=1)
    unfinished = out / "checkpoints" / ".step-00000040.unfinished"
    child.wait_until(lambda: unfinished.exists() and reached(out, 44)())
    child.kill()
    assert child.end() == -signal.SIGKILL
    assert unfinished.exists()
    assert run_folder.steps(out) == [20, 35]
    said = to_its_end(spawn(*group(out, story, "--log_interval=1"), threads=1))
    assert f"resuming {out} at step 35" in said
    assert_same_bits(out, undisturbed("group"))


# Two machines


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two network namespaces, each a host of its own, and one cable between them, whose ends are named as they are."""
    names = [f"fo{os.getpid() % 10**7}{side}" for side in "ab"]

    def ip(*argv: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["ip", *argv], capture_output=True, text=True, check=check)

    if not shutil.which("ip"):
        pytest.skip("needs ip, of iproute2")
    if (tried := ip("netns", "add", names[0], check=False)).returncode:
        pytest.skip(f"needs network namespaces: {tried.stderr.strip()}")
    try:
        ip("netns", "add", names[1])
        ip("link", "add", names[0], "netns", names[0], "type", "veth", "peer", "name", names[1], "netns", names[1])
        for i, name in enumerate(names):
            ip("-n", name, "address", "add", f"10.213.7.{i + 1}/24", "dev", name)
            ip("-n", name, "link", "set", name, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            ip("netns", "delete", name, check=False)


@pytest.mark.slow
def test_two_machines(hosts: list[str], spawn: Spawn, story: Path, tmp_path: Path) -> None:
    """The cable between them breaks: both end soon. Repaired, both go on, to what one process finds."""
    out, alone = tmp_path / "out", tmp_path / "alone"
    flags = ("--gradient_accumulation_steps=2", "--log_interval=1", "--learning_rate=1e-3", "--timeout=4")

    def started() -> list[Child]:
        common = ("--nnodes=2", "--nproc_per_node=1", "--master_addr=10.213.7.1", "--master_port=29400")
        return [
            spawn(
                *group(out, story, *flags, launcher=(*common, f"--node_rank={i}")),
                threads=1,
                before=("ip", "netns", "exec", name),
                GLOO_SOCKET_IFNAME=name,
            )
            for i, name in enumerate(hosts)
        ]

    first, second = started()
    first.wait_until(lambda: reached(out, 24)() and run_folder.steps(out) != [])
    subprocess.run(["ip", "-n", hosts[1], "link", "set", hosts[1], "down"], check=True)
    assert [child.end(30) for child in (first, second)] == [1, 1]
    for child, who in ((first, "rank 1"), (second, "rank 1: another process")):
        said = said_at_its_end(child)
        assert len(said) == 1, said
        assert said[0].startswith(f"train.py: {who} does not answer")
    subprocess.run(["ip", "-n", hosts[1], "link", "set", hosts[1], "up"], check=True)
    for child in started():
        to_its_end(child)
    done = python("train.py", *GROUP, *flags, f"--data_dir={story}", f"--out_dir={alone}", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert [p.name for p in out.iterdir() if p.name.startswith("previous")] == []
    ours, theirs = timeless(out), timeless(alone)
    assert len(ours) == len(theirs) == 70 + 3
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, abs=1e-5)
