"""Real text in shards, as the programs whose commands Folio runs read them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from folio.preparation.job import prepare
from folio.preparation.recipe import Recipe


def prepare_shards(recipe_of: Callable[[str], Recipe], parent: Path, data: Path) -> Path:
    """Writes ``edu_fineweb10B`` in a folder, from the text and with GPT-2's tokenizer in ``data``."""
    pytest.importorskip("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(data / "tiktoken"))
        prepare(recipe_of(str(data / "wikitext2_valid.jsonl")), parent / "edu_fineweb10B", workers=1)
    return parent / "edu_fineweb10B"
