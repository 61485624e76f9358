"""CUDA graphs: steps that are replayed are those that are called. On a CPU the functions run without the recording."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, python
from run_results import Train, assert_same_bits, records
from torch import Tensor

from folio import rng
from folio.config.options import Optimizer, System
from folio.machine import choices, graphs
from folio.machine.graphs import RecordingError, Replay, StepGraphs
from folio.machine.guard import Guard
from folio.machine.runtime import Runtime
from folio.model.config import GPTConfig
from folio.model.gpt import GPT
from folio.training import start
from folio.training.optimizers import adamw, muon

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SHAPE = GPTConfig(block_size=16, vocab_size=19, n_layer=2, n_head=2, n_embd=16, dropout=0.1)
RECIPE = {"position": "rope", "norm": "unweighted", "activation": "relu2", "qk_norm": True, "logit_softcap": 15.0}
RECIPE |= {"token_shift": 2, "tie_weights": False, "zero_init": True, "bias": False}


class Steps:
    """Updates of a small model, as the training loop makes them."""

    def __init__(
        self,
        device: str,
        graphed: bool,
        optimizer: Callable[[GPT], torch.optim.Optimizer] | None = None,
        dtype: str = "float32",
        shape: GPTConfig = SHAPE,
        compiled: bool = False,
    ) -> None:
        system = System(device=device, dtype=dtype, compile=compiled, matmul_precision="highest")
        self.runtime = Runtime(replace(choices.resolve(system), graphs=graphed))
        self.model = GPT(shape, rng.generator)
        self.wrapped, self.factor = self.runtime.wrap(self.model, (4, 16)), torch.ones((), device=device)
        self.optimizer = optimizer(self.model) if optimizer else adamw(self.model, 1e-2, (0.9, 0.95), 0.1)
        self.runtime.use_graphs(self.optimizer)

    def loss(self, idx: Tensor, targets: Tensor, documents: Tensor | None = None) -> tuple[Tensor, Tensor]:
        nats, counted = self.wrapped(idx, targets)
        return nats * self.factor, counted

    def __call__(self, number: int, micro_steps: int = 2, rows: int = 4) -> tuple[float, float]:
        """The loss and the norm of one update."""
        sums = torch.zeros(2, device=self.runtime.device)
        for micro in range(micro_steps):
            ids = torch.randint(19, (rows, 17), generator=rng.generator("rows", number, micro))
            ids = self.runtime.move(ids)
            self.runtime.seed(rng.key("dropout", number, micro))
            sums += self.runtime.differentiate(self.loss, ids[:, :-1], ids[:, 1:], None, scale=0.01)
        norm = self.runtime.step(self.optimizer, 1e-2 / (1 + number), 1.0, sums)[1]
        return sums[0].item(), norm.item()

    def state(self) -> dict[str, Tensor]:
        weights, slots = self.runtime.full_state(self.model, self.optimizer, copy=True)
        return weights | slots


def assert_equal(one: Steps, other: Steps) -> None:
    for (name, here), there in zip(one.state().items(), other.state().values(), strict=True):
        torch.testing.assert_close(here, there, rtol=1e-6, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("micro_steps", [1, 2, 3])
def test_replayed_steps_are_called_steps(device: str, micro_steps: int) -> None:
    """Losses, norms, weights and moments, with dropout, clipping, several micro steps and a changing learning rate.

    The learning rate is rounded to float32 where graphs read it.
    """
    plain, graphed = Steps(device, False), Steps(device, True)
    for number in range(4):
        assert graphed(number, micro_steps) == pytest.approx(plain(number, micro_steps), rel=1e-5)
    assert_equal(graphed, plain)
    assert {float(t) for name, t in graphed.state().items() if name.endswith("/step")} == {4.0}


def _muon(model: GPT) -> torch.optim.Optimizer:
    return muon(model, Optimizer(optimizer="muon", learning_rate=1e-2, adam_learning_rate=3e-3), torch.float32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", [{}, RECIPE], ids=["gpt2", "recipe"])
def test_replayed_steps_of_muon(device: str, options: dict[str, Any]) -> None:
    """It is recorded too, with its two learning rates, and so are the model's options beside GPT-2's."""
    shape = replace(SHAPE, **options)
    plain, graphed = (Steps(device, on, _muon, shape=shape) for on in (False, True))
    for number in range(10):
        assert graphed(number) == pytest.approx(plain(number), rel=1e-4)
    for name, here in graphed.state().items():
        torch.testing.assert_close(here, plain.state()[name], rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
def test_compiled_steps_of_the_recipe() -> None:
    """Compiled, in bfloat16 and in graphs, its losses are near those of the plain steps in float32, and fall."""
    shape = replace(SHAPE, **RECIPE, dropout=0.0)
    plain = Steps("cuda", False, _muon, shape=shape)
    fast = Steps("cuda", True, _muon, "bfloat16", shape, compiled=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "torch.compile failed|CUDA graphs failed")
        losses = [(plain(0)[0], fast(0)[0]) for _ in range(12)]
    assert losses[-1][0] < 0.95 * losses[0][0]
    assert all(one == pytest.approx(other, rel=2e-2) for one, other in losses)


@pytest.mark.parametrize("device", DEVICES)
def test_replays_compute_in_the_newest_weights(device: str) -> None:
    """In bfloat16 the model computes in a copy of the weights, which each update renews outside the graphs."""
    plain, graphed = Steps(device, False, dtype="bfloat16"), Steps(device, True, dtype="bfloat16")
    assert graphed.runtime.choices.weight_copy
    losses = [(plain(0)[0], graphed(0)[0]) for _ in range(12)]
    assert losses[-1][0] < 0.9 * losses[0][0]
    assert all(one == pytest.approx(other, rel=1e-2) for one, other in losses)


@pytest.mark.parametrize("device", DEVICES)
def test_a_replay_has_new_arguments_and_one_result(device: str) -> None:
    here = torch.device(device)
    replay = Replay(lambda x, y: x @ y, torch.zeros(2, 2, device=here), torch.zeros(2, device=here))
    graphs.Recorder(here).record(replay, replay.run)
    first = replay(torch.eye(2, device=here), torch.tensor([1.0, 2.0], device=here))
    assert first.tolist() == [1, 2]
    assert replay(2 * torch.eye(2, device=here), torch.tensor([1.0, 2.0], device=here)) is first
    assert first.tolist() == [2, 4]
    assert not replay.takes(torch.zeros(3, 3), torch.zeros(2))


@pytest.mark.gpu
def test_each_replay_draws_by_its_seed() -> None:
    """The generator's seed at the replay counts, not that of the recording, which leaves the generator as it was."""
    device = torch.device("cuda")
    torch.cuda.manual_seed(5)
    wanted = torch.rand(3, device=device).tolist()
    torch.cuda.manual_seed(5)
    replay = Replay(lambda x: torch.rand_like(x), torch.zeros(3, device=device))
    graphs.Recorder(device).record(replay, replay.run)
    assert torch.rand(3, device=device).tolist() == wanted
    seen = []
    for seed in (1, 2, 1):
        torch.cuda.manual_seed(seed)
        seen.append(replay(torch.zeros(3, device=device)).tolist())
    assert seen[0] == seen[2] != seen[1]


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_is_updated_after_a_loss_that_is_not_finite(device: str) -> None:
    steps = Steps(device, True)
    steps(0)
    good = steps.state()
    steps.factor.fill_(torch.inf)
    assert not math.isfinite(steps(1)[1])
    steps.factor.fill_(1)
    steps(2)
    assert all(torch.equal(here, good[name]) for name, here in steps.state().items())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("optimizer", [None, _muon], ids=["adamw", "muon"])
