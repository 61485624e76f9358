"""Muon's updates are torch's; none follows a loss that is not finite; runs resume to the same bits."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL
from safetensors.torch import load_file
from torch import Tensor, nn

from folio import cli, rng
from folio.config.compose import check
from folio.config.options import Optimizer, System, TrainConfig
from folio.errors import UserError
from folio.machine.choices import resolve
from folio.machine.runtime import Runtime
from folio.model.config import GPTConfig
from folio.model.gpt import GPT
from folio.records import run_folder
from folio.records.metrics import read_metrics
from folio.training.muon import NEWTON_SCHULZ, Muon, orthogonalize
from folio.training.optimizers import check_first_update, muon

CONFIG = Optimizer(optimizer="muon", learning_rate=1e-2, weight_decay=0.3, beta1=0.8, beta2=0.9)


def _model() -> GPT:
    return GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=24))


def _gradients(model: nn.Module, step: int) -> None:
    for name, p in model.named_parameters():
        p.grad = torch.randn(p.shape, generator=rng.generator("gradients", step, name))


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 60, 16), (2, 16, 60), (0, 4, 8)])
def test_singular_values_become_about_one(shape: tuple[int, int, int]) -> None:
    """Jordan's polynomials bring them into 0.7 … 1.2, and keep the singular vectors."""
    matrices = torch.randn(shape, generator=rng.generator("matrices"))
    found = orthogonalize(matrices, NEWTON_SCHULZ, torch.float32)
    U, _, Vh = torch.linalg.svd(matrices, full_matrices=False)
    values = U.mT @ found @ Vh.mT
    kept = torch.diagonal(values, dim1=-2, dim2=-1)
    assert ((kept > 0.5) & (kept < 1.3)).all()
    torch.testing.assert_close(values, torch.diag_embed(kept), atol=1e-4, rtol=0)


def test_a_matrix_of_zeros_stays_zero() -> None:
    assert not orthogonalize(torch.zeros(2, 4, 6), NEWTON_SCHULZ, torch.float32).any()


def test_updates_are_torchs() -> None:
    """Those of torch.optim.Muon for each matrix, with queries, keys and values apart, and of AdamW for the rest."""
    model = _model()
    made = muon(model, CONFIG, torch.bfloat16)
    theirs: dict[str, list[Tensor]] = {
        name: [part.detach().clone().requires_grad_() for part in p.chunk(3 if "c_attn.weight" in name else 1)]
        for name, p in model.named_parameters()
    }
    begun = {name: torch.cat(parts).detach() for name, parts in theirs.items()}
    mine = [name for name in theirs if ".h." in name and "ln_" not in name and name.endswith("weight")]
    matrices = [p for name in mine for p in theirs[name]]
    rest = [p for name in theirs if name not in mine for p in theirs[name]]
    groups = [{"params": [p for p in rest if p.dim() == 2]}, {"params": [p for p in rest if p.dim() < 2]}]
    groups[1]["weight_decay"] = 0.0
    theirs_made = [
        torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.3, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.9), weight_decay=0.3),
    ]
    for step in range(4):
        _gradients(model, step)
        for name, p in model.named_parameters():
            for part, grad in zip(theirs[name], p.grad.chunk(len(theirs[name])), strict=True):
                part.grad = grad.clone()
        for optimizer in (made, *theirs_made):
            optimizer.step()
        for name, p in model.named_parameters():
            expected = torch.cat(theirs[name])
            error = (p - expected).norm() / (expected - begun[name]).norm()
            assert error < (0.04 if name in mine else 1e-5), name  # bfloat16 has 8 bits


