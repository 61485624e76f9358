"""GPT-2's architecture, and nothing else: tokens in, loss or logits out.

Parameter names and public methods are nanoGPT's (``model.py``), so its checkpoints and its users' code fit.
Sources: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019; nanoGPT.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from folio.errors import UserError
from folio.model.attention import KVCache, Mask, Rotation, attend, rotation_at, split_heads
from folio.model.config import GPTConfig

if TYPE_CHECKING:
    from torch.optim import AdamW


class LayerNorm(nn.Module):
    """Layer normalization over the last dimension, with an optional bias."""

    def __init__(self, ndim: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(ndim))
        self.bias = nn.Parameter(torch.zeros(ndim)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


def norm(config: GPTConfig) -> nn.Module:
    """The norm of the residual stream."""
    if config.norm == "unweighted":
        return nn.LayerNorm(config.n_embd, elementwise_affine=False)
    return LayerNorm(config.n_embd, bias=config.bias)


class CausalSelfAttention(nn.Module):
    """Multi-head attention of each token to itself and the tokens before it, (B, T, C) → (B, T, C)."""

    def __init__(self, config: GPTConfig, block: int = 0) -> None:
        super().__init__()
        config.check()
        qkv_bias = config.bias if config.qkv_bias == "auto" else config.qkv_bias
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=qkv_bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.qk_norm = config.qk_norm
        self.dropout = config.dropout
        self.block = block
        self.split_heads, self.attend = split_heads, attend  # faster kernels may be set here

    def forward(
        self, x: Tensor, mask: Mask | None = None, cache: KVCache | None = None, rotation: Rotation | None = None
    ) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.split_heads(self.c_attn(x), self.n_head, rotation, self.qk_norm)
        if cache is not None:
            k, v = cache.append(self.block, k, v)
        y = self.attend(q, k, v, mask, self.dropout if self.training else 0.0)  # (B, n_head, T, head)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))


class SquaredReLU(nn.Module):
    """max(x, 0)² (So et al., "Primer", 2021, section 4.1)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


def activation(config: GPTConfig) -> nn.Module:
    """The function inside the MLP."""
    if config.activation == "relu2":
        return SquaredReLU()
    return nn.GELU(approximate="tanh" if config.activation == "gelu_tanh" else "none")


class MLP(nn.Module):
    """Two linear layers with an activation between, four times as wide inside."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.activation = activation(config)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.activation(self.c_fc(x))))


class Block(nn.Module):
    """One transformer block: attention, then the MLP, each on a normalized copy of the residual stream."""

    def __init__(self, config: GPTConfig, block: int = 0) -> None:
        super().__init__()
        self.ln_1 = norm(config)
        self.attn = CausalSelfAttention(config, block)
        self.ln_2 = norm(config)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, mask: Mask | None = None, cache: KVCache | None = None, rotation: Rotation | None = None
    ) -> Tensor:
        x = x + self.attn(self.ln_1(x), mask, cache, rotation)
        return x + self.mlp(self.ln_2(x))


class TokenShift(nn.Module):
    """Adds to the state of each token those of the ``token_shift`` tokens before it, (B, T, C) → (B, T, C).

    Each channel has weights of its own, which start at zero. The first block then sees n-grams, which attention would
    have to learn. Token shift: Peng et al., "RWKV", 2023, section 3.1.1; after the embedding as in modded-nanogpt.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.token_shift, config.n_embd))

    def forward(self, x: Tensor, positions: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        n, T = self.weight.size(0), x.size(1)
        states = F.pad(x, (0, 0, n, 0)) if cache is None else cache.with_last(x, n)
        for i, weight in enumerate(self.weight.to(x.dtype), 1):
            earlier = states[:, n - i : n - i + T]
            if positions is not None:  # the row may hold several documents
                earlier = earlier * (positions >= i)[..., None]
            x = x + earlier * weight
        return x


class Transformer(nn.Module):
    """The parts of the body, under nanoGPT's names; ``GPT.hidden`` runs them."""

    def __init__(self, config: GPTConfig, vocab_size: int) -> None:
        super().__init__()
        self.wte = _embedding(vocab_size, config.n_embd)
        if config.position == "learned":
            self.wpe = _embedding(config.block_size, config.n_embd)
        self.ln_e = norm(config) if config.norm == "unweighted" else nn.Identity()
        if config.token_shift:
            self.shift = TokenShift(config)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.ln_f = norm(config)


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """Logits between −cap and cap; 0: as they are (Gemma Team, "Gemma 2", 2024, section 2)."""
    return cap * torch.tanh(logits / cap) if cap else logits


def cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, cap: float = 0.0) -> Tensor:
    """The sum of nats over the targets that are not −1, of states (B, T, C) and the head's weight (V, C)."""
    logits = soft_cap(F.linear(x, weight).float(), cap)  # (B, T, V)
    return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1), ignore_index=-1, reduction="sum")


