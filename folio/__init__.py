"""Folio trains GPT-2-class language models from scratch.

>>> import folio
>>> folio.prepare("shakespeare_char")
>>> run = folio.train("shakespeare_char", out_dir="out", max_iters=500, device="cpu")
>>> folio.evaluate(out_dir="out")["loss"]
>>> print(*folio.generate("ROMEO:", out_dir="out", num_samples=2))

Options have the names that ``folio COMMAND --help`` lists. A mistake in a file or an option raises a ``ValueError``
or ``FileNotFoundError`` with one line. ``GPT`` is the model, a ``torch.nn.Module``; ``GPTConfig`` its shape.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from folio.api import Callback as Callback
    from folio.api import Loaded as Loaded
    from folio.api import Picture as Picture
    from folio.api import Run as Run
    from folio.api import Tokenizer as Tokenizer
    from folio.api import build as build
    from folio.api import evaluate as evaluate
    from folio.api import fit as fit
    from folio.api import generate as generate
    from folio.api import load as load
    from folio.api import plot as plot
    from folio.api import prepare as prepare
    from folio.api import report as report
    from folio.api import train as train
    from folio.config.options import TrainConfig as TrainConfig
    from folio.model.config import GPTConfig as GPTConfig
    from folio.model.gpt import GPT as GPT

if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    # torch's threads wait for work in a loop. On a machine with other work they take each other's cores then, so the
    # loop gets an end. OpenMP reads this when torch is imported.
    os.environ["GOMP_SPINCOUNT"] = "10000"

__version__ = "0.1.0"

__all__ = [
    "GPT",
    "Callback",
    "GPTConfig",
    "Loaded",
    "Picture",
    "Run",
    "Tokenizer",
    "TrainConfig",
    "build",
    "evaluate",
    "fit",
    "generate",
    "load",
    "plot",
    "prepare",
    "report",
    "train",
]


def __getattr__(name: str) -> Any:
    """Imports a public name at its first use, since torch takes seconds to import."""
    if name not in __all__:
        raise AttributeError(f"module 'folio' has no attribute {name!r}")
    module = {"GPT": "model.gpt", "GPTConfig": "model.config", "TrainConfig": "config.options"}.get(name, "api")
    return getattr(importlib.import_module(f"folio.{module}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
