"""nanoGPT's ``from model import GPTConfig, GPT``."""

from folio.model.config import GPTConfig
from folio.model.gpt import GPT, MLP, Block, CausalSelfAttention, LayerNorm

__all__ = ["GPT", "MLP", "Block", "CausalSelfAttention", "GPTConfig", "LayerNorm"]
