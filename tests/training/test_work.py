"""The work between updates: its steps, its records, and the checkpoints that are kept."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from conftest import Outcome, tree
from run_results import Train, records, said, timeless, updates

from folio.checkpoints import find
from folio.records import run_folder
from folio.records.metrics import read_metrics

Folio = Callable[..., Outcome]


@pytest.mark.parametrize(
    ("flags", "trained", "evaluated", "kept"),
    [
        ([], range(10), [0, 5, 10], [5, 10]),
        (["--max_iters=12"], range(12), [0, 5, 10, 12], [10, 12]),
        (["--max_iters=3", "--log_interval=2"], [0, 2], [0, 3], [3]),
        (["--eval_interval=4", "--keep_checkpoints=9"], range(10), [0, 4, 8, 10], [4, 8, 10]),
        (["--eval_interval=10", "--checkpoint_interval=3", "--keep_checkpoints=9"], range(10), [0, 10], [3, 6, 9, 10]),
        (["--keep_checkpoints=1"], range(10), [0, 5, 10], [10]),
        (["--max_iters=0"], [], [0], []),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value and isinstance(value[0], str) else "",
)
def test_steps(train: Train, flags: list[str], trained: Sequence[int], evaluated: list[int], kept: list[int]) -> None:
    """Step N is N updates done: max_iters of them, evaluated at 0, at every interval and at the end."""
    out = train("out", "--learning_rate=1e-2", *flags)
    assert records(out, "train", "step") == list(trained)
    assert records(out, "eval", "step") == evaluated
    assert run_folder.steps(out) == kept
    if kept:
        assert updates(out, kept[-1]) == {float(evaluated[-1])}
        state = find.choose(out, "latest").state
        assert (state["step"], state["rows"], state["tokens"]) == (kept[-1], 8 * kept[-1], 128 * kept[-1])


def test_records(train: Train) -> None:
    """A start, then train and eval lines with their fields; tokens are those seen so far."""
    out = train("out", "--learning_rate=1e-2")
    found = read_metrics(out / "metrics.jsonl")
    assert found[0]["kind"] == "start"
    assert found[0]["dtype"] == "float32"
    assert found[0]["tokens_per_iteration"] == 128
    fields = {"kind", "step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "mfu", "seconds"}
    assert all(set(r) == fields for r in found if r["kind"] == "train")
    assert all({"kind", "step", "train_loss", "val_loss"} <= set(r) for r in found if r["kind"] == "eval")
    assert records(out, "train", "tokens") == [128 * (n + 1) for n in range(10)]
    assert records(out, "train", "lr")[:3] == pytest.approx([5e-3, 1e-2, 1e-2])
    times = [r["seconds"] for r in found if "seconds" in r]
    assert times == sorted(times)
    best = json.loads((out / "best.json").read_text())
    assert (best["step"], best["loss"]) == min(records(out, "eval", "step", "val_loss")[1:], key=lambda r: r[1])


def test_lines_are_nanogpts(train: Train) -> None:
    """Scripts that read nanoGPT's output read ours."""
    out = train("out", "--max_iters=12")
    lines = said(out)
    assert lines[0] == "tokens per iteration will be: 128"
    numbers = r"\d+\.\d{4}"
    evals = [line for line in lines if line.startswith("step ") and "loss" in line and "best" not in line]
    iters = [line for line in lines if line.startswith("iter ")]
    assert [line.split(":")[0] for line in evals] == ["step 0", "step 5", "step 10", "step 12"]
    assert [line.split(":")[0] for line in iters] == [f"iter {n}" for n in range(12)]
    assert all(re.fullmatch(rf"step \d+: train loss {numbers}, val loss {numbers}", line) for line in evals)
    pattern = rf"iter \d+: loss {numbers}, time \d+\.\d\dms(, mfu \d+\.\d\d%)?"
    assert all(re.fullmatch(pattern, line) for line in iters)
    assert f"saving checkpoint to {run_folder.checkpoint_folder(out, 5)}" in lines
    assert re.fullmatch(r"number of parameters: \d+\.\d\dM", lines[2])


def test_without_monitor_only_files_get_records(train: Train) -> None:
    loud, still = train("loud"), train("still", "--no-monitor")
    assert timeless(still) == timeless(loud)
    assert [line for line in said(still) if line.startswith(("iter", "step 5"))] == []
    assert "number of parameters: 0.01M" in said(still)


def test_eval_only_writes_nothing(train: Train) -> None:
    """It prints the loss of new weights, or of the latest checkpoint."""
    out = train("out", "--eval_only=True")
    assert not out.exists()
    assert re.match(r"step 0: train loss 4\.\d+, val loss 4\.", said(out)[-1])
    train("out")
    before, line = tree(out), next(line for line in said(out) if line.startswith("step 10: "))
    train("out", "--eval_only=True", "--init_from=resume")
    assert line in said(out)
    assert tree(out) == before


def test_the_best_and_the_latest_are_kept(train: Train) -> None:
    """always_save_checkpoint=False keeps these two when the loss rises again; sampling uses the best."""
    out = train("out", "--learning_rate=1e-2")
    ruin = ("--learning_rate=3.0", "--decay_lr=False", "--always_save_checkpoint=False", "--max_iters=25")
    train("out", "--init_from=resume", *ruin)
    assert run_folder.steps(out) == [10, 25]
    assert json.loads((out / "best.json").read_text())["step"] == 10
    assert find.choose(out).step == 10
    assert find.choose(out, "latest").state["evaluations_without_improvement"] == 3


def test_the_first_evaluation_is_never_the_best(train: Train) -> None:
    """Its weights are untrained and no checkpoint has them, however large the later losses are."""
    out = train("out", "--learning_rate=3.0", "--decay_lr=False")
    steps = records(out, "eval", "step", "val_loss")
    assert min(steps, key=lambda r: r[1])[0] == 0
    best = json.loads((out / "best.json").read_text())
    assert (best["step"], best["loss"]) == min(steps[1:], key=lambda r: r[1])


def test_keep_checkpoints_spares_the_best(train: Train) -> None:
    """It keeps the newest two, and the best too."""
    out = train("out", "--learning_rate=1e-2")
    train("out", "--init_from=resume", "--learning_rate=3.0", "--decay_lr=False", "--max_iters=25")
    assert run_folder.steps(out) == [10, 20, 25]


def test_losses_that_are_not_finite(folio: Folio, train: Train, story: Path) -> None:
    """Exit code 1 and one line; earlier checkpoints stay, and their weights are finite."""
    out = train("out", "--max_iters=5", "--eval_interval=100", "--checkpoint_interval=5")
    ruin = ("--learning_rate=1e30", "--decay_lr=False", "--grad_clip=0", "--max_iters=50", "--checkpoint_interval=1")
    outcome = folio("train", f"--data_dir={story}", f"--out_dir={out}", "--init_from=resume", *ruin)
    assert (outcome.code, outcome.err.count("\n")) == (1, 1)
    assert re.search(
        r"the (loss|gradient) of step \d+ is not finite.*lower --learning_rate, or resume from step \d+", outcome.err
    )
    found = find.choose(out, "latest")
    assert f"resume from step {found.step}\n" in outcome.err
    assert all(weight.isfinite().all() for _, weight in found.weights())
