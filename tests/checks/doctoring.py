"""Fixtures that run ``folio doctor`` where there is no network, and read its table."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from servers import closed_port

from folio import cli
from folio.checks import network
from folio.checks.finding import Finding
from folio.commands import doctor

Look = Callable[[], dict[str, list[Finding]]]
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, which each check finds out at once; other servers may be slow on a busy machine."""
    monkeypatch.setattr(network, "_TIMEOUT", 60.0)
    for name in (*PROXIES, *map(str.upper, PROXIES), "HF_ENDPOINT", "PIP_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    with closed_port() as url:
        for name in ("http_proxy", "https_proxy"):
            monkeypatch.setenv(name, url)


@pytest.fixture
def text(alone, tmp_path, monkeypatch, capfd) -> Callable[[], str]:
    """Runs the command in an empty folder, and returns what it writes to a pipe."""
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
    """The same, as findings by subject."""

    def run() -> dict[str, list[Finding]]:
        found: dict[str, list[Finding]] = {}
        table = text().partition("\n\n")[0]
        for row in re.findall(r"^(\w+) +(\S.*?)  +(.+)(?:\n +\$ (.+))?$", table, re.MULTILINE):
            finding = Finding(*row)
            found.setdefault(finding.subject, []).append(finding)
        assert sum(map(len, found.values())) == sum(not line.startswith(" ") for line in table.splitlines())
        return found

    return run


@pytest.fixture
def one(look) -> Callable[[str], Finding]:
    """The only finding about a subject."""

    def run(subject: str) -> Finding:
        (finding,) = look()[subject]
        return finding

    return run
