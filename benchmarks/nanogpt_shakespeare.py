"""nanoGPT and Folio in turn on the same Shakespeare files: wall time, tokens/s, and the loss of what they saved.

    python benchmarks/nanogpt_shakespeare.py --peer PATH_TO_A_NANOGPT_CHECKOUT --source tinyshakespeare.txt

Both losses are over the whole validation split, every token once, in float32, by the same code. Each round runs all
programs one after another with one seed, a different one in each round. Ratios are computed within a round; their range
is over the rounds. nanoGPT's seed is a constant in its train.py, which is replaced when it is run.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    sys.path.pop(0)  # this folder, whose tokenize.py would hide the standard library's

import pickle
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
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

SEED = 1337  # nanoGPT's
ROOT = Path(__file__).resolve().parent.parent
PRESET = "config/train_shakespeare_char.py"  # of both programs
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
    """One run: seconds of the whole process, what it printed, and the loss of what it saved in nats per token."""

    wall: float
    lines: list[tuple[float, str]] = field(repr=False)  # each with the second at which it was read
    loss: float

    @property
    def loop(self) -> float:
        """Seconds of the loop, its evaluations and checkpoints included.

        They count from the last line before the first loss to the last line of all: both programs print one right
        before their loop, and one right after it.
        """
        first = next(i for i, (_, line) in enumerate(self.lines) if re.match(r"(step|iter) 0: ", line))
        return self.lines[-1][0] - self.lines[first - 1][0]

    @property
    def milliseconds(self) -> dict[int, float]:
        """The time of each iteration, as printed."""
        found = (re.match(r"iter (\d+): loss .*, time ([\d.]+)ms", line) for _, line in self.lines)
        return {int(match[1]): float(match[2]) for match in found if match}

    @property
    def speed(self) -> float:
        """Tokens per second of the median iteration, without the first five."""
        tokens = next(m[1] for _, line in self.lines if (m := re.match("tokens per iteration will be: (.*)", line)))
        times = list(self.milliseconds.values())
        return 1000 * int(tokens.replace(",", "")) / statistics.median(times[5:] or times)

    def __str__(self) -> str:
        return f"loop {self.loop:.1f} s, process {self.wall:.1f} s, {self.speed:,.0f} tokens/s, loss {self.loss:.4f}"


def main(options: Options) -> None:
    argv = [PRESET, *SETTINGS[options.setting].split()]
    variants = {"folio auto": [], "folio float32": ["--dtype=float32"]} if options.setting != "gpu" else {"folio": []}
    results: dict[str, list[Result]] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = characters(Path(folder) / "data", options.source)
        for turn in range(options.rounds):
            seed, out = SEED + turn, Path(folder) / f"peer{turn}"
            results.setdefault("nanoGPT", []).append(run_nanogpt(Path(options.peer), argv, data, out, seed))
            for name, more in variants.items():
                out = Path(folder) / f"{name}{turn}".replace(" ", "-")
                results.setdefault(name, []).append(run_folio([*argv, *more], data, out, seed))
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


def characters(folder: Path, source: str) -> Path:
    """Prepares tiny Shakespeare for both programs, from a copy of the text if one is given; returns the folder."""
    prepare(known("shakespeare_char", folder, source, {}), folder)
    _write_meta(folder, Tokens.open(Data(data_dir=str(folder)), 64, 0).tokenizer()["characters"])
    return folder


def random_characters(folder: Path, train: int, val: int) -> Path:
    """Makes a folder with so many random characters for both programs, as nanoGPT's prepare.py would; returns it."""
    folder.mkdir()
    for split, size in (("train", train), ("val", val)):
        np.random.default_rng(0).integers(0, 65, size, dtype=np.uint16).tofile(folder / f"{split}.bin")
    _write_meta(folder, [chr(48 + i) for i in range(65)])
    return folder


def _write_meta(folder: Path, characters: Sequence[str]) -> None:
    ids = {c: i for i, c in enumerate(characters)}
    meta = {"vocab_size": len(characters), "itos": dict(enumerate(characters)), "stoi": ids}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))


def run_nanogpt(checkout: Path, argv: list[str], data: Path, out: Path, seed: int, window: int = 0) -> Result:
    """Its ``train.py`` with these arguments and another seed; ``window`` as in ``score``."""
    # in nanoGPT, os.path.join("data", dataset) is the absolute path itself
    seeded = f"open('train.py').read().replace('manual_seed({SEED} ', 'manual_seed({seed} ')"
    command = [sys.executable, "-u", "-c", f"exec(compile({seeded}, 'train.py', 'exec'))", *argv]
    wall, lines = run_lines(
        [*command, f"--dataset={data}", f"--out_dir={out}", "--always_save_checkpoint=True"], checkout
    )
    if not (out / "ckpt.pt").exists():
        return Result(wall, lines, float("nan"))
    saved = torch.load(out / "ckpt.pt", map_location="cpu", weights_only=True)
    model = GPT(GPTConfig(**saved["model_args"]))
    model.load_state_dict({k.removeprefix("_orig_mod."): v for k, v in saved["model"].items()})
    return Result(wall, lines, score(model, data, window))


def run_folio(argv: list[str], data: Path, out: Path, seed: int, window: int = 0) -> Result:
    """``train.py`` with these arguments. A run with averages of the weights is scored with them."""
    command = [sys.executable, "-u", "train.py", *argv, f"--data_dir={data}", f"--out_dir={out}", f"--seed={seed}"]
    wall, lines = run_lines(command, ROOT)
    found = find.choose(out, "latest")
    model = found.with_weights("ema" if found.asked.get("ema_decay") else "trained").model()
    return Result(wall, lines, score(model, data, window))


def run_lines(command: list[str], cwd: Path) -> tuple[float, list[tuple[float, str]]]:
    """Seconds until the process has ended, and its lines with their seconds."""
    start = time.perf_counter()
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=errors, text=True) as child,
    ):
        lines = [(time.perf_counter() - start, line) for line in child.stdout or ()]
        child.wait()
        wall = time.perf_counter() - start
        errors.seek(0)
        if child.returncode:
            last = "".join(line for _, line in lines[-20:])
            sys.exit(f"{' '.join(command)} failed:\n{last}{errors.read()[-2000:]}")
    return wall, lines


def score(model: GPT, data: Path, window: int = 0) -> float:
    """The loss over the validation split, every token once, in rows of ``window`` tokens; 0: of the model's context."""
    runtime = Runtime(resolve(System(device="cpu", dtype="float32", compile=False, matmul_precision="highest")))
    tokens = Tokens.open(Data(data_dir=str(data), window=window), model.config.block_size, 0)
    return evaluate(model, runtime.wrap(model, None), tokens, "val", 0, 64, runtime)


if __name__ == "__main__":
    main(cli.parse(Options, sys.argv[1:], "nanogpt_shakespeare.py", files=False))
