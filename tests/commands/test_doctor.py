"""What is said of a machine, and of machines that lack something."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import sys
import sysconfig
import threading
import time
import tomllib
from collections.abc import Callable
from contextlib import closing, suppress
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, closed_port, server

from folio import cli
from folio.commands import doctor
from folio.commands.doctor import Row
from folio.data.folders import open_folder
from folio.data.token_files import SPLITS, UNFINISHED
from folio.machine import shortage

Look = Callable[[], dict[str, list[Row]]]
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


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


# The table


def numberless(out: str) -> str:
    """Free memory, and speed, are others at each look."""
    return re.sub(r"[\d.,]+", "#", out)


def test_every_question_is_answered(look) -> None:
    found = look()
    machine = {"Python", "torch", "Folio", "device", "cores", "dtype", "float32", "compiler", "memory", "disk"}
    here = {"packages", *(f"extra {name}" for name in doctor.MEANS), "GPT-2 tokenizer", "GPT-2 weights", "data"}
    assert found.keys() == machine | here | {"network"}
    rows = [row for rows in found.values() for row in rows]
    assert {row.mark for row in rows} <= {"ok", "note", "lacks"}
    assert not [row for row in rows if row.mark == "ok" and row.mend]
    assert sys.version.split()[0] in found["Python"][0].finding
    assert all(f"{name} {metadata.version(name)}" in found["packages"][0].finding for name in ("torch", "numpy"))
    assert found["dtype"][0].finding.startswith(("float32", "bfloat16", "float16"))


def test_its_last_line_counts_the_rows(text) -> None:
    table, _, last = text().rstrip().rpartition("\n\n")
    marks = [line.split()[0] for line in table.splitlines() if not line.startswith(" ")]
    count = {mark: marks.count(mark) for mark in ("lacks", "note", "ok")}
    assert last == "{lacks} lacking, {note} to note, {ok} as it should be".format(**count)


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


def test_a_terminal_shows_colours(text, monkeypatch) -> None:
    plain = text()
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    coloured = text()
    assert "\x1b[" in coloured
    assert numberless(re.sub(r"\x1b\[[\d;]*m", "", coloured)) == numberless(plain)


def test_what_mends_is_a_command(look, monkeypatch, tmp_path) -> None:
    """Those of Python are this Python's, whatever else is on the path, and those of Folio have such flags."""
    monkeypatch.setattr(doctor, "CLONE", tmp_path)  # where no data set is
    (tmp_path / "python").symlink_to(sys.executable)  # of another environment, perhaps
    monkeypatch.setenv("PATH", str(tmp_path))
    absolute = [row.mend for rows in look().values() for row in rows if row.mend]
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    short = [row.mend for rows in look().values() for row in rows if row.mend]
    ours = [shlex.split(mend) for mend in (*absolute, *short) if " -m " in mend]
    assert {Path(shutil.which(words[0]) or "") for words in ours} == {Path(sys.executable)}
    assert {words[0] for words in ours} == {sys.executable, "python"}
    for words in ours:
        if words[2] == "folio":
            command = words[3]
            options = cli.module_of(command).Options
            cli.parse(options, words[4:], f"folio {command}", files=command == "plan")
    assert any(words[2:4] == ["folio", "prepare"] for words in ours)


# Questions without an answer


def test_a_probe_that_fails_is_a_row(look, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "0")
    found = look()
    assert found["device"] == [
        Row(
            "note",
            "device",
            "could not be found out: LOCAL_RANK is not set, but RANK, LOCAL_RANK, WORLD_SIZE, "
            "MASTER_ADDR, MASTER_PORT go together: use torchrun",
        )
    ]
    assert "dtype" not in found
    assert {"Python", "memory", "network", "data"} <= found.keys()


