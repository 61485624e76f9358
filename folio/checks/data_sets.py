"""The data sets that ``--dataset`` finds by name."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

from folio.checks.finding import Finding, python_command
from folio.data.folders import holds_tokens, open_folder
from folio.data.token_files import CLONE, SPLITS, UNFINISHED
from folio.preparation.recipes import KNOWN


def data_sets() -> Iterator[Finding]:
    """Those under the working directory and in the clone, each once."""
    places = [p for folder in (Path("data"), CLONE / "data") if folder.is_dir() for p in sorted(folder.iterdir())]
    places += [Path("edu_fineweb10B"), CLONE / "edu_fineweb10B"]
    folders: dict[Path, Path] = {}
    for place in filter(Path.is_dir, places):
        folders.setdefault(place.resolve(), place)
    found = [finding for place in folders.values() if (finding := _data_set(place))]
    yield from found
    if not found:
        text = "no data set is prepared; stdlib can be prepared without a network"
        yield Finding("missing", "data", text, python_command("-m folio prepare stdlib"))


def _data_set(place: Path) -> Finding | None:
    """None for a folder that has no tokens."""
    option = "" if place == Path("data", place.name) else f" --data_dir={shlex.quote(str(place))}"
    prepare = python_command(f"-m folio prepare {place.name}{option}") if place.name in KNOWN else ""
    if not holds_tokens(place):
        unfinished = f"{place} is not finished: run the same folio prepare again to continue"
        return Finding("note", "data", unfinished, prepare) if (place / UNFINISHED).is_dir() else None
    try:
        folder = open_folder(place)
    except (OSError, ValueError) as error:
        return Finding("missing", "data", str(error), prepare and f"{prepare} --overwrite")
    tokens = (f"{sum(file.tokens for file in folder.splits[split]):,} {split}" for split in SPLITS)
    return Finding("ok", "data", f"{place}: {' and '.join(tokens)} tokens")
