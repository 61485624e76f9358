"""folio sample: what a trained model writes."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from folio import checkpoint, tokenizer
from folio.config import Sampling, System, knob, out_dir_knob
from folio.generate import samples
from folio.runtime import Runtime, compiled


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
            model.hidden = compiled(model.hidden, dynamic=True)  # type: ignore[method-assign]
        for text in samples(
            model, tokenizer.from_json(chosen.state["tokenizer"]), options.sampling, options.system.seed
        ):
            sys.stdout.write(tokenizer.printable(text) if sys.stdout.isatty() else text)
            sys.stdout.flush()
    finally:
        runtime.close()
