"""The machine under a run: device, arithmetic, processes. The only user of torch.distributed.

The loop sees one process on one device; what changes with more of them, or with another device, is here.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from folio.errors import UserError
from folio.machine import processes
from folio.machine.choices import Choices
from folio.model.attention import within_documents
from folio.model.gpt import GPT
from folio.records.console import say

T = TypeVar("T")
Loss = Callable[..., tuple[Tensor, Tensor]]  # of tokens, targets and perhaps documents
_PATIENCE = timedelta(minutes=30)  # until the first step is done: compiling and reading may take long
_CLEANUP = 30.0  # seconds after which a process that cannot leave its group ends without


def compiled(function: Callable[..., T], **how: Any) -> Callable[..., T]:
    """``torch.compile``; should it fail, also in mid-run, one warning and the function as it is from then on."""
    fast: Callable[..., T] | None = torch.compile(function, **how)

    def call(*args: Any, **kwargs: Any) -> T:
        nonlocal fast
        if fast is not None:
            try:
                return fast(*args, **kwargs)
            except Exception as error:
                from torch._dynamo.exc import TorchDynamoException  # which takes a second to import

                if not isinstance(error, (TorchDynamoException, ImportError, OSError)):
                    raise
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                warnings.warn(f"torch.compile failed, going on without: {reason}", stacklevel=2)
                fast = None
        return function(*args, **kwargs)

    return call


class Objective(nn.Module):
    """``model.loss`` under autocast as a module's forward, so that DDP can wrap it.

    ``documents`` (B, T), the number of each token's document, keeps attention within it.
    """

    def __init__(self, model: GPT, loss: Loss, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.loss, self.device, self.dtype = loss, device, dtype

    def forward(self, idx: Tensor, targets: Tensor, documents: Tensor | None = None) -> tuple[Tensor, Tensor]:
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            if documents is None:
                return self.loss(idx, targets)
            dropout = self.model.training and self.model.config.dropout > 0
            return self.loss(idx, targets, *within_documents(documents, dropout))

    def infer(self, function: Callable[[], T]) -> T:
        """Calls a function that runs parts of the model, in the same arithmetic."""
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            return function()


def recompute_blocks(model: GPT) -> None:
    """From here on a block keeps what goes into it alone; its backward computes the rest again, dropout too.

    Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016, by torch.utils.checkpoint.
    """
    for block in model.transformer.h:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


class Runtime:
    """One process of a run, set up as ``choices`` say: ``rank`` of ``world``; ``device``; ``dtype`` of the arithmetic.

    ``resolved`` is the record of the choices for a checkpoint.
    """

    def __init__(self, choices: Choices) -> None:
        self.choices, self.resolved = choices, choices.resolved
        self.rank, self.world = choices.rank, choices.world
        self._grouped = choices.grouped
        self.parallel, self.shards, self.compile = choices.parallel, choices.shards, choices.compile
        self.device, self.dtype = torch.device(choices.device), getattr(torch, choices.dtype)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if choices.threads != torch.get_num_threads():
            torch.set_num_threads(choices.threads)
        torch.set_float32_matmul_precision(choices.matmul_precision)
        if choices.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(choices.deterministic)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self._stuck = torch.zeros((), device=self.device)
        self._recompute = choices.recompute
        self._timeout = timedelta(seconds=choices.timeout)
        self._patient = True
        self._objective: Any = None
        self._writer = ThreadPoolExecutor(1, "writer")
        self._written: Future[None] | None = None
        if self._grouped:
            self._join(choices.backend)

    def _join(self, backend: str) -> None:
        patience = max(self._timeout, _PATIENCE)
        store = processes.meet(self.rank, self.world, patience)
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world, timeout=patience)
        processes.JOB.groups.append(dist.group.WORLD)  # type: ignore[arg-type]
        # what rank 0 does alone, such as writing a checkpoint, may take longer than a step
        self._control = dist.new_group(backend="gloo", timeout=patience)
        processes.JOB.groups.append(self._control)
        self._hosts = dist.group.WORLD  # for numbers that are on no device
        if backend != "gloo":
            self._hosts = dist.new_group(backend="gloo", timeout=patience)
            processes.JOB.groups.append(self._hosts)
        dist.barrier(self._control)  # from here on nobody needs the store, which may go with rank 0

    def wrap(self, model: GPT, batch: tuple[int, int] | None) -> Loss:
        """``model.loss`` for this machine: on its device, autocast, compiled or not, gradients averaged over the ranks.

        The model's parameters may be others afterwards, so the optimiser is made of those. ``batch`` is the
        largest shape (B, T) that will come; None where nothing will be differentiated.

        DDP lays its buckets out anew after the first backward, which changes the order of its sums; one
        throw-away backward here makes the layout final before the first real step.
        """
        if self._recompute:
            recompute_blocks(model)
        if self.parallel != "ddp":
            return self._shard(model)
        model.to(self.device)
        loss: Loss = compiled(model.loss) if self.compile else model.loss
        objective = self._objective = Objective(model, loss, self.device, self.dtype)
        if self.world == 1 or batch is None:
            return objective
        ids = [self.device.index] if self.device.type == "cuda" else None
        wrapped = DistributedDataParallel(objective, device_ids=ids, gradient_as_bucket_view=True)
        zeros = torch.zeros(batch, dtype=torch.long, device=self.device)
        wrapped(zeros, zeros)[0].backward()
        model.zero_grad(set_to_none=True)
        return wrapped

    def _shard(self, model: GPT) -> Loss:
        """FSDP2: a process keeps its share of each tensor, and has the matrices of a block or two whole at a time.

        Those travel in the arithmetic's type, which autocast would round them to anyhow, their gradients in float32.
        Embeddings and LayerNorms stay float32, and whole from a forward to its backward. So the arithmetic is DDP's.
        Zhao et al., "PyTorch FSDP", 2023; torch.distributed.fsdp.fully_shard.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

        size = (self.world,) if self.parallel == "fsdp" else (self.world // self.shards, self.shards)
        mesh = init_device_mesh(self.device.type, size, mesh_dim_names=("replicate", "shard")[-len(size) :])
        processes.JOB.groups.extend(mesh.get_all_groups())
        self._wait_at_most(max(self._timeout, _PATIENCE))
        policy = MixedPrecisionPolicy(param_dtype=self.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in model.transformer.h:
            matrices: list[Any] = [block.attn, block.mlp]
            for part in matrices if self.compile else ():
                part.forward = compiled(part.forward)
            fully_shard(matrices, mesh=mesh, mp_policy=policy)
        self._objective = fully_shard(Objective(model, model.loss, self.device, self.dtype), mesh=mesh)
        register_fsdp_forward_method(self._objective, "infer")
        return self._objective

    @torch.no_grad()
    def infer(self, function: Callable[[], T]) -> T:
        """Calls a function that runs the wrapped model's parts, without dropout and gradients.

        The arithmetic is that of the loss. Nothing is compiled, since shapes may change from call to call. Where
        processes share a model, all of them call this, and run its parts as often.
        """
        training = self._objective.model.training
        self._objective.eval()
        try:
            with torch.compiler.set_stance("force_eager") if self.compile else contextlib.nullcontext():
                return self._objective.infer(function)
        finally:
            self._objective.train(training)

    def seed(self, key: int) -> None:
        """Seeds what dropout draws from; ``torch.manual_seed`` does too, for every device and 100 µs."""
        torch.default_generator.manual_seed(key)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(key)
        elif self.device.type == "mps":
            torch.mps.manual_seed(key)

    @contextmanager
    def sync(self, loss: Loss, last: bool) -> Iterator[None]:
        """Forward and backward inside; gradients are exchanged only in the ``last`` micro step of a step."""
        if self.parallel != "ddp":
            loss.set_requires_gradient_sync(last)  # type: ignore[attr-defined]
        skip = isinstance(loss, DistributedDataParallel) and not last
        with loss.no_sync() if skip else contextlib.nullcontext():  # type: ignore[attr-defined]
            yield

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def clip(self, optimizer: torch.optim.Optimizer, max_norm: float) -> Tensor:
        """The global norm of the gradients, which are scaled down to ``max_norm``; 0 does not clip."""
        self.scaler.unscale_(optimizer)
        params = [p for group in optimizer.param_groups for p in group["params"]]
        norm = _whole(nn.utils.get_total_norm([p.grad for p in params if p.grad is not None]))
        nn.utils.clip_grads_with_norm_(params, max_norm or float("inf"), norm)
        return norm

    def update(self, optimizer: torch.optim.Optimizer, loss: Tensor, norm: Tensor) -> None:
        """One step of the optimiser, and none ever again after a loss or gradient that was not finite.

        The check stays on the device: the fused kernels skip their update where ``found_inf`` is set. In
        float16 it is the scaler that skips, one step at a time: gradients that overflow are no failure there.
        """
        if optimizer.defaults.get("fused") and not self.scaler.is_enabled():
            self._stuck = torch.maximum(self._stuck, (~torch.isfinite(loss + norm)).float())
            optimizer.found_inf = self._stuck  # type: ignore[attr-defined]
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if self._patient and self._grouped:
            self._patient = False
            self._wait_at_most(self._timeout)

    def _wait_at_most(self, timeout: timedelta) -> None:
        for group in processes.JOB.groups:
            if group is not self._control:
                dist.distributed_c10d._set_pg_timeout(timeout, group)

    def reduce(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def total(self, number: float) -> float:
        """The sum of a number over all ranks; the device goes on meanwhile."""
        if self.world == 1:
            return number
        tensor = torch.tensor(number, dtype=torch.float64)
        dist.all_reduce(tensor, group=self._hosts)
        return tensor.item()

    def broadcast(self, make: Callable[[], T]) -> T:
        """What ``make`` returns on rank 0, which alone calls it, on every rank; so is what it raises.

        Raises:
            Exception: rank 0's.
        """
        if self.world == 1:
            return make()
        box: list[Any] = [None, None]
        if self.rank == 0:
            try:
                box[0] = make()
            except Exception as error:  # whatever it is, nobody must wait for a value that will not come
                box[1] = error
        dist.broadcast_object_list(box, src=0, group=self._control)
        if box[1] is not None:
            raise box[1]
        return box[0]

    def written(self) -> None:
        """Waits for what rank 0 was given to ``write``; what that raised is raised on every rank."""

        def wait() -> None:
            work, self._written = self._written, None
            if work:
                work.result()

        self.broadcast(wait)

    def write(self, make: Callable[[], None], wait: bool) -> None:
        """Rank 0 alone calls ``make``: while the others ``wait``, else in a thread, once all before is ``written``."""
        if wait:
            self.broadcast(make)
        elif self.rank == 0:
            self._written = self._writer.submit(make)

    def gather(self, found: T) -> list[T]:
        """What every rank found, in their order, on each of them."""
        every: list[Any] = [found] * self.world
        if self.world > 1:
            dist.all_gather_object(every, found, group=self._control)
        return every

    def agree(self, found: dict[str, Any]) -> None:
        """Raises ValueError, on every rank, where the processes found different things under the same names."""
        every = self.gather(found)
        for rank, other in enumerate(every):
            if what := next((name for name in found if other[name] != every[0][name]), None):
                raise UserError(
                    f"{what} is {every[0][what]} on rank 0 and {other[what]} on rank {rank}: all processes need the "
                    "same knobs, data and out_dir"
                )

    def not_finite(self, model: GPT, optimizer: torch.optim.Optimizer) -> str:
        """The first weight, or moment of AdamW as ``<parameter>/<slot>``, that holds NaN or infinity on any rank."""
        self._reshard()
        tensors = dict(model.named_parameters())
        for name, p in model.named_parameters():
            tensors |= {f"{name}/{slot}": t for slot, t in optimizer.state.get(p, {}).items() if t.dim()}
        marks = self.reduce(torch.stack([(~_is_finite(here(t))).float() for t in tensors.values()]))
        return next((name for name, mark in zip(tensors, marks.tolist(), strict=True) if mark), "")

    def remedy(self) -> str:
        """What may help against what is not finite, after a colon; empty where this arithmetic is not to blame."""
        return "" if self.dtype == torch.float32 else f": {self.resolved['dtype']} may overflow, try --dtype=float32"

    def _reshard(self) -> None:
        """Makes the model's parameters the optimiser's again, which they are not after a forward without backward."""
        if hasattr(self._objective, "reshard"):
            self._objective.reshard()

    def check_replicas(self, model: GPT) -> None:
        """Compares a hash of each parameter with those of the processes that should hold the same bits.

        Raises:
            FloatingPointError: they do not, on any rank; names the ranks and the first parameter.
        """
        if not self._grouped:
            return
        self._reshard()
        parameters = dict(model.named_parameters())
        mine = torch.stack([_hash(here(p)) for p in parameters.values()])
        hashes = torch.empty(self.world, len(mine), dtype=torch.int64, device=mine.device)
        dist.all_gather(list(hashes), mine)
        replicas = hashes.view(-1, self.shards, len(mine))
        most = replicas.mode(0).values if len(replicas) > 2 else replicas[0]
        differ = (replicas != most).view(self.world, -1).cpu()
        if differ.any():
            ranks = ", ".join(str(rank) for rank in range(self.world) if differ[rank].any())
            first = list(parameters)[int(differ.any(0).nonzero()[0])]
            raise FloatingPointError(
                f"the weights of rank {ranks} are no longer those of the other processes, first {first}: a device or "
                "the network makes errors; resume from an earlier checkpoint"
            )

    def pin(self, array: NDArray[Any]) -> Tensor:
        """A tensor over an array; in pinned memory where that makes ``move`` faster."""
        tensor = torch.from_numpy(array)
        return tensor.pin_memory() if self.device.type == "cuda" else tensor

    def move(self, tensor: Tensor) -> Tensor:
        """To the device; from pinned memory to a GPU without waiting."""
        return tensor.to(self.device, non_blocking=self.device.type == "cuda")

    def later(self, tensor: Tensor) -> Callable[[], list[float]]:
        """Starts to copy a tensor to the host; the call that is returned waits for it and no further work."""
        if self.device.type != "cuda":
            return tensor.tolist
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()

        def read() -> list[float]:
            done.synchronize()
            return host.tolist()

        return read

    def full_state(
        self, model: GPT, optimizer: torch.optim.Optimizer | None = None, copy: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """All weights by name and all optimiser tensors as ``<parameter>/<slot>``, contiguous on rank 0's CPU.

        The other ranks get empty dictionaries. Shares are put together one tensor at a time. On a CPU the tensors may
        be the model's own, unless a ``copy`` is asked for.
        """
        self._reshard()
        names = {p: name for name, p in model.named_parameters()}
        weights: dict[str, Tensor] = {}
        slots: dict[str, Tensor] = {}

        def keep(kept: dict[str, Tensor], name: str, tensor: Tensor) -> None:
            whole = _whole(tensor.detach())
            if self.rank == 0:
                kept[name] = whole.to("cpu", copy=copy).contiguous()

        for p, name in names.items():
            keep(weights, name, p)
        for p, state in ((p, optimizer.state[p]) for p in names) if optimizer else ():
            for slot, value in state.items():
                keep(slots, f"{names[p]}/{slot}", value)
        return weights, slots

    def close(self) -> None:
        """Finishes what is being written, and leaves the process group; a process that cannot leave ends.

        Who fails says so before it leaves, since that is what the others see of it.

        The groups' C++ objects stay until the process ends: their destructor waits for gloo's threads with the
        GIL held, while one of those may be waiting for the GIL to let go of a tensor (seen with torch 2.13).
        """
        error = sys.exception()
        told = processes.told_by_the_first(str(error), error) if self._grouped and isinstance(error, Exception) else ""

        def give_up() -> None:
            if told:
                say(told, sys.stderr)
            os._exit(1)

        self._writer.shutdown()
        if self._grouped and dist.is_initialized():
            guard = threading.Timer(_CLEANUP, give_up)
            guard.daemon = True
            guard.start()
            dist.destroy_process_group()
            guard.cancel()


def laid_out_as(p: Tensor, whole: Tensor) -> Tensor:
    """A whole tensor, laid out as the parameter is: this process's share of it, where there are shares."""
    if not _is_shared(p) or p.shape != whole.shape:
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(p.device), p.device_mesh, p.placements, src_data_rank=None)  # type: ignore[attr-defined]


def _is_shared(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")  # a DTensor, whose module takes half a second to import


def _whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which this process may hold a share."""
    return tensor.full_tensor() if _is_shared(tensor) else tensor  # type: ignore[attr-defined]


def here(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if _is_shared(tensor) else tensor  # type: ignore[attr-defined]


def is_finite(tensor: Tensor) -> bool:
    """Whether there is neither NaN nor infinity in a tensor of floats."""
    return bool(_is_finite(tensor))


def _is_finite(tensor: Tensor) -> Tensor:
    if not tensor.numel():  # as a process's share of a short parameter
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    low, high = tensor.aminmax()
    return low.isfinite() & high.isfinite()


def _hash(tensor: Tensor) -> Tensor:
    """Of a tensor's bits, an int64; 0 where there are none, as in a process's share of a short parameter."""
    return torch.hash_tensor(tensor).view(torch.int64) if tensor.numel() else tensor.new_zeros((), dtype=torch.int64)
