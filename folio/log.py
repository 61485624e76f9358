"""What a run says: the console, ``metrics.jsonl``, and Weights & Biases. The only user of wandb."""

from __future__ import annotations

import contextlib
import json
import math
import os
import warnings
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

METRICS = "metrics.jsonl"


class Log:
    """Records of a run, to everything that listens; on any rank but the first, to nothing.

    On a terminal a progress bar lives below the lines. Elsewhere the lines are nanoGPT's.
    """

    def __init__(self, main: bool, total: int) -> None:
        self.main = main
        self.total = total
        self._tokens_per_step = 0
        self._file: TextIO | None = None
        self._wandb: Any = None
        self._progress: Progress | None = None
        self._console = Console(highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self._progress:
            self._progress.stop()
        if self._file:
            self._file.close()
        if self._wandb:
            with contextlib.suppress(Exception):  # a tracker never stops a run
                self._wandb.finish()

    def open(self, out_dir: Path) -> None:
        """From here on records go to ``out_dir/metrics.jsonl`` as well."""
        if self.main:
            self._file = (out_dir / METRICS).open("a", encoding="utf-8")

    def follow(self, project: str, name: str, run_id: str, config: dict[str, Any]) -> None:
        """Sends evaluations to Weights & Biases, with nanoGPT's keys; one warning where it cannot."""
        if not self.main:
            return
        try:
            import wandb

            self._wandb = wandb.init(project=project, name=name, id=run_id, resume="allow", config=config)
        except Exception as error:  # a tracker never stops a run
            reason = (str(error) or type(error).__name__).splitlines()[0]
            warnings.warn(f"wandb_log=True, but {reason}: training goes on without (pip install wandb)", stacklevel=2)

    def say(self, line: str) -> None:
        """A line for the reader alone."""
        if not self.main:
            return
        if self._progress:
            self._progress.console.print(line, markup=False)
        else:
            print(line, flush=True)

    def start(self, step: int, tokens_per_step: int) -> None:
        """Begins the progress bar, on a terminal."""
        self._tokens_per_step = tokens_per_step
        if self.main and self._console.is_terminal:
            columns = (
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=24),
                TaskProgressColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(compact=True),
                TextColumn("left"),
            )
            self._progress = Progress(*columns, console=self._console, transient=True)
            self._task = self._progress.add_task("", total=self.total, completed=step, figures="")
            self._progress.start()

    def advance(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Moves the progress bar."""
        if self._progress:
            self._progress.update(
                self._task, completed=step, figures=f"loss {loss:.3f}  {tokens_per_second:,.0f} tokens/s"
            )

    def write(self, record: dict[str, Any]) -> None:
        """One record: a line of ``metrics.jsonl``, one for the reader, and the trackers."""
        if not self.main:
            return
        if self._file:
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
            try:
                self._file.write(json.dumps(finite, allow_nan=False) + "\n")
                self._file.flush()
            except OSError as error:
                raise OSError(f"{self._file.name} could not be written ({error.strerror})") from None
        match record:
            case {"kind": "train"} if not self._progress:
                share = "" if math.isnan(record["mfu"]) else f", mfu {record['mfu'] * 100:.2f}%"
                time = 1000 * self._tokens_per_step / record["tokens_per_second"]
                self.say(f"iter {record['step']}: loss {record['loss']:.4f}, time {time:.2f}ms{share}")
            case {"kind": "eval"}:
                self.say(
                    f"step {record['step']}: train loss {record['train_loss']:.4f}, val loss {record['val_loss']:.4f}"
                )
                self._track(record)

    def _track(self, record: dict[str, Any]) -> None:
        if self._wandb:
            try:
                self._wandb.log(
                    {
                        "iter": record["step"],
                        "train/loss": record["train_loss"],
                        "val/loss": record["val_loss"],
                        "lr": record["lr"],
                        "mfu": record["mfu"] * 100,
                    }
                )
            except Exception as error:
                warnings.warn(f"wandb stopped: {error}; training goes on without", stacklevel=2)
                self._wandb = None

    def sync(self) -> None:
        """Everything written so far survives a loss of power."""
        if self._file:
            os.fsync(self._file.fileno())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl``, up to a line that was cut."""
    records: list[dict[str, Any]] = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            try:
                records.append(json.loads(line))
            except ValueError:
                break
    return records


def rewind(path: Path, step: int) -> None:
    """Drops what a run that continues at ``step`` writes again: lines of later steps, train and start of this."""
    if not path.exists():
        return
    kept = [r for r in read_metrics(path) if r["step"] < step or (r["step"] == step and r["kind"] == "eval")]
    unfinished = path.with_name(f".{path.name}.unfinished")
    with unfinished.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(r) + "\n" for r in kept)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
