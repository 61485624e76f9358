"""A measurement that a user adds, by the recipe of CONTRIBUTING.md, reaches everything that a run writes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT, SMALL, succeed
from run_results import Train, records

from folio.records.metrics import read_metrics
from folio.records.record import measured


def recipe() -> str:
    """The code under "A measurement: one line"."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return re.split(r"^\*\*A measurement.*?```python\n(.*?)```", text, flags=re.DOTALL | re.MULTILINE)[1]


def test_the_recipe_reaches_console_file_tracker_plot_and_report(clone: Path, story: Path) -> None:
    for package in ("matplotlib", "tensorboard"):
        pytest.importorskip(package)
    work = clone / "folio" / "training" / "work.py"
    source, there = work.read_text(encoding="utf-8"), "work = [loss, *measurements"
    assert there in source
    added = f"{there}, {recipe().strip().replace('100', '5')}"
    work.write_text(source.replace(there, added), encoding="utf-8")
    flags = shlex.join([*SMALL, f"--data_dir={story}", "--out_dir=out", "--track=tensorboard"])
    said = succeed(f"python -m folio train {flags}", clone, PYTHONPATH=str(clone))
    found = records(clone / "out", "wte", "step", "norm")
    assert [step for step, _ in found] == [0, 5, 10]
    for step, norm in found:
        assert f"\nstep {step}: wte/norm {norm:.5g}\n" in said
    (events,) = (clone / "out" / "tensorboard").iterdir()
    assert events.read_bytes().count(b"wte/norm") == 3
    succeed("python -m folio plot out -o out/loss.svg", clone)
    assert (clone / "out" / "loss.svg").read_text(encoding="utf-8").count(">wte/norm<") == 1
    succeed("python -m folio report out", clone)
    assert f"<dt>wte/norm</dt><dd>{found[-1][1]:.5g} <small>last value, after 10 steps</small></dd>" in (
        clone / "out" / "report.html"
    ).read_text("utf-8")


def test_records_of_folios_own_kinds_hold_no_other_measurement(train: Train) -> None:
    found = read_metrics(train("out", "--sample_interval=5") / "metrics.jsonl")
    assert {record["kind"] for record in found} == {"start", "train", "eval", "sample"}
    assert [measured(record) for record in found] == [{}] * len(found)
