"""A command line becomes layers of values: argparse, built from the table of a command's options."""

from __future__ import annotations

import argparse
import re
from collections.abc import Collection, Sequence
from dataclasses import MISSING, fields
from typing import Any, Literal, NamedTuple, NoReturn, get_args, get_origin

from folio.config.compose import Layer
from folio.config.files import read_file
from folio.config.names import unknown
from folio.config.options import TrainConfig
from folio.config.table import Option, defaults, table
from folio.config.values import COMMAND_LINE, convert, parse_text
from folio.errors import UserError

_FILE = "--config file"  # no option can have this name
_BOOLS = {"True", "False", "1", "0"}


class Arguments(NamedTuple):
    """What a command line gives, from left to right, in layers: one for each file and each option.

    ``help`` is the topic of ``--help``: "", "all" or the name of an option; None without ``--help``. ``places`` are the
    positional words: neither options nor files.
    """

    layers: list[Layer]
    help: str | None
    places: list[str]


def read(options: type, argv: Sequence[str], *, files: bool, ignored: type | None = None) -> Arguments:
    """The layers of a command line.

    An option is written ``--a=b`` or ``--a b``, with underscores or dashes; one that is True or False also ``--a`` or
    ``--no-a``. Options that only ``ignored`` has are checked for their type and dropped.

    Raises:
        UserError: an option, a value or a file is invalid; names it.
        FileNotFoundError: no such file or preset.
    """
    places: list[str] = []
    flags: list[str] = []
    waiting = list(argv)
    while waiting:
        word = waiting.pop(0)
        if word in ("-h", "--help") or word.startswith("--help="):
            topic = _topic(options, word.partition("=")[2], waiting)
            return Arguments([], topic, [*places, *waiting])
        if word.startswith("--") and ignored and not _has(options, word) and _has(ignored, word):
            name, _, value = _flag(ignored, word, waiting)[2:].partition("=")
            parse_text(name, value, ignored)
        elif word.startswith("--"):
            flags.append(_flag(options, word, waiting))
        elif files and not word.startswith("-"):
            flags.append(f"{_FILE}={word}")
        else:
            places.append(word)
    found = argparse.Namespace(layers=[], names={})
    parser(options, table(options)).parse_args([*places, *flags], found)
    return Arguments(found.layers, None, places)


def parser(
    options: type, names: Collection[str], usual: dict[str, Any] | None = None, **how: Any
) -> argparse.ArgumentParser:
    """An argparse parser of the options with these names, in their groups; ``how`` goes to ``ArgumentParser``.

    Its help shows the values in ``usual``, by default those of the class.
    """
    known, usual = table(options), defaults(options) if usual is None else usual
    parser = _Parser(allow_abbrev=False, add_help=False, **how)
    parser.add_argument(_FILE, action=_ReadFile, help=argparse.SUPPRESS).options = options  # type: ignore[attr-defined]
    groups: dict[str, Any] = {}
    for name, option in known.items():
        if name not in names:
            continue
        if option.group not in groups:
            title = _title(options, option.group)
            groups[option.group] = parser.add_argument_group(title)
        place = option.metadata.get("positional")
        kind: dict[str, Any] = {"nargs": _nargs(option)} if place else {"required": name not in usual, "dest": name}
        spellings = [name] if place else [f"--{name}", *filter(None, [option.metadata.get("short")])]
        action = groups[option.group].add_argument(
            *spellings,
            action=_SetOption,
            default=argparse.SUPPRESS,
            metavar=place or _metavar(option),
            help=describe(name, option, usual).replace("%", "%%"),
            **kind,
        )
        action.options = options
    return parser


def describe(name: str, option: Option, usual: dict[str, Any]) -> str:
    """Unit, help, choices and default of an option, on one line."""
    about = option.metadata
    if name in about.get("unused", ()):
        return "accepted, but not used by this command"
    text = " ".join(filter(None, [about.get("unit"), about["help"]]))
    choices = [str(word) for kind in (option.type, *get_args(option.type)) for word in get_args(kind)]
    if get_origin(option.type) is Literal and 1 < len(choices) < 6 and not all(word in text for word in choices):
        text = f"{' | '.join(choices)}; {text}"
    inherited = about.get("inherited", "")
    if usual.get(name, "") in ("", ()):
        return f"{text} ({inherited})" if inherited else text if name in usual else f"{text} (required)"
    value = f"{inherited}, else {usual[name]}" if inherited else usual[name]
    shown = " ".join(value) if isinstance(value, tuple) else repr(value) if str(value).isspace() else value
    return f"{text} ({shown})"


