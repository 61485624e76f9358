"""From a config to a run."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from folio import rng
from folio.checkpoints import checkpoint, find
from folio.checkpoints.pt_files import PtFile
from folio.checkpoints.state import State
from folio.config import depth
from folio.config.compose import accumulated, check, with_depth
from folio.config.options import TrainConfig
from folio.config.table import flat, options_with, override
from folio.config.values import COMMAND_LINE
from folio.data.rows import Tokens, longest_row
from folio.data.token_files import GPT2
from folio.errors import UserError
from folio.locks import Lock
from folio.machine import autotune, launch, shortage
from folio.machine.choices import resolve
from folio.machine.flops import flops_per_token
from folio.machine.guard import Guard
from folio.machine.runtime import Runtime
from folio.machine.wrap import Loss
from folio.model.config import PADDED_GPT2, GPTConfig
from folio.model.gpt import GPT
from folio.records import run_folder, trackers
from folio.records.log import Log, counted
from folio.training import forecast, optimizers, ownership
from folio.training.batches import micro_batches
from folio.training.memory_advice import advise_on_memory, check_size, least_memory
from folio.training.objective import UserLoss, require_same
from folio.training.ownership import unwritable
from folio.training.resume import find_former_run, overlay, restore, shape_of, take_folder
from folio.training.run import FormerRun, Run, Work, finish
from folio.training.schedule import unreached
from folio.training.start_record import start_facts
from folio.training.work import save_checkpoint, scheduled_work

T = TypeVar("T")


@contextmanager
def running(config: TrainConfig) -> Iterator[Run]:
    """A run, built from a config and finished on every path; raises what ``build`` raises."""
    run = build(config)
    try:
        yield run
    except BaseException:
        run.stop = ""  # its last line would say that it can be resumed there
        raise
    finally:
        finish(run)


def build(config: TrainConfig) -> Run:
    """Builds a run that has its folder.

    Raises:
        UserError, FileNotFoundError, OSError: one line that names the option or file and the remedy.
    """
    run = assemble(config)
    try:
        begin(run)
        follow(run)
    except BaseException:
        run.runtime.close()
        if run.lock:
            run.lock.release()
        raise
    return run


def assemble(config: TrainConfig, callbacks: Sequence[Work] = (), own: UserLoss | None = None) -> Run:
    """Builds and checks everything that a run needs; its folder only gets a lock. ``begin`` makes the folder its own.

    Raises:
        UserError, FileNotFoundError, OSError: as ``build``.
    """
    check(config)
    trackers.parse(config.logging.track)
    read_only = config.evaluation.eval_only
    lock = None if read_only else hold(config)
    try:
        return _assemble(config, callbacks, own, lock, read_only)
    except BaseException:
        if lock:
            lock.release()
        raise


def hold(config: TrainConfig) -> Lock | None:
    """Locks the folder, on rank 0 for all ranks; None on other ranks, and if there is nothing to resume."""
    out_dir = Path(config.output.out_dir)
    nothing_there = config.output.init_from == "resume" and not out_dir.is_dir()
    if nothing_there or launch.read_ranks()[0] > 0:
        return None
    try:
        return run_folder.hold(out_dir)
    except OSError as error:
        raise unwritable(out_dir, error) from None


def _assemble(
    config: TrainConfig, callbacks: Sequence[Work], own: UserLoss | None, lock: Lock | None, read_only: bool
) -> Run:
    former = _former_run(config, lock)
    begin = config.output.init_from
    notes: list[str] = []
    objective = own.name if own else ""
    if former:
        config, notes = overlay(config, former)
        if not read_only:
            require_same(former.found.state.get("objective", ""), objective, Path(config.output.out_dir))
    check(config, merged=True)
    source = find.by_name(begin) if not former and begin not in ("scratch", "resume", "auto") else None
    given = former.found if former else source
    shape = config.model
    if given:
        shape, more = shape_of(given.config(), config, former)
        notes += more
    if config.depth and not former:
        config, tokens, more = _sized_by_depth(config)
        notes += more
        shape = config.model
    else:
        tokens = Tokens.open(config.data, shape.block_size, config.system.seed)
    theirs = former.found.asked if former else {}
    mine = {name: by for name, by in config.sources.items() if by == COMMAND_LINE or name not in theirs}
    config = replace(config, data=accumulated(config.data, tokens.block_size, mine))
    shape, tokens, spec, more = _fit_to_data(shape, config, tokens, given, former)
    notes += more
    model, more = _make_model(shape, config, source, former)
    notes += more
    runtime, more = _make_runtime(config, model, tokens, former)
    notes += more
    if not given:
        notes += forecast.advise_on_size(config, model, tokens, runtime)
        notes += unreached(config.optimizer, config.sources) if not read_only else []
    if config.data.gradient_accumulation_steps % runtime.world == 0:
        tokens = replace(tokens, world=runtime.world)
    try:
        _check_agreement(config, tokens, runtime, former, objective)
        loss, more = _wrap(config, model, tokens, runtime, own)
        notes += more
        optimizer = optimizers.optimizer(config.optimizer, model, runtime.dtype)
        skips, max_z = config.optimizer.on_nonfinite == "skip", config.optimizer.max_loss_z
        runtime.guard = Guard(runtime.device, runtime.scaler.is_enabled(), skips, max_z)
        if not config.logging.profile:  # which shows single operations
            runtime.use_graphs(optimizer)
        optimizers.check_first_update(optimizer)
        log = Log(runtime.rank == 0, config.optimizer.max_iters, config.logging.monitor)
        run_id = former.id if former else secrets.token_hex(6)
        run = Run(config, run_id, model, loss, optimizer, tokens, spec, runtime, log, State(), lock, read_only, former)
        run.objective = objective
        if former:
            notes += restore(run, former)
        if minutes := config.optimizer.max_minutes:
            run.clock.limit(minutes)
        run.work, more = scheduled_work(run, callbacks)
        run.notes = notes + more
    except BaseException:
        runtime.close()
        with shortage.explained("building the run", partial(advise_on_memory, config, shape, runtime)):
            raise
    return run


def _former_run(config: TrainConfig, lock: Lock | None) -> FormerRun | None:
    """The run in the folder that this run resumes; checks that the folder's files may be replaced.

    A job that its launcher restarted resumes the run that it had begun, whatever ``init_from`` says.
    """
    out_dir, begin = Path(config.output.out_dir), config.output.init_from
    known = launch.begin_run()
    if lock:
        resuming = known is not None or begin in ("resume", "auto")
        ownership.refuse_foreign(out_dir, bool(config.logging.log_txt), resuming)
    former = find_former_run(out_dir, "auto", known) if known is not None else None
    return former or find_former_run(out_dir, begin)


def _sized_by_depth(config: TrainConfig) -> tuple[TrainConfig, Tokens, list[str]]:
    """The config with the options that depth sets for its data, the data, and notes."""
    config, notes = fit_context(config)
    tokens = Tokens.open(config.data, config.model.block_size, config.system.seed)
    config, found = with_depth(config, vocab_size_of(tokens)[0], tokens.length("train"))
    notes.append(depth.summary(config.depth, found, flat(config)))
    return config, replace(tokens, batch_size=config.data.batch_size), notes


def _fit_to_data(
    shape: GPTConfig, config: TrainConfig, tokens: Tokens, given: checkpoint.Checkpoint | None, former: FormerRun | None
) -> tuple[GPTConfig, Tokens, dict[str, Any] | None, list[str]]:
    """The shape and the data with the vocabulary's size, the tokenizer as JSON, and notes about the data.

    Raises:
        UserError: the data has token ids that the model lacks, or whose meaning differs.
    """
    notes = [folder.note for folder in tokens.folders if folder.note]
    vocab_size = shape.vocab_size
    if vocab_size == "auto":
        vocab_size, note = vocab_size_of(tokens)
        notes.append(note)
    tokens = replace(tokens, vocab_size=vocab_size)
    spec, more = _tokenizer_of(tokens, given, former is not None)
    notes += more
    known = tokens.known_vocab_size
    if known and vocab_size < known:
        remedy = (
            "give --data_dir the data that the run was trained on" if former else "set --vocab_size to that or more"
        )
        raise UserError(f"vocab_size={vocab_size} is below the {known} token ids of {tokens.name}: {remedy}")
    if config.data.document_mask:
        tokens, separated = tokens.with_documents(config.data.eot)
        notes.append(f"attention stays within documents: {separated}")
    return replace(shape, vocab_size=vocab_size), tokens, spec, notes


def _make_model(
    shape: GPTConfig, config: TrainConfig, source: checkpoint.Checkpoint | None, former: FormerRun | None
) -> tuple[GPT, list[str]]:
    """A model with the weights of ``source``, new ones, or empty ones if ``former``'s will be restored; and notes."""
    check_size(shape)
    with shortage.explained("building the model", partial(least_memory, shape)):
        if not source:
            return GPT.empty(shape) if former else GPT(shape, partial(rng.generator, config.system.seed)), []
        model = source.model(shape.dropout)
        model.crop_block_size(shape.block_size)
        model.grow_vocab_size(int(shape.vocab_size))
        return model, [f"weights of {source.path}" + (f", step {source.step}" if source.step else "")]


