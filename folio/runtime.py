"""The machine under a run: device, arithmetic, processes. The only user of torch.distributed.

The loop sees one process on one device; what changes with more of them, or with another device, is here.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from folio.config import System
from folio.flops import peak
from folio.model import GPT, within_documents

T = TypeVar("T")
Loss = Callable[..., tuple[Tensor, Tensor]]  # of tokens, targets and perhaps documents

_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LEFT: list[Any] = []  # process groups that were left
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def compiled(function: Callable[..., T], **how: Any) -> Callable[..., T]:
    """``torch.compile``; should it fail, also in mid-run, one warning and the function as it is from then on."""
    fast: Callable[..., T] | None = torch.compile(function, **how)

    def call(*args: Any, **kwargs: Any) -> T:
        nonlocal fast
        if fast is not None:
            try:
                return fast(*args, **kwargs)
            except (TorchDynamoException, ImportError, OSError) as error:
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


def recompute_blocks(model: GPT) -> None:
    """From here on a block keeps what goes into it alone; its backward computes the rest again, dropout too.

    Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016, by torch.utils.checkpoint.
    """
    for block in model.transformer.h:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


class Runtime:
    """One process of a run. ``rank`` of ``world``; ``device``; ``dtype`` of the arithmetic.

    ``resolved`` holds what every ``auto`` became and what else the bits depend on. Given a former run's
    ``resolved``, its choices are taken again wherever this machine allows.

    Raises:
        ValueError: a device that is not there, a launcher's variable that is missing.
    """

    def __init__(self, system: System, *, flops: float = 0.0, resolved: dict[str, Any] | None = None) -> None:
        before = resolved or {}
        self.rank, self.world, local_rank = _place()
        self.device = _device(system.device, before.get("device"), local_rank, self.world)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        dtype = _asked_or_before(system.dtype, before.get("dtype"))
        if dtype == "auto" or (system.dtype == "auto" and not _has(self.device, dtype)):
            dtype = _fast_dtype(self.device)
        self.dtype = _DTYPES[dtype]
        compiled = _asked_or_before(system.compile, before.get("compile"))
        if compiled == "auto":
            compiled = _compile_pays(self.device, self.dtype, flops)
        self.compile = bool(compiled)
        precision = _asked_or_before(system.matmul_precision, before.get("matmul_precision"))
        torch.set_float32_matmul_precision(_precision(self.device) if precision == "auto" else precision)
        if system.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        self.resolved: dict[str, Any] = {
            "device": self.device.type,
            "dtype": dtype,
            "compile": self.compile,
            "matmul_precision": torch.get_float32_matmul_precision(),
            "deterministic": system.deterministic,
            "world": self.world,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "processor": (
                torch.cuda.get_device_name(self.device)
                if self.device.type == "cuda"
                else torch.backends.cpu.get_cpu_capability()
            ),
        }
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self._stuck = torch.zeros((), device=self.device)
        self._grouped = self.world > 1 or "RANK" in os.environ
        if self._grouped:
            backend = ("nccl" if self.device.type == "cuda" else "gloo") if system.backend == "auto" else system.backend
            if backend == "nccl" and self.device.type != "cuda":
                backend = "gloo"  # nanoGPT's default on a machine without CUDA
            dist.init_process_group(backend)

    def differences(self, before: dict[str, Any]) -> list[str]:
        """Why a run that was resolved as ``before`` continues exactly to rounding only; empty: to the bit."""
        found = [
            f"{name} was {before[name]} and is {value}"
            for name, value in self.resolved.items()
            if name in before and before[name] != value
        ]
        if self.device.type == "cuda" and not self.resolved["deterministic"]:
            found.append("a GPU needs --deterministic=True for the same bits")
        return found

    def wrap(self, model: GPT, batch_size: int) -> Loss:
        """``model.loss`` for this machine: autocast, compiled or not, gradients averaged over the ranks.

        DDP lays its buckets out anew after the first backward, which changes the order of its sums; one
        throw-away backward here makes the layout final before the first real step.
        """
        loss: Loss = compiled(model.loss) if self.compile else model.loss
        objective = Objective(model, loss, self.device, self.dtype)
        if self.world == 1:
            return objective
        ids = [self.device.index] if self.device.type == "cuda" else None
        wrapped = DistributedDataParallel(objective, device_ids=ids, gradient_as_bucket_view=True)
        zeros = torch.zeros(batch_size, model.config.block_size, dtype=torch.long, device=self.device)
        wrapped(zeros, zeros)[0].backward()
        model.zero_grad(set_to_none=True)
        return wrapped

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
        skip = isinstance(loss, DistributedDataParallel) and not last
        with loss.no_sync() if skip else contextlib.nullcontext():  # type: ignore[attr-defined]
            yield

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def clip(self, optimizer: torch.optim.Optimizer, max_norm: float) -> Tensor:
        """The global norm of the gradients, which are scaled down to ``max_norm``; 0 does not clip."""
        self.scaler.unscale_(optimizer)
        params = [p for group in optimizer.param_groups for p in group["params"]]
        return nn.utils.clip_grad_norm_(params, max_norm or float("inf"))

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

    def reduce(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

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
        dist.broadcast_object_list(box, src=0)
        if box[1] is not None:
            raise box[1]
        return box[0]

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
        self, model: GPT, optimizer: torch.optim.Optimizer | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """All weights by name and all optimiser tensors as ``<parameter>/<slot>``, contiguous on the CPU."""
        names = {p: name for name, p in model.named_parameters()}
        weights = {name: _on_cpu(p) for p, name in names.items()}
        slots = (
            {
                f"{names[p]}/{slot}": _on_cpu(value)
                for group in optimizer.param_groups
                for p in group["params"]
                for slot, value in optimizer.state[p].items()
            }
            if optimizer
            else {}
        )
        return weights, slots

    def close(self) -> None:
        """Leaves the process group.

        The group's C++ object stays until the process ends: its destructor waits for gloo's threads with the
        GIL held, while one of those may be waiting for the GIL to let go of a tensor (seen with torch 2.13).
        """
        if self._grouped and dist.is_initialized():
            _LEFT.append(dist.group.WORLD)
            dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """Ends the process with this code, at once where it had a group (see ``Runtime.close``)."""
    if _LEFT:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu").contiguous()


def _place() -> tuple[int, int, int]:
    """(rank, world, local rank) from the launcher's environment; a run without one is alone."""
    if "RANK" not in os.environ and "LOCAL_RANK" not in os.environ:
        return 0, 1, 0
    if missing := [name for name in _LAUNCHER if name not in os.environ]:
        raise ValueError(f"{missing[0]} is not set, but {', '.join(_LAUNCHER)} go together: use torchrun")
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])


