"""From a token file to the rows of a step.

1. ``Tokens.open`` finds the files of a data set, reads what they hold from its meta file, and refuses what
   does not fit.
2. Each split is a memmap; nothing is read before it is needed.
3. ``rows(split, first, count)`` cuts the rows ``first`` … of an endless order out of it: a pure function of
   the seed and the row's number, whatever the step, the rank or the number of ranks.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from folio import rng
from folio.config import Data

Split = Literal["train", "val"]
Rows = NDArray[np.int64]

CLONE = Path(__file__).resolve().parent.parent
SPLITS: tuple[Split, ...] = ("train", "val")
_REHASH = 64 * 2**20  # bytes: a changed file up to this size is hashed again when it is opened


@dataclass(frozen=True)
class Meta:
    """What ``meta.json`` says, or what can be said of files without one."""

    vocab_size: int | None
    dtype: np.dtype[Any]
    tokenizer: dict[str, Any] | None
    eot: Literal["before", "after", "none"] | None = None
    splits: dict[str, dict[str, Any]] | None = None


class Tokens:
    """A data set's token files, and the order in which a run reads them."""

    def __init__(
        self,
        folder: Path,
        meta: Meta,
        block_size: int,
        *,
        sampling: Literal["epoch", "random", "sequential"] = "epoch",
        seed: int = 1337,
        batch_size: int = 1,
    ) -> None:
        self.folder, self.meta, self.block_size = folder, meta, block_size
        self.sampling, self.seed, self.batch_size = sampling, seed, batch_size
        self.vocab_size: int | None = None
        self._splits = {split: self._map(split) for split in SPLITS}

    @classmethod
    def open(cls, config: Data, block_size: int, seed: int) -> Tokens:
        """Raises FileNotFoundError or ValueError that name the file and how to mend or make it."""
        folder = find(config)
        return cls(
            folder,
            read_meta(folder),
            block_size,
            sampling=config.sampling,
            seed=seed,
            batch_size=config.batch_size,
        )

    def tokenizer(self) -> dict[str, Any]:
        """The tokenizer as JSON; files without a meta file are GPT-2's, as nanoGPT assumes."""
        return self.meta.tokenizer or {"kind": "tiktoken", "name": "gpt2"}

    def fingerprint(self) -> dict[str, str]:
        """A hash of each split: the meta file's, else of its length and both of its ends."""
        if self.meta.splits:
            return {split: self.meta.splits[split]["sha256"] for split in SPLITS}
        return {split: _ends(data) for split, data in self._splits.items()}

    def length(self, split: Split) -> int:
        """Tokens in a split."""
        return len(self._splits[split])

    def rows(self, split: Split, first: int, count: int) -> Rows:
        """Rows ``first`` … ``first + count − 1`` of the endless order, (count, block_size + 1)."""
        index = np.arange(first, first + count, dtype=np.uint64)
        return self.windows(split, self._starts(split, index))

    def _starts(self, split: Split, index: rng.UInts) -> Rows:
        """Where each row of the order begins in the split."""
        n, T = self.length(split), self.block_size
        if self.sampling == "random":
            return rng.draw(index, n - T, rng.key(self.seed, split)).astype(np.int64)
        if self.sampling == "sequential":
            # build-nanogpt's DataLoaderLite: batches one after another, a tail shorter than a batch dropped
            windows = (n - 1) // T
            whole = windows // self.batch_size * self.batch_size or windows
            return (index % np.uint64(whole)).astype(np.int64) * T
        per_epoch = rows_per_epoch(n, T)
        epochs = index // np.uint64(per_epoch)
        starts = np.empty(index.shape, dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            seed = rng.key(self.seed, split, int(epoch))
            offset = seed % min(T, n - per_epoch * T)
            window = rng.permute(index[here] % np.uint64(per_epoch), per_epoch, seed)
            starts[here] = offset + window.astype(np.int64) * T
        return starts

    def spread(self, split: Split, count: int) -> Rows:
        """Starts of ``count`` windows spread evenly over a split; all of it, tail included, for 0 or too many."""
        n, T = self.length(split), self.block_size
        whole = -(-(n - 1) // T)
        if count == 0 or count >= whole:
            return np.arange(whole, dtype=np.int64) * T
        return np.linspace(0, n - 1 - T, count).astype(np.int64)

    def windows(self, split: Split, starts: Rows) -> Rows:
        """``block_size + 1`` tokens from each start, −1 after the end of the split.

        Raises:
            ValueError: an id that the model's vocabulary lacks.
        """
        data, width = self._splits[split], self.block_size + 1
        inside = starts <= len(data) - width
        out = np.full((len(starts), width), -1, dtype=np.int64)
        out[inside] = np.lib.stride_tricks.sliding_window_view(data, width)[starts[inside]]
        for i in np.flatnonzero(~inside):
            tail = data[starts[i] :]
            out[i, : len(tail)] = tail
        if self.vocab_size is not None and out.size and (top := int(out.max())) >= self.vocab_size:
            raise ValueError(
                f"{self.path(split)}: token id {top} is outside the vocabulary of {self.vocab_size}: "
                f"set --vocab_size above it, or prepare the data again"
            )
        return out

    def path(self, split: Split) -> Path:
        return self.folder / f"{split}.bin"

    def _map(self, split: Split) -> NDArray[Any]:
        path, size = self.path(split), self.meta.dtype.itemsize
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: prepare the data set again")
        actual = path.stat().st_size
        if actual == 0:
            raise ValueError(f"{path} is empty: prepare the data set again")
        if actual % size:
            raise ValueError(
                f"{path}: {actual} bytes are not whole {self.meta.dtype} tokens: it is cut short or of another "
                "type; prepare the data set again"
            )
        if self.meta.splits:
            _verify(path, self.meta.splits[split], size)
        if actual // size < self.block_size + 1:
            raise ValueError(
                f"{path}: {actual // size} tokens are fewer than block_size + 1 = {self.block_size + 1}: "
                "lower --block_size or prepare more text"
            )
        return np.memmap(path, dtype=self.meta.dtype, mode="r")


def rows_per_epoch(tokens: int, block_size: int) -> int:
    """Windows that fit whatever the epoch's offset, so that every epoch has as many; at least one."""
    return max(1, (tokens - block_size) // block_size)


def find(config: Data) -> Path:
    """The folder of a data set: ``data_dir``, else data/<dataset> here, else beside the clone's scripts.

    Raises:
        FileNotFoundError: no such folder holds a train.bin; says how to make one.
    """
    if config.data_dir:
        places = [Path(config.data_dir)]
    else:
        places = [Path("data") / config.dataset, CLONE / "data" / config.dataset]
    for place in places:
        if (place / "train.bin").is_file():
            return place
    missing = places[0] / "train.bin"
    if not config.data_dir and (CLONE / "folio" / "datasets" / f"{config.dataset}.py").is_file():
        raise FileNotFoundError(f"{missing} is missing: python -m folio prepare {config.dataset}")
    raise FileNotFoundError(
        f"{missing} is missing: put train.bin and val.bin there (uint16 tokens, as nanoGPT's prepare.py writes them "
        "for this data set), or prepare and name a built-in one: python -m folio prepare shakespeare_char"
    )


def read_meta(folder: Path) -> Meta:
    """``meta.json``, else nanoGPT's ``meta.pkl``, else what nanoGPT assumes: uint16 and GPT-2's tokenizer.

    Raises:
        ValueError: a meta file that is damaged, or a pickle that holds more than dicts, text and numbers.
    """
    if (path := folder / "meta.json").is_file():
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            splits = {s: {"tokens": int(v["tokens"]), "sha256": str(v["sha256"])} for s, v in raw["splits"].items()}
            if set(splits) != set(SPLITS) or raw["dtype"] not in ("uint16", "uint32"):
                raise ValueError("its splits or dtype are unknown")
            from_size = int(raw["vocab_size"])
            if from_size < 1:
                raise ValueError(f"vocab_size={from_size}")
            return Meta(from_size, np.dtype(raw["dtype"]), dict(raw["tokenizer"]), raw["eot"], splits)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}: not a meta file of this program: {error}; prepare the data again") from None
    if (path := folder / "meta.pkl").is_file():
        raw = _read_pickle(path)
        try:
            itos = raw["itos"]
            characters = "".join(itos[i] for i in range(int(raw["vocab_size"])))
        except (LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: not nanoGPT's meta.pkl ({error}): prepare the data set again") from None
        return Meta(len(characters), np.dtype("uint16"), {"kind": "characters", "characters": characters}, "none")
    return Meta(None, np.dtype("uint16"), None)


class _NothingImported(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which would run code")


def _read_pickle(path: Path) -> Any:
    """A pickle of dicts, lists, text and numbers; nothing it names is imported or called."""
    try:
        return _NothingImported(io.BytesIO(path.read_bytes())).load()
    except Exception as error:  # damaged pickles raise anything
        raise ValueError(f"{path}: refused: {error}; prepare the data set again") from None


def _verify(path: Path, expected: dict[str, Any], itemsize: int) -> None:
    actual = path.stat()
    if actual.st_size != expected["tokens"] * itemsize:
        raise ValueError(
            f"{path}: {actual.st_size // itemsize:,} tokens, but its meta.json says {expected['tokens']:,}: "
            "prepare the data set again"
        )
    changed = actual.st_mtime_ns > path.with_name("meta.json").stat().st_mtime_ns
    if changed and actual.st_size <= _REHASH and sha256(path) != expected["sha256"]:
        raise ValueError(f"{path} is not what its meta.json describes: prepare the data set again")


def _ends(data: NDArray[Any], count: int = 2**15) -> str:
    digest = hashlib.sha256(str(len(data)).encode())
    digest.update(data[:count].tobytes())
    digest.update(data[-count:].tobytes())
    return digest.hexdigest()


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