def _topic(options: type, topic: str, waiting: list[str]) -> str:
    """The topic of ``--help``: the text after ``--help=``, or the next word if that is ``all`` or an option."""
    if not topic and waiting and (waiting[0] == "all" or waiting[0].replace("-", "_") in table(options)):
        topic = waiting.pop(0)
    topic = topic.lstrip("-").replace("-", "_")
    if topic not in ("", "all", *table(options)):
        raise UserError(unknown(topic, options))
    return topic


def _has(options: type, word: str) -> bool:
    """Whether a word such as ``--eval-iters=20`` or ``--no-compile`` sets one of the options."""
    name = word[2:].partition("=")[0].replace("-", "_")
    return not table(options).keys().isdisjoint({name, name.removeprefix("no_")})


def _flag(options: type, word: str, waiting: list[str]) -> str:
    """An option as ``--name=value``; its value may be the next of the ``waiting`` words."""
    known = table(options)
    name, equals, value = word[2:].partition("=")
    name = name.replace("-", "_")
    off = name.removeprefix("no_")
    if not equals and name not in known and off in known and _is_switch(known[off].type, []):
        return f"--{off}=False"
    if name not in known:
        raise UserError(unknown(name, options))
    if place := known[name].metadata.get("positional"):
        raise UserError(f"--{name} is not an option: write {place} without --{name}")
    if equals:
        return f"--{name}={value}"
    if _is_switch(known[name].type, waiting):
        return f"--{name}=True"
    if not waiting:
        raise UserError(f"--{name} needs a value: --{name}=…")
    return f"--{name}={waiting.pop(0)}"


def _is_switch(kind: Any, waiting: Sequence[str]) -> bool:
    """Whether an option without a value stands for True: one that may be a bool, with no value after it."""
    words = {*_BOOLS, *(word for choice in get_args(kind) for word in get_args(choice))}
    return (kind is bool or bool in get_args(kind)) and words.isdisjoint(waiting[:1])


def _title(options: type, group: str) -> str:
    """The heading of a group: its name and the first sentence about it."""
    if not group:
        return "options"
    kind = next(f for f in fields(options) if f.name == group).default_factory
    about = re.split(r"[.;]", str(kind().__doc__))[0] if kind is not MISSING else ""
    return f"{group}: {about[:1].lower()}{about[1:]}"


def _nargs(option: Option) -> str | None:
    """argparse's nargs of a positional argument."""
    if get_origin(option.type) is tuple:
        return "*"
    return None if option.field.default is MISSING else "?"


def _metavar(option: Option) -> str:
    if option.type is str:
        return "PATH" if "path" in option.metadata else "TEXT"
    if bool in (option.type, *get_args(option.type)):
        return "BOOL"
    return "N" if int in (option.type, *get_args(option.type)) else "X" if option.type is float else "WORD"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


class _SetOption(argparse.Action):
    options: type

    def __call__(self, parser: Any, namespace: Any, value: Any, option_string: str | None = None) -> None:
        if isinstance(value, list):
            value = tuple(value)
        elif not self.option_strings:
            value = convert(COMMAND_LINE, self.dest, value, self.options)
        else:
            value = parse_text(self.dest, value, self.options)
        namespace.names[self.dest] = value
        namespace.layers.append(Layer(COMMAND_LINE, {self.dest: value}))


class _ReadFile(argparse.Action):
    options: type

    def __call__(self, parser: Any, namespace: Any, value: Any, option_string: str | None = None) -> None:
        found = read_file(value, self.options, ignore=TrainConfig, names=namespace.names)
        namespace.names |= found
        namespace.layers.append(Layer(value, found))
