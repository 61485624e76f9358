"""AdamW's parameter groups, other optimizers, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, assert_refused
from safetensors.torch import load_file

from folio import cli
from folio.checkpoints import find
from folio.commands import train
from folio.config.options import Optimizer
from folio.errors import UserError
from folio.machine.runtime import Runtime
from folio.model.config import GPTConfig
from folio.model.gpt import GPT
from folio.records import run_folder
from folio.records.metrics import read_metrics
from folio.training import loop, optimizers
from folio.training.optimizers import adamw, check_first_update, optimizer
from folio.training.schedule import learning_rate


def _model(**shape: object) -> GPT:
    return GPT(GPTConfig(**{"block_size": 8, "vocab_size": 11, "n_layer": 2, "n_head": 2, "n_embd": 8, **shape}))


def _nanogpt(step: int, o: Optimizer) -> float:
    """nanoGPT's schedule, written anew."""
    if step < o.warmup_iters:
        return o.learning_rate * (step + 1) / (o.warmup_iters + 1)
    if step > o.lr_decay_iters:
        return o.min_lr
    share = (step - o.warmup_iters) / (o.lr_decay_iters - o.warmup_iters)
    return o.min_lr + (o.learning_rate - o.min_lr) * (1 + math.cos(math.pi * share)) / 2


@pytest.mark.parametrize("tied", [True, False])
def test_matrices_decay_and_vectors_do_not(tied: bool) -> None:
    """Embeddings and products decay, biases and norms do not, and a tied head is there once."""
    model = _model(tie_weights=tied)
    decayed, kept = adamw(model, 1e-3, (0.8, 0.9), 0.3).param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)
    names = {p: name for name, p in model.named_parameters()}
    assert all(p.dim() >= 2 for p in decayed["params"])
    assert all(names[p].endswith("bias") or ".ln_" in names[p] for p in kept["params"])
    assert sorted(names[p] for p in decayed["params"] + kept["params"]) == sorted(names.values())


def test_the_fused_kernel_is_used_on_a_cpu() -> None:
    """With the options as given."""
    found = adamw(_model(), 1e-3, (0.8, 0.9), 0.3)
    assert found.defaults["fused"] is True
    assert (found.defaults["lr"], found.defaults["betas"]) == (1e-3, (0.8, 0.9))


def test_the_runs_optimizer_follows_its_options() -> None:
    made = optimizer(Optimizer(learning_rate=1e-2, beta1=0.8, beta2=0.9, weight_decay=0.3), _model(), torch.float32)
    assert (made.defaults["lr"], made.defaults["betas"]) == (1e-2, (0.8, 0.9))
    assert [group["weight_decay"] for group in made.param_groups] == [0.3, 0.0]


def test_frozen_parameters_are_left_out() -> None:
    """What needs no gradient has no optimizer state."""
    model = _model()
    model.transformer.wpe.weight.requires_grad_(False)
    params = [p for group in adamw(model, 1e-3, (0.9, 0.95), 0.1).param_groups for p in group["params"]]
    assert not any(p is model.transformer.wpe.weight for p in params)


