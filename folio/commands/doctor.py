"""folio doctor: what this machine has and lacks, and the command that mends each lack."""

from __future__ import annotations

import shutil
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING

from folio.records.console import printable

if TYPE_CHECKING:
    from folio.checks.finding import Check, Finding

_STYLES = {"ok": "green", "note": "yellow", "missing": "bold red"}


@dataclass(frozen=True)
class Options:
    """Report what this machine has, what each lack means, and the command that mends it."""


def main(options: Options) -> None:
    """Prints the table. Something that is missing, or a check that fails, is not a failure of the command."""
    from folio.checks.data_sets import data_sets
    from folio.checks.finding import findings
    from folio.checks.hardware import arithmetic, disk, memory
    from folio.checks.network import Sites
    from folio.checks.software import packages, versions

    sites = Sites()
    checks: dict[str, Check] = {
        "Python": versions,
        "device": arithmetic,
        "memory": memory,
        "disk": disk,
        "packages": packages,
        "network": sites.servers,
        "GPT-2 tokenizer": sites.tokenizer,
        "GPT-2 weights": sites.weights,
        "data": data_sets,
    }
    _show([finding for subject, check in checks.items() for finding in findings(subject, check)])


def _show(found: list[Finding]) -> None:
    """Wraps the texts to the width of the terminal, or COLUMNS; without either, a text is one line.

    A remedy is never broken, so that it can be copied.
    """
    from rich.console import Console
    from rich.text import Text

    console, columns = Console(highlight=False, soft_wrap=True), shutil.get_terminal_size((0, 0)).columns
    mark, subject = max(map(len, _STYLES)), max(len(finding.subject) for finding in found)
    indent = mark + subject + 4
    for finding in found:
        text = " ".join(printable(finding.text).split())
        width = max(columns - indent, 24) if columns else len(text) + 1
        lines = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
        lines += [f"$ {printable(finding.remedy)}"] * bool(finding.remedy)
        rest = f"  {finding.subject:{subject}}  " + f"\n{'':{indent}}".join(lines)
        console.print(Text.assemble((f"{finding.mark:{mark}}", _STYLES[finding.mark]), rest))
    count = {mark: sum(finding.mark == mark for finding in found) for mark in _STYLES}
    console.print(f"\n{count['missing']} missing, {count['note']} to note, {count['ok']} ok")
