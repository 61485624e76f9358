"""HellaSwag: choose the best of four endings of a context.

Zellers et al., "HellaSwag: Can a Machine Really Finish Your Sentence?", 2019. Scored in both ways for which GPT-2's
results are published.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from folio import files
from folio.config.declare import HellaSwagStyle
from folio.data.token_files import CLONE
from folio.data.tokenizers import MissingCharactersError, Tokenizer
from folio.errors import UserError
from folio.evaluation.scoring import Query, cut_to_context, score
from folio.machine.runtime import Runtime
from folio.model.config import GPTConfig
from folio.model.gpt import GPT

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"  # of its 10,042 items
_LONGEST_LINE = 2**24  # bytes
FILE = Path("data", "hellaswag", "hellaswag_val.jsonl")


class Item(NamedTuple):
    """A question in one style: the context, its endings, and the length by which each ending's score is divided."""

    context: str
    endings: list[str]
    lengths: list[int] | None  # None: in tokens
    label: int


@dataclass(frozen=True)
class Questions:
    """Items as token ids of one model. ``cut`` of them are longer than its context and lost their beginnings."""

    style: HellaSwagStyle
    queries: list[Query]  # four continuations to an item, in one query or four
    lengths: NDArray[np.float64]  # (items, 4)
    labels: NDArray[np.int64]  # (items)
    cut: int

    @property
    def note(self) -> str:
        """A line about the items that lost their beginnings; empty if none did."""
        of = f"{self.cut} of {len(self.labels)} HellaSwag items are"
        return f"{of} longer than the model's context: their beginnings are left out" if self.cut else ""


def locate(data: str) -> Path:
    """The file of items: ``data`` if it is given, else the validation split, downloaded and verified if necessary.

    Raises:
        FileNotFoundError: ``data`` does not exist. ValueError: ``data`` is not a regular file; the download failed, or
            its checksum is wrong.
    """
    if data:
        try:
            return files.require_file(Path(data))
        except FileNotFoundError:
            raise FileNotFoundError(f"{data}: there is no such file of HellaSwag items") from None
    found = next((path for path in (FILE, CLONE / FILE) if path.is_file()), None)
    if found is None:
        files.download(
            URL,
            SHA256,
            FILE,
            f"save it as {FILE}, or name it with --data FILE (folio eval) or --hellaswag_data=FILE (folio train)",
        )
    return found or FILE


def read(path: Path, style: HellaSwagStyle, limit: int = 0) -> list[Item]:
    """The items of a ``.jsonl`` file in the official schema, the first ``limit`` of them if that is not 0.

    Raises:
        ValueError: a line is not an item, or there are no items; names the file and the line.
    """
    items: list[Item] = []
    with files.open_regular(path) as file:
        lines = iter(lambda: file.readline(_LONGEST_LINE + 1), b"")
        for number, line in enumerate(lines, 1):
            if limit and len(items) == limit:
                break
            try:
                if len(line) > _LONGEST_LINE:
                    raise UserError(f"the line is longer than {_LONGEST_LINE:,} bytes")
                items.append(_item(files.parse_json(line), style))
            except KeyError as error:
                raise UserError(f"{path}:{number}: not a HellaSwag item: it has no {error}") from None
            except (TypeError, ValueError) as error:
                raise UserError(f"{path}:{number}: not a HellaSwag item: {error}") from None
    if not items:
        raise UserError(f"{path}: it holds no items: name a HellaSwag file, such as hellaswag_val.jsonl")
    return items


