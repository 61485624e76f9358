"""folio report: a one-page report of runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from folio.config.declare import ITSELF, option
from folio.errors import UserError
from folio.records.console import say


@dataclass(frozen=True)
class Options:
    """Write a one-page report of one run, or of several beside each other, which opens without a network."""

    out_dirs: tuple[str, ...] = option(("out",), "folders of the runs", path=ITSELF, positional="OUT_DIR …")
    output: str = option(
        "",
        "page (.html); default: OUT_DIR/report.html, or compare.html for several runs",
        path=ITSELF,
        short="-o",
    )


def main(options: Options) -> None:
    say(f"wrote {run(options)}")


def run(options: Options) -> Path:
    """Writes the page, and returns its path."""
    from folio.records.report import report

    out_dirs = [Path(out_dir) for out_dir in options.out_dirs or ("out",)]
    several = len({out_dir.resolve() for out_dir in out_dirs}) > 1
    default = Path("compare.html") if several else out_dirs[0] / "report.html"
    page = Path(options.output) if options.output else default
    if page.suffix not in (".html", ".htm"):
        raise UserError(f"{page}: its suffix must be .html")
    report(out_dirs, page)
    return page
