"""Starts processes by ``torture.server``, for a test or for ``make torture``; and the runs that are disturbed."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

from torture.faults import Chance, Fault

import folio
from folio.records import run_folder

HERE = Path(__file__).resolve().parent
STORY = HERE.parent / "story.txt"

TRAIN = (
    *("train", "--device=cpu", "--dtype=float32", "--matmul_precision=highest", "--init_from=auto"),
    *("--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=4", "--dropout=0.1"),
    *("--gradient_accumulation_steps=2", "--eval_iters=2", "--eval_interval=5", "--log_interval=1", "--max_iters=30"),
    *("--lr_decay_iters=30", "--warmup_iters=2", "--learning_rate=1e-2"),
)
PREPARE = ("prepare", str(STORY), "--name=story")


class Disturbed(NamedTuple):
    """A command line without its folder, and how it is started."""

    argv: tuple[str, ...]
    ranks: int = 1
    first: tuple[str, ...] = ()  # a command that is run before in the same folder
    longest: float = 0.03  # seconds between a change and a kill that follows it
    share: float = 1.0  # of the rounds

    @property
    def folder(self) -> str:
        return "--out_dir" if self.argv[0] == "train" else "--data_dir"


RUNS = {
    "alone": Disturbed((*TRAIN, "--compile=False"), share=5.0),
    "two ranks": Disturbed((*TRAIN, "--compile=False"), ranks=2, share=2.0),
    "compiled": Disturbed((*TRAIN, "--compile=True"), longest=2.0, share=0.2),
    "one file": Disturbed((*PREPARE, "--tokenizer=char", "--workers=1")),
    "shards": Disturbed((*PREPARE, "--tokenizer=bytes", "--workers=1", "--shard_size=3000")),
    "shards over others": Disturbed(
        (*PREPARE, "--tokenizer=bytes", "--workers=1", "--shard_size=3000", "--overwrite"),
        first=(*PREPARE, "--tokenizer=char", "--shard_size=2000"),
    ),
    "two workers": Disturbed((*PREPARE, "--tokenizer=bytes", "--workers=2"), longest=0.5, share=0.2),
}


class Ended(NamedTuple):
    """How a start ended."""

    codes: list[int]  # of the ranks
    said: str
    faults: list[tuple[Fault, str]]  # those that happened, and what the process was doing

    @property
    def killed(self) -> bool:
        """Whether a fault killed a rank."""
        return any(fault.effect not in errno.errorcode.values() for fault, _ in self.faults)


class Server(AbstractContextManager["Server"]):
    """Starts processes of Folio one after another, in milliseconds each; loads ``tokenizers`` of tiktoken first."""

    def __init__(self, folder: Path, *tokenizers: str) -> None:
        self.folder, self._count = folder, 0
        root = Path(folio.__file__).resolve().parent.parent
        env = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{HERE.parent}", "OMP_NUM_THREADS": "1"}
        env |= {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        command = [sys.executable, "-m", "torture.server", *tokenizers]
        self._process = subprocess.Popen(command, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def start(
        self, *argv: str, ranks: int = 1, faults: Sequence[str] = (), chance: Chance | None = None, **how: int
    ) -> Ended:
        """Runs a command to its end. ``faults``: by name. ``how``: as ``server.begin``."""
        assert self._process.stdin
        assert self._process.stdout
        self._count += 1
        log = self.folder / f"log-{self._count}.txt"
        parsed = [name.split() for name in faults]
        order = {"argv": argv, "ranks": ranks, "log": str(log), "faults": parsed, "chance": chance, **how}
        print(json.dumps(order), file=self._process.stdin, flush=True)
        if not (answer := self._process.stdout.readline()):
            raise AssertionError(f"the server ended:\n{log.read_text()}")
        notes = Path(f"{log}.faults")
        lines = notes.read_text().splitlines() if notes.exists() else []
        happened = [(Fault(*name.split()), doing) for name, doing in (line.split("\t") for line in lines)]
        return Ended(json.loads(answer), log.read_text(), happened)


def prepared(server: Server) -> Path:
    """A data set of characters to train on."""
    data = server.folder / "data"
    if not data.exists():
        assert server.start(*RUNS["one file"].argv, f"--data_dir={data}").codes == [0]
    return data


def arguments(server: Server, run: Disturbed, out: Path) -> list[str]:
    """The whole command line of a run into a folder."""
    data = [f"--data_dir={prepared(server)}"] if run.argv[0] == "train" else []
    return [*run.argv, *data, f"{run.folder}={out}"]


def results(run: Disturbed, out: Path) -> dict[str, Any]:
    """What must not depend on kills: weights, optimizer, records and best evaluation; of a preparation all files."""
    if run.argv[0] == "prepare":
        return {
            str(path.relative_to(out)): path.read_bytes()
            for path in out.rglob("*")
            if path.is_file() and path.name != "lock"
        }
    clock = ("seconds", "tokens_per_second", "mfu")
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_bytes().splitlines()]
    kept = [{k: v for k, v in r.items() if k not in clock} for r in records if r["kind"] != "start"]
    last = run_folder.checkpoint_folder(out, run_folder.steps(out)[-1])
    paths = (out / run_folder.BEST, last / run_folder.MODEL, last / run_folder.OPTIMIZER)
    return {"metrics.jsonl": kept, **{str(path.relative_to(out)): path.read_bytes() for path in paths}}
