"""folio sample: generate text from a model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from folio.config.options import Sampling, Source, System
from folio.errors import UserError
from folio.model.config import GPTConfig
from folio.records.console import put

if TYPE_CHECKING:
    from folio.data.tokenizers import Tokenizer
    from folio.machine.runtime import Runtime
    from folio.model.gpt import GPT


@dataclass(frozen=True)
class Options:
    """Sample from a trained model: folio sample [PRESET or FILE …] [--option=value …]."""

    source: Source = field(default_factory=Source)
    sampling: Sampling = field(default_factory=Sampling)
    system: System = field(default_factory=System, metadata={"unused": ("autotune",)})
    sources: dict[str, str] = field(default_factory=dict)  # option → the file or call that set it


def main(options: Options) -> int:
    from folio.generation.sampling import samples

    if options.sampling.interactive:
        return _converse(options)
    with _opened(options) as (model, vocabulary):
        for text in samples(model, vocabulary, options.sampling, options.system.seed):
            put(text)
    return 0


def _converse(options: Options) -> int:
    """The exit code of a session; not 0 if a script sent a prompt that the model cannot encode."""
    from folio.generation.interactive import converse

    given, how = options.sources, options.sampling
    if "num_samples" not in given:
        options = replace(options, sampling=replace(how, num_samples=1))
    with _opened(options) as (model, vocabulary):
        start = how.start if "start" in given else None
        refused = converse(model, vocabulary, options.sampling, options.system.seed, start)
    return 2 if refused and not sys.stdin.isatty() else 0


def texts(options: Options) -> list[str]:
    """The generated texts, each with its prompt."""
    from folio.generation.sampling import continuations

    if options.sampling.interactive:
        raise UserError("interactive=True works only in the command folio sample: call this once for each prompt")
    with _opened(options) as (model, vocabulary):
        return continuations(model, vocabulary, options.sampling, options.system.seed)


@contextmanager
def _opened(options: Options) -> Iterator[tuple[GPT, Tokenizer]]:
    import torch

    from folio.checkpoints import find
    from folio.machine import shortage
    from folio.machine.choices import resolve
    from folio.machine.runtime import Runtime

    chosen = find.from_source(options.source)
    vocabulary = chosen.tokenizer()
    runtime = Runtime(resolve(options.system))
    try:
        with shortage.explained("sampling", lambda: _memory_advice(chosen.config(), options.sampling, runtime)):
            model = runtime.for_sampling(chosen.model())
            with torch.inference_mode():
                yield model, vocabulary
    except FloatingPointError as error:
        raise FloatingPointError(f"{chosen.path}: {error}{runtime.overflow_remedy()}") from None
    finally:
        runtime.close()


def _memory_advice(shape: GPTConfig, how: Sampling, runtime: Runtime) -> str:
    from folio.machine import shortage

    size = 4 if runtime.device.type == "cpu" else runtime.dtype.itemsize  # a CPU's cache may be in float32
    cached = 2 * how.num_samples * shape.n_layer * shape.n_embd * size
    return (
        f"{how.num_samples} samples keep up to {cached * shape.block_size / 1e9:,.2f} GB of keys and values, of the "
        f"{shortage.room(runtime.device) / 1e9:,.2f} GB on {runtime.device}: lower --num_samples or --max_new_tokens"
    )
