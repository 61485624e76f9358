"""A report of runs on one page: one HTML file, which needs no network."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from folio import files
from folio.config.options import TrainConfig
from folio.config.table import defaults
from folio.records.curves import figure, script_data
from folio.records.elements import cards, folded, section, table, with_note
from folio.records.facts import SHOWN, Recorded, duration, facts
from folio.records.history import LOSS, history, named, options_of, read
from folio.records.log import counted
from folio.records.metrics import read_metrics
from folio.records.plot import write
from folio.records.record import number
from folio.records.run_folder import EVALUATIONS

_PAGE = Path(__file__).parent / "page"
_SAMPLES = 400_000  # characters of all samples together; of more, some steps are left out
_MACHINE = {  # what the names of ``Choices`` mean to a reader
    "attention_block": "queries in a block of attention",
    "graphs": "CUDA graphs",
    "logits": "logits in a chunk of the loss",
    "weight_copy": "16-bit copy of the weights",
    "world": "processes",
}


def report(out_dirs: Sequence[Path], page: Path) -> None:
    """Writes the page: facts, interactive curves, evaluations, samples, machines and options of the runs.

    Raises:
        FileNotFoundError: no run in one of ``out_dirs``.
        ValueError: a run has not begun.
        OSError: the page cannot be written.
    """
    write(page, html([recorded(name, path) for name, path in named(out_dirs)]).encode("utf-8", "replace"))


def recorded(name: str, out_dir: Path) -> Recorded:
    """What the run in a folder recorded. Raises as ``report``."""
    records, options, evaluated = read(out_dir), options_of(out_dir), out_dir / EVALUATIONS
    measured = read_metrics(evaluated) if evaluated.is_file() else []
    return Recorded(history(name, records, options), records, options, measured)


def html(runs: Sequence[Recorded]) -> str:
    """The page about these runs, in the order in which they have their colors."""
    drawn = figure(runs)
    scripts = [_file("uPlot.iife.min.js"), _file("curves.js")] if drawn else []
    sections = {
        "": _facts(runs),
        "Curves": _curves(drawn) if drawn else "",
        "Evaluations": _evaluations(runs),
        "HellaSwag": _hellaswag(runs),
        "Measured by folio eval": _evaluated(runs),
        "Samples": _samples(runs),
        "Machine": _machine(runs),
        "Configuration": _configuration(runs),
    }
    body = "".join(section(title, content) for title, content in sections.items())
    return Template(_file("page.html")).substitute(
        title=escape(", ".join(_names(runs))),
        style=_file("uPlot.min.css") * bool(drawn) + _file("style.css"),
        body=body + "".join(f"<script>{script}</script>\n" for script in scripts),
        allowed=" ".join(map(_hash, scripts)) or "'none'",
    )


def _file(name: str) -> str:
    return files.read_text(_PAGE / name)


def _hash(script: str) -> str:
    """The script as a Content-Security-Policy names it, so that a browser runs no other one."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _names(runs: Sequence[Recorded]) -> list[str]:
    return [run.history.name for run in runs]


def _facts(runs: Sequence[Recorded]) -> str:
    """Cards about one run; a table with a column for each of several."""
    found = [facts(run) for run in runs]
    if len(runs) == 1:
        return cards(found[0])
    columns = [{fact.name: with_note(fact.value, fact.note) for fact in of_run} for of_run in found]
    return table(["", *_names(runs)], [[name, *(c.get(name) for c in columns)] for name in _merged(columns)], "facts")


def _merged(columns: Sequence[Iterable[str]]) -> list[str]:
    """All names, each after the one that comes before it in its own column."""
    found: list[str] = []
    for column in columns:
        at = 0
        for name in column:
            if name not in found:
                found.insert(at, name)
            at = found.index(name) + 1
    return found


def _curves(drawn: dict[str, Any]) -> str:
    """The switches, a place for each panel, and the data, which the scripts at the end of the page read."""
    switches = "".join(
        f"<label><input type={kind}> {label}</label>\n"
        for kind, label in (
            ("radio name=axis value=step checked", "over steps"),
            ("radio name=axis value=tokens data-needs=tokens", "over tokens"),
            ("radio name=axis value=time data-needs=seconds", "over time"),
            ("checkbox name=log", "logarithmic axis"),
            ("checkbox name=smooth checked", "smoothed"),
        )
    )
    places = "".join(
        f"<figure class=panel data-height={360 if panel['title'] == LOSS else 230}>"
        f"<figcaption>{escape(panel['title'])}</figcaption><div class=chart></div></figure>\n"
        for panel in drawn["panels"]
    )
    return (
        f"<form class=switches autocomplete=off>\n{switches}"
        "<span class=mouse>drag to zoom, double-click to zoom out</span>\n</form>\n"
        f"<div class=panels>\n{places}</div>\n<script type=application/json id=data>{script_data(drawn)}</script>\n"
    )


