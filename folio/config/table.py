"""The options of a composed dataclass as one flat table."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass, replace
from typing import Any, NamedTuple, TypeVar, get_type_hints

T = TypeVar("T")


class Option(NamedTuple):
    """An option of a command: its group (the name of a field of the composed dataclass, or ""), its field and type.

    ``metadata`` is that of its field, with that of its group's field, which wins.
    """

    group: str
    field: Field[Any]
    type: Any
    metadata: dict[str, Any]


def table(options: type[Any]) -> dict[str, Option]:
    """Every option of a command by its flat name; a field that is no dataclass is an option itself.

    Raises:
        TypeError: two groups have an option of the same name.
    """
    return _table(options)  # type: ignore[arg-type]


@functools.cache
def _table(options: type[Any]) -> dict[str, Option]:
    found: dict[str, Option] = {}
    outer_hints = get_type_hints(options)
    for outer in fields(options):
        if outer.name == "sources":
            continue
        kind = outer_hints[outer.name]
        grouped = is_dataclass(kind)
        hints = get_type_hints(kind) if grouped else outer_hints
        for f in fields(kind) if grouped else [outer]:
            if f.name in found:
                raise TypeError(f"{options.__name__} has the option {f.name!r} twice")
            found[f.name] = Option(outer.name if grouped else "", f, hints[f.name], {**f.metadata, **outer.metadata})
    return found


def options_with(options: type[Any], **metadata: Any) -> set[str]:
    """The names of the options with this metadata: ``options_with(TrainConfig, role="data")``."""
    return {
        name
        for name, option in table(options).items()
        if all(option.metadata.get(key) == value for key, value in metadata.items())
    }


def flat(config: Any) -> dict[str, Any]:
    """The values of a composed object by their flat names."""
    return {
        name: getattr(getattr(config, option.group) if option.group else config, name)
        for name, option in table(type(config)).items()
    }


def override(config: T, values: Mapping[str, Any]) -> T:
    """A copy of a composed object with these values, by flat name."""
    known = table(type(config))
    by_group: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        by_group.setdefault(known[name].group, {})[name] = value
    groups = {g: replace(getattr(config, g), **v) for g, v in by_group.items() if g}
    return replace(config, **groups, **by_group.get("", {}))  # type: ignore[type-var]


def defaults(options: type) -> dict[str, Any]:
    """The options of a command at their defaults, without those that must be given."""
    groups = {f.name: f.default_factory() for f in fields(options) if f.default_factory is not MISSING}
    return {
        name: value
        for name, option in table(options).items()
        if (value := getattr(groups[option.group], name) if option.group else option.field.default) is not MISSING
    }
