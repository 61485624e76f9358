"""The curves of a run as the plot and the report draw them."""

from __future__ import annotations

import numpy as np
import pytest
from test_plot import evaluation, train

from folio.records.history import COLORS, GPT2_LOSS, Records, axis_of, history, smooth, span, thin, within_reach


def test_a_step_is_drawn_where_its_weights_were() -> None:
    """At the tokens and seconds of training until then; an evaluation's own seconds come later."""
    lines = [{**train(step), "seconds": 60.0 * (step + 1)} for step in range(2)]
    records = Records({"train": lines, "eval": [{**evaluation(2, 3.0), "seconds": 150.0}, evaluation(4, 3.0)]})
    records |= {"hellaswag": []}
    h = history("", records, {})
    steps = np.arange(5.0)
    assert h.along(steps, axis_of("step", [h])).tolist() == steps.tolist()
    assert h.along(steps, axis_of("tokens", [h])).tolist() == [0, 100, 200, 300, 400]
    assert h.along(steps[:3], axis_of("time", [h])).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("seconds", "label", "last"),
    [(90, "seconds", 90), (600, "minutes", 10), (7200, "hours", 2), (864_000, "days", 10)],
)
def test_time_has_a_unit_that_fits(seconds: int, label: str, last: float) -> None:
    records = Records({"train": [{**train(9), "seconds": seconds}], "eval": [], "hellaswag": []})
    h = history("", records, {})
    axis = axis_of("time", [h])
    assert axis.label == f"time ({label})"
    assert h.along(np.array([10.0]), axis) == [last]


@pytest.mark.parametrize(("count", "share"), [(1, 0.01), (7, 0.01), (1000, 0.01), (1000, 0.1), (50, 1), (9, 0)])
def test_smoothing_is_the_documented_weighted_mean(count: int, share: float) -> None:
    """The values are unevenly spaced."""
    rng = np.random.default_rng(0)
    values, at = rng.normal(size=count), np.cumsum(rng.uniform(1, 3, size=count))
    weights = np.eye(count)
    if share and count > 1:
        gaps = np.diff(at) / np.minimum(share * (at[-1] - at[0]), (at[1:] - at[0]) / 4)
        distances = np.concatenate([[0.0], np.cumsum(gaps)])
        weights = np.exp(-np.abs(np.subtract.outer(distances, distances)))
    np.testing.assert_allclose(smooth(values, share, at), weights @ values / weights.sum(axis=1), rtol=1e-9, atol=1e-12)


def test_smoothing_does_not_flatten_the_fall() -> None:
    fall = 11 - 7 * np.minimum(1, np.arange(10_000) / 100)
    assert np.abs(smooth(fall) - fall).max() < 0.7
    assert smooth(fall)[0] == pytest.approx(11, abs=0.01)


def test_smoothing_takes_values_of_one_step_and_any_horizon() -> None:
    values, at = np.array([4.0, 2.0, 3.0, 5.0]), np.array([0.0, 0.0, 1.0, 1.0])
    assert smooth(values, 1e-3, at) == pytest.approx([3.0, 3.0, 4.0, 4.0])
    assert smooth(values, 5e-324).tolist() == values.tolist()


def test_thinning_for_a_logarithmic_axis_keeps_the_beginning() -> None:
    points = np.stack([np.arange(1.0, 100_001), np.random.default_rng(0).normal(size=100_000)])
    kept = thin(points, bins=100, log=True)[0]
    assert {1.0, 2, 3, 4, 5, 100_000} <= set(kept.tolist())
    assert 4 * 50 < len(kept) <= 4 * 100


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
    assert span([history("", records, {})], log=True)[1] > 11


def test_the_first_twentieth_of_a_longer_run_is_cut_off() -> None:
    """Of a run that has just begun, half is shown."""
    falls = [11 - 7 * min(1, step / 10) - step / 1000 for step in range(1000)]
    runs = [
        history("", Records({"train": [train(i, x) for i, x in enumerate(losses)], "eval": [], "hellaswag": []}), {})
        for losses in (falls, falls[:40])
    ]
    assert span(runs)[1] < 5
    assert span([*runs, runs[1]._replace(train=np.array([[0.0, 1, 2, 3], [11, 10, 9, 8]]))])[1] > 9


@pytest.mark.parametrize(("start", "end", "there"), [(5.0, 4.0, False), (5.0, 3.6, True), (3.4, 2.9, True)])
def test_gpt2s_loss_widens_the_frame_if_it_is_within_reach(start: float, end: float, there: bool) -> None:
    losses = [(i, end + (start - end) * (1 - i / 100)) for i in range(101)]
    records = Records({"train": [train(i, loss) for i, loss in losses], "eval": [], "hellaswag": []})
    low, high = span([history("", records, {"dataset": "fineweb_edu"})])
    assert (low < GPT2_LOSS < high) == there
    assert within_reach(GPT2_LOSS, end, start) == there
    assert span([history("", records, {})])[0] == pytest.approx(end, abs=0.06)


def test_colors_are_seen_on_white_and_neighbors_differ_in_gray() -> None:
    linear = [[(int(color[i : i + 2], 16) / 255) ** 2.2 for i in (1, 3, 5)] for color in COLORS]
    luminance = np.array(linear) @ [0.2126, 0.7152, 0.0722]
    assert (1.05 / (luminance + 0.05)).min() > 3
    assert np.abs(np.diff(116 * np.cbrt(luminance))).min() > 7
