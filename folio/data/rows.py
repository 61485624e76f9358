"""From token files to the rows of a step.

1. ``Tokens.open`` finds the files of a data set, or of each in a mixture, and refuses what does not fit.
2. Each file becomes a memmap when it is read from, and the last used ones stay; nothing is read before it is needed.
3. ``rows(split, first, count)`` cuts the rows ``first`` … of an endless order out of them: a pure function of
   the seed and the row's number, whatever the step, the rank or the number of ranks.

A split is one range of positions, file after file and data set after data set; no row reaches over the end of a
file. The files' formats are in ``folio.data.token_files``.
"""

from __future__ import annotations

import errno
import glob
import resource
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from folio import rng
from folio.config.options import DATA_SETS, Data
from folio.data.token_files import (
    CLONE,
    GPT2,
    GPT2_SIZES,
    SPLITS,
    UNFINISHED,
    Array,
    Folder,
    Split,
    TokenFile,
    open_folder,
)
from folio.data.tokenizers import IDS_ONLY, difference, from_json
from folio.errors import UserError

Rows = NDArray[np.int64]
Order = Literal["epoch", "random", "sequential"]

MIXED = 1024  # rows in which a mixture holds its proportions
_ALSO = {"fineweb_edu": ("edu_fineweb10B",)}  # names that other programs give a data set
_MAPPED = 4096  # files at most, as the system limits maps as well
_SEARCHED = 2**20  # tokens of a foreign file in which its end-of-text token is looked for


