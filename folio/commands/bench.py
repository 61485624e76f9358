"""folio bench: the time of a training step, as nanoGPT's bench.py measures it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from folio.config.declare import option
from folio.config.options import Data, Optimizer, Processes, System
from folio.errors import UserError
from folio.model.config import GPTConfig
from folio.records.console import show

if TYPE_CHECKING:
    from torch import Tensor

BURN_IN, STEPS, PROFILED = 10, 20, 3  # steps: before the timing, as in nanoGPT; timed, as in nanoGPT; profiled
SECONDS = 60.0  # no step starts later than this
_UNUSED = ("gradient_accumulation_steps", "total_batch_size", "document_mask", "eot")  # a step is one micro step


@dataclass(frozen=True)
class Options:
    """Time training steps of a model: folio bench [PRESET or FILE …] [--option=value …]."""

    real_data: bool = option(True, "False: random tokens, without a data set")
    profile: bool = option(
        False,
        "profile 3 steps into bench_log/ instead",
        details="It writes a trace, the most expensive operations, and memory by kind.",
    )
    data: Data = field(default_factory=Data, metadata={"unused": _UNUSED})
    model: GPTConfig = field(default_factory=lambda: GPTConfig(bias=False))
    system: System = field(default_factory=System)
    processes: Processes = field(default_factory=Processes)


def main(options: Options) -> None:
    from folio import rng
    from folio.machine.choices import resolve
    from folio.machine.flops import flops_per_token, mfu
    from folio.machine.profiler import WARM_UP, Profiler
    from folio.machine.runtime import Runtime
    from folio.model.gpt import GPT
    from folio.training import optimizers
    from folio.training.batches import MicroBatch
    from folio.training.loop import micro_step

    seed = options.system.seed
    rows, vocab_size = _rows(options)
    model = GPT(replace(options.model, vocab_size=vocab_size), lambda name: rng.generator(seed, name))
    size, context = rows.size(0), rows.size(1) - 1
    tokens_per_step = size * context
    flops = flops_per_token(model, context) * float(tokens_per_step)
    runtime = Runtime(resolve(options.system, options.processes, flops=flops * 1000))
    try:
        loss = runtime.wrap(model, (size, context))
        optimizer = optimizers.optimizer(Optimizer(learning_rate=1e-4, weight_decay=1e-2), model)
        rows = runtime.move(rows)
        batch = MicroBatch(rows[:, :-1], rows[:, 1:], None, seed)

        def step() -> float:
            nats, counted = micro_step(runtime, loss, batch, runtime.world * tokens_per_step)
            runtime.update(optimizer, nats, runtime.clip(optimizer, 1.0))
            return nats.item() / counted.item()  # waits for the device

        show(f"{model.get_num_params() / 1e6:.2f}M parameters, {size} × {context} tokens a step")
        show(", ".join(f"{k} {runtime.resolved[k]}" for k in ("device", "dtype", "compile", "threads")))
        if options.profile:
            _steps(step, WARM_UP, "burn-in")
            profiler = Profiler(optimizer, runtime.device, Path("bench_log"))
            runtime.broadcast(profiler.start)
            _steps(step, PROFILED, "step")
            show(runtime.broadcast(profiler.finish))
            return
        _steps(step, BURN_IN, "burn-in")
        times = _steps(step, STEPS, "step")
    finally:
        runtime.close()
    each = sum(times) / len(times)
    share = mfu(model, tokens_per_step / each, runtime.device, runtime.dtype, context=context)
    show(
        f"time per iteration: {each * 1000:.2f}ms (fastest {min(times) * 1000:.2f}ms of {len(times)}), "
        f"{tokens_per_step / each:,.0f} tokens/s, {flops / each / 1e12:.2f} TFLOP/s, MFU: {share * 100:.2f}%"
    )


def _rows(options: Options) -> tuple[Tensor, int]:
    """A batch of (batch_size, context + 1) token ids, the first of the data set or random ones; the vocabulary size."""
    import torch

    from folio import rng
    from folio.data.rows import Tokens
    from folio.training.start import vocab_size_of

    shape, size, seed = options.model, options.data.batch_size, options.system.seed
    if options.real_data:
        tokens = Tokens.open(options.data, shape.block_size, seed)
        vocab_size = vocab_size_of(tokens)[0] if shape.vocab_size == "auto" else shape.vocab_size
        return torch.from_numpy(replace(tokens, vocab_size=vocab_size).rows("train", 0, size)), vocab_size
    if shape.vocab_size == "auto":
        raise UserError(
            "vocab_size=auto is the data set's size, but real_data=False reads no data set: "
            "give a number, such as --vocab_size=50304"
        )
    context = options.data.row(shape.block_size)
    ids = torch.randint(shape.vocab_size, (size, context + 1), generator=rng.generator(seed))
    return ids, shape.vocab_size


def _steps(step, count: int, name: str) -> list[float]:  # type: ignore[no-untyped-def]
    """Runs ``count`` steps and returns the seconds of each; stops early after a minute."""
    times: list[float] = []
    while len(times) < count and sum(times) < SECONDS:
        start = time.perf_counter()
        value = step()
        times.append(time.perf_counter() - start)
        show(f"{name} {len(times)}/{count} loss: {value:.4f}")
    return times
