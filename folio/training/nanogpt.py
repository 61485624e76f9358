"""A training step of nanoGPT, from a checkout of it, to compare with."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from folio.errors import UserError
from folio.machine.probe import matmul_precision
from folio.model.config import GPTConfig

_LOG_INTERVAL = 10  # steps between readings of the loss, nanoGPT's default


class Peer(NamedTuple):
    """Functions that make one step each: as nanoGPT's train.py does, and only its operations, on one batch."""

    step: Callable[[], None]
    operations: Callable[[], None]


def load(checkout: Path, shape: GPTConfig, size: int, ids: NDArray[Any], device: torch.device) -> Peer:
    """nanoGPT's ``model.py`` in the step of its ``train.py``, with that file's arithmetic on this device and
    rows from ``ids``, without gradient accumulation.

    On a CPU that is float32, eager; on a GPU bfloat16 by autocast, compiled. Runs the checkout's ``model.py``.

    Raises:
        UserError: there is no such file.
    """
    model = load_model(checkout, shape).to(device)
    with redirect_stdout(None):  # it prints how many parameters decay
        optimizer = model.configure_optimizers(1e-1, 1e-3, (0.9, 0.95), device.type)
    gpu = device.type == "cuda"
    arithmetic = torch.autocast("cuda", dtype=torch.bfloat16) if gpu else nullcontext()
    forward: Any = torch.compile(model) if gpu else model
    T, done = shape.block_size, 0

    def batch() -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(ids) - T, (size,))
        x, y = (
            torch.stack([torch.from_numpy(ids[i + shift : i + shift + T].astype(np.int64)) for i in starts])
            for shift in (0, 1)
        )
        if gpu:
            return tuple(t.pin_memory().to(device, non_blocking=True) for t in (x, y))  # type: ignore[return-value]
        return x, y

    def micro_step(x: Tensor, y: Tensor, after: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Any]:
        with arithmetic:
            _, loss = forward(x, y)
        following = after()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss, following

    fixed = following = batch()

    def step() -> None:
        nonlocal following, done
        with matmul_precision("high" if gpu else "highest"):
            for group in optimizer.param_groups:
                group["lr"] = 1e-3
            loss, following = micro_step(*following, batch)
            if done % _LOG_INTERVAL == 0:
                loss.item()
            done += 1

    def operations() -> None:
        with matmul_precision("high" if gpu else "highest"):
            micro_step(*fixed, lambda: fixed)

    return Peer(step, operations)


def load_model(checkout: Path, shape: GPTConfig) -> Any:
    """nanoGPT's model of this shape, on the CPU. Runs the checkout's ``model.py``.

    Raises:
        UserError: there is no such file.
    """
    path = checkout / "model.py"
    if not path.is_file():
        raise UserError(f"peer={path.parent}: there is no {path.name}, so this is not a checkout of nanoGPT")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass needs it
    spec.loader.exec_module(module)
    names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
    with redirect_stdout(None):  # it prints its number of parameters
        return module.GPT(module.GPTConfig(**{name: getattr(shape, name) for name in names}))
