"""The options that ``--depth`` sets: a model's shape, its recipe, its batch, its rates and its steps.

The option and most of its rules are nanochat's (Karpathy, 2026, scripts/base_train.py); docs/depth.md has the source of
each.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from typing import Any, NamedTuple

from folio.errors import UserError

SOURCE = "--depth"  # the source of a value that depth set
WIDTH = 64  # of a head, and of the model for each layer
RATIO = 12  # training tokens for each parameter
PASSES = 4  # over the training tokens of the data set, at most
AT_12 = 1.32e9, 2**19  # training tokens and tokens of a step at depth 12, with 32,768 token ids
FEW = 100  # steps; in fewer, weight decay would undo the updates
MICRO, LOGITS = 2**14, 2**28  # tokens of a micro step, and their logits: about so many at most
WARM_UP, ADAM_WARM_UP = 40, 2000  # steps at most: nanochat's with Muon, nanoGPT's with AdamW
RATE, ADAM_RATE = 0.12, 0.11  # learning rates · √n_embd
EVALUATED, SHARE = 2**16, 16  # tokens of each split in an evaluation: at most, and training tokens for each
RECIPE = {
    "position": "rope",
    "norm": "unweighted",
    "activation": "relu2",
    "qk_norm": True,
    "tie_weights": False,
    "zero_init": True,
    "bias": False,
    "qkv_bias": "auto",
    "dropout": 0.0,
    "optimizer": "muon",
    "beta1": 0.9,
    "beta2": 0.99,
    "decay_lr": True,
    "schedule": "wsd",
    "decay_share": 0.7,
    "min_lr": 0.0,
}


class Rule(NamedTuple):
    """A value, and the rule that gives it; the values of the recipe have none."""

    value: Any
    why: str = ""


def rules(
    depth: int, given: Mapping[str, Any], row: int, vocab_size: int, tokens: int | None = None
) -> dict[str, Rule]:
    """The options that depth sets, by name.

    Args:
        depth: The number of layers.
        given: Values of options that were given: they win, and other options follow from them. Its ``max_flops``, if
            not 0, limits the training tokens.
        row: Tokens of a row.
        vocab_size: Token ids.
        tokens: Training tokens of the data set, if they are known.

    Raises:
        UserError: the data set is known, and ``max_flops`` allows not one step.
    """
    found: dict[str, Rule] = {}

    def rule(name: str, value: Any, why: str = "") -> Any:
        found[name] = Rule(value, why)
        return given.get(name, value)

    layers = rule("n_layer", depth, "depth")
    width = rule("n_embd", WIDTH * depth, f"{WIDTH} · depth")
    heads = [n for n in range(1, max(1, width // WIDTH) + 1) if width % n == 0]
    rule("n_head", heads[-1], f"heads of {WIDTH}")
    for name, value in RECIPE.items():
        rule(name, value)
    muon = given.get("optimizer", "muon") == "muon"
    rule("momentum", 0.9 if depth < 12 else 0.95, "0.9 below depth 12, else 0.95")
    parameters = 12 * layers * width**2 + vocab_size * width  # of the blocks' matrices and the head
    budget, why = RATIO * parameters, f"{RATIO} tokens for each of {parameters:,} parameters"
    if tokens and budget > PASSES * tokens:
        budget, why = PASSES * tokens, f"{PASSES} passes over {tokens:,} tokens"
    per_token = 6 * parameters + 12 * layers * width * row  # as machine.flops counts them
    limit = given.get("max_flops", 0) / per_token
    if limited := 0 < limit < budget:
        budget, why = limit, f"at most {given['max_flops']:g} FLOP"

    usual = row * _power_of_two(_batch(budget) / row)
    most = max(1, (given.get("total_batch_size") or usual) // row)
    fitting = min(MICRO, LOGITS / vocab_size)
    size = rule("batch_size", min(most, _power_of_two(fitting / row)), f"about {fitting:,.0f} tokens in a micro step")
    if not (in_step := given.get("total_batch_size")):
        micro_steps = _power_of_two(usual / (size * row))
        in_step = size * row * rule("gradient_accumulation_steps", micro_steps, f"{usual:,} tokens in a step")
    if limited and budget < in_step and tokens and "max_iters" not in given:
        raise UserError(
            f"max_flops={given['max_flops']:g} is less than one step takes: {per_token * in_step:.3g} for "
            f"{in_step:,} tokens: raise --max_flops, or lower --depth"
        )
    steps = rule("max_iters", max(1, int(budget / in_step) if limited else round(budget / in_step)), why)
    rule("lr_decay_iters", steps, "max_iters")
    longest = WARM_UP if muon else ADAM_WARM_UP
    rule("warmup_iters", min(longest, steps // 64), f"1/64 of max_iters, at most {longest:,}")

    reference = min(usual, AT_12[1])
    scale = math.sqrt(in_step / reference / width)
    how = "/ √n_embd" + (f" · √({in_step:,} / {reference:,} tokens in a step)" if in_step != reference else "")
    rate = rule("learning_rate", _rounded(RATE * scale), f"{RATE} {how}")
    if "learning_rate" in given:
        scale = rate / RATE  # the two rates keep their ratio
    rule("adam_learning_rate", _rounded(ADAM_RATE * scale) if rate and muon else "auto", f"{ADAM_RATE} {how}")
    decay = _rounded(2 / (rate * max(steps, FEW))) if rate else 0.0
    rule("weight_decay", decay, f"2 / (learning_rate · max_iters), at most that of {FEW} steps")
    rule("eval_interval", max(1, math.ceil(steps / 10)), "ten evaluations")
    evaluated = min(EVALUATED, steps * in_step // SHARE)
    rule("eval_iters", max(1, evaluated // (size * row)), f"about {evaluated:,} tokens of each split")
    return found


def _batch(tokens: float) -> float:
    """Tokens of a step for a run of so many tokens."""
    most, size = AT_12
    return size * (tokens / most) ** (0.383 if tokens > most else 0.9)


def summary(depth: int, found: Mapping[str, Rule], values: Mapping[str, Any]) -> str:
    """One line about a run that depth sized; ``values`` are all its options."""
    v = values
    why = f" ({found['max_iters'].why})" if "max_iters" in found else ""
    return (
        f"depth={depth}: n_layer={v['n_layer']}, n_head={v['n_head']}, n_embd={v['n_embd']}, learning_rate="
        f"{v['learning_rate']:g}, max_iters={v['max_iters']}{why}; folio plan lists all that it sets"
    )


def table(depth: int, found: Mapping[str, Rule]) -> list[str]:
    """Lines about the values that depth set."""
    shown = {name: f"{name} = {value}" for name, (value, _) in found.items()}
    width = max(map(len, shown.values()), default=0)
    recipe = ", ".join(shown[name] for name, (_, why) in found.items() if not why)
    return [
        f"depth={depth} sets the options below; each can be given instead (docs/depth.md)",
        *(f"  {shown[name]:{width}}  {why}" for name, (_, why) in found.items() if why),
        *textwrap.wrap(recipe, 100, initial_indent="  ", subsequent_indent="  "),
    ]


def _power_of_two(x: float) -> int:
    """The power of two nearest to x, at least 1."""
    return int(2 ** max(0, round(math.log2(x))))


def _rounded(x: float) -> float:
    """Three digits."""
    return float(f"{x:.3g}")
