"""folio prepare: text → token files."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from folio.config.declare import ITSELF, option
from folio.config.files import find_preset
from folio.errors import UserError
from folio.preparation.recipes import KNOWN, help_of, known, named_by_user
from folio.preparation.sources import Given
from folio.records.console import say

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
    """Make the token files of a data set. After a kill, the same command continues where it stopped."""

    text: tuple[str, ...] = option(
        (),
        "a known data set; files, folders and globs; or hf:NAME",
        details=f"Known are {', '.join(KNOWN)}. Files are text, JSON lines or parquet. hf:NAME is a data set of "
        "the Hugging Face hub.",
        path=ITSELF,
        positional="TEXT …",
        listed=("known data sets", {name: help_of(name) for name in KNOWN}),
    )
    name: str = option("", "name of the data set; default: name of the first source")
    data_dir: str = option("", "where to write; default: data/<name>", path=ITSELF)
    source: str = option("", "file or folder with the text of a known data set", path=ITSELF)
    tokenizer: str = option("", "char | bytes | gpt2 | another of tiktoken | FILE.json; default: gpt2", path=ITSELF)
    text_key: str = option("", "key or column that holds the text; default: text")
    shard_size: int = option(0, "tokens in a shard; 0: the recipe's, or one file for each split", min=0)
    val_fraction: float = option(0.0, "share of the documents for validation; 0: depends on the size", min=0, below=1)
    val_documents: int = option(0, "first documents, for validation; instead of val_fraction", min=0)
    on_error: Literal["stop", "skip"] = option("stop", "skip: count unreadable documents and continue")
    overwrite: bool = option(False, "replace a data set that was made with other settings")
    workers: int = option(0, "processes that tokenize; 0: one for each core", min=0)
    shard_of: str = option("", "I/N: prepare part I (from 0) of N; the part that ends last joins them")
    config: str = option("", "hf: configuration of the data set")
    split: str = option("", "hf: split of the data set; default: train")
    streaming: bool = option(False, "hf: read the data set as a stream, without a copy in the cache")


def main(options: Options) -> None:
    folder = run(options)
    from folio.data.token_files import META  # NumPy's import must not delay an error above

    if (folder / META).exists():
        say(f"next: {_next_command(options, folder)}")


def _next_command(options: Options, folder: Path) -> str:
    """The command that trains on a data set: with the preset of its name, else with the one for any machine."""
    by_name = folder.resolve().parent == Path("data").resolve() or folder.name in KNOWN
    name = folder.name if by_name else ""
    if name in KNOWN and (preset := find_preset(name)):
        return f"folio train {preset.stem.removeprefix('train_')}"
    data = shlex.quote(f"--dataset={name}" if name else f"--data_dir={folder}")
    return f"folio train small {data} (minutes on a CPU; medium and gpt2 are for a GPU)"


def run(options: Options, texts: Iterable[str] | None = None) -> Path:
    """Prepares what the options name, or the texts of a program; returns the folder."""
    if texts is None and not any(options.text):
        raise UserError(f"nothing to prepare: name a data set ({', '.join(KNOWN)}), your files or folders, or hf:NAME")
    from folio.preparation.job import prepare

    chosen: dict[str, Any] = {name: value for name in _CHOICES if (value := getattr(options, name))}
    if options.val_fraction and options.val_documents:
        raise UserError("--val_fraction and --val_documents exclude each other: give one")
    first = options.text[0] if texts is None else ""
    by_name = len(options.text) == 1 and (first in KNOWN or not _names_text(first))
    name = options.name or (first if by_name else _name_of(first or options.data_dir))
    folder = Path(options.data_dir or Path("data") / name)
    if by_name:
        recipe = known(first, folder, options.source, chosen)
    elif options.source:
        raise UserError("--source gives the text of a known data set only: name your files without --source")
    elif texts is not None:
        recipe = named_by_user(_given(texts, options), name, **chosen)
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


def _given(texts: Iterable[str], options: Options) -> Given:
    """The texts as a source. Raises UserError if they are not documents, or options do not go with them."""
    if isinstance(texts, (str, bytes, Mapping)) or not isinstance(texts, Iterable):
        raise UserError(f"texts is of type {type(texts).__name__}: must be a list of documents, or another iterable")
    if options.text:
        raise UserError(f"texts and {options.text[0]} exclude each other: give one")
    if not (options.name or options.data_dir):
        raise UserError("texts have no name: give the data set one, name='…'")
    if odd := [name for name in ("text_key", "config", "split", "streaming", "shard_of") if getattr(options, name)]:
        raise UserError(f"{odd[0]} is for files: leave it out where you give texts")
    return Given(texts)


def _names_text(source: str) -> bool:
    """Whether a source is a file, folder, glob or hf:NAME, and not the name of a known data set."""
    return source.startswith("hf:") or Path(source).exists() or not source.isidentifier()


def _name_of(source: str) -> str:
    from folio.preparation.finding import kind_of

    path = Path(source.removeprefix("hf:"))
    name = path.name if kind_of(path) is None else path.name.split(".")[0]
    return re.sub(r"[^\w.-]+", "_", name).strip("_.") or "corpus"


def _part(text: str) -> tuple[int, int]:
    if not text:
        return 0, 1
    index, slash, count = text.partition("/")
    if len(text) < 20 and slash and index.isdecimal() and count.isdecimal() and int(index) < int(count):
        return int(index), int(count)
    raise UserError(f"shard_of={text}: must be I/N with I from 0 to N − 1, such as 0/4")