def test_updates_that_are_left_out(device: str, optimizer: Any) -> None:
    """For a loss that is not finite, and for a spike: the other steps are those of a run without them."""
    plain, graphed = Steps(device, False, optimizer), Steps(device, True, optimizer)
    for steps in (plain, graphed):
        steps.runtime.guard = Guard(steps.runtime.device, False, skips=True, max_z=100.0)
        steps.runtime.guard.restore([2.9, 2.91] * 64)
    for number, factor in enumerate([1.0, math.inf, 1.0, 2.0, 1.0]):
        graphed.factor.fill_(factor)
        found = graphed(number)
        assert graphed.runtime.left_out == (factor != 1)
        assert factor != 1 or found == pytest.approx(plain(number), rel=1e-4)
    for name, here in graphed.state().items():
        torch.testing.assert_close(here, plain.state()[name], rtol=1e-3, atol=1e-5)
    usual, seen = plain.runtime.guard.losses(), graphed.runtime.guard.losses()
    assert len(seen) == len(usual) == 128
    assert seen[-2] < 2 * usual[-2]  # the spike, as the limit


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("at", [0, 1])
def test_a_shape_that_changes_warns_once(device: str, at: int) -> None:
    """And from then on steps are called, with the same results: also where the shape changes within a step."""
    plain, graphed = Steps(device, False), Steps(device, True)
    for number in range(4):
        rows = 3 if number > at else 4
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            found = graphed(number, rows=rows)
        assert [str(w.message).split(":")[0] for w in seen] == (
            ["CUDA graphs failed, continuing without them"] if number == at + 1 else []
        )
        assert found == pytest.approx(plain(number, rows=rows), rel=1e-5)
    assert_equal(graphed, plain)


