"""What a data set is made of: the source of its documents, the tokenizer, and the layout of its files.

Like the modules of sources, this one imports no NumPy, so that ``folio prepare --help`` can list the data sets fast.
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from folio.preparation.sources import Source

if TYPE_CHECKING:
    from folio.data.token_files import Eot
    from folio.data.tokenizers import Tokenizer


@dataclass(frozen=True)
class Layout:
    """How documents become files.

    ``name`` of a file has ``{split}`` and, if there are shards, ``{index:06d}``. Each shard but the last has
    ``shard_size`` tokens; 0 means one file per split. The validation split is the first ``val_documents``, or
    ``val_fraction`` of the documents, evenly spread from the first on. If both are 0, it is the first shard, and
    documents continue across shards, as in build-nanogpt's ``fineweb.py``.
    """

    name: str = "{split}.bin"
    shard_size: int = 0
    eot: Eot = "after"
    val_documents: int = 0
    val_fraction: float = 0.0


@dataclass(frozen=True)
class Recipe:
    """What a data set is made of, and how."""

    source: Source
    tokenizer: str | Tokenizer  # a name as ``--tokenizer`` takes it; "char": all characters of the source
    layout: Layout
    text_key: str = "text"
    keep_empty: bool = False  # an empty document becomes an end-of-text token
    given_splits: bool = False  # the source decides which documents are for validation
    small_fraction: float = 0.1  # of the documents for validation, if there is less than one shard
    made: dict[str, Any] = field(default_factory=dict)  # further settings for ``describe``

    @functools.cached_property
    def fixed_tokenizer(self) -> Tokenizer | None:
        """The tokenizer, or None for "char", whose vocabulary must first be read from the source.

        Raises:
            ValueError, FileNotFoundError: there is no tokenizer of that name.
        """
        if self.tokenizer == "char":
            return None
        if not isinstance(self.tokenizer, str):
            return self.tokenizer
        from folio.data.tokenizers import named

        return named(self.tokenizer)

    def describe(self) -> dict[str, Any]:
        """The settings, as ``meta.json`` states them: a data set with other settings is another data set."""
        tokenizer = self.fixed_tokenizer
        spec = tokenizer.to_json() if tokenizer else {"kind": "characters"}
        if spec["kind"] == "tokenizers":
            digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()
            spec = {"kind": "tokenizers", "sha256": digest[:16]}
        return {
            **self.made,
            "source": self.source.describe(),
            "tokenizer": spec,
            "text_key": self.text_key,
            "layout": asdict(self.layout),
        }
