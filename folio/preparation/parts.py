"""The parts of a preparation that several processes share. Each writes one part; one process joins them."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from folio import files
from folio.data.token_files import SPLITS
from folio.errors import UserError
from folio.preparation.sources import Block
from folio.preparation.workers import Tokenized
from folio.preparation.writer import Counted, read_state


class PartWriter(Counted):
    """Writes the results of one part, for the process that joins all parts."""

    def __init__(self, folder: Path, state: dict[str, Any]) -> None:
        super().__init__(folder, state)
        self.tokens: int = state.get("tokens", 0)
        self._files = {}
        for name in ("ids", "lengths", "blocks"):
            self._files[name] = files.open_to_write(folder / name, "a+b")
            self._files[name].truncate(state.get("sizes", {}).get(name, 0))
            self._files[name].seek(0, io.SEEK_END)

    def add(self, found: Tokenized, block: Block) -> None:
        """Adds the ids of the next block."""
        files.write_to(self._files["ids"], found.ids.tobytes())
        files.write_to(self._files["lengths"], found.lengths.astype("<i8").tobytes())
        split = 0 if block.split is None else 1 + SPLITS.index(block.split)
        row = [len(found.ids), len(found.lengths), found.continues, split, found.size, block.size]
        files.write_to(self._files["blocks"], np.array(row, dtype="<i8").tobytes())
        self.tokens += len(found.ids)
        self.count(found, block)

    def close(self) -> None:
        """Closes the files. What was not committed is lost."""
        for file in self._files.values():
            file.close()

    def commit(self, position: Any, **more: Any) -> None:
        """As ``Writer.commit``. ``complete=True`` marks the part as complete."""
        for file in self._files.values():
            files.sync_open(file)
        sizes = {name: file.tell() for name, file in self._files.items()}
        self.save(position=position, sizes=sizes, tokens=self.tokens, **more)


@dataclass(frozen=True)
class Parts:
    """The results of all parts, in order, as if one process had made them."""

    folders: Sequence[Path]
    dtype: np.dtype[Any]

    def results(self, position: Any = None) -> Generator[tuple[Block, Tokenized]]:
        """Each block with its ids. Position: [part, blocks of it that are done]."""
        first, done = position or (0, 0)
        for number, folder in enumerate(self.folders):
            if number < first:
                continue
            for name, size in read_state(folder)["sizes"].items():
                if (folder / name).stat().st_size != size:
                    raise UserError(f"{folder / name} is damaged: remove {folder} to make that part again")
            with files.open_regular(folder / "blocks") as blocks:
                rows = np.fromfile(blocks, "<i8").reshape(-1, 6)
            skip = rows[: done if number == first else 0].sum(axis=0)
            skipped = Counter[str](read_state(folder)["skipped"])
            with files.open_regular(folder / "ids") as ids, files.open_regular(folder / "lengths") as lengths:
                ids.seek(int(skip[0]) * self.dtype.itemsize if len(rows) else 0)
                lengths.seek(int(skip[1]) * 8 if len(rows) else 0)
                for i, (tokens, documents, continues, split, size, disk) in enumerate(rows.tolist()):
                    if number == first and i < done:
                        continue
                    last = i == len(rows) - 1
                    found = Tokenized(
                        np.frombuffer(ids.read(tokens * self.dtype.itemsize), self.dtype),
                        np.frombuffer(lengths.read(documents * 8), "<i8"),
                        bool(continues),
                        size,
                        skipped if last else Counter(),
                    )
                    yield Block((), [number, i + 1], disk, (None, *SPLITS)[split]), found
