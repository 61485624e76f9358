"""folio prepare: text → token files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from folio import datasets
from folio.config import knob


@dataclass(frozen=True)
class Options:
    """Make the token files of a data set."""

    name: tyro.conf.Positional[str] = knob("", "shakespeare_char | stdlib")
    source: str = knob("", "file (stdlib: folder) to take the text from, instead of the data set's usual place")
    data_dir: str = knob("", "where to write; default: data/<name>")


def main(options: Options) -> None:
    folder = Path(options.data_dir or Path("data") / options.name)
    datasets.prepare(options.name, folder, Path(options.source) if options.source else None)
