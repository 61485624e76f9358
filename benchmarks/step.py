"""Training steps of nanoGPT and Folio in turn, in one process: tokens per second, and the ratio within each round.

    python benchmarks/step.py --peer PATH_TO_A_NANOGPT_CHECKOUT [--shape S] [--rounds 7]

S is the CPU command of nanoGPT's README, M its Shakespeare preset with batch 16, L GPT-2 124M with one row. A step is
what the training loop does: it reads rows, runs forward and backward, clips and updates. nanoGPT's step is that of its
train.py around its model.py: float32, eager. Both read the same token file.
"""

from __future__ import annotations

import sys

sys.path.pop(0)  # this folder, whose tokenize.py would hide the standard library's

import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from folio import cli, rng
from folio.config.declare import option
from folio.config.options import Data, Optimizer, System
from folio.data.rows import Tokens
from folio.machine.choices import resolve
from folio.machine.runtime import Runtime
from folio.model.config import GPTConfig
from folio.model.gpt import GPT
from folio.training import optimizers
from folio.training.batches import MicroBatch
from folio.training.loop import micro_step

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


def nanogpt(peer: str, shape: GPTConfig, size: int, path: Path) -> Callable[[], float]:
    """A step of nanoGPT's train.py on a CPU, without gradient accumulation."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(peer) / "model.py")
    assert spec is not None
    assert spec.loader is not None
    theirs: Any = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = theirs
    spec.loader.exec_module(theirs)
    names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
    model = theirs.GPT(theirs.GPTConfig(**{name: getattr(shape, name) for name in names}))
    optimizer = model.configure_optimizers(1e-1, 1e-3, (0.9, 0.99), "cpu")

    def step() -> float:
        torch.set_float32_matmul_precision("highest")
        data = np.memmap(path, dtype=np.uint16, mode="r")
        starts = torch.randint(len(data) - shape.block_size, (size,))
        x, y = (
            torch.stack(
                [torch.from_numpy(data[i + shift : i + shift + shape.block_size].astype(np.int64)) for i in starts]
            )
            for shift in (0, 1)
        )
        _, loss = model(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def folio(dtype: str, shape: GPTConfig, size: int, folder: Path) -> Callable[[], float]:
    """A step of Folio's loop, with its own choices on this machine."""
    runtime = Runtime(resolve(System(device="cpu", dtype=dtype)))  # type: ignore[arg-type]
    model = GPT(shape, lambda name: rng.generator(1337, name))
    loss = runtime.wrap(model, (size, shape.block_size))
    optimizer = optimizers.optimizer(Optimizer(learning_rate=1e-3, beta2=0.99), model)
    tokens = Tokens.open(Data(data_dir=str(folder)), shape.block_size, 1337)
    tokens_per_step, first = size * shape.block_size, iter(range(0, 1 << 40, size))

    def step() -> float:
        torch.set_float32_matmul_precision(runtime.choices.matmul_precision)
        rows = runtime.move(runtime.pin(tokens.rows("train", next(first), size)))
        nats, counted = micro_step(runtime, loss, MicroBatch(rows[:, :-1], rows[:, 1:], None, 1), tokens_per_step)
        runtime.update(optimizer, nats, runtime.clip(optimizer, 1.0))
        return nats.item() / counted.item()

    return step


def main(options: Options) -> None:
    shape, size, count = SHAPES[options.shape]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for split in ("train", "val"):
            np.random.default_rng(0).integers(0, shape.vocab_size, 1 << 20, dtype=np.uint16).tofile(
                folder / f"{split}.bin"
            )
        programs = {
            "nanoGPT float32": nanogpt(options.peer, shape, size, folder / "train.bin"),
            "Folio auto": folio("auto", shape, size, folder),
            "Folio float32": folio("float32", shape, size, folder),
        }
        times: dict[str, list[float]] = {name: [] for name in programs}
        for round_ in range(options.rounds + 1):
            for name, step in programs.items():
                start = time.perf_counter()
                for _ in range(count):
                    step()
                if round_:  # the first one warms up
                    times[name].append((time.perf_counter() - start) / count)
    for name, each in times.items():
        ratios = [a / b for a, b in zip(times["nanoGPT float32"], each, strict=True)]
        print(
            f"{options.shape} {name:16} {size * shape.block_size / statistics.median(each):10,.0f} tokens/s "
            f"{statistics.median(each) * 1000:9.2f} ms  {statistics.median(ratios):.2f}× "
            f"({min(ratios):.2f} … {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main(cli.parse(Options, sys.argv[1:], "benchmarks/step.py", files=False))
