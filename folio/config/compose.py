"""Layers of values become one frozen object, typed and checked: defaults < files < checkpoint < command line.

The options that ``depth`` sets override the files before it; files after it and the command line override them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from folio.config import depth
from folio.config.declare import AFTER_FILE, EACH, ITSELF
from folio.config.options import MICRO_STEPS, Data, TrainConfig
from folio.config.table import defaults, flat, options_with, override, table
from folio.config.values import COMMAND_LINE, check_bounds, convert
from folio.errors import UserError
from folio.model.config import PADDED_GPT2, GPTConfig

T = TypeVar("T")
EITHER = {"total_batch_size", "gradient_accumulation_steps"}  # two ways to set the size of a step
BY_DEPTH = EITHER | depth.rules(1, {}, 1, 1).keys()  # options that depth sets or replaces
_NEEDS = {  # options without effect unless another one has this value
    "momentum": ("optimizer", "muon"),
    "decay_share": ("schedule", "wsd"),
    "schedule": ("decay_lr", True),
}


class Layer(NamedTuple):
    """Values by flat name, and the file or call that they are from.

    A layer that ``supersedes`` and sets one option of ``EITHER`` drops the other, if an earlier layer set that.
    """

    source: str
    values: Mapping[str, Any]
    supersedes: bool = False


def compose(base: T, layers: Sequence[Layer]) -> T:
    """The base with the values of each layer over those before.

    Raises:
        UserError: a value is out of its bounds, or two do not go together.
    """
    values: dict[str, Any] = {}
    layers = _without_replaced(layers)
    for layer in layers:
        values |= layer.values
    config = override(base, values)
    if hasattr(config, "sources"):
        sources = dict(config.sources)
        for layer in layers:
            both = EITHER if layer.supersedes and EITHER & layer.values.keys() else set()
            sources = {name: by for name, by in sources.items() if name not in both | layer.values.keys()}
            sources |= dict.fromkeys(layer.values, layer.source)  # in the order in which they were given
        config = replace(config, sources=sources)  # type: ignore[type-var]
    config = expand_home(config)
    _check_all_bounds(config)  # depth computes with the values
    config = with_depth(config)[0]
    check(config)
    return config


def typed(caller: str, base: T, given: Mapping[str, Any]) -> T:
    """The base with the keywords of a call, typed and checked as on the command line.

    Raises:
        UserError: as ``convert`` and ``compose``; names the ``caller``.
    """
    return compose(base, [Layer(COMMAND_LINE, keywords(caller, type(base), given), supersedes=True)])


def keywords(caller: str, options: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of a call, converted to the types of their options."""
    return {name: convert(caller, name, _plain(value), options) for name, value in given.items()}


def _plain(value: Any) -> Any:
    """A path as text, and a scalar of NumPy or torch as Python's number."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.item() if getattr(value, "ndim", None) == 0 else value


def _without_replaced(layers: Sequence[Layer]) -> Sequence[Layer]:
    """The layers without the values in files that a later ``depth`` sets."""
    places = [i for i, layer in enumerate(layers) if "depth" in layer.values]
    if not places or not layers[places[-1]].values["depth"]:
        return layers

    def kept(layer: Layer) -> Layer:
        return layer._replace(values={name: value for name, value in layer.values.items() if name not in BY_DEPTH})

    before, after = layers[: places[-1]], layers[places[-1] :]
    return [*(layer if layer.source == COMMAND_LINE else kept(layer) for layer in before), *after]


def with_depth(config: T, vocab_size: int = PADDED_GPT2, tokens: int | None = None) -> tuple[T, dict[str, depth.Rule]]:
    """The config with the options that ``depth`` sets and that were not given otherwise, and their rules.

    ``vocab_size`` stands for auto; ``tokens`` is the number of training tokens, which limits the steps.
    """
    values = flat(config)
    if not values.get("depth"):
        return config, {}
    sources, usual = config.sources, defaults(type(config))  # type: ignore[attr-defined]
    given = {
        name: value
        for name, value in values.items()
        if (sources[name] != depth.SOURCE if name in sources else value != usual[name])
    }
    if [name for name in sources if name in EITHER and sources[name] != depth.SOURCE][-1:] == [
        "gradient_accumulation_steps"
    ]:
        given.pop("total_batch_size", None)  # the later of the two counts
    row = values["window"] or values["block_size"]
    size = vocab_size if values["vocab_size"] == "auto" else values["vocab_size"]
    found = depth.rules(values["depth"], given, row, size, tokens)
    found = {name: rule for name, rule in found.items() if name in values and name not in given}
    config = override(config, {name: rule.value for name, rule in found.items()})
    sources = dict.fromkeys(found, depth.SOURCE) | {name: by for name, by in sources.items() if by != depth.SOURCE}
    return replace(config, sources=sources), found  # type: ignore[type-var]


def starting_from(options: type[T], layers: Sequence[Layer]) -> T:
    """A command's options at their defaults; the layers give those that have no default."""
    values = {name: value for layer in layers for name, value in layer.values.items()}
    return options(**{name: value for name, value in values.items() if name not in defaults(options)})


