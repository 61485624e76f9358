"""nanoGPT's ``from model import GPTConfig, GPT``."""

from folio.model.gpt import GPT, MLP, Block, CausalSelfAttention, GPTConfig, LayerNorm

__all__ = ["GPT", "MLP", "Block", "CausalSelfAttention", "GPTConfig", "LayerNorm"]
