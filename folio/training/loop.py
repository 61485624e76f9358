"""The training run: ``build`` it from a config, ``fit`` it, ``finish`` it."""

from __future__ import annotations

import itertools
import math
import os
import secrets
import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from folio import files, rng
from folio.checkpoints import checkpoint, hugging_face, pt_files
from folio.checkpoints.checkpoint import State
from folio.checkpoints.pt_files import PtFile
from folio.config.compose import accumulated, check, over_files
from folio.config.options import Data, Processes, Sampling, TrainConfig
from folio.config.table import flat, override, those
from folio.config.values import COMMAND_LINE
from folio.data.rows import Tokens
from folio.data.token_files import GPT2, Split
from folio.data.tokenizers import Tokenizer, from_json
from folio.errors import UserError
from folio.evaluation import hellaswag
from folio.evaluation.loss import evaluate
from folio.generation.sampling import continuations, encode_prompt
from folio.machine import processes, shortage
from folio.machine.flops import flops_per_token, mfu
from folio.machine.profiler import WARM_UP, Profiler
from folio.machine.runtime import Loss, Runtime
from folio.model.config import GPTConfig
from folio.model.gpt import GPT
from folio.records import run_folder, trackers
from folio.records.log import Log, counted, rewind
from folio.records.run_folder import METRICS, NANOGPT
from folio.records.trackers import Record
from folio.training import ownership
from folio.training.optimizers import adamw, learning_rate

if TYPE_CHECKING:
    from folio.machine import memory