def over_files(config: TrainConfig, stored: Mapping[str, Any]) -> tuple[TrainConfig, list[str]]:
    """Applies the options ``stored`` in a checkpoint: they win over files, and the command line wins over them.

    Returns:
        The config, and a line for each value of a file that differs.
    """
    mine, values, lines = flat(config), {}, []
    own = options_with(TrainConfig, role="call")
    for name, value in stored.items():
        source = config.sources.get(name)
        if name in own or name not in mine or source == COMMAND_LINE:
            continue
        if source not in (None, depth.SOURCE) and mine[name] != value:
            lines.append(f"{name}={value} from the checkpoint, not {mine[name]} from {source}")
        values[name] = value
    return override(config, values), lines


def check(config: Any, merged: bool = False) -> None:
    """Checks bounds and cross-field rules. Raises UserError, which names the option.

    A run that may resume gets more options from its checkpoint: until they are ``merged``, only bounds are checked.
    """
    _check_all_bounds(config)
    values = flat(config)
    if isinstance(config, TrainConfig) and config.output.init_from in ("resume", "auto") and not merged:
        return
    if values.get("depth") and values.get("init_from") not in (None, "scratch", "resume", "auto"):
        raise UserError(
            f"depth={values['depth']} sizes a new model, but init_from={values['init_from']} loads one: set --depth=0"
        )
    if isinstance(model := getattr(config, "model", None), GPTConfig):
        model.check()
    if values.get("min_lr", 0) > values.get("learning_rate", math.inf) and values["decay_lr"]:
        raise UserError(
            f"min_lr={values['min_lr']:g} is above learning_rate={values['learning_rate']:g}: "
            "lower --min_lr, or set --decay_lr=False"
        )
    sources = getattr(config, "sources", {})
    if values.get("adam_learning_rate", "auto") != "auto":
        _check_adam_rate(values, sources)
    if sources.get("max_flops") == COMMAND_LINE and values["max_flops"] and not values["depth"]:
        raise UserError(
            f"max_flops={values['max_flops']:g} has no effect with depth=0: set --depth, or remove --max_flops"
        )
    for name, (other, value) in _NEEDS.items() if isinstance(config, TrainConfig) else ():
        if sources.get(name) == COMMAND_LINE and values[other] != value:  # a preset's may well have no effect
            raise UserError(
                f"{name}={values[name]} has no effect with {other}={values[other]}: set --{other}={value}, or remove "
                f"--{name}"
            )
    asked = {sources.get(name) for name in EITHER}
    if len(asked) == 1 and asked != {None} and values["total_batch_size"]:
        raise UserError(
            f"total_batch_size={values['total_batch_size']} and gradient_accumulation_steps="
            f"{values['gradient_accumulation_steps']} exclude each other: give one of them"
        )
    if values.get("check_replicas_every") and values["parallel"] == "fsdp":
        raise UserError(
            f"check_replicas_every={values['check_replicas_every']}: parallel=fsdp keeps one copy of each weight, so "
            "there is nothing to compare: set --check_replicas_every=0, or use --parallel=hsdp"
        )


