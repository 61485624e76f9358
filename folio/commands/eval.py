"""folio eval: the loss of a model, its HellaSwag accuracy, tasks of the lm-evaluation-harness."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from folio.config.declare import EACH, HellaSwagStyle, hellaswag_data_option, hellaswag_style_option, option
from folio.config.options import Data, Processes, Source, System
from folio.config.table import options_with, table
from folio.data.token_files import Split
from folio.errors import UserError
from folio.records.console import best_effort, show

if TYPE_CHECKING:
    from folio.checkpoints.checkpoint import Checkpoint
    from folio.data.rows import Tokens
    from folio.machine.runtime import Runtime


_UNUSED = ("gradient_accumulation_steps", "total_batch_size")


@dataclass(frozen=True)
class Options:
    """Measure a model: folio eval [loss | hellaswag | lm_eval] [--option=value …]."""

    what: Literal["loss", "hellaswag", "lm_eval"] = option(
        "loss",
        "what to measure: loss | hellaswag | lm_eval",
        details="loss: over a split of the run's data, or of other data; lm_eval: tasks of the lm-evaluation-harness",
        positional="WHAT",
    )
    split: Split = option("val", "split of the data", of=("loss",))
    eval_iters: int = option(
        0, "evenly spaced over the split; 0: every token once", unit="batches", min=0, of=("loss",)
    )
    style: HellaSwagStyle = hellaswag_style_option(of=("hellaswag",))
    data: str = hellaswag_data_option(of=("hellaswag",))
    tasks: str = option(
        "hellaswag,lambada_openai,arc_easy",
        "names or files of tasks",
        path=EACH,
        of=("lm_eval",),
    )
    limit: int = option(0, "to measure, from the first; 0: all", unit="items", min=0, of=("hellaswag", "lm_eval"))
    source: Source = field(default_factory=Source)
    tokens: Data = field(default_factory=Data, metadata={"of": ("loss",), "inherited": "the run's", "unused": _UNUSED})
    system: System = field(default_factory=System, metadata={"unused": ("autotune",)})
    processes: Processes = field(default_factory=Processes)
    sources: dict[str, str] = field(default_factory=dict)  # option → what set it


def main(options: Options) -> None:
    show(run(options)[1])


def run(options: Options) -> tuple[dict[str, Any], str]:
    """The result, and the lines that report it. The result of a run is also added to its ``evaluations.jsonl``."""
    from folio.checkpoints import find
    from folio.machine import shortage
    from folio.machine.choices import resolve
    from folio.machine.runtime import Runtime
    from folio.records.evaluations import append

    o = options
    known = table(Options)
    for name in o.sources:
        if o.what not in (of := known[name].metadata.get("of", (o.what,))):
            raise UserError(f"--{name} is for folio eval {' and '.join(of)}, not for {o.what}")
    chosen = find.from_source(o.source)
    runtime = Runtime(resolve(o.system, o.processes))
    try:
        with shortage.explained("measuring", lambda: _memory_advice(o, chosen, runtime)):
            found, line = {"loss": _loss, "hellaswag": _hellaswag, "lm_eval": _lm_eval}[o.what](o, chosen, runtime)
        if o.source.init_from == "resume":
            kind = "eval" if o.what == "loss" else o.what
            record = {"kind": kind, "step": chosen.step, **found, **({"weights": "ema"} if chosen.averaged else {})}
            runtime.broadcast(lambda: append(Path(o.source.out_dir), record))
        step, which = f", step {chosen.step}" if chosen.step else "", ", averaged weights" if chosen.averaged else ""
        return found, f"{chosen.path}{step}{which}\n{line}"
    except FloatingPointError as error:
        raise FloatingPointError(f"{chosen.path}: {error}{runtime.overflow_remedy()}") from None
    finally:
        runtime.close()


def _memory_advice(o: Options, chosen: Checkpoint, runtime: Runtime) -> str:
    from folio.machine import shortage

    weights = 4 * sum(shape.numel() for shape in chosen.parameters().values())
    remedy = "lower --batch_size" if o.what == "loss" else "set --device to one with more memory"
    return (
        f"the weights take {weights / 1e9:,.2f} of the {shortage.room(runtime.device) / 1e9:,.2f} GB on "
        f"{runtime.device}: {remedy}"
    )


def _loss(o: Options, chosen: Checkpoint, runtime: Runtime) -> tuple[dict[str, Any], str]:
    """Nats per token, and bits per byte of text, which do not depend on the tokenizer."""
    from folio.evaluation.loss import measure

    model = chosen.model(dropout=0.0)
    data, tokens, tokenizer = _tokens(o, chosen, model.config.block_size, model.transformer.wte.num_embeddings)
    windows = o.eval_iters * data.batch_size
    loss = runtime.wrap(model, None)
    found = measure(model, loss, tokens, o.split, windows, data.batch_size, runtime, tokenizer)
    counted, size = found["tokens"], found["bytes"]
    text = (
        f"{found['bits_per_byte']:.4f} bits per byte: {counted:,} tokens, {size:,} bytes of {tokens.name}"
        if size
        else f"no bits per byte, since the tokenizer or the text is unknown: {counted:,} tokens of {tokens.name}"
    )
    line = f"{o.split} loss {found['loss']:.4f} nats per token, perplexity {found['perplexity']:.4g}, {text}"
    return found, "\n".join([*(folder.note for folder in tokens.folders if folder.note), line])


def _tokens(
    o: Options, chosen: Checkpoint, block_size: int, vocab_size: int
) -> tuple[Data, Tokens, dict[str, Any] | None]:
    """The run's data, or the data that was named: its options, its tokens, and its tokenizer as JSON.

    Raises:
        UserError: the token ids are not those of the model.
    """
    from folio.data.rows import Tokens

    named, places = set(o.sources), options_with(Options, role="data")
    if places & named:
        named |= places | {"token_dtype"}  # the run's token_dtype holds for the run's own data only
    kept = {f.name: chosen.asked[f.name] for f in fields(Data) if f.name in chosen.asked and f.name not in named}
    data = replace(o.tokens, **kept)
    tokens = replace(Tokens.open(data, block_size, o.system.seed), vocab_size=vocab_size)
    tokenizer, why = tokens.tokenizer_for(chosen.tokenizer_spec)
    if (known := tokens.known_vocab_size or 0) > vocab_size:
        why = f"the data has {known:,} ids, the model {vocab_size:,}"
    if why:
        raise UserError(
            f"{tokens.name}: its token ids are not those of the model of {chosen.path} ({why}): "
            "set --data_dir to tokens of the model's tokenizer"
        )
    return data, tokens.with_documents(data.eot)[0] if data.document_mask else tokens, tokenizer


def _hellaswag(o: Options, chosen: Checkpoint, runtime: Runtime) -> tuple[dict[str, Any], str]:
    from rich.console import Console
    from rich.progress import track

    from folio.evaluation import hellaswag
    from folio.records.log import hellaswag_line

    questions = hellaswag.load(o.data, o.style, o.limit, chosen.tokenizer(), chosen.config(), runtime)
    model = chosen.model(dropout=0.0)
    runtime.wrap(model, None)
    console = Console(file=best_effort(sys.stdout))
    watch = partial(track, description="HellaSwag", transient=True, console=console, disable=not console.is_terminal)
    found = hellaswag.evaluate(model, questions, runtime, track=watch)
    return found, "\n".join(filter(None, [questions.note, hellaswag_line(found)]))


def _lm_eval(o: Options, chosen: Checkpoint, runtime: Runtime) -> tuple[dict[str, Any], str]:
    from folio.evaluation import harness

    tokenizer, model = chosen.tokenizer(), chosen.model(dropout=0.0)
    runtime.wrap(model, None)
    results = harness.evaluate(model, tokenizer, o.tasks.split(","), runtime, o.limit)
    lines = [
        f"{task}: " + ", ".join(f"{metric} {value:.4f}" for metric, value in metrics.items())
        for task, metrics in results.items()
    ]
    return {"tasks": results, "limit": o.limit}, "\n".join(lines)
