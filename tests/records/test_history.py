"""The curves of a run as the plot and the report draw them."""

from __future__ import annotations

import numpy as np
import pytest
from test_plot import evaluation, train

from folio.records.history import Records, history, smooth, span, thin


def test_a_step_is_drawn_at_the_tokens_that_its_weights_were_trained_on() -> None:
    records = Records({"train": [train(0), train(1)], "eval": [evaluation(4, 3.0)], "hellaswag": []})
    h = history("", records, {})
    assert h.along(np.array([0.0, 1, 2, 3, 4]), 100).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("count", [1, 7, 1000])
def test_smoothing_is_the_documented_weighted_mean(count: int) -> None:
    values = np.random.default_rng(0).normal(size=count)
    distances = np.abs(np.subtract.outer(np.arange(count), np.arange(count)))
    weights = np.exp(-distances / max(1, count / 100))
    np.testing.assert_allclose(smooth(values), weights @ values / weights.sum(axis=1), rtol=1e-9, atol=1e-12)


def test_thinning_keeps_all_extremes() -> None:
    values = np.random.default_rng(0).normal(size=100_000)
    values[[31_415, 92_653]] = 50, -50
    points = np.stack([np.arange(100_000.0), values])
    kept = thin(points, bins=100)
    assert kept.shape[1] <= 400
    assert (np.diff(kept[0]) > 0).all()
    assert (values[kept[0].astype(int)] == kept[1]).all()
    assert {0, 31_415, 92_653, 99_999} <= set(kept[0].astype(int).tolist())
    for part in range(100):
        inside = kept[1][kept[0] // 1000 == part]
        assert (inside.min(), inside.max()) == (values[1000 * part :][:1000].min(), values[1000 * part :][:1000].max())
    assert thin(points[:, :400], bins=100).shape == (2, 400)


def test_high_first_losses_are_cut_off() -> None:
    """Only they and single train losses are."""
    losses = [11 - 7 * min(1, step / 10) - step / 1000 for step in range(1000)]
    losses[500] = 30.0
    records = Records({"train": [train(i, loss) for i, loss in enumerate(losses)], "eval": [], "hellaswag": []})
    low, high = span([history("", records, {})])
    assert low < min(losses)
    assert max(losses[50:500]) < high < 6
    gentle = {**records, "train": [train(i, 5 - i / 1000) for i in range(1000)], "eval": [evaluation(0, 5.1)]}
    low, high = span([history("", gentle, {})])
    assert low < 4.001
    assert high > 5.1
