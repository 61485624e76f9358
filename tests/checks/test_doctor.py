"""The table of folio doctor, and checks that fail."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from importlib import metadata
from pathlib import Path

import pytest

from folio import cli
from folio.checks import data_sets, hardware
from folio.checks.finding import Finding
from folio.checks.software import CONSEQUENCES

pytest_plugins = ["doctoring"]


# The table


def numberless(out: str) -> str:
    """The table without free memory and speed, which change from call to call."""
    return re.sub(r"[\d.,]+", "#", out)


def test_every_check_has_a_finding(look) -> None:
    found = look()
    machine = {"Python", "torch", "Folio", "device", "cores", "dtype", "float32", "compiler", "memory", "disk"}
    here = {"packages", *(f"extra {name}" for name in CONSEQUENCES), "GPT-2 tokenizer", "GPT-2 weights", "data"}
    assert found.keys() == machine | here | {"network"}
    rows = [row for rows in found.values() for row in rows]
    assert {row.mark for row in rows} <= {"ok", "note", "missing"}
    assert not [row for row in rows if row.mark == "ok" and row.remedy]
    assert sys.version.split()[0] in found["Python"][0].text
    assert all(f"{name} {metadata.version(name)}" in found["packages"][0].text for name in ("torch", "numpy"))
    assert found["dtype"][0].text.startswith(("float32", "bfloat16", "float16"))


def test_the_last_line_counts_the_findings(text) -> None:
    table, _, last = text().rstrip().rpartition("\n\n")
    marks = [line.split()[0] for line in table.splitlines() if not line.startswith(" ")]
    count = {mark: marks.count(mark) for mark in ("missing", "note", "ok")}
    assert last == "{missing} missing, {note} to note, {ok} ok".format(**count)


@pytest.mark.parametrize("columns", [40, 60, 80, 200])
def test_a_narrow_terminal_loses_nothing(text, monkeypatch, columns) -> None:
    piped = text()
    monkeypatch.setenv("COLUMNS", str(columns))
    narrow = text()
    assert numberless(narrow).split() == numberless(piped).split()
    assert "\x1b" not in piped + narrow
    column = piped.index(sys.version.split()[0])
    lines = narrow.partition("\n\n")[0].splitlines()
    assert all(line[column - 2 : column] == "  " and line[column] != " " for line in lines)
    for line in lines:
        words = line[column:].split()
        assert len(line) <= max(columns, column + 24) or len(words) == 1 or words[0] == "$"


def test_a_terminal_shows_colors(text, monkeypatch) -> None:
    plain = text()
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    colored = text()
    assert "\x1b[" in colored
    assert numberless(re.sub(r"\x1b\[[\d;]*m", "", colored)) == numberless(plain)


def test_a_remedy_is_a_command(look, monkeypatch, tmp_path) -> None:
    """A command of Python runs this Python, whatever else is on the path; one of Folio has options that exist."""
    monkeypatch.setattr(data_sets, "CLONE", tmp_path)  # has no data set
    (tmp_path / "python").symlink_to(sys.executable)  # of another environment, perhaps
    monkeypatch.setenv("PATH", str(tmp_path))
    absolute = [row.remedy for rows in look().values() for row in rows if row.remedy]
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    short = [row.remedy for rows in look().values() for row in rows if row.remedy]
    ours = [shlex.split(remedy) for remedy in (*absolute, *short) if " -m " in remedy]
    assert {Path(shutil.which(words[0]) or "") for words in ours} == {Path(sys.executable)}
    assert {words[0] for words in ours} == {sys.executable, "python"}
    for words in ours:
        if words[2] == "folio":
            command = words[3]
            options = cli.module_of(command).Options
            cli.parse(options, words[4:], f"folio {command}", files=command == "plan")
    assert any(words[2:4] == ["folio", "prepare"] for words in ours)


# Checks that fail


def test_a_check_that_fails_is_a_note(look, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "0")
    found = look()
    assert found["device"] == [
        Finding(
            "note",
            "device",
            "this check failed: LOCAL_RANK is not set, but a launcher sets all of RANK, LOCAL_RANK, "
            "WORLD_SIZE, MASTER_ADDR, MASTER_PORT: use torchrun",
        )
    ]
    assert "dtype" not in found
    assert {"Python", "memory", "network", "data"} <= found.keys()


def test_a_working_directory_that_was_deleted_is_a_note(look, tmp_path, monkeypatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    found = look()
    assert found["disk"][0].mark == "note"
    assert "No such file or directory" in found["disk"][0].text
    assert {"device", "packages", "data"} <= found.keys()


def test_a_defect_is_not_hidden(text, monkeypatch) -> None:
    monkeypatch.setattr(hardware, "System", None)
    with pytest.raises(TypeError):
        text()
