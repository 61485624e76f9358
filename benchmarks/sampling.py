"""nanoGPT and Folio continue a text in turn, in one process, with the same random weights: tokens per second.

    python benchmarks/sampling.py --peer PATH_TO_A_NANOGPT_CHECKOUT [--shape M] [--batch 1] [--rounds 5]

M is nanoGPT's Shakespeare preset, L GPT-2 124M; the prompt is one token, and the settings are those of nanoGPT's
sample.py. nanoGPT runs ``model.generate`` in float32, as its sample.py does on a CPU. Its tokens cost more the longer
the context is, and it keeps nothing from one to the next. So of the many tokens of L only every tenth is timed.
Folio is what ``folio sample`` runs. Beyond the context, both compute the last ``block_size`` tokens for each new one.
"""

from __future__ import annotations

import sys

sys.path.pop(0)  # this folder, whose tokenize.py would hide the standard library's

import statistics
import time
from collections.abc import Callable
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from folio import cli, rng
from folio.config.declare import option
from folio.config.options import System
from folio.generation.sampling import draws, generate
from folio.machine.choices import resolve
from folio.machine.runtime import Runtime
from folio.model.config import GPTConfig
from folio.model.gpt import GPT
from folio.training.nanogpt import load_model

SHAPES = {"M": GPTConfig(block_size=256, vocab_size=65, n_layer=6, n_head=6, n_embd=384, bias=False), "L": GPTConfig()}
HOW: dict[str, Any] = {"temperature": 0.8, "top_k": 200}


@dataclass(frozen=True)
class Options:
    """Compare sampling with nanoGPT's."""

    peer: str = option(MISSING, "a checkout of nanoGPT")
    shape: Literal["M", "L"] = option("M", "the model")
    new_tokens: int = option(200, "after a prompt of one token", unit="tokens")
    batch: int = option(1, "samples at once")
    rounds: int = option(5, "of each program", unit="rounds")
    every: int = option(0, "of nanoGPT's tokens one in so many is timed; 0: 1 for M, 10 × batch for L")


def nanogpt(options: Options, shape: GPTConfig, weights: dict[str, torch.Tensor], every: int) -> Callable[[], float]:
    """Seconds of nanoGPT's ``generate``."""
    model = load_model(Path(options.peer), shape).eval()
    model.load_state_dict(weights)
    idx = torch.zeros(options.batch, options.new_tokens, dtype=torch.long)

    def run() -> float:
        torch.set_float32_matmul_precision("highest")
        start = time.perf_counter()
        if every == 1:
            model.generate(idx[:, :1], options.new_tokens, **HOW)
        for length in range(every // 2 + 1, options.new_tokens + 1, every) if every > 1 else ():
            model.generate(idx[:, :length], 1, **HOW)
        return (time.perf_counter() - start) * every

    return run


def folio(dtype: str, options: Options, shape: GPTConfig, weights: dict[str, torch.Tensor]) -> Callable[[], float]:
    """Seconds of what ``folio sample`` runs, with its own choices on this machine."""
    runtime = Runtime(resolve(System(device="cpu", dtype=dtype)))  # type: ignore[arg-type]
    model = GPT(shape)
    model.load_state_dict(weights)
    model = runtime.for_sampling(model)
    idx = torch.zeros(options.batch, 1, dtype=torch.long)
    uniform = draws(1337, options.batch, options.new_tokens)

    def run() -> float:
        torch.set_float32_matmul_precision(runtime.choices.matmul_precision)
        start = time.perf_counter()
        with torch.inference_mode():
            generate(model, idx, options.new_tokens, uniform=uniform, **HOW)
        return time.perf_counter() - start

    return run


def main(options: Options) -> None:
    shape = SHAPES[options.shape]
    every = options.every or (1 if options.shape == "M" else 10 * options.batch)
    weights = GPT(shape, lambda name: rng.generator(1337, name)).state_dict()
    programs = {
        "nanoGPT float32": nanogpt(options, shape, weights, every),
        "Folio auto": folio("auto", options, shape, weights),
        "Folio float32": folio("float32", options, shape, weights),
    }
    times: dict[str, list[float]] = {name: [] for name in programs}
    for round_ in range(options.rounds + 1):
        for name, run in programs.items():
            seconds = run()
            if round_:  # the first one warms up
                times[name].append(seconds)
    for name, each in times.items():
        ratios = [a / b for a, b in zip(times["nanoGPT float32"], each, strict=True)]
        print(
            f"{options.shape}, batch {options.batch}, {options.new_tokens} tokens: {name:16}"
            f"{options.batch * options.new_tokens / statistics.median(each):9,.1f} tokens/s  "
            f"{statistics.median(ratios):6.2f}× ({min(ratios):.2f} … {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main(cli.parse(Options, sys.argv[1:], "benchmarks/sampling.py", files=False))
