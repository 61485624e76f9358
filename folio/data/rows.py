"""From token files to the rows of a step.

1. ``Tokens.open`` finds the files of a data set, or of each in a mixture.
2. ``rows(split, first, count)`` reads the rows ``first`` … of an endless order: a pure function of the seed and the
   row's number, whatever the step, the rank or the number of ranks.

A split is one range of positions, file after file and data set after data set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from folio.config.options import Data
from folio.data import mixture
from folio.data.documents import Documents, find_documents
from folio.data.folders import Folder, find
from folio.data.shards import Maps, Order, Rows, Shards
from folio.data.token_files import GPT2, GPT2_SIZES, SPLITS, Split
from folio.data.tokenizer_comparison import difference
from folio.data.tokenizers import IDS_ONLY
from folio.errors import UserError
from folio.model.config import AUTO


@dataclass(frozen=True, eq=False)
class Tokens:
    """The token files of one data set, or of several by weight, and the order in which a run reads them.

    Raises:
        ValueError: no file of a split has ``block_size + 1`` tokens.
    """

    folders: Sequence[Folder]
    block_size: int
    weights: Sequence[float] = (1.0,)
    sampling: Order = "epoch"
    seed: int = 1337
    batch_size: int = 1
    world: int = 1  # ranks that read batches in turn; only sampling="sequential" depends on it
    vocab_size: int | None = None  # ids are checked against it
    documents: Documents | None = None  # set if attention stays within documents
    _splits: dict[Split, list[Shards]] = field(init=False, repr=False)
    _shares: Rows = field(init=False, repr=False)  # rows of each data set in every 1,024

    def __post_init__(self) -> None:
        maps = Maps()
        splits = {
            split: [Shards(f, split, self.block_size, self.sampling, self.seed, maps) for f in self.folders]
            for split in SPLITS
        }
        object.__setattr__(self, "_splits", splits)
        object.__setattr__(self, "_shares", mixture.largest_remainders(self.weights, mixture.ROWS))

    @classmethod
    def open(cls, config: Data, block_size: int, seed: int) -> Tokens:
        """The data that the options name, for a model of ``block_size`` positions.

        Raises:
            FileNotFoundError, ValueError: name the file and the remedy.
        """
        row = config.row(block_size)
        folders, weights = _folders(config)
        for folder in folders[1:]:
            if why := difference(folder.tokenizer or GPT2, folders[0].tokenizer or GPT2):
                raise UserError(
                    f"{folder.path} and {folders[0].path} have different tokenizers, so they cannot be mixed ({why})"
                )
        return cls(
            folders,
            row,
            weights=weights,
            sampling=config.sampling,
            seed=seed,
            batch_size=config.batch_size,
        )

    def with_documents(self, eot: int | AUTO) -> tuple[Tokens, str]:
        """The same data with ``documents``, and a sentence that says how their ends are known.

        ``eot``: the id of the end-of-text token, "auto" for the tokenizer's. Raises ValueError as ``find_documents``.
        """
        documents, source = find_documents(self.folders, eot)
        return replace(self, documents=documents), source

    @property
    def name(self) -> str:
        """The folders, for messages."""
        return ", ".join(str(folder.path) for folder in self.folders)

    @property
    def known_vocab_size(self) -> int | None:
        """The vocabulary size that the meta files state, or None if one of them states none."""
        sizes = [folder.vocab_size for folder in self.folders]
        return None if None in sizes else max(size for size in sizes if size is not None)

    def tokenizer(self) -> dict[str, Any] | None:
        """The tokenizer as JSON. If none is stated: GPT-2's if its size fits, as nanoGPT assumes, else None."""
        stated, size = self.folders[0].tokenizer, self.vocab_size or self.known_vocab_size
        if stated == IDS_ONLY:
            return None
        return stated or (GPT2 if size is None or size in GPT2_SIZES else None)

    def tokenizer_for(self, model: dict[str, Any] | None) -> tuple[dict[str, Any] | None, str]:
        """The tokenizer for a model with the tokenizer ``model``, and why the ids differ from the model's, or "".

        Files that state no tokenizer are assumed to have the model's.
        """
        stated = self.folders[0].tokenizer
        if model is None or stated in (None, IDS_ONLY):
            return model or self.tokenizer(), ""
        why = difference(stated, model)
        return (stated, why) if why else (model, "")

    def fingerprint(self) -> dict[str, str]:
        """A hash of each split."""
        return {s: "-".join(folder.fingerprint(s)[:32] for folder in self.folders) for s in SPLITS}

    def sources(self) -> list[dict[str, Any]]:
        """For each data set its name without its path, its share of the rows, and its number of training tokens."""
        places = [folder.path if folder.path.is_dir() else folder.path.parent for folder in self.folders]
        return [
            {"name": place.resolve().name, "share": int(share) / mixture.ROWS, "tokens": len(shards)}
            for place, share, shards in zip(places, self._shares, self._splits["train"], strict=True)
        ]

    def length(self, split: Split) -> int:
        """Tokens in a split."""
        return sum(map(len, self._splits[split]))

    def rows(self, split: Split, first: int, count: int) -> Rows:
        """Rows ``first`` … ``first + count − 1`` of the endless order, (count, block_size + 1)."""
        return self.numbered(split, np.arange(first, first + count))

    def numbered(self, split: Split, numbers: Rows) -> Rows:
        """The rows of these numbers (n) in the endless order, (n, block_size + 1)."""
        index, count = numbers.astype(np.uint64), len(numbers)
        sources = self._splits[split]
        if len(sources) == 1:
            return self.windows(split, sources[0].positions(index, self.batch_size, self.world))
        source, inside = mixture.place(index, self._shares, self.seed, split)
        positions = np.empty(count, dtype=np.int64)
        for s, base in enumerate(self._bases(split)):
            here = source == s
            positions[here] = base + sources[s].positions(inside[here], self.batch_size, 1)
        return self.windows(split, positions)

    def _bases(self, split: Split) -> list[int]:
        """The position of each data set's first token."""
        sizes = [len(shards) for shards in self._splits[split]]
        return [sum(sizes[:i]) for i in range(len(sizes))]

    def spread(self, split: Split, count: int) -> Rows:
        """The starts (n) of ``count`` windows spread evenly over a split, by weight over a mixture.

        If ``count`` is 0 or more than there are: all windows, with the shorter ones at the ends of files.
        """
        shares = mixture.largest_remainders(self._shares, count) if count else np.zeros_like(self._shares)
        found = [
            base + shards.spread(int(share))
            for base, shards, share in zip(self._bases(split), self._splits[split], shares, strict=True)
            if share or not count
        ]
        return np.concatenate(found)

    def windows(self, split: Split, starts: Rows) -> Rows:
        """``block_size + 1`` tokens from each start, (n, block_size + 1) int64, −1 after the end of its file.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        out = np.empty((len(starts), self.block_size + 1), dtype=np.int64)
        bases = self._bases(split)
        source = np.searchsorted(bases, starts, side="right") - 1
        for s in np.unique(source):
            here = source == s
            out[here] = self._splits[split][s].read(starts[here] - bases[s], self.block_size + 1, self.vocab_size)
        return out


def _folders(config: Data) -> tuple[list[Folder], list[float]]:
    """The data sets that the options name, and their weights."""
    names = mixture.parse(config.data_mixture) if config.data_mixture else {}
    return [find(config, name) for name in names] if names else [find(config)], list(names.values()) or [1.0]


def longest_row(config: Data) -> int:
    """Tokens of the longest row that every split of every data set has, at least 1. Raises as ``Tokens.open``."""
    folders, _ = _folders(config)
    return max(1, min(max(file.tokens for file in folder.splits[s]) for folder in folders for s in SPLITS) - 1)
