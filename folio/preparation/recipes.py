"""The recipes of the known data sets, one function each, and of the files that a user names.

To add a data set, write its function here, under ``@data_set``. Its arguments are the folder, a ``source`` that
replaces the usual one, and by keyword the options that a user may set. The first line of its docstring is its help.

``folio prepare --help`` imports this module, so it imports NumPy and other slow packages only inside functions.
"""

from __future__ import annotations

import hashlib
import inspect
import platform
import re
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from folio.config.names import did_you_mean
from folio.errors import UserError
from folio.files import download, read_text
from folio.preparation.finding import find
from folio.preparation.hub import Hub
from folio.preparation.recipe import Layout, Recipe
from folio.preparation.sources import Given, Source, Texts
from folio.preparation.text_files import Files
from folio.records.console import say

if TYPE_CHECKING:
    from folio.data.tokenizers import Tokenizer

SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
OPENWEBTEXT = "Skylion007/openwebtext"
FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"
SHARD_SIZE = 100_000_000
_VAL_BYTES = 10_000_000  # of text, enough for validation
_NOT_SOURCES = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}

Function = Callable[..., Recipe]
KNOWN: dict[str, Function] = {}  # the known data sets, by name


def data_set(function: Function) -> Function:
    """Adds a function to the known data sets, under its own name."""
    KNOWN[function.__name__] = function
    return function


def help_of(name: str) -> str:
    """One line about a known data set."""
    return (inspect.getdoc(KNOWN[name]) or "").partition("\n")[0].removesuffix(".")


@data_set
def shakespeare_char(folder: Path, source: str) -> Recipe:
    """Tiny Shakespeare by characters: nanoGPT's files.

    ``source`` may be any UTF-8 text. It is read in Python's text mode, as nanoGPT reads it: every line end becomes
    \\n, and a byte order mark is a character.
    """
    from folio.data.tokenizers import Characters

    text = _shakespeare(folder, source)
    characters = "".join(sorted(set(text)))
    say(f"length of dataset in characters: {len(text):,}")
    say(f"all the unique characters: {characters}")
    say(f"vocab size: {len(characters):,}")
    return _split_text(folder, "shakespeare_char", text, Characters(characters))


@data_set
def shakespeare(folder: Path, source: str) -> Recipe:
    """Tiny Shakespeare in GPT-2's BPE: nanoGPT's files.

    ``source`` may be any UTF-8 text.
    """
    return _split_text(folder, "shakespeare", _shakespeare(folder, source), "gpt2")


@data_set
def stdlib(folder: Path, source: str) -> Recipe:
    """The sources of Python's standard library by bytes.

    They are those of the running Python, or of the folder ``source``, in the order of their paths. Every tenth file is
    for validation.
    """
    root = Path(source or sysconfig.get_path("stdlib"))
    files = list(_python_sources(root))
    if not files:
        raise UserError(f"{root} holds no Python sources: give a folder with some as --source")
    say(f"{len(files):,} files of {root}, {sum(map(len, files)):,} characters")
    train = "".join(text for i, text in enumerate(files) if i % 10 != 9)
    made = {"dataset": "stdlib", "python": platform.python_version()}
    return _of_texts(folder, made, train, "".join(files[9::10]), "bytes")


@data_set
def openwebtext(folder: Path, source: str) -> Recipe:
    """OpenWebText in GPT-2's BPE: nanoGPT's files.

    The split, the order and the end-of-text after each document are nanoGPT's.
    """
    texts = Hub(source or OPENWEBTEXT, config=None if source else "plain_text", held_out=0.0005)
    return Recipe(texts, "gpt2", Layout(eot="after"), keep_empty=True, given_splits=True)


@data_set
def fineweb_edu(folder: Path, source: str, shard_size: int = SHARD_SIZE) -> Recipe:
    """FineWeb-Edu, ten billion tokens: build-nanogpt's shards.

    The sample is streamed, and the shards are those of build-nanogpt's ``fineweb.py``.
    """
    return sharded(source or FINEWEB_EDU, "sample-10BT", "edufineweb_{split}_{index:06d}.npy", shard_size)


def sharded(source: str, config: str, name: str, shard_size: int, tokenizer: str = "gpt2") -> Recipe:
    """A data set of the datasets library, streamed, as ``.npy`` shards; the first is for validation."""
    layout = Layout(name, shard_size, eot="before")
    return Recipe(Hub(source, config, streaming=True), tokenizer, layout, keep_empty=True)


