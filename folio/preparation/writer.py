"""Ids of documents, in order → the files of a data set, which appear whole or not at all.

The files grow in a folder of their own. ``commit`` makes everything so far durable, with the position of the source
after it. A ``Writer`` that starts from that state cuts off what a killed process wrote after its last commit.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from folio import files
from folio.data.token_files import META, SPLITS, Split
from folio.data.tokenizers import Ids
from folio.errors import UserError
from folio.files import read_json, read_sealed, sha256, write_sealed
from folio.preparation.recipe import Layout
from folio.preparation.sources import Block
from folio.preparation.workers import Tokenized

STATE = "state.json"
DIVIDED = "divided"  # the folder of the files of a small data set, whose documents are divided at the end
_NPY_HEADER = 128  # bytes, whatever the number of tokens


class Stream:
    """The tokens of one split, or of both if the first shard is for validation, file after file."""

    def __init__(self, folder: Path, layout: Layout, split: Split | None, dtype: np.dtype[Any], state: Any) -> None:
        self.folder, self.layout, self.split, self.dtype = folder, layout, split, dtype
        self.done: list[dict[str, Any]] = state["done"]
        self.tokens: int = state["tokens"]  # in the file that grows
        self.documents: int = state["documents"]
        self._file: io.FileIO | None = None
        if self.tokens:
            size = self._offset + self.tokens * dtype.itemsize
            if not self._path.is_file() or self._path.stat().st_size < size:
                raise UserError(f"{self._path} is damaged: remove {folder} to begin again")
            self._file = files.open_to_write(self._path, "r+b")
            self._file.truncate(size)
            self._file.seek(0, io.SEEK_END)

    @property
    def state(self) -> dict[str, Any]:
        return {"done": self.done, "tokens": self.tokens, "documents": self.documents}

    @property
    def total(self) -> int:
        return self.tokens + sum(f["tokens"] for f in self.done)

    @property
    def _path(self) -> Path:
        split = self.split or ("train" if self.done else "val")
        index = len(self.done) + (self.split == "train")
        return self.folder / self.layout.name.format(split=split, index=index)

    @property
    def _offset(self) -> int:
        return _NPY_HEADER if self._path.suffix == ".npy" else 0

    def append(self, ids: Ids, starts: Ids) -> None:
        """Adds ids; ``starts`` are the indices at which documents begin."""
        while len(ids):
            room = self.layout.shard_size - self.tokens if self.layout.shard_size else len(ids)
            if self._file is None:
                self._file = files.open_to_write(self._path, "wb")
                files.write_to(self._file, bytes(self._offset))
            files.write_to(self._file, ids[:room].tobytes())
            self.tokens += len(ids[:room])
            self.documents += int((starts < room).sum())
            ids, starts = ids[room:], starts[starts >= room] - room
            if self.tokens == self.layout.shard_size:
                self.close()

    def close(self) -> None:
        """Completes the file that grows, if there is one."""
        if self._file is None:
            return
        self._finish(self._file)
        path, self._file = self._path, None
        entry = {"name": path.name, "tokens": self.tokens, "documents": self.documents, "sha256": sha256(path)}
        self.done.append(entry)
        self.tokens = self.documents = 0

    def _finish(self, file: io.FileIO) -> None:
        if self._offset:
            header = io.BytesIO()
            described = {"descr": self.dtype.newbyteorder("<").str, "fortran_order": False, "shape": (self.tokens,)}
            np.lib.format.write_array_header_1_0(header, described)
            assert header.tell() == _NPY_HEADER
            file.seek(0)
            files.write_to(file, header.getvalue())
        files.sync_open(file)
        file.close()

    def release(self) -> None:
        """Closes the file that grows, without completing it."""
        if self._file is not None:
            self._file.close()

    def sync(self) -> None:
        """Makes everything added so far durable."""
        if self._file is not None:
            files.sync_open(self._file)


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Commits the state from which a later process continues, with its checksum."""
    write_sealed(folder / STATE, state)


def read_state(folder: Path) -> dict[str, Any]:
    """The state that an earlier process committed in a folder, or {}.

    Raises:
        ValueError: it is damaged; the error says how to begin again.
    """
    path = folder / STATE
    try:
        state, _ = read_sealed(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): remove {folder} to begin again") from None
    state.pop("sha256", None)
    if not {"made", "block"} <= state.keys():
        raise UserError(f"{path} is damaged: remove {folder} to begin again")
    return state


class Counted:
    """Counts what was added, and commits the counts. ``state``: that of an earlier process, or {}."""

    def __init__(self, folder: Path, state: dict[str, Any]) -> None:
        self.folder, self.state = folder, state
        self.documents: int = state.get("documents", 0)
        self.text_bytes: int = state.get("text_bytes", 0)
        self.disk_bytes: int = state.get("disk_bytes", 0)  # bytes of the source that are done
        self.skipped = Counter[str](state.get("skipped", {}))

    def count(self, found: Tokenized, block: Block) -> None:
        self.documents += len(found.lengths) - found.continues
        self.text_bytes += found.size
        self.disk_bytes += block.size
        self.skipped += found.skipped

    def save(self, **more: Any) -> None:
        names = ("documents", "text_bytes", "disk_bytes", "skipped")
        self.state |= {name: getattr(self, name) for name in names} | more
        save_state(self.folder, self.state)


