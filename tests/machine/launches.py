"""Runs in processes of their own, under a launcher or started by hand, with and without faults."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from by_hand import free_port
from children import Child
from conftest import ROOT, SMALL

from folio import cli
from folio.commands import train
from folio.records.metrics import read_metrics

ENV = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | {"PYTHONPATH": str(ROOT)}

ENDLESS = ("--max_iters=100000", "--log_interval=1", "--timeout=4")
RUN = (*SMALL, "--max_iters=12", "--lr_decay_iters=12", "--eval_interval=4", "--dropout=0.1", "--learning_rate=1e-2")

# train.py with a fault: lines that run before the training
FAULTY = """
import os, sys
from itertools import count
from folio import cli
from folio.machine.runtime import Runtime
rank = int(os.environ["RANK"])

def after_step(step, do):
    update, steps = Runtime.step, count()
    def wrapped(self, optimizer, *args):
        norm = update(self, optimizer, *args)
        if next(steps) == step:
            do(optimizer)
        return norm
    Runtime.step = wrapped

{fault}
cli.main("train")
"""


def faulty(folder: Path, fault: str) -> tuple[Path]:
    """A script that runs the lines of ``fault`` and then trains."""
    path = folder / "train.py"
    path.write_text(FAULTY.replace("{fault}", fault))
    return (path,)


def said_at_its_end(child: Child, timeout: float = 60) -> list[str]:
    """Folio's lines of a job that fails; checks that no process is left, and that there is no traceback of Folio."""
    assert child.end(timeout) != 0, child.output()
    assert child.left() == []
    assert f'File "{ROOT / "folio"}' not in child.output(), child.output()
    return [line for line in child.output().splitlines() if line.startswith(("train.py: ", "folio: "))]


def saved(out: Path) -> dict[str, bytes]:
    """The tensor files of every checkpoint; checks that there are no unfinished ones."""
    assert [p.name for p in (out / "checkpoints").iterdir() if p.name.startswith(".")] == []
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.glob("checkpoints/*/*.safetensors"))}


def go(data: Path, out: Path, *flags: str) -> int:
    """A run in this process."""
    argv = [*RUN, f"--data_dir={data}", f"--out_dir={out}", *flags]
    return train.main(cli.parse(train.Options, argv, "folio train", files=True))


def together(*commands: tuple[list[Any], dict[str, str]]) -> list[subprocess.CompletedProcess[str]]:
    """Runs Python with these arguments and variables, all at the same time."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    processes = [
        subprocess.Popen([sys.executable, *map(str, argv)], env={**ENV, **env}, **pipes) for argv, env in commands
    ]
    try:
        outputs = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.terminate()  # a launcher passes it on
    return [
        subprocess.CompletedProcess(p.args, p.returncode, *said) for p, said in zip(processes, outputs, strict=True)
    ]


def torchrun(ranks: int, *argv: str | Path, nodes: int = 1) -> list[subprocess.CompletedProcess[str]]:
    """Runs a command on so many processes under one launcher, or under one for each of several "machines"."""
    place = ["--standalone"] if nodes == 1 else ["--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    launcher = ["-m", "torch.distributed.run", *place, f"--nnodes={nodes}", f"--nproc_per_node={ranks // nodes}"]
    return together(*(([*launcher, f"--node_rank={node}", *argv], {"OMP_NUM_THREADS": "1"}) for node in range(nodes)))


def by_hand(ranks: int, *argv: str | Path, **env: str) -> list[subprocess.CompletedProcess[str]]:
    """Runs a command on so many processes without a launcher."""
    env |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return together(*(([*argv], {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(ranks)))


@dataclass(frozen=True)
class Trained:
    """A run's folder, and its output."""

    out: Path
    said: str

    def figures(self, *names: str, begin: int = 0) -> list[float]:
        """These fields of all records, from step ``begin``."""
        found = read_metrics(self.out / "metrics.jsonl")
        return [r[name] for r in found if r["step"] >= begin for name in names if name in r]

    def losses(self, begin: int = 0) -> list[float]:
        return self.figures("loss", "train_loss", "val_loss", begin=begin)

    def norms(self) -> list[float]:
        return self.figures("grad_norm")


Train = Callable[..., Trained]


def trained(out: Path, ranks: int, argv: list[str], how: str = "torchrun") -> Trained:
    """A finished run; with one rank, it runs in this process."""
    argv = [*argv, f"--out_dir={out}"]
    if ranks == 1:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            assert train.main(cli.parse(train.Options, argv, "folio train", files=True)) == 0
        return Trained(out, said.getvalue())
    if how == "by hand":
        done = by_hand(ranks, "train.py", *argv, OMP_NUM_THREADS="1")
    else:
        done = torchrun(ranks, "train.py", *argv)
    assert all(d.returncode == 0 for d in done), [d.stderr for d in done]
    return Trained(out, "".join(d.stdout for d in done))
