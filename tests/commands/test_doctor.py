"""What is said of a machine, and of machines that lack something."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch

from folio import cli
from folio.commands import doctor
from folio.commands.doctor import Row
from folio.data.folders import open_folder
from folio.data.token_files import SPLITS, UNFINISHED
from folio.machine import probe

pytest_plugins = ["doctoring"]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


# The table


def numberless(out: str) -> str:
    """Free memory and speed change from call to call."""
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


def test_a_terminal_shows_colors(text, monkeypatch) -> None:
    plain = text()
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    colored = text()
    assert "\x1b[" in colored
    assert numberless(re.sub(r"\x1b\[[\d;]*m", "", colored)) == numberless(plain)


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
    cores = probe.cores()
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
    assert (row.mark, row.finding) == ("note", "xyzzy++ is missing: --compile=True would continue without it")
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