@pytest.mark.parametrize("device", DEVICES)
def test_graphs_that_end_leave_no_trace(device: str) -> None:
    """The gradients of the last replay are not added to those of the next step."""
    plain, graphed = Steps(device, False), Steps(device, True)
    for number in range(4):
        if number == 2:
            graphed.runtime.stop_graphs()
        assert graphed(number) == pytest.approx(plain(number), rel=1e-5)
    assert_equal(graphed, plain)


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_a_recording_that_fails_warns_once(monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    """The first micro step's, a later one's or the update's; the results are those without graphs."""
    count = 0

    def record(self: Any, replay: Replay, warm_up: object) -> None:
        nonlocal count
        count += 1
        if count == failing:
            raise RecordingError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs.Recorder, "record", record)
    plain, graphed = Steps("cpu", False), Steps("cpu", True)
    with pytest.warns(
        UserWarning, match="CUDA graphs failed, continuing without them: operation not permitted"
    ) as seen:
        found = [graphed(number) for number in range(3)]
    assert len(seen) == 1
    assert found == [pytest.approx(plain(number), rel=1e-5) for number in range(3)]
    assert_equal(graphed, plain)


@pytest.mark.gpu
def test_a_function_that_waits_cannot_be_recorded() -> None:
    """The device can be used afterwards, random numbers too, and another function recorded."""
    device = torch.device("cuda")
    waits = Replay(lambda x: x * torch.rand_like(x).sum().item(), torch.ones(3, device=device))
    with pytest.raises(RecordingError):
        graphs.Recorder(device).record(waits, waits.run)
    assert torch.rand(3, device=device).sum().item() > 0
    twice = Replay(lambda x: 2 * x, torch.ones(3, device=device))
    graphs.Recorder(device).record(twice, twice.run)
    assert twice(torch.ones(3, device=device)).tolist() == [2, 2, 2]


def test_the_warm_up_of_an_update_changes_nothing() -> None:
    """Two calls before the recording leave weights, moments, gradients and counts as they are."""
    plain, graphed = Steps("cpu", False), Steps("cpu", True)
    plain(0), graphed(0)
    update = StepGraphs.update

    def warmed(self: StepGraphs, function: Any, loss: Tensor, warm_up: Callable[[Tensor], object]) -> Tensor:
        warm_up(loss)
        warm_up(loss)
        return update(self, function, loss, warm_up)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepGraphs, "update", warmed)
        assert graphed(1) == pytest.approx(plain(1), rel=1e-6)
    assert_equal(graphed, plain)


def test_another_optimizer_has_no_graphs() -> None:
    """Its kernels may not be recordable, nor skip an update that is not finite."""

    def sgd(model: GPT) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)

    plain, other = Steps("cpu", False, sgd), Steps("cpu", True, sgd)
    assert [other(number) for number in range(2)] == [plain(number) for number in range(2)]


# Runs


@pytest.fixture
def graphed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in this process choose graphs, whose functions are called on a CPU."""

    def resolve(*args: Any, **kwargs: Any) -> choices.Choices:
        return replace(choices.resolve(*args, **kwargs), graphs=True)

    monkeypatch.setattr(start, "resolve", resolve)


def test_a_run_with_graphs(train: Train, monkeypatch: pytest.MonkeyPatch, graphed: None) -> None:
    """Its losses are those of a run without; resumed, it ends in the same bits; a profile does not change them."""
    flags = ("--dropout=0.1", "--learning_rate=1e-2")
    whole, half = train("whole", *flags), train("half", *flags, "--max_iters=5")
    resumed = train("half", *flags, "--init_from=resume")
    assert records(resumed, "start", "graphs") == [True, True]
    assert_same_bits(whole, resumed)
    assert half == resumed
    assert records(train("profiled", *flags, "--profile=3"), "train", "loss") == records(whole, "train", "loss")
    monkeypatch.undo()


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", [False, True])
def test_a_run_on_a_gpu_resumes_to_the_same_bits(story: Path, tmp_path: Path, recipe: bool) -> None:
    """With --deterministic=True, from a checkpoint within the run; benchmarks/gpu.py tries a compiled one."""
    argv = [*SMALL, "--device=cuda", "--dtype=bfloat16", "--compile=False", "--deterministic=True", "--dropout=0.1"]
    if recipe:
        argv += [*(f"--{name}={value}" for name, value in RECIPE.items()), "--optimizer=muon", "--ema_decay=0.9"]

    def train(name: str, *more: str) -> Path:
        done = python("-m", "folio", "train", *argv, *more, f"--data_dir={story}", f"--out_dir={tmp_path / name}")
        assert done.returncode == 0, done.stderr
        assert "CUDA graphs failed" not in done.stderr
        return tmp_path / name

    whole = train("whole")
    train("half", "--max_iters=5")
    assert_same_bits(whole, train("half", "--init_from=resume"))
