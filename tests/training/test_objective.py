"""A user's loss: its values and gradients, what it may return, and that a run resumes with it only."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Outcome, assert_refused
from run_results import records
from small_runs import TINY
from torch import Tensor, nn

import folio

Train = Callable[..., folio.Run]


def usual(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


def of_hidden(hidden: Tensor, targets: Tensor, head: Tensor) -> Tensor:
    return usual(F.linear(hidden, head).float(), targets)


def smoothed(logits: Tensor, targets: Tensor, share: float = 0.1) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, label_smoothing=share)


class Module(nn.Module):
    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return usual(logits, targets)


@pytest.fixture
def train(story: Path, tmp_path: Path) -> Train:
    """Trains ten steps into a folder of this name."""
    torch.set_num_threads(1)
    options = {**TINY, "data_dir": story, "dropout": 0.1, "learning_rate": 1e-2}
    return lambda name, **more: folio.train(**{**options, "out_dir": tmp_path / name, **more})


@pytest.mark.parametrize("loss", [usual, of_hidden, Module(), functools.partial(smoothed, share=0.0)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cross_entropy_is_the_built_in_loss(train: Train, loss: Any, dtype: str) -> None:
    """To rounding: the losses, which depend on the gradients of all steps before, and the gradients' norms."""
    mine, theirs = (train(name, loss=given, dtype=dtype).out_dir for name, given in (("mine", loss), ("usual", None)))
    close = 1e-6 if dtype == "float32" else 1e-2
    for field in ("loss", "grad_norm"):
        assert records(mine, "train", field) == pytest.approx(records(theirs, "train", field), rel=close)


def test_another_loss(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    """Train lines show it; evaluations stay cross entropy, which is as in the other run before the first update."""
    mine = train("mine", loss=smoothed)
    assert "loss: smoothed; evaluations stay cross entropy, in nats per token" in capsys.readouterr().out
    theirs = train("usual")
    assert records(mine.out_dir, "eval", "val_loss")[0] == records(theirs.out_dir, "eval", "val_loss")[0]
    assert records(mine.out_dir, "train", "loss")[0] != records(theirs.out_dir, "train", "loss")[0]
    assert records(mine.out_dir, "eval", "val_loss")[2] != records(theirs.out_dir, "eval", "val_loss")[2]
    loss = folio.evaluate(out_dir=mine.out_dir, device="cpu", dtype="float32")["loss"]
    assert mine.evaluate()["loss"] == pytest.approx(loss, rel=1e-6)


@pytest.mark.slow
def test_compiled(train: Train) -> None:
    mine, plain = (train(name, loss=smoothed, compile=c, dropout=0.0) for name, c in (("mine", True), ("plain", False)))
    assert records(mine.out_dir, "train", "loss") == pytest.approx(records(plain.out_dir, "train", "loss"), rel=1e-4)


def test_micro_steps_are_weighted_by_their_tokens(train: Train) -> None:
    """As one step of all rows."""
    runs = [
        train(str(steps), loss=smoothed, dropout=0.0, gradient_accumulation_steps=steps, batch_size=8 // steps)
        for steps in (1, 4)
    ]
    one, four = (records(run.out_dir, "train", "loss") for run in runs)
    assert one == pytest.approx(four, rel=1e-5)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda logits, targets: logits.sum(-1), "a tensor of the shape (4, 16) and type float32: must be a scalar"),
        (lambda logits, targets: 1.0, "returned float: must be a tensor"),
        (lambda logits, targets: torch.zeros(()), "without a gradient"),
        (lambda logits, targets: torch.zeros((), requires_grad=True), "does not depend on its first argument"),
        (lambda x, targets: x, "its parameters are (x, targets): the first must be named logits or hidden"),
        (lambda logits: logits, "its parameters are (logits): must be (logits, targets), (hidden, targets) or"),
        (lambda logits, targets, head: logits, "its parameters are (logits, targets, head): must be"),
        (3, "loss=int: must be a function of (logits, targets) or (hidden, targets)"),
    ],
)
def test_a_bad_loss(train: Train, tmp_path: Path, loss: Any, words: str) -> None:
    """One line, before anything is written."""
    with pytest.raises(ValueError, match=re.escape(words)) as raised:
        train("out", loss=loss)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_is_named(train: Train) -> None:
    with pytest.raises(FloatingPointError, match="lambda> or the weights that the run began with are the cause"):
        train("out", loss=lambda logits, targets: logits.sum() * torch.nan)


def test_the_users_own_error_arrives_as_it_is(train: Train) -> None:
    def broken(logits: Tensor, targets: Tensor) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        train("out", loss=broken)


def test_a_run_resumes_with_its_loss_only(train: Train, folio: Callable[..., Outcome]) -> None:
    out = train("out", loss=smoothed, max_iters=5).out_dir
    again = {"init_from": "resume", "max_iters": 10}
    for loss, words in (
        (None, "was trained with loss=smoothed: resume it in Python, with folio.train(loss=smoothed, init_from="),
        (usual, "loss=usual: the run in "),
        (functools.partial(smoothed, share=0.2), "loss=smoothed(share=0.2): the run in"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            train("out", loss=loss, **again)
    assert_refused(folio("train", f"--out_dir={out}", "--init_from=resume"), "folio.train(loss=smoothed")
    assert train("out", loss=smoothed, **again).begun == 5
    whole = train("whole", loss=smoothed).out_dir
    assert records(out, "train", "loss") == records(whole, "train", "loss")
    train("usual", max_iters=5)
    with pytest.raises(ValueError, match="was trained with cross entropy: leave the loss out"):
        train("usual", loss=smoothed, **again)
