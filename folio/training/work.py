"""The work between updates: measurements, checks, checkpoints, a profile."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from folio import files
from folio.checkpoints import checkpoint, find
from folio.config.options import Sampling
from folio.data.token_files import Split
from folio.data.tokenizers import Tokenizer
from folio.errors import UserError
from folio.evaluation import hellaswag
from folio.evaluation.loss import evaluate
from folio.generation.sampling import continuations, encode_prompt
from folio.machine import shares
from folio.machine.profiler import WARM_UP, Profiler
from folio.records import run_folder
from folio.records.record import Record
from folio.training.forecast import time_left
from folio.training.run import Run, Work
from folio.training.schedule import learning_rate
from folio.training.signals import EXIT_CODES
from folio.training.stopping import ENDS, agreed_signal, finished, not_finite_error

T = TypeVar("T")


def scheduled_work(run: Run, callbacks: Sequence[Work] = ()) -> tuple[list[Work], list[str]]:
    """All work between updates in its order, with the user's ``callbacks``, and notes about it for the reader."""
    config = run.config
    loss = measurement("eval", config.evaluation.eval_interval, evaluate_loss)
    if run.read_only:
        return [loss], []
    measurements, notes = _measurements_of_text(run)
    work = [loss, *measurements]
    if config.optimizer.ema_decay:
        update = Work(lambda run: scheduled(run, 1, at_end=False, first=1), update_averages, waits=False)
        average = measurement("ema", config.evaluation.eval_interval, evaluate_average, first=1)
        work = [update, loss, average, *measurements]
    work = [*time_left(run), *work, *callbacks]
    if config.processes.check_replicas_every:
        work.append(Work(_replicas_scheduled, check_replicas))
    work.append(Work(_checkpoint_scheduled, save_checkpoint))
    if config.logging.profile:
        ends, begins = profiling(run)
        work = [ends, *work, begins]
    return work, notes


def run_scheduled_work(run: Run) -> None:
    """Does the work that is scheduled at this step, which may stop the run."""
    with run.clock.pause():
        for work in run.work:
            if work.scheduled(run):
                for record in work.do(run):
                    run.log.write(record)
            run.stop = run.stop or finished(run)
        run.worked = run.state.step
        if not run.stop:
            run.owed.clear()


def measure_once(run: Run) -> None:
    """Does each kind of work once, whatever the step."""
    for work in run.work:
        for record in work.do(run):
            run.log.write(record)


def scheduled(run: Run, interval: int, *, at_end: bool, first: int = 0, again: bool = False) -> bool:
    """Whether the step is a multiple of ``interval``, or ``at_end``; not before step ``first``.

    The work of a step is done once, unless it is to be done ``again``. An earlier process did that of the step at which
    this one resumed. After a signal between two micro steps, the loop returns to a step whose work is done.
    """
    step = run.state.step
    new = again or (step != run.worked and (run.begun == 0 or step != run.begun))
    return new and step >= first and (step % interval == 0 or at_end)


# Measurements


def measurement(kind: str, interval: int, measure: Callable[[Run], list[Record]], first: int = 0) -> Work:
    """Scheduled at multiples of ``interval`` from step ``first`` on, and when training is complete.

    A signal interrupts it. The checkpoint then notes that it is owed, and a run that resumes there makes it first.
    """

    def is_scheduled(run: Run) -> bool:
        at_end = run.stop in ENDS or bool(finished(run))
        return scheduled(run, interval, at_end=at_end, first=first, again=kind in run.owed)

    def do(run: Run) -> list[Record]:
        try:
            return measure(run)
        except FloatingPointError as error:
            raise not_finite_error(run, f"{error} at step {run.state.step}", run.state.step) from None

    return Work(is_scheduled, owing(kind, do))


def owing(name: str, measure: Callable[[Run], list[Record]]) -> Callable[[Run], list[Record]]:
    """The function, which a signal may interrupt: then the run owes what has this name."""

    def do(run: Run) -> list[Record]:
        owed = name in run.owed
        run.owed.add(name)
        if run.stop in EXIT_CODES:
            return []
        try:
            records = measure(run)
        except _AbandonedError:
            return []
        run.owed.discard(name)
        run.caught_up |= owed
        return records

    return do


