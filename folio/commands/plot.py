"""folio plot: the losses of a run as a picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from folio.config import knob
from folio.plot import loss_curve


@dataclass(frozen=True)
class Options:
    """Draw the losses of a run over its steps."""

    out_dir: tyro.conf.Positional[str] = knob("out", "folder of the run")
    output: Annotated[str, tyro.conf.arg(aliases=["-o"])] = knob("", "picture (.png, .svg); default: OUT_DIR/loss.png")


def main(options: Options) -> None:
    out_dir = Path(options.out_dir)
    picture = Path(options.output) if options.output else out_dir / "loss.png"
    loss_curve(out_dir, picture)
    print(f"wrote {picture}")