def test_an_update_is_adamws() -> None:
    """One step from zero moments: decay by lr · wd, then lr in the direction of the gradient's sign."""
    model = _model()
    found = adamw(model, 0.01, (0.9, 0.95), 0.5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    found.step()
    for name, p in model.named_parameters():
        decayed = before[name] * (1 - 0.01 * 0.5) if p.dim() >= 2 else before[name]
        torch.testing.assert_close(p, decayed - 0.01)


def test_the_schedule_at_chosen_steps() -> None:
    """Warm-up reaches the highest rate in its last step; the cosine starts there and ends at min_lr."""
    o = Optimizer(learning_rate=1.0, min_lr=0.1, warmup_iters=10, lr_decay_iters=110)
    expected = {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 60: 0.55, 110: 0.1, 111: 0.1, 10**9: 0.1}
    assert {step: learning_rate(step, o) for step in expected} == pytest.approx(expected)
    rates = [learning_rate(step, o) for step in range(10, 111)]
    assert rates == sorted(rates, reverse=True)


def test_the_schedules_fall_as_they_say() -> None:
    """linear falls evenly; wsd stays at the highest rate, and falls evenly over the last 20 %, or its decay_share."""
    expected = {
        "linear": {9: 1.0, 10: 1.0, 60: 0.55, 109: 0.109, 110: 0.1, 10**9: 0.1},
        "wsd": {0: 0.1, 9: 1.0, 10: 1.0, 90: 1.0, 91: 0.955, 100: 0.55, 110: 0.1, 111: 0.1},
    }
    o = Optimizer(learning_rate=1.0, min_lr=0.1, warmup_iters=10, lr_decay_iters=110)
    for schedule, rates in expected.items():
        found = {step: learning_rate(step, replace(o, schedule=schedule)) for step in rates}
        assert found == pytest.approx(rates)
    whole, linear = replace(o, schedule="wsd", decay_share=1.0), replace(o, schedule="linear")
    assert [learning_rate(i, whole) for i in range(120)] == [learning_rate(i, linear) for i in range(120)]


def test_nanogpts_schedule() -> None:
    """warmup=nanogpt is nanoGPT's formula at every step."""
    o = Optimizer(learning_rate=6e-4, min_lr=6e-5, warmup_iters=7, lr_decay_iters=40, warmup="nanogpt")
    assert [learning_rate(i, o) for i in range(60)] == pytest.approx([_nanogpt(i, o) for i in range(60)], rel=1e-12)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("warmup", ["folio", "nanogpt"])
@pytest.mark.parametrize(("warmup_iters", "lr_decay_iters"), [(5, 5), (0, 0), (0, 1), (6, 5)])
def test_no_schedule_divides_by_zero(warmup: str, warmup_iters: int, lr_decay_iters: int, schedule: str) -> None:
    """Also where warm-up ends as the decay does, or later."""
    how: dict[str, Any] = {"warmup": warmup, "schedule": schedule}
    o = Optimizer(warmup_iters=warmup_iters, lr_decay_iters=lr_decay_iters, **how)
    rates = [learning_rate(step, o) for step in range(10)]
    assert all(0 < rate <= o.learning_rate for rate in rates)
    assert rates[-1] == o.min_lr


def test_a_constant_rate() -> None:
    """decay_lr=False has neither warm-up nor decay."""
    o = Optimizer(decay_lr=False)
    assert {learning_rate(step, o) for step in (0, 1, 5000, 10**7)} == {o.learning_rate}


# The average of the weights


def test_the_average_follows_the_weights(story: Path, tmp_path: Path) -> None:
    """A(t) = d A(t − 1) + (1 − d) W(t) with d = ema_decay, or (1 + t) / (10 + t) if that is less."""
    argv = [*SMALL, f"--data_dir={story}", f"--out_dir={tmp_path}", "--learning_rate=1e-2", "--max_iters=6"]
    argv += ["--ema_decay=0.4", "--checkpoint_interval=1", "--keep_checkpoints=9"]
    assert train.main(cli.parse(train.Options, argv, "folio train", files=True)) == 0
    average = 0.0
    for t in range(1, 7):
        found = find.choose(tmp_path, str(t))
        weight, kept = (
            dict(found.with_weights(which).weights())["transformer.wte.weight"] for which in ("trained", "ema")
        )
        decay = min(0.4, (1 + t) / (10 + t)) if t > 1 else 0.0
        average = decay * average + (1 - decay) * weight
        torch.testing.assert_close(kept, average)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_run_measures_saves_and_resumes_the_average(folio: Any, story: Path, tmp_path: Path, kind: str) -> None:
    """It trains in the bits of a run without one; folio eval --weights=ema finds the loss that was measured."""
    argv = ["train", *SMALL, f"--data_dir={story}", "--dropout=0.1", "--learning_rate=1e-2", f"--optimizer={kind}"]
    flags = [f"--data_dir={story}", "--device=cpu", "--dtype=float32", "--eval_iters=2", "--batch_size=4"]
    ema = "--ema_decay=0.5"
    calls = [("plain", "--max_iters=10"), ("whole", "--max_iters=10", ema), ("halves", "--max_iters=5", ema)]
    for out, *more in (*calls, ("halves", "--init_from=resume", "--max_iters=10")):
        assert folio(*argv, f"--out_dir={tmp_path / out}", *more).code == 0
    read = {
        (out, name): (run_folder.checkpoint_folder(tmp_path / out, 10) / name).read_bytes()
        for out in ("plain", "whole", "halves")
        for name in (run_folder.MODEL, run_folder.OPTIMIZER)
    }
    assert read["whole", run_folder.OPTIMIZER] == read["halves", run_folder.OPTIMIZER]
    assert read["plain", run_folder.MODEL] == read["whole", run_folder.MODEL] == read["halves", run_folder.MODEL]
    of = {
        kind: {
            r["step"]: r["val_loss"] for r in read_metrics(tmp_path / "whole" / run_folder.METRICS) if r["kind"] == kind
        }
        for kind in ("eval", "ema")
    }
    assert list(of["ema"]) == [5, 10]
    for weights, measured in (("trained", of["eval"][10]), ("ema", of["ema"][10])):
        where = [f"--out_dir={tmp_path / 'whole'}", "--checkpoint=10", f"--weights={weights}"]
        assert f"val loss {measured:.4f}" in folio("eval", *where, *flags).out
    assert of["ema"][10] != of["eval"][10]
    exported = [f"--weights={weights} --to={tmp_path / weights}".split() for weights in ("trained", "ema")]
    for more in exported:
        assert folio("export", f"--out_dir={tmp_path / 'whole'}", *more).code == 0
    files = [(tmp_path / weights / "model.safetensors").read_bytes() for weights in ("trained", "ema")]
    assert files[0] != files[1]
    outcome = folio("sample", f"--out_dir={tmp_path / 'plain'}", "--weights=ema", "--device=cpu")
    assert_refused(outcome, "there is no moving average of the weights", "use --weights=trained")


def test_the_average_waits_for_no_step(folio: Any, story: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Losses are read when they are read without it: after the next step has been sent to the device."""
    order: list[str] = []

    def noted(name: str, function: Any) -> Any:
        return lambda *args, **kwargs: order.append(name) or function(*args, **kwargs)

    read_later = loop.read_later
    monkeypatch.setattr(loop, "read_later", lambda tensor: noted("read", read_later(tensor)))
    monkeypatch.setattr(Runtime, "step", noted("step", Runtime.step))
    seen = []
    for decay in ("0", "0.9"):
        argv = [*SMALL, f"--data_dir={story}", f"--out_dir={tmp_path / decay}", "--max_iters=6"]
        assert folio("train", *argv, "--eval_interval=3", f"--ema_decay={decay}").code == 0
        seen.append(" ".join(order))
        order.clear()
    assert seen[0] == seen[1] == "step step read step read read step step read step read read"


def test_a_run_that_resumes_without_the_average_drops_it(folio: Any, story: Path, tmp_path: Path) -> None:
    """An average that no longer follows would be a wrong one."""
    argv = ["train", *SMALL, f"--data_dir={story}", f"--out_dir={tmp_path}"]
    assert folio(*argv, "--max_iters=5", "--ema_decay=0.9").code == 0
    assert folio(*argv, "--max_iters=10", "--init_from=resume", "--ema_decay=0").code == 0
    five, ten = (load_file(run_folder.checkpoint_folder(tmp_path, n) / run_folder.OPTIMIZER) for n in (5, 10))
    assert {name.rsplit("/")[-1] for name in five.keys() - ten.keys()} == {"average"}


# Another optimizer


class Lion(torch.optim.Optimizer):
    """A small optimizer that keeps its mean of the gradients, and what ``keep`` adds."""

    def __init__(self, model: GPT, keep: Callable[[Lion, torch.nn.Parameter], None] = lambda made, p: None) -> None:
        super().__init__(model.parameters(), {"lr": 1e-3, "k": 0})
        self.keep = keep

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                p -= group["lr"] * (mean.mul_(0.9).add_(p.grad, alpha=0.1)).sign()
                self.keep(self, p)


def _update(made: torch.optim.Optimizer, model: GPT) -> None:
    check_first_update(made)
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        made.step()


@pytest.mark.parametrize("kind", [Lion, torch.optim.SGD, torch.optim.Adafactor, torch.optim.Adagrad, torch.optim.NAdam])
def test_an_optimizer_with_tensors_for_each_parameter_is_accepted(kind: type[Any]) -> None:
    model = _model()
    _update(kind(model if kind is Lion else model.parameters()), model)


@pytest.mark.parametrize(
    ("keep", "what"),
    [
        (lambda made, p: made.state[p].update(count=1), "'count'"),
        (lambda made, p: made.state.update(shared={"mean": torch.ones(1)}), "'shared'"),
        (lambda made, p: made.param_groups[0].update(k=made.param_groups[0]["k"] + 1), "'k'"),
    ],
)
def test_an_optimizer_that_keeps_more_than_a_checkpoint_holds_is_refused(keep: Callable[..., None], what: str) -> None:
    """After its first update, so that no resumed run continues without it."""
    model = _model()
    with pytest.raises(UserError, match=f"^Lion keeps {what} outside of what checkpoints save"):
        _update(Lion(model, keep), model)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adafactor])
def test_another_optimizer_resumes_with_the_same_bits(
    folio: Any, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Any]
) -> None:
    """A run of 10 steps, and one that ended at step 5; AdamW's checkpoint gives it no state, and a note says so."""
    more = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    argv = ["train", *SMALL, f"--data_dir={story}", "--dropout=0.1", "--learning_rate=1e-2"]
    assert folio(*argv, f"--out_dir={tmp_path / 'adamw'}", "--max_iters=5").code == 0
    monkeypatch.setattr(optimizers, "optimizer", lambda config, model, dtype: kind(model.parameters(), **more))
    for out, *flags in (("whole", "--max_iters=10"), ("halves", "--max_iters=5"), ("halves", "--init_from=resume")):
        assert folio(*argv, f"--out_dir={tmp_path / out}", *flags).code == 0
    for name in (run_folder.MODEL, run_folder.OPTIMIZER):
        whole, halves = (run_folder.checkpoint_folder(tmp_path / out, 10) / name for out in ("whole", "halves"))
        assert whole.read_bytes() == halves.read_bytes()
    outcome = folio(*argv, f"--out_dir={tmp_path / 'adamw'}", "--init_from=resume")
    assert f"optimizer is AdamW, that of this run {kind.__name__}: its state starts from zero" in outcome.out
    assert outcome.code == 0
