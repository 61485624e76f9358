"""nanoGPT's ``from model import GPTConfig, GPT``.

To read: folio/model/gpt.py (the architecture) and folio/model/config.py (its shape).
"""

from folio.model.config import GPTConfig
from folio.model.gpt import GPT, MLP, Block, CausalSelfAttention, LayerNorm

__all__ = ["GPT", "MLP", "Block", "CausalSelfAttention", "GPTConfig", "LayerNorm"]
