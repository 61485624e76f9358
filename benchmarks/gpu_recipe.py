"""The Shakespeare GPU preset and nanoGPT in turn: the time to nanoGPT's best loss, and the lowest loss in its time.

    python benchmarks/gpu_recipe.py --peer PATH_TO_A_NANOGPT_CHECKOUT [--data FOLDER] [--seeds 3] [--smoke]

One after another: nanoGPT's GPU command up to the evaluations around its best loss, two minutes on an H100; the preset
with each seed; and the preset with the flags LONG, for the lowest loss in nanoGPT's time. nanoGPT's loss is that
of its own evaluations, 12,800 random windows of the validation split; Folio's is over the whole split in windows of as
many characters, 256. Both programs read that split only to evaluate.

Seconds of the process are from its start, nanoGPT's to the line with its best loss, Folio's to its end. Those of the
loop are the iterations at their median, so without evaluations, and without nanoGPT's compilation and Folio's recording
of CUDA graphs. --smoke does everything small, on a CPU.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # in place of this folder, whose tokenize.py would hide the standard library's
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import itertools
import json
import re
import statistics
import tempfile
from dataclasses import asdict, dataclass, replace

from benchmarks.nanogpt_shakespeare import ROOT, random_characters, run_lines
from folio import cli
from folio.config.declare import option
from folio.records.metrics import read_metrics
from folio.records.run_folder import METRICS

TARGET = 1.4697  # nanoGPT's README: the best validation loss of its GPU command
NANOGPT = ["config/train_shakespeare_char.py", "--max_iters=2250"]  # of 5,000, after which its loss rises
PRESET = "config/speedrun_shakespeare_gpu.py"
LONG = ["--max_iters=550", "--lr_decay_iters=550", "--eval_interval=550", "--weight_decay=0.3"]
TINY = ["--n_layer=1", "--n_head=1", "--n_embd=8", "--block_size=16", "--batch_size=4", "--device=cpu"]
FEW = ["--compile=False", "--max_iters=20", "--eval_interval=10", "--eval_iters=2", "--log_interval=1"]
SHAKESPEARE = "data/shakespeare_char"


@dataclass(frozen=True)
class Options:
    """Measure the Shakespeare GPU preset against nanoGPT."""

    peer: str = option("", "a checkout of nanoGPT")
    data: str = option("", "the folder that nanoGPT's data/shakespeare_char/prepare.py made; empty: in the checkout")
    seeds: int = option(3, "runs of the preset, each with another seed", min=1)
    json: str = option("", "also write the results to this file")
    smoke: bool = option(False, "everything small, on random characters and a CPU; nanoGPT only if --peer is given")


@dataclass(frozen=True)
class Result:
    """Where a run reached its loss; seconds."""

    loss: float
    step: int
    loop: float
    process: float


def main(options: Options) -> None:
    found: dict[str, list[Result]] = {}

    def show(name: str, result: Result) -> None:
        found.setdefault(name, []).append(result)
        print(f"{name}: {json.dumps(asdict(result))}", flush=True)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = (
            random_characters(folder / "data", 10_000, 1_000)
            if options.smoke
            else Path(options.data or f"{options.peer}/{SHAKESPEARE}")
        )
        small = [*TINY, *FEW] if options.smoke else []
        if options.peer:
            show("nanogpt", nanogpt(Path(options.peer), [*NANOGPT, *small], data.resolve(), folder))
        for seed in range(options.seeds):
            show("preset", preset([*small, f"--seed={seed}"], data, folder / str(seed)))
        show("long", preset([*LONG, *small], data, folder / "long"))
    summary = _summary(found)
    print(json.dumps(summary, indent=1))
    if options.json:
        text = json.dumps({**{k: [asdict(r) for r in v] for k, v in found.items()}, "summary": summary}, indent=1)
        Path(options.json).write_text(text + "\n", encoding="utf-8")


def _summary(found: dict[str, list[Result]]) -> dict[str, object]:
    """Medians over the seeds, the worst loss, and how many times as fast as nanoGPT."""
    ours, (long,) = found["preset"], found["long"]
    summary: dict[str, object] = {
        "loss": round(statistics.median(r.loss for r in ours), 4),
        "worst": max(r.loss for r in ours),
        "reached": all(r.loss <= TARGET for r in ours),
        "lowest": long.loss,
    }
    for theirs in found.get("nanogpt", []):
        for what in ("loop", "process"):
            ratios = [getattr(theirs, what) / getattr(r, what) for r in ours]
            summary[f"{what} ratio"] = round(statistics.median(ratios), 2)
        summary["long in its time"] = long.loop <= theirs.loop and long.process <= theirs.process
    return summary


def nanogpt(peer: Path, flags: list[str], data: Path, folder: Path) -> Result:
    """Its first evaluation with a loss of at most TARGET, else that with its lowest."""
    # in nanoGPT, os.path.join("data", dataset) is the absolute path itself
    command = [sys.executable, "-u", "train.py", *flags, f"--dataset={data}", f"--out_dir={folder / 'nanogpt'}"]
    _, lines = run_lines(command, peer)
    iterations, evaluations = [], []
    for at, line in lines:
        if match := re.match(r"iter (\d+): loss", line):
            iterations.append((int(match[1]), at))
        elif (match := re.match(r"step (\d+): train loss .*, val loss ([\d.]+)", line)) and match[1] != "0":
            evaluations.append(Result(float(match[2]), int(match[1]), 0.0, at))
    best = next((r for r in evaluations if r.loss <= TARGET), min(evaluations, key=lambda r: r.loss))
    return replace(best, loop=_loop(best.step, iterations), process=round(best.process, 3))


def preset(flags: list[str], data: Path, out: Path) -> Result:
    """A whole run of the preset."""
    command = [sys.executable, "train.py", PRESET, *flags, f"--data_dir={data.resolve()}", f"--out_dir={out}"]
    process, _ = run_lines(command, ROOT)
    records = read_metrics(out / METRICS)
    iterations = [(r["step"], r["seconds"]) for r in records if r["kind"] == "train"]
    last = [r for r in records if r["kind"] == "eval"][-1]
    return Result(round(last["val_loss"], 4), last["step"], _loop(last["step"], iterations), round(process, 3))


def _loop(steps: int, times: list[tuple[int, float]]) -> float:
    """The seconds of so many steps, from the times at which some were done."""
    return round(steps * statistics.median((b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(times)), 3)


if __name__ == "__main__":
    main(cli.parse(Options, sys.argv[1:], "benchmarks/gpu_recipe.py", files=False))
