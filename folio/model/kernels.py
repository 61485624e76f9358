"""Fast paths of the model; ``machine.wrap`` sets them. The plain functions are their oracles, by test.

The cross-entropy of a compiled model on a GPU makes the logits of a few thousand tokens at a time, and at once their
gradient, so those of a whole batch, 6 GB for 32 rows of GPT-2, are never in memory together (Hsu et al., "Liger
Kernel", 2024; Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2024).

All else is for a CPU. Text is generated with the weights in 16 bits and the rest in float32 (``pack``), since for one
token of a large model the time goes into reading the weights; of a small one, into calls (``NextLogits``).

Causal attention in blocks of queries: a block attends to the keys up to its end only, so nearly half of the products
and of the softmax is never computed, as in FlashAttention (Dao, "FlashAttention-2", 2023). The probabilities are kept
for the backward, which is faster on a CPU than computing them again. torch's fused kernel
(``F.scaled_dot_product_attention``) has a slow backward there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from folio.model.attention import EPS, QUERIES, KVCache, Mask, Rotation, attend, rotation_at, split_heads
from folio.model.gpt import GPT, cross_entropy, soft_cap

_FEW = 32  # rows, up to which a packed float16 product is faster than one in bfloat16
_LARGEST = 60000.0  # a little less than float16 holds


class BlockedAttention:
    """``attend`` with queries in blocks of ``block`` tokens: set it as a module's ``attend``.

    It differs from ``attend`` by rounding only. With a mask, dropout, a cache or no gradient it is ``attend``.
    """

    def __init__(self, block: int) -> None:
        self.block = block

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, dropout: float) -> Tensor:
        if mask is not None or dropout or not q.requires_grad or q.size(2) != k.size(2):
            return attend(q, k, v, mask, dropout)
        B, H, T, D = q.shape
        y: Tensor = _Blocked.apply(*(t.reshape(B * H, T, D) for t in (q, k, v)), self.block)  # type: ignore[no-untyped-call]
        return y.view(B, H, T, D)


class _Blocked(torch.autograd.Function):
    """Causal attention, (N, T, D) each, where N is batch × heads."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, block: int) -> Tensor:
        T = q.size(1)
        size = min(block, T)
        after = torch.full((size, size), -math.inf, dtype=q.dtype).triu_(1)  # keys that a query must not attend to
        q = q * (1.0 / math.sqrt(q.size(-1)))
        y, probabilities = torch.empty_like(q), []
        for start in range(0, T, block):
            end = min(start + block, T)
            scores = q[:, start:end] @ k[:, :end].transpose(1, 2)  # (N, block, end)
            scores[:, :, start:] += after[: end - start, : end - start]
            probabilities.append(scores.softmax(-1))
            torch.bmm(probabilities[-1], v[:, :end], out=y[:, start:end])
        ctx.save_for_backward(q, k, v, *probabilities)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *probabilities = ctx.saved_tensors
        (dy,) = gradients
        end = T = q.size(1)
        dq, dk, dv = (torch.empty_like(q) for _ in range(3))
        for p in reversed(probabilities):
            start = end - p.size(1)
            dp = dy[:, start:end] @ v[:, :end].transpose(1, 2)
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
            torch.bmm(ds, k[:, :end], out=dq[:, start:end])
            for gradient, left, right in ((dk, ds, q), (dv, p, dy)):
                if end == T:  # this block attends to all keys, so it writes every gradient
                    torch.bmm(left.transpose(1, 2), right[:, start:end], out=gradient)
                else:
                    gradient[:, :end] += left.transpose(1, 2) @ right[:, start:end]
            end = start
        return dq.mul_(1.0 / math.sqrt(q.size(-1))), dk, dv, None


