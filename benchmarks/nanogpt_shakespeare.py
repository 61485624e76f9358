"""nanoGPT and Folio in turn on the same Shakespeare files: wall time, tokens/s, and the loss of what they saved.

    python benchmarks/nanogpt_shakespeare.py --peer PATH_TO_A_NANOGPT_CHECKOUT --source tinyshakespeare.txt

Both losses are over the whole validation split, every token once, in float32, by the same code. Each round runs all
programs one after another with one seed, a different one in each round. Ratios are computed within a round; their range
is over the rounds. nanoGPT's seed is a constant in its train.py, which is replaced when it is run.
"""

from __future__ import annotations

import sys

sys.path.pop(0)  # this folder, whose tokenize.py would hide the standard library's

import pickle
import re
import statistics
import subprocess
import tempfile
import time
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Literal

import torch

from folio import cli
from folio.checkpoints import find
from folio.config.declare import option
from folio.config.options import Data, System
from folio.data.rows import Tokens
from folio.evaluation.loss import evaluate
from folio.machine.choices import resolve
from folio.machine.runtime import Runtime
from folio.model.config import GPTConfig
from folio.model.gpt import GPT
from folio.preparation.job import prepare
from folio.preparation.recipes import known
from folio.records.metrics import read_metrics
from folio.records.run_folder import METRICS

SEED = 1337  # nanoGPT's
ROOT = Path(__file__).resolve().parent.parent
README = (
    "--eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 "
    "--max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
)
SETTINGS = {
    "cpu": f"--device=cpu --compile=False {README}",  # the command of nanoGPT's README
    "batch16": "--device=cpu --compile=False --batch_size=16 --max_iters=40 --eval_iters=1 --log_interval=1",
    "gpu": "--device=cuda",  # the preset as it is
}


@dataclass(frozen=True)
class Options:
    """Compare with nanoGPT."""

    peer: str = option(MISSING, "a checkout of nanoGPT")
    source: str = option("", "tiny Shakespeare; downloaded if not given")
    setting: Literal["cpu", "batch16", "gpu"] = option("cpu", "what is compared")
    rounds: int = option(3, "of each program; the median counts", unit="rounds")


@dataclass(frozen=True)
class Result:
    """One run: seconds of the whole process, tokens per second of its median step, loss in nats per token."""

    wall: float
    speed: float
    loss: float


def main(options: Options) -> None:
    flags = SETTINGS[options.setting].split()
    variants = {"folio auto": [], "folio float32": ["--dtype=float32"]} if options.setting != "gpu" else {"folio": []}
    results: dict[str, list[Result]] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        prepare(known("shakespeare_char", data, options.source, {}), data)
        _write_meta_pkl(data)
        for turn in range(options.rounds):
            seed, out = SEED + turn, Path(folder) / f"peer{turn}"
            results.setdefault("nanoGPT", []).append(_peer(Path(options.peer), flags, data, out, seed))
            for name, more in variants.items():
                out = Path(folder) / f"{name}{turn}".replace(" ", "-")
                seeded = [*flags, *more, f"--seed={seed}"]
                results.setdefault(name, []).append(_ours(seeded, data, out))
            for name, found in results.items():
                print(f"round {turn + 1}: {name:14} {found[-1]}", flush=True)
    _print(results)


def _print(results: dict[str, list[Result]]) -> None:
    peer = results["nanoGPT"]
    print(f"\n{'':14} {'wall s':>8} {'tokens/s':>10} {'val loss (min … max)':>25}   against nanoGPT: wall, tokens/s")
    for name, found in results.items():
        row = [statistics.median(getattr(r, f) for r in found) for f in ("wall", "speed", "loss")]
        walls = [p.wall / r.wall for p, r in zip(peer, found, strict=True)]
        speeds = [r.speed / p.speed for p, r in zip(peer, found, strict=True)]
        ratios = "  ".join(f"{statistics.median(x):.2f}× ({min(x):.2f} … {max(x):.2f})" for x in (walls, speeds))
        losses = [r.loss for r in found]
        print(
            f"{name:14} {row[0]:8.1f} {row[1]:10,.0f} {row[2]:9.4f} ({min(losses):.4f} … {max(losses):.4f})   {ratios}"
        )


def _write_meta_pkl(data: Path) -> None:
    characters = Tokens.open(Data(data_dir=str(data)), 64, 0).tokenizer()["characters"]
    meta = {
        "vocab_size": len(characters),
        "itos": dict(enumerate(characters)),
        "stoi": {c: i for i, c in enumerate(characters)},
    }
    (data / "meta.pkl").write_bytes(pickle.dumps(meta))


def _run(command: list[str], cwd: Path) -> tuple[float, str]:
    start = time.perf_counter()
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return time.perf_counter() - start, done.stdout


def _peer(peer: Path, flags: list[str], data: Path, out: Path, seed: int) -> Result:
    # in nanoGPT, os.path.join("data", dataset) is the absolute path itself
    seeded = f"open('train.py').read().replace('manual_seed({SEED} ', 'manual_seed({seed} ')"
    command = [sys.executable, "-c", f"exec(compile({seeded}, 'train.py', 'exec'))"]
    command += ["config/train_shakespeare_char.py", *flags]
    wall, output = _run([*command, f"--dataset={data}", f"--out_dir={out}", "--always_save_checkpoint=True"], peer)
    steps = [float(ms) / 1000 for ms in re.findall(r"^iter \d+: loss .*, time ([\d.]+)ms", output, re.MULTILINE)]
    iteration = int(next(iter(re.findall(r"tokens per iteration will be: ([\d,]+)", output))).replace(",", ""))
    speed = iteration / statistics.median(steps[5:])
    if not (out / "ckpt.pt").exists():
        return Result(wall, speed, float("nan"))
    saved = torch.load(out / "ckpt.pt", map_location="cpu", weights_only=True)
    model = GPT(GPTConfig(**saved["model_args"]))
    weights = {k.removeprefix("_orig_mod."): v for k, v in saved["model"].items()}
    model.load_state_dict(weights)
    return Result(wall, speed, _loss(model, data))


def _ours(flags: list[str], data: Path, out: Path) -> Result:
    command = [sys.executable, "train.py", "config/train_shakespeare_char.py", *flags]
    wall, _ = _run([*command, f"--data_dir={data}", f"--out_dir={out}"], ROOT)
    speeds = [r["tokens_per_second"] for r in read_metrics(out / METRICS) if r["kind"] == "train"]
    return Result(wall, statistics.median(speeds[5:]), _loss(find.choose(out, "latest").model(), data))


def _loss(model: GPT, data: Path) -> float:
    runtime = Runtime(resolve(System(device="cpu", dtype="float32", compile=False, matmul_precision="highest")))
    tokens = Tokens.open(Data(data_dir=str(data)), model.config.block_size, 0)
    return evaluate(model, runtime.wrap(model, None), tokens, "val", 0, 64, runtime)


if __name__ == "__main__":
    main(cli.parse(Options, sys.argv[1:], "nanogpt_shakespeare.py", files=False))
