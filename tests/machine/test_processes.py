"""A process that dies, hangs or fails: the whole job ends soon and reports why in one line."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from by_hand import by_hand_variables, free_port
from children import GROUP, Child, Spawn, group, reached, to_its_end
from conftest import ROOT, SMALL, python, require_posix
from launches import ENDLESS, faulty, said_at_its_end
from run_results import timeless

from folio import cli
from folio.machine import launch
from folio.records import run_folder

require_posix()


# Ranks that hang or fail


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs(spawn: Spawn, story: Path, tmp_path: Path, rank: int) -> None:
    """The others wait for --timeout, then one names the rank and all end; the rank itself ends too if it continues."""
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
def test_a_rank_that_reads_an_invalid_token(spawn: Spawn, story: Path, tmp_path: Path) -> None:
    """A token id outside the vocabulary, in a row that only rank 2 reads: only its error is printed."""
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
@pytest.mark.parametrize(("who", "prefix"), [("rank == 2", "rank 2: "), ("True", "")])
def test_ranks_that_never_join(spawn: Spawn, story: Path, tmp_path: Path, who: str, prefix: str) -> None:
    """After an error before the ranks meet, none waits for another, and one rank reports it for all."""
    script = faulty(tmp_path, f"{who} and sys.argv.append('--data_dir=nowhere')")
    child = spawn(*group(tmp_path / "out", story, script=script), threads=1)
    said = said_at_its_end(child)
    assert len(said) == 1, said
    assert said[0].startswith(f"train.py: {prefix}nowhere")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_defect_on_one_rank(spawn: Spawn, story: Path, tmp_path: Path) -> None:
    """Its traceback, once, and no output of the others."""
    script = faulty(tmp_path, "rank == 1 and after_step(5, lambda optimizer: optimizer.nothing)")
    child = spawn(*group(tmp_path / "out", story, *ENDLESS, script=script), threads=1)
    assert child.end(60) != 0
    assert child.left() == []
    output = child.output()
    assert output.count("rank 1: Traceback (most recent call last)") == 1
    assert output.count(f'File "{ROOT / "folio" / "training" / "loop.py"}", line') == 1  # in fit
    assert output.count("AttributeError: 'AdamW' object has no attribute 'nothing'") == 1
    assert "does not answer" not in output


@pytest.mark.slow
def test_a_rank_that_drifts(spawn: Spawn, story: Path, tmp_path: Path) -> None:
    """Weights that differ from those of the other ranks are reported at once, and never saved."""
    out = tmp_path / "out"
    script = faulty(
        tmp_path,
        "def drift(optimizer):\n"
        "    optimizer.param_groups[0]['params'][1].data[3, 3] += 1e-6\n"
        "rank == 2 and after_step(9, drift)",
    )
    flags = (*ENDLESS, "--check_replicas_every=1", "--checkpoint_interval=5", "--eval_interval=100")
    said = said_at_its_end(spawn(*group(out, story, *flags, script=script), threads=1))
    assert len(said) == 1, said
    assert "the weights of rank 2 differ from those of" in said[0]
    assert ", first transformer." in said[0]
    assert "resume from an earlier checkpoint" in said[0]
    assert run_folder.steps(out) == [5]


def test_a_process_that_cannot_leave_ends(tmp_path: Path) -> None:
    """If leaving the process group never returns, the process exits with code 1."""
    script = (
        "import time\nfrom folio.machine import processes, runtime\nfrom folio.machine.choices import resolve\n"
        "from folio.config.options import System\n"
        "processes._CLEANUP = 0.5\n"
        "processes.dist.destroy_process_group = lambda: time.sleep(600)\n"
        "made = runtime.Runtime(resolve(System(device='cpu')))\nprint('made', flush=True)\n"
        "made.close()\nprint('left', flush=True)\n"
    )
    done = python("-c", script, timeout=60, **by_hand_variables(0, 1, free_port()))
    assert (done.returncode, done.stdout) == (1, "made\n"), done.stderr


# Processes that were started by hand and do not meet


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "port_is", "words"),
    [(0, "free", "1/2 clients joined"), (1, "free", "127.0.0.1"), (0, "taken", "is taken: choose another")],
)
def test_processes_that_do_not_meet(story: Path, tmp_path: Path, rank: int, port_is: str, words: str) -> None:
    """Others that never start, a missing rank 0, a port that another program uses: one line."""
    script = faulty(
        tmp_path,
        "from datetime import timedelta\nfrom folio.machine import processes\n"
        "processes.START_TIMEOUT = timedelta(seconds=2)",
    )
    argv = (*SMALL, f"--data_dir={story}", f"--out_dir={tmp_path / 'out'}", "--timeout=1")
    port = free_port()
    with socket.socket() as other:
        if port_is == "taken":
            other.bind(("", port))
            other.listen()
        done = python(*script, *argv, timeout=60, **by_hand_variables(rank, 2, port))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
    assert len(said) == 1, done.stderr
    assert words in said[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_processes_with_different_options(spawn: Spawn, story: Path, tmp_path: Path) -> None:
    """They do not train separately: both end, and one of them names the option that differs."""
    port = free_port()
    argv = ("train.py", *SMALL, f"--data_dir={story}", f"--out_dir={tmp_path / 'out'}")
    children = [
        spawn(*argv, f"--learning_rate={rate}", threads=1, **by_hand_variables(rank, 2, port))
        for rank, rate in enumerate((0.001, 0.002))
    ]
    assert [child.end(60) for child in children] == [2, 2]
    assert "".join(child.output() for child in children) == (
        "train.py: learning_rate is 0.001 on rank 0 and 0.002 on rank 1: all processes need the same options, data and "
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
def test_a_lost_rank_is_recognized_by_gloos_messages(monkeypatch: pytest.MonkeyPatch, message: str) -> None:
    """Its two messages, seen when a cable broke, become a line that names the rank that does not answer."""
    for name, value in by_hand_variables(0, 2, 1).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launch, "JOB", launch.Job(stores={"start": launch.dist.HashStore()}))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    code, line = cli._line_about(RuntimeError(message))
    assert code == 1
    assert line.startswith("rank 1 does not answer (")


# Two machines


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two network namespaces, as two hosts, and a cable between them, whose ends have the hosts' names."""
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
    """If the cable between them breaks, both end soon. With a working cable they resume, with one process's losses."""
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