def _make_runtime(
    config: TrainConfig, model: GPT, tokens: Tokens, former: FormerRun | None
) -> tuple[Runtime, list[str]]:
    """The runtime of this process, and a note if it was tuned to this machine, as the choices of a new run are."""
    tokens_per_step = config.data.gradient_accumulation_steps * config.data.batch_size * tokens.block_size
    flops = flops_per_token(model, tokens.block_size) * float(tokens_per_step) * config.optimizer.max_iters
    resolved = former.found.state["resolved"] if former else None
    documents = config.data.document_mask
    choices = resolve(config.system, config.processes, flops=flops, documents=documents, before=resolved)
    notes: list[str] = []
    if config.system.autotune and not (former or documents or config.evaluation.eval_only):
        choices, notes = autotune.tuned(choices, model.config, config.data.batch_size, tokens.block_size, flops)
    return Runtime(choices), notes


def _check_agreement(
    config: TrainConfig, tokens: Tokens, runtime: Runtime, former: FormerRun | None, objective: str
) -> None:
    """Raises UserError, on every rank, unless all ranks have the same options, data, checkpoint and loss."""
    runtime.require_equal(
        {name: value for name, value in flat(config).items() if name not in options_with(TrainConfig, local=True)}
        | {"the vocabulary": tokens.vocab_size, "the data": tokens.fingerprint()}
        | {"the newest checkpoint": former.found.step if former else None, "loss": objective}
        | {name: runtime.resolved[name] for name in ("device", "dtype", "compile")}
    )


