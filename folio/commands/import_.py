"""folio import: another program's model as a run of this one, to go on with."""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from folio import __version__, checkpoint, files, pretrained
from folio.config import knob
from folio.model import AUTO


@dataclass(frozen=True)
class Options:
    """Take a model in: folio import MODEL --to OUT, which --init_from=resume --out_dir=OUT goes on with."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")] = knob(
        MISSING,
        "nanoGPT's ckpt.pt or its out_dir, a .pt of build-nanogpt or GPT-from-scratch, a Hugging Face folder or name",
    )
    to: str = knob(MISSING, "folder to make: an out_dir with one checkpoint")
    vocab_size: int | AUTO = knob(
        "auto", "token ids to grow to, such as the next multiple of 64; auto: as it is", min=1
    )


def main(options: Options) -> None:
    found = pretrained.find(options.model)
    model = found.model()
    if options.vocab_size != "auto":
        model.grow_vocab_size(options.vocab_size)
    state = {**found.state, "model": asdict(model.config)}
    with files.appearing(Path(options.to)) as out_dir:
        weights = {name: p.detach() for name, p in model.named_parameters()}
        checkpoint.save(out_dir, found.step, weights, dict(found.slots()), state)
        files.write_json(out_dir / checkpoint.CONFIG, {"run": state["run"], "folio": __version__, "asked": found.asked})
        if state["best"]:
            files.write_json(out_dir / checkpoint.BEST, state["best"])
    print(
        f"{options.to}: the model of {found.path}, step {found.step}; --init_from=resume --out_dir={options.to} goes on"
    )
