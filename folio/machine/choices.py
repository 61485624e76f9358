"""Resolves every ``auto`` from the options and the machine. Builds nothing, and changes no setting of torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, TypeVar

from folio.config.options import Processes, System
from folio.errors import UserError
from folio.machine.probe import Machine

T = TypeVar("T")
ATTENTION_BLOCK = 128  # queries, on a CPU (benchmarks/attention.py)
LOGITS = 1 << 28  # at a time, in the loss of a compiled model on a GPU (benchmarks/gpu.py)
_RECORDED = (  # in state.json: the choices on which the bits of a run depend
    "device",
    "dtype",
    "compile",
    "matmul_precision",
    "weight_copy",
    "attention_block",
    "logits",
    "graphs",
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
    weight_copy: bool  # whether the model computes in a 16-bit copy of its weights, instead of autocast
    attention_block: int  # queries in a block of kernels.BlockedAttention; 0: attention.attend
    logits: int  # at most, in a chunk of kernels.ChunkedCrossEntropy; 0: gpt.cross_entropy
    graphs: bool  # whether micro steps and updates run as CUDA graphs
    deterministic: bool
    threads: int
    torch: str  # its version
    processor: str
    rank: int
    world: int
    grouped: bool  # whether a launcher started this process, which then joins a process group, even alone
    parallel: str  # ddp, fsdp or hsdp
    shards: int  # processes that share one copy of the model
    backend: str  # of the group: nccl or gloo
    timeout: float  # seconds to wait for another process
    recompute: bool  # whether the backward computes a block's activations again

    @property
    def kind(self) -> str:
        """The device's type: cpu, cuda or mps."""
        return self.device.partition(":")[0]

    @property
    def resolved(self) -> dict[str, Any]:
        """The choices that a checkpoint records, so that ``resolve`` can repeat them."""
        return {name: getattr(self, name) for name in _RECORDED} | {"device": self.kind}

    def differences(self, before: dict[str, Any]) -> list[str]:
        """Why a run with the resolved choices ``before`` resumes exact to rounding only; empty: with the same bits."""
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
    processes: Processes | None = None,
    machine: Machine | None = None,
    *,
    flops: float = 0.0,
    documents: bool = False,
    before: dict[str, Any] | None = None,
) -> Choices:
    """The choices of this process, from the options, this machine and the launcher's variables.

    ``flops``: the work of the whole run, which decides ``compile=auto``. ``documents``: attention stays within
    documents. ``before``: the ``Choices.resolved`` of the run that is resumed; every ``auto`` becomes what it was
    there, if this machine allows it.

    Raises:
        UserError: the device is not on this machine, or a variable of the launcher is missing.
    """
    from folio.machine import launch  # imports torch

    processes, machine, before = processes or Processes(), machine or Machine(), before or {}
    rank, world, local_rank = launch.read_ranks()
    grouped = "RANK" in os.environ
    parallel = processes.parallel if grouped else "ddp"
    device = _device(machine, system.device, before.get("device"), local_rank, world)
    kind = device.partition(":")[0]
    dtype = _dtype(machine, device, system.dtype, before.get("dtype"))
    if parallel != "ddp" and dtype == "float16":
        raise UserError(
            f"dtype=float16 does not work with parallel={parallel}: use --dtype=bfloat16 or --dtype=float32"
        )
    compiled = _asked_or_before(system.compile, before.get("compile"))
    if compiled == "auto":
        compiled = _compile_pays(machine, device, dtype, flops)
    recompute = processes.activation_checkpointing == "block"
    plain = kind != "cpu" or bool(compiled) or parallel != "ddp"  # no fast paths of an eager model on a CPU
    alone = world == 1 and not recompute and kind != "mps"  # DDP computes as FSDP does, by autocast
    fixed = alone and kind == "cuda" and not (dtype == "float16" or documents)  # the kernels of a step
    precision: str = _asked_or_before(system.matmul_precision, before.get("matmul_precision"))
    return Choices(
        device=device,
        dtype=dtype,
        compile=bool(compiled),
        matmul_precision=machine.fast_precision(device) if precision == "auto" else precision,
        weight_copy=alone and dtype == "bfloat16" and before.get("weight_copy", not before),
        attention_block=0 if plain else before.get("attention_block", 0 if before else ATTENTION_BLOCK),
        logits=before.get("logits", 0 if before else LOGITS) if fixed and compiled else 0,
        graphs=fixed and before.get("graphs", not before),
        deterministic=system.deterministic,
        threads=_threads(machine, kind, world),
        torch=machine.torch_version(),
        processor=machine.processor(device),
        rank=rank,
        world=world,
        grouped=grouped,
        parallel=parallel,
        shards=_shards(parallel, world),
        backend="nccl" if kind == "cuda" and processes.backend != "gloo" else "gloo",  # nccl is nanoGPT's default
        timeout=processes.timeout,
        recompute=recompute,
    )


def _asked_or_before(asked: T, before: T | None) -> T:
    return before if asked == "auto" and before is not None else asked


def _threads(machine: Machine, kind: str, world: int) -> int:
    """Torch's threads: processes of a machine divide its cores, unless OMP_NUM_THREADS is set or they use GPUs."""
    from folio.machine import launch

    if kind != "cpu" or world == 1 or "OMP_NUM_THREADS" in os.environ:
        return machine.threads()
    return max(1, launch.JOB.threads // int(os.environ.get("LOCAL_WORLD_SIZE", world)))


def _shards(parallel: str, world: int) -> int:
    """Processes that share one copy of the model."""
    if parallel != "hsdp":
        return world if parallel == "fsdp" else 1
    local = os.environ.get("LOCAL_WORLD_SIZE", "")
    if not local.isdecimal() or not 1 < int(local) < world or world % int(local):
        raise UserError(
            f"parallel=hsdp divides the model among the processes of a machine, but WORLD_SIZE={world} and "
            f"LOCAL_WORLD_SIZE={local or 'not set'}: it needs several machines with equally many processes; "
            "use --parallel=fsdp"
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
        raise UserError(f"device={asked}: this machine has none; use --device=cpu or --device=auto")
    if device.type == "mps" and world > 1:
        raise UserError(
            "device=mps: several processes cannot train on it, since gloo does not support MPS: start without torchrun"
        )
    if device.type != "cuda":
        return device.type
    index = local_rank if world > 1 else (device.index or 0)
    # the largest index on this machine, so that every rank raises the error
    last = max(index, int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1)
    if last >= (count := machine.gpus()):
        raise UserError(
            f"device={asked}: there is no cuda:{last}, this machine has {count} GPUs: start one process per GPU, or "
            "use a lower number"
        )
    return f"cuda:{index}"


def _dtype(machine: Machine, device: str, asked: str, before: str | None) -> str:
    if asked == "bfloat16" and not machine.has_bfloat16(device):
        raise UserError("dtype=bfloat16: on MPS it needs macOS 14 or later: use --dtype=float16 or --dtype=float32")
    if asked != "auto":
        return asked
    fast = machine.fast_dtype(device)
    known = before in ("float32", fast) or (before == "float16" and device.startswith("cuda"))
    return before if before and known else fast


def _compile_pays(machine: Machine, device: str, dtype: str, flops: float) -> bool:
    """Whether a run on a GPU takes more than half a minute at a tenth of the peak, which small models do not reach.

    Compiling takes about that long, or less where PyTorch's cache has the kernels of an earlier run. On a CPU it gains
    a few percent, so auto never compiles there.
    """
    if not device.startswith("cuda") or not machine.can_compile():
        return False
    return flops > 30 * 0.1 * (machine.peak(device, dtype) or 1e14)
