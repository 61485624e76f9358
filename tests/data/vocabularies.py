"""Tokenizers that the tests train or build."""

from __future__ import annotations

from typing import Any

import pytest

tokenizers = pytest.importorskip("tokenizers")


models, pre, decoders = tokenizers.models, tokenizers.pre_tokenizers, tokenizers.decoders


def words(decoder: Any = None, **more: Any) -> Any:
    """A tokenizer of whole words with a mark for the space before, as SentencePiece's."""
    vocabulary = {w: i for i, w in enumerate(["[UNK]", "▁the", "▁ferry", "▁left", "s", "<0xE6>", "<0xB8>", "<0xA1>"])}
    made = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre.Metaspace(**more)
    made.decoder = decoder or decoders.Metaspace()
    return made
