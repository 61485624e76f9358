"""A user's functions between updates: when they are called, what they may return, how they fail."""

from __future__ import annotations

import math
import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_results import records, timeless
from small_runs import TINY

import folio
from folio.records.history import history, options_of, read
from folio.records.metrics import read_metrics
from folio.training import loop

Train = Callable[..., folio.Run]


@pytest.fixture
def train(story: Path, tmp_path: Path) -> Train:
    """Trains ten steps with these callbacks, into ``out``."""
    torch.set_num_threads(1)
    return lambda *callbacks, **options: folio.train(
        **{**TINY, "data_dir": story, "out_dir": tmp_path / "out", **options}, callbacks=callbacks
    )


def norm(run: folio.Run) -> dict[str, Any]:
    return {"kind": "norm", "wte": run.model.lm_head.weight.norm().item(), "note": "text"}


def test_records_go_everywhere(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    """To metrics.jsonl with their step, to the console, to TensorBoard, and to what plot and report draw."""
    run = train((4, norm), track="tensorboard")
    found = [r for r in read_metrics(run.out_dir / "metrics.jsonl") if r["kind"] == "norm"]
    assert [r["step"] for r in found] == [0, 4, 8, 10]
    assert found[-1]["wte"] == run.model.lm_head.weight.norm().item()
    assert found[0]["note"] == "text"
    assert f"step 4: norm/wte {found[1]['wte']:.5g}" in capsys.readouterr().out
    drawn = history("out", read(run.out_dir), options_of(run.out_dir)).others["norm/wte"]
    assert drawn.tolist() == [[0, 4, 8, 10], [r["wte"] for r in found]]
    events = b"".join(p.read_bytes() for p in (run.out_dir / "tensorboard").iterdir())
    assert b"norm/wte" in events


def test_a_function_says_when(train: Train) -> None:
    """It is asked once at each step, and sees the weights and losses of that step."""
    asked, seen = [], []

    def due(run: folio.Run) -> bool:
        asked.append(run.state.step)
        return len(asked) in (3, 8)

    train((due, lambda run: seen.append(run.state.step)))
    assert asked == list(range(11))
    assert seen == [2, 7]


def several(run: folio.Run) -> Any:
    yield {"kind": "a", "x": math.nan}
    yield {"kind": "b", "x": run.state.step, "step": run.state.step}


def test_several_records_or_none(train: Train) -> None:
    run = train((5, several), (5, lambda run: None), (5, lambda run: []))
    assert records(run.out_dir, "a", "step", "x") == [(0, None), (5, None), (10, None)]
    assert records(run.out_dir, "b", "step", "x") == [(0, 0), (5, 5), (10, 10)]


def test_a_measured_run_ends_in_the_same_bits(train: Train) -> None:
    """And resumes to them: a measurement is made once, whatever stops the run."""
    plain = train(max_iters=10, dropout=0.1).model.state_dict()
    run = train((2, norm), (3, lambda run: {"kind": "val", "loss": run.evaluate()["loss"]}), dropout=0.1)
    for name, weight in run.model.state_dict().items():
        assert torch.equal(weight, plain[name])
    whole = timeless(run.out_dir)
    train((2, norm), (3, lambda run: {"kind": "val", "loss": run.evaluate()["loss"]}), dropout=0.1, max_iters=4)
    callbacks = [(2, norm), (3, lambda run: {"kind": "val", "loss": run.evaluate()["loss"]})]
    folio.train(out_dir=run.out_dir, init_from="resume", max_iters=10, callbacks=callbacks)
    extra = [(4, "val"), (4, "eval")]  # the end of the shorter run, at which everything is measured
    assert [r for r in timeless(run.out_dir) if (r["step"], r["kind"]) not in extra] == whole


def test_a_signal_before_it(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run that resumes makes the measurement that its step still owes."""
    log_step = loop.log_step

    def stopped(run: folio.Run) -> None:
        log_step(run)
        if run.state.step == 6 and run.begun == 0:
            run.stop = "SIGINT"

    monkeypatch.setattr(loop, "log_step", stopped)
    with pytest.raises(KeyboardInterrupt):
        train((3, norm))
    run = train((3, norm), init_from="resume")
    assert records(run.out_dir, "norm", "step") == [0, 3, 6, 9, 10]


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (3, "returned 3: must be a dict with 'kind' and values, several of them, or None"),
        ("text", "returned 'text': must be a dict"),
        ([{"kind": "a"}, 1], "returned 1: must be a dict"),
        ({"x": 1}, "returned {'x': 1}: its 'kind' must be a text"),
        ({"kind": 5}, "its 'kind' must be a text"),
        ({"kind": "eval", "x": 1}, "of the kind 'eval', which is Folio's own"),
        ({"kind": "ema", "x": 1}, "of the kind 'ema', which is Folio's own"),
        ({"kind": "a", "step": 3}, "a record of step 3 at step 0: leave the step out"),
        ({"kind": "a", "x": torch.ones(2)}, "'x': tensor([1., 1.]), of the type Tensor, which JSON lacks"),
        ({"kind": "a", "x": np.float32(1)}, "of the type float32, which JSON lacks: give a number (value.item()"),
        ({"kind": "a", "x": [math.inf]}, "'x': [inf], of the type list, which JSON lacks"),
        ({"kind": "a", 5: 1}, "with the key 5: must be a text"),
    ],
)
def test_a_bad_record(train: Train, made: Any, words: str) -> None:
    """One line, which names the callback."""

    def mine(run: folio.Run) -> Any:
        return made

    with pytest.raises(ValueError, match=r"callbacks\[1\] \(test_a_bad_record\.<locals>\.mine\) returned") as raised:
        train((5, norm), (5, mine))
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("callback", "words"),
    [
        (3, "callbacks[0] is 3: must be a pair (due, function)"),
        ((1, norm, 2), "must be a pair"),
        ((0, norm), "callbacks[0] (norm): due is 0: must be a number of steps of at least 1, or a function"),
        (("5", norm), "due is '5'"),
        ((True, norm), "due is True"),
        ((5, None), "callbacks[0]: its function is None: must be a function of the run"),
        ((5, lambda: None), "its function must take one argument, the run"),
        ((lambda run, step: True, norm), "callbacks[0] (norm): due must take one argument"),
    ],
)
def test_a_bad_callback(train: Train, callback: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        train(callback)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [ValueError, FloatingPointError, StopIteration, KeyboardInterrupt, OSError])
def test_the_users_own_error_arrives_as_it_is(train: Train, tmp_path: Path, error: type[BaseException]) -> None:
    """With the user's line in its traceback; the records until then are whole."""

    def mine(run: folio.Run) -> None:
        if run.state.step == 4:
            raise error("mine")

    with pytest.raises(error) as raised:
        train((2, norm), (2, mine))
    assert raised.value.args == ("mine",)
    assert 'raise error("mine")' in "".join(traceback.format_tb(raised.value.__traceback__))
    assert records(tmp_path / "out", "norm", "step") == [0, 2, 4]
