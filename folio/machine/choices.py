"""Options and a machine to choices: what every ``auto`` becomes. Nothing is built, and no state of torch changes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, TypeVar

from folio.config.options import Processes, System
from folio.errors import UserError
from folio.machine.probe import Machine

T = TypeVar("T")
_RECORDED = (  # in state.json: what the bits of a run depend on
    "device",
    "dtype",
    "compile",
    "matmul_precision",
    "deterministic",
    "world",
    "parallel",
    "threads",
    "torch",
    "processor",
)


@dataclass(frozen=True)
class Choices:
    """What one process of a run computes with. ``Runtime`` applies it."""

    device: str  # cpu, mps, or cuda:0 and so on
    dtype: str  # of the arithmetic: float32, bfloat16 or float16
    compile: bool
    matmul_precision: str  # of float32 products: highest, high or medium
    deterministic: bool
    threads: int
    torch: str  # its version
    processor: str
    rank: int
    world: int
    grouped: bool  # whether a launcher started this process; then it joins a group, even if it is alone there
    parallel: str  # ddp, fsdp or hsdp
    shards: int  # processes that share one copy of the model
    backend: str  # of the group: nccl or gloo
    timeout: float  # seconds to wait for another process
    recompute: bool  # whether a block's activations are computed again in the backward

    @property
    def kind(self) -> str:
        """The device's type: cpu, cuda or mps."""
        return self.device.partition(":")[0]

    @property
    def resolved(self) -> dict[str, Any]:
        """The record of these choices in a checkpoint, from which ``resolve`` can repeat them."""
        return {name: getattr(self, name) for name in _RECORDED} | {"device": self.kind}

    def differences(self, before: dict[str, Any]) -> list[str]:
        """Why a run that was resolved as ``before`` continues exactly to rounding only; empty: to the bit."""
        found = [
            f"{name} was {before[name]} and is {value}"
            for name, value in self.resolved.items()
            if name in before and before[name] != value
        ]
        if self.kind == "cuda" and not self.deterministic:
            found.append("a GPU needs --deterministic=True for the same bits")
        return found


def resolve(
    system: System,
    several: Processes | None = None,
    machine: Machine | None = None,
    *,
    flops: float = 0.0,
    before: dict[str, Any] | None = None,
) -> Choices:
    """The choices of this process, by the options, this machine and the launcher's variables.

    ``flops`` is the work of the whole run, by which ``compile=auto`` is decided. ``before`` is a former run's
    ``Choices.resolved``: every ``auto`` becomes what it was there, if this machine allows it.

    Raises:
        ValueError: a device that is not on this machine, a launcher's variable that is missing.
    """
    from folio.machine import launch  # imports torch

    several, machine, before = several or Processes(), machine or Machine(), before or {}
    rank, world, local_rank = launch.read_ranks()
    grouped = "RANK" in os.environ
    parallel = several.parallel if grouped else "ddp"
    shards = _shards(parallel, world)
    device = _device(machine, system.device, before.get("device"), local_rank, world)
    kind = device.partition(":")[0]
    dtype = _dtype(machine, device, system.dtype, before.get("dtype"))
    if parallel != "ddp" and dtype == "float16":
        raise UserError(f"dtype=float16 does not go with parallel={parallel}: use --dtype=bfloat16 or --dtype=float32")
    threads = machine.threads()
    if kind == "cpu" and world > 1 and "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, launch.JOB.threads // int(os.environ.get("LOCAL_WORLD_SIZE", world)))
    compiled = _asked_or_before(system.compile, before.get("compile"))
    if compiled == "auto":
        compiled = _compile_pays(machine, device, dtype, flops)
    precision: str = _asked_or_before(system.matmul_precision, before.get("matmul_precision"))
    return Choices(
        device=device,
        dtype=dtype,
        compile=bool(compiled),
        matmul_precision=machine.fast_precision(device) if precision == "auto" else precision,
        deterministic=system.deterministic,
        threads=threads,
        torch=machine.torch_version(),
        processor=machine.processor(device),
        rank=rank,
        world=world,
        grouped=grouped,
        parallel=parallel,
        shards=shards,
        backend="nccl" if kind == "cuda" and several.backend != "gloo" else "gloo",  # nccl is nanoGPT's default
        timeout=several.timeout,
        recompute=several.activation_checkpointing == "block",
    )


def _asked_or_before(asked: T, before: T | None) -> T:
    return before if asked == "auto" and before is not None else asked


def _shards(parallel: str, world: int) -> int:
    """Processes that share one copy of the model."""
    if parallel != "hsdp":
        return world if parallel == "fsdp" else 1
    local = os.environ.get("LOCAL_WORLD_SIZE", "")
    if not local.isdecimal() or not 1 < int(local) < world or world % int(local):
        raise UserError(
            f"parallel=hsdp shares the model within each machine, but WORLD_SIZE={world} and "
            f"LOCAL_WORLD_SIZE={local or 'not set'}: that needs several machines of as many processes; use fsdp"
        )
    return int(local)


def _device(machine: Machine, asked: str, before: str | None, local_rank: int, world: int) -> str:
    import torch

    if asked == "auto":
        kinds = [kind for kind in ("cuda", "mps", "cpu") if kind != "mps" or world == 1]  # gloo does not support mps
        asked = before if before in kinds and machine.has(before) else next(filter(machine.has, kinds))
    try:
        device = torch.device(asked)
    except RuntimeError:
        raise UserError(f"device={asked}: must be auto, cpu, cuda, cuda:0 … or mps") from None
    if not machine.has(device.type):
        raise UserError(f"device={asked}: there is none on this machine; use --device=cpu or --device=auto")
    if device.type != "cuda":
        return device.type
    index = local_rank if world > 1 else (device.index or 0)
    last = max(index, int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1)  # so that every rank finds it
    if last >= (count := machine.gpus()):
        raise UserError(
            f"device={asked}: cuda:{last} is not there, this machine has {count} GPUs: start a process for each of them"
        )
    return f"cuda:{index}"


def _dtype(machine: Machine, device: str, asked: str, before: str | None) -> str:
    if asked != "auto":
        return asked
    fast = machine.fast_dtype(device)
    known = before in ("float32", fast) or (before == "float16" and device.startswith("cuda"))
    return before if before and known else fast


def _compile_pays(machine: Machine, device: str, dtype: str, flops: float) -> bool:
    """Whether a run on a GPU takes more than a minute at a tenth of the peak.

    On a CPU compiling gains a few per cent and costs half a minute, so there it must be asked for.
    """
    if not device.startswith("cuda") or not machine.can_compile():
        return False
    return flops > 60 * 0.1 * (machine.peak(device, dtype) or 1e14)