def _item(raw: Any, style: HellaSwagStyle) -> Item:
    if not isinstance(raw, dict):
        raise UserError("the line is not a JSON object")
    endings, label = raw["endings"], raw["label"]
    if not (isinstance(endings, list) and len(endings) == 4 and all(isinstance(e, str) and e for e in endings)):
        raise UserError("its endings are not four texts")
    if label == "":
        raise UserError("its label is empty, as in the test split: the validation split has labels")
    if str(label) not in ("0", "1", "2", "3"):
        shown = f"{label!r:.40}" if isinstance(label, (str, int, float)) else f"a {type(label).__name__}"
        raise UserError(f"its label is {shown}: must be 0, 1, 2 or 3")
    parts = [raw[name] for name in (("ctx",) if style == "completion" else ("activity_label", "ctx_a", "ctx_b"))]
    if not all(isinstance(part, str) for part in parts) or not "".join(parts).strip():
        raise UserError("its context is empty or not text")
    if style == "completion":
        return Item(parts[0], [f" {e}" for e in endings], None, int(label))
    activity, start, end = parts
    endings = [_clean(e) for e in endings]
    if not all(endings):
        raise UserError("an ending has nothing but WikiHow's marks")
    whole = _clean(f"{activity}: {start} {end.capitalize()}")
    context = whole.rstrip()
    return Item(context, [f"{whole[len(context) :]} {e}" for e in endings], [len(e) for e in endings], int(label))


def _clean(text: str) -> str:
    """The text without WikiHow's marks, which the lm-evaluation-harness removes too (hellaswag/utils.py)."""
    lines = text.strip().replace(" [title]", ". ").split("\n")
    heads = (line.rpartition("]") for line in lines)  # no mark ends after the last bracket: one search is enough
    return "\n".join(re.sub(r"\[.*?\]", "", head + bracket) + rest for head, bracket, rest in heads).replace("  ", " ")


def load(
    data: str, style: HellaSwagStyle, limit: int, tokenizer: Tokenizer, shape: GPTConfig, runtime: Runtime
) -> Questions:
    """Reads the questions on rank 0 and encodes them for a model; raises as ``locate``, ``read`` and ``encode``."""
    items = runtime.broadcast(lambda: read(locate(data), style, limit))
    return encode(items, style, tokenizer, shape)


def encode(items: list[Item], style: HellaSwagStyle, tokenizer: Tokenizer, shape: GPTConfig) -> Questions:
    """Encodes the items for a model of this shape.

    Raises:
        ValueError: the tokenizer lacks a character, or the model a token.
    """

    def pairs(item: Item) -> Iterator[tuple[list[int], list[int]]]:
        context = tokenizer.encode(item.context).tolist()
        for ending in item.endings:
            # the harness encodes context and ending together, which may differ at their border
            if style == "completion":
                yield context, tokenizer.encode(ending).tolist()
            else:
                yield context, tokenizer.encode(item.context + ending).tolist()[len(context) :]

    queries, lengths, cut = [], [], 0
    for number, item in enumerate(items, 1):
        try:
            contexts, endings = zip(*pairs(item), strict=True)
            if not all(endings):
                raise UserError("the tokenizer merges an ending into its context: use the style completion")
            if isinstance(shape.vocab_size, int) and max(map(max, (contexts[0], *endings))) >= shape.vocab_size:
                raise UserError(f"some of its token ids are not among the model's {shape.vocab_size}")
        except MissingCharactersError as error:
            remedy = "HellaSwag needs a tokenizer of bytes or words"
            raise UserError(f"HellaSwag item {number}: {error.lack}: {remedy}") from None
        except ValueError as error:
            raise UserError(f"HellaSwag item {number}: {error}") from None
        parts = cut_to_context(Query(contexts[0], list(endings)), shape.block_size)
        queries += parts
        cut += len(parts) > 1
        lengths.append(item.lengths or [len(c) for part in parts for c in part.continuations])
    return Questions(style, queries, np.array(lengths, dtype=np.float64), np.array([i.label for i in items]), cut)


def predictions(
    model: GPT, questions: Questions, runtime: Runtime, **how: Any
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The likeliest ending of each item, and the likeliest per length; (items) each, the same on every rank."""
    nats = score(model, questions.queries, runtime, **how).nats.reshape(-1, 4)
    return nats.argmin(1), (nats / questions.lengths).argmin(1)


def evaluate(model: GPT, questions: Questions, runtime: Runtime, **how: Any) -> dict[str, Any]:
    """The shares of right answers: ``acc`` by the likeliest ending, ``acc_norm`` by the likeliest per length.

    Further arguments as ``score``'s.
    """
    right, right_norm = (int((p == questions.labels).sum()) for p in predictions(model, questions, runtime, **how))
    total = len(questions.labels)
    return {"style": questions.style, "acc": right / total, "acc_norm": right_norm / total, "total": total}
