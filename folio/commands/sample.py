"""folio sample: what a trained model writes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from folio import checkpoint, tokenizer
from folio.config import System, knob, out_dir_knob
from folio.generate import draws, generate, stream
from folio.model import GPT
from folio.runtime import Runtime
from folio.tokenizer import Tokenizer

LINE = "-" * 15


@dataclass(frozen=True)
class Sampling:
    """What to continue, and how."""

    start: str = knob("\n", "prompt, or FILE:name of a file that holds it")
    num_samples: int = knob(10, "samples to draw", min=1)
    max_new_tokens: int = knob(500, "tokens in each, after the prompt", min=1)
    temperature: float = knob(0.8, "below 1 bolder, above 1 wilder; 0: the likeliest token always", min=0)
    top_k: int = knob(200, "draw from the k likeliest tokens; 0: from all", min=0)
    top_p: float = knob(1.0, "draw from the fewest tokens that reach this probability", above=0, max=1)


@dataclass(frozen=True)
class Options:
    """Sample from a trained model: folio sample [PRESET or FILE …] [--knob=value …]."""

    out_dir: str = out_dir_knob()
    init_from: str = knob("resume", "resume: the model in out_dir")
    checkpoint: str = knob("best", "best | latest | a step")
    sampling: Sampling = field(default_factory=Sampling)
    system: System = field(default_factory=System)


def main(options: Options) -> None:
    if options.init_from != "resume":
        raise ValueError(f"init_from={options.init_from}: only resume, the model in out_dir, can be sampled yet")
    chosen = checkpoint.choose(Path(options.out_dir), options.checkpoint)
    runtime = Runtime(options.system)
    try:
        model = chosen.model().to(runtime.device, runtime.dtype).eval()
        if runtime.compile:
            model.hidden = torch.compile(model.hidden, dynamic=True)  # type: ignore[method-assign]
        for text in samples(model, tokenizer.from_json(chosen.state["tokenizer"]), options):
            sys.stdout.write(tokenizer.printable(text) if sys.stdout.isatty() else text)
            sys.stdout.flush()
    finally:
        runtime.close()


def samples(model: GPT, tokens: Tokenizer, options: Options) -> Iterator[str]:
    """The text of all samples, a line of dashes after each; one alone comes token by token."""
    o = options.sampling
    prompt = _prompt(o.start)
    try:
        ids = tokens.encode(prompt)
    except ValueError as error:
        raise ValueError(f"start: {error}") from None
    if not len(ids):
        raise ValueError("start is empty: give at least one token to go on from")
    device = next(model.parameters()).device
    idx = torch.from_numpy(ids.astype("int64")).to(device).expand(o.num_samples, -1)
    uniform = draws(options.system.seed, o.num_samples, o.max_new_tokens)
    top_k, top_p = o.top_k or None, o.top_p if o.top_p < 1 else None
    if o.num_samples == 1:
        new = stream(model, idx, o.max_new_tokens, o.temperature, top_k, top_p, uniform, tokens.size)
        yield prompt
        yield from tokenizer.stream(tokens, (int(column) for column in new))
        yield f"\n{LINE}\n"
        return
    found = generate(
        model,
        idx,
        o.max_new_tokens,
        temperature=o.temperature,
        top_k=top_k,
        top_p=top_p,
        uniform=uniform,
        vocab_size=tokens.size,
    )
    for row in found.tolist():
        yield f"{tokenizer.decode(tokens, row)}\n{LINE}\n"


def _prompt(start: str) -> str:
    if not start.startswith("FILE:"):
        return start
    path = Path(start.removeprefix("FILE:"))
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise FileNotFoundError(f"start={start}: {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text") from None
