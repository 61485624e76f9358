"""How much memory a step needs, and which options need less."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from folio.config.options import Data, Optimizer, Processes, TrainConfig
from folio.config.table import override
from folio.errors import UserError
from folio.machine import probe, shortage
from folio.machine.runtime import Runtime
from folio.model.config import GPTConfig
from folio.model.gpt import GPT
from folio.training.batches import micro_batches

if TYPE_CHECKING:
    from folio.machine import memory


def step_of_a_device(
    data: Data,
    processes: Processes,
    context: int,
    dtype: torch.dtype,
    gpu: bool,
    world: int,
    shards: int,
    optimizer: Optimizer,
) -> memory.Step:
    """What the first device does in a step. Raises UserError if the devices do not divide the rows."""
    from folio.machine.memory import Step

    share = micro_batches(data, 0, world)
    recompute = processes.activation_checkpointing == "block"
    most = max(rows for _, rows, _ in share)
    how = {"muon": optimizer.optimizer == "muon", "averaged": optimizer.ema_decay > 0}
    return Step(most, len(share), dtype, gpu, recompute, data.document_mask, world, shards, context, **how)


_SMALLER = "lower --block_size, --n_layer or --n_embd"


def advise_on_memory(config: TrainConfig, shape: GPTConfig, runtime: Runtime) -> str:
    """A line: the memory that a step needs, computed as ``folio plan`` does, and options that need less."""
    from folio.machine import memory

    def total(way: dict[str, Any]) -> int:
        changed = override(config, way)
        data, processes = changed.data, changed.processes
        shards = runtime.world if processes.parallel == "fsdp" else runtime.shards
        gpu, context = runtime.device.type != "cpu", data.row(shape.block_size)
        step = step_of_a_device(data, processes, context, runtime.dtype, gpu, runtime.world, shards, config.optimizer)
        return memory.needed(shape, step).total

    need, room = total({}), shortage.room(runtime.device)
    limit = room if need > room else 0.75 * need
    sharded = runtime.world > 1 and runtime.dtype != torch.float16
    ways = memory.remedies(config.data, sharded, lambda way: total(way) <= limit)
    remedy = (
        f"{'what fits:' if need > room else 'to need less:'} {ways}" if ways else f"{memory.NOTHING_FITS}: {_SMALLER}"
    )
    return (
        f"as folio plan computes it, a step needs {need / 1e9:,.2f} of the {room / 1e9:,.2f} GB on {runtime.device}, "
        f"besides the memory of torch itself; {remedy}"
    )


def check_size(shape: GPTConfig) -> None:
    """Raises UserError for weights that this machine cannot hold; else the system might kill the process silently."""
    with shortage.explained("building the model", lambda: _SMALLER):
        if 4 * _count(shape) > probe.memory():
            raise UserError(f"out of memory while building the model: {least_memory(shape)}")


def _count(shape: GPTConfig) -> int:
    with torch.device("meta"):
        return GPT(shape).get_num_params(False)


def least_memory(shape: GPTConfig) -> str:
    """A line: the least memory that a model of this shape takes."""
    count = _count(shape)
    return (
        f"{count:,} parameters take {4 * count / 1e9:,.2f} GB, and {16 * count / 1e9:,.2f} with their gradients and "
        f"AdamW's moments, of the {probe.memory() / 1e9:,.2f} GB of this machine: lower --n_layer={shape.n_layer}, "
        f"--n_embd={shape.n_embd}, --vocab_size={shape.vocab_size} or --block_size={shape.block_size}"
    )
