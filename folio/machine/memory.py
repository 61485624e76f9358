"""The memory that a step needs on a device, and the bytes that the device sends, computed before the step runs.

No formula gives the tensors that a model keeps for its backward. So the model runs one micro step on tensors without
data, and the bytes of the live ones are counted.
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from folio.config.options import Data
from folio.machine.choices import ATTENTION_BLOCK
from folio.machine.wrap import Objective, recompute_blocks, set_attention
from folio.model.attention import Mask
from folio.model.config import GPTConfig
from folio.model.gpt import GPT, CausalSelfAttention
from folio.model.kernels import BlockedAttention, split_heads_at_once

NOTHING_FITS = "no smaller batch, recomputation or sharding makes it fit"
_COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.empty_like.default}  # of a weight, in another dtype
FLOAT32 = 4  # bytes of a weight, a gradient and each of AdamW's two moments


@dataclass(frozen=True)
class Step:
    """One device's part of a step: ``micro_steps`` of at most ``rows`` rows, in ``dtype``.

    Of ``world`` devices, ``shards`` hold one copy of the model together: 1 with DDP, all of them with FSDP.
    A row has ``context`` tokens; None: block_size. ``documents``: attention stays within documents. ``muon``: the
    optimizer keeps one moment of the blocks' matrices, not two. ``averaged``: it keeps an average of the weights too.
    """

    rows: int
    micro_steps: int
    dtype: torch.dtype
    gpu: bool
    recompute: bool = False
    documents: bool = False
    world: int = 1
    shards: int = 1
    context: int | None = None
    muon: bool = False
    averaged: bool = False


class Memory(NamedTuple):
    """Bytes on one device at the peak of a step."""

    weights: int
    optimizer: int
    gradients: int
    copies: int  # of weights, for the arithmetic: in 16 bits, or gathered from other devices
    activations: int
    logits: int  # and the tensors of their size that the loss keeps

    @property
    def total(self) -> int:
        return sum(self)


def needed(shape: GPTConfig, step: Step) -> Memory:
    """The memory of a step in eager mode, without that of the driver, the allocator and the network library.

    CUDA graphs need as much, since their gradients lie where activations were. But they keep it from step to step, so
    the memory of an evaluation is additional.

    FSDP's shards are exact. Of the tensors that it gathers, these are counted: the weights outside the blocks'
    matrices, which stay until the end of the backward; the matrices of two blocks, since those of the next block are
    gathered early; and the gradients of two blocks, or of the model if several micro steps are summed first.
    """
    count, block = _counts(shape)
    # DDP's buckets hold all gradients from the beginning, and so does a second micro step
    again = step.micro_steps > 1 or (step.world > 1 and step.shards == 1)
    rows, context, sharded = step.rows, step.context or shape.block_size, step.shards > 1
    copied = step.dtype == torch.bfloat16 and not (step.recompute or step.world > 1)
    most = _micro_step(
        shape, rows, context, step.dtype, step.gpu, step.recompute, step.documents, again, sharded, copied
    )
    gradients, copies = most["gradients"], most["copies"]
    if sharded:
        blocks = block * shape.n_layer
        gradients += FLOAT32 * (blocks + block if step.micro_steps > 1 else count // step.shards + 2 * block)
        copies += FLOAT32 * (count - blocks) + step.dtype.itemsize * 2 * block
    share = FLOAT32 * count // step.shards
    moments = (2 + step.averaged) * count - (_orthogonalized(shape) if step.muon else 0)
    return Memory(share, FLOAT32 * moments // step.shards, gradients, copies, most["activations"], most["logits"])


def bytes_sent(shape: GPTConfig, step: Step) -> int:
    """Bytes that a device sends in a step, by the ring algorithms.

    DDP sums the gradients once. FSDP gathers the blocks' matrices for the forward and the backward of each micro
    step, in the step's dtype, and the other weights once a micro step, in float32. It reduces and scatters the
    gradients once, in float32, and sums each shard over the copies of the model. With Muon, processes gather the
    updates of the blocks' matrices; with FSDP they exchange shards for matrices, and then updates for shards.
    """
    count, block = _counts(shape)
    blocks, replicas = block * shape.n_layer, step.world // step.shards
    gathered = step.micro_steps * (2 * blocks * step.dtype.itemsize + (count - blocks) * FLOAT32)
    within = (gathered + FLOAT32 * count) * (step.shards - 1) / step.shards
    across = 2 * FLOAT32 * count / step.shards * (replicas - 1) / replicas
    muon = 0.0
    if step.muon:
        sharers, update = step.shards if step.shards > 1 else step.world, 2 if step.dtype == torch.bfloat16 else FLOAT32
        part = _orthogonalized(shape) * (sharers - 1) / sharers
        muon = part / sharers * (FLOAT32 + update) if step.shards > 1 else part * update
    return round(within + across + muon)


def remedies(data: Data, sharded: bool, fits: Callable[[dict[str, Any]], bool]) -> str:
    """Options that make a step fit and keep its number of rows; "" if there are none.

    Each change that suffices alone; if none does, the first combination. ``sharded``: devices may share the model.
    """
    size, steps = data.batch_size, data.gradient_accumulation_steps
    batches = [
        {"batch_size": b, "gradient_accumulation_steps": steps * size // b} for b in range(size, 0, -1) if size % b == 0
    ]
    block = {"activation_checkpointing": "block"}
    shared = [{"parallel": "fsdp"}] if sharded else []

    def first(others: dict[str, Any]) -> list[dict[str, Any]]:
        ways = [others | batch for batch in batches]
        return [next(filter(fits, ways))] if fits(ways[-1]) else []

    alone = [*first({}), *filter(fits, [block, *shared])]
    together = [block, *shared, *(block | way for way in shared)]
    found = alone or next(filter(None, map(first, together)), [])
    implied = {"gradient_accumulation_steps"} if data.total_batch_size else set()
    ways = [" ".join(f"--{name}={value}" for name, value in way.items() if name not in implied) for way in found]
    return ", or ".join(ways)


def _counts(shape: GPTConfig) -> tuple[int, int]:
    """The numbers of parameters of the model, and of a block's matrices."""
    with torch.device("meta"):
        model = GPT(shape)
    return sum(p.numel() for p in model.parameters()), sum(p.numel() for p in _matrices(model)) // shape.n_layer


