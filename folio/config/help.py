"""The text of ``--help``: the options most used on one screen, all options, or one in detail."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, get_args

from rich_argparse import RawDescriptionRichHelpFormatter

from folio.config.arguments import describe, parser
from folio.config.table import Option, defaults, table

_BOUNDS = {"min": "at least", "max": "at most", "above": "above", "below": "below"}
_ROLES = {
    "call": "It holds for one call; a resumed run does not keep it.",
    "machine": "It is about this machine; its value in a foreign checkpoint is not read.",
    "data": "It says where the data of the run is.",
}


class _Formatter(RawDescriptionRichHelpFormatter):
    group_name_formatter: ClassVar[Any] = str
    help_markup: ClassVar[bool] = False
    text_markup: ClassVar[bool] = False

    def __init__(self, prog: str, **more: Any) -> None:
        super().__init__(prog, max_help_position=38, **more)


def page(
    options: type,
    prog: str,
    about: str,
    example: str,
    topic: str,
    places: Sequence[str],
    *,
    files: bool,
    preset: Mapping[str, Any],
) -> str:
    """The text of ``--help``.

    Args:
        options: The command's options.
        prog: The command, as it is typed.
        about: What it does, in a sentence.
        example: A command line; may be empty.
        topic: "" for the options most used, "all" for all, or the name of one.
        places: The positional words; some options are for one value of the first only, such as ``hellaswag``.
        files: Whether it reads config files.
        preset: Values of a preset that the command always reads; they are shown in place of the defaults.
    """
    known, usual = table(options), {**defaults(options), **preset}
    if topic in known:
        return _in_detail(topic, known[topic], usual, prog)
    mine = {name for name, option in known.items() if _is_for(option, known, places)}
    names = {name for name in mine if topic == "all" or not known[name].metadata.get("advanced")}
    words = [o.metadata["positional"] for o in known.values() if o.metadata.get("positional")]
    usage = " ".join([prog, *(["[FILE or PRESET …]"] if files else []), *words, "[--option=value …]"])
    more = ["Defaults in parentheses"]
    more += [f"--help=all: all {len(mine)} options"] if len(names) < len(mine) else []
    more += ["--help=NAME: about one"] if names else []
    shown = parser(
        options,
        names,
        usual,
        prog=prog,
        usage=usage.replace("%", "%%"),
        description=_wrapped([about, *[f"Example: {example}"] * bool(example)]),
        epilog=_wrapped([f"{'; '.join(more)}."]),
        formatter_class=_Formatter,
    )
    for title, lines in (o.metadata["listed"] for o in known.values() if "listed" in o.metadata):
        section = shown.add_argument_group(title)
        for word, line in lines.items():
            section.add_argument(word, help=line.replace("%", "%%"))
    return shown.format_help()


def _is_for(option: Option, known: dict[str, Option], places: Sequence[str]) -> bool:
    """Whether an option applies to the first positional word, such as ``hellaswag`` of ``folio eval hellaswag``."""
    first = {word for o in known.values() if o.metadata.get("positional") for word in get_args(o.type)} & set(
        places[:1]
    )
    return not first or not (of := option.metadata.get("of")) or bool(first & set(of))


def _in_detail(name: str, option: Option, usual: dict[str, Any], prog: str) -> str:
    """One option in detail."""
    about = option.metadata
    lines = [f"--{name}: {describe(name, option, usual)}", *filter(None, [about.get("details")])]
    bounds = [f"{words} {about[rule]:,}" for rule, words in _BOUNDS.items() if rule in about]
    lines += [f"Its value is {' and '.join(bounds)}."] if bounds else []
    lines += [_ROLES[role]] if (role := about.get("role")) else []
    lines += [f"Only for {prog} {' and '.join(about['of'])}."] if about.get("of") else []
    lines += ["nanoGPT has an option of this name."] if about.get("nanogpt") else []
    return f"{_wrapped(lines)}\n"


def _wrapped(paragraphs: list[str]) -> str:
    width = shutil.get_terminal_size().columns - 2
    return "\n".join(line for text in paragraphs for line in textwrap.wrap(text, width))
