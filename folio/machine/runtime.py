"""One process of a run on its device: move, backward, clip, update, reduce.

The training loop is written for one process on one device. What other devices and more processes need is here, in
``wrap`` and in ``processes``.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor

from folio.machine import shares
from folio.machine.choices import Choices
from folio.machine.processes import Ranks
from folio.machine.updates import Updates
from folio.machine.wrap import Loss, exchange, for_sampling, objective_of, wrap
from folio.model.gpt import GPT

T = TypeVar("T")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def keep_freed_memory() -> None:
    """Lets glibc keep the memory that tensors free on a CPU, for the tensors of the next step.

    It would give much of it back to the system, which then clears each page before it can be used again. A setting of
    glibc's own in the environment, such as ``MALLOC_MMAP_THRESHOLD_``, stands.
    """
    chosen = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if not chosen and sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 25)  # bytes; the most that all versions accept
        libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


class Runtime(Ranks, Updates):
    """One process of a run, set up by ``choices``: ``rank`` of ``world``; ``device``; ``dtype`` of the arithmetic.

    A checkpoint records the choices as ``resolved``.
    """

    def __init__(self, choices: Choices) -> None:
        self.choices, self.resolved = choices, choices.resolved
        self.parallel, self.shards, self.compile = choices.parallel, choices.shards, choices.compile
        device, dtype = torch.device(choices.device), getattr(torch, choices.dtype)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if choices.threads != torch.get_num_threads():
            torch.set_num_threads(choices.threads)
        torch.set_float32_matmul_precision(choices.matmul_precision)
        if choices.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        if choices.deterministic != torch.are_deterministic_algorithms_enabled():  # the setter imports torch's compiler
            torch.use_deterministic_algorithms(choices.deterministic)
        self._objective: Any = None
        self._batch: tuple[int, int] | None = None
        Updates.__init__(self, device, dtype, choices.graphs)
        Ranks.__init__(self, choices.rank, choices.world, choices.backend if choices.grouped else None, choices.timeout)

    def wrap(self, model: GPT, batch: tuple[int, int] | None, own: Callable[..., Tensor] | None = None) -> Loss:
        """``model.loss`` on this device, under autocast, compiled or not, with gradients averaged over the ranks.

        This may replace the model's parameters, so make the optimizer afterwards. ``batch``: the largest shape (B, T)
        of the batches; None if there is no backward. ``own`` takes the place of ``gpt.cross_entropy`` in training.
        """
        if batch and self.device.type == "cpu":
            keep_freed_memory()
        loss = wrap(model, self.choices, batch, own)
        self._objective, self._batch = objective_of(loss), batch
        if self.parallel != "ddp":
            self.extend_timeout()
        return loss

    def for_sampling(self, model: GPT) -> GPT:
        """The model ready to generate text on this device."""
        return for_sampling(model, self.choices)

    @torch.no_grad()
    def infer(self, function: Callable[[], T]) -> T:
        """Calls a function that runs parts of the wrapped model, without dropout and gradients.

        The arithmetic is that of the loss. Nothing is compiled, since shapes may change from call to call. With FSDP
        every process must call this, and run the parts equally often.
        """
        training = self._objective.model.training
        self._objective.eval()
        try:
            with torch.compiler.set_stance("force_eager") if self.compile else nullcontext():
                return self._objective.infer(function)
        finally:
            self._objective.train(training)

    def seed(self, key: int) -> None:
        """Seeds the generator of dropout. ``torch.manual_seed`` seeds those of all devices, which takes 100 µs."""
        torch.default_generator.manual_seed(key)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(key)
        elif self.device.type == "mps":
            torch.mps.manual_seed(key)

    def sync(self, loss: Loss, last: bool) -> AbstractContextManager[None]:
        """A context for a forward and backward: ranks exchange gradients only in the ``last`` micro step of a step."""
        return exchange(loss, last)

    def step(self, optimizer: torch.optim.Optimizer, rate: float, max_norm: float, sums: Tensor) -> Tensor:
        result = super().step(optimizer, rate, max_norm, sums)
        if self._objective:
            self._objective.update_copy()
        self.first_step_done()
        return result

    def drop_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Forgets what micro steps have added to the gradients since the last update; all ranks must call this."""
        if self.parallel != "ddp" and self._batch:  # FSDP keeps gradients of its own until the ranks exchange them
            zeros = torch.zeros(self._batch, dtype=torch.long, device=self.device)
            with exchange(self._objective, last=True):
                self._objective(zeros, zeros)[0].backward()
        super().drop_gradients(optimizer)

    def find_not_finite(self, model: GPT, optimizer: torch.optim.Optimizer) -> str:
        """The first weight, or moment of AdamW as ``<parameter>/<slot>``, with NaN or infinity on any rank, or ""."""
        self._reshard()
        tensors = dict(model.named_parameters()) | shares.slots(model, optimizer, scalars=False)
        marks = self.reduce(torch.stack([(~shares.all_finite(shares.local_part(t))).float() for t in tensors.values()]))
        return next((name for name, mark in zip(tensors, marks.tolist(), strict=True) if mark), "")

    def gradient_not_finite(self, model: GPT, norms: Sequence[float]) -> str:
        """The first parameter whose gradient had NaN or infinity, or ""; ``norms`` are those that ``step`` returned."""
        bad = {p for p, norm in zip(self._measured, norms, strict=True) if not math.isfinite(norm)}
        return next((name for name, p in model.named_parameters() if p in bad), "")

    def overflow_remedy(self) -> str:
        """The end of a message about values that are not finite: an option that may avoid them; empty in float32."""
        return "" if self.dtype == torch.float32 else f": {self.resolved['dtype']} may overflow, try --dtype=float32"

    def _reshard(self) -> None:
        """Restores the sharded parameters, which FSDP leaves gathered after a forward without backward."""
        if hasattr(self._objective, "reshard"):
            self._objective.reshard()

    def check_replicas(self, model: GPT) -> None:
        """Compares a hash of each parameter between the ranks that should have the same bits.

        Raises:
            FloatingPointError: on every rank, if any differ; names the ranks and the first parameter.
        """
        if self.world == 1:
            return
        self._reshard()
        hashes = self.stack(shares.hashes(list(model.parameters())))
        ranks, first = shares.find_differences(hashes, self.shards)
        if ranks:
            names = [name for name, _ in model.named_parameters()]
            raise FloatingPointError(
                f"the weights of rank {', '.join(map(str, ranks))} differ from those of the other processes, first "
                f"{names[first]}: a device or the network corrupts values; resume from an earlier checkpoint"
            )

    def pin(self, array: NDArray[Any]) -> Tensor:
        """A tensor of an array, in pinned memory if the device is a GPU, so that ``move`` need not wait."""
        tensor = torch.from_numpy(array)
        return tensor.pin_memory() if self.device.type == "cuda" else tensor

    def move(self, tensor: Tensor) -> Tensor:
        """Copies a tensor to the device; from pinned memory to a GPU, without waiting."""
        return tensor.to(self.device, non_blocking=self.device.type == "cuda")

    @contextmanager
    def averaged(self, model: GPT, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """The wrapped model has the moving averages of its weights inside; afterwards its own, to the same bits."""
        self._swap_averages(model, optimizer)
        try:
            yield
        finally:
            self._swap_averages(model, optimizer)

    def _swap_averages(self, model: GPT, optimizer: torch.optim.Optimizer) -> None:
        self._reshard()
        shares.swap_averages(model, optimizer)
        self._objective.update_copy()

    def full_state(
        self, model: GPT, optimizer: torch.optim.Optimizer | None = None, copy: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """All weights by name and all optimizer tensors as ``<parameter>/<slot>``, contiguous on rank 0's CPU.

        The other ranks get empty dictionaries. Without ``copy``, tensors on a CPU may be the model's own.
        """
        self._reshard()
        return shares.gather_state(model, optimizer, self.rank == 0, copy)
