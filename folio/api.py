"""The commands as functions: the same knobs by keyword, and what they find as what they return."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from folio.commands import eval as _eval
from folio.commands import prepare as _prepare
from folio.commands import sample as _sample
from folio.config.options import COMMAND_LINE, EITHER, TrainConfig, at_home, check, flat, override, read_file, typed
from folio.training.loop import fit
from folio.training.run import Run
from folio.training.start import running
from folio.training.stopping import EXIT

T = TypeVar("T")


def prepare(*text: str | os.PathLike[str], **knobs: Any) -> Path:
    """Turns text into token files, as ``folio prepare`` does; returns their folder.

    ``text`` is the name of a known data set (``"shakespeare_char"``), or files, folders and globs of text, JSON lines
    and parquet. A call that was killed goes on where it was; one whose files are there already does nothing.

    >>> folio.prepare("novels/", name="mycorpus", tokenizer="bytes")
    PosixPath('data/mycorpus')

    Raises:
        ValueError, FileNotFoundError: one line that names the file or knob, the value and the remedy.
    """
    return _prepare.run(_options(_prepare.Options(tuple(os.fspath(source) for source in text)), "prepare", knobs))


def train(*config: str | os.PathLike[str] | TrainConfig, **knobs: Any) -> Run:
    """Trains a model, as ``folio train`` does, and returns its run, which is over: ``model``, ``out_dir``, ``state``.

    ``config`` are presets (``"shakespeare_char"``), files, or a ``TrainConfig`` to begin with; knobs have the names
    that ``folio train --help`` lists. What comes later wins.

    >>> run = folio.train("shakespeare_char", out_dir="out", max_iters=200, device="cpu")
    >>> run.state.val_loss

    Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 end it after the step, with a checkpoint, and then the program;
    ``init_from="resume"`` goes on, to the same bits.

    Raises:
        ValueError, FileNotFoundError, OSError: one line that names the file or knob, the value and the remedy.
        FloatingPointError: the loss is not finite; the checkpoints stay.
    """
    with running(_options(TrainConfig(), "train", knobs, *config)) as run:
        fit(run)
    if run.stop == "SIGINT":
        raise KeyboardInterrupt
    if run.stop in EXIT:
        raise SystemExit(EXIT[run.stop])
    return run


def generate(start: str = "\n", **knobs: Any) -> list[str]:
    """Samples from a trained model, as ``folio sample`` does: their texts, with the prompt.

    Knobs say which model (``out_dir``, ``init_from="gpt2"``, ``checkpoint``), how many samples (``num_samples``) of how
    many tokens (``max_new_tokens``), and how they are drawn (``temperature``, ``top_k``, ``top_p``, ``seed``).

    >>> folio.generate("ROMEO:", out_dir="out", num_samples=2, max_new_tokens=100)

    Raises:
        ValueError, FileNotFoundError: one line that names the file or knob, the value and the remedy.
    """
    return _sample.texts(_options(_sample.Options(), "generate", {"start": start, **knobs}))


def evaluate(what: str = "loss", **knobs: Any) -> dict[str, Any]:
    """Measures a model, as ``folio eval`` does: ``what`` is ``"loss"``, ``"hellaswag"`` or ``"lm_eval"``.

    Of the loss it returns nats per token, perplexity, bits per byte, and of how much; of HellaSwag ``acc`` and
    ``acc_norm``; of the harness what it finds, by task.

    >>> folio.evaluate(out_dir="out", split="val")["loss"]

    Raises:
        ValueError, FileNotFoundError: one line that names the file or knob, the value and the remedy.
    """
    return _eval.run(_options(_eval.Options(), "evaluate", {"what": what, **knobs}))[0]


def _options(options: T, caller: str, given: Mapping[str, Any], *config: str | os.PathLike[str] | TrainConfig) -> T:
    """Files, then what was given by keyword, held to the types and bounds that the command line holds it to."""
    sources = dict(getattr(options, "sources", {}))
    names: dict[str, Any] = {}  # what a .py file finds assigned
    for item in config:
        if isinstance(item, TrainConfig):
            usual = flat(TrainConfig())
            named = dict.fromkeys((name for name, value in flat(item).items() if value != usual[name]), COMMAND_LINE)
            if item.data.total_batch_size:
                named.pop("gradient_accumulation_steps", None)  # which follows from it
            options, sources = item, named | item.sources  # type: ignore[assignment]
            names = flat(item)
        else:
            values = read_file(os.fspath(item), type(options), names=names)
            names |= values
            options = override(options, values)
            sources = _later(sources, values, os.fspath(item))
    plain = {name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in given.items()}
    options = override(options, {name: typed(caller, name, value, type(options)) for name, value in plain.items()})
    if hasattr(options, "sources"):
        options = replace(options, sources=_later(sources, given, COMMAND_LINE))  # type: ignore[type-var]
    options = at_home(options)
    check(options)
    return options


def _later(sources: Mapping[str, str], names: Collection[str], source: str) -> dict[str, str]:
    """Who set which knob, now that this source has set these; of two that exclude each other the later is left."""
    over = {*names, *(EITHER if EITHER.intersection(names) else ())}
    return {name: by for name, by in sources.items() if name not in over} | dict.fromkeys(names, source)
