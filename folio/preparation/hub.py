"""A data set of the datasets library as a source of documents."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from folio.errors import UserError
from folio.preparation.documents import Span
from folio.preparation.finding import find, kind_of
from folio.preparation.sources import Block
from folio.preparation.text_files import Files

if TYPE_CHECKING:
    from folio.data.token_files import Split


@dataclass(frozen=True)
class Hub:
    """A data set of the datasets library: a name on its hub, or a local file or folder of parquet or JSON lines.

    ``held_out``: the fraction of the documents for validation, chosen and shuffled as in nanoGPT's
    ``data/openwebtext/prepare.py`` (``train_test_split``, seed 2357).
    """

    name: str
    config: str | None = None
    split: str = "train"
    streaming: bool = False
    text_key: str = "text"
    held_out: float = 0.0
    size: int | None = None
    once = False

    def describe(self) -> dict[str, Any]:
        what = {"hub": self.name, "config": self.config, "split": self.split, "held_out": self.held_out}
        what["streaming"] = self.streaming  # parts of a stream are whole files
        if Path(self.name).exists():
            del what["hub"]
            what |= Files(*find([self.name])).describe()
        return what

    def blocks(self, position: Any = None, part: tuple[int, int] = (0, 1)) -> Iterator[Block]:
        """Position: [split, documents done] in a table, the library's state in a stream."""
        data = self._open()
        if self.streaming:
            yield from self._stream(data, position, part)
            return
        tables: list[tuple[Split | None, Any]] = [(None, data)]
        if self.held_out:
            both = data.train_test_split(test_size=self.held_out, seed=2357, shuffle=True)
            tables = [("val", both["test"]), ("train", both["train"])]
        first, done = position or (0, 0)
        for number, (split, table) in enumerate(tables[first:], first):
            begin, end = (len(table) * (part[0] + i) // part[1] for i in (0, 1))
            begin += done if number == first else 0
            for start in range(begin, end, 256):
                stop = min(start + 256, end)
                texts = table[start:stop][self.text_key]
                done_here = stop - len(table) * part[0] // part[1]
                yield Block((Span(self._label, "texts", start, held=texts),), [number, done_here], 0, split)

    def _stream(self, data: Any, position: Any, part: tuple[int, int]) -> Iterator[Block]:
        if part[1] > 1:
            if data.num_shards < part[1]:
                raise UserError(
                    f"{self._label} has {data.num_shards} files: --shard_of=I/N needs an N of at most {data.num_shards}"
                )
            data = data.shard(num_shards=part[1], index=part[0], contiguous=True)
        number = 0
        if position:
            data.load_state_dict(position["state"])
            number = position["documents"]
        for batch in data.iter(batch_size=256):
            texts = batch[self.text_key]
            after = {"state": json.loads(json.dumps(data.state_dict())), "documents": number + len(texts)}
            yield Block((Span(self._label, "texts", number, held=texts),), after, 0)
            number += len(texts)

    @property
    def _label(self) -> str:
        return self.name if self.split == "train" else f"{self.name}[{self.split}]"

    def _open(self) -> Any:
        import datasets

        datasets.disable_progress_bars()
        local: dict[str, Any] = {}
        path = self.name
        if Path(path).exists():
            files = [str(p) for p in find([path])[0]]
            kinds = {kind_of(Path(f)) for f in files}
            if len(kinds) > 1 or not kinds <= {"lines", "packed", "parquet"}:
                raise UserError(f"{path}: the datasets library takes parquet or JSON lines, not a mixture or text")
            path, local = ("parquet" if kinds == {"parquet"} else "json"), {"data_files": {self.split: files}}
        config = None if local else self.config
        try:
            data = datasets.load_dataset(path, config, split=self.split, streaming=self.streaming, **local)
        except Exception as error:  # the library raises almost anything
            reason = next(iter(chain(str(error).splitlines(), [type(error).__name__])))
            raise UserError(f"hf:{self.name} cannot be loaded ({type(error).__name__}: {reason})") from None
        names = data.column_names
        if names and self.text_key not in names:
            raise UserError(
                f"hf:{self.name} has no column {self.text_key!r} but {', '.join(names)}: --text_key names another"
            )
        return data.select_columns(self.text_key)
