"""GPT-2's architecture, and nothing else: tokens in, loss or logits out.

Parameter names and public methods are nanoGPT's (``model.py``), so its checkpoints and its users' code fit.
Sources: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019; nanoGPT.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, Union

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask
    from torch.optim import AdamW

AUTO = Literal["auto"]
Mask = Union[Tensor, "BlockMask"]
_SHORT = 256  # tokens up to which attention is written out on a CPU


@dataclass(frozen=True)
class GPTConfig:
    """The model's shape. The defaults are nanoGPT's class: GPT-2 124M with its vocabulary padded to 64."""

    block_size: int = field(default=1024, metadata={"help": "context length, in tokens", "min": 1, "max": 10_000_000})
    vocab_size: int | AUTO = field(
        default=50304,
        metadata={"help": "token ids the model knows; auto: the data set's", "min": 1, "max": 100_000_000},
    )
    n_layer: int = field(default=12, metadata={"help": "blocks", "min": 1, "max": 1000})
    n_head: int = field(default=12, metadata={"help": "attention heads; divides n_embd", "min": 1})
    n_embd: int = field(default=768, metadata={"help": "width", "min": 1, "max": 100_000})
    dropout: float = field(default=0.0, metadata={"help": "probability; 0 to pretrain", "min": 0, "below": 1})
    bias: bool = field(default=True, metadata={"help": "biases in Linears and LayerNorms, as GPT-2 has"})
    qkv_bias: bool | AUTO = field(
        default="auto", metadata={"help": "bias of the query, key and value projection; auto: as bias"}
    )
    activation: Literal["gelu", "gelu_tanh"] = field(
        default="gelu", metadata={"help": "gelu: exact, as nanoGPT; gelu_tanh: as OpenAI's GPT-2"}
    )
    tie_weights: bool = field(default=True, metadata={"help": "the head shares the token embedding"})

    def check(self) -> None:
        """Raises ValueError where two fields do not go together."""
        if self.n_embd % self.n_head:
            heads = [n for n in range(1, self.n_embd + 1) if self.n_embd % n == 0]
            near = [*[n for n in heads if n < self.n_head][-1:], *[n for n in heads if n > self.n_head][:1]]
            width = max(1, round(self.n_embd / self.n_head)) * self.n_head
            raise ValueError(
                f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}: "
                f"choose n_head={' or '.join(map(str, near))}, or n_embd={width}"
            )


class KVCache:
    """Keys and values of the tokens seen so far, for each block: two (B, n_head, capacity, head) buffers."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._buffers: dict[int, tuple[Tensor, Tensor]] = {}

    def append(self, block: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores (B, n_head, T, head) after what is there and returns all of it."""
        if block not in self._buffers:
            B, H, _, D = k.shape
            self._buffers[block] = (k.new_empty(B, H, self.capacity, D), v.new_empty(B, H, self.capacity, D))
        keys, values = self._buffers[block]
        end = self.length + k.size(2)
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, dropout: float) -> Tensor:
    """Scaled dot-product attention, (B, n_head, T, head) each; causal where ``mask`` is None.

    With a cache, k and v hold S ≥ T tokens and the queries are the last T of them. ``mask`` is boolean, True
    where a query may look, and broadcasts to (B, n_head, T, S), or FlexAttention's. On CUDA the flash kernel does
    it. On a CPU
    the fused kernel's backward is slow for short contexts, so there attention that will be differentiated is
    written out (benchmarks/attention.py).
    """
    T, S = q.size(2), k.size(2)
    if mask is not None and not isinstance(mask, Tensor):
        return _flex_attention(q.device.type)(q, k, v, block_mask=mask)
    if mask is None and 1 < T < S:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    if q.device.type != "cpu" or not q.requires_grad or S > _SHORT:
        causal = mask is None and T > 1
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril()
    bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, -math.inf)
    scores = (q * (1.0 / math.sqrt(q.size(-1)))) @ k.transpose(-2, -1) + bias
    return F.dropout(F.softmax(scores, dim=-1), dropout) @ v


def within_documents(documents: Tensor, dropout: bool = False, flex: bool | None = None) -> tuple[Tensor, Mask]:
    """The number of each token's document (B, T) → positions (B, T) from 0 in each, and a causal mask within it.

    The mask is dense, (B, 1, T, T), or with ``flex`` FlexAttention's blocks, most of which it never computes: on
    CUDA by default, but for dropout, which FlexAttention lacks.
    """
    B, T = documents.shape
    t = torch.arange(T, device=documents.device)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    positions = t - torch.where(begins, t, 0).cummax(dim=1).values
    if flex if flex is not None else documents.is_cuda and not dropout:
        from torch.nn.attention.flex_attention import create_block_mask

        def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (q >= k) & (documents[b, q] == documents[b, k])

        return positions, create_block_mask(visible, B, None, T, T, device=documents.device)
    same = documents[:, :, None] == documents[:, None, :]
    return positions, (same & (t[:, None] >= t))[:, None]


@cache
def _flex_attention(device: str) -> Callable[..., Tensor]:
    """FlexAttention, compiled where that is what makes it fast."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if device == "cuda" else flex_attention  # type: ignore[return-value]


class LayerNorm(nn.Module):
    """Layer normalisation over the last dimension, with an optional bias."""

    def __init__(self, ndim: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(ndim))
        self.bias = nn.Parameter(torch.zeros(ndim)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


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
        self.dropout = config.dropout
        self.block = block

    def forward(self, x: Tensor, mask: Mask | None = None, cache: KVCache | None = None) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        if cache is not None:
            k, v = cache.append(self.block, k, v)
        y = attend(q, k, v, mask, self.dropout if self.training else 0.0)  # (B, n_head, T, head)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))


class MLP(nn.Module):
    """Two linear layers with a GELU between, four times as wide inside."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(approximate="tanh" if config.activation == "gelu_tanh" else "none")
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    """One transformer block: attention, then the MLP, each on a normalised copy of the residual stream."""

    def __init__(self, config: GPTConfig, block: int = 0) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config, block)
        self.ln_2 = LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, mask: Mask | None = None, cache: KVCache | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), mask, cache)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """The parts of the body, under nanoGPT's names; ``GPT.hidden`` runs them."""

    def __init__(self, config: GPTConfig, vocab_size: int) -> None:
        super().__init__()
        self.wte = _embedding(vocab_size, config.n_embd)
        self.wpe = _embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd, bias=config.bias)


def _embedding(rows: int, width: int) -> nn.Embedding:
    """Without torch's own initial weights, which ``GPT`` draws anew."""
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
            raise ValueError("vocab_size='auto' is for the trainer, which knows the data: give a number")
        self.config = config
        self.transformer = Transformer(config, config.vocab_size)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.transformer.wte.weight = self.lm_head.weight
        if not self.lm_head.weight.is_meta:
            self._init_weights(generator or (lambda _: None))

    @classmethod
    def empty(cls, config: GPTConfig) -> GPT:
        """A model on the CPU whose weights are not set, to be loaded: no time is spent on drawing them."""
        with torch.device("meta"):
            model = cls(config)
        model.to_empty(device="cpu")
        if config.tie_weights:
            model.transformer.wte.weight = model.lm_head.weight
        return model

    @torch.no_grad()
    def _init_weights(self, generator: Callable[[str], torch.Generator | None]) -> None:
        for name, p in self.named_parameters():
            if p.dim() >= 2:
                # residual projections start smaller, by the root of their number (GPT-2 paper, section 2.3)
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if name.endswith("c_proj.weight") else 0.02
                p.normal_(0.0, std, generator=generator(name))
            elif name.endswith(".bias"):
                p.zero_()

    def hidden(
        self,
        idx: Tensor,
        *,
        positions: Tensor | None = None,
        mask: Mask | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """(B, T) token ids → (B, T, C) normalised states: the body under every head.

        ``positions`` (T) or (B, T), below ``block_size``, default to 0 … T − 1, after what the cache holds; ``mask``
        as in ``attend``.

        Raises:
            ValueError: more tokens than ``block_size``, where no positions are given.
        """
        start = cache.length if cache is not None else 0
        T = idx.size(1)
        if positions is None:
            if start + T > self.config.block_size:
                raise ValueError(f"{start + T} tokens do not fit block_size={self.config.block_size}")
            positions = torch.arange(start, start + T, device=idx.device)
        body = self.transformer
        x = body.drop(body.wte(idx) + body.wpe(positions))  # (B, T, C)
        for block in body.h:
            x = block(x, mask, cache)
        if cache is not None:
            cache.length += T
        return body.ln_f(x)

    def loss(
        self, idx: Tensor, targets: Tensor, positions: Tensor | None = None, mask: Mask | None = None
    ) -> tuple[Tensor, Tensor]:
        """Both (B, T) → (sum of nats over the targets that are not −1, how many those are), two scalars.

        ``positions`` and ``mask`` as ``hidden`` takes them.
        """
        logits = self.lm_head(self.hidden(idx, positions=positions, mask=mask)).float()  # (B, T, V)
        nats = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1), ignore_index=-1, reduction="sum")
        return nats, (targets != -1).sum()

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """nanoGPT's contract: (logits (B, T, V), mean loss); without targets (last logits (B, 1, V), None)."""
        if targets is None:
            return self.lm_head(self.hidden(idx)[:, [-1]]), None
        logits = self.lm_head(self.hidden(idx))
        loss = F.cross_entropy(logits.float().view(-1, logits.size(-1)), targets.reshape(-1), ignore_index=-1)
        return logits, loss

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Parameters; without the position embeddings by default, as nanoGPT counts."""
        total = sum(p.numel() for p in self.parameters())
        return total - self.transformer.wpe.weight.numel() if non_embedding else total

    def crop_block_size(self, block_size: int) -> None:
        """Keeps the first ``block_size`` positions; raises ValueError where there are fewer."""
        if not 1 <= block_size <= self.config.block_size:
            raise ValueError(f"block_size={block_size} is not within 1 … {self.config.block_size}")
        if block_size == self.config.block_size:
            return
        self.config = replace(self.config, block_size=block_size)
        wpe = self.transformer.wpe
        wpe.weight = nn.Parameter(wpe.weight[:block_size].detach().clone())
        wpe.num_embeddings = block_size

    def grow_vocab_size(self, vocab_size: int) -> None:
        """Adds token ids; raises ValueError where there are more already.

        Their rows are the mean of the others, so that together they hardly take any probability (Hewitt,
        "Initializing New Word Embeddings for Pretrained Language Models", 2021).
        """
        if vocab_size < (old := self.transformer.wte.num_embeddings):
            raise ValueError(f"vocab_size={vocab_size} is below the {old} that the model has")
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
        """gpt2, gpt2-medium, gpt2-large, gpt2-xl, or another source; see ``folio.pretrained.from_pretrained``."""
        from folio.checkpoints.hugging_face import from_pretrained

        return from_pretrained(model_type, override_args)

    def generate(self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None) -> Tensor:
        """(B, T) → (B, T + max_new_tokens); see ``folio.sampling.generate``."""
        from folio.generation.sampling import generate

        return generate(self, idx, max_new_tokens, temperature=temperature, top_k=top_k)

    def configure_optimizers(
        self, weight_decay: float, learning_rate: float, betas: tuple[float, float], device_type: str
    ) -> AdamW:
        """See ``folio.optim.adamw``; ``device_type`` is nanoGPT's and tells nothing that the weights do not."""
        from folio.training.optimizers import adamw

        return adamw(self, learning_rate, betas, weight_decay)

    def estimate_mfu(self, fwdbwd_per_iter: float, dt: float) -> float:
        """Share of this device's peak that ``fwdbwd_per_iter`` rows in ``dt`` seconds are; NaN if unknown."""
        from folio.machine.flops import mfu

        p = next(self.parameters())
        return mfu(self, fwdbwd_per_iter * self.config.block_size / dt, p.device, torch.bfloat16)