def _embedding(rows: int, width: int) -> nn.Embedding:
    """An embedding with uninitialized weights, since ``GPT`` draws its own."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)  # type: ignore[no-untyped-call]


class GPT(nn.Module):
    """A GPT-2-class language model.

    ``generator(name)`` gives the random generator for the parameter of that name; without it the initial
    weights come from torch's global generator, as nanoGPT's do.

    Raises:
        ValueError: ``n_embd`` is not divisible by ``n_head``, or ``vocab_size`` is still "auto".
    """

    def __init__(self, config: GPTConfig, generator: Callable[[str], torch.Generator] | None = None) -> None:
        super().__init__()
        config.check()
        if config.vocab_size == "auto":
            raise UserError("vocab_size='auto' is for the trainer, which knows the data: give a number")
        self.config = config
        self.transformer = Transformer(config, config.vocab_size)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.cross_entropy = cross_entropy  # a kernel that keeps no logits may be set here
        if config.tie_weights:
            self.transformer.wte.weight = self.lm_head.weight
        if not self.lm_head.weight.is_meta:
            self._init_weights(generator or (lambda _: None))

    @classmethod
    def empty(cls, config: GPTConfig) -> GPT:
        """A model on the CPU with uninitialized weights, for loading a checkpoint."""
        with torch.device("meta"):
            model = cls(config)
        model._apply(lambda p: torch.empty(p.shape, dtype=p.dtype))  # type: ignore[no-untyped-call]  # to_empty is slow
        if config.tie_weights:
            model.transformer.wte.weight = model.lm_head.weight
        return model

    @torch.no_grad()
    def _init_weights(self, generator: Callable[[str], torch.Generator | None]) -> None:
        for name, p in self.named_parameters():
            if p.dim() >= 2:
                p.normal_(0.0, self._initial_std(name), generator=generator(name))
            elif name.endswith(".bias"):
                p.zero_()

    def _initial_std(self, name: str) -> float:
        """Of a matrix or embedding.

        GPT-2's residual projections start smaller, by 1/√(their number) (GPT-2 paper, section 2.3). With ``zero_init``
        the blocks add nothing at first and all logits are zero, as in modded-nanogpt's records.
        """
        c, output = self.config, name.endswith("c_proj.weight")
        if name == "transformer.shift.weight":
            return 0.0
        if not c.zero_init:
            return 0.02 / math.sqrt(2 * c.n_layer) if output else 0.02
        if output or name == "lm_head.weight":
            return 0.0
        embedding = 0.02 if c.tie_weights else 1.0
        return embedding if name.startswith("transformer.w") else 1 / math.sqrt(c.n_embd)

    def hidden(
        self,
        idx: Tensor,
        *,
        positions: Tensor | None = None,
        mask: Mask | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """(B, T) token ids → (B, T, C) normalized states: the body under every head.

        ``positions`` (T) or (B, T), below ``block_size``, default to 0 … T − 1, plus the length of the cache; ``mask``
        as in ``attend``.

        Raises:
            ValueError: more tokens than ``block_size``, and no ``positions``.
        """
        start = cache.length if cache is not None else 0
        T, given = idx.size(1), positions
        if positions is None:
            if start + T > self.config.block_size:
                raise UserError(f"{start + T} tokens do not fit block_size={self.config.block_size}")
            positions = torch.arange(start, start + T, device=idx.device)
        body, c, rotation = self.transformer, self.config, None
        x = body.wte(idx)  # (B, T, C)
        if c.position == "rope":
            rotation = rotation_at(positions, c.n_embd // c.n_head, x.dtype)
        else:
            x = x + body.wpe(positions)
        x = body.ln_e(x)
        if c.token_shift:
            x = body.shift(x, given, cache)
        x = body.drop(x)
        for block in body.h:
            x = block(x, mask, cache, rotation)
        if cache is not None:
            cache.length += T
        return body.ln_f(x)

    def loss(
        self, idx: Tensor, targets: Tensor, positions: Tensor | None = None, mask: Mask | None = None
    ) -> tuple[Tensor, Tensor]:
        """Both (B, T) → (sum of nats over the targets that are not −1, number of these targets), two scalars.

        ``positions`` and ``mask`` as ``hidden`` takes them.
        """
        x = self.hidden(idx, positions=positions, mask=mask)  # (B, T, C)
        nats = self.cross_entropy(x, self.lm_head.weight, targets, self.config.logit_softcap)
        return nats, (targets != -1).sum()

    def logits(self, x: Tensor) -> Tensor:
        """Those of states (…, C) that ``hidden`` returns: (…, V)."""
        return soft_cap(self.lm_head(x), self.config.logit_softcap)

    def next_logits(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """(B, T) token ids → (B, V) logits of the token that follows; a faster function may be set here."""
        return self.logits(self.hidden(idx, cache=cache)[:, -1])

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """nanoGPT's contract: (logits (B, T, V), mean loss); without targets (last logits (B, 1, V), None)."""
        if targets is None:
            return self.logits(self.hidden(idx)[:, [-1]]), None
        logits = self.logits(self.hidden(idx))
        loss = F.cross_entropy(logits.float().view(-1, logits.size(-1)), targets.reshape(-1), ignore_index=-1)
        return logits, loss

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Parameters; without the position embeddings by default, as nanoGPT counts."""
        left_out = "transformer.wpe.weight" if non_embedding else ""
        return sum(p.numel() for name, p in self.named_parameters() if name != left_out)

    def crop_block_size(self, block_size: int) -> None:
        """Keeps the first ``block_size`` positions; raises ValueError if the model has fewer."""
        if not 1 <= block_size <= self.config.block_size:
            raise UserError(f"block_size={block_size} is not within 1 … {self.config.block_size}")
        if block_size == self.config.block_size:
            return
        self.config = replace(self.config, block_size=block_size)
        if self.config.position == "learned":
            wpe = self.transformer.wpe
            wpe.weight = nn.Parameter(wpe.weight[:block_size].detach().clone())
            wpe.num_embeddings = block_size

    def grow_vocab_size(self, vocab_size: int) -> None:
        """Adds token ids; raises ValueError if the model has more already.

        Their rows are the mean of the others, so that they get little probability (Hewitt,
        "Initializing New Word Embeddings for Pretrained Language Models", 2021).
        """
        if vocab_size < (old := self.transformer.wte.num_embeddings):
            raise UserError(f"vocab_size={vocab_size} is below the {old} that the model has")
        if vocab_size == old:
            return
        self.config = replace(self.config, vocab_size=vocab_size)
        for table in (self.lm_head,) if self.config.tie_weights else (self.lm_head, self.transformer.wte):
            rows = table.weight.detach()
            table.weight = nn.Parameter(torch.cat([rows, rows.mean(0, keepdim=True).expand(vocab_size - old, -1)]))
        if self.config.tie_weights:
            self.transformer.wte.weight = self.lm_head.weight
        self.transformer.wte.num_embeddings = self.lm_head.out_features = vocab_size

    # nanoGPT's methods that belong to other modules

    @classmethod
    def from_pretrained(cls, model_type: str, override_args: dict[str, Any] | None = None) -> GPT:
        """gpt2, gpt2-medium, gpt2-large, gpt2-xl, or another source; see ``folio.checkpoints.find``."""
        from folio.checkpoints.find import from_pretrained

        return from_pretrained(model_type, override_args)

    def generate(self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None) -> Tensor:
        """(B, T) → (B, T + max_new_tokens); see ``folio.generation.sampling``."""
        from folio.generation.sampling import generate

        return generate(self, idx, max_new_tokens, temperature=temperature, top_k=top_k)

    def configure_optimizers(
        self, weight_decay: float, learning_rate: float, betas: tuple[float, float], device_type: str
    ) -> AdamW:
        """See ``folio.training.optimizers``; ``device_type`` is nanoGPT's and not needed."""
        from folio.training.optimizers import adamw

        return adamw(self, learning_rate, betas, weight_decay)

    def estimate_mfu(self, fwdbwd_per_iter: float, dt: float) -> float:
        """Share of this device's peak FLOPS that ``fwdbwd_per_iter`` rows in ``dt`` seconds reach; NaN if unknown.

        The peak is that of the type which ``dtype=auto`` chooses there.
        """
        from folio.machine.flops import mfu
        from folio.machine.probe import Machine

        device = next(self.parameters()).device
        dtype = getattr(torch, Machine().fast_dtype(str(device)))
        return mfu(self, fwdbwd_per_iter * self.config.block_size / dt, device, dtype)
