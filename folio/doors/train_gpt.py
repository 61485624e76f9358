"""scripts/train_gpt.py: the flags of GPT-from-scratch's script, for ``folio train``."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Literal

from folio.config.declare import ITSELF, option
from folio.config.options import Sampling, TrainConfig
from folio.config.table import override
from folio.errors import UserError
from folio.model.config import PADDED_GPT2
from folio.training.signals import EXIT_CODES, exit_on_signal

NAMES = {  # flag → option of folio train with another name
    "data_root": "data_dir",
    "n_batches": "batch_size",
    "n_tokens": "window",
    "emb_dim": "n_embd",
    "context_length": "block_size",
    "drop_rate": "dropout",
    "n_layers": "n_layer",
    "n_heads": "n_head",
    "torch_matmul_precision": "matmul_precision",
    "log_dir": "out_dir",
    "max_lr": "learning_rate",
}
ALWAYS = {  # constants in the code of that script, but not its bfloat16, which is slow where the hardware lacks it
    "bias": True,  # except where qkv_bias applies
    "activation": "gelu_tanh",
    "tie_weights": False,
    "sampling": "sequential",
    "eval_interval": 250,
    "eval_iters": 20,
    "sample_interval": 250,
    "sample_prompt": "Once upon a time",
    "sample_count": 1,
    "sample_tokens": 4 + 25,
    "checkpoint_interval": 5000,
    "keep_checkpoints": 4,
    "log_txt": "gpt-from-scratch",
}
BEFORE_AND_AFTER = Sampling("On a clear day", num_samples=1, max_new_tokens=25, temperature=1.0, top_k=50)


@dataclass(frozen=True)
class Options:
    """Train GPT-from-scratch's model, with the flags of its script; folio train --init_from=resume resumes it."""

    data_root: str = option("data/edu_fineweb10B", "folder of the shards", path=ITSELF)
    n_batches: int = option(16, "rows in a micro batch", min=1)
    n_tokens: int = option(1024, "tokens in a row, at most context_length", min=1)
    vocab_size: int = option(PADDED_GPT2, "size of the vocabulary", min=1)
    emb_dim: int = option(768, "width", min=1)
    context_length: int = option(1024, "positions of the model", min=1)
    drop_rate: float = option(0.0, "probability of dropout", min=0, below=1)
    n_layers: int = option(12, "number of blocks", min=1)
    n_heads: int = option(12, "attention heads in a block", min=1)
    qkv_bias: bool = option(False, "biases of queries, keys and values")
    monitor: bool = option(True, "losses, measurements and samples on the console")
    torch_matmul_precision: Literal["highest", "high", "medium"] = option("high", "precision of float32 products")
    log_dir: str = option("log", "folder of the run", path=ITSELF)
    n_epochs: int = option(1, "epochs of max_iters steps; learning rate and data restart", min=1)
    warmup_iters: int = option(715, "steps of linear warm-up", min=0)
    max_iters: int = option(19073, "steps (updates) of an epoch", min=1)
    total_batch_size: int = option(2**19, "tokens a step, over all processes together", min=1)
    metrics: Literal["Hellaswag", "none"] = option("Hellaswag", "every 250 steps, or never")
    max_lr: float = option(6e-4, "highest learning rate", min=0)
    min_lr: float = option(6e-5, "lowest learning rate", min=0)


def configured(options: Options) -> TrainConfig:
    """These flags as options of folio train."""
    o = options
    named = {f.name: getattr(o, f.name) for f in fields(o) if f.name not in ("n_epochs", "metrics")}
    return override(
        TrainConfig(),
        {NAMES.get(name, name): value for name, value in named.items()}
        | ALWAYS
        | {"max_iters": o.n_epochs * o.max_iters, "lr_decay_iters": o.max_iters, "restart_interval": o.max_iters}
        | {"hellaswag_interval": 250 if o.metrics == "Hellaswag" else 0},
    )


@exit_on_signal()
def main(options: Options) -> int:
    from folio.data.folders import find
    from folio.training.showcase import show

    config = configured(options)
    try:
        find(config.data)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"--data_root {options.data_root}: no token files are there; "
            "python scripts/tokenize_documents_parallel.py makes them in data/edu_fineweb10B"
        ) from None
    try:
        return EXIT_CODES.get(show(config, BEFORE_AND_AFTER).stop, 0)
    except FloatingPointError as error:
        raise FloatingPointError(_in_flags(str(error))) from None
    except (UserError, OSError) as error:
        if isinstance(error, OSError) and error.strerror:
            raise
        raise UserError(_in_flags(str(error))) from None


def _in_flags(line: str) -> str:
    """A message about options of folio train, with their names as flags of this script."""
    flags = {ours: theirs for theirs, ours in NAMES.items()}
    return re.sub(rf"(?<![\w/.])({'|'.join(flags)})(?=[ =]|$)", lambda name: flags[name[0]], line)
