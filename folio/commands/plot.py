"""folio plot: draw the losses and HellaSwag accuracies of runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from folio.config.declare import ITSELF, option
from folio.records.console import say
from folio.records.run_folder import PICTURE


@dataclass(frozen=True)
class Options:
    """Draw the losses and HellaSwag accuracies of runs, over their steps and tokens."""

    out_dirs: tuple[str, ...] = option(("out",), "folders of the runs", path=ITSELF, positional="OUT_DIR …")
    output: str = option(
        "", "picture (.png, .svg, .pdf); default: loss.png in the first folder", path=ITSELF, short="-o"
    )


def main(options: Options) -> None:
    say(f"wrote {run(options)}")


def run(options: Options) -> Path:
    """Draws, and returns the picture's path."""
    from folio.records.plot import draw

    out_dirs = [Path(out_dir) for out_dir in options.out_dirs or ("out",)]
    picture = Path(options.output) if options.output else out_dirs[0] / PICTURE
    draw(out_dirs, picture)
    return picture
