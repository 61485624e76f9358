"""folio sample: what a trained model writes."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from folio import pretrained, tokenizer
from folio.config import Sampling, System, knob, out_dir_knob
from folio.generate import samples
from folio.runtime import Runtime, compiled


@dataclass(frozen=True)
class Options:
    """Sample from a trained model: folio sample [PRESET or FILE …] [--knob=value …]."""

    out_dir: str = out_dir_knob()
    init_from: str = knob(
        "resume",
        "resume (the model in out_dir) | gpt2 … gpt2-xl | another out_dir, .pt file, Hugging Face folder or name",
    )
    checkpoint: str = knob("best", "best | latest | a step")
    sampling: Sampling = field(default_factory=Sampling)
    system: System = field(default_factory=System)


def main(options: Options) -> None:
    if options.init_from == "resume":
        chosen = pretrained.in_folder(Path(options.out_dir), options.checkpoint)
    else:
        chosen = pretrained.find(options.init_from, options.checkpoint)
    vocabulary = chosen.tokenizer()
    runtime = Runtime(options.system)
    try:
        model = chosen.model().to(runtime.device, runtime.dtype).eval()
        if runtime.compile:
            model.hidden = compiled(model.hidden, dynamic=True)  # type: ignore[method-assign]
        for text in samples(model, vocabulary, options.sampling, options.system.seed):
            sys.stdout.write(tokenizer.printable(text) if sys.stdout.isatty() else text)
            sys.stdout.flush()
    finally:
        runtime.close()
