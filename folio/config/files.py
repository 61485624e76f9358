"""Config files: .py, .toml and .json, read and never run."""

from __future__ import annotations

import tomllib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from folio.config import assignments
from folio.config.names import did_you_mean, suggestion
from folio.config.options import TrainConfig
from folio.config.table import defaults, table
from folio.config.values import LONGEST, convert
from folio.errors import UserError
from folio.files import decode_text, open_regular, parse_json, require_file

PRESETS = Path(__file__).parents[1] / "presets"


def read_file(
    name: str, options: type, *, ignore: type | None = None, names: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The options that a file or preset sets, with their types checked; nothing in it is executed.

    Options that only ``ignore`` has are skipped, so that ``sample`` reads a training preset. ``names`` are the values
    from the files and options before this one; the values of this file are added. A name in a .py file that is not an
    option is a helper; if nothing in the file uses it, there is a warning.

    Raises:
        FileNotFoundError: no such file or preset.
        ValueError: names the file, the line and the remedy.
    """
    path = find_file(name)
    text, suffix = _text(path), path.suffix.lower()
    if suffix in (".yaml", ".yml"):
        raise UserError(f"{path}: a config file is .py, .toml or .json")
    lines: dict[str, int] = {}
    if suffix in (".toml", ".json"):
        values = _table(path, text, tomllib.loads if suffix == ".toml" else parse_json)
    else:
        before = {**defaults(TrainConfig), **defaults(options), **(names or {})}
        values, lines, used = assignments.read(path, text, before)
        if names is not None:
            names |= values
        values = {k: v for k, v in values.items() if not _is_helper(path, k, used, options, ignore)}
    return {
        k: convert(f"{path}:{lines[k]}" if k in lines else path, k, v, options)
        for k, v in values.items()
        if not _is_skipped(k, options, ignore)
    }


def _text(path: Path) -> str:
    with open_regular(path) as file:
        raw = file.read(LONGEST + 1)
    if len(raw) > LONGEST:
        raise UserError(f"{path} has more than {LONGEST:,} bytes: a config file is shorter")
    try:
        return decode_text(raw).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text, at byte {error.start}: save it as UTF-8") from None


def _table(path: Path, text: str, parse: Callable[[str], Any]) -> dict[str, Any]:
    """The values at the top level of a .toml or .json file."""
    try:
        values = parse(text)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"{path}: not a valid {path.suffix[1:]} file: {reason}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: must have options and their values at its top level")
    for name, value in values.items():
        if isinstance(value, dict):
            raise UserError(f"{path}: {name!r} is a table: write its values at the top level, without tables")
    return values


def _is_helper(path: Path, name: str, used: set[str], options: type, ignore: type | None) -> bool:
    """Whether a name in a .py file is no option; warns if the file does not use it either."""
    if name in table(options) or _is_skipped(name, options, ignore):
        return False
    if name not in used and not name.startswith("_"):
        hint = suggestion(name, options)
        reason = f" ({hint})" if hint else ""
        warnings.warn(f"{path}: {name} is not an option{reason}, and nothing in the file uses it", stacklevel=2)
    return True


def find_preset(name: str) -> Path | None:
    """The file of the preset of this name, with or without ``train_``; None if there is none."""
    files = [PRESETS / f"{preset}.py" for preset in (name, f"train_{name}") if name.isidentifier()]
    return next((path for path in files if path.is_file()), None)


def find_file(name: str) -> Path:
    """The path of a file, else of a preset by its name, with or without ``train_``.

    Raises:
        FileNotFoundError: there is neither. UserError: it is a pipe or a device.
    """
    path = Path(name).expanduser() if name.startswith("~/") else Path(name)
    if path.exists() and not path.is_dir():
        return require_file(path)
    if preset := find_preset(name):
        return preset
    known = sorted(p.stem for p in PRESETS.glob("*.py"))
    hint = did_you_mean(path.stem, known) or f"the presets are {', '.join(known)}"
    raise FileNotFoundError(f"no config file or preset {name!r}: {hint}")


def _is_skipped(name: str, options: type, ignore: type | None) -> bool:
    """Whether a name is an option of ``ignore`` only."""
    return ignore is not None and name not in table(options) and name in table(ignore)