def known(name: str, folder: Path, source: str, chosen: dict[str, Any]) -> Recipe:
    """The recipe of a known data set. ``chosen``: the options that the user set.

    Raises:
        ValueError: there is no such data set, or the recipe fixes an option that was set.
    """
    if name not in KNOWN:
        hint = did_you_mean(name, KNOWN) or f"there are {', '.join(KNOWN)}"
        raise UserError(f"no data set, file or folder {name!r} to prepare: {hint}")
    open_to_choice = list(inspect.signature(KNOWN[name]).parameters)[2:]
    if fixed := [option for option in chosen if option not in open_to_choice]:
        raise UserError(f"--{fixed[0]} is fixed in the recipe of {name}: leave it out, or give files instead of {name}")
    return KNOWN[name](folder, source, **chosen)


def named_by_user(
    sources: Sequence[str] | Given,
    name: str,
    *,
    tokenizer: str = "gpt2",
    text_key: str = "text",
    shard_size: int = 0,
    val_fraction: float = 0.0,
    val_documents: int = 0,
    config: str | None = None,
    split: str = "train",
    streaming: bool = False,
) -> Recipe:
    """Files, folders and globs, or one ``hf:NAME``, or the texts of a program.

    With a ``shard_size`` the files are ``<name>_train_000001.npy`` …, an end-of-text precedes each document, and the
    first shard is for validation unless a fraction is given. Without, they are train.bin and val.bin, an end-of-text
    follows each document, and about 10 MB of the text, at most a tenth, are for validation.
    """
    from folio.data.tokenizers import named

    if shard_size and not re.fullmatch(r"[^/{}]+", name):
        raise UserError(f"name={name}: it begins the names of the shards, so it cannot have /, {{ or }}")
    paths, names = ((), ()) if isinstance(sources, Given) or sources[0].startswith("hf:") else find(sources)
    tokens = None if tokenizer == "char" else named(tokenizer)  # may have to fetch it, so a wrong name is told before
    source: Source
    if isinstance(sources, Given):
        source = sources
        fraction = val_fraction or (0.01 if source.size is None else min(0.1, _VAL_BYTES / max(1, source.size)))
    elif sources[0].startswith("hf:"):
        if len(sources) > 1:
            raise UserError(f"{sources[0]} must stand alone: prepare {sources[1]} as another data set and mix them")
        source = Hub(sources[0].removeprefix("hf:"), config, split, streaming, text_key)
        fraction = val_fraction or 0.01
    else:
        fraction = val_fraction or min(0.1, _VAL_BYTES / max(1, sum(p.stat().st_size for p in paths)))
        source = Files(paths, names, text_key, fraction, tokens is None or tokens.divisible)
    single = isinstance(source, Files) and source.single
    if isinstance(source, Files) and single and val_documents:
        raise UserError(f"{source.names[0]} is a single text: give --val_fraction, not --val_documents")
    separated = tokens is not None and tokens.eot is not None
    by_shard = shard_size and separated and not (val_fraction or val_documents or single)
    layout = Layout(
        f"{name}_{{split}}_{{index:06d}}.npy" if shard_size else "{split}.bin",
        shard_size,
        eot="before" if shard_size else "after",
        val_documents=val_documents,
        val_fraction=0.0 if by_shard or single or val_documents else fraction,
    )
    return Recipe(source, tokens or "char", layout, text_key, given_splits=single, small_fraction=fraction)


def _split_text(folder: Path, name: str, text: str, tokenizer: str | Tokenizer) -> Recipe:
    """The recipe of one text: its first nine tenths are for training, as in nanoGPT."""
    cut = int(len(text) * 0.9)
    return _of_texts(folder, {"dataset": name}, text[:cut], text[cut:], tokenizer)


def _of_texts(folder: Path, made: dict[str, Any], train: str, val: str, tokenizer: str | Tokenizer) -> Recipe:
    digest = hashlib.sha256(train.encode() + val.encode()).hexdigest()
    if not (train and val):
        raise UserError(f"{folder / 'train.bin'} or val.bin would be empty: the text is too short to split")
    texts = Texts({"sha256": digest}, {"train": [train], "val": [val]})
    return Recipe(texts, tokenizer, Layout(eot="none"), given_splits=True, made=made)


def _python_sources(root: Path) -> Iterator[str]:
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        if _NOT_SOURCES.isdisjoint(path.relative_to(root).parts) and path.is_file():
            try:
                yield read_text(path)
            except ValueError:  # not UTF-8
                continue


def _shakespeare(folder: Path, source: str) -> str:
    """The text: any UTF-8 file, or input.txt in the folder, downloaded and verified if it is missing."""
    path = Path(source) if source else folder / "input.txt"
    if not source and not path.exists():
        download(SHAKESPEARE, SHAKESPEARE_SHA256, path, "give it as --source FILE")
    try:
        return read_text(path)
    except OSError as error:
        raise FileNotFoundError(f"{path}: {error.strerror}: give a file that can be read as --source") from None
