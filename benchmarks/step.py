"""Training steps of nanoGPT and Folio in turn, in one process: tokens per second, and the ratio within each round.

    python benchmarks/step.py --peer PATH_TO_A_NANOGPT_CHECKOUT [--shape S] [--rounds 7] [--busy 0]

S is the CPU command of nanoGPT's README, M its Shakespeare preset with batch 16, L GPT-2 124M with one row. Folio's
steps are those of its training loop, as in ``folio bench --peer``. nanoGPT's are those of its train.py around its
model.py: float32, eager. Both read the same token file. --busy starts other processes, which compute all the time.
"""

from __future__ import annotations

import sys

sys.path.pop(0)  # this folder, whose tokenize.py would hide the standard library's
__import__("folio")  # sets how torch's threads wait, which they read when torch is imported

import os
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from folio import cli
from folio.config.declare import option
from folio.config.options import Data, Optimizer, Output, System, TrainConfig
from folio.model.config import GPTConfig
from folio.training import nanogpt
from folio.training.start import running
from folio.training.timing import OURS, in_turn

SHAPES = {  # the model, rows of a batch, steps of a round
    "S": (GPTConfig(block_size=64, vocab_size=65, n_layer=4, n_head=4, n_embd=128, bias=False), 12, 40),
    "M": (GPTConfig(block_size=256, vocab_size=65, n_layer=6, n_head=6, n_embd=384, bias=False), 16, 2),
    "L": (GPTConfig(bias=False), 1, 1),
}


@dataclass(frozen=True)
class Options:
    """Compare training steps with nanoGPT's."""

    peer: str = option(MISSING, "a checkout of nanoGPT")
    shape: Literal["S", "M", "L"] = option("S", "the model and its batch")
    rounds: int = option(7, "of each program", unit="rounds")
    busy: int = option(0, "other processes that compute meanwhile", unit="processes")


def main(options: Options) -> None:
    shape, size, count = SHAPES[options.shape]
    count = max(1, count // 8) if options.busy else count
    assert shape.vocab_size != "auto"
    with busy(options.busy), tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ids = np.random.default_rng(0).integers(0, shape.vocab_size, 1 << 20, dtype=np.uint16)
        for split in ("train", "val"):
            ids.tofile(folder / f"{split}.bin")
        for dtype in ("auto", "float32"):
            peer = nanogpt.load(Path(options.peer), shape, size, ids, torch.device("cpu"))
            config = TrainConfig(
                Output(out_dir=str(folder / dtype)),
                Data(data_dir=name, batch_size=size, gradient_accumulation_steps=1),
                shape,
                Optimizer(learning_rate=1e-3, beta2=0.99),
                system=System(device="cpu", dtype=dtype),  # type: ignore[arg-type]
            )
            with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), running(config) as run:
                times = in_turn(run, {"nanoGPT": peer.step}, options.rounds, 600, count)
            ours, theirs = times[OURS], times["nanoGPT"]
            ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
            print(
                f"{options.shape} Folio {dtype:8} {_speed(ours, size * shape.block_size)}, "
                f"nanoGPT {_speed(theirs, size * shape.block_size)}: "
                f"{statistics.median(ratios):.2f} × ({min(ratios):.2f} … {max(ratios):.2f})"
            )


def _speed(times: list[float], tokens: int) -> str:
    each = statistics.median(times)
    return f"{tokens / each:,.0f} tokens/s ({1000 * each:,.1f} ms)"


@contextmanager
def busy(count: int) -> Iterator[None]:
    """So many processes compute until the end."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


if __name__ == "__main__":
    main(cli.parse(Options, sys.argv[1:], "benchmarks/step.py", files=False))
