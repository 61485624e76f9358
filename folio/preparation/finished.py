"""Whether a data set is finished, and whether it was made with the same settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from folio.data.token_files import META, SPLITS, UNFINISHED
from folio.errors import UserError
from folio.files import read_sealed
from folio.preparation.recipe import Recipe
from folio.preparation.sources import Source
from folio.preparation.text_files import Files
from folio.preparation.writer import STATE
from folio.records.console import say


def is_finished(folder: Path, recipe: Recipe, described: dict[str, Any], overwrite: bool) -> bool:
    """Whether the data set is finished. Raises ValueError if the folder has one with other settings."""
    if overwrite:
        return False
    try:
        meta, _ = read_sealed(folder / META)
        made = dict(meta["made"])
        names = [str(f["name"]) for split in meta["splits"].values() for f in split["files"]]
        counts = {split: int(meta["splits"][split]["tokens"]) for split in SPLITS}
    except FileNotFoundError:
        if (folder / UNFINISHED / STATE).exists():
            return False
        if found := sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".npy", ".ds")):
            raise UserError(
                f"{folder} holds {found[0]}, which another program wrote: choose another folder, or --overwrite"
            ) from None
        return False
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / META} is damaged ({error}): --overwrite replaces the data set") from None
    refuse_difference(f"{folder} was made", made, described, recipe.source)
    if recipe.source.once:
        raise already_there(folder)
    gone = [name for name in names if not (folder / name).is_file()]
    if gone:
        raise UserError(f"{folder / gone[0]} is missing: --overwrite replaces the data set")
    say(f"{folder} is finished: train has {counts['train']:,} tokens, val has {counts['val']:,}; nothing to do")
    return True


def already_there(folder: Path) -> UserError:
    """The error for texts that cannot be compared with those of a finished data set."""
    return UserError(
        f"{folder} is a data set already, and an iterable cannot be compared with it: give another name, a list, or "
        "overwrite=True, which replaces it"
    )


def refuse_difference(what: str, old: dict[str, Any], new: dict[str, Any], source: Source) -> None:
    """Raises ValueError if the settings ``new`` are not those that ``what`` (a subject and verb) was made with."""
    was, now = _flat(old), _flat(new)
    changed = [k for k in {**was, **now} if was.get(k) != now.get(k)]
    if changed == ["source.line_ends"] and isinstance(source, Files) and source.reads_as_before():
        return
    if changed:
        changes = "; ".join(f"{k}: {was.get(k)} → {now.get(k)}" for k in changed)
        raise UserError(f"{what} with other settings ({changes}): --overwrite replaces it")


def _flat(tree: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {name: tree}
    return {k: v for key, value in tree.items() for k, v in _flat(value, f"{name}.{key}" if name else key).items()}
