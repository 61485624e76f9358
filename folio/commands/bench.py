"""folio bench: the speed of training, where a step's time and memory go, and nanoGPT's speed in turn."""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from folio.config.declare import ITSELF, depth_option, option
from folio.config.options import Data, Logging, Optimizer, Output, Processes, System, TrainConfig
from folio.errors import UserError
from folio.model.config import GPTConfig
from folio.records.console import show

if TYPE_CHECKING:
    from folio.training.run import Run

ROUNDS, TIMED, PROFILED = 9, 10, 3  # rounds of steps; steps whose parts are timed; steps that --profile profiles
_STEPS = 1000  # of a run for which compiling must pay
_TOKENS = 1 << 20  # random ones
_UNUSED = ("gradient_accumulation_steps", "total_batch_size", "document_mask", "eot")  # a step is one micro step
_OF_A_RUN = ("max_iters", "max_minutes", "patience", "ema_decay")  # when it ends, and its work between the steps


@dataclass(frozen=True)
class Options:
    """Measure the speed of training: folio bench [PRESET or FILE …] [--option=value …]."""

    real_data: bool = option(True, "False: random tokens, without a data set")
    profile: bool = option(
        False,
        "profile 3 steps into bench_log/ instead",
        details="It writes a trace, the most expensive operations, and memory by kind.",
    )
    peer: str = option(
        "", "a checkout of nanoGPT, to train with in turn", details="This runs its model.py.", path=ITSELF
    )
    depth: int = depth_option()
    data: Data = field(default_factory=Data, metadata={"unused": _UNUSED})
    model: GPTConfig = field(default_factory=lambda: GPTConfig(bias=False))
    optimizer: Optimizer = field(default_factory=Optimizer, metadata={"advanced": True, "unused": _OF_A_RUN})
    system: System = field(default_factory=System)
    processes: Processes = field(default_factory=Processes)
    sources: dict[str, str] = field(default_factory=dict)  # option → what set it


def main(options: Options) -> None:
    from folio.training.start import running
    from folio.training.timing import profile

    with tempfile.TemporaryDirectory(prefix="folio-bench-") as folder, running(_config(options, Path(folder))) as run:
        if options.profile:
            lines = profile(run, PROFILED, Path("bench_log"))[0].splitlines()
        else:
            lines = _measured(run, options.peer, Path(folder))
        for line in lines if run.log.main else ():
            show(line)


def _config(options: Options, folder: Path) -> TrainConfig:
    """The options of a training run in this folder, one micro step a step on each process."""
    from folio.machine.launch import read_ranks

    data = replace(
        options.data, gradient_accumulation_steps=read_ranks()[1], total_batch_size=0, document_mask=False, eot="auto"
    )
    if not options.real_data:
        data = replace(data, data_dir=str(folder), data_mixture="")
        _write_random_tokens(folder, options.model, options.system.seed)
    return TrainConfig(
        output=Output(out_dir=str(folder / "out")),
        data=data,
        model=options.model,
        optimizer=replace(options.optimizer, max_iters=_STEPS, max_minutes=0.0, patience=0, ema_decay=0.0),
        logging=Logging(monitor=False),
        system=options.system,
        processes=options.processes,
    )


def _write_random_tokens(folder: Path, shape: GPTConfig, seed: int) -> None:
    import numpy as np

    if shape.vocab_size == "auto":
        raise UserError(
            "vocab_size=auto is the data set's size, but real_data=False reads no data set: "
            "give a number, such as --vocab_size=50304"
        )
    count = max(_TOKENS, 2 * shape.block_size)
    ids = np.random.default_rng(seed).integers(0, min(shape.vocab_size, 1 << 16), count, dtype=np.uint16)
    for split in ("train", "val"):
        ids.tofile(folder / f"{split}.bin")


def _measured(run: Run, checkout: str, folder: Path) -> list[str]:
    """Lines about speed, time and memory."""
    from folio.machine.flops import mfu, peak
    from folio.machine.profiler import peak_table
    from folio.training import nanogpt
    from folio.training.timing import OURS, in_turn, parts, profile

    runtime, context = run.runtime, run.tokens.block_size
    others = {}
    if checkout:
        if runtime.world > 1:
            raise UserError(
                f"peer={checkout}: nanoGPT is measured with one process: start folio bench without torchrun"
            )
        shape = replace(run.model.config, block_size=context)
        ids = run.tokens.folders[0].splits["train"][0].map()
        others["nanoGPT"] = nanogpt.load(Path(checkout), shape, run.config.data.batch_size, ids, runtime.device).step
    times = in_turn(run, others, ROUNDS)
    each = statistics.median(times[OURS])
    speed, limit = run.tokens_per_step / each, peak(runtime.device, runtime.dtype)
    share = mfu(run.model, speed, runtime.device, runtime.dtype, runtime.world, context)
    lines = [
        f"time per iteration: {each * 1000:.2f}ms ({min(times[OURS]) * 1000:.2f} … {max(times[OURS]) * 1000:.2f} in "
        f"{len(times[OURS])} rounds), {speed:,.0f} tokens/s, MFU: {share * 100:.2f}%"
        + (f" of {limit * runtime.world / 1e12:,.2f} TFLOP/s" if limit else ""),
    ]
    for name, theirs in times.items():
        if name != OURS:
            ratios = [b / a for a, b in zip(times[OURS], theirs, strict=True)]
            lines.append(
                f"{name}: {statistics.median(theirs) * 1000:.2f}ms; {OURS} is "
                f"{statistics.median(ratios):.2f} × as fast ({min(ratios):.2f} … {max(ratios):.2f})"
            )
    found = parts(run, max(1, min(TIMED, int(30 / each))))
    lines.append("where a step's time goes")
    lines += [f"{1000 * t:>12,.2f} ms  {t / sum(found.values()):>6.1%}  {part}" for part, t in found.items()]
    if peaked := profile(run, 1, folder / "profile")[1]:
        lines += peak_table(peaked).splitlines()
    return lines
