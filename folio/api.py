"""The commands as functions: the same options, as keywords; results are returned."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from folio.commands import eval as _eval
from folio.commands import prepare as _prepare
from folio.commands import sample as _sample
from folio.config.compose import Layer, compose, keywords
from folio.config.files import read_file
from folio.config.options import TrainConfig
from folio.config.table import flat
from folio.config.values import COMMAND_LINE
from folio.training import session as _session
from folio.training.callbacks import Callback as Callback
from folio.training.run import Run as Run
from folio.training.signals import EXIT_CODES

T = TypeVar("T")


def prepare(*text: str | os.PathLike[str], **options: Any) -> Path:
    """Turns text into token files, as ``folio prepare`` does; returns their folder.

    ``text`` is the name of a known data set (``"shakespeare_char"``), or files, folders and globs of text, JSON lines
    and parquet. A call that was killed continues where it stopped; if the files are there already, it does nothing.

    >>> folio.prepare("novels/", name="mycorpus", tokenizer="bytes")
    PosixPath('data/mycorpus')

    Raises:
        ValueError, FileNotFoundError: one line that names the file or option, the value and the remedy.
    """
    return _prepare.run(_options(_prepare.Options(tuple(os.fspath(source) for source in text)), "prepare", options))


def build(
    *config: str | os.PathLike[str] | TrainConfig,
    callbacks: Sequence[Callback] = (),
    loss: Callable[..., Tensor] | None = None,
    **options: Any,
) -> Run:
    """Builds a run, and checks everything that it needs; ``fit`` trains it. Its folder stays as it is until then.

    ``config`` are presets (``"shakespeare_char"``), files, or a ``TrainConfig`` to start from; options have the names
    that ``folio train --help`` lists. Later ones win.

    >>> run = folio.build("shakespeare_char", out_dir="out", max_iters=200, device="cpu")
    >>> run.model.get_num_params()

    Under a launcher such as torchrun, use it as ``with folio.build(…) as run:``, which leaves the process group at the
    end.

    Raises:
        ValueError, FileNotFoundError, OSError: one line that names the file or option, the value and the remedy.
    """
    return _session.build(_options(TrainConfig(), "train", options, *config), callbacks, loss)


def fit(run: Run) -> str:
    """Trains a run until it is complete, or is stopped; returns the reason: ``"max_iters"``, ``"SIGINT"``, ….

    >>> run = folio.build("shakespeare_char", out_dir="out")
    >>> folio.fit(run)  # Ctrl-C, or the stop button of a notebook, stops it with a checkpoint
    >>> print(*run.generate("ROMEO:", num_samples=1))
    >>> folio.fit(run)  # continues, to the same bits as a run that was never stopped

    The run holds its folder only meanwhile. A call with a complete run returns at once.

    Raises:
        ValueError, OSError: one line that names the file or option, the value and the remedy.
        FloatingPointError: the loss is not finite; the checkpoints stay.
    """
    return _session.fit(run)


def train(
    *config: str | os.PathLike[str] | TrainConfig,
    callbacks: Sequence[Callback] = (),
    loss: Callable[..., Tensor] | None = None,
    **options: Any,
) -> Run:
    """Trains a model, as ``folio train`` does, and returns the run: ``model``, ``out_dir``, ``state``.

    The arguments are those of ``build``.

    >>> run = folio.train("shakespeare_char", out_dir="out", max_iters=200, device="cpu")
    >>> run.state.val_loss

    After Ctrl-C, SIGTERM, SIGHUP or SIGUSR1 the run finishes its micro step and saves a checkpoint; the program exits.
    ``init_from="resume"`` continues the run, to the same bits. In a notebook, or wherever Python waits for the next
    line, Ctrl-C ends this call only: the run is returned, ``run.stop`` is ``"SIGINT"``, and ``fit`` continues it.

    Raises:
        ValueError, FileNotFoundError, OSError: one line that names the file or option, the value and the remedy.
        FloatingPointError: the loss is not finite; the checkpoints stay.
    """
    interactive = hasattr(sys, "ps1")
    with build(*config, callbacks=callbacks, loss=loss, **options) as run:
        _session.fit(run, *[""] * (not interactive))
    if run.stop == "SIGINT" and not interactive:
        raise KeyboardInterrupt
    if run.stop in EXIT_CODES and run.stop != "SIGINT":
        raise SystemExit(EXIT_CODES[run.stop])
    return run


def generate(start: str = "\n", **options: Any) -> list[str]:
    """Generates texts, as ``folio sample`` does; each begins with the prompt.

    Options choose the model (``out_dir``, ``init_from="gpt2"``, ``checkpoint``), the number of samples
    (``num_samples``) and of their tokens (``max_new_tokens``), and how tokens are drawn (``temperature``, ``top_k``,
    ``top_p``, ``seed``).

    >>> folio.generate("ROMEO:", out_dir="out", num_samples=2, max_new_tokens=100)

    Raises:
        ValueError, FileNotFoundError: one line that names the file or option, the value and the remedy.
    """
    return _sample.texts(_options(_sample.Options(), "generate", {"start": start, **options}))


def evaluate(what: str = "loss", **options: Any) -> dict[str, Any]:
    """Measures a model, as ``folio eval`` does: ``what`` is ``"loss"``, ``"hellaswag"`` or ``"lm_eval"``.

    The result has, for the loss: nats per token, perplexity, bits per byte, and the number of tokens and bytes; for
    HellaSwag: ``acc`` and ``acc_norm``; for lm_eval, the lm-evaluation-harness: its metrics by task.

    >>> folio.evaluate(out_dir="out", split="val")["loss"]

    Raises:
        ValueError, FileNotFoundError: one line that names the file or option, the value and the remedy.
    """
    return _eval.run(_options(_eval.Options(), "evaluate", {"what": what, **options}))[0]


def _options(base: T, caller: str, given: Mapping[str, Any], *config: str | os.PathLike[str] | TrainConfig) -> T:
    """The options in ``base``, then those of files, then the keywords, typed and checked as on the command line."""
    layers: list[Layer] = []
    names: dict[str, Any] = {}  # assigned before a .py file is read
    for item in config:
        if isinstance(item, TrainConfig):
            base, layers, names = _with_sources(item), [], flat(item)  # type: ignore[assignment]
        else:
            values = read_file(os.fspath(item), type(base), names=names)
            names |= values
            layers.append(Layer(os.fspath(item), values, supersedes=True))
    values = keywords(caller, type(base), given)
    return compose(base, [*layers, Layer(COMMAND_LINE, values, supersedes=True)])


def _with_sources(config: TrainConfig) -> TrainConfig:
    """The config, with each value that differs from its default marked as given in this call."""
    usual = flat(TrainConfig())
    given = dict.fromkeys((name for name, value in flat(config).items() if value != usual[name]), COMMAND_LINE)
    if config.data.total_batch_size:
        given.pop("gradient_accumulation_steps", None)  # it is computed from total_batch_size
    return replace(config, sources=given | config.sources)
