"""From a config to a run."""

from __future__ import annotations

import itertools
import os
import secrets
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from folio import files, rng
from folio.checkpoints import checkpoint, hugging_face
from folio.checkpoints.checkpoint import State
from folio.checkpoints.pt_files import PtFile
from folio.config.options import COMMAND_LINE, TrainConfig, accumulated, check, flat
from folio.data.rows import Tokens
from folio.data.token_files import GPT2
from folio.errors import UserError
from folio.machine import processes, shortage
from folio.machine.flops import flops_per_token
from folio.machine.runtime import Runtime
from folio.model.gpt import GPT
from folio.records import run_folder, trackers
from folio.records.log import Log, counted
from folio.training import ownership
from folio.training.batches import micro_batches
from folio.training.memory_advice import check_size, least, what_fits
from folio.training.optimizers import adamw
from folio.training.ownership import unwritable
from folio.training.resume import find_former, overlay, restore, shape_of, take_folder
from folio.training.run import Run
from folio.training.work import check_due, check_replicas, checkpoint_due, measurements, profiling, save

_OWN = (  # knobs of a machine or a moment
    "out_dir",
    "init_from",
    "data_dir",
    "dataset",
    "data_mixture",
    "hellaswag_data",
    "wandb_run_name",
)
_NUMBERS = itertools.count()  # of the runs that this process builds


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
        raise unwritable(out_dir, error) from None


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


def _build(config: TrainConfig, lock: files.Lock | None) -> Run:
    lines: list[str] = []
    out_dir, begin = Path(config.output.out_dir), config.output.init_from
    number = next(_NUMBERS)
    again = processes.former_run(number)  # whatever init_from says: this job has begun already
    if lock:
        going_on = again is not None or begin in ("resume", "auto")
        ownership.refuse_foreign(out_dir, bool(config.logging.log_txt), going_on)
    former = (find_former(out_dir, "auto", again) if again is not None else None) or find_former(out_dir, begin)
    if former is not None:
        lines += former.lines
        config = overlay(config, former.found.asked, lines)
        check(config)
    source = hugging_face.find(begin) if not former and begin not in ("scratch", "resume", "auto") else None
    given = former.found.config() if former else source.config() if source else None
    shape = shape_of(given, config, former, lines) if given else config.model
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
    check_size(shape)
    with shortage.explained("building the model", partial(least, shape)):
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
            {name: value for name, value in flat(config).items() if name not in _OWN}
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
            restore(run, former, lines)
        if minutes := config.optimizer.max_minutes:
            run.until = time.perf_counter() + 60 * minutes
        run.work = [*measurements(run, lines), (check_due, check_replicas), (checkpoint_due, save)]
        if config.logging.profile and not config.evaluation.eval_only:
            ends, begins = profiling(run)
            run.work = [ends, *run.work, begins]
        if not config.evaluation.eval_only:
            lines += runtime.broadcast(lambda: take_folder(run, number, former))
            log.open(out_dir, config.logging.log_txt, o.restart_interval or o.max_iters or 1)
            if former and isinstance(former.found, PtFile):
                save(run)  # from here on the run is this program's
                runtime.written()
        _introduce(run, lines)
    except BaseException:
        runtime.close()
        with shortage.explained("building the run", partial(what_fits, config, shape, runtime)):
            raise
    return run


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