def _orthogonalized(shape: GPTConfig) -> int:
    """The number of parameters that Muon updates."""
    with torch.device("meta"):
        return sum(p.numel() for p in GPT(shape).transformer.h.parameters() if p.dim() == 2)


def _matrices(model: GPT) -> list[nn.Parameter]:
    """The parameters that FSDP gathers block by block, in the step's dtype: all of a block but its LayerNorms."""
    return [p for name, p in model.transformer.h.named_parameters() if ".ln_" not in name]


@functools.cache
def _micro_step(
    shape: GPTConfig,
    rows: int,
    context: int,
    dtype: torch.dtype,
    gpu: bool,
    recompute: bool,
    documents: bool,
    again: bool,
    sharded: bool,
    copied: bool,
) -> Counter[str]:
    """Bytes of tensors by kind, without the weights, at the peak of a micro step.

    ``again``: the gradients of an earlier micro step exist. ``sharded``: the blocks' matrices arrive in
    ``dtype``, and their gradients are freed when they are complete.
    """
    with FakeTensorMode():
        model = GPT(shape)
        gathered = set(_matrices(model)) if sharded else set()
        for p in gathered:
            p.data = p.data.to(dtype)
        if recompute:
            recompute_blocks(model)
        live = _Live(model)

        def count_gradient(p: Tensor) -> None:
            live.count_gradient(p)
            if p in gathered:
                p.grad = None

        if gpu:
            _set_gpu_kernels(model)
        elif not sharded:
            set_attention(model, BlockedAttention(ATTENTION_BLOCK), split_heads_at_once)
        with live:
            for p in model.parameters():
                p.register_post_accumulate_grad_hook(count_gradient)  # type: ignore[no-untyped-call]
                if again and p not in gathered:
                    p.grad = torch.empty_like(p)
                    live.count_gradient(p)
            tokens = torch.zeros(rows, context + 1, dtype=torch.long)
            # a GPU uses FlexAttention, which keeps the same tensors as attention without a mask
            numbers = torch.zeros(rows, context, dtype=torch.int32) if documents and not gpu else None
            objective = Objective(model, model.loss, torch.device("cpu"), dtype, copied)
            objective(tokens[:, :-1], tokens[:, 1:], numbers)[0].backward()
        return live.most


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The bytes of all live tensors, by kind: ``now``, and ``most`` when their sum was largest."""

    def __init__(self, model: GPT) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self._vocab_size = model.config.vocab_size
        self._weights = {id(s): s for s in (p.untyped_storage() for p in model.parameters())}
        self._alive: dict[int, tuple[weakref.ref[Any], str, int]] = {}  # by the storage's id

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and not self._is_weight(t) and id(t.untyped_storage()) not in self._alive:
                copy = func in _COPIES and self._is_weight(args[0])
                logits = t.dim() > 1 and t.size(-1) == self._vocab_size
                self._count(t, "copies" if copy else "logits" if logits else "activations")
        if self.now.total() > self.most.total():
            self.most = self.now.copy()
        return out

    def count_gradient(self, p: Tensor) -> None:
        """Counts a weight's complete gradient, and no longer counts it as an activation."""
        assert p.grad is not None
        self._free(id(p.grad.untyped_storage()))
        self._count(p.grad, "gradients")

    def _is_weight(self, t: Tensor) -> bool:
        return id(t.untyped_storage()) in self._weights

    def _count(self, t: Tensor, kind: str) -> None:
        storage = t.untyped_storage()
        key, size = id(storage), storage.nbytes()
        self._alive[key] = weakref.ref(storage, lambda _: self._free(key)), kind, size
        self.now[kind] += size

    def _free(self, key: int) -> None:
        if key in self._alive:
            _, kind, size = self._alive.pop(key)
            self.now[kind] -= size


class _FusedDropout(nn.Module):
    """Keeps a byte per element for the backward, as CUDA's kernel does."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return torch.native_dropout(x, self.p, True)[0]


def _fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, dropout: float) -> Tensor:
    """Keeps no scores for the backward, as CUDA's kernels do."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=q.size(2) > 1)


def _set_gpu_kernels(model: GPT) -> None:
    """Makes the model keep for its backward what a GPU's kernels keep.

    Fake tensors on a GPU would do so too, but have no gradients in a build without CUDA.
    """
    for module in list(model.modules()):
        if isinstance(module, CausalSelfAttention):
            module.attend = _fused_attention
        for name, child in module.named_children():
            if isinstance(child, nn.Dropout) and child.p:
                setattr(module, name, _FusedDropout(child.p))