class Writer(Counted):
    """Writes tokenized blocks, in order, to the files of the data set."""

    def __init__(self, folder: Path, layout: Layout, dtype: np.dtype[Any], given: bool, state: dict[str, Any]) -> None:
        super().__init__(folder, state)
        self.layout, self.dtype = layout, dtype
        self.given = given  # the source decides the split of each block
        self.place = folder  # where the files are
        by_document = given or layout.val_documents or layout.val_fraction
        kept = state.get("streams", {})
        empty = {"done": [], "tokens": 0, "documents": 0}
        splits: tuple[Split | None, ...] = SPLITS if by_document else (None,)
        self.streams = {s: Stream(folder, layout, s, dtype, kept.get(str(s), {**empty, "done": []})) for s in splits}

    @property
    def tokens(self) -> int:
        return sum(stream.total for stream in self.streams.values())

    def add(self, found: Tokenized, block: Block) -> None:
        """Adds the ids of the next block."""
        lengths = found.lengths
        numbers = self.documents - found.continues + np.arange(len(lengths))
        fresh = np.arange(len(lengths)) >= found.continues
        if block.split or None in self.streams:
            self.streams[block.split].append(found.ids, (np.cumsum(lengths) - lengths)[fresh])
        else:
            val = self._is_val(numbers)
            for split, chosen in zip(SPLITS, (~val, val), strict=True):
                places = np.cumsum(lengths * chosen) - lengths * chosen
                ids = found.ids if chosen.all() else found.ids[np.repeat(chosen, lengths)]
                self.streams[split].append(ids, places[chosen & fresh])
        self.count(found, block)

    def _is_val(self, numbers: Ids) -> Any:
        if self.layout.val_documents:
            return numbers < self.layout.val_documents
        share = self.layout.val_fraction
        return (np.floor(numbers * share) != np.floor((numbers - 1) * share)) | (numbers == 0)

    def close(self) -> None:
        """Closes the files. What was not committed is lost."""
        for stream in self.streams.values():
            stream.release()

    def commit(self, position: Any) -> None:
        """Makes everything added so far durable: a later process continues from here."""
        for stream in self.streams.values():
            stream.sync()
        streams = {str(split): stream.state for split, stream in self.streams.items()}
        self.save(position=position, streams=streams)

    def finish(self, eot: int | None, fraction: float) -> dict[Split, list[dict[str, Any]]]:
        """Completes the files, and returns those of each split.

        If all tokens fit in one shard, documents are divided instead, ``fraction`` of them for validation.

        Raises:
            ValueError: a split has no document.
        """
        for stream in self.streams.values():
            stream.close()
        if None in self.streams:
            files = self.streams[None].done
            if len(files) == 1 and eot is not None:
                self._divide(files[0], eot, fraction)
                return self.finish(None, 0.0)
            return {"val": files[:1], "train": files[1:]}
        for split, stream in self.streams.items():
            if not stream.total and self.given:
                raise UserError(f"nothing is left for {split}: the text is too short to divide")
            if not stream.total:
                raise UserError(
                    f"no document is left for {split}, of {self.documents} in all: give more documents, or another "
                    "--val_fraction or --val_documents (a single .txt file is divided within its text)"
                )
        return {split: self.streams[split].done for split in SPLITS}

    def _divide(self, only: dict[str, Any], eot: int, fraction: float) -> None:
        path = self.place / only["name"]
        with files.open_regular(path) as file:
            ids = np.load(file) if path.suffix == ".npy" else np.fromfile(file, self.dtype)
        ends = np.append(np.flatnonzero(ids == eot)[1:], len(ids))
        whole = Tokenized(ids, np.diff(ends, prepend=0), False, 0, Counter())
        self.place = self.folder / DIVIDED  # committed files stay unchanged until all is done
        files.remove(self.place)
        files.make_folder(self.place)
        divided = Writer(self.place, replace(self.layout, val_fraction=fraction), self.dtype, False, {})
        divided.add(whole, Block((), None, 0))
        self.streams, self.documents = divided.streams, divided.documents


def move(folder: Path, names: list[str], meta: dict[str, Any], to: Path, replaces: Sequence[str]) -> None:
    """Moves finished files to their place, ``meta.json`` last; an older ``meta.json`` is removed first."""
    if odd := [name for name in (*names, *replaces) if not files.is_name(name)]:
        raise UserError(f"{folder} names {odd[0][:80]!r}, outside of {to}: remove {folder} to begin again")
    files.remove(to / META)
    for name in names:
        if (folder / name).exists():
            files.rename(folder / name, to / name)
    for name in set(replaces) - set(names):
        files.remove(to / name)
    write_sealed(to / META, meta)


def listed(folder: Path) -> set[str]:
    """The files of the data set in a folder, if there is one."""
    try:
        splits = read_json(folder / META)["splits"]
        return {Path(f["name"]).name for split in splits.values() for f in split["files"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()
