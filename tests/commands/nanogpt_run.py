"""Resumes nanoGPT's run, and makes its optimizer as nanoGPT makes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from conftest import Outcome
from torch import Tensor, nn

from folio import cli
from folio.commands import train
from folio.model.config import GPTConfig
from folio.model.gpt import GPT
from folio.training.run import Run, finish
from folio.training.start import build

Folio = Callable[..., Outcome]
WPE = "transformer.wpe.weight"
BATCH = 12  # rows of a step of nanoGPT's run
BEFORE = 200 * BATCH * 64  # tokens that it consumed
QUICK = ["--device=cpu", "--compile=False", "--dtype=float32", "--matmul_precision=highest"]


def argv(out_dir: Path, data: Path, *more: str, begin: str = "resume") -> list[str]:
    return [
        *QUICK,
        "--eval_iters=1",
        "--log_interval=1",
        f"--init_from={begin}",
        f"--out_dir={out_dir}",
        f"--data_dir={data}",
        *more,
    ]


@contextmanager
def run_of(out_dir: Path, data: Path, *more: str) -> Iterator[Run]:
    run = build(cli.parse(train.Options, argv(out_dir, data, *more), "folio train", files=True))
    try:
        yield run
    finally:
        finish(run)


def their_optimizer(theirs: dict[str, Any]) -> tuple[GPT, dict[str, nn.Parameter], torch.optim.AdamW]:
    """nanoGPT's model, its parameters in its order, and its optimizer as its configure_optimizers makes it."""
    model = GPT(GPTConfig(**{**theirs["model_args"], "dropout": 0.0}))
    model.load_state_dict(theirs["model"])
    params = {name: model.get_parameter(name) for name in theirs["model"] if name != "lm_head.weight"}
    decayed = [p for p in params.values() if p.dim() >= 2]
    others = [p for p in params.values() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), fused=False)
    optimizer.load_state_dict(theirs["optimizer"])
    return model, params, optimizer


def slots_of(params: dict[str, nn.Parameter], optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    return {f"{name}/{slot}": value for name, p in params.items() for slot, value in optimizer.state[p].items()}


def assert_equal(mine: dict[str, Any], others: dict[str, Any]) -> None:
    assert mine.keys() == others.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, others[name]), name
