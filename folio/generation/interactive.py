"""A session: the model continues one prompt of the user after another, token by token."""

from __future__ import annotations

import sys

from folio.config.options import Sampling
from folio.data.tokenizers import Tokenizer
from folio.errors import UserError
from folio.generation.sampling import LINE, encode_prompt, streamed
from folio.model.gpt import GPT
from folio.records.console import put, say, show
from folio.records.prompts import Prompts

LEAVE = "/quit"
_INTRODUCTION = f"Type the beginning of a text. Ctrl-C stops a text; Ctrl-D or {LEAVE} ends the session."


def converse(model: GPT, tokenizer: Tokenizer, o: Sampling, seed: int, start: str | None = None) -> int:
    """Continues each line that the user types; returns the number of lines that the model cannot encode.

    Prompt n, counted from 0, is continued as sample n of ``folio sample``; each prompt uses ``num_samples`` of them. So
    the same prompts give the same texts, whatever Ctrl-C cut off. ``start`` is the first prompt.

    Raises:
        ValueError, FileNotFoundError: ``start`` cannot be encoded, as ``encode_prompt`` says.
    """
    prompts, refused, first = Prompts(), 0, 0
    encoded = None if start is None else encode_prompt("start", start, tokenizer, model.config)
    with prompts.opened():
        if prompts.on_terminal:
            show(_INTRODUCTION)
        while True:
            if encoded:
                for number in range(first, first + o.num_samples):
                    if not prompts.interrupted:
                        _print(model, tokenizer, encoded, o, seed, number, prompts)
                first += o.num_samples
            encoded, line = None, prompts.read()
            if line is None or line.strip() == LEAVE:
                return refused
            if line:
                try:
                    encoded = encode_prompt("prompt", line, tokenizer, model.config)
                except (UserError, OSError) as error:
                    say(str(error), sys.stderr)
                    refused += 1


def _print(
    model: GPT,
    tokenizer: Tokenizer,
    encoded: tuple[str, list[int]],
    o: Sampling,
    seed: int,
    number: int,
    prompts: Prompts,
) -> None:
    """Prints a sample, until the user interrupts it."""
    for text in streamed(model, tokenizer, encoded, o, seed, number):
        put(text)
        if prompts.interrupted:
            break
    put(f"\n{LINE}\n")