def _measurements_of_text(run: Run) -> tuple[list[Work], list[str]]:
    """HellaSwag and samples, which need the tokenizer; and notes about them.

    Raises:
        UserError: one of their options does not fit the model or the data.
    """
    o, shape = run.config.evaluation, run.model.config
    if not (o.hellaswag_interval or o.sample_interval):
        return [], []
    tokenizer = run.make_tokenizer()
    work: list[Work] = []
    notes: list[str] = []
    if o.hellaswag_interval:
        asked = o.hellaswag_data, o.hellaswag_style, o.hellaswag_limit
        questions = hellaswag.load(*asked, tokenizer, shape, run.runtime)
        notes += filter(None, [questions.note])
        do = partial(evaluate_hellaswag, questions=questions)
        work.append(measurement("hellaswag", o.hellaswag_interval, do))
    if o.sample_interval:
        _, prompt = encode_prompt("sample_prompt", o.sample_prompt, tokenizer, shape)
        room = o.sample_tokens - len(prompt)
        if room < 1:
            raise UserError(
                f"sample_tokens={o.sample_tokens}: sample_prompt has {len(prompt)}: raise --sample_tokens above that"
            )
        how = Sampling(o.sample_prompt, o.sample_count, room, temperature=1.0, top_k=o.sample_top_k)
        work.append(measurement("sample", o.sample_interval, partial(sample, tokenizer=tokenizer, how=how), first=1))
    return work, notes


class _AbandonedError(Exception):
    """A signal interrupted a measurement, on all ranks after the same number of its parts."""


def watched(run: Run, what: str) -> Callable[[Sequence[T]], Iterator[T]]:
    """Shows the parts of a measurement in the progress bar as they are done; a signal to any rank interrupts it.

    All ranks must have the same number of parts.
    """

    def track(parts: Sequence[T]) -> Iterator[T]:
        for number, part in enumerate(parts, 1):
            if stop := agreed_signal(run):
                run.stop = stop
                raise _AbandonedError
            run.log.busy(f"{what} {number} of {len(parts)}")
            yield part

    return track


def evaluate_loss(run: Run) -> list[Record]:
    """Measures the loss over the same number of windows of each split; keeps the best validation loss."""
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
        "seconds": run.clock.seconds(),
    }
    return [record]


def update_averages(run: Run) -> tuple[()]:
    """Takes the weights after this update into their averages; early ones are short, so that they forget the beginning.

    The decay of update t is at most (1 + t) / (10 + t), as in TensorFlow's ``ExponentialMovingAverage``.
    """
    t = run.state.step
    decay = min(run.config.optimizer.ema_decay, (1 + t) / (10 + t))
    shares.update_averages(run.optimizer, decay, run.runtime.left_out)
    return ()


def evaluate_average(run: Run) -> list[Record]:
    """The validation loss of the averaged weights, over the windows of ``evaluate_loss``."""
    size = run.config.data.batch_size
    windows, watch = run.config.evaluation.eval_iters * size, watched(run, "evaluating the average, batch")
    with run.runtime.averaged(run.model, run.optimizer):
        loss = evaluate(run.model, run.loss, run.tokens, "val", windows, size, run.runtime, watch)
    return [{"kind": "ema", "step": run.state.step, "val_loss": loss}]


def evaluate_hellaswag(run: Run, questions: hellaswag.Questions) -> list[Record]:
    """The share of HellaSwag's questions that the model answers correctly."""
    found = hellaswag.evaluate(run.model, questions, run.runtime, track=watched(run, "HellaSwag, batch"))
    return [{"kind": "hellaswag", "step": run.state.step, **found, "tokens": run.state.tokens}]


def sample(run: Run, tokenizer: Tokenizer, how: Sampling) -> list[Record]:
    """Samples from a prompt, some on each rank, drawn with the same random numbers each time."""
    runtime, seed = run.runtime, run.config.system.seed
    first = runtime.rank * how.num_samples
    watch = watched(run, "sampling, token")
    texts = runtime.gather(runtime.infer(lambda: continuations(run.model, tokenizer, how, seed, first, watch)))
    return [
        {"kind": "sample", "step": run.state.step, "number": number, "text": text}
        for number, text in enumerate(itertools.chain(*texts))
    ]


# Checks, checkpoints, a profile


def _replicas_scheduled(run: Run) -> bool:
    ends = bool(run.stop)
    return scheduled(run, run.config.processes.check_replicas_every, at_end=ends, first=1, again=ends)


def check_replicas(run: Run) -> tuple[()]:
    """Checks that the processes still have the same weights. Raises FloatingPointError if not."""
    run.runtime.check_replicas(run.model)
    return ()


