"""The options of a small run, as keywords."""

from __future__ import annotations

from typing import Any

from conftest import SMALL

TINY: dict[str, Any] = {}
for flag in SMALL:
    name, _, value = flag.removeprefix("--").partition("=")
    TINY[name] = {"True": True, "False": False}.get(value, int(value) if value.isdecimal() else value)
