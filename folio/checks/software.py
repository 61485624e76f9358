"""Python, torch, Folio, and the packages that Folio and its extras need."""

from __future__ import annotations

import platform
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version

from folio import __version__
from folio.checks.finding import Finding, python_command
from folio.data.token_files import CLONE
from folio.files import read_text

# What does not work without an extra. The project's metadata lists the packages
CONSEQUENCES = {
    "data": "some of parquet files, zstd files, Hugging Face's data sets and its tokenizers cannot be read",
    "hf": "models cannot be downloaded from the Hugging Face hub, or exported",
    "eval": "folio eval cannot run the tasks of the lm-evaluation-harness",
    "log": "--track cannot use these trackers",
    "plot": "folio plot cannot draw",
}


def versions() -> Iterator[Finding]:
    """Python, torch and Folio, and where they are."""
    yield Finding("ok", "Python", f"{platform.python_version()}, {sys.executable}")
    gpus = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip, "Apple's": "GPUs" * torch.backends.mps.is_built()}
    built = next((f"{name} {version}" for name, version in gpus.items() if version), "CPUs only")
    yield Finding("ok", "torch", f"{torch.__version__}, built for {built}")
    where = "the clone in" if _project() else "installed in"
    yield Finding("ok", "Folio", f"{__version__}, {where} {CLONE}")


def packages() -> Iterator[Finding]:
    """The core's packages, and those of each extra."""
    target = ("." if Path.cwd() == CLONE else str(CLONE)) if _project() else "folio"
    install = python_command(f"-m pip install {'-e ' * bool(_project())}")
    for extra, needs in requirements().items():
        found = [_installed(need) for need in needs]
        missing = [text for met, text in found if not met]
        subject, option = (f"extra {extra}", f"[{extra}]") if extra else ("packages", "")
        if missing:
            text = f"{', '.join(missing)}: {CONSEQUENCES.get(extra, 'Folio may fail')}"
            yield Finding("missing", subject, text, f"{install}{shlex.quote(f'{target}{option}')}")
        else:
            yield Finding("ok", subject, ", ".join(text for _, text in found))


def requirements() -> dict[str, list[str]]:
    """The packages that Folio needs, such as ``"numpy>=1.26"``, by extra; the core's under "". Without those of dev.

    They are read from the clone's ``pyproject.toml``, since the metadata of an editable install may be older; without
    a clone, from the metadata.

    Raises:
        PackageNotFoundError, an ImportError: Folio is neither in a clone nor installed.
    """
    if project := _project():
        found = {"": project["dependencies"], **project["optional-dependencies"]}
    else:
        found = {"": []}
        for line in metadata.requires("folio") or []:
            need, _, marker = line.partition(";")
            extra = re.search(r"extra == ['\"](.+?)['\"]", marker)
            found.setdefault(extra[1] if extra else "", []).append(need.strip())
    return {extra: needs for extra, needs in found.items() if extra != "dev"}


def _project() -> dict[str, Any]:
    """The project's table in the clone's pyproject.toml; empty if Folio is installed without a clone."""
    path = CLONE / "pyproject.toml"
    found: dict[str, Any] = tomllib.loads(read_text(path)).get("project", {}) if path.is_file() else {}
    return found if found.get("name") == "folio" else {}


def _installed(need: str) -> tuple[bool, str]:
    """Whether a requirement is met, and a text: the version that is installed, or the reason."""
    name, _, least = need.partition(">=")
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return False, f"{name} is missing"
    if least and Version(version) < Version(least):
        return False, f"{name} {version} is older than {least}"
    return True, f"{name} {version}"
