"""The commands as functions: the same options, as keywords; results are returned."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from folio.checkpoints import find as _find
from folio.commands import eval as _eval
from folio.commands import plot as _plot
from folio.commands import prepare as _prepare
from folio.commands import report as _report
from folio.commands import sample as _sample
from folio.config.compose import Layer, compose, keywords, typed
from folio.config.declare import Weights
from folio.config.files import read_file
from folio.config.options import Source, System, TrainConfig
from folio.config.table import flat
from folio.config.values import COMMAND_LINE
from folio.data.tokenizers import Tokenizer as Tokenizer
from folio.errors import UserError
from folio.files import read_bytes as _read_bytes
from folio.files import read_text as _read_text
from folio.machine.choices import resolve
from folio.model.gpt import GPT
from folio.training import session as _session
from folio.training.callbacks import Callback as Callback
from folio.training.run import Run as Run
from folio.training.signals import EXIT_CODES

T = TypeVar("T")


def prepare(*text: str | os.PathLike[str], texts: Iterable[str] | None = None, **options: Any) -> Path:
    """Turns text into token files, as ``folio prepare`` does; returns their folder.

    ``text`` is the name of a known data set (``"shakespeare_char"``), or files, folders and globs of text, JSON lines
    and parquet. A call that was killed continues where it stopped; if the files are there already, it does nothing.

    >>> folio.prepare("novels/", name="mycorpus", tokenizer="bytes")
    PosixPath('data/mycorpus')

    ``texts`` gives the documents themselves: a list, or another iterable of ``str``, which is read as a stream, so that
    it need not fit in memory.

    >>> folio.prepare(texts=(row["body"] for row in rows), name="mycorpus")
    PosixPath('data/mycorpus')

    With a list, a call that was killed continues, and a repeated one does nothing. An iterable can be read only once:
    a call that fails or is killed leaves nothing that counts, and the next one begins again.

    Raises:
        ValueError, FileNotFoundError: one line that names the file or option, the value and the remedy.
    """
    named = _prepare.Options(tuple(map(_path, text)))
    return _prepare.run(_options(named, "prepare", options), texts)


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
    if not isinstance(run, Run):
        raise UserError(f"{run!r:.80} is no run: folio.build makes one")
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


class Loaded(NamedTuple):
    """A model in evaluation mode, and its tokenizer."""

    model: GPT
    tokenizer: Tokenizer


def load(
    name: str | os.PathLike[str],
    *,
    checkpoint: str | int = "best",
    device: str = "auto",
    weights: Weights = "trained",
) -> Loaded:
    """A trained model and its tokenizer, to use in a program.

    ``name`` is an out_dir, or what ``init_from`` takes: ``"gpt2"``, a Hugging Face folder or name, a ``.pt`` file.
    ``checkpoint`` is ``"best"``, ``"latest"`` or a step of an out_dir; ``weights="ema"`` are the moving averages.

    >>> model, tokenizer = folio.load("out")
    >>> idx = torch.tensor([tokenizer.encode("ROMEO:").tolist()])
    >>> print(tokenizer.decode(model.generate(idx, max_new_tokens=100)[0]))

    Raises:
        ValueError, FileNotFoundError: one line that names the file or option, the value and the remedy; also if
            nothing says what the token ids mean (``GPT.from_pretrained(name)`` loads such a model).
    """
    given = {"out_dir": name, "checkpoint": str(checkpoint), "weights": weights}
    source = typed("load", Source(), given)
    found = _find.by_name(source.out_dir, source.checkpoint).with_weights(source.weights)
    tokenizer = found.tokenizer()
    where = resolve(typed("load", System(), {"device": device})).device
    return Loaded(found.model(dropout=0.0).to(where).eval(), tokenizer)


@dataclass(frozen=True)
class Picture(os.PathLike[str]):
    """A picture in a file, which a notebook shows."""

    path: Path

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    def _repr_png_(self) -> tuple[bytes, dict[str, Any]] | None:
        return (_read_bytes(self.path), {"width": 700}) if self.path.suffix.lower() == ".png" else None

    def _repr_svg_(self) -> str | None:
        return _read_text(self.path) if self.path.suffix.lower() == ".svg" else None


def plot(*out_dirs: str | os.PathLike[str], output: str | os.PathLike[str] | None = None, **options: Any) -> Picture:
    """Draws the losses and other measurements of runs, as ``folio plot`` does; a notebook shows the result.

    >>> folio.plot("out-1", "out-2")

    The result has the ``path`` of the picture, and stands for it wherever a path is expected. ``output`` is a ``.png``,
    ``.svg`` or ``.pdf``; options are those that ``folio plot --help`` lists.

    Raises:
        ValueError, FileNotFoundError, OSError: one line that names the file or option, the value and the remedy.
    """
    base = _plot.Options(_names(out_dirs))
    return Picture(_plot.run(_options(base, "plot", {"output": output, **options})))


def report(*out_dirs: str | os.PathLike[str], output: str | os.PathLike[str] | None = None, **options: Any) -> Path:
    """Writes a page about one run or several, as ``folio report`` does, and returns its path.

    >>> folio.report("out", output="report.html")

    Options are those that ``folio report --help`` lists.

    Raises:
        ValueError, FileNotFoundError, OSError: one line that names the file or option, the value and the remedy.
    """
    base = _report.Options(_names(out_dirs))
    return _report.run(_options(base, "report", {"output": output, **options}))


def _names(out_dirs: Sequence[str | os.PathLike[str]]) -> tuple[str, ...]:
    return tuple(map(_path, out_dirs)) or ("out",)


def _path(value: str | os.PathLike[str]) -> str:
    try:
        return os.fspath(value)
    except TypeError:
        raise UserError(f"{value!r:.80}, of the type {type(value).__name__}, is no path") from None


def _options(base: T, caller: str, given: Mapping[str, Any], *config: str | os.PathLike[str] | TrainConfig) -> T:
    """The options in ``base``, then those of files, then the keywords, typed and checked as on the command line."""
    layers: list[Layer] = []
    names: dict[str, Any] = {}  # assigned before a .py file is read
    for item in config:
        if isinstance(item, TrainConfig):
            base, layers, names = _with_sources(item), [], flat(item)  # type: ignore[assignment]
        else:
            values = read_file(path := _path(item), type(base), names=names)
            names |= values
            layers.append(Layer(path, values, supersedes=True))
    values = keywords(caller, type(base), given)
    return compose(base, [*layers, Layer(COMMAND_LINE, values, supersedes=True)])


def _with_sources(config: TrainConfig) -> TrainConfig:
    """The config, with each value that differs from its default marked as given in this call."""
    usual = flat(TrainConfig())
    given = dict.fromkeys((name for name, value in flat(config).items() if value != usual[name]), COMMAND_LINE)
    if config.data.total_batch_size:
        given.pop("gradient_accumulation_steps", None)  # it is computed from total_batch_size
    return replace(config, sources=given | config.sources)