def _checkpoint_scheduled(run: Run) -> bool:
    interval = run.config.output.checkpoint_interval
    if interval == "auto":
        interval = run.config.evaluation.eval_interval
    step, best = run.state.step, run.state.best is not None and run.state.best["step"] == run.state.step
    due = step % interval == 0 or best or bool(run.stop)
    again = step != run.saved or run.caught_up or (bool(run.stop) and _write_failed(run))
    return run.save_due or (due and step > 0 and again)


def _write_failed(run: Run) -> bool:
    """Whether the checkpoint of this step could not be written; the same on every rank."""
    run.runtime.wait_for_write()
    written = run_folder.checkpoint_folder(run.out_dir, run.state.step).exists
    return run.saved > run.begun and not run.runtime.broadcast(written)


def save_checkpoint(run: Run) -> tuple[()]:
    """Writes a checkpoint of this step, then ``best.json``, then removes older checkpoints.

    Training may continue while a thread writes it from a copy on the CPU; there is one such copy at a time. If it
    cannot be written, older checkpoints stay, and training continues until the next one, unless the run ends here.

    Raises:
        FloatingPointError: a weight or moment is not finite; nothing is saved.
        OSError: the checkpoint with which the run ends cannot be written; names it.
    """
    output, runtime, step = run.config.output, run.runtime, run.state.step
    run.save_due = False
    if name := runtime.find_not_finite(run.model, run.optimizer):
        raise not_finite_error(run, f"{name} is not finite after {step} steps", step)
    run.log.sync()
    runtime.wait_for_write()
    meanwhile = output.async_checkpoint
    if meanwhile == "auto":
        meanwhile = runtime.world > 1 or runtime.device.type == "cuda"
    meanwhile = meanwhile and not run.stop
    weights, slots = runtime.full_state(run.model, run.optimizer, copy=meanwhile)
    run.state.seconds = run.clock.seconds()
    run.skipped.losses = runtime.guard.losses()
    state = {
        "run": run.id,
        **asdict(run.state),
        "skipped": asdict(run.skipped),
        "model": asdict(run.model.config),
        "tokenizer": run.tokenizer,
        "data": run.tokens.fingerprint(),
        "sources": run.tokens.sources(),
        "row": run.tokens.block_size,
        "owed": sorted(run.owed),
        "objective": run.objective,
        "optimizer": type(run.optimizer).__name__,
        "scaler": runtime.scaler.state_dict(),
        "resolved": runtime.resolved,
    }

    ends, best = bool(run.stop), run.state.best

    def write() -> None:
        what = f"step {step}"
        try:
            checkpoint.save(run.out_dir, step, weights, slots, state)
            what = run_folder.BEST
            if best:
                update_best(run.out_dir, best)
        except OSError as error:
            if ends:
                raise
            run.log.say(
                f"warning: {what} could not be saved ({files.reason(error)}): training continues, and the next "
                "checkpoint tries again"
            )
            return
        if output.always_save_checkpoint:
            interval = 1 if output.checkpoint_interval == "auto" else output.checkpoint_interval
            find.prune(run.out_dir, output.keep_checkpoints, interval)
        else:
            find.prune(run.out_dir, 1)

    run.log.say(f"saving checkpoint to {run_folder.checkpoint_folder(run.out_dir, step)}")
    runtime.write(write, wait=not meanwhile)
    run.saved = step
    return ()


def update_best(out_dir: Path, best: dict[str, Any]) -> None:
    """Writes ``best.json`` if it is of another evaluation, or lost, and the checkpoint of the best one is there."""
    path = out_dir / run_folder.BEST
    try:
        now, _ = files.read_sealed(path)
    except (OSError, ValueError):
        now = {}
    if {name: now.get(name) for name in best} != best and best["step"] in run_folder.steps(out_dir):
        files.write_sealed(path, best)


def profiling(run: Run) -> tuple[Work, Work]:
    """Two kinds of work: the first ends a profile, the last begins it or, if the run stops earlier, ends it."""
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
            run.log.say(
                f"nothing was profiled: profiling begins at step {first}, and the run ended at {run.state.step}"
            )
        return []

    def begins(run: Run) -> bool:
        return run.state.step == first or (bool(run.stop) and run.state.step < last)

    return Work(lambda run: run.state.step == last and run.worked != last, end), Work(begins, begin)
