"""How long a checkpoint of GPT-2 124M stops training: written synchronously, and asynchronously (--async_checkpoint).

    python benchmarks/checkpoint.py [--rounds 5]

Weights and both moments in float32, 1.4 GiB. The baseline is one copy of the same tensors, which an asynchronous write
cannot avoid. All three run in turn; ratios are computed within a round, their range is over the rounds.
"""

from __future__ import annotations

import sys

sys.path.pop(0)  # this folder, whose tokenize.py would hide the standard library's

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from folio.checkpoints import checkpoint
from folio.config.options import System
from folio.machine.choices import resolve
from folio.machine.runtime import Runtime
from folio.model.config import GPTConfig
from folio.model.gpt import GPT
from folio.training.optimizers import adamw


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description="How long a checkpoint stops training")
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    runtime = Runtime(resolve(System(device="cpu")))
    model = GPT(GPTConfig(bias=False))
    optimizer = adamw(model, 1e-4, (0.9, 0.95), 0.1)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    optimizer.zero_grad()
    found: dict[str, list[float]] = {"copy": [], "synchronous": [], "asynchronous": []}
    with tempfile.TemporaryDirectory() as folder:

        def save(step: int, asynchronous: bool) -> None:
            runtime.wait_for_write()
            weights, slots = runtime.full_state(model, optimizer, copy=asynchronous)
            runtime.write(lambda: checkpoint.save(Path(folder), step, weights, slots, {}), wait=not asynchronous)

        for _ in range(rounds):
            whole = runtime.full_state(model, optimizer)
            found["copy"].append(seconds(lambda: [t.clone() for part in whole for t in part.values()]))  # noqa: B023
            found["synchronous"].append(seconds(lambda: save(1, False)))
            found["asynchronous"].append(seconds(lambda: save(2, True)))
            runtime.wait_for_write()
    for name, times in found.items():
        ratios = [a / b for a, b in zip(times, found["copy"], strict=True)]
        print(
            f"{name:12} {statistics.median(times):6.2f} s  {statistics.median(ratios):6.2f} × the copy "
            f"({min(ratios):.2f} … {max(ratios):.2f})"
        )
    runtime.close()


if __name__ == "__main__":
    main()
