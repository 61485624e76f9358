"""folio import: make a run that can be resumed from a model of another program."""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from folio import files
from folio.config.declare import ITSELF, option
from folio.model.config import AUTO
from folio.records import run_folder
from folio.records.console import say

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Options:
    """Import a model: folio import MODEL --to OUT; --init_from=resume --out_dir=OUT resumes it."""

    model: str = option(
        MISSING,
        "a .pt file, an out_dir of nanoGPT, a Hugging Face folder or name",
        details="A .pt file is one of nanoGPT, build-nanogpt or GPT-from-scratch.",
        path=ITSELF,
        positional="MODEL",
    )
    to: str = option(MISSING, "folder to make, an out_dir with one checkpoint", path=ITSELF)
    vocab_size: int | AUTO = option(
        "auto", "size to grow the vocabulary to, such as a multiple of 64; auto: keep it", min=1
    )


def main(options: Options) -> None:
    from folio.checkpoints import checkpoint, find
    from folio.machine.shares import AVERAGE

    found = find.by_name(options.model)
    model = found.model()
    if options.vocab_size != "auto":
        model.grow_vocab_size(options.vocab_size)
    state = {**found.state, "model": asdict(model.config)}
    if model.config != found.config():
        state |= {"best": None, "train_loss": None, "val_loss": None}  # these were measured without the new ids
    with files.written_atomically(Path(options.to)) as out_dir:
        weights = {name: p.detach() for name, p in model.named_parameters()}
        slots = {}
        for name, slot in found.slots():
            weight, _, kind = name.rpartition("/")
            slots[name] = _with_new_rows(slot, len(weights[weight]), kind == AVERAGE) if slot.dim() > 1 else slot
        checkpoint.save(out_dir, found.step, weights, slots, state)
        asked = found.asked | ({"vocab_size": model.config.vocab_size} if "vocab_size" in found.asked else {})
        run_folder.write_config(out_dir, state["run"], asked)
        if state["best"]:
            files.write_sealed(out_dir / run_folder.BEST, state["best"])
    if state["tokenizer"] is None:
        say(
            f"nothing says what the model's {model.config.vocab_size} token ids mean: it can train on token files, but "
            "cannot generate text"
        )
    say(
        f"wrote {options.to}: the model of {found.path}, step {found.step}; "
        f"folio train --init_from=resume --out_dir={options.to} resumes it"
    )


def _with_new_rows(slot: Tensor, rows: int, averaged: bool) -> Tensor:
    """An optimizer's tensor with so many rows: averages get the mean of the others, as new weights do, others zeros."""
    import torch

    mean = slot.mean(0, keepdim=True) if averaged else torch.zeros_like(slot[:1])
    return torch.cat([slot, mean.expand(rows - len(slot), *slot.shape[1:])])
