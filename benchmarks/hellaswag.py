"""HellaSwag items per second with a model of GPT-2's 124M shape, against build-nanogpt's own hellaswag.py.

    python benchmarks/hellaswag.py --peer BUILD_NANOGPT --items hellaswag_val.jsonl [--count 100] [--rounds 3]

BUILD_NANOGPT is a checkout. Its script runs unchanged, in float32, on items spread evenly over the file. All programs
have the same random weights. Each is a process, and they run in turn. The time is that of reading, tokenizing and
scoring, without loading the model. Ratios are computed within a round; their range is over the rounds. The last column
counts the items that a program answers as build-nanogpt does.
"""

from __future__ import annotations

import sys

sys.path.pop(0)  # this folder, whose tokenize.py would hide the standard library's

import os
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from dataclasses import MISSING, dataclass
from pathlib import Path

from folio import cli
from folio.config.declare import option

ROOT = Path(__file__).resolve().parent.parent
PEER = """
import sys
from hellaswag import evaluate
evaluate(sys.argv[1], "cpu")
"""
OURS = """
import sys, time
from pathlib import Path
from folio.checkpoints import find
from folio.config.options import System
from folio.data.tokenizers import Tiktoken
from folio.evaluation import hellaswag
from folio.machine.choices import resolve
from folio.machine.runtime import Runtime

model = find.by_name(sys.argv[1]).model()
runtime = Runtime(resolve(System(device="cpu", dtype=sys.argv[3])))
runtime.wrap(model, None)
began = time.perf_counter()
items = hellaswag.read(Path(sys.argv[2]), "completion")
questions = hellaswag.encode(items, "completion", Tiktoken("gpt2"), model.config)
found = hellaswag.predictions(model, questions, runtime)[1] == questions.labels
print(time.perf_counter() - began, "".join("01"[int(right)] for right in found))
"""


@dataclass(frozen=True)
class Options:
    """HellaSwag against build-nanogpt's own script."""

    peer: str = option(MISSING, "a checkout of build-nanogpt")
    items: str = option(MISSING, "HellaSwag's validation split")
    count: int = option(100, "items")
    rounds: int = option(3, "of each program; the median counts", unit="rounds")


def peer(checkout: Path, model: Path, items: Path, work: Path) -> tuple[float, str]:
    """Seconds of its script, and a digit for each item: 1 if the answer is right."""
    folder = work / "peer"
    (folder / "hellaswag").mkdir(parents=True, exist_ok=True)
    shutil.copy(checkout / "hellaswag.py", folder)
    shutil.copy(items, folder / "hellaswag" / "hellaswag_val.jsonl")
    command = [sys.executable, "-u", "-c", PEER, str(model)]
    right, times, before = "", [], 0
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            if score := re.match(r"\d+ acc_norm: (\d+)/", line):
                times.append(time.perf_counter())
                right += str(int(score[1]) - before)
                before = int(score[1])
    if process.returncode:
        sys.exit("build-nanogpt's hellaswag.py failed")
    return (times[-1] - times[0]) * len(times) / (len(times) - 1), right  # the first has no line before it


def ours(model: Path, items: Path, dtype: str) -> tuple[float, str]:
    command = [sys.executable, "-c", OURS, str(model), str(items), dtype]
    seconds, right = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
    return float(seconds), right


def main() -> None:
    options = cli.parse(Options, sys.argv[1:], "hellaswag.py", files=False)
    lines = Path(options.items).read_text(encoding="utf-8").splitlines(keepends=True)
    from transformers import GPT2Config, GPT2LMHeadModel

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        items, model = work / "items.jsonl", work / "gpt2"
        items.write_text(
            "".join(lines[i * len(lines) // options.count] for i in range(options.count)), encoding="utf-8"
        )
        GPT2LMHeadModel(GPT2Config()).save_pretrained(model)
        figures: dict[str, list[tuple[float, str]]] = {}
        for number in range(options.rounds):
            figures.setdefault("build-nanogpt", []).append(peer(Path(options.peer), model, items, work))
            for dtype in ("float32", "auto"):
                figures.setdefault(f"folio, {dtype}", []).append(ours(model, items, dtype))
            speeds = (f"{name} {options.count / rounds[-1][0]:.2f} items/s" for name, rounds in figures.items())
            print(f"round {number + 1}: {', '.join(speeds)}", flush=True)
    theirs = figures["build-nanogpt"]
    print(f"{options.count} items, {options.rounds} rounds, {os.cpu_count()} cores")
    for name, rounds in figures.items():
        ratios = [one[0] / own[0] for one, own in zip(theirs, rounds, strict=True)]
        same = sum(a == b for a, b in zip(theirs[0][1], rounds[0][1], strict=True))
        print(
            f"{name:16} {options.count / statistics.median(s for s, _ in rounds):6.2f} items/s  "
            f"{statistics.median(ratios):.2f} × ({min(ratios):.2f} … {max(ratios):.2f})  "
            f"{same} of {options.count} items as build-nanogpt, {rounds[0][1].count('1')} right"
        )


if __name__ == "__main__":
    main()
