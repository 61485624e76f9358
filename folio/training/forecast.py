"""What a run will take: its steps and epochs, the time that is left, and which preset fits this machine."""

from __future__ import annotations

import itertools
import shlex
import statistics
import time

from folio.config.declare import MFU
from folio.config.depth import RATIO, SOURCE
from folio.config.options import TrainConfig
from folio.config.table import defaults, flat, options_with
from folio.config.values import COMMAND_LINE
from folio.data.rows import Tokens
from folio.machine.flops import flops_per_token, peak
from folio.machine.runtime import Runtime
from folio.model.gpt import GPT
from folio.records.log import counted
from folio.training.run import Run, Work

SIZES = ("depth", "n_layer", "n_head", "n_embd", "block_size")
DAY = 24.0  # hours
YEAR = 365.25 * 86400  # seconds
WARM_UP = 3  # first steps of this process, which compile and capture graphs: not timed
TIMED = 10  # steps after which the time left is printed
WORTH = 20  # steps that must remain then
UNKNOWN = 3e13  # FLOP/s, at most, of a CPU or Apple's GPU whose peak is unknown
FORWARD = 1 / 3  # share of a step's time that its forward takes


def advise_on_size(config: TrainConfig, model: GPT, tokens: Tokens, runtime: Runtime) -> list[str]:
    """One line if no option sets the model's size and the run would take this machine more than a day; else none.

    The hours are those of ``folio plan``. A CPU without a known peak, and MPS, get a generous one.
    """
    values, usual, device = flat(config), defaults(TrainConfig), runtime.device
    from_files = set(config.sources.values()) - {COMMAND_LINE, SOURCE}
    if from_files or any(name in config.sources or values[name] != usual[name] for name in SIZES):
        return []
    if config.optimizer.max_minutes or config.evaluation.eval_only or not config.logging.monitor:
        return []
    limit = peak(device, runtime.dtype)
    if limit is None and device.type == "cuda":
        return []
    per_token, steps = flops_per_token(model, tokens.block_size), config.optimizer.max_iters
    row = config.data.gradient_accumulation_steps * config.data.batch_size * tokens.block_size

    def hours(count: float) -> float:
        """The time that this number of tokens takes."""
        return per_token * count / (MFU * (limit or UNKNOWN) * runtime.world) / 3600

    if (needed := hours(float(row) * steps)) <= DAY:
        return []
    parameters = model.get_num_params()
    able = hours(RATIO * parameters) <= DAY and tokens.length("train") >= parameters
    preset = "small" if device.type == "cpu" else "gpt2" if able else "medium"
    where = sorted(config.sources.keys() & options_with(TrainConfig, role="data")) or ["dataset"]
    data = shlex.join(f"--{name}={values[name]}" for name in where)
    takes = f"about {rounded_duration(3600 * needed)}" if limit else "more than a day"
    return [
        f"no option sets the model's size, so this trains GPT-2 124M for {counted(steps, 'step')}, which takes {takes} "
        f"on this machine. A preset that fits it: folio train {preset} {data}"
    ]


def outlook(run: Run) -> list[str]:
    """One line: the steps and tokens that this process will train on, and the epochs of each data set."""
    steps = run.config.optimizer.max_iters - run.begun
    if steps < 1 or run.read_only or not run.log.monitor:
        return []
    tokens, sources = steps * run.tokens_per_step, run.tokens.sources()
    epochs = [f"{_epochs(tokens * source['share'] / source['tokens'])} of {source['name']}" for source in sources]
    return [f"{counted(steps, 'step')}{' more' * (run.begun > 0)}, {tokens:,} tokens: {', '.join(epochs)}"]


def _epochs(count: float) -> str:
    return f"{count:,.1f} epochs" if count >= 1 else f"{count:.2g} epochs"


def time_left(run: Run) -> list[Work]:
    """Work that prints the time left, once, after the first steps of this process; on rank 0 only.

    The time of a step is the median of the timed ones. Nothing waits for the device.
    """
    first, steps = run.begun, run.config.optimizer.max_iters
    if not (run.log.main and run.log.monitor) or steps - first - TIMED < WORTH:
        return []
    marks: list[float] = []  # the time before each step

    def scheduled(run: Run) -> bool:
        return run.state.step - first == len(marks) <= TIMED

    def do(run: Run) -> tuple[()]:
        marks.append(time.perf_counter())
        if len(marks) > TIMED:
            interval = run.config.evaluation.eval_interval
            timed = [b - a for a, b in itertools.pairwise(marks)][WARM_UP:]
            alone = [s for step, s in enumerate(timed, first + WARM_UP) if step % interval]  # without an evaluation
            evaluations = FORWARD * _steps_in_evaluations(run) if alone else 0.0  # else they are in every time
            left = statistics.median(alone or timed) * (steps - run.state.step + evaluations)
            without = " without HellaSwag" * (run.config.evaluation.hellaswag_interval > 0)
            run.log.say(f"about {rounded_duration(min(left, run.clock.deadline - marks[-1]))} left{without}")
        return ()

    return [Work(scheduled, do, waits=False)]


def _steps_in_evaluations(run: Run) -> float:
    """The tokens of the evaluations that remain, in steps."""
    e, data, step = run.config.evaluation, run.config.data, run.state.step
    count = (run.config.optimizer.max_iters - 1) // e.eval_interval - step // e.eval_interval + 1
    val = run.tokens.length("val")
    asked = e.eval_iters * data.batch_size * run.tokens.block_size or val
    of_val, of_train = min(asked, val), min(asked, run.tokens.length("train"))
    average = of_val if run.config.optimizer.ema_decay else 0
    return count * (of_val + of_train + average) / run.tokens_per_step


def rounded_duration(seconds: float) -> str:
    """Seconds in words: 190.0 → "3 minutes"."""
    for size, unit in ((YEAR, "year"), (86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= (55 if unit == "minute" else 1.5 * size):
            return counted(round(seconds / size), unit)
    return counted(max(1, 10 * round(seconds / 10) if seconds >= 20 else round(seconds)), "second")
