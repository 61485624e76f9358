"""folio tokenizer: train a tokenizer on text."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from folio.config.declare import ITSELF, option
from folio.errors import UserError
from folio.records.console import say

if TYPE_CHECKING:
    from folio.preparation.text_files import Files

_SURROGATE = re.compile("[\ud800-\udfff]")
LEAST = 257  # the 256 bytes and the end-of-text


@dataclass(frozen=True)
class Options:
    """Train a byte-level BPE on text: folio tokenizer train PATH … --vocab_size=8192 --out tok.json."""

    action: Literal["train"] = option(MISSING, "train a tokenizer on text", positional="train")
    text: tuple[str, ...] = option(
        (), "files, folders and globs, as for folio prepare", path=ITSELF, positional="TEXT …"
    )
    vocab_size: int = option(8192, "ids, including the 256 bytes and the end-of-text", min=LEAST)
    out: str = option("tokenizer.json", "file to write, for --tokenizer of folio prepare", path=ITSELF)
    text_key: str = option("text", "key or column that holds the text")
    on_error: Literal["stop", "skip"] = option("stop", "skip: leave out documents that cannot be read")


def main(options: Options) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from folio.data.tokenizers import END_OF_TEXT
    from folio.files import write
    from folio.preparation.finding import find
    from folio.preparation.text_files import Files

    if not options.text:
        raise UserError("no text to train on: name files, folders or globs")
    if Path(options.out).suffix != ".json":
        raise UserError(f"out={options.out}: must end in .json")
    if Path(options.out).is_dir():
        raise UserError(f"out={options.out}: is a directory")
    source = Files(*find(options.text), options.text_key)
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=options.vocab_size,
        special_tokens=[END_OF_TEXT[0]],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stdout.isatty(),
    )
    fast.train_from_iterator(_texts(source, options), trainer)
    if (size := fast.get_vocab_size()) < options.vocab_size:
        say(f"the text yields only {size:,} tokens, not {options.vocab_size:,}")
    out = Path(options.out)
    write(out, fast.to_str(pretty=True).encode())  # fast.save raises no OSError
    say(f"wrote {out}: {size:,} tokens")


def _texts(source: Files, options: Options) -> Iterator[str]:
    from folio.preparation.documents import Flaw, WorkerSettings, documents, refusal

    work = WorkerSettings({}, "none", options.text_key)
    for block in source.blocks():
        for span in block.spans:
            for i, text in documents(span, work):
                if isinstance(text, str) and not text.isascii() and _SURROGATE.search(text):
                    text = Flaw("half of a surrogate pair")
                if isinstance(text, str):
                    yield text
                elif options.on_error == "stop":
                    raise refusal(span, i, text)
