"""The data of a report's curves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_plot import evaluation, hellaswag, run, train, usual

from folio.records.curves import figure, script_data
from folio.records.history import smooth
from folio.records.report import recorded


def panels_of(tmp_path: Path, *runs: list[dict[str, Any]], **options: str) -> dict[str, dict[str, Any]]:
    found = [recorded(str(i), run(tmp_path / str(i), records, **options)) for i, records in enumerate(runs)]
    drawn = figure(found)
    assert drawn
    return {panel["title"]: panel for panel in drawn["panels"]}


def test_losses_are_drawn_as_recorded_and_smoothed(tmp_path: Path) -> None:
    averaged = [{"kind": "ema", "step": step, "val_loss": 3.25} for step in (20, 40)]
    loss = panels_of(tmp_path, [*usual(), *averaged])["loss (nats per token)"]
    trained, validation, average = loss["curves"]
    values = [train(step)["loss"] for step in range(100)]
    assert trained["x"] == trained["smooth"][0] == list(range(100))
    np.testing.assert_allclose(trained["y"], values, rtol=1e-5)
    np.testing.assert_allclose(trained["smooth"][1], smooth(np.array(values)), rtol=1e-5)
    assert (validation["x"], validation["bold"], validation["apart"]) == (list(range(0, 101, 20)), True, True)
    assert (average["name"], average["y"], average["dashed"]) == ("averaged weights", [3.25, 3.25], True)


def test_only_an_untrained_first_evaluation_stands_apart(tmp_path: Path) -> None:
    fine_tuned = [evaluation(step, 3.0) for step in (10, 20, 30)]
    assert not panels_of(tmp_path, fine_tuned)["loss (nats per token)"]["curves"][0]["apart"]
    assert not panels_of(tmp_path, [evaluation(0, 5.0), evaluation(9, 3.0)])["loss (nats per token)"]["curves"][0][
        "apart"
    ]


def test_hellaswag_has_error_bars_and_gpt2_where_it_is_within_reach(tmp_path: Path) -> None:
    near = panels_of(tmp_path, [hellaswag(step) for step in (0, 100)])["HellaSwag accuracy (acc_norm)"]
    assert near["curves"][0]["error"] == pytest.approx([0.004377, 0.004377], rel=1e-3)  # √(0.26 · 0.74 / 10042)
    assert near["references"] == [("GPT-2 124M, completion", 0.2955)]
    low, high = near["range"]
    assert low < 0.26 - 0.0044
    assert 0.2955 < high < 0.31
    far = panels_of(tmp_path, [{**hellaswag(0), "acc_norm": 0.1}])["HellaSwag accuracy (acc_norm)"]
    assert far["range"][1] < 0.2955


def test_a_long_curve_is_thinned_but_not_its_beginning(tmp_path: Path) -> None:
    """A logarithmic axis gives the first hundred steps half of its width."""
    losses = [train(step) for step in range(20_000)]
    losses[12_345]["loss"] = 9.0
    (curve,) = panels_of(tmp_path, losses)["loss (nats per token)"]["curves"]
    assert curve["x"] == sorted(set(curve["x"]))
    assert curve["x"][:100] == curve["smooth"][0][:100] == list(range(100))
    assert curve["x"][-1] == curve["smooth"][0][-1] == 19_999
    assert curve["y"][curve["x"].index(12_345)] == 9.0
    assert len(curve["x"]) + len(curve["smooth"][0]) < 3300


def test_a_spike_of_the_gradient_does_not_flatten_the_rest(tmp_path: Path) -> None:
    records = [{**train(step), "grad_norm": 1 + step % 5 / 10} for step in range(1000)]
    records[500]["grad_norm"] = 1000.0
    panel = panels_of(tmp_path, records)["gradient norm"]
    assert panel["range"] == pytest.approx([0.98, 1.42])
    assert max(panel["curves"][0]["y"]) == 1000.0


def test_tokens_and_seconds_are_given_by_step(tmp_path: Path) -> None:
    records = [{**train(step, rate=50), "seconds": 2.0 * (step + 1)} for step in range(1000)]  # after the update
    drawn = figure([recorded("run", run(tmp_path / "run", records))])
    assert drawn
    (axes,) = drawn["runs"]
    for (steps, values), rate in ((axes["tokens"], 50), (axes["seconds"], 2)):
        assert len(steps) <= 300
        np.testing.assert_allclose(np.interp([0, 1, 499.5, 999], steps, values), np.multiply(rate, [0, 1, 499.5, 999]))
    assert figure([recorded("old", run(tmp_path / "old", [evaluation(0, 3.0) | {"tokens": None}]))])["runs"] == [
        {"name": "old", "tokens": None, "seconds": None}
    ]


def test_no_text_ends_the_script_element() -> None:
    text = "</script><!--<script>\u2028\ud800"
    data = script_data({"name": text})
    assert "<" not in data
    assert data.isascii()
    assert json.loads(data) == {"name": text}
