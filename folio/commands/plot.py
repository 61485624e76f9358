"""folio plot: draw the losses, HellaSwag accuracies and other measurements of runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from folio.config.declare import ITSELF, option
from folio.records.console import say
from folio.records.run_folder import PICTURE, output_of


@dataclass(frozen=True)
class Options:
    """Draw the losses, HellaSwag accuracies and other measurements of runs, in one picture."""

    out_dirs: tuple[str, ...] = option(("out",), "folders of the runs", path=ITSELF, positional="OUT_DIR …")
    output: str = option(
        "",
        "picture; default: OUT_DIR/loss.png; of several runs: compare.png",
        details="Its suffix is the format: .png, .svg or .pdf.",
        path=ITSELF,
        short="-o",
    )
    x: Literal["step", "tokens", "time"] = option("step", "step | tokens | time: what the x axis counts")
    log: bool = option(False, "a logarithmic x axis, without step 0")
    smooth: float = option(
        0.01,
        "share of the run over which train losses are averaged",
        details="Each loss of the curve is the mean of all, weighted by exp(-distance / horizon); the horizon is this "
        "share of the run's steps, with --log of their logarithm. 0: the losses as they were logged.",
        min=0,
        max=1,
    )


def main(options: Options) -> None:
    say(f"wrote {run(options)}")


def run(options: Options) -> Path:
    """Draws, and returns the picture's path."""
    from folio.records.plot import draw

    out_dirs = [Path(out_dir) for out_dir in options.out_dirs or ("out",)]
    picture = Path(options.output) if options.output else output_of(out_dirs, PICTURE)
    draw(out_dirs, picture, options.x, log=options.log, smoothing=options.smooth)
    return picture
