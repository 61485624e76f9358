"""Runs ``folio train`` in this process, and reads what a run has written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL, Outcome
from safetensors.torch import load_file

from folio.records import run_folder
from folio.records.metrics import read_metrics

Train = Callable[..., Path]  # folder, *argv → folder


@pytest.fixture
def train(folio: Callable[..., Outcome], story: Path, tmp_path: Path) -> Train:
    """Runs ``folio train`` into a folder and returns it: ``train("out", "--max_iters=3")``."""

    def run(name: str, *argv: str, code: int = 0) -> Path:
        outcome = folio("train", *SMALL, f"--data_dir={story}", f"--out_dir={tmp_path / name}", *argv)
        assert outcome.code == code, outcome.err
        (tmp_path / f"{name}.txt").write_text(outcome.out)
        return tmp_path / name

    return run


def said(out: Path) -> list[str]:
    """The lines that the last run into this folder printed."""
    return out.with_name(f"{out.name}.txt").read_text().splitlines()


def records(out: Path, kind: str, *names: str) -> list[Any]:
    """These fields of the records of one kind, in order: tuples, or values if there is one field."""
    found = [r for r in read_metrics(out / "metrics.jsonl") if r["kind"] == kind]
    return [r[names[0]] for r in found] if len(names) == 1 else [tuple(r[name] for name in names) for r in found]


def updates(out: Path, step: int) -> set[float]:
    """The numbers of updates that the optimizer's state has counted."""
    slots = load_file(run_folder.checkpoint_folder(out, step) / "optimizer.safetensors")
    return {float(t) for name, t in slots.items() if name.endswith("/step")}


def timeless(out: Path) -> list[dict[str, Any]]:
    """All records except the starts, without the fields that depend on a clock."""
    clock = {"seconds", "tokens_per_second", "mfu"}
    kept = [r for r in read_metrics(out / "metrics.jsonl") if r["kind"] != "start"]
    return [{k: v for k, v in r.items() if k not in clock} for r in kept]


def assert_same_bits(out: Path, other: Path) -> None:
    """Asserts equal weights, optimizer states, records and checkpoints."""
    assert timeless(out) == timeless(other)
    assert run_folder.steps(out) == run_folder.steps(other)
    last = run_folder.steps(other)[-1]
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (run_folder.checkpoint_folder(out, last) / name).read_bytes() == (
            run_folder.checkpoint_folder(other, last) / name
        ).read_bytes()
    assert (out / "best.json").read_bytes() == (other / "best.json").read_bytes()
    assert [p.name for p in (out / "checkpoints").iterdir() if p.name.startswith(".")] == []
