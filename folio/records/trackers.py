"""Sends records to TensorBoard, Weights & Biases and trackio; the only module that imports them."""

from __future__ import annotations

import html
import json
import math
import os
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from folio.errors import UserError, first_line
from folio.records.record import Record, measured
from folio.records.run_folder import TENSORBOARD

_FIGURES = {  # field of a record → name in the trackers
    "train": {
        "loss": "batch/loss",
        "lr": "lr",
        "grad_norm": "grad_norm",
        "tokens": "tokens",
        "tokens_per_second": "tokens_per_second",
        "mfu": "mfu",
    },
    "eval": {"train_loss": "train/loss", "val_loss": "val/loss"},
    "hellaswag": {"acc": "hellaswag/acc", "acc_norm": "hellaswag/acc_norm"},
}
_NANOGPT = {"step": "iter", "lr": "lr", "mfu": "mfu"}  # nanoGPT sends these to W&B with an evaluation


class Identity(NamedTuple):
    """The run that is tracked. A tracker that knows ``run_id`` continues that run from ``step``.

    ``measured`` has the records of that step from before the run was resumed; they are not measured again.
    """

    out_dir: Path
    project: str
    name: str
    run_id: str
    step: int
    config: dict[str, Any]
    measured: Sequence[Record] = ()


class Receiver(Protocol):
    """Receives every record, and shows its numbers and texts over the steps. Any method may raise any exception."""

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


class Tracker(Receiver, Protocol):
    """A receiver for a run that ``--track`` names."""

    def __init__(self, run: Identity) -> None: ...


def figures(record: Record, more: Mapping[str, str] = {}) -> dict[str, float]:
    """The finite numbers of a record by their names in the trackers; ``mfu`` in percent, as in nanoGPT.

    Those of a kind that Folio does not know are named ``kind/field``.
    """
    names = {**_FIGURES.get(record["kind"], {}), **more}
    values = {name: record[field] * (100 if field == "mfu" else 1) for field, name in names.items()}
    return {name: value for name, value in values.items() if math.isfinite(value)} | measured(record)


class TensorBoard:
    """Event files in ``out_dir/tensorboard``."""

    def __init__(self, run: Identity) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = run.out_dir / TENSORBOARD
        _wait_for_an_unused_second(folder)
        # purge_step hides events of an earlier process from this step on
        self._writer: Any = SummaryWriter(str(folder), purge_step=run.step)
        self._writer.add_text("config", _verbatim(json.dumps(run.config, indent=1)), run.step)
        for record in run.measured:
            self.write(record)

    def write(self, record: Record) -> None:
        for name, value in figures(record).items():
            self._writer.add_scalar(name, value, record["step"])
        if record["kind"] == "sample":
            self._writer.add_text(f"sample/{record['number']}", _verbatim(record["text"]), record["step"])

    def close(self) -> None:
        self._writer.close()


def _wait_for_an_unused_second(folder: Path) -> None:
    """Waits while an event file of this second exists.

    TensorBoard reads event files in the order of their names: second, host, process, number. Of two files of one
    second it may read the newer first, whose ``purge_step`` would then hide all of the older.
    """
    while any(folder.glob(f"events.out.tfevents.{int(time.time()):010d}.*")):
        time.sleep(0.02)


class WandB:
    """Weights & Biases, under nanoGPT's names. Without a network at the end, ``wandb sync`` uploads the run later.

    W&B's own step never decreases, but a resumed run's does. So ``step`` is a column, and the x axis of all others.
    """

    def __init__(self, run: Identity) -> None:
        import wandb

        os.environ.setdefault("WANDB_INIT_TIMEOUT", "30")  # seconds to wait for the network
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", "300")  # no limit by default
        self._html: Any = wandb.Html
        self._run: Any = wandb.init(
            project=run.project, name=run.name or None, id=run.run_id, resume="allow", config=run.config
        )
        self._run.define_metric("*", step_metric="step")

    def write(self, record: Record) -> None:
        row: dict[str, Any] = figures(record, _NANOGPT if record["kind"] == "eval" else {})
        if record["kind"] == "sample":
            row[f"sample/{record['number']}"] = self._html(f"<pre>{html.escape(record['text'])}</pre>")
        if row:
            self._run.log({"step": record["step"], **row})

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """trackio. It chooses the ids of runs itself, so a run's name contains our id."""

    def __init__(self, run: Identity) -> None:
        import trackio

        self._trackio: Any = trackio
        name = f"{run.name}-{run.run_id}" if run.name else run.run_id
        trackio.init(project=run.project, name=name, resume="allow", config=run.config, embed=False)

    def write(self, record: Record) -> None:
        row: dict[str, Any] = figures(record)
        if record["kind"] == "sample":
            row[f"sample/{record['number']}"] = self._trackio.Markdown(_verbatim(record["text"]))
        if row:
            self._trackio.log(row, step=record["step"])

    def close(self) -> None:
        self._trackio.finish()


def _verbatim(text: str) -> str:
    """Markdown that shows the text unchanged."""
    return textwrap.indent(text, "    ", lambda line: True)


KNOWN: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio}


def parse(track: str) -> tuple[str, ...]:
    """The names in ``a,b``; imports nothing.

    Raises:
        ValueError: one is not known; names those that are.
    """
    names = tuple(filter(None, map(str.strip, track.split(","))))
    for name in names:
        if name not in KNOWN:
            raise UserError(f"track={track}: there is no tracker {name!r}: choose from {', '.join(KNOWN)}")
    return names


class Trackers:
    """The trackers of a run. One that fails is dropped with a warning and does not stop the run."""

    def __init__(self) -> None:
        self._open: dict[str, Receiver] = {}

    def open(self, names: Sequence[str], run: Identity) -> None:
        for name in dict.fromkeys(names):
            self.add(name, partial(KNOWN[name], run))

    def add(self, name: str, make: Callable[[], Receiver]) -> None:
        with self._dropping(name):
            self._open[name] = make()

    def write(self, record: Record) -> None:
        for name, tracker in [*self._open.items()]:
            with self._dropping(name):
                tracker.write(record)

    def close(self) -> None:
        while self._open:
            name, tracker = self._open.popitem()
            with self._dropping(name):
                tracker.close()

    @contextmanager
    def _dropping(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._open.pop(name, None)
            remedy = f" (pip install {error.name or name})" if isinstance(error, ImportError) else ""
            warnings.warn(f"{name}: {first_line(error)}: training continues without it{remedy}", stacklevel=2)
