"""The model's shape."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from folio.errors import UserError

AUTO = Literal["auto"]
PADDED_GPT2 = 50304  # GPT-2's 50257 token ids, rounded up to a multiple of 64 for speed


@dataclass(frozen=True)
class GPTConfig:
    """The model's shape. The defaults are nanoGPT's class: GPT-2 124M with its vocabulary padded to 64.

    Beside GPT-2's parts there are those of modded-nanogpt's records and of nanochat, each by itself:
    ``position="rope"`` turns queries and keys in place of the position embeddings; ``norm="unweighted"`` is a LayerNorm
    without parameters, before the parts of a block, after the embedding and at the end; ``activation="relu2"``;
    ``token_shift`` adds previous tokens to the embedding; ``qk_norm`` normalizes queries and keys; ``logit_softcap``
    bounds the logits; with ``zero_init`` outputs and an untied head start at zero. ``--help=NAME`` has the details of
    each.
    """

    block_size: int = field(
        default=1024, metadata={"help": "context length, in tokens", "min": 1, "max": 10_000_000, "nanogpt": True}
    )
    vocab_size: int | AUTO = field(
        default=PADDED_GPT2,
        metadata={"help": "token ids; auto: the data set's", "min": 1, "max": 100_000_000},
    )
    n_layer: int = field(default=12, metadata={"help": "blocks", "min": 1, "max": 1000, "nanogpt": True})
    n_head: int = field(default=12, metadata={"help": "attention heads; divides n_embd", "min": 1, "nanogpt": True})
    n_embd: int = field(default=768, metadata={"help": "width", "min": 1, "max": 100_000, "nanogpt": True})
    dropout: float = field(
        default=0.0, metadata={"help": "probability; 0 to pretrain", "min": 0, "below": 1, "nanogpt": True}
    )
    bias: bool = field(
        default=True,
        metadata={"help": "biases in Linears and LayerNorms, as GPT-2 has", "nanogpt": True, "advanced": True},
    )
    qkv_bias: bool | AUTO = field(
        default="auto",
        metadata={"help": "bias of the query, key and value projection; auto: as bias", "advanced": True},
    )
    activation: Literal["gelu", "gelu_tanh", "relu2"] = field(
        default="gelu",
        metadata={
            "help": "gelu: exact, as nanoGPT; gelu_tanh: as OpenAI's GPT-2; relu2",
            "details": "relu2: max(x, 0)² (So et al., Primer, 2021).",
            "advanced": True,
        },
    )
    tie_weights: bool = field(default=True, metadata={"help": "the head shares the token embedding", "advanced": True})
    position: Literal["learned", "rope"] = field(
        default="learned",
        metadata={
            "help": "learned: an embedding, as GPT-2; rope: turned queries and keys",
            "details": "rope: Su et al., RoFormer, 2021, with the base 1024; the width of a head must be even.",
            "advanced": True,
        },
    )
    norm: Literal["layernorm", "unweighted"] = field(
        default="layernorm",
        metadata={
            "help": "layernorm: as GPT-2; unweighted: without weights and biases",
            "details": "unweighted: a LayerNorm without parameters, after the embedding too.",
            "advanced": True,
        },
    )
    token_shift: int = field(
        default=0,
        metadata={
            "help": "number of previous tokens that are added to each embedding",
            "details": "For each previous token, every channel has a trained weight that starts at zero (Peng et al., "
            "RWKV, 2023, section 3.1.1; modded-nanogpt's smear).",
            "min": 0,
            "max": 1000,
            "advanced": True,
        },
    )
    qk_norm: bool = field(
        default=False,
        metadata={
            "help": "normalizes the queries and keys of each head",
            "details": "To a root mean square of 1 for keys and √2 for queries: scores have the scale "
            "√(2 / width of a head).",
            "advanced": True,
        },
    )
    logit_softcap: float = field(
        default=0.0,
        metadata={
            "help": "c: logits become c · tanh(logits / c); 0: none",
            "details": "Gemma Team, Gemma 2, 2024, section 2.",
            "min": 0,
            "max": 1_000_000,
            "advanced": True,
        },
    )
    zero_init: bool = field(
        default=False,
        metadata={
            "help": "outputs of attention and MLP start at zero",
            "details": "The last matrix of each attention and MLP and an untied head start at zero. The other matrices "
            "start with a standard deviation of n_embd^-0.5, and embeddings with 1, or 0.02 with a tied head.",
            "advanced": True,
        },
    )

    def check(self) -> None:
        """Raises UserError where two fields do not go together."""
        if self.n_embd % self.n_head:
            heads = [n for n in range(1, self.n_embd + 1) if self.n_embd % n == 0]
            near = [*[n for n in heads if n < self.n_head][-1:], *[n for n in heads if n > self.n_head][:1]]
            width = max(1, round(self.n_embd / self.n_head)) * self.n_head
            raise UserError(
                f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}: "
                f"choose n_head={' or '.join(map(str, near))}, or n_embd={width}"
            )
        if self.position == "rope" and (width := self.n_embd // self.n_head) % 2:
            raise UserError(
                f"position=rope turns pairs of channels, but n_embd={self.n_embd} and n_head={self.n_head} give heads "
                f"of {width}: choose n_embd={self.n_embd + self.n_head}, or position=learned"
            )
