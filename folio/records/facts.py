"""The facts of a run at the head of its report: results, size, data, speed, machine, dates and code."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from folio.records.history import History, Records, points, unit_of
from folio.records.record import Record, number

AVERAGED = "ema/val_loss"  # the measurement of --ema_decay
SHOWN = ("time", "seconds", "parameters", "dataset", "train_tokens", "val_tokens", "bytes_per_token")  # of a start
_LARGEST_EXPONENT = 700.0  # exp of more is no float


class Recorded(NamedTuple):
    """What a run recorded."""

    history: History
    records: Records
    options: dict[str, Any]
    evaluated: list[Record]  # by folio eval

    @property
    def start(self) -> dict[str, Any]:
        """The facts of its starts; those of the last one count."""
        return {k: v for r in self.records["start"] for k, v in r.items() if v is not None}


class Fact(NamedTuple):
    """A fact with its unit or circumstances, as text."""

    name: str
    value: str
    note: str = ""


def facts(run: Recorded) -> list[Fact]:
    """The facts that are known of a run, the most important first."""
    return [fact for part in (_results, _size, _speed, _origin) for fact in part(run) if fact.value]


def _results(run: Recorded) -> Iterator[Fact]:
    h = run.history
    if h.validation.size:
        step, loss = h.best
        yield Fact("best validation loss", f"{loss:.4f}", f"nats per token, after {step:,.0f} steps")
        yield Fact("perplexity", f"{math.exp(min(loss, _LARGEST_EXPONENT)):,.4g}", "of this loss, per token")
        if size := _bytes_per_token(run):
            yield Fact(
                "bits per byte", f"{loss / math.log(2) / size:.4f}", f"of this loss; bytes per token: {size:.4g}"
            )
    if AVERAGED in h.others:
        yield Fact("loss of averaged weights", f"{h.others[AVERAGED][1].min():.4f}", "best validation, nats per token")
    for style, scored in h.hellaswag.items():
        if scored.size:
            steps, accuracy, error = scored[:, -1].tolist()
            yield Fact(f"HellaSwag, {style}", f"{accuracy:.4f}", f"acc_norm ± {error:.4f}, after {steps:,.0f} steps")
    for name, (steps, values) in h.others.items():
        if name != AVERAGED:
            yield Fact(name, f"{values[-1]:.5g}", f"last value, after {steps[-1]:,.0f} steps")


def _bytes_per_token(run: Recorded) -> float:
    """As ``folio eval`` counted for this data; otherwise of the whole data set, as its meta file says; 0: unknown."""
    for r in reversed(run.evaluated):
        tokens, size = number(r.get("tokens")), number(r.get("bytes"))
        same = Path(text(r.get("data"))).name == Path(_data(run)).name
        if (r["kind"], r.get("split")) == ("eval", "val") and same and tokens > 0 and size > 0:
            return size / tokens
    size = number(run.start.get("bytes_per_token"))
    return size if size > 0 else 0.0


def _size(run: Recorded) -> Iterator[Fact]:
    h, start = run.history, run.start
    parameters, available, held_out = (number(start.get(k)) for k in ("parameters", "train_tokens", "val_tokens"))
    yield Fact("parameters", f"{parameters:,.0f}" if parameters > 0 else "", "position embeddings included")
    if h.tokens.size:
        steps, tokens = h.tokens.max(axis=1).tolist()
        unit, word = unit_of([h])
        epochs = f"{tokens / available:.3g} × the training data" if available > 0 else ""
        yield Fact("steps", f"{steps:,.0f}", _limit(run))
        yield Fact(f"tokens ({word})" if word else "tokens", f"{tokens / unit:,.4g}", epochs)
    sizes = f"{available:,.0f} tokens to train on, {held_out:,.0f} to validate" if available + held_out > 0 else ""
    yield Fact("data", Path(_data(run)).name, sizes)


def _data(run: Recorded) -> str:
    """The data set as the run recorded it, or as its options name it."""
    named = (run.start.get("dataset"), *map(run.options.get, ("data_mixture", "data_dir", "dataset")))
    return next(filter(None, map(text, named)), "")


def _limit(run: Recorded) -> str:
    most = number(run.options.get("max_iters"))
    return f"of {most:,.0f}" if most > 0 else ""


def _speed(run: Recorded) -> Iterator[Fact]:
    seconds = np.hstack([points(run.records[kind], "seconds")[0] for kind in ("train", "eval")])
    speed, share = (points(run.records["train"], key)[0] for key in ("tokens_per_second", "mfu"))
    yield Fact("time", duration(seconds.max()) if seconds.size else "", "with evaluations, without pauses")
    yield Fact("speed", f"{np.median(speed):,.0f}" if speed.size else "", "tokens per second, median")
    utilization = f"{np.median(share):.1%}" if share.size else ""
    yield Fact("utilization", utilization, "of the devices’ peak arithmetic (MFU), median")


def _origin(run: Recorded) -> Iterator[Fact]:
    start = run.start
    world = number(start.get("world"))
    several = f"{world:,.0f} × " if world > 1 and start.get("device") == "cuda" else ""
    processes = f"{world:,.0f} processes" if world > 1 else ""
    circumstances = [text(start.get("device")), text(start.get("dtype")), processes]
    hardware = text(start.get("hardware")) or text(start.get("processor"))
    yield Fact("hardware", f"{several}{hardware}" if hardware else "", ", ".join(filter(None, circumstances)))
    began, last = _dates(run)
    yield Fact("began", *_moment(began))
    yield Fact("last record", *_moment(last))
    code = re.fullmatch(r"([0-9a-f]{7,64})(-dirty)?", text(start.get("commit")))
    yield Fact("commit", code[1][:10] if code else "", "with changes that are not committed" * bool(code and code[2]))


def _dates(run: Recorded) -> tuple[datetime | None, datetime | None]:
    """When the run began, and when its last record was written; None if unknown.

    Only starts have a date; a later record is so many seconds younger than the last start.
    """
    dated = [(when, r) for r in run.records["start"] if (when := _date(r.get("time")))]
    if not dated:
        return None, None
    began = dated[0][0] if dated[0][1]["step"] == 0 else None
    when, last = dated[-1]
    written = [*run.records["train"], *run.records["eval"]]
    seconds = [number(r.get("seconds")) - number(last.get("seconds")) for r in written if r["step"] >= last["step"]]
    passed = max((s for s in seconds if s >= 0), default=math.nan)
    with suppress(OverflowError, ValueError):
        return began, when + timedelta(seconds=passed)
    return began, None


def _date(value: Any) -> datetime | None:
    with suppress(ValueError, OverflowError):
        return datetime.fromisoformat(text(value)).astimezone(UTC)
    return None


def _moment(when: datetime | None) -> tuple[str, str]:
    """A day, and the time of that day."""
    return (f"{when.day} {when:%b %Y}", f"{when:%H:%M} UTC") if when else ("", "")


def text(value: Any) -> str:
    """A value that should be text; "" if it is not."""
    return value if isinstance(value, str) else ""


def duration(seconds: float) -> str:
    """Seconds as people read them; "" for NaN."""
    if math.isnan(seconds):
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
