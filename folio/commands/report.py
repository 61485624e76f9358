"""folio report: a one-page report of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from folio.config.declare import ITSELF, option, out_dir_option
from folio.errors import UserError
from folio.records.console import say


@dataclass(frozen=True)
class Options:
    """Write a one-page report of a run, which opens without a network."""

    out_dir: str = out_dir_option(positional="OUT_DIR")
    output: str = option("", "page (.html); default: OUT_DIR/report.html", path=ITSELF, short="-o")


def main(options: Options) -> None:
    say(f"wrote {run(options)}")


def run(options: Options) -> Path:
    """Writes the page, and returns its path."""
    from folio.records.report import report

    out_dir = Path(options.out_dir)
    page = Path(options.output) if options.output else out_dir / "report.html"
    if page.suffix not in (".html", ".htm"):
        raise UserError(f"{page}: its suffix must be .html")
    report(out_dir, page)
    return page
