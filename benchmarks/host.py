"""The host time of a step: the training loop's own work, without the operations of the model and the optimizer.

    python benchmarks/host.py [--peer PATH_TO_A_NANOGPT_CHECKOUT] [--rounds 9]

A model of 1 layer, 8 wide, whose operations take little time. In turn: the loop of ``folio train``, and as many times
the same operations alone, on one batch: forward, backward, clip_grad_norm_, the optimizer's step, zero_grad. The
difference within a round is the host time. The same for nanoGPT's loop and its operations.
"""

from __future__ import annotations

import sys

sys.path.pop(0)  # this folder, whose tokenize.py would hide the standard library's

import os
import statistics
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from folio import cli, rng
from folio.config.declare import option
from folio.config.options import Data, Logging, Optimizer, Output, System, TrainConfig
from folio.machine.choices import resolve
from folio.machine.runtime import Runtime
from folio.model.config import GPTConfig
from folio.model.gpt import GPT
from folio.training import nanogpt, optimizers
from folio.training.start import running
from folio.training.timing import OURS, in_turn

SHAPE = GPTConfig(block_size=64, vocab_size=65, n_layer=1, n_head=1, n_embd=8, bias=False)
SIZE = 12  # rows, those of nanoGPT's CPU command


@dataclass(frozen=True)
class Options:
    """Measure the training loop's own time a step."""

    peer: str = option("", "a checkout of nanoGPT")
    rounds: int = option(9, "of each program", unit="rounds")
    steps: int = option(300, "in a round", unit="steps")
    log_interval: int = option(10, "between lines of progress", unit="steps")
    device: str = option("cpu", "cpu | cuda")
    dtype: str = option("auto", "as folio train takes it")


def operations(options: Options) -> Callable[[], None]:
    """A model's forward, backward, clipping and update on one batch."""
    runtime = Runtime(resolve(System(device=options.device, dtype=options.dtype)))  # type: ignore[arg-type]
    model = GPT(SHAPE, lambda name: rng.generator(1337, name))
    loss = runtime.wrap(model, (SIZE, SHAPE.block_size))
    optimizer = optimizers.optimizer(Optimizer(), model, runtime.dtype)
    x, y = (torch.randint(65, (SIZE, SHAPE.block_size), device=runtime.device) for _ in range(2))

    def step() -> None:
        nats, _ = loss(x, y)
        nats.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        runtime._objective.update_copy()
        optimizer.zero_grad(set_to_none=True)

    return step


def main(options: Options) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ids = np.random.default_rng(0).integers(0, 65, 1 << 20, dtype=np.uint16)
        for split in ("train", "val"):
            ids.tofile(folder / f"{split}.bin")
        others = {"operations": operations(options)}
        if options.peer:
            peer = nanogpt.load(Path(options.peer), SHAPE, SIZE, ids, torch.device(options.device))
            others |= {"nanoGPT": peer.step, "its operations": peer.operations}
        config = TrainConfig(
            Output(out_dir=str(folder / "out")),
            Data(data_dir=str(folder), batch_size=SIZE, gradient_accumulation_steps=1),
            SHAPE,
            Optimizer(max_iters=1 << 40),
            logging=Logging(log_interval=options.log_interval),
            system=System(device=options.device, dtype=options.dtype, compile=False),  # type: ignore[arg-type]
        )
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), running(config) as run:
            times = in_turn(run, others, options.rounds, 90, options.steps)
    hosts = {OURS: differences(times[OURS], times["operations"])}
    if options.peer:
        hosts["nanoGPT"] = differences(times["nanoGPT"], times["its operations"])
    whole = {name: [1000 * t for t in each] for name, each in times.items()}
    for name, each in (whole | {f"{name} host time": each for name, each in hosts.items()}).items():
        print(f"{name:18} {statistics.median(each):.3f} ms a step ({min(each):.3f} … {max(each):.3f})")
    if options.peer:
        ratios = [a / b for a, b in zip(times["nanoGPT"], times[OURS], strict=True)]
        print(f"a step: {statistics.median(ratios):.2f} × nanoGPT's speed ({min(ratios):.2f} … {max(ratios):.2f})")


def differences(whole: list[float], part: list[float]) -> list[float]:
    """Milliseconds."""
    return [1000 * (a - b) for a, b in zip(whole, part, strict=True)]


if __name__ == "__main__":
    main(cli.parse(Options, sys.argv[1:], "benchmarks/host.py", files=False))