def test_a_folder_that_is_gone_is_a_row(look, tmp_path, monkeypatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    found = look()
    assert found["disk"][0].mark == "note"
    assert "No such file or directory" in found["disk"][0].finding
    assert {"device", "packages", "data"} <= found.keys()


def test_a_defect_is_not_hidden(text, monkeypatch) -> None:
    monkeypatch.setattr(doctor, "System", None)
    with pytest.raises(TypeError):
        text()


# The machine


def test_threads_that_are_held_back(one, monkeypatch) -> None:
    cores = len(os.sched_getaffinity(0))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert one("cores") == Row("ok", "cores", f"{cores}, of which torch uses 1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    if cores > 1:
        held = f"{cores}; OMP_NUM_THREADS=1 keeps torch to 1"
        assert one("cores") == Row("note", "cores", held, "unset OMP_NUM_THREADS")
    torch.set_num_threads(cores)
    assert one("cores").mark == "ok"


@no_gpu
def test_a_compiler_that_is_not_there(one, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("CXX", "xyzzy++")
    row = one("compiler")
    assert (row.mark, row.finding) == ("note", "xyzzy++ is missing: --compile=True would go on without")
    (tmp_path / "xyzzy++").write_text("#!/bin/sh\n")
    (tmp_path / "xyzzy++").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    assert one("compiler").finding.startswith(f"{tmp_path / 'Python.h'} is missing")
    (tmp_path / "Python.h").touch()
    assert one("compiler") == Row("ok", "compiler", "xyzzy++, used with --compile=True")


@no_gpu
@pytest.mark.parametrize(
    ("cuda", "visible", "words", "mend"),
    [
        (None, None, "torch is built without CUDA, so that the GPU is not used", "--force-reinstall torch"),
        ("13.0", "", "CUDA_VISIBLE_DEVICES= hides the GPU", "unset CUDA_VISIBLE_DEVICES"),
        ("13.0", None, "torch for CUDA 13.0 cannot use its driver", "nvidia-smi"),
    ],
    ids=["built for CPUs", "hidden", "old driver"],
)
def test_a_gpu_that_torch_does_not_use(one, monkeypatch, tmp_path, cuda, visible, words, mend) -> None:
    """A machine with a GPU has the driver's nvidia-smi."""
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    row = one("device")
    assert row.mark == "lacks"
    assert words in row.finding
    assert row.mend.endswith(mend)


@pytest.mark.gpu
def test_a_gpu_is_named_with_its_memory(look) -> None:
    found = look()
    assert len(found["device"]) == torch.cuda.device_count()
    for i, row in enumerate(found["device"]):
        assert f"cuda:{i}, {torch.cuda.get_device_name(i)}, " in row.finding
    assert found["float32"][0].finding == "products at precision high, in TF32"


@pytest.mark.parametrize(("content", "limit"), [("1000000000\n", 1e9), ("max\n", float("inf")), (None, float("inf"))])
def test_what_a_container_may_use(tmp_path, content, limit) -> None:
    if content:
        (tmp_path / "memory.max").write_text(content)
    assert shortage.container(tmp_path / "memory.max") == limit


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


# Data


def test_data_sets_as_they_lie(look, story, tmp_path, monkeypatch) -> None:
    clone = tmp_path / "clone"
    for folder in ("data/whole", "data/cut", "data/shakespeare", "data/unmade", "data/stdlib", "edu_fineweb10B"):
        (tmp_path / folder).mkdir(parents=True)
    (clone / "data" / "other").mkdir(parents=True)
    for file in story.iterdir():
        shutil.copy2(file, tmp_path / "data" / "whole")
    for split, count in zip(SPLITS, (5000, 700), strict=True):
        np.save(tmp_path / "edu_fineweb10B" / f"edufineweb_{split}_000001.npy", np.zeros(count, np.uint16))
        np.zeros(count, np.uint16).tofile(clone / "data" / "other" / f"{split}.bin")
        (tmp_path / "data" / "cut" / f"{split}.bin").write_bytes(b"123")
    (tmp_path / "data" / "shakespeare" / "train.bin").write_bytes(b"12")
    (tmp_path / "data" / "unmade" / "prepare.py").touch()
    (tmp_path / "data" / "stdlib" / UNFINISHED).mkdir()
    (clone / "data" / "openwebtext" / UNFINISHED).mkdir(parents=True)
    (tmp_path / "data" / "readme.md").touch()
    monkeypatch.setattr(doctor, "CLONE", clone)
    rows = {row.finding.split()[0].rstrip(":"): row for row in look()["data"]}
    sizes = {split: sum(file.tokens for file in open_folder(story).splits[split]) for split in SPLITS}
    assert rows.pop("data/whole").finding == f"data/whole: {sizes['train']:,} train and {sizes['val']:,} val tokens"
    assert rows.pop("edu_fineweb10B").finding == "edu_fineweb10B: 5,000 train and 700 val tokens"
    assert rows.pop(str(clone / "data" / "other")).mark == "ok"
    cut = rows.pop("data/cut/train.bin")
    assert (cut.mark, cut.mend) == ("lacks", "")
    assert "is cut short" in cut.finding
    lone = rows.pop("data/shakespeare/val.bin")
    assert lone.mark == "lacks"
    assert lone.mend.endswith(" -m folio prepare shakespeare --overwrite")
    half = rows.pop("data/stdlib")
    assert (half.mark, half.mend.split()[-2:]) == ("note", ["prepare", "stdlib"])
    away = clone / "data" / "openwebtext"
    assert rows.pop(str(away)).mend.endswith(f" -m folio prepare openwebtext --data_dir={away}")
    assert rows == {}


def test_a_data_set_of_the_clone_is_listed_once_in_it(look, story, tmp_path, monkeypatch) -> None:
    shutil.copytree(story, tmp_path / "data" / "story")
    monkeypatch.setattr(doctor, "CLONE", tmp_path)
    assert [row.finding.split(":")[0] for row in look()["data"]] == ["data/story"]


def test_no_data_set(one, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(doctor, "CLONE", tmp_path / "clone")
    row = one("data")
    assert row.mark == "lacks"
    assert row.mend.endswith(" -m folio prepare stdlib")
