"""A one-page report of a run: one HTML file, which needs no network."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from folio.config.options import TrainConfig
from folio.config.table import defaults
from folio.records.curves import curves
from folio.records.history import (
    History,
    Records,
    history,
    names,
    options_of,
    points,
    read,
    unit_of,
)
from folio.records.metrics import read_metrics
from folio.records.plot import write
from folio.records.record import number
from folio.records.run_folder import EVALUATIONS


def report(out_dir: Path, page: Path) -> None:
    """Writes the page: interactive figures, evaluations, samples, the machine, and the options.

    Raises:
        FileNotFoundError: no run in ``out_dir``.
        ValueError: the run has not begun.
        OSError: the page cannot be written.
    """
    records, options = read(out_dir), options_of(out_dir)
    evaluated = out_dir / EVALUATIONS
    h = history(names([out_dir.resolve()])[0], records, options)
    sections = {
        "": _summary(h, records),
        "Curves": curves(h, records),
        "Evaluations": _evaluations(h, records),
        "HellaSwag": _hellaswag(h),
        "Measured by folio eval": _evaluated(read_metrics(evaluated) if evaluated.is_file() else []),
        "Samples": _samples(records["sample"]),
        "Machine": _machine(records["start"]),
        "Configuration": _configuration(options),
    }
    body = "".join(
        f"<section>{f'<h2>{title}</h2>' * bool(title)}{content}</section>\n"
        for title, content in sections.items()
        if content
    )
    write(page, PAGE.substitute(name=escape(h.name), body=body).encode("utf-8", "replace"))


def _summary(h: History, records: Records) -> str:
    """The most important numbers that the run recorded."""
    seconds = np.hstack([points(records[kind], "seconds")[0] for kind in ("train", "eval")])
    speed, share = (points(records["train"], key)[0] for key in ("tokens_per_second", "mfu"))
    unit, word = unit_of([h])
    figures = {
        "best validation loss": f"{h.best[1]:.4f}" if h.validation.size else "",
        "at step": f"{h.best[0]:,.0f}" if h.validation.size else "",
        "steps": f"{h.tokens[0].max():,.0f}" if h.tokens.size else "",
        f"tokens ({word})" if word else "tokens": f"{h.tokens[1].max() / unit:,.5g}" if h.tokens.size else "",
        **{f"HellaSwag, {style}": f"{found[1][-1]:.4f}" for style, found in h.hellaswag.items() if found.size},
        **{f"{name}, last": f"{found[1][-1]:.5g}" for name, found in h.others.items()},
        "time": _time(seconds.max()) if seconds.size else "",
        "tokens per second (median)": f"{np.median(speed):,.0f}" if speed.size else "",
        "of the devices’ peak (median MFU)": f"{np.median(share):.1%}" if share.size else "",
    }
    return (
        "<dl>"
        + "".join(f"<div><dt>{escape(name)}</dt><dd>{value}</dd></div>" for name, value in figures.items() if value)
        + "</dl>"
    )


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _evaluations(h: History, records: Records) -> str:
    """A table of the best evaluation and the last."""
    found = records["eval"]
    if not h.validation.size:
        return ""
    best = min((r for r in found if not math.isnan(number(r.get("val_loss")))), key=lambda r: number(r["val_loss"]))
    keys = ("step", "val_loss", "train_loss", "tokens", "seconds")
    rows = [[which, *(r.get(key) for key in keys)] for which, r in (("best", best), ("last", found[-1]))]
    return _table(["", "step", "validation loss", "train loss", "tokens", "seconds"], rows)


def _hellaswag(h: History) -> str:
    rows = [[int(step), style, *found] for style, all in h.hellaswag.items() for step, *found in all.T.tolist()]
    table = _table(["step", "style", "acc_norm", "standard error"], rows)
    return _folded(f"{len(rows)} evaluations", table) if rows else ""


def _evaluated(records: list[dict[str, Any]]) -> str:
    """The results of ``folio eval``, one number per row."""
    rows = []
    for r in records:
        which = ", ".join(str(r[key]) for key in ("kind", "split", "data", "style") if key in r)
        more = f", first {limit}" if (limit := r.get("limit")) else ""
        more += ", averaged weights" if r.get("weights") == "ema" else ""
        tasks = r.get("tasks") if r["kind"] == "lm_eval" else {which: r}
        for task, figures in tasks.items() if isinstance(tasks, dict) else ():
            found = figures.items() if isinstance(figures, dict) else ()
            numbers = ((k, v) for k, v in found if not math.isnan(number(v)) and k != "step")
            rows += [(r["step"], task + more, metric, value) for metric, value in numbers]
    return _table(["step", "task", "metric", "value"], list(dict.fromkeys(rows)))


def _samples(records: list[dict[str, Any]]) -> str:
    """The samples by step, folded except those of the last step."""
    by_step: dict[int, list[str]] = {}
    for r in records:
        if isinstance(text := r.get("text"), str):
            by_step.setdefault(r["step"], []).append(text)
    return "".join(
        _folded(f"step {step:,}", "".join(f"<pre>{escape(text)}</pre>" for text in texts), step == max(by_step))
        for step, texts in sorted(by_step.items(), reverse=True)
    )


def _machine(starts: list[dict[str, Any]]) -> str:
    """The machine and the resolved ``auto`` options. Starts with equal values share a column."""
    columns: dict[str, tuple[list[int], dict[str, Any]]] = {}
    for start in starts:
        chosen = {k: v for k, v in start.items() if k not in ("kind", "step")}
        columns.setdefault(json.dumps(chosen), ([], chosen))[0].append(start["step"])
    keys = dict.fromkeys(key for _, chosen in columns.values() for key in chosen)
    head = ["", *("from step " + ", ".join(f"{step:,}" for step in steps) for steps, _ in columns.values())]
    return _table(head, [[key.replace("_", " "), *(c.get(key) for _, c in columns.values())] for key in keys])


def _configuration(options: dict[str, Any]) -> str:
    """The options of the run: first those that differ from the defaults, then the rest."""
    usual = defaults(TrainConfig)
    changed = [[k, str(v), str(usual.get(k, "none"))] for k, v in options.items() if k not in usual or usual[k] != v]
    same = [[k, str(v)] for k, v in options.items() if k in usual and usual[k] == v]
    rest = _folded(f"{len(same)} options at their defaults", _table(["option", "default"], same)) if same else ""
    return _table(["option", "value", "default"], changed) + rest


def _folded(title: str, content: str, opened: bool = False) -> str:
    return f"<details{' open' * opened}><summary>{title}</summary>{content}</details>"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Rows of any values as text; "" where there are none."""
    titles = "".join(f"<th>{title}</th>" for title in head)
    body = "".join("<tr>" + "".join(f"<td>{_cell(value)}</td>" for value in row) + "</tr>" for row in rows)
    return f"<div class=wide><table><tr>{titles}</tr>{body}</table></div>" if body else ""