def _asked_or_before(asked: T, before: T | None) -> T:
    return before if asked == "auto" and before is not None else asked


def _device(asked: str, before: str | None, local_rank: int, world: int) -> torch.device:
    have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if asked == "auto":
        asked = before if before and have.get(before) else next(d for d in ("cuda", "mps", "cpu") if have[d])
    try:
        device = torch.device(asked)
    except RuntimeError:
        raise ValueError(f"device={asked}: must be auto, cpu, cuda, cuda:0 … or mps") from None
    if not have.get(device.type, False):
        raise ValueError(f"device={asked}: there is none on this machine; use --device=cpu or --device=auto")
    if device.type != "cuda":
        return device
    index = local_rank if world > 1 else (device.index or 0)
    last = max(index, int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1)  # so that every rank finds it
    if last >= (count := torch.cuda.device_count()):
        raise ValueError(f"device={asked}: cuda:{last} is not there, this machine has {count} GPUs")
    return torch.device("cuda", index)


def _has(device: torch.device, dtype: str) -> bool:
    return dtype in ("float32", _fast_dtype(device)) or (dtype == "float16" and device.type == "cuda")


def _fast_dtype(device: torch.device) -> str:
    """bfloat16 where the hardware multiplies it, float16 on older GPUs, float32 elsewhere."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"
    if device.type == "cpu" and sys.platform == "linux":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return "bfloat16" if fast else "float32"
    return "float32"


def _compile_pays(device: torch.device, dtype: torch.dtype, flops: float) -> bool:
    """On a GPU with Triton and a C compiler, where a run takes more than a minute at a tenth of the peak.

    On a CPU compiling gains a few per cent and costs half a minute, so it is left to who asks for it.
    """
    if device.type != "cuda" or not importlib.util.find_spec("triton"):
        return False
    if not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
        return False
    return flops > 60 * 0.1 * (peak(device, dtype) or 1e14)


def _precision(device: torch.device) -> str:
    """TF32 on a GPU, as nanoGPT allows. On a CPU "medium" reaches oneDNN's faster kernels, and is taken where
    a product shows that it stays float32-accurate there (it may mean bfloat16 elsewhere)."""
    if device.type == "cuda":
        return "high"
    if device.type != "cpu":
        return "highest"
    torch.set_float32_matmul_precision("medium")
    a = torch.linspace(-1, 1, 256 * 256).view(256, 256)
    exact = a.double() @ a.double().T
    error = ((a @ a.T).double() - exact).abs().max() / exact.abs().max()
    return "medium" if error < 2e-6 else "highest"
