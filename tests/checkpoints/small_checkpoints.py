"""A model of a few hundred parameters, its checkpoint as a run writes it, and what can damage one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from folio.checkpoints import checkpoint
from folio.checkpoints.state import State, foreign_state
from folio.data.tokenizers import Tokenizer
from folio.model.config import GPTConfig
from folio.model.gpt import GPT
from folio.records import run_folder
from folio.training.optimizers import adamw

SHAPE = GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=8)
Damage = Callable[[Path], object]


def trained(seed: int = 0, shape: GPTConfig = SHAPE) -> tuple[GPT, torch.optim.AdamW]:
    """A model and an optimizer with moments."""
    torch.manual_seed(seed)
    model = GPT(shape)
    optimizer = adamw(model, 1e-2, (0.9, 0.95), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model.loss(torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]]))[0].backward()
        optimizer.step()
    return model, optimizer


def tensors(model: GPT, optimizer: torch.optim.AdamW) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    names = {p: name for name, p in model.named_parameters()}
    slots = {f"{names[p]}/{slot}": t for p, state in optimizer.state.items() for slot, t in state.items()}
    return {name: p.detach() for p, name in names.items()}, slots


def save(out_dir: Path, step: int, *, run: str = "a1", best: tuple[int, float] | None = None, seed: int = 0) -> Path:
    """A checkpoint as a run writes it."""
    model, optimizer = trained(seed)
    known = State(step=step, best={"step": best[0], "loss": best[1]} if best else None)
    state = {**foreign_state(model.config, None, known), "run": run}
    checkpoint.save(out_dir, step, *tensors(model, optimizer), state)
    return run_folder.checkpoint_folder(out_dir, step)


def save_random(out_dir: Path, tokens: Tokenizer | None = None, seed: int = 0, **shape: Any) -> Path:
    """An out_dir with a model whose every parameter, biases too, is drawn at random."""
    config = GPTConfig(**{"block_size": 32, "vocab_size": 256, "n_layer": 2, "n_head": 2, "n_embd": 16, **shape})
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: torch.randn(p.shape, generator=generator) * 0.3 + (p.dim() == 1 and name.endswith("weight"))
        for name, p in GPT(config).named_parameters()
    }
    state = foreign_state(config, tokens and tokens.to_json(), State(step=7, tokens=1234))
    checkpoint.save(out_dir, 7, weights, {}, state)
    return out_dir


def cut(name: str) -> Damage:
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[:-1])


def flip(name: str) -> Damage:
    def damage(path: Path) -> None:
        content = bytearray((path / name).read_bytes())
        content[len(content) // 2] ^= 1
        (path / name).write_bytes(content)

    return damage
