"""Tokenizing a corpus, including reading and writing files: ``folio prepare`` against tiktoken's own processes.

The other program reads the same JSON lines, calls ``encode_ordinary`` and writes uint16, in one process, or in two with
every second document each. All run in turn, round after round:

    python benchmarks/tokenize.py --source wikitext2_valid.jsonl --megabytes 1000

The corpus is the source repeated. Memory is the largest sum of the processes' memory at one moment (PSS).
"""

from __future__ import annotations

import sys

sys.path.pop(0)  # this folder, whose tokenize.py would hide the standard library's

import json
import os
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import MISSING, dataclass
from pathlib import Path

from folio import cli
from folio.config.declare import option

PEER = """
import json, sys
import numpy as np, tiktoken
source, part, parts, out = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
encoding = tiktoken.get_encoding("gpt2")
with open(source, "rb") as lines, open(out, "wb") as file:
    for number, line in enumerate(lines):
        if number % parts == part:
            ids = encoding.encode_ordinary(json.loads(line)["text"])
            ids.append(encoding.eot_token)
            file.write(np.array(ids, dtype=np.uint16).tobytes())
"""


@dataclass(frozen=True)
class Options:
    """What to tokenize, and how often."""

    source: str = option(MISSING, "JSON lines with the key text")
    megabytes: int = option(1000, "size of the corpus, which repeats them")
    rounds: int = option(3, "of each program; the median counts", unit="rounds")


def main(options: Options) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = folder / "corpus.jsonl"
        text = repeat(Path(options.source), corpus, options.megabytes * 10**6)
        print(f"{text / 1e6:,.0f} MB of text in {corpus.stat().st_size / 1e6:,.0f} MB of JSON lines")
        programs: dict[str, Callable[[], list[subprocess.Popen[bytes]]]] = {
            "tiktoken, one process": lambda: peers(corpus, folder, 1),
            "tiktoken, two processes": lambda: peers(corpus, folder, 2),
            "folio prepare": lambda: [folio(corpus, folder)],
        }
        seconds: dict[str, list[float]] = {program: [] for program in programs}
        peak = 0
        for _ in range(options.rounds):
            for program, start in programs.items():
                shutil.rmtree(folder / "data", ignore_errors=True)
                began = time.perf_counter()
                processes = start()
                with Memory(processes) as memory:
                    codes = [process.wait() for process in processes]
                seconds[program].append(time.perf_counter() - began)
                if any(codes):
                    raise SystemExit(f"{program} failed: {codes}")
                if program == "folio prepare":
                    peak = max(peak, memory.peak)
                print(f"{program}: {seconds[program][-1]:.1f} s, peak {memory.peak / 2**20:,.0f} MiB", flush=True)
    print()
    for program, times in seconds.items():
        print(f"{program:24} {text / statistics.median(times) / 1e6:6.1f} MB/s")
    for peer in list(programs)[:2]:
        ratios = sorted(theirs / ours for theirs, ours in zip(seconds[peer], seconds["folio prepare"], strict=True))
        print(f"folio / {peer}: {statistics.median(ratios):.2f} ({ratios[0]:.2f} … {ratios[-1]:.2f})")
    print(f"peak memory of folio, all its processes together: {peak / 2**20:,.0f} MiB")


def repeat(source: Path, corpus: Path, size: int) -> int:
    """Writes whole copies of the source until there are ``size`` bytes; returns the bytes of text in them."""
    content = source.read_bytes()
    text = sum(len(json.loads(line)["text"].encode()) for line in content.splitlines())
    copies = -(-size // len(content))
    with corpus.open("wb") as file:
        for _ in range(copies):
            file.write(content)
    return copies * text


def peers(corpus: Path, folder: Path, parts: int) -> list[subprocess.Popen[bytes]]:
    command = [sys.executable, "-c", PEER, str(corpus)]
    return [subprocess.Popen([*command, str(i), str(parts), str(folder / f"{i}.bin")]) for i in range(parts)]


def folio(corpus: Path, folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "folio", "prepare", str(corpus), f"--data_dir={folder / 'data'}"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


class Memory:
    """The largest total memory of processes and their children at one moment, in bytes."""

    def __init__(self, processes: list[subprocess.Popen[bytes]]) -> None:
        self.peak = 0
        self._roots = [process.pid for process in processes]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.25):
            self.peak = max(self.peak, sum(memory_of(pid) for root in self._roots for pid in family(root)))


def family(root: int) -> list[int]:
    """A process and all its descendants."""
    found = [root]
    for pid in found:
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            try:
                found += map(int, task.read_text().split())
            except OSError:
                continue
    return found


def memory_of(pid: int) -> int:
    """A process's proportional share of memory (PSS), in bytes."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(cli.parse(Options, sys.argv[1:], "tokenize.py", files=False))
