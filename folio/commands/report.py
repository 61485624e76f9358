"""folio report: a one-page report of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from folio.config.options import ITSELF, knob, out_dir_knob
from folio.errors import UserError
from folio.records.console import say
from folio.records.report import report


@dataclass(frozen=True)
class Options:
    """Put all that is known of a run on one page, which opens without a network."""

    out_dir: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[OUT_DIR]")] = out_dir_knob()
    output: Annotated[str, tyro.conf.arg(aliases=["-o"], metavar="FILE")] = knob(
        "", "page (.html); default: OUT_DIR/report.html", path=ITSELF
    )


def main(options: Options) -> None:
    out_dir = Path(options.out_dir)
    page = Path(options.output) if options.output else out_dir / "report.html"
    if page.suffix not in (".html", ".htm"):
        raise UserError(f"{page}: its suffix must be .html")
    report(out_dir, page)
    say(f"wrote {page}")
