"""What is done between updates: measurements, checks, checkpoints, a profile."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import TypeVar

from folio import files
from folio.checkpoints import checkpoint
from folio.config.options import Sampling
from folio.data.token_files import Split
from folio.data.tokenizers import Tokenizer
from folio.errors import UserError
from folio.evaluation import hellaswag
from folio.evaluation.loss import evaluate
from folio.generation.sampling import continuations, encode_prompt
from folio.machine.profiler import WARM_UP, Profiler
from folio.records import run_folder
from folio.records.trackers import Record
from folio.training.run import Run, Work
from folio.training.schedule import learning_rate
from folio.training.stopping import ENDS, EXIT, WISHES, finished, largest, not_finite

T = TypeVar("T")


def do_what_is_due(run: Run) -> None:
    """The work between updates; its time does not count into the speed of training."""
    began = time.perf_counter()
    for due, work in run.work:
        for record in work(run) if due(run) else ():
            run.log.write(record)
        run.stop = run.stop or finished(run)
    if not run.stop:
        run.owed.clear()
    run.aside += time.perf_counter() - began


def measurement(kind: str, interval: int, measure: Callable[[Run], list[Record]], first: int = 0) -> Work:
    """Due from step ``first`` on at multiples of ``interval``, and at the end.

    A signal ends it. Then the checkpoint says that it is owed, and the run that resumes there makes it first.
    """

    def due(run: Run) -> bool:
        step = run.state.step
        fresh = run.begun == 0 or step != run.begun or kind in run.owed  # else an earlier process has done it
        return fresh and step >= first and (step % interval == 0 or run.stop in ENDS or bool(finished(run)))

    def work(run: Run) -> list[Record]:
        owed = kind in run.owed
        run.owed.add(kind)
        if run.stop in EXIT:
            return []
        try:
            records = measure(run)
        except _GivenUpError:
            return []
        except FloatingPointError as error:
            raise not_finite(run, f"{error} at step {run.state.step}", run.state.step) from None
        run.owed.discard(kind)
        run.late |= owed
        return records

    return due, work


class _GivenUpError(Exception):
    """A signal ended a measurement, on all ranks, after as many of its parts."""


def watched(run: Run, what: str) -> Callable[[Sequence[T]], Iterator[T]]:
    """Parts of a measurement as they go by, shown at the bar; all ranks take as many, and a signal to any ends it."""

    def track(parts: Sequence[T]) -> Iterator[T]:
        for number, part in enumerate(parts, 1):
            if name := largest(run.runtime.total(WISHES.get(run.signal, 0.0))):
                run.stop = name
                raise _GivenUpError
            run.log.busy(f"{what} {number} of {len(parts)}")
            yield part

    return track


def validate(run: Run) -> list[Record]:
    """The loss over both splits, as many windows of each; remembers the best."""
    state, size = run.state, run.config.data.batch_size
    windows = run.config.evaluation.eval_iters * size

    def loss_over(split: Split, count: int) -> float:
        watch = watched(run, "evaluating, batch")
        return evaluate(run.model, run.loss, run.tokens, split, count, size, run.runtime, watch)

    train_loss = loss_over("train", windows or len(run.tokens.spread("val", 0)))
    val_loss = loss_over("val", windows)
    state.train_loss, state.val_loss = train_loss, val_loss
    if state.step > 0:
        if state.best is None or val_loss < state.best["loss"]:
            state.best = {"step": state.step, "loss": val_loss}
            state.evaluations_without_improvement = 0
        else:
            state.evaluations_without_improvement += 1
    record = {
        "kind": "eval",
        "step": state.step,
        "train_loss": train_loss,
        "val_loss": val_loss,
        "lr": learning_rate(state.step, run.config.optimizer),
        "mfu": run.mfu,
        "tokens": state.tokens,
        "seconds": time.perf_counter() - run.started,
    }
    return [record]


def answer(run: Run, questions: hellaswag.Questions) -> list[Record]:
    """How much of HellaSwag the model gets right."""
    found = hellaswag.evaluate(run.model, questions, run.runtime, track=watched(run, "HellaSwag, batch"))
    return [{"kind": "hellaswag", "step": run.state.step, **found, "tokens": run.state.tokens}]


def write(run: Run, tokenizer: Tokenizer, how: Sampling) -> list[Record]:
    """What the model makes of a prompt, on each rank, from the same draws each time."""
    runtime, seed = run.runtime, run.config.system.seed
    first = runtime.rank * how.num_samples
    watch = watched(run, "sampling, token")
    texts = runtime.gather(runtime.infer(lambda: continuations(run.model, tokenizer, how, seed, first, watch)))
    return [
        {"kind": "sample", "step": run.state.step, "number": number, "text": text}
        for number, text in enumerate(itertools.chain(*texts))
    ]


def check_due(run: Run) -> bool:
    every = run.config.processes.check_replicas_every
    return every > 0 and run.state.step > run.begun and (run.state.step % every == 0 or bool(run.stop))


def check_replicas(run: Run) -> tuple[()]:
    """That the processes still hold the same weights."""
    run.runtime.check_replicas(run.model)
    return ()


def checkpoint_due(run: Run) -> bool:
    config, step = run.config, run.state.step
    interval = config.output.checkpoint_interval
    if interval == "auto":
        interval = config.evaluation.eval_interval
    best = run.state.best is not None and run.state.best["step"] == step
    return (step > run.begun or run.late) and (step % interval == 0 or best or bool(run.stop))


def save(run: Run) -> tuple[()]:
    """A checkpoint of this step; then ``best.json``; then older ones may go.

    Training may go on while it is written, from a copy on the CPU; there is one such copy at a time.

    Raises:
        FloatingPointError: the last update made something that is not finite, and nothing is saved.
    """
    output, runtime, step, best = run.config.output, run.runtime, run.state.step, run.state.best
    if name := runtime.not_finite(run.model, run.optimizer):
        raise not_finite(run, f"{name} is not finite after {step} steps", step)
    run.log.sync()
    runtime.written()
    meanwhile = output.async_checkpoint
    if meanwhile == "auto":
        meanwhile = runtime.world > 1 or runtime.device.type == "cuda"
    meanwhile = meanwhile and not run.stop
    weights, slots = runtime.full_state(run.model, run.optimizer, copy=meanwhile)
    run.state.seconds = time.perf_counter() - run.started
    state = {
        "run": run.id,
        **asdict(run.state),
        "model": asdict(run.model.config),
        "tokenizer": run.tokenizer,
        "data": run.tokens.fingerprint(),
        "sources": run.tokens.sources(),
        "row": run.tokens.block_size,
        "owed": sorted(run.owed),
        "scaler": runtime.scaler.state_dict(),
        "resolved": runtime.resolved,
    }

    def write() -> None:
        checkpoint.save(run.out_dir, step, weights, slots, state)
        if best:
            files.write_sealed(run.out_dir / run_folder.BEST, best)
        if output.always_save_checkpoint:
            interval = 1 if output.checkpoint_interval == "auto" else output.checkpoint_interval
            checkpoint.prune(run.out_dir, output.keep_checkpoints, interval)
        else:
            checkpoint.prune(run.out_dir, 1)

    run.log.say(f"saving checkpoint to {run_folder.checkpoint_folder(run.out_dir, step)}")
    runtime.write(write, wait=not meanwhile)
    return ()


def profiling(run: Run) -> tuple[Work, Work]:
    """What ends a profile, before all other work; and what begins it, or ends it where the run ends, after all."""
    profiler = Profiler(run.optimizer, run.runtime.device, run.out_dir / run_folder.PROFILE)
    first = run.begun + WARM_UP
    last = first + run.config.logging.profile

    def end(run: Run) -> list[Record]:
        try:
            run.log.say(run.runtime.broadcast(profiler.finish))
        except OSError as error:
            run.log.say(f"no profile: {error}")
        return []

    def begin(run: Run) -> list[Record]:
        if not run.stop:
            run.runtime.broadcast(profiler.start)
        elif run.state.step > first:
            return end(run)
        else:
            run.log.say(f"nothing was profiled: that begins at step {first}, and the run ended at {run.state.step}")
        return []

    def begins(run: Run) -> bool:
        return run.state.step == first or (bool(run.stop) and run.state.step < last)

    return (lambda run: run.state.step == last, end), (begins, begin)


def measurements(run: Run, lines: list[str]) -> Iterator[Work]:
    """What is measured between updates: the loss, HellaSwag, samples."""
    o, shape = run.config.evaluation, run.model.config
    yield measurement("eval", o.eval_interval, validate)
    if o.eval_only or not (o.hellaswag_interval or o.sample_interval):
        return
    tokenizer = run.vocabulary()
    if o.hellaswag_interval:
        asked = o.hellaswag_data, o.hellaswag_style, o.hellaswag_limit
        questions = hellaswag.load(*asked, tokenizer, shape, run.runtime)
        lines += filter(None, [questions.note])
        yield measurement("hellaswag", o.hellaswag_interval, partial(answer, questions=questions))
    if o.sample_interval:
        _, prompt = encode_prompt("sample_prompt", o.sample_prompt, tokenizer, shape)
        room = o.sample_tokens - len(prompt)
        if room < 1:
            raise UserError(
                f"sample_tokens={o.sample_tokens}: sample_prompt takes {len(prompt)} of them and leaves none"
            )
        how = Sampling(o.sample_prompt, o.sample_count, room, temperature=1.0, top_k=o.sample_top_k)
        yield measurement("sample", o.sample_interval, partial(write, tokenizer=tokenizer, how=how), first=1)