def test_the_rest_has_its_own_learning_rate() -> None:
    """The schedule's rate times a constant, for AdamW's part alone."""
    changes = []
    for rate in ("auto", 3e-2):
        model = _model()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        made = muon(model, replace(CONFIG, adam_learning_rate=rate, weight_decay=0.0), torch.float32)
        _gradients(model, 0)
        for group in made.param_groups:
            group["lr"] = 5e-3
        made.step()
        changes.append({name: p.detach() - before[name] for name, p in model.named_parameters()})
    for name, change in changes[0].items():
        factor = 1 if name.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight")) else 3
        torch.testing.assert_close(changes[1][name], factor * change, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--adam_learning_rate=1e-3"], "adam_learning_rate=0.001 is for optimizer=muon only: set .*=auto and --lea"),
        (["--optimizer=muon", "--adam_learning_rate=1", "--learning_rate=0", "--min_lr=0"], "raise --learning_rate"),
        (["--optimizer=sgd"], "--optimizer='sgd': must be adamw or muon"),
    ],
)
def test_rates_that_would_not_be_used_are_refused(flags: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        check(cli.parse(TrainConfig, flags, "folio train", files=True))


# What a run does with it


def _trainer() -> tuple[GPT, Muon, Runtime]:
    torch.manual_seed(1)
    model = _model()
    return model, muon(model, CONFIG, torch.float32), Runtime(resolve(System(device="cpu", dtype="float32")))


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_nothing_is_updated_after_a_loss_that_is_not_finite(loss: float, norm: float) -> None:
    """Neither weights nor momenta, in that step and in all later ones."""
    model, made, runtime = _trainer()
    check_first_update(made)

    def step(loss: float, norm: float) -> dict[str, Tensor]:
        runtime.backward(model.loss(torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]]))[0] * norm)
        runtime.step(made, 1e-2, 1.0, torch.tensor([loss, 1.0]))
        weights, slots = runtime.full_state(model, made, copy=True)
        return weights | slots

    before = step(1.0, 1.0)
    for now in (step(loss, norm), step(1.0, 1.0)):
        assert now.keys() == before.keys()
        assert all(torch.equal(now[name], before[name]) for name in before)


def test_a_step_that_overflows_float16_is_skipped() -> None:
    """That step alone, and the scaler lowers its scale."""
    model, made, _ = _trainer()
    runtime = Runtime(resolve(System(device="cpu", dtype="float16")))
    seen = []
    for factor in (1.0, math.inf, 1.0):
        runtime.backward(model.loss(torch.tensor([[1, 2]]), torch.tensor([[2, 3]]))[0] * factor)
        runtime.step(made, 1e-2, 1.0, torch.ones(2))
        seen.append(model.transformer.h[0].mlp.c_fc.weight.detach().clone())
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])
    assert seen[2].isfinite().all()
    assert runtime.scaler.get_scale() == 2**15


def test_a_run_resumes_with_the_same_bits(folio: Any, story: Path, tmp_path: Path) -> None:
    """A run of 10 steps, and one that ended at step 5; each matrix has one momentum, each other parameter two."""
    argv = ["train", *SMALL, f"--data_dir={story}", "--dropout=0.1", "--learning_rate=1e-2", "--optimizer=muon"]
    argv += ["--adam_learning_rate=3e-3"]
    for out, *flags in (("whole", "--max_iters=10"), ("halves", "--max_iters=5"), ("halves", "--init_from=resume")):
        assert folio(*argv, f"--out_dir={tmp_path / out}", *flags).code == 0
    for name in (run_folder.MODEL, run_folder.OPTIMIZER):
        whole, halves = (run_folder.checkpoint_folder(tmp_path / out, 10) / name for out in ("whole", "halves"))
        assert whole.read_bytes() == halves.read_bytes()
    slots = load_file(run_folder.checkpoint_folder(tmp_path / "whole", 10) / run_folder.OPTIMIZER)
    matrix = "transformer.h.0.attn.c_attn.weight"
    assert [name for name in slots if name.startswith(matrix)] == [f"{matrix}/momentum_buffer"]
    assert {f"transformer.wte.weight/{slot}" for slot in ("step", "exp_avg", "exp_avg_sq")} < slots.keys()


def test_it_learns_at_adamws_rate(folio: Any, story: Path, tmp_path: Path) -> None:
    """With all other options equal it is no worse after 40 steps."""
    argv = ["train", *SMALL, f"--data_dir={story}", "--learning_rate=1e-2", "--max_iters=40", "--lr_decay_iters=40"]
    losses = {}
    for name in ("adamw", "muon"):
        out = tmp_path / name
        assert folio(*argv, f"--optimizer={name}", "--eval_interval=40", f"--out_dir={out}").code == 0
        losses[name] = [r["val_loss"] for r in read_metrics(out / run_folder.METRICS) if r["kind"] == "eval"]
    assert losses["muon"][0] == losses["adamw"][0]
    assert losses["muon"][1] < losses["adamw"][1] + 0.05
