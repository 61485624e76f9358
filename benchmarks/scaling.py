"""The same work on the same cores by one process and by several: tokens per second, and the losses' difference.

    python benchmarks/scaling.py --source tinyshakespeare.txt [--rounds 3] [--ranks 2]

nanoGPT's Shakespeare preset with 4 micro steps of 8 rows. One process uses all cores, several share them evenly. They
run in turn; ratios are computed within a round, their range is over the rounds. nanoGPT and build-nanogpt cannot be
compared: they need CUDA for more than one process.
"""

from __future__ import annotations

import sys

sys.path.pop(0)  # this folder, whose tokenize.py would hide the standard library's

import os
import shlex
import statistics
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from folio import cli
from folio.config.declare import option
from folio.preparation.job import prepare
from folio.preparation.recipes import known
from folio.records.metrics import read_metrics
from folio.records.run_folder import METRICS

ROOT = Path(__file__).resolve().parent.parent
FLAGS = shlex.split(
    "config/train_shakespeare_char.py --device=cpu --compile=False --batch_size=8 --gradient_accumulation_steps=4 "
    "--dropout=0.0 --eval_iters=1 --log_interval=1 --max_iters=15 --warmup_iters=100"
)


@dataclass(frozen=True)
class Options:
    """One process against several."""

    source: str = option("", "tiny Shakespeare; downloaded if not given")
    rounds: int = option(3, "of each program; the median counts", unit="rounds")
    ranks: int = option(2, "processes")
    dtype: str = option("auto", "dtype of the arithmetic")


def run(data: Path, out: Path, ranks: int, *more: str) -> tuple[float, list[float]]:
    """Tokens per second of the median step, and the losses."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, "train.py", *FLAGS, *more, f"--data_dir={data}", f"--out_dir={out}"]
    threads = str(max(1, (os.cpu_count() or 1) // ranks))
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": threads}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    steps = [r for r in read_metrics(out / METRICS) if r["kind"] == "train"]
    return statistics.median(r["tokens_per_second"] for r in steps[3:]), [r["loss"] for r in steps]


def main(options: Options) -> None:
    n, dtype = options.ranks, f"--dtype={options.dtype}"
    variants = {"1 process": (1, dtype), f"{n}, ddp": (n, dtype), f"{n}, fsdp": (n, dtype, "--parallel=fsdp")}
    speeds: dict[str, list[float]] = {name: [] for name in variants}
    losses: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        prepare(known("shakespeare_char", data, options.source, {}), data)
        for turn in range(options.rounds):
            for name, (ranks, *flags) in variants.items():
                speed, losses[name] = run(data, Path(folder) / f"{turn}-{name}", ranks, *flags)
                speeds[name].append(speed)
                print(f"round {turn + 1}: {name:10} {speed:8,.0f} tokens/s", flush=True)
    print()
    alone, first = speeds["1 process"], losses["1 process"]
    for name, found in speeds.items():
        ratios = [a / b for a, b in zip(found, alone, strict=True)]
        apart = max(abs(a - b) for a, b in zip(losses[name], first, strict=True))
        print(
            f"{name:10} {statistics.median(found):8,.0f} tokens/s  {statistics.median(ratios):.2f} × "
            f"({min(ratios):.2f} … {max(ratios):.2f})  losses within {apart:.1e}"
        )


if __name__ == "__main__":
    main(cli.parse(Options, sys.argv[1:], "scaling.py", files=False))
