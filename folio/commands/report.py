"""folio report: a one-page report of runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from folio.config.declare import ITSELF, option
from folio.errors import UserError
from folio.records.console import say
from folio.records.run_folder import REPORT, output_of


@dataclass(frozen=True)
class Options:
    """Write a one-page report that opens without a network, about one run or several side by side."""

    out_dirs: tuple[str, ...] = option(("out",), "folders of the runs", path=ITSELF, positional="OUT_DIR …")
    output: str = option(
        "",
        "page; default: OUT_DIR/report.html; of several runs: compare.html",
        path=ITSELF,
        short="-o",
    )


def main(options: Options) -> None:
    say(f"wrote {run(options)}")


def run(options: Options) -> Path:
    """Writes the page, and returns its path."""
    from folio.records.report import report

    out_dirs = [Path(out_dir) for out_dir in options.out_dirs or ("out",)]
    page = Path(options.output) if options.output else output_of(out_dirs, REPORT)
    if page.suffix not in (".html", ".htm"):
        raise UserError(f"{page}: its suffix must be .html")
    report(out_dirs, page)
    return page
