"""Fixtures that run ``folio doctor`` where there is no network, and read its table."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from conftest import closed_port

from folio import cli
from folio.commands import doctor
from folio.commands.doctor import Row

Look = Callable[[], dict[str, list[Row]]]
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, which is known at once; what is there may take its time on a busy machine."""
    monkeypatch.setattr(doctor, "_PATIENCE", 60.0)
    for name in (*PROXIES, *map(str.upper, PROXIES), "HF_ENDPOINT", "PIP_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    with closed_port() as url:
        for name in ("http_proxy", "https_proxy"):
            monkeypatch.setenv(name, url)


@pytest.fixture
def text(alone, tmp_path, monkeypatch, capfd) -> Callable[[], str]:
    """Runs the command in an empty folder, as a pipe sees it."""
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.chdir(tmp_path)

    def run() -> str:
        capfd.readouterr()
        assert doctor.main(cli.parse(doctor.Options, [], "folio doctor", files=False)) is None
        out, err = capfd.readouterr()
        assert err == ""
        return str(out)

    return run


@pytest.fixture
def look(text) -> Look:
    """The same, as rows by what they are about."""

    def run() -> dict[str, list[Row]]:
        found: dict[str, list[Row]] = {}
        table = text().partition("\n\n")[0]
        for mark, what, finding, mend in re.findall(r"^(\w+) +(\S.*?)  +(.+)(?:\n +\$ (.+))?$", table, re.MULTILINE):
            found.setdefault(what, []).append(Row(mark, what, finding, mend))
        assert sum(map(len, found.values())) == sum(not line.startswith(" ") for line in table.splitlines())
        return found

    return run


@pytest.fixture
def one(look) -> Callable[[str], Row]:
    def run(what: str) -> Row:
        (row,) = look()[what]
        return row

    return run