def _of_runs(runs: Sequence[Recorded], head: list[str], rows: Sequence[Sequence[Sequence[Any]]]) -> str:
    """A table of the rows of each run; if there are several runs, the first column names the run."""
    if len(runs) == 1:
        return table(head, rows[0])
    return table(
        ["run", *head], [[name, *row] for name, found in zip(_names(runs), rows, strict=True) for row in found]
    )


def _evaluations(runs: Sequence[Recorded]) -> str:
    """A table of the best evaluation and the last."""
    keys = ("step", "val_loss", "train_loss", "tokens")
    rows = []
    for run in runs:
        found = [r for r in run.records["eval"] if not math.isnan(number(r.get("val_loss")))]
        best = min(found, key=lambda r: number(r["val_loss"]), default={})
        both = (("best", best), ("last", run.records["eval"][-1])) if found else ()
        rows.append([[which, *map(r.get, keys), duration(number(r.get("seconds")))] for which, r in both])
    return _of_runs(runs, ["", "step", "validation loss", "train loss", "tokens", "time"], rows)


def _hellaswag(runs: Sequence[Recorded]) -> str:
    rows = [
        [[int(step), style, *found] for style, all in run.history.hellaswag.items() for step, *found in all.T.tolist()]
        for run in runs
    ]
    count = sum(map(len, rows))
    found = _of_runs(runs, ["step", "style", "acc_norm", "standard error"], rows)
    return folded(counted(count, "evaluation"), found) if found else ""


def _evaluated(runs: Sequence[Recorded]) -> str:
    """The results of ``folio eval``, one number per row."""
    return _of_runs(runs, ["step", "task", "metric", "value"], [_results(run.evaluated) for run in runs])


def _results(records: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
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
    return list(dict.fromkeys(rows))


def _samples(runs: Sequence[Recorded]) -> str:
    """The samples of each run by step, folded except those of the last step."""
    found = [_samples_of(run.records["sample"], _SAMPLES // len(runs)) for run in runs]
    if len(runs) == 1:
        return found[0]
    return "".join(
        f"<h3>{escape(name)}</h3>\n{samples}" for name, samples in zip(_names(runs), found, strict=True) if samples
    )


def _samples_of(records: list[dict[str, Any]], most: int) -> str:
    """Steps are left out evenly if all samples together have more than ``most`` characters."""
    by_step: dict[int, list[str]] = {}
    for r in records:
        if isinstance(text := r.get("text"), str):
            by_step.setdefault(r["step"], []).append(text)
    last_first = sorted(by_step, reverse=True)
    size = sum(len(text) for texts in by_step.values() for text in texts)
    shown = last_first[:: max(1, math.ceil(size / most))]
    left_out = f"<p>Samples of {len(shown):,} of {len(last_first):,} steps.</p>\n"
    return left_out * (len(shown) < len(last_first)) + "".join(
        folded(f"step {step:,}", "".join(f"<pre>{escape(text)}</pre>" for text in by_step[step]), step == shown[0])
        for step in shown
    )


def _machine(runs: Sequence[Recorded]) -> str:
    """The machine and the resolved ``auto`` options. Starts of a run with equal values share a column."""
    columns: dict[tuple[str, str], tuple[list[int], dict[str, Any]]] = {}
    for run in runs:
        for start in run.records["start"]:
            chosen = {k: v for k, v in start.items() if k not in ("kind", "step", *SHOWN)}
            columns.setdefault((run.history.name, json.dumps(chosen)), ([], chosen))[0].append(start["step"])
    head = [
        f"{name}, " * (len(runs) > 1) + "from step " + ", ".join(f"{step:,}" for step in steps)
        for (name, _), (steps, _) in columns.items()
    ]
    found = [chosen for _, chosen in columns.values()]
    return table(
        ["", *head],
        [[_MACHINE.get(key, key.replace("_", " ")), *(c.get(key) for c in found)] for key in _merged(found)],
        "facts",
    )


def _configuration(runs: Sequence[Recorded]) -> str:
    """The options: those that differ between the runs, then those that differ from the defaults, then the rest."""
    usual = defaults(TrainConfig)
    values = {
        name: [run.options.get(name, usual.get(name)) for run in runs] for name in _merged([r.options for r in runs])
    }
    differing = [[k, *map(str, found)] for k, found in values.items() if any(value != found[0] for value in found)]
    common = {k: found[0] for k, found in values.items() if all(value == found[0] for value in found)}
    changed = [[k, str(v), str(usual.get(k, "none"))] for k, v in common.items() if k not in usual or usual[k] != v]
    same = [[k, str(v)] for k, v in common.items() if k in usual and usual[k] == v]
    shared = table(["option", "value", "default"], changed)
    if len(runs) > 1 and values:
        shared = folded(f"{counted(len(changed), 'option')} with the same value in all runs", shared) if shared else ""
        different = table(["different option", *_names(runs)], differing, "facts")
        shared = (different or "<p>All runs have the same options.</p>\n") + shared
    title = f"{counted(len(same), 'option')} at {'its default' if len(same) == 1 else 'their defaults'}"
    rest = folded(title, table(["option", "default"], same)) if same else ""
    return shared + rest