def split_heads_at_once(
    qkv: Tensor, n_head: int, rotation: Rotation | None, qk_norm: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``split_heads`` with its own backward, in half as many calls; it differs by rounding only.

    With positions (B, T), without gradients, and where there is nothing to turn or normalize, it is ``split_heads``.
    """
    plain = not qkv.requires_grad or (rotation is None and not qk_norm)
    if plain or (rotation is not None and rotation[0].dim() > 2):
        return split_heads(qkv, n_head, rotation, qk_norm)
    turn = None if rotation is None else tuple(factor.to(qkv.dtype) for factor in rotation)
    q, k, v = _SplitHeads.apply(qkv, n_head, turn, qk_norm)  # type: ignore[no-untyped-call]
    return q, k, v


class _SplitHeads(torch.autograd.Function):
    """Queries and keys are multiplied by ``scale`` and turned. Turning keeps their norm, so it may come second."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, n_head: int, turn: Rotation | None, qk_norm: bool) -> tuple[Tensor, ...]:
        (B, T, C), scale = qkv.shape, None
        parts = qkv.view(B, T, 3, n_head, C // (3 * n_head)).permute(2, 0, 3, 1, 4)
        parts = parts.clone(memory_format=torch.contiguous_format)
        qk = parts[:2]
        if qk_norm:
            exact = torch.promote_types(qk.dtype, torch.float32)
            norm = torch.linalg.vector_norm(qk, dim=-1, keepdim=True, dtype=exact)
            scale = (norm.square_() / qk.size(-1) + EPS).rsqrt_()
            scale[0] *= QUERIES
            qk *= scale
        if turn is not None:
            qk.copy_(_turn(qk, *turn))
        ctx.turn = turn
        ctx.save_for_backward(qk, scale)
        return parts.unbind()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        qk, scale = ctx.saved_tensors
        d = torch.stack(gradients)
        dqk = d[:2]
        if scale is not None:
            along = torch.linalg.vecdot(dqk, qk)[..., None]  # what the norm takes from the gradient
            along *= -1 / qk.size(-1)
            along[0] /= QUERIES**2
            dqk.addcmul_(qk, along)
        if ctx.turn is not None:
            cos, sin = ctx.turn
            dqk.copy_(_turn(dqk, cos, -sin))
        if scale is not None:
            dqk *= scale
        _, B, H, T, D = d.shape
        return d.permute(1, 3, 0, 2, 4).reshape(B, T, 3 * H * D), None, None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``attention.rotate`` in fewer calls; with −sin it turns back."""
    return (x * cos).addcmul_(x.roll(x.size(-1) // 2, dims=-1), sin)


class PackedLinear:
    """A Linear's product with float32 inputs and a weight that is rounded to bfloat16.

    Up to ``_FEW`` rows are multiplied in float32 with the weight as FBGEMM packs it, in float16, which holds the
    rounded numbers exactly unless they are below 1e-5, and then nearly so. More rows are rounded to bfloat16 too.
    """

    def __init__(self, linear: nn.Linear) -> None:
        self.weight, self.bias = linear.weight.detach().bfloat16(), linear.bias
        self._packed = torch.ops.quantized.linear_prepack_fp16(self.weight.float(), self.bias)
        self._multiply = torch.ops.quantized.linear_dynamic_fp16.default

    def __call__(self, x: Tensor) -> Tensor:
        if x.numel() <= _FEW * x.size(-1):
            return self._multiply(x, self._packed)
        y = F.linear(x.bfloat16(), self.weight).float()
        return y if self.bias is None else y + self.bias


def pack(model: nn.Module) -> None:
    """Makes a float32 model on a CPU generate text fast: packed Linears, and no calls of dropout.

    Both take the places of the modules, so the Linears' float32 weights are released and the model can neither be
    trained nor saved. Linears whose weights float16 cannot hold stay, and all do where torch lacks FBGEMM.
    """
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, nn.Dropout):
                _replace(parent, name, _same)
            elif isinstance(module, nn.Linear) and _packable(module):
                _replace(parent, name, PackedLinear(module))


def _replace(parent: nn.Module, name: str, function: Callable[[Tensor], Tensor]) -> None:
    """A plain function in the place of a module: what calls a module costs more than some operators do."""
    delattr(parent, name)
    setattr(parent, name, function)


class NextLogits:
    """``GPT.next_logits`` on a CPU in fewer calls, which cost as much as the arithmetic of one token.

    The last block computes the keys and values of all tokens, and all else of the last one only.
    """

    def __init__(self, model: GPT) -> None:
        self.model = model
        blocks: list[Any] = list(model.transformer.h)
        self._blocks = [
            (block.ln_1.forward, block.attn.c_attn, block.attn.c_proj, block.ln_2.forward, block.mlp.forward)
            for block in blocks
        ]

    def __call__(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")  # "medium" is slower: oneDNN sets up each small product
        try:
            return self._compute(idx, cache)
        finally:
            torch.set_float32_matmul_precision(precision)

    def _compute(self, idx: Tensor, cache: KVCache | None) -> Tensor:
        (B, T), start = idx.shape, cache.length if cache is not None else 0
        body, c, rotation = self.model.transformer, self.model.config, None
        H, C = c.n_head, c.n_embd
        x = F.embedding(idx, body.wte.weight)  # (B, T, C)
        if c.position == "rope":
            rotation = rotation_at(torch.arange(start, start + T), C // H, x.dtype)
        else:
            x = x + body.wpe.weight.narrow(0, start, T)
        x = body.ln_e(x)
        if c.token_shift:
            x = body.shift(x, None, cache)
        for i, (ln_1, c_attn, c_proj, ln_2, mlp) in enumerate(self._blocks, 1):
            q, k, v = split_heads(c_attn(ln_1(x)), H, rotation, c.qk_norm)
            if cache is not None:
                k, v = cache.append(i - 1, k, v)
            if i == len(self._blocks):
                q, x = q[:, :, -1:], x[:, -1:]
            x = x + c_proj(attend(q, k, v, None, 0.0).transpose(1, 2).reshape(B, -1, C))
            x = x + mlp(ln_2(x))
        if cache is not None:
            cache.length += T
        return self.model.logits(body.ln_f(x[:, -1]))


@torch.no_grad()
def set_next_logits(model: GPT) -> None:
    """Sets ``NextLogits``, unless the architecture was changed so that the model itself computes something else."""
    idx = torch.arange(min(4, model.config.block_size, model.transformer.wte.num_embeddings))[None]
    fast, wanted = NextLogits(model), model.next_logits(idx)
    if (fast(idx) - wanted).abs().max() <= 1e-3 * wanted.abs().max():
        model.next_logits = fast  # type: ignore[method-assign]


def has_fbgemm() -> bool:
    """Whether torch was built with FBGEMM: on x86, not on Arm."""
    return "fbgemm" in torch.backends.quantized.supported_engines


def _packable(linear: nn.Linear) -> bool:
    low, high = linear.weight.aminmax()
    return bool(torch.maximum(-low, high) < _LARGEST)


def _same(x: Tensor) -> Tensor:
    return x


class ChunkedCrossEntropy:
    """``gpt.cross_entropy`` with at most ``logits`` numbers of logits at a time: set it as a model's ``cross_entropy``.

    It differs by rounding only. The weight's gradient is summed in float32.
    """

    def __init__(self, logits: int) -> None:
        self.logits = logits

    def __call__(self, x: Tensor, weight: Tensor, targets: Tensor, cap: float = 0.0) -> Tensor:
        chunk = 1 << (self.logits // weight.size(0)).bit_length() - 1  # tokens; products like powers of two
        if targets.numel() <= chunk or not torch.is_grad_enabled():
            return cross_entropy(x, weight, targets, cap)
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
        nats: Tensor = _Chunked.apply(x.view(-1, x.size(-1)), weight, targets.reshape(-1), chunk, cap)  # type: ignore[no-untyped-call]
        return nats


class _Chunked(torch.autograd.Function):
    """The gradients are made in the forward, where the logits are, and scaled in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, chunk: int, cap: float) -> Tensor:
        dx, dweight, nats = [], torch.zeros_like(weight, dtype=torch.float32), []
        for some, those in zip(torch.split(x, chunk), torch.split(targets, chunk), strict=True):
            logits = soft_cap((some @ weight.t()).float(), cap)
            counted = those != -1
            target = those.clamp(min=0)[:, None]
            total = logits.logsumexp(-1, keepdim=True)
            nats.append(((total - logits.gather(1, target)).squeeze(1) * counted).sum())
            hit = torch.arange(logits.size(1), device=logits.device) == target
            gradient = ((logits - total).exp() - hit.float()) * counted[:, None]
            gradient = (gradient * (1 - (logits / cap).square()) if cap else gradient).to(x.dtype)
            dx.append(gradient @ weight)
            dweight += gradient.t() @ some
        ctx.save_for_backward(torch.cat(dx), dweight)
        ctx.dtype = weight.dtype
        return torch.stack(nats).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight = ctx.saved_tensors
        return (dx.float() * gradients[0]).to(dx.dtype), (dweight * gradients[0]).to(ctx.dtype), None, None, None