def _wrap(
    config: TrainConfig, model: GPT, tokens: Tokens, runtime: Runtime, own: UserLoss | None
) -> tuple[Loss, list[str]]:
    """The model's loss on this machine, and notes if it is the user's ``own``, or the number of processes matters."""
    notes = []
    largest = max(rows for _, rows, _ in micro_batches(config.data, runtime.rank, runtime.world))
    if tokens.world != runtime.world:
        notes.append(
            f"{runtime.world} processes do not divide the micro steps: dropout masks are not those of one process"
        )
    batch = largest, tokens.block_size
    if own:
        notes.append(f"loss: {own.name}; evaluations stay cross entropy, in nats per token")
        own.check(model.config, batch, runtime)
    return runtime.wrap(model, batch, own), notes


def begin(run: Run) -> None:
    """Makes the folder the run's own and opens its records, so that the run may write; then shows how it begins."""
    if not run.read_only:
        run.notes += run.runtime.broadcast(lambda: take_folder(run, run.former))
        open_files(run)
        if run.former and isinstance(run.former.found, PtFile):
            save_checkpoint(run)  # so that the run resumes from a checkpoint of this program, not from a foreign file
            run.runtime.wait_for_write()
    run.began = True
    _report_start(run)


def open_files(run: Run) -> None:
    """Opens the run's records, to which it appends."""
    o = run.config.optimizer
    run.log.open(run.out_dir, run.config.logging.log_txt, o.restart_interval or o.max_iters or 1)


