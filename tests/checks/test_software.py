"""What folio doctor finds out about Python, torch and packages."""

from __future__ import annotations

import shlex
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT

from folio.checks import software

pytest_plugins = ["doctoring"]


@pytest.fixture
def site(tmp_path_factory, monkeypatch) -> Path:
    """This Python's packages, without matplotlib."""
    folder = tmp_path_factory.mktemp("site")
    places = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    for entry in (entry for place in places for entry in Path(place).iterdir()):
        if not entry.name.startswith("matplotlib") and not (folder / entry.name).exists():
            (folder / entry.name).symlink_to(entry)
    monkeypatch.setattr(sys, "path", [str(folder), *(p for p in sys.path if p not in places)])
    return folder


def test_a_missing_package_of_an_extra(one, site) -> None:
    row = one("extra plot")
    assert row.mark == "missing"
    assert "matplotlib is missing" in row.text
    assert row.text.endswith(": folio plot cannot draw")
    assert shlex.split(row.remedy)[1:] == ["-m", "pip", "install", "-e", f"{ROOT}[plot]"]


def test_the_remedy_in_the_clone(one, site, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    assert one("extra plot").remedy.endswith(" -m pip install -e '.[plot]'")


def test_an_old_package(one, site) -> None:
    (site / "matplotlib-3.5.2.dist-info").mkdir()
    (site / "matplotlib-3.5.2.dist-info" / "METADATA").write_text("Name: matplotlib\nVersion: 3.5.2\n")
    assert "matplotlib 3.5.2 is older than 3.8" in one("extra plot").text


def test_outside_a_clone_the_metadata_names_the_packages(look, site, monkeypatch) -> None:
    """In the format of pip: Core Metadata Specifications, Requires-Dist."""
    inside = software.requirements()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"]]
    lines += [
        f'{need}; extra == "{name}"' for name, needs in project["optional-dependencies"].items() for need in needs
    ]
    for old in site.glob("folio-*"):
        old.unlink()
    (site / "folio-0.1.0.dist-info").mkdir()
    (site / "folio-0.1.0.dist-info" / "METADATA").write_text(
        "\n".join(["Name: folio", "Version: 0.1.0", *(f"Requires-Dist: {line}" for line in lines)])
    )
    monkeypatch.setattr(software, "CLONE", site)
    assert software.requirements() == inside
    row = look()["extra plot"][0]
    assert row.remedy.endswith(" -m pip install 'folio[plot]'")


def test_every_extra_has_a_consequence() -> None:
    assert {"", *software.CONSEQUENCES} == software.requirements().keys()