def _cell(value: Any) -> str:
    match value:
        case bool() | str():
            return escape(str(value)) or "–"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:,.4f}" if abs(value) >= 0.001 else f"{value:.3g}"
        case None:
            return "–"
    return escape(json.dumps(value))


PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline'; style-src \
'unsafe-inline'; img-src data: blob:">
<title>$name</title>
<style>
:root { color-scheme: light dark; --ink: #1d1d1f; --paper: #fff; --faint: #6b6b70; --line: #e2e2e6; --tint: #f5f5f7 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8ea; --paper: #161618; --faint: #9c9ca3; --line: #35353a; --tint: #212124 }
}
body { margin: 0 auto; padding: 1.5rem max(1rem, 4vw) 4rem; max-width: 62rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; -webkit-text-size-adjust: 100% }
h1 { font-size: 1.7rem; line-height: 1.2; overflow-wrap: anywhere }
h2 { margin: 2.5rem 0 .75rem; font-size: 1.15rem }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(10.3rem, 1fr)); gap: .75rem; margin: 0 }
dl div { padding: .7rem .9rem; border-radius: .6rem; background: var(--tint) }
dt { color: var(--faint); font-size: .8rem; line-height: 1.3 }
dd { margin: .15rem 0 0; font-size: 1.2rem; font-weight: 600; font-variant-numeric: tabular-nums }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .35rem 1.5rem .35rem 0; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap }
th { color: var(--faint); font-weight: 500 }
details { margin: .5rem 0 }
summary { cursor: pointer; color: var(--faint) }
pre { margin: .5rem 0; padding: .8rem 1rem; border-radius: .6rem; background: var(--tint); white-space: pre-wrap;
  overflow-wrap: anywhere; font: .85rem/1.5 ui-monospace, monospace }
#curves text:not(.hoverlayer *) { fill: var(--ink) !important }
</style>
</head>
<body>
<h1>$name</h1>
$body</body>
</html>
""")
