"""The facts at the head of a report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_plot import evaluation, hellaswag, own, run, train, usual

from folio.records.facts import Fact, facts
from folio.records.report import recorded

START = {
    "kind": "start",
    "step": 0,
    "time": "2026-11-28T23:50:00+00:00",
    "seconds": 1.0,
    "parameters": 10_646_784,
    "dataset": "/home/me/data/novels",
    "train_tokens": 40_000,
    "val_tokens": 5_000,
    "bytes_per_token": 4.0,
    "commit": "0123456789abcdef-dirty",
    "hardware": "AMD EPYC 9R45",
    "device": "cpu",
    "dtype": "bfloat16",
    "world": 1,
}


def facts_of(tmp_path: Path, *records: dict[str, Any], **options: str) -> dict[str, tuple[str, str]]:
    found = facts(recorded("run", run(tmp_path / "run", list(records), **options)))
    return {name: (value, note) for name, value, note in found}


def test_a_run_has_its_results_size_data_and_origin(tmp_path: Path) -> None:
    timed = [{**evaluation(100, 2.0), "seconds": 1201.0}, {**train(99), "seconds": 1000.0}]
    found = facts_of(tmp_path, START, *usual(), *timed, hellaswag(100), max_iters=200)
    assert list(found.items()) == [
        ("best validation loss", ("2.0000", "nats per token, after 100 steps")),
        ("perplexity", ("7.389", "of this loss, per token")),
        ("bits per byte", ("0.7213", "of this loss; bytes per token: 4")),  # 2 / ln 2 / 4
        ("HellaSwag, completion", ("0.2600", "acc_norm ± 0.0044, after 100 steps")),
        ("parameters", ("10,646,784", "position embeddings included")),
        ("steps", ("100", "of 200")),
        ("tokens (thousands)", ("10", "0.25 × the training data")),
        ("data", ("novels", "40,000 tokens to train on, 5,000 to validate")),
        ("time", ("20 min 1 s", "with evaluations, without pauses")),
        ("hardware", ("AMD EPYC 9R45", "cpu, bfloat16")),
        ("began", ("28 Nov 2026", "23:50 UTC")),
        ("last record", ("29 Nov 2026", "00:10 UTC")),
        ("commit", ("0123456789", "with changes that are not committed")),
    ]


def test_a_run_that_recorded_no_such_facts_has_none(tmp_path: Path) -> None:
    old = {"kind": "start", "step": 0, "device": "cuda", "processor": "NVIDIA H100", "world": 8}
    found = facts_of(tmp_path, old, *usual(), dataset="novels")
    names = {"best validation loss", "perplexity", "steps", "tokens (thousands)", "data", "hardware"}
    assert set(found) == names
    assert found["data"] == ("novels", "")
    assert found["hardware"] == ("8 × NVIDIA H100", "cuda, 8 processes")


def test_dates_are_those_of_the_first_start_and_of_the_last_record(tmp_path: Path) -> None:
    """The time between a stop and its resumption counts for the dates, though not for the records' seconds."""
    first = {**train(0), "seconds": 5.0}
    again = {**START, "step": 10, "time": "2026-12-01T12:00:00+00:00", "seconds": 60.0}
    found = facts_of(tmp_path, START, first, again, {**train(10), "seconds": 120.0})
    assert (found["began"], found["last record"]) == (("28 Nov 2026", "23:50 UTC"), ("1 Dec 2026", "12:01 UTC"))
    older = {key: value for key, value in START.items() if key not in ("time", "seconds")}
    found = facts_of(tmp_path, older, first, again, {**train(10), "seconds": 120.0})
    assert "began" not in found
    assert found["last record"] == ("1 Dec 2026", "12:01 UTC")


@pytest.mark.parametrize(("data", "size"), [("elsewhere/novels", 3.0), ("data/others", 4.0)])
def test_bits_per_byte_counts_the_bytes_that_folio_eval_counted_for_this_data(
    tmp_path: Path, data: str, size: float
) -> None:
    out = run(tmp_path / "run", [START, evaluation(5, 3.0)])
    (out / "evaluations.jsonl").write_text(
        f'{{"kind": "eval", "step": 5, "split": "val", "data": "{data}", "loss": 3.0, "tokens": 100, "bytes": 300}}\n'
    )
    found = {fact.name: fact for fact in facts(recorded("run", out))}
    value = {3.0: "1.4427", 4.0: "1.0820"}[size]  # 3 / ln 2 / size
    assert found["bits per byte"] == Fact("bits per byte", value, f"of this loss; bytes per token: {size:g}")


def test_averaged_weights_are_not_called_by_the_name_of_their_record(tmp_path: Path) -> None:
    found = facts_of(tmp_path, *usual(), {"kind": "ema", "step": 100, "val_loss": 2.5}, own(60, norm=1.25))
    assert found["loss of averaged weights"] == ("2.5000", "best validation, nats per token")
    assert found["wte/norm"] == ("1.25", "last value, after 60 steps")
    assert not [name for name in found if "ema" in name or "step" in name.removesuffix("steps")]