def _check_adam_rate(values: Mapping[str, Any], sources: Mapping[str, str]) -> None:
    """Raises UserError if ``adam_learning_rate`` would have no effect."""
    rate, muon = values["adam_learning_rate"], values["optimizer"] == "muon"
    if not muon and sources.get("adam_learning_rate") in (None, COMMAND_LINE):
        raise UserError(
            f"adam_learning_rate={rate:g} is for optimizer=muon only: set --adam_learning_rate=auto and --learning_rate"
        )
    if muon and not values["learning_rate"]:
        raise UserError(
            f"adam_learning_rate={rate:g} is scaled by the schedule of learning_rate, which is 0: raise --learning_rate"
        )


def _check_all_bounds(config: Any) -> None:
    """Raises UserError, which names an option that is out of its bounds."""
    known = table(type(config))
    for name, value in flat(config).items():
        check_bounds(name, value, known[name].metadata)


def accumulated(data: Data, row: int, sources: Mapping[str, str]) -> Data:
    """The data options with the micro steps that ``total_batch_size`` needs, for rows of ``row`` tokens.

    Of ``total_batch_size`` and ``gradient_accumulation_steps``, the one given last wins; both win over a checkpoint's.

    Raises:
        UserError: it is no multiple of a micro batch; names a size that fits.
    """
    total, micro = data.total_batch_size, data.batch_size * row
    given = [name for name in sources if name in EITHER]
    if given[-1:] == ["gradient_accumulation_steps"]:
        return replace(data, total_batch_size=0)
    if not total:
        return data
    if total // micro > MICRO_STEPS:
        raise UserError(
            f"total_batch_size={total} is {total // micro:,} micro steps of {micro} tokens, above {MICRO_STEPS:,}: "
            "lower it, or raise --batch_size"
        )
    if total % micro:
        sizes = [size for size in range(1, data.batch_size) if total % (size * row) == 0]
        raise UserError(
            f"total_batch_size={total} is no multiple of batch_size × tokens of a row = {data.batch_size} × {row} = "
            f"{micro}: --total_batch_size={max(1, round(total / micro)) * micro} fits"
            + (f", or --batch_size={sizes[-1]}" if sizes else "")
        )
    return replace(data, gradient_accumulation_steps=total // micro)


def model_config(path: Path, values: Mapping[str, Any]) -> GPTConfig:
    """The shape of a model that a file describes.

    Raises:
        UserError: a field is unknown, or its value is not possible; names the file.
    """
    if odd := values.keys() - {f.name for f in fields(GPTConfig)}:
        raise UserError(f"{path}: a GPT-2-class model has no option {min(map(str, odd))!r}")
    config = GPTConfig(
        **{f.name: checked_value(path, f.name, values.get(f.name, f.default)) for f in fields(GPTConfig)}
    )
    if config.vocab_size == "auto":
        raise UserError(f"{path}: vocab_size = {values.get('vocab_size', 'auto')!r}: must be a number")
    try:
        config.check()
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    return config


def checked_value(path: Path, name: str, value: Any) -> Any:
    """A value that a file gives for an option of a run, checked for type and bounds; any other is returned unchanged.

    Raises:
        UserError: names the file, the option and the value.
    """
    if (found := table(TrainConfig).get(name)) is None:
        return value
    value = convert(path, name, value, TrainConfig)
    try:
        check_bounds(name, value, found.metadata)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    return value


def expand_home(options: T) -> T:
    """The same options, with the user's home folder in place of each ``~`` at the start of a path.

    Raises:
        UserError: there is no such user.
    """
    values = flat(options)
    places = {name: where for name, k in table(type(options)).items() if (where := k.metadata.get("path"))}
    return override(options, {name: _expand(name, values[name], where) for name, where in places.items()})


def _expand(name: str, value: Any, where: str) -> Any:
    if isinstance(value, tuple):
        return tuple(_expand(name, part, where) for part in value)
    if where == EACH:
        return ",".join(_expand(name, part, ITSELF) for part in value.split(","))
    before = where if where == AFTER_FILE else ""
    if not value.removeprefix(before).lstrip(" ").startswith("~") or not value.startswith(before):
        return value
    place = os.path.expanduser(value.removeprefix(before).lstrip(" "))
    if place.startswith("~"):
        user = place.partition("/")[0]
        raise UserError(f"{name}={value}: {user} has no home folder here: write the whole path, or ./{place}")
    return before + place