_SIGNALS = [s for s in signal.Signals if s.name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")]  # those of this system
EXIT = {s.name: 128 + s for s in _SIGNALS}  # stop reason → exit code of the process, else 0
ENDS = ("max_iters", "patience", "max_minutes")  # stop reasons at which everything is measured once more
# summed over the ranks, of which there are fewer than 2¹⁴, the largest tells; float32 has powers of two exactly
_WISHES = {"SIGTERM": 2.0**56, "SIGHUP": 2.0**42, "SIGUSR1": 2.0**28, "SIGINT": 2.0**14, "max_minutes": 1.0}
_SHAPE = tuple(f.name for f in fields(GPTConfig) if f.name != "dropout")
_NUMBERS = itertools.count()  # of the runs that this process builds
_PARTS = {"model", "data", "scaler", "resolved"} | {f.name for f in fields(State)}  # of a state.json
T = TypeVar("T")
Work = tuple[Callable[["Run"], bool], Callable[["Run"], Iterable[Record]]]  # due, function → records


class MicroBatch(NamedTuple):
    """One forward and backward: tokens, targets and the number of each token's document, (B, T); dropout's seed."""

    idx: Tensor
    targets: Tensor
    documents: Tensor | None
    seed: int


class Figures(NamedTuple):
    """A step's [nats, tokens, signal, gradient norm], perhaps still on their way from the device."""

    step: int
    lr: float
    at: float  # when they were asked for
    read: Callable[[], list[float]]


@dataclass
class Run:
    """All parts of a run; ``work`` is what is done between updates, as (due, function → records)."""

    config: TrainConfig
    id: str
    model: GPT
    loss: Loss
    optimizer: torch.optim.AdamW
    tokens: Tokens
    tokenizer: dict[str, Any] | None  # as JSON; None where nothing says what the ids mean
    runtime: Runtime
    log: Log
    state: State
    lock: files.Lock | None = None  # on the folder, for all ranks
    work: list[Work] = field(default_factory=list)
    begun: int = 0  # the step this process began at
    until: float = math.inf  # when max_minutes are over
    stop: str = ""  # why the loop ends: one of ENDS or EXIT
    signal: str = ""  # that this rank received
    owed: set[str] = field(default_factory=set)  # measurements of this step that a signal ended
    late: bool = False  # some that an earlier process owed were made here
    pending: Figures | None = None  # of the last step, read one step late
    speed: float = math.nan  # tokens per second, without the work between updates
    started: float = field(default_factory=time.perf_counter)  # when this process began, less former seconds
    lap: tuple[int, float] = (0, 0.0)  # step and time of the last line
    aside: float = 0.0  # seconds of work between updates since then

    @property
    def out_dir(self) -> Path:
        return Path(self.config.output.out_dir)

    def vocabulary(self) -> Tokenizer:
        """Raises ValueError where nothing says what the token ids mean."""
        if self.tokenizer is None:
            raise UserError(
                f"nothing says what the token ids of {self.tokens.name} mean, so no text can be made of them: "
                "put a meta.json or meta.pkl beside the token files"
            )
        return from_json(self.tokenizer)

    @property
    def rows_per_step(self) -> int:
        return self.config.data.gradient_accumulation_steps * self.config.data.batch_size

    @property
    def tokens_per_step(self) -> int:
        return self.rows_per_step * self.tokens.block_size

    @property
    def mfu(self) -> float:
        """Share of the devices' peak in use, NaN where that is unknown."""
        runtime = self.runtime
        return mfu(self.model, self.speed, runtime.device, runtime.dtype, runtime.world, self.tokens.block_size)


def fit(run: Run) -> str:
    """Trains until ``stop_reason``, and returns it; with ``eval_only`` measures once instead.

    Step N means N updates done: what is due at N sees the weights after N updates.

    Raises:
        FloatingPointError: the loss is not finite; weights and checkpoints stay as they were before.
    """
    if run.config.evaluation.eval_only:
        (_, measure), *_ = run.work  # the loss
        run.log.write(*measure(run))
        return run.stop
    config, state, runtime = run.config.optimizer, run.state, run.runtime
    advice = partial(_what_fits, run.config, run.model.config, runtime)
    with shortage.explained("training", advice), signals(run), batches(run) as steps:
        run.log.start(state.step, run.tokens_per_step)
        run.lap = (state.step, time.perf_counter())
        while True:
            run.stop = stop_reason(run)
            do_what_is_due(run)
            if run.stop:
                return run.stop

            rate = learning_rate(state.step, config)
            for group in run.optimizer.param_groups:
                group["lr"] = rate
            totals = torch.zeros(2, device=runtime.device)
            micro_batches = next(steps)
            for batch in micro_batches:
                runtime.seed(batch.seed)
                with runtime.sync(run.loss, last=batch is micro_batches[-1]):
                    nats, counted = run.loss(batch.idx, batch.targets, batch.documents)
                    runtime.backward(nats * (runtime.world / run.tokens_per_step))
                totals += torch.stack([nats.detach(), counted])
            stop = torch.full((1,), _WISHES.get(wish(run), 0.0), device=runtime.device)
            totals = runtime.reduce(torch.cat([totals, stop]))
            norm = runtime.clip(run.optimizer, config.grad_clip)
            runtime.update(run.optimizer, totals[0], norm)

            settle(run)  # the step before; on a GPU this one still runs
            figures = runtime.later(torch.cat([totals, norm[None]]))
            run.pending = Figures(state.step, rate, time.perf_counter(), figures)
            state.step += 1
            state.rows += run.rows_per_step
            state.tokens += run.tokens_per_step


def stop_reason(run: Run) -> str:
    """Why to stop here, the same on every rank, or "". Nothing is due before the last loss is known."""
    alone = wish(run) if run.runtime.world == 1 else ""  # several ranks learn of it with the loss, together
    if finished(run) or alone or any(due(run) for due, _ in run.work):
        settle(run)
    return finished(run) or run.stop or alone


def finished(run: Run) -> str:
    """Why nothing is left to be done, or ""."""
    patience = run.config.optimizer.patience
    if run.state.step >= run.config.optimizer.max_iters:
        return "max_iters"
    return "patience" if 0 < patience <= run.state.evaluations_without_improvement else ""


def wish(run: Run) -> str:
    """Why this rank would stop, or ""."""
    return run.signal or ("max_minutes" if time.perf_counter() > run.until else "")


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


def settle(run: Run) -> None:
    """Reads the last step's figures: writes its line, and takes up a signal that any rank received."""
    if run.pending is None:
        return
    (step, rate, at, read), run.pending = run.pending, None
    nats, counted, received, norm = read()
    loss = nats / counted
    # float16 overflows now and then, which its scaler takes care of
    if not math.isfinite(loss) or not (math.isfinite(norm) or run.runtime.scaler.is_enabled()):
        what = "loss" if not math.isfinite(loss) else "gradient"
        raise _not_finite(run, f"the {what} of step {step} is not finite", step)
    run.stop = _largest(received)
    if step % run.config.logging.log_interval == 0:
        run.speed = run.tokens_per_step * (step + 1 - run.lap[0]) / (at - run.lap[1] - run.aside)
        run.lap, run.aside = (step + 1, at), 0.0
        run.log.advance(step + 1, loss, run.speed)
        run.log.write(
            {
                "kind": "train",
                "step": step,
                "loss": loss,
                "lr": rate,
                "grad_norm": norm,
                "tokens": run.state.tokens,
                "tokens_per_second": run.speed,
                "mfu": run.mfu,
                "seconds": at - run.started,
            }
        )


def _largest(wishes: float) -> str:
    """Of the wishes that the ranks summed up, the one that counts; "" where there is none."""
    return next((name for name, mark in _WISHES.items() if wishes >= mark), "")


def _not_finite(run: Run, what: str, updates: int) -> FloatingPointError:
    """What is said after so many ``updates``; before the first of this process its weights are the cause."""
    kept = run_folder.steps(run.out_dir)
    remedy = "lower --learning_rate, " + (f"or resume from step {kept[-1]}" if kept else "there is no checkpoint yet")
    if updates == run.begun:
        earlier = [step for step in kept if step < updates]
        remedy = "that is of the weights with which it began: " + (
            f"move {run_folder.checkpoint_folder(run.out_dir, updates)} away and resume from step {earlier[-1]}"
            if earlier
            else "begin with others, or with another --dtype"
        )
    return FloatingPointError(f"{what}, training stopped there: {remedy}")


# The data of a step


def micro_batches(data: Data, rank: int, world: int) -> list[tuple[int, int, int]]:
    """This rank's share of a step's rows: (first row, rows, global micro step) of each micro step.

    Where the world divides the accumulation, the micro steps are dealt out and a rank's are those of one
    process. Else each rank takes its share of the rows in micro batches of at most ``batch_size``.

    Raises:
        ValueError: the world does not divide the rows; names the nearest that fit.
    """
    steps, size = data.gradient_accumulation_steps, data.batch_size
    rows = steps * size
    if steps % world == 0:
        return [(m * size, size, m) for m in range(rank, steps, world)]
    if rows % world:
        below = next(w for w in range(world, 0, -1) if rows % w == 0)
        near_world = next((w for w in range(world, 2 * world - below) if rows % w == 0), below)
        near_rows = max(1, round(rows / world)) * world
        raise UserError(
            f"gradient_accumulation_steps × batch_size = {steps} × {size} = {counted(rows, 'row')} cannot be shared by "
            f"{counted(world, 'process')}: {counted(near_world, 'process')} or {counted(near_rows, 'row')} would fit"
        )
    share = rows // world
    starts = range(rank * share, (rank + 1) * share, size)
    return [(first, min(size, (rank + 1) * share - first), rank * len(starts) + i) for i, first in enumerate(starts)]


@contextmanager
def batches(run: Run) -> Iterator[Iterator[list[MicroBatch]]]:
    """This rank's micro batches, step after step; a thread reads the next step's during this one."""
    runtime, state = run.runtime, run.state
    share = micro_batches(run.config.data, runtime.rank, runtime.world)
    restart = run.config.optimizer.restart_interval

    def read(step: int, row: int) -> list[tuple[Tensor, Tensor | None, int]]:
        found = []
        if restart:
            row = step % restart * run.rows_per_step
        for first, count, micro in share:
            rows = run.tokens.rows("train", row + first, count)
            documents = runtime.pin(run.tokens.documents(rows)) if run.tokens.documents else None
            found.append((runtime.pin(rows), documents, rng.key(run.config.system.seed, "dropout", step, micro)))
        return found

    def move(rows: Tensor, documents: Tensor | None, seed: int) -> MicroBatch:
        here = runtime.move(rows)
        return MicroBatch(here[:, :-1], here[:, 1:], None if documents is None else runtime.move(documents), seed)

    with ThreadPoolExecutor(1, "batches") as pool:

        def forever() -> Iterator[list[MicroBatch]]:
            ahead = pool.submit(read, state.step, state.rows)
            while True:
                here = ahead.result()
                ahead = pool.submit(read, state.step + 1, state.rows + run.rows_per_step)
                yield [move(*parts) for parts in here]

        yield forever()


@contextmanager
def signals(run: Run) -> Iterator[None]:
    """A signal ends the run after the step, with a checkpoint; a second SIGINT ends it at once.

    Those are SIGINT, SIGTERM, SIGHUP (a connection that is lost) and SIGUSR1 (Slurm's warning). One that the caller
    has ignored, as nohup does SIGHUP, stays ignored; but a shell ignores SIGINT for every job in the background.
    """

    def receive(number: int, frame: Any) -> None:
        if run.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        run.signal = signal.Signals(number).name
        with suppress(RuntimeError):  # in the middle of another line
            run.log.say(f"{run.signal}: finishing the step and saving; Ctrl-C to leave at once")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = [s for s in _SIGNALS if s == signal.SIGINT or signal.getsignal(s) != signal.SIG_IGN]
    before = {s: signal.signal(s, receive) for s in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# The work between updates


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
            raise _not_finite(run, f"{error} at step {run.state.step}", run.state.step) from None
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
            if name := _largest(run.runtime.total(_WISHES.get(run.signal, 0.0))):
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
        raise _not_finite(run, f"{name} is not finite after {step} steps", step)
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


# How a run begins and ends


def build(config: TrainConfig) -> Run:
    """Everything that a run needs, checked; nothing is written before all of it is in place, but a lock on the folder.

    Raises:
        ValueError, FileNotFoundError, OSError: one line that names the knob or file and the remedy.
    """
    check(config)
    trackers.parse(config.logging.track)
    lock = _hold(config)
    try:
        with _let_go_at_sigterm(lock):
            return _build(config, lock)
    except BaseException:
        if lock:
            lock.release()
        raise


def _hold(config: TrainConfig) -> files.Lock | None:
    """The folder, which the first rank holds for all; None where nothing will be written."""
    out_dir = Path(config.output.out_dir)
    nothing_there = config.output.init_from == "resume" and not out_dir.is_dir()
    if config.evaluation.eval_only or nothing_there or processes.place()[0] > 0:
        return None
    try:
        return run_folder.hold(out_dir)
    except OSError as error:
        raise _unwritable(out_dir, error) from None


@contextmanager
def _let_go_at_sigterm(lock: files.Lock | None) -> Iterator[None]:
    """A process that is ended before its run begins, as a launcher does when another fails, leaves no lock file."""
    if lock is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def let_go(number: int, frame: Any) -> None:
        lock.release()
        signal.signal(number, before)
        os.kill(os.getpid(), number)

    before = signal.signal(signal.SIGTERM, let_go) or signal.SIG_DFL
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _unwritable(out_dir: Path, error: OSError) -> OSError:
    return OSError(f"out_dir={out_dir} cannot be written ({error.strerror}): choose another --out_dir")


def _build(config: TrainConfig, lock: files.Lock | None) -> Run:
    lines: list[str] = []
    out_dir, begin = Path(config.output.out_dir), config.output.init_from
    number = next(_NUMBERS)
    again = processes.former_run(number)  # whatever init_from says: this job has begun already
    if lock:
        going_on = again is not None or begin in ("resume", "auto")
        ownership.refuse_foreign(out_dir, bool(config.logging.log_txt), going_on)
    former = (_former(out_dir, "auto", again) if again is not None else None) or _former(out_dir, begin)
    if former is not None:
        lines += former.lines
        config = _overlay(config, former.found.asked, lines)
        check(config)
    source = hugging_face.find(begin) if not former and begin not in ("scratch", "resume", "auto") else None
    given = former.found.config() if former else source.config() if source else None
    shape = _shape_of(given, config, former, lines) if given else config.model
    tokens = Tokens.open(config.data, shape.block_size, config.system.seed)
    theirs = former.found.asked if former else {}
    mine = {name: by for name, by in config.sources.items() if by == COMMAND_LINE or name not in theirs}
    data = accumulated(config.data, tokens.block_size, mine)
    config = replace(config, data=data)
    lines += [folder.note for folder in tokens.folders if folder.note]
    vocab_size = shape.vocab_size
    if vocab_size == "auto":
        vocab_size, line = vocab_size_of(tokens)
        lines.append(line)
    shape = replace(shape, vocab_size=vocab_size)
    tokens.vocab_size = vocab_size
    spec = _tokenizer_of(tokens, former.found if former else source, former is not None, lines)
    known = tokens.known_vocab_size
    if known and vocab_size < known:
        remedy = (
            "give --data_dir the data that the run was trained on" if former else "set --vocab_size to that or more"
        )
        raise UserError(f"vocab_size={vocab_size} is below the {known} of {tokens.name}: {remedy}")
    if config.data.document_mask:
        lines.append(f"attention stays within documents: {tokens.tell_documents_apart(config.data.eot)}")
    _check_size(shape)
    with shortage.explained("building the model", partial(_least, shape)):
        if source:
            model = source.model(shape.dropout)
            model.crop_block_size(shape.block_size)
            model.grow_vocab_size(vocab_size)
            lines.append(f"weights of {source.path}" + (f", step {source.step}" if source.step else ""))
        else:
            model = GPT.empty(shape) if former else GPT(shape, lambda name: rng.generator(config.system.seed, name))
    tokens_per_step = data.gradient_accumulation_steps * data.batch_size * tokens.block_size
    flops = flops_per_token(model, tokens.block_size) * float(tokens_per_step) * config.optimizer.max_iters
    resolved = former.found.state["resolved"] if former else None
    runtime = Runtime(config.system, config.processes, flops=flops, resolved=resolved)
    try:
        runtime.agree(
            {name: value for name, value in flat(config).items() if name not in those(TrainConfig, local=True)}
            | {"the vocabulary": vocab_size, "the data": tokens.fingerprint()}
            | {"the newest checkpoint": former.found.step if former else None}
            | {name: runtime.resolved[name] for name in ("device", "dtype", "compile")}
        )
        largest = max(size for _, size, _ in micro_batches(data, runtime.rank, runtime.world))
        if data.gradient_accumulation_steps % runtime.world == 0:
            tokens.world = runtime.world
        else:
            lines.append(
                f"{runtime.world} processes do not divide the micro steps: dropout masks are not those of one process"
            )
        loss = runtime.wrap(model, (largest, tokens.block_size))
        o = config.optimizer
        optimizer = adamw(model, o.learning_rate, (o.beta1, o.beta2), o.weight_decay)
        log = Log(runtime.rank == 0, o.max_iters, config.logging.monitor)
        run = Run(config, secrets.token_hex(6), model, loss, optimizer, tokens, spec, runtime, log, State(), lock)
        if former:
            _restore(run, former, lines)
        if minutes := config.optimizer.max_minutes:
            run.until = time.perf_counter() + 60 * minutes
        run.work = [*_measurements(run, lines), (check_due, check_replicas), (checkpoint_due, save)]
        if config.logging.profile and not config.evaluation.eval_only:
            ends, begins = profiling(run)
            run.work = [ends, *run.work, begins]
        if not config.evaluation.eval_only:
            lines += runtime.broadcast(lambda: _take_folder(run, number, former))
            log.open(out_dir, config.logging.log_txt, o.restart_interval or o.max_iters or 1)
            if former and isinstance(former.found, PtFile):
                save(run)  # from here on the run is this program's
                runtime.written()
        _introduce(run, lines)
    except BaseException:
        runtime.close()
        with shortage.explained("building the run", partial(_what_fits, config, shape, runtime)):
            raise
    return run


def step_of_a_device(
    data: Data, several: Processes, context: int, dtype: torch.dtype, gpu: bool, world: int, shards: int
) -> memory.Step:
    """What the first device does in a step. Raises ValueError where the devices do not divide the rows."""
    from folio.machine.memory import Step

    share = micro_batches(data, 0, world)
    recompute = several.activation_checkpointing == "block"
    most = max(rows for _, rows, _ in share)
    return Step(most, len(share), dtype, gpu, recompute, data.document_mask, world, shards, context)


_SMALLER = "lower --block_size, --n_layer or --n_embd"


def _what_fits(config: TrainConfig, shape: GPTConfig, runtime: Runtime) -> str:
    """What a step needs by the arithmetic of ``folio plan``, and which options need less."""
    from folio.machine import memory

    def total(way: dict[str, Any]) -> int:
        changed = override(config, way)
        data, several = changed.data, changed.processes
        shards = runtime.world if several.parallel == "fsdp" else runtime.shards
        gpu, context = runtime.device.type != "cpu", data.row(shape.block_size)
        step = step_of_a_device(data, several, context, runtime.dtype, gpu, runtime.world, shards)
        return memory.needed(shape, step).total

    need, room = total({}), shortage.room(runtime.device)
    limit = room if need > room else 0.75 * need
    sharded = runtime.world > 1 and runtime.dtype != torch.float16
    ways = memory.remedies(config.data, sharded, lambda way: total(way) <= limit)
    remedy = (
        f"{'what fits:' if need > room else 'to need less:'} {ways}" if ways else f"{memory.NOTHING_FITS}: {_SMALLER}"
    )
    return (
        f"by folio plan's count a step needs {need / 1e9:,.2f} of the {room / 1e9:,.2f} GB on {runtime.device}, "
        f"without what torch itself takes; {remedy}"
    )


def _check_size(shape: GPTConfig) -> None:
    """Raises ValueError for weights that this machine cannot hold: the system might kill the process without a word."""
    with shortage.explained("building the model", lambda: _SMALLER):
        if 4 * _count(shape) > shortage.machine():
            raise UserError(f"out of memory while building the model: {_least(shape)}")


def _count(shape: GPTConfig) -> int:
    with torch.device("meta"):
        return GPT(shape).get_num_params(False)


def _least(shape: GPTConfig) -> str:
    count = _count(shape)
    return (
        f"{count:,} parameters take {4 * count / 1e9:,.2f} GB, and {16 * count / 1e9:,.2f} with their gradients and "
        f"AdamW's moments, of the {shortage.machine() / 1e9:,.2f} GB of this machine: lower --n_layer={shape.n_layer}, "
        f"--n_embd={shape.n_embd}, --vocab_size={shape.vocab_size} or --block_size={shape.block_size}"
    )


def _measurements(run: Run, lines: list[str]) -> Iterator[Work]:
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


def finish(run: Run) -> None:
    """Says how it went, where it did, and gives everything back; belongs on every path."""
    state, max_iters, patience = run.state, run.config.optimizer.max_iters, run.config.optimizer.patience
    try:
        if run.stop == "max_iters" and run.begun == state.step > 0 and not run.late:
            run.log.say(f"nothing to do: the run is at step {state.step}: raise --max_iters={max_iters} above that")
        elif run.stop == "patience" and run.begun == state.step > 0 and not run.late:
            in_vain = counted(state.evaluations_without_improvement, "evaluation")
            run.log.say(f"nothing to do: no better loss in {in_vain}: raise --patience={patience} above that")
        elif run.stop:
            further = f", folio train --init_from=resume --out_dir={shlex.quote(str(run.out_dir))}"
            further += f" --patience={2 * patience}" if run.stop == "patience" else ""
            why = "" if run.stop == "max_iters" else f" ({run.stop}){f'{further} goes on' if state.step else ''}"
            best = (
                f"; best validation loss {state.best['loss']:.4f} at step {state.best['step']:.0f}"
                if state.best
                else ""
            )
            run.log.say(f"step {state.step} of {max_iters}{why}{best}")
        run.log.close()
    finally:
        try:
            run.runtime.close()
        finally:
            if run.lock:
                run.lock.release()


class _Former(NamedTuple):
    """What an earlier run left: its id, the newest checkpoint whose state can be read, and what is to be said of it."""

    id: str
    found: checkpoint.Checkpoint
    lines: tuple[str, ...] = ()


def has_run(out_dir: Path) -> bool:
    """Whether there is a run that ``init_from=resume`` or ``auto`` would go on with."""
    return bool(run_folder.steps(out_dir)) or (out_dir / NANOGPT).is_file()


def _former(out_dir: Path, begin: str, known: str = "") -> _Former | None:
    """What ``init_from`` finds in the folder; where an id is ``known``, nothing but that run."""
    if begin not in ("resume", "auto"):
        return None
    have = run_folder.steps(out_dir)
    if not have and (out_dir / NANOGPT).exists():
        nanogpt = pt_files.read(out_dir / NANOGPT)
        return _Former(nanogpt.state["run"], nanogpt)
    if not have:
        if begin == "auto":
            return None
        raise FileNotFoundError(f"nothing to resume in {out_dir}: no checkpoint is there; use --init_from=scratch")
    path = out_dir / run_folder.CONFIG
    try:
        run_id, asked, sealed = run_folder.asked(out_dir)
        lines = () if sealed else (f"{path} has no checksum, as older versions wrote it: it is used as it is",)
    except FileNotFoundError:
        run_id, asked = "", {}
        lines = (f"{path} is missing: options that are not given now have their defaults",)
    for step in reversed(have):
        path = run_folder.checkpoint_folder(out_dir, step)
        try:
            state, _ = checkpoint.state_of(path)
        except ValueError:
            continue
        if state.keys() >= _PARTS:
            found = _Former(run_id or state["run"], checkpoint.Checkpoint(path, state, asked), lines)
            return None if known and found.id != known else found
    raise UserError(f"every checkpoint in {out_dir} is damaged: start afresh with --init_from=scratch")


def _overlay(config: TrainConfig, asked: dict[str, Any], lines: list[str]) -> TrainConfig:
    """defaults < files < what the checkpoint's run was asked < command line."""
    merged, overridden = over_files(config, asked)
    lines += overridden
    o = merged.optimizer
    longer = o.max_iters > max(asked.get("max_iters", o.max_iters), o.lr_decay_iters)
    if longer and o.decay_lr and not o.restart_interval and o.lr_decay_iters == asked.get("lr_decay_iters"):
        lines.append(
            f"max_iters grew from {asked['max_iters']} to {o.max_iters}: beyond lr_decay_iters={o.lr_decay_iters} "
            f"the learning rate stays at min_lr={o.min_lr:g}"
        )
    return merged


def _shape_of(given: GPTConfig, config: TrainConfig, former: _Former | None, lines: list[str]) -> GPTConfig:
    """The given model's shape with this run's dropout, and with fewer positions or more token ids where asked for.

    Any other shape that was typed and differs is refused.
    """
    chosen: dict[str, Any] = {"dropout": config.model.dropout}
    for name in _SHAPE:
        mine, theirs, source = getattr(config.model, name), getattr(given, name), config.sources.get(name)
        # a crop that was asked for by a run that ended before its first checkpoint
        was_asked = name == "block_size" and former and former.found.asked.get(name) == mine
        if mine == theirs or mine == "auto" or not (source or was_asked):
            continue
        cropped = name == "block_size" and mine < theirs and (source == COMMAND_LINE or was_asked or not former)
        grown = name == "vocab_size" and mine > theirs and not former
        if cropped or grown:
            chosen[name] = mine
            lines.append(f"{name} {'cropped' if cropped else 'grown'} from {theirs} to {mine}")
        elif source == COMMAND_LINE:
            raise UserError(f"--{name}={mine} does not fit the checkpoint, which has {name}={theirs}")
        else:
            lines.append(f"{name}={theirs} from the checkpoint, not {mine} from {source}")
    return replace(given, **chosen)


def vocab_size_of(tokens: Tokens) -> tuple[int, str]:
    """What ``vocab_size=auto`` becomes with this data, and a line that says so."""
    found = tokens.known_vocab_size
    if found is None or tokens.tokenizer() == GPT2:
        return 50304, "vocab_size = 50304 (GPT-2's 50257 rounded up for speed)"
    return found, f"found vocab_size = {found} (inside {tokens.name})"


def _tokenizer_of(
    tokens: Tokens, model: checkpoint.Checkpoint | None, resumed: bool, lines: list[str]
) -> dict[str, Any] | None:
    """What the run's token ids mean, which its checkpoints keep.

    Raises:
        ValueError: they mean something else to the model of the run that is resumed.
    """
    spec, why = tokens.tokenizer_for(model.tokenizer_spec if model else None)
    if model and model.tokenizer_spec is None and not resumed:
        lines.append(
            f"nothing says what the token ids of {model.path} mean: make sure that {tokens.name} has the same ones"
        )
    if why and model:
        line = f"the token ids of {tokens.name} mean something else to the model of {model.path}: they are {why}"
        if resumed:
            raise UserError(
                f"{line}: give --data_dir the data that the run was trained on, or start afresh with "
                "--init_from=scratch"
            )
        lines.append(
            f"warning: {line}. What the model knows of its tokens is lost; to keep it, prepare the data with the "
            f"model's tokenizer, which folio export writes as tokenizer.json"
        )
    return spec


def _restore(run: Run, former: _Former, lines: list[str]) -> None:
    """Weights, optimiser and position of the newest checkpoint that verifies."""
    found: checkpoint.Checkpoint | None = former.found
    if not isinstance(found, PtFile):
        found, damaged = run.runtime.broadcast(
            lambda: checkpoint.latest(run.out_dir, former.id, aside=not run.config.evaluation.eval_only)
        )
        lines += damaged
        if found is None:
            raise UserError(
                f"{'; '.join(damaged)}: no checkpoint in {run.out_dir} is whole; start afresh with --init_from=scratch"
            )
    state, positions, row = found.state, run.model.config.block_size, run.tokens.block_size

    def cropped(tensors: checkpoint.Tensors) -> checkpoint.Tensors:
        for name, tensor in tensors:
            yield name, tensor[:positions] if name.startswith("transformer.wpe.weight") and tensor.dim() else tensor

    checkpoint.load_weights(run.model, cropped(found.weights()))
    checkpoint.load_slots(run.optimizer, run.model, cropped(found.slots()))
    if name := run.runtime.not_finite(run.model, run.optimizer):
        raise found.not_finite(name)
    if state["scaler"]:  # empty unless that run was in float16
        run.runtime.scaler.load_state_dict(state["scaler"])
    try:
        run.state, run.owed = State.of(state), set(state.get("owed", ()))
    except (TypeError, ValueError) as error:
        raise UserError(f"{found.path} is damaged: {error}; start afresh with --init_from=scratch") from None
    run.id, run.begun = former.id, run.state.step
    run.started -= run.state.seconds
    lines.append(f"resuming {found.path if isinstance(found, PtFile) else run.out_dir} at step {run.begun}")
    if run.begun and not run.optimizer.state:
        lines.append("the checkpoint has no optimizer state: Adam's moments start from zero")
    if (before := state.get("row", found.config().block_size)) != row:
        lines.append(
            f"a row had {before} tokens: the data goes on at the same token, and the best evaluation is looked for anew"
        )
        run.state.rows = run.state.rows * before // row
        run.state.best, run.state.evaluations_without_improvement = None, 0
    why = run.runtime.differences(state["resolved"])
    if state["data"] is None:
        lines.append("the data goes on in this program's order: what the other has read is not known")
    elif state["data"] != run.tokens.fingerprint():
        why.append(f"the data in {run.tokens.name} changed")
    if why:
        lines.append(f"exact to rounding only: {'; '.join(why)}")


def _take_folder(run: Run, number: int, former: _Former | None) -> list[str]:
    """Makes the run's folder its own: a new run moves an earlier one aside, a resumed one rewinds its metrics.

    Returns what is to be said of it.
    """
    out_dir, lines = run.out_dir, []
    try:
        if former and not run.state.best:
            (out_dir / run_folder.BEST).unlink(missing_ok=True)
        if former:
            imported = former.found.state["data"] is None  # and has measured nothing here
            interval = 0 if imported else former.found.asked.get("log_interval", 1)
            lines = rewind(out_dir / METRICS, run.begun, run.owed, interval)
        else:
            lines = [*filter(None, [ownership.move_aside(out_dir, bool(run.config.logging.log_txt))])]
        run_folder.keep_asked(out_dir, run.id, flat(run.config))
        processes.remember(number, run.id)
    except OSError as error:
        raise _unwritable(out_dir, error) from None
    return lines


def _introduce(run: Run, lines: list[str]) -> None:
    """What was chosen, for the reader and for the record."""
    say, config, resolved = run.log.say, run.config, run.runtime.resolved
    say(f"tokens per iteration will be: {run.tokens_per_step:,}")
    for line in lines:
        say(line)
    say(f"number of parameters: {run.model.get_num_params() / 1e6:.2f}M")
    say(
        f"device {run.runtime.device}, dtype {resolved['dtype']}, compile {resolved['compile']}, float32 products "
        f"{resolved['matmul_precision']}, {counted(resolved['threads'], 'thread')}, "
        f"{counted(resolved['world'], 'process')}{'' if resolved['world'] == 1 else ', ' + resolved['parallel']}"
    )
    if not config.evaluation.eval_only:
        chosen = {"tokens_per_iteration": run.tokens_per_step, **resolved}
        run.log.write({"kind": "start", "step": run.begun, **chosen})
        o = config.logging
        run.log.follow(
            trackers.parse(o.track) + ("wandb",) * o.wandb_log,
            run.out_dir,
            project=o.wandb_project,
            name=o.wandb_run_name,
            run_id=run.id,
            step=run.begun,
            config=flat(config),
        )