class Maps:
    """The files that were read last, mapped: each map keeps a file open, of which a process may have few."""

    def __init__(self) -> None:
        self._arrays: OrderedDict[TokenFile, Array] = OrderedDict()
        self._lock = threading.Lock()  # rows are read ahead while an evaluation reads as well
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most = _MAPPED if limit == resource.RLIM_INFINITY else max(1, min(_MAPPED, limit // 4))

    def __getitem__(self, file: TokenFile) -> Array:
        with self._lock:
            array = self._arrays.pop(file, None)
            if array is None:
                self._drop_all_but(self._most - 1)
                array = self._map(file)
            self._arrays[file] = array
            return array

    def _map(self, file: TokenFile) -> Array:
        """The file mapped; where the process has too many files open, half of the maps are closed first."""
        try:
            return file.map()
        except OSError as error:
            if error.errno != errno.EMFILE or not self._arrays:
                raise
        self._most = max(1, len(self._arrays) // 2)
        self._drop_all_but(self._most - 1)
        return file.map()

    def _drop_all_but(self, count: int) -> None:
        while len(self._arrays) > count:
            self._arrays.popitem(last=False)


class Shards:
    """One split of one data set: its files as one range of positions, and the order in which they are read."""

    def __init__(self, folder: Folder, split: Split, block_size: int, sampling: Order, seed: int, maps: Maps) -> None:
        self.files, self.maps = folder.splits[split], maps
        self.split, self.block_size, self.sampling, self.seed = split, block_size, sampling, seed
        self.sizes = np.array([file.tokens for file in self.files], dtype=np.int64)
        self.starts = np.cumsum(self.sizes) - self.sizes  # position of each file's first token
        if self.sizes.max() <= block_size:
            raise UserError(
                f"{self.files[0].path}: {self.sizes.max()} tokens are fewer than block_size + 1 = {block_size + 1}: "
                "lower --block_size or prepare more text"
            )
        self._windows = rows_per_epoch(self.sizes, block_size)
        self._windows_before = np.cumsum(self._windows) - self._windows

    def __len__(self) -> int:
        return int(self.sizes.sum())

    def positions(self, index: rng.UInts, batch_size: int, world: int) -> Rows:
        """Where the rows of these numbers begin."""
        if self.sampling == "random":
            fitting = self._fitting()
            drawn = rng.draw(index, int(fitting.sum()), rng.key(self.seed, self.split)).astype(np.int64)
            return self._at(drawn, fitting)
        if self.sampling == "sequential":
            return self._sequential(index, batch_size, world)
        T, per_epoch = self.block_size, int(self._windows.sum())
        epochs = index // np.uint64(per_epoch)
        out = np.empty(index.shape, dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            seed = rng.key(self.seed, self.split, int(epoch))
            window = rng.permute(index[here] % np.uint64(per_epoch), per_epoch, seed).astype(np.int64)
            shard = np.searchsorted(self._windows_before, window, side="right") - 1
            slack = np.minimum(T, self.sizes[shard] - self._windows[shard] * T)
            out[here] = self.starts[shard] + seed % slack + (window - self._windows_before[shard]) * T
        return out

    def _sequential(self, index: rng.UInts, batch_size: int, world: int) -> Rows:
        """build-nanogpt's ``DataLoaderLite`` to the letter: batch g of all ranks is rank g % world's next, which
        begins at ``B·T·rank`` in each shard and leaves it when not even all ranks' next batches would fit."""
        T = self.block_size
        batch, row = np.divmod(index.astype(np.int64), batch_size)
        rank, turn = batch % world, batch // world
        out = np.empty(index.shape, dtype=np.int64)
        share = batch_size * T
        if self.sizes.max() <= share * world:  # less than a batch for each rank, which it could not read
            windows = (self.sizes - 1) // T
            number = index.astype(np.int64) % windows.sum()
            shard = np.searchsorted(np.cumsum(windows), number, side="right")
            return self.starts[shard] + (number - (np.cumsum(windows) - windows)[shard]) * T
        for r in np.unique(rank):
            here = rank == r
            turns = np.maximum(1, (self.sizes - 1 - share * r) // (share * world))
            turns[self.sizes <= share * (r + 1)] = 0
            number = turn[here] % turns.sum()
            shard = np.searchsorted(np.cumsum(turns), number, side="right")
            inside = number - (np.cumsum(turns) - turns)[shard]
            out[here] = self.starts[shard] + (inside * world + r) * share + row[here] * T
        return out

    def spread(self, count: int) -> Rows:
        """Positions of ``count`` windows spread evenly; all of them, tails included, for 0 or too many."""
        T = self.block_size
        whole = np.maximum(0, -(-(self.sizes - 1) // T))
        if count == 0 or count >= whole.sum():
            return np.concatenate(
                [start + np.arange(n, dtype=np.int64) * T for start, n in zip(self.starts, whole, strict=True)]
            )
        fitting = self._fitting()
        return self._at(np.linspace(0, fitting.sum() - 1, count).astype(np.int64), fitting)

    def _fitting(self) -> Rows:
        """How many positions of each file a whole row can begin at."""
        return np.maximum(0, self.sizes - self.block_size)

    def _at(self, number: Rows, counts: Rows) -> Rows:
        shard = np.searchsorted(np.cumsum(counts), number, side="right")
        return self.starts[shard] + number - (np.cumsum(counts) - counts)[shard]

    def read(self, positions: Rows, width: int, vocab_size: int | None) -> Rows:
        """``width`` tokens from each of these positions on, −1 beyond the end of a file.

        Raises:
            ValueError: an id outside the vocabulary, if one is given.
        """
        out = np.full((len(positions), width), -1, dtype=np.int64)
        shards = np.searchsorted(self.starts, positions, side="right") - 1
        for shard in np.unique(shards):
            data = self.maps[self.files[shard]]
            here = np.flatnonzero(shards == shard)
            local = positions[here] - self.starts[shard]
            inside = local <= len(data) - width
            if inside.any():
                whole = np.lib.stride_tricks.sliding_window_view(data, width)[local[inside]]
                out[here[inside]] = self._checked(shard, whole, vocab_size)
            for i, start in zip(here[~inside], local[~inside], strict=True):
                tail = self._checked(shard, data[start:], vocab_size)
                out[i, : len(tail)] = tail
        return out

    def _checked(self, shard: int, ids: Array, vocab_size: int | None) -> Array:
        if vocab_size is not None and ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
            wrong = ids.min() if ids.min() < 0 else ids.max()
            remedy = "prepare the data again" if wrong < 0 else "set --vocab_size above it, or prepare the data again"
            raise UserError(
                f"{self.files[shard].path}: token id {wrong} is outside the vocabulary of {vocab_size}: {remedy}"
            )
        return ids


@dataclass(frozen=True)
class Documents:
    """How documents are told apart: by this id, which is the first or the last token of each."""

    eot: int
    first: bool

    def __call__(self, rows: Rows) -> NDArray[np.int32]:
        """Rows (count, T + 1) → the number of its document, in its row, for each of the first T tokens (count, T)."""
        ends = (rows == self.eot).astype(np.int32)
        numbers = ends.cumsum(axis=1, dtype=np.int32)
        return (numbers if self.first else numbers - ends)[:, :-1]


class Tokens:
    """The token files of one data set, or of several by weight, and the order in which a run reads them.

    ``vocab_size``, once set, is what ids are checked against. ``world`` is the number of ranks that take batches
    in turn; only ``sampling="sequential"`` depends on it.
    """

    def __init__(
        self,
        folders: Sequence[Folder],
        block_size: int,
        *,
        weights: Sequence[float] = (1.0,),
        sampling: Order = "epoch",
        seed: int = 1337,
        batch_size: int = 1,
    ) -> None:
        self.folders, self.block_size = tuple(folders), block_size
        self.seed, self.batch_size, self.world = seed, batch_size, 1
        self.vocab_size: int | None = None
        self.documents: Documents | None = None  # where attention is to stay within them
        maps = Maps()
        self._splits = {s: [Shards(f, s, block_size, sampling, seed, maps) for f in folders] for s in SPLITS}
        self._shares = _largest_remainders(weights, MIXED)

    @classmethod
    def open(cls, config: Data, block_size: int, seed: int) -> Tokens:
        """For a model of ``block_size`` positions.

        Raises FileNotFoundError or ValueError that name the file and how to mend or make it.
        """
        row = config.row(block_size)
        names = parse_mixture(config.data_mixture) if config.data_mixture else {}
        folders = [find(config, name) for name in names] if names else [find(config)]
        for folder in folders[1:]:
            if why := difference(folder.tokenizer or GPT2, folders[0].tokenizer or GPT2):
                raise UserError(
                    f"{folder.path} and {folders[0].path} have different tokenizers, so they cannot be mixed ({why})"
                )
        return cls(
            folders,
            row,
            weights=list(names.values()) or [1.0],
            sampling=config.sampling,
            seed=seed,
            batch_size=config.batch_size,
        )

    @property
    def name(self) -> str:
        """The folders, for a reader."""
        return ", ".join(str(folder.path) for folder in self.folders)

    @property
    def known_vocab_size(self) -> int | None:
        """What the meta files say, if they do."""
        sizes = [folder.vocab_size for folder in self.folders]
        return None if None in sizes else max(size for size in sizes if size is not None)

    def tokenizer(self) -> dict[str, Any] | None:
        """The tokenizer as JSON; not said, it is GPT-2's where its size fits, as nanoGPT assumes, else None."""
        said, size = self.folders[0].tokenizer, self.vocab_size or self.known_vocab_size
        if said == IDS_ONLY:
            return None
        return said or (GPT2 if size is None or size in GPT2_SIZES else None)

    def tokenizer_for(self, model: dict[str, Any] | None) -> tuple[dict[str, Any] | None, str]:
        """The tokenizer of these ids for a model that learned those of ``model``, and why they mean something else to
        it, or "". Files that do not say it are taken to be of the model's."""
        said = self.folders[0].tokenizer
        if model is None or said in (None, IDS_ONLY):
            return model or self.tokenizer(), ""
        why = difference(said, model)
        return (said, why) if why else (model, "")

    def fingerprint(self) -> dict[str, str]:
        """A hash of each split."""
        return {s: "-".join(folder.fingerprint(s)[:32] for folder in self.folders) for s in SPLITS}

    def sources(self) -> list[dict[str, Any]]:
        """The name of each data set, which tells no place; its share of the rows, and its tokens to train on."""
        places = [folder.path if folder.path.is_dir() else folder.path.parent for folder in self.folders]
        return [
            {"name": place.resolve().name, "share": int(share) / MIXED, "tokens": len(shards)}
            for place, share, shards in zip(places, self._shares, self._splits["train"], strict=True)
        ]

    def length(self, split: Split) -> int:
        """Tokens in a split."""
        return sum(map(len, self._splits[split]))

    def rows(self, split: Split, first: int, count: int) -> Rows:
        """Rows ``first`` … ``first + count − 1`` of the endless order, (count, block_size + 1)."""
        index = np.arange(first, first + count, dtype=np.uint64)
        sources = self._splits[split]
        if len(sources) == 1:
            return self.windows(split, sources[0].positions(index, self.batch_size, self.world))
        source, inside = self._mixed(split, index)
        positions = np.empty(count, dtype=np.int64)
        for s, base in enumerate(self._bases(split)):
            here = source == s
            positions[here] = base + sources[s].positions(inside[here], self.batch_size, 1)
        return self.windows(split, positions)

    def _mixed(self, split: Split, index: rng.UInts) -> tuple[Rows, rng.UInts]:
        """For each row its data set and its number there: of 1,024 rows each data set has its share."""
        group, slot = index // np.uint64(MIXED), index % np.uint64(MIXED)
        place = np.empty(index.shape, dtype=np.int64)
        for g in np.unique(group):
            here = group == g
            place[here] = rng.permute(slot[here], MIXED, rng.key(self.seed, split, "mixture", int(g)))
        ends = np.cumsum(self._shares)
        source = np.searchsorted(ends, place, side="right")
        inside = group.astype(np.int64) * self._shares[source] + place - (ends - self._shares)[source]
        return source, inside.astype(np.uint64)

    def _bases(self, split: Split) -> list[int]:
        sizes = [len(shards) for shards in self._splits[split]]
        return [sum(sizes[:i]) for i in range(len(sizes))]

    def spread(self, split: Split, count: int) -> Rows:
        """Starts of ``count`` windows spread evenly over a split, by weight over a mixture; all of it, tails
        included, for 0 or too many."""
        shares = _largest_remainders(self._shares, count) if count else np.zeros_like(self._shares)
        found = [
            base + shards.spread(int(share))
            for base, shards, share in zip(self._bases(split), self._splits[split], shares, strict=True)
            if share or not count
        ]
        return np.concatenate(found)

    def windows(self, split: Split, starts: Rows) -> Rows:
        """``block_size + 1`` tokens from each start, −1 after the end of its file.

        Raises:
            ValueError: an id that the model's vocabulary lacks.
        """
        out = np.empty((len(starts), self.block_size + 1), dtype=np.int64)
        bases = self._bases(split)
        source = np.searchsorted(bases, starts, side="right") - 1
        for s in np.unique(source):
            here = source == s
            out[here] = self._splits[split][s].read(starts[here] - bases[s], self.block_size + 1, self.vocab_size)
        return out

    def tell_documents_apart(self, eot: int | Literal["auto"]) -> str:
        """From here on ``documents`` gives the document of each token. Returns how that was found out, in words.

        Files without a meta file have their end-of-text token first or last in a document by whether one of them
        begins with it.

        Raises:
            ValueError: the token is not known, or not in the files.
        """
        found: list[tuple[Documents, str]] = []
        for folder in self.folders:
            token = _eot_of(folder) if eot == "auto" else eot
            if folder.eot in ("before", "after") and token == _eot_of(folder):
                found.append((Documents(token, folder.eot == "before"), f"{folder.path}'s meta file"))
                continue
            heads = [folder.splits[split][0].map()[:_SEARCHED] for split in SPLITS]
            if not any((head == token).any() for head in heads):
                raise UserError(
                    f"{folder.path}: no token {token} near the beginning of its files, so that documents cannot be "
                    "told apart: give the id that separates them as --eot, or set --document_mask=False"
                )
            found.append((Documents(token, any(head[0] == token for head in heads)), f"the files in {folder.path}"))
        if len({documents for documents, _ in found}) > 1:
            raise UserError(f"documents begin or end in different ways in {self.name}: they cannot be mixed so")
        self.documents, source = found[0]
        return f"token {self.documents.eot} {'begins' if self.documents.first else 'ends'} a document, by {source}"


def _eot_of(folder: Folder) -> int:
    eot = None
    if folder.eot != "none" and (folder.tokenizer or GPT2)["kind"] != "datatrove":
        eot = 50256 if folder.tokenizer in (None, GPT2) else from_json(folder.tokenizer).eot
    if eot is None:
        named = f" of {folder.tokenizer['name']}" if folder.tokenizer and "name" in folder.tokenizer else ""
        raise UserError(
            f"{folder.path} has no known token{named} between documents, which --document_mask needs: "
            "give its id as --eot, or prepare the text with a tokenizer that has one, such as gpt2"
        )
    return eot


def rows_per_epoch(tokens: Any, block_size: int) -> Any:
    """Windows that fit whatever the epoch's offset, so that every epoch has as many; at least one if one fits."""
    return np.where(np.asarray(tokens) > block_size, np.maximum(1, (tokens - block_size) // block_size), 0)


def parse_mixture(text: str) -> dict[str, float]:
    """``"a=0.7,b=0.3"`` → weights by name, which need not sum to 1.

    Raises:
        ValueError: it cannot be read, or a weight is too small to have a row among 1,024.
    """
    weights: dict[str, float] = {}
    for item in text.split(","):
        name, equals, weight = item.strip().rpartition("=")
        try:
            value = float(weight)
        except ValueError:
            value = -1.0
        if not (equals and name and 0 < value < 1e9) or name in weights:
            raise UserError(f"data_mixture={text}: {item.strip()!r} must be NAME=WEIGHT, each name once")
        weights[name] = value
    shares = _largest_remainders(list(weights.values()), MIXED)
    if not shares.all():
        name = list(weights)[int(shares.argmin())]
        raise UserError(f"data_mixture={text}: the weight of {name} is too small to have one row in {MIXED}")
    return weights


def _largest_remainders(weights: Sequence[float] | Rows, total: int) -> Rows:
    """``total`` shared out by weight in whole numbers, the largest remainders rounded up."""
    exact = np.asarray(weights, dtype=np.float64) * total / np.sum(weights)
    shares = np.floor(exact).astype(np.int64)
    order = np.argsort(shares - exact, kind="stable")
    shares[order[: total - shares.sum()]] += 1
    return shares


def find(config: Data, name: str = "") -> Folder:
    """A data set by its name or place: ``data_dir``, else data/<dataset> here, in the clone, or a folder of that name.

    Raises:
        FileNotFoundError: nothing there; says how to make it. ValueError: what is there does not fit together.
    """
    dataset = name or config.dataset
    if config.data_dir and not name:
        places = [Path(config.data_dir)]
    else:
        names = (dataset, *_ALSO.get(dataset, ()))
        places = [folder / n for n in names for folder in (Path("data"), CLONE / "data", Path())]
    for place in places:
        if holds_tokens(place) if place.is_dir() else glob.glob(str(place)):
            return open_folder(place, config.token_dtype)
    missing = places[0] / "train.bin"
    if (places[0] / UNFINISHED).is_dir():
        raise FileNotFoundError(f"{places[0]} is not finished: run the same folio prepare again to go on")
    if not config.data_dir and dataset in DATA_SETS:
        raise FileNotFoundError(f"{missing} is missing: python -m folio prepare {dataset}")
    raise FileNotFoundError(
        f"{missing} is missing, and no other token file is there: python -m folio prepare FILE_OR_FOLDER "
        f"--data_dir {places[0]} makes them of your text, python -m folio prepare shakespeare_char of a known one"
    )


def holds_tokens(folder: Path) -> bool:
    """Whether a folder is taken for a data set."""
    patterns = ("*.bin", "*.npy", "*.ds", "*/*.ds", "meta.json")
    return any(next(folder.glob(pattern), None) for pattern in patterns)
