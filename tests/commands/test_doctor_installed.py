"""What ``folio doctor`` says of packages, of servers, and of files that they serve."""

from __future__ import annotations

import shlex
import socket
import sys
import sysconfig
import threading
import time
import tomllib
from contextlib import closing, suppress
from pathlib import Path

import pytest
from conftest import ROOT, server

from folio.commands import doctor
from folio.commands.doctor import Row

pytest_plugins = ["doctoring"]


# Packages


@pytest.fixture
def site(tmp_path_factory, monkeypatch) -> Path:
    """This Python's packages, without matplotlib."""
    folder = tmp_path_factory.mktemp("site")
    places = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    for entry in (entry for place in places for entry in Path(place).iterdir()):
        if not entry.name.startswith("matplotlib"):
            (folder / entry.name).symlink_to(entry)
    monkeypatch.setattr(sys, "path", [str(folder), *(p for p in sys.path if p not in places)])
    return folder


def test_an_extra_without_a_package(one, site) -> None:
    row = one("extra plot")
    assert row.mark == "lacks"
    assert "matplotlib is missing" in row.finding
    assert row.finding.endswith(": folio plot or folio report cannot draw")
    assert shlex.split(row.mend)[1:] == ["-m", "pip", "install", "-e", f"{ROOT}[plot]"]


def test_in_the_clone_it_is_installed_by_a_dot(one, site, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    assert one("extra plot").mend.endswith(" -m pip install -e '.[plot]'")


def test_a_package_that_is_too_old(one, site) -> None:
    (site / "matplotlib-3.5.2.dist-info").mkdir()
    (site / "matplotlib-3.5.2.dist-info" / "METADATA").write_text("Name: matplotlib\nVersion: 3.5.2\n")
    assert "matplotlib 3.5.2 is older than 3.8" in one("extra plot").finding


def test_outside_a_clone_the_metadata_names_the_packages(look, site, monkeypatch) -> None:
    """As pip writes them there; Core Metadata Specifications, Requires-Dist."""
    inside = doctor.requirements()
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
    monkeypatch.setattr(doctor, "CLONE", site)
    assert doctor.requirements() == inside
    row = look()["extra plot"][0]
    assert row.mend.endswith(" -m pip install 'folio[plot]'")


def test_an_extra_has_its_meaning() -> None:
    assert {"", *doctor.MEANS} == doctor.requirements().keys()


# The network


def test_no_network(look) -> None:
    hub, index = look()["network"]
    assert hub == Row(
        "lacks",
        "network",
        "huggingface.co does not answer (Connection refused): models and data sets cannot be fetched",
    )
    assert index.finding == "pypi.org does not answer (Connection refused): packages cannot be installed"


@pytest.mark.parametrize(("status", "mark"), [(200, "ok"), (404, "ok"), (503, "lacks")])
def test_a_server_that_answers(look, monkeypatch, status, mark) -> None:
    """Through no proxy, and with a password that nobody else should read."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with server(b"", status=status) as url:
        host = url.split("/")[2]
        monkeypatch.setenv("PIP_INDEX_URL", f"http://me:secret@{host}/simple")
        hub, index = look()["network"]
    assert (index.mark, index.finding.split()[0]) == (mark, host)
    assert "secret" not in index.finding
    assert hub.mark == "lacks"


def test_a_proxy_is_asked(look, monkeypatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    assert look()["network"][0].mark == "lacks"
    with server(b"") as proxy:
        monkeypatch.setenv("http_proxy", proxy.removesuffix("/file"))
        assert look()["network"][0] == Row("ok", "network", "hub.invalid answers")


@pytest.mark.parametrize("url", ["hub.invalid", "http://[", "http://h:port/", "ftp://hub.invalid"])
def test_an_address_that_is_none(look, monkeypatch, url) -> None:
    monkeypatch.setenv("HF_ENDPOINT", url)
    assert look()["network"][0].mark == "lacks"


@pytest.mark.parametrize("word", [b"", b"HTTP/1.0 "], ids=["says nothing", "never ends"])
def test_a_server_is_not_waited_for(look, monkeypatch, word) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(doctor, "_PATIENCE", 0.2)
    seen = threading.Event()

    def drip() -> None:
        connection = listening.accept()[0]
        with closing(connection), suppress(OSError):
            end = time.monotonic() + 5
            while time.monotonic() < end and not seen.wait(0.02):
                connection.sendall(word)

    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        thread = threading.Thread(target=drip)
        thread.start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{listening.getsockname()[1]}")
        row = look()["network"][0]
        seen.set()
        thread.join()
    assert row.mark == "lacks"
    assert "nothing within 0.2 seconds" in row.finding or (not word and "timed out" in row.finding)


# GPT-2's files


def test_the_tables_of_the_tokenizer(one, monkeypatch, gpt2, shared_data, tmp_path) -> None:
    """``gpt2`` has read them from that folder; with one of the two it could not."""
    row = one("GPT-2 tokenizer")
    assert row == Row("ok", "GPT-2 tokenizer", f"in {shared_data / 'tiktoken'}: it needs no network")
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    for file in sorted((shared_data / "tiktoken").iterdir()):
        row = one("GPT-2 tokenizer")
        assert (row.mark, row.mend) == ("lacks", "export TIKTOKEN_CACHE_DIR=FOLDER")
        assert f"not in {cache}, and openaipublic.blob.core.windows.net does not answer" in row.finding
        (cache / file.name).symlink_to(file)
    assert one("GPT-2 tokenizer").mark == "ok"


def test_tables_that_can_be_fetched(one, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with server(b"") as url:
        monkeypatch.setattr(doctor, "_TABLES", url)
        row = one("GPT-2 tokenizer")
    assert (row.mark, row.finding) == ("note", "not in a cache: fetched when first needed")
    assert "get_encoding" in row.mend


def test_the_weights_in_the_cache_of_the_hub(one, monkeypatch, tmp_path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    row = one("GPT-2 weights")
    assert (row.mark, row.mend) == ("lacks", "export HF_HUB_CACHE=FOLDER")
    folder = tmp_path / "models--openai-community--gpt2"
    for path in ("refs/main", "snapshots/abc/model.safetensors"):
        (folder / path).parent.mkdir(parents=True)
        (folder / path).write_text("abc")
    assert one("GPT-2 weights") == Row("ok", "GPT-2 weights", f"in {tmp_path}: they need no network")


def test_the_weights_where_the_hub_library_is_missing(one, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    row = one("GPT-2 weights")
    assert row.mark == "note"
    assert "huggingface_hub" in row.finding
