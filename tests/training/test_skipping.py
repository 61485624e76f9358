"""Losses and gradients that are not finite, and loss spikes, in real runs: which updates are left out and counted.

The cause is a checkpoint whose embedding of one rare token is finite but overflows float32 when it is normalized: only
the batches that read this token have a loss that is not finite, and with two processes only one of them.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import SMALL, Outcome, assert_refused, python, tree
from run_results import Train, assert_same_bits, records, said, updates
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from folio import cli, files
from folio.checkpoints import find
from folio.commands import train as training
from folio.config.options import Data, TrainConfig
from folio.data.rows import Tokens
from folio.machine import flops, shares
from folio.machine.guard import WINDOW
from folio.records import run_folder
from folio.training.batches import batches
from folio.training.loop import micro_step
from folio.training.schedule import learning_rate
from folio.training.skipping import MOST_IN_A_ROW
from folio.training.start import running

Folio = Callable[..., Outcome]
BEGUN, END = 5, 20
WTE, WPE = "transformer.wte.weight", "transformer.wpe.weight"
FLAGS = [*SMALL, "--tie_weights=False", "--dropout=0.1", "--learning_rate=1e-2", "--ema_decay=0.9"]
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
RESUMED = [f"--max_iters={END}", "--lr_decay_iters=20", "--init_from=resume"]


class Damaged(NamedTuple):
    """An out_dir with a checkpoint of step 5, and the later steps whose batches read the token that overflows."""

    out: Path
    steps: list[int]


def rare_token(story: Path) -> tuple[int, list[int]]:
    """A token that at least three steps read, no two of them in a row, each on one rank only, and no evaluation."""
    tokens = Tokens.open(Data(data_dir=str(story), batch_size=4), 16, 1337)
    read = tokens.rows("train", 8 * BEGUN, 8 * (END - BEGUN))[:, :-1].reshape(-1, 2, 4 * 16)  # step, rank, token
    evaluated = {int(t) for split in ("train", "val") for t in tokens.windows(split, tokens.spread(split, 8)).ravel()}
    for token in set(range(tokens.known_vocab_size or 0)) - evaluated:
        ranks = (read == token).any(2)
        steps = np.flatnonzero(ranks.any(1)) + BEGUN
        if len(steps) >= 3 and np.diff(steps).min() > 1 and ranks.sum(1).max() == 1:
            return token, steps.tolist()
    raise AssertionError("the text has no such token")


def change(out: Path, name: str, row: int | slice, value: float) -> None:
    """Changes rows of a weight in the checkpoint of step 5, and the checksums."""
    folder = run_folder.checkpoint_folder(out, BEGUN)
    weights = load_file(folder / run_folder.MODEL)
    weights[name][row] = value
    save_file(weights, folder / run_folder.MODEL)
    reseal(folder)


def reseal(folder: Path, **changes: Any) -> None:
    state, _ = files.read_sealed(folder / run_folder.STATE)
    state["sha256"] = {name: files.sha256(folder / name) for name in (run_folder.MODEL, run_folder.OPTIMIZER)}
    files.write_sealed(folder / run_folder.STATE, state | changes)


@pytest.fixture(scope="module")
def begun(story: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Damaged]:
    """A damaged run of five steps with this optimizer; it is made once."""
    folder = tmp_path_factory.mktemp("begun")

    def made(optimizer: str) -> Damaged:
        token, steps = rare_token(story)
        out = folder / optimizer
        if not out.exists():
            argv = [*FLAGS, f"--optimizer={optimizer}", f"--max_iters={BEGUN}", f"--data_dir={story}"]
            training.main(cli.parse(training.Options, [*argv, f"--out_dir={out}"], "folio train", files=True))
            change(out, WTE, token, 3e38)
        return Damaged(out, steps)

    return made


@pytest.fixture
def damaged(begun: Callable[[str], Damaged], tmp_path: Path) -> Callable[..., Damaged]:
    """A copy of such a run, under this name."""

    def copy(name: str, optimizer: str = "adamw") -> Damaged:
        made = begun(optimizer)
        return Damaged(Path(shutil.copytree(made.out, tmp_path / name)), made.steps)

    return copy


def saved(out: Path, step: int = END) -> dict[str, Tensor]:
    folder = run_folder.checkpoint_folder(out, step)
    return load_file(folder / run_folder.MODEL) | load_file(folder / run_folder.OPTIMIZER)


def without_these_updates(out: Path, story: Path, *flags: str) -> dict[str, Tensor]:
    """The weights, moments and averages of a loop that makes no update if the loss is not finite."""
    argv = [*FLAGS, *RESUMED, f"--data_dir={story}", f"--out_dir={out}", *flags]
    with running(cli.parse(TrainConfig, argv, "folio train", files=True)) as run, batches(run) as steps:
        config = run.config.optimizer
        run.optimizer.found_inf = torch.zeros(())  # type: ignore[attr-defined]  # Muon then rounds the rate to float32
        for step in range(BEGUN, END):
            sums = sum(micro_step(run.runtime, run.loss, batch, run.tokens_per_step) for batch in next(steps))
            for group in run.optimizer.param_groups:
                group["lr"] = learning_rate(step, config)
            if math.isfinite(sums[0]):
                run.runtime.clip(run.optimizer, config.grad_clip)
                run.optimizer.step()
                shares.update_averages(run.optimizer, min(config.ema_decay, (2 + step) / (11 + step)))
            run.optimizer.zero_grad()
        weights, slots = run.runtime.full_state(run.model, run.optimizer, copy=True)
    return weights | slots


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("grad_clip", [0.0, 0.5])
def test_skip_is_a_run_without_these_updates(
    train: Train, damaged: Callable[..., Damaged], story: Path, optimizer: str, grad_clip: float
) -> None:
    """Weights, moments and averages to the bit, and the same data. The updates left out are counted and logged."""
    out, steps = damaged("out", optimizer)
    how = (f"--grad_clip={grad_clip}", f"--optimizer={optimizer}")
    train("out", *FLAGS, *RESUMED, *how, "--on_nonfinite=skip")
    assert records(out, "skipped", "step", "why") == [(step, "loss") for step in steps]
    assert [r for r, loss in records(out, "train", "step", "loss") if loss is None] == steps
    assert updates(out, END) == {float(END - len(steps))}
    state = find.choose(out, "latest").state
    assert (state["step"], state["rows"]) == (END, 8 * END)
    assert state["skipped"] == {"updates": len(steps), "in_a_row": 0, "losses": []}
    line = f"iter {steps[1]}: the loss is not finite, so its update is left out (2 updates so far)"
    assert line in said(out)
    expected = without_these_updates(damaged("other", optimizer).out, story, *how)
    for name, tensor in saved(out).items():
        assert torch.equal(tensor, expected[name]), name


def test_skip_resumes_to_the_same_bits(train: Train, damaged: Callable[..., Damaged]) -> None:
    """Also the counts."""
    whole, halves = (damaged(name).out for name in ("whole", "halves"))
    flags = [*FLAGS, *RESUMED, "--on_nonfinite=skip"]
    train("whole", *flags)
    train("halves", *flags, "--max_iters=15")
    train("halves", *flags)
    assert_same_bits(halves, whole)
    assert find.choose(halves, "latest").state["skipped"] == find.choose(whole, "latest").state["skipped"]


def test_stop_names_step_rate_and_parameter(folio: Folio, damaged: Callable[..., Damaged], story: Path) -> None:
    """The checkpoints stay as they were. It is the default."""
    out, steps = damaged("out")
    before = tree(out / "checkpoints")
    flags = [*FLAGS, *RESUMED, "--decay_lr=False", "--eval_interval=100", f"--data_dir={story}", f"--out_dir={out}"]
    outcome = folio("train", *flags)
    what = f"the loss of step {steps[0]} is not finite (learning rate 0.01; first in the gradient of {WTE})"
    remedy = "the weights that the run began with" if steps[0] == BEGUN else f"resume from step {BEGUN}"
    assert_refused(outcome, what, remedy, code=1)
    assert tree(out / "checkpoints") == before
    assert records(out, "skipped", "step") == []


@pytest.mark.parametrize(("parallel", "optimizer"), [("ddp", "adamw"), ("fsdp", "muon")])
def test_two_processes_agree(
    damaged: Callable[..., Damaged], story: Path, train: Train, parallel: str, optimizer: str
) -> None:
    """Only one of them reads the token. Both leave the update out, as one process does, and continue."""
    alone, steps = damaged("alone", optimizer)
    flags = [*FLAGS, *RESUMED, f"--optimizer={optimizer}", "--on_nonfinite=skip"]
    train("alone", *flags)
    more = [f"--parallel={parallel}", f"--check_replicas_every={int(parallel == 'ddp')}", f"--data_dir={story}"]
    both = damaged("both", optimizer).out
    done = python(*TWO, *flags, *more, f"--out_dir={both}")
    assert done.returncode == 0, done.stderr
    assert records(both, "skipped", "step") == steps == records(alone, "skipped", "step")
    assert updates(both, END) == {float(END - len(steps))}
    losses, expected = ([x for x in records(out, "train", "loss") if x is not None] for out in (both, alone))
    assert losses == pytest.approx(expected, abs=1e-4)


def test_two_processes_stop_together(damaged: Callable[..., Damaged], story: Path) -> None:
    """With the same line as one process."""
    out, steps = damaged("out")
    before = tree(out / "checkpoints")
    flags = [*FLAGS, *RESUMED, "--decay_lr=False", "--eval_interval=100", f"--data_dir={story}", f"--out_dir={out}"]
    done = python(*TWO, *flags, "--parallel=fsdp")
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
    assert f"the loss of step {steps[0]} is not finite (learning rate 0.01; first in the gradient of {WTE})" in line
    assert tree(out / "checkpoints") == before


def test_ten_in_a_row_end_the_run(folio: Folio, story: Path, tmp_path: Path) -> None:
    """With a learning rate that makes the weights useless, so that every later loss is not finite."""
    ruin = ["--learning_rate=1e30", "--decay_lr=False", "--weight_decay=0", "--eval_interval=100", "--max_iters=90"]
    outcome = folio("train", *SMALL, *ruin, "--on_nonfinite=skip", f"--data_dir={story}", f"--out_dir={tmp_path}")
    row = f"the last of {MOST_IN_A_ROW} in a row"
    assert_refused(outcome, "of step 10 is not finite", row, "lower --learning_rate", "no checkpoint yet", code=1)
    assert records(tmp_path, "skipped", "step") == list(range(1, 10))
    assert run_folder.steps(tmp_path) == []


def test_those_in_a_row_are_counted_over_a_resume(
    folio: Folio, damaged: Callable[..., Damaged], story: Path, tmp_path: Path
) -> None:
    """The run makes no update, so the error names its first weights as the cause, and after a resume an older step."""
    out = damaged("out").out
    change(out, WPE, 3, 3e38)  # every batch reads it
    good = saved(out, BEGUN)
    flags = [*FLAGS, *RESUMED, "--on_nonfinite=skip", f"--data_dir={story}", f"--out_dir={out}"]
    flags += ["--eval_interval=100", "--checkpoint_interval=7"]
    assert_refused(folio("train", *flags), "step 14 is not", "10 in a row", "the weights that the run began", code=1)
    assert run_folder.steps(out) == [5, 7, 14]
    assert all(torch.equal(tensor, good[name]) for name, tensor in saved(out, 14).items())
    outcome = folio("train", *flags)
    assert_refused(outcome, "step 14 is not", "the last of 10 in a row", "resume from step 7", code=1)


def test_spikes_are_left_out(train: Train) -> None:
    """Exactly those above the limit, computed from the logged losses; the run resumes to the same bits."""
    flags = ["--learning_rate=1e-2", "--max_iters=220", "--lr_decay_iters=220", "--eval_interval=50", "--max_loss_z=1"]
    whole, halves = train("whole", *flags), train("halves", *flags, "--max_iters=150")
    window: list[float] = []
    spikes = []
    for step, loss in records(whole, "train", "step", "loss"):
        limit = mean(window) + stdev(window) if len(window) == WINDOW else math.inf
        spikes += [(step, "spike")] * (loss > limit)
        window = [*window, min(loss, limit)][-WINDOW:]
    assert spikes
    assert records(whole, "skipped", "step", "why") == spikes
    assert updates(whole, 220) == {220.0 - len(spikes)}
    state = find.choose(whole, "latest").state["skipped"]
    assert (state["updates"], state["in_a_row"]) == (len(spikes), 0)
    assert state["losses"] == pytest.approx(window, abs=1e-5)
    assert find.choose(halves, "latest").step == 150
    train("halves", *flags, "--init_from=resume")
    assert_same_bits(halves, whole)
    assert find.choose(halves, "latest").state["skipped"] == state


def test_an_overflow_of_float16_is_not_counted(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scaler lowers its scale until the gradients fit. Until then no update is made, and no line reports it."""
    monkeypatch.setattr(flops, "peak", lambda device, dtype: None)  # slow to measure where float16 is
    flags = ("--dtype=float16", "--learning_rate=1e-2", "--ema_decay=0.9", "--eval_interval=100")
    out = train("out", *flags, "--max_iters=5")
    folder = run_folder.checkpoint_folder(out, BEGUN)
    scaler = json.loads((folder / run_folder.STATE).read_text())["scaler"]
    reseal(folder, scaler={**scaler, "scale": 2.0**60})
    before = saved(out, BEGUN)
    train("out", *flags, "--init_from=resume", "--max_iters=10")
    state = find.choose(out, "latest").state
    assert (state["scaler"]["scale"], state["skipped"]["updates"]) == (2.0**55, 0)
    assert records(out, "skipped", "step") == []
    assert [step for step, norm in records(out, "train", "step", "grad_norm") if norm is None] == list(range(5, 10))
    assert all(torch.equal(tensor, before[name]) for name, tensor in saved(out, 10).items())


def test_another_optimizer_is_guarded_too(folio: Folio, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """One without a fused kernel, as CONTRIBUTING.md adds it."""

    def sgd(config: Any, model: nn.Module, dtype: torch.dtype) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=config.learning_rate, momentum=0.9)

    monkeypatch.setattr("folio.training.optimizers.optimizer", sgd)
    ruin = ["--learning_rate=1e20", "--decay_lr=False", "--grad_clip=0", "--eval_interval=100", "--max_iters=90"]
    out = train("out", *ruin, "--on_nonfinite=skip", code=1)
    assert records(out, "skipped", "step") == list(range(1, 10))
