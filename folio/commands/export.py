"""folio export: write a trained model as a folder for transformers, or a file for llama.cpp."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Literal

from folio.config.declare import ITSELF, Weights, checkpoint_option, option, out_dir_option, weights_option
from folio.errors import UserError
from folio.records.console import say


@dataclass(frozen=True)
class Options:
    """Export a model: folio export --out_dir=OUT --to FOLDER (Hugging Face), or --to FILE.gguf (llama.cpp)."""

    to: str = option(MISSING, "folder or FILE.gguf to make", path=ITSELF)
    out_dir: str = out_dir_option()
    checkpoint: str = checkpoint_option()
    weights: Weights = weights_option()
    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "type of the weights")
    push_to_hub: str = option("", "USER/NAME: also upload the folder to the Hugging Face hub")


def main(options: Options) -> None:
    from folio.checkpoints import find, gguf, hub, hugging_face

    to = Path(options.to)
    if options.push_to_hub:
        hub.check_name(options.push_to_hub)
    found = find.in_folder(Path(options.out_dir), options.checkpoint).with_weights(options.weights)
    if to.suffix == ".gguf":
        if options.push_to_hub:
            raise UserError(
                f"push_to_hub={options.push_to_hub}: only a folder can be pushed, not {to}: give a folder as --to"
            )
        gguf.export(found, to, options.dtype)
    else:
        hugging_face.export(found, to, options.dtype, options.push_to_hub)
    say(f"wrote {to}: the model of {found.path}, step {found.step}, in {options.dtype}")
    if options.push_to_hub:
        say(f"pushed to {hub.push(to, options.push_to_hub)}")