def follow(run: Run) -> None:
    """Starts the trackers of the run, which continue at its step."""
    if run.read_only:
        return
    o = run.config.logging
    run.log.follow(
        trackers.parse(o.track) + ("wandb",) * o.wandb_log,
        run.out_dir,
        project=o.wandb_project,
        name=o.wandb_run_name,
        run_id=run.id,
        step=run.state.step,
        config=flat(run.config),
    )


def fit_context(config: T) -> tuple[T, list[str]]:
    """The config with a smaller ``block_size`` if a split of the data is shorter than a row; and a note.

    Only with ``depth``, and unless the command line or ``window`` sets the row. Raises as ``Tokens.open``.
    """
    c: Any = config
    if not c.depth or c.data.window or c.sources.get("block_size") == COMMAND_LINE:
        return config, []
    longest = longest_row(c.data)
    if c.model.block_size <= longest:
        return config, []
    fitting = 1 << longest.bit_length() - 1
    return override(config, {"block_size": fitting}), [
        f"block_size = {fitting}, not {c.model.block_size}: a split of the data has only {longest + 1} tokens"
    ]


def vocab_size_of(tokens: Tokens) -> tuple[int, str]:
    """The value of ``vocab_size=auto`` for this data, and a note about it."""
    found = tokens.known_vocab_size
    if found is None or tokens.tokenizer() == GPT2:
        return PADDED_GPT2, f"vocab_size = {PADDED_GPT2} (GPT-2's 50257 rounded up for speed)"
    return found, f"found vocab_size = {found} (inside {tokens.name})"


def _tokenizer_of(
    tokens: Tokens, model: checkpoint.Checkpoint | None, resumed: bool
) -> tuple[dict[str, Any] | None, list[str]]:
    """The tokenizer of the run, as JSON, which its checkpoints keep; and notes.

    Raises:
        UserError: the token ids of the data and of the run that is resumed have different meanings.
    """
    notes = []
    spec, why = tokens.tokenizer_for(model.tokenizer_spec if model else None)
    if model and model.tokenizer_spec is None and not resumed:
        notes.append(
            f"nothing says what the token ids of {model.path} mean: make sure that {tokens.name} has the same tokenizer"
        )
    if why and model:
        line = f"the token ids of {tokens.name} mean something else to the model of {model.path}: they are {why}"
        if resumed:
            raise UserError(
                f"{line}: give --data_dir the data that the run was trained on, or start afresh with "
                "--init_from=scratch"
            )
        notes.append(
            f"warning: {line}. The learned embeddings do not fit them; to use these, prepare the data "
            "with the model's tokenizer, which folio export writes as tokenizer.json"
        )
    return spec, notes


def _report_start(run: Run) -> None:
    """Shows the user the notes and choices, then records the choices."""
    say, resolved = run.log.say, run.runtime.resolved
    say(f"tokens per iteration will be: {run.tokens_per_step:,}")
    for note in run.notes:
        say(note)
    say(f"number of parameters: {run.model.get_num_params() / 1e6:.2f}M")
    say(
        f"device {run.runtime.device}, dtype {resolved['dtype']}, compile {resolved['compile']}, "
        f"float32 matmul precision {resolved['matmul_precision']}, {counted(resolved['threads'], 'thread')}, "
        f"{counted(resolved['world'], 'process')}{'' if resolved['world'] == 1 else ', ' + resolved['parallel']}"
    )
    for line in forecast.outlook(run):
        say(line)
    if not run.read_only and run.log.main:
        chosen = {"tokens_per_iteration": run.tokens_per_step, **resolved}
        run.log.write({"kind": "start", "step": run.begun, **start_facts(run), **chosen})
