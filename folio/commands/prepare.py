"""folio prepare: text → token files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from folio.config.options import ITSELF, knob
from folio.errors import UserError
from folio.preparation.finding import kind_of
from folio.preparation.job import prepare
from folio.preparation.recipes import KNOWN, known, named_by_user

_CHOICES = (
    "tokenizer",
    "text_key",
    "shard_size",
    "val_fraction",
    "val_documents",
    "config",
    "split",
    "streaming",
)


@dataclass(frozen=True)
class Options:
    """Make the token files of a data set. Killed at any point, the same command goes on where it was."""

    text: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="TEXT …")] = knob(
        (), f"{' | '.join(KNOWN)}, or files, folders and globs of text, JSON lines and parquet, or hf:NAME", path=ITSELF
    )
    name: str = knob("", "name of the data set; default: that of the first source")
    data_dir: str = knob("", "where to write; default: data/<name>", path=ITSELF)
    source: str = knob(
        "", "file or folder to take the text of a known data set from, instead of its usual place", path=ITSELF
    )
    tokenizer: str = knob(
        "", "char | bytes | an encoding of tiktoken (default: gpt2) | FILE.json of tokenizers", path=ITSELF
    )
    text_key: str = knob("", "key or column that holds the text; default: text")
    shard_size: int = knob(0, "tokens in a shard; 0: the recipe's, or one file for each split", min=0)
    val_fraction: float = knob(0.0, "share of the documents for validation; 0: by the size", min=0, below=1)
    val_documents: int = knob(0, "so many of the first documents are for validation instead", min=0)
    on_error: Literal["stop", "skip"] = knob("stop", "skip: count documents that cannot be taken and go on")
    overwrite: bool = knob(False, "replace a data set that was made with other settings")
    workers: int = knob(0, "processes that tokenise; 0: one for each core", min=0)
    shard_of: str = knob("", "I/N: prepare part I (from 0) of N; the last one to end puts all together")
    config: str = knob("", "hf: configuration of the data set")
    split: str = knob("", "hf: split of it; default: train")
    streaming: bool = knob(False, "hf: read it as it comes, without a copy in the cache")


def main(options: Options) -> None:
    run(options)


def run(options: Options) -> Path:
    """Prepares, and returns the folder."""
    if not any(options.text):
        raise UserError(f"nothing to prepare: there are {', '.join(KNOWN)}, your files and folders, or hf:NAME")
    chosen: dict[str, Any] = {name: value for name in _CHOICES if (value := getattr(options, name))}
    if options.val_fraction and options.val_documents:
        raise UserError("--val_fraction and --val_documents exclude each other: give one")
    first = options.text[0]
    by_name = len(options.text) == 1 and (first in KNOWN or not _names_text(first))
    name = options.name or (first if by_name else _name(first))
    folder = Path(options.data_dir or Path("data") / name)
    if by_name:
        recipe = known(first, folder, options.source, chosen)
    elif options.source:
        raise UserError("--source is for a known data set: name files themselves")
    else:
        recipe = named_by_user(options.text, name, **chosen)
    prepare(
        recipe,
        folder,
        workers=options.workers,
        skip=options.on_error == "skip",
        overwrite=options.overwrite,
        part=_part(options.shard_of),
    )
    return folder


def _names_text(source: str) -> bool:
    """Whether a source is meant as a place, and no data set's name."""
    return source.startswith("hf:") or Path(source).exists() or not source.isidentifier()


def _name(source: str) -> str:
    path = Path(source.removeprefix("hf:"))
    name = path.name if kind_of(path) is None else path.name.split(".")[0]
    return re.sub(r"[^\w.-]+", "_", name).strip("_.") or "corpus"


def _part(text: str) -> tuple[int, int]:
    if not text:
        return 0, 1
    index, slash, count = text.partition("/")
    if slash and index.isdecimal() and count.isdecimal() and int(index) < int(count):
        return int(index), int(count)
    raise UserError(f"shard_of={text}: must be I/N with I from 0 to N − 1, such as 0/4")
