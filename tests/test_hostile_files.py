"""Files made to harm: refused in one line, in little time and memory; nothing is run, awaited or written elsewhere."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import struct
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import NO_POSIX, SMALL, STORY, Outcome, assert_refused, make_pipe, tree

from folio import files
from folio.data.tokenizers import byte_characters
from folio.preparation import sources
from folio.records import run_folder

resource = pytest.importorskip("resource", reason=NO_POSIX)

Folio = Callable[..., Outcome]
Make = Callable[[Path], object]


@pytest.fixture
def room(finished: Path, story: Path, items: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: a run, its data and texts, to be replaced by hostile files; ``outside`` must not change."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, tmp_path / "out")
    shutil.copytree(story, tmp_path / "data")
    shutil.copy(items, tmp_path / "items.jsonl")
    (tmp_path / "log.txt").write_text("mine")
    for name in ("model", "ckpt", "outside"):
        (tmp_path / name).mkdir()
    (tmp_path / "outside" / "precious").write_text("mine")
    return tmp_path


@contextmanager
def little(seconds: float = 8.0, gigabytes: float = 1.2) -> Iterator[None]:
    """Asserts that the code inside takes little time of a processor, and little memory."""
    begin, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.process_time() - begin < seconds
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < gigabytes * 2**30


def assert_harmless(folio: Folio, room: Path, *argv: object, words: tuple[object, ...] = ()) -> None:
    """The command is refused in one line with these words, at little cost, and ``outside`` is as before."""
    before = tree(room / "outside")
    with little():
        assert_refused(folio(*argv), *words)
    assert tree(room / "outside") == before


# What reads each file

RESUME = ("train", *SMALL, "--init_from=resume", "--max_iters=11", "--data_dir=data", "--out_dir=out")
READERS: dict[str, tuple[object, ...]] = {
    "out/config.json": RESUME,
    "out/metrics.jsonl": ("plot", "out"),
    "out/checkpoints/step-00000010/state.json": ("sample", "--out_dir=out", "--checkpoint=10", "--device=cpu"),
    "out/checkpoints/step-00000010/model.safetensors": ("sample", "--out_dir=out", "--checkpoint=10", "--device=cpu"),
    "out/checkpoints/step-00000010/optimizer.safetensors": ("import", "out", "--to=imported"),
    "data/meta.json": ("data", "info", "data"),
    "data/train.bin": ("data", "info", "data"),
    "bare/meta.pkl": ("data", "info", "bare"),
    "model/config.json": ("import", "model", "--to=imported"),
    "model/model.safetensors": ("import", "model", "--to=imported"),
    "model/model.safetensors.index.json": ("import", "model", "--to=imported"),
    "model/tokenizer.json": ("import", "model", "--to=imported"),
    "model/vocab.json": ("import", "model", "--to=imported"),
    "model/merges.txt": ("import", "model", "--to=imported"),
    "model/vocab.txt": ("import", "model", "--to=imported"),
    "model/tokenizer_config.json": ("import", "model", "--to=imported"),
    "model/special_tokens_map.json": ("import", "model", "--to=imported"),
    "model/added_tokens.json": ("import", "model", "--to=imported"),
    "ckpt/ckpt.pt": ("sample", "--out_dir=ckpt", "--device=cpu"),
    "ckpt/model.pt": ("import", "ckpt/model.pt", "--to=imported"),
    "config.py": ("train", "config.py", "--data_dir=data"),
    "config.toml": ("train", "config.toml", "--data_dir=data"),
    "config.json": ("train", "config.json", "--data_dir=data"),
    "items.jsonl": ("eval", "hellaswag", "--data=items.jsonl", "--out_dir=out", "--device=cpu"),
    "tokens.json": ("prepare", "data/input.txt", "--tokenizer=tokens.json", "--data_dir=new"),
    "text.txt": ("prepare", "text.txt", "--tokenizer=bytes", "--data_dir=new"),
    "text.jsonl": ("prepare", "text.jsonl", "--tokenizer=bytes", "--data_dir=new"),
    "prompt": ("sample", "--out_dir=out", "--start=FILE:prompt", "--device=cpu"),
    "new/.preparing/state.json": ("prepare", "data/input.txt", "--tokenizer=bytes", "--data_dir=new"),
}
JSON = [name for name in READERS if name.endswith((".json", ".jsonl")) and name != "text.jsonl"]


def lay(room: Path, name: str, make: Make) -> Path:
    """Puts a hostile file in the place of one that is read, with the other files that its reader needs."""
    path = room / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if name.startswith("model/"):
        small = {"model_type": "gpt2", "n_positions": 8, "n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": 300}
        (room / "model" / "config.json").write_text(json.dumps(small))
        if "index" not in name:
            (room / "model" / "model.safetensors").write_bytes(b"")
        if name.endswith("merges.txt"):
            (room / "model" / "vocab.json").write_text(json.dumps({c: b for b, c in byte_characters().items()}))
        if name.endswith(("vocab.json", "special_tokens_map.json", "added_tokens.json")):
            (room / "model" / "vocab.txt").write_text("[UNK]\na\n")
            (room / "model" / "merges.txt").write_text("a b\n")
    if name.startswith("bare/"):
        for split in ("train", "val"):
            np.arange(100, dtype=np.uint16).tofile(room / "bare" / f"{split}.bin")
    if not (room / "data" / "input.txt").exists():
        shutil.copy(STORY, room / "data" / "input.txt")
    if path.exists():
        path.unlink()
    make(path)
    return path


def pipe(path: Path) -> None:
    make_pipe(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def socket_file(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        here = os.open(path.parent, os.O_RDONLY)
        bound.bind(f"/proc/self/fd/{here}/{path.name}")  # a socket's whole path may have only 107 bytes
        os.close(here)


ENDLESS: dict[str, Make] = {"a pipe": pipe, "a device": device, "a socket": socket_file}


@pytest.mark.parametrize("kind", ENDLESS)
@pytest.mark.parametrize("name", READERS)
def test_nothing_is_awaited(folio: Folio, room: Path, name: str, kind: str) -> None:
    path = lay(room, name, ENDLESS[kind])
    assert_harmless(folio, room, *READERS[name], words=(path.name, kind))


def hole(path: Path) -> None:
    """A terabyte of zeros that takes no space."""
    with path.open("wb") as file:
        file.truncate(1 << 40)


def deep(path: Path) -> None:
    path.write_text('{"a":' * 100_000 + "1" + "}" * 100_000)


def deep_but_readable(path: Path) -> None:
    path.write_text('{"a":' * 200 + "1" + "}" * 200)


def many(path: Path) -> None:
    path.write_text("[" + "[]," * 5_000_000 + "[]]")


TEXTS: dict[str, Make] = {"a hole": hole, "deep": deep, "less deep": deep_but_readable, "many": many}


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("name", JSON)
def test_json_that_would_fill_memory(folio: Folio, room: Path, name: str, kind: str) -> None:
    path = lay(room, name, TEXTS[kind])
    if name == "out/metrics.jsonl":  # a line that is not a record is skipped, and no record is left
        with little(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert folio(*READERS[name]).code == 2
        return
    assert_harmless(folio, room, *READERS[name], words=(path.name,))


# Tensors


def header(value: object, rest: bytes = b"") -> bytes:
    raw = json.dumps(value).encode()
    return len(raw).to_bytes(8, "little") + raw + rest


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


SAFETENSORS: dict[str, bytes] = {
    "a header of 2**63 bytes": (2**63).to_bytes(8, "little") + b"{}",
    "a header of a gigabyte": (2**30).to_bytes(8, "little") + b"{}",
    "a header beyond the end": (500).to_bytes(8, "little") + b"{}",
    "fewer than eight bytes": b"\1",
    "a tensor beyond the end": header({"a": entry([2**20], 0, 2**22)}, bytes(8)),
    "a shape of 2**62": header({"a": entry([2**62], 0, 8)}, bytes(8)),
    "a shape that overflows": header({"a": entry([2**32, 2**32, 2**32], 0, 8)}, bytes(8)),
    "tensors that overlap": header({"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, bytes(8)),
    "a hole between tensors": header({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12)),
    "an unknown type": header({"a": entry([8], 0, 8, "F1")}, bytes(8)),
    "a type that torch lacks": header({"a": entry([8], 0, 4, "F4")}, bytes(4)),
    "a deep header": (200_000).to_bytes(8, "little") + b"[" * 200_000,
    "no JSON": (8).to_bytes(8, "little") + b"\xff" * 8,
    "a hundred thousand empty tensors": header({f"t{i}/x": entry([0], 0, 0) for i in range(100_000)}),
}


@pytest.mark.parametrize("kind", SAFETENSORS)
def test_safetensors_that_lie(folio: Folio, room: Path, kind: str) -> None:
    """In a model of Hugging Face, and in a checkpoint whose checksums fit, as an attacker would write it."""
    lay(room, "model/model.safetensors", lambda path: path.write_bytes(SAFETENSORS[kind]))
    assert_harmless(folio, room, *READERS["model/model.safetensors"], words=("model",))
    place = run_folder.checkpoint_folder(room / "out", 10)
    for name in (run_folder.MODEL, run_folder.OPTIMIZER):
        before = (place / name).read_bytes()
        (place / name).write_bytes(SAFETENSORS[kind])
        state, _ = files.read_sealed(place / run_folder.STATE)
        state["sha256"][name] = files.sha256(place / name)
        files.write_sealed(place / run_folder.STATE, state)
        assert_harmless(folio, room, "import", "out", "--to=imported", words=("step-00000010",))
        (place / name).write_bytes(before)


def test_a_checkpoint_that_grew_to_a_terabyte(folio: Folio, room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sparse file takes no room, but its checksum would take an hour."""
    monkeypatch.chdir(room)
    for name in (run_folder.MODEL, run_folder.OPTIMIZER):
        path = run_folder.checkpoint_folder(room / "out", 10) / name
        size = path.stat().st_size
        os.truncate(path, 1 << 40)
        assert_harmless(folio, room, "import", "out", "--to=imported", words=("step-00000010", name, "checksum"))
        os.truncate(path, size)


# Pickles and archives


def archived(pickled: bytes, **more: bytes) -> Make:
    def make(path: Path) -> None:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a/data.pkl", pickled)
            for name, content in more.items():
                archive.writestr(f"a/data/{name}", content)

    return make


def bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        archive.writestr("a/data.pkl", b"N.")
        with archive.open("a/data/0", "w", force_zip64=True) as record:
            for _ in range(1100):
                record.write(bytes(2**20))


def bomb_of_a_pickle(path: Path) -> None:
    archived(b"(" * (9 << 20) + b".")(path)


def many_records(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"N.")
        for i in range(60_000):
            archive.writestr(f"a/data/{i}", b"")


def saved(content: Any) -> Make:
    def make(path: Path) -> None:
        torch.save(content() if callable(content) else content, path)

    return make


def in_itself() -> dict[str, Any]:
    """A step that is a list with one item: itself."""
    endless: list[Any] = []
    endless.append(endless)
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 16, "vocab_size": 128, "bias": True}
    return {"model": {}, "model_args": shape, "iter_num": endless}


def expanded() -> dict[str, Any]:
    """A weight of one number that is expanded to a terabyte."""
    shape = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 16, "vocab_size": 128, "bias": True}
    return {"model": {"transformer.wte.weight": torch.ones(1).expand(1 << 38)}, "model_args": shape, "iter_num": 0}


def slow_keys(count: int) -> bytes:
    """An integer of a megabyte, which is hashed for each of ``count`` items that have it as their key."""
    number = b"\x8b" + (1 << 20).to_bytes(4, "little") + b"\x7f" * (1 << 20)
    return b"\x80\x04" + number + b"q\0" + b"0}" + b"h\0Ns" * count + b"."


PICKLES: dict[str, Make] = {
    "a number of a megabyte as a key": lambda path: path.write_bytes(slow_keys(1_500_000)),
    "millions of lists": lambda path: path.write_bytes(b"\x80\x04(" + b"]" * 4_900_000 + b"l."),
    "millions of dicts in each other": lambda path: path.write_bytes(b"\x80\x04" + b"]" * 4_900_000 + b"a" * 10 + b"."),
    "a text of eight megabytes, again and again": lambda path: path.write_bytes(
        b"\x80\x04X" + (6 << 20).to_bytes(4, "little") + b"a" * (6 << 20) + b"q\0" + b"h\0h\0\x86q\1" * 200_000 + b"."
    ),
}
ARCHIVES: dict[str, Make] = {
    "a zip bomb": bomb,
    "a bomb in the pickle": bomb_of_a_pickle,
    "many records": many_records,
    "a list in itself": saved(in_itself),
    "an expanded tensor": saved(expanded),
    "a key slow to hash": archived(slow_keys(1_500_000)),
    "a hole": hole,
    "a record that lies about its size": lambda path: path.write_bytes(_lying_archive()),
}


def _lying_archive() -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"N.")
    content = bytearray(held.getvalue())
    at = content.rindex(b"PK\x01\x02")
    content[at + 20 : at + 28] = struct.pack("<II", 2**31, 2**31)
    return bytes(content)


@pytest.mark.parametrize("kind", PICKLES)
def test_pickles_that_would_fill_memory(folio: Folio, room: Path, kind: str) -> None:
    path = lay(room, "bare/meta.pkl", PICKLES[kind])
    assert_harmless(folio, room, *READERS["bare/meta.pkl"], words=(path.name,))


@pytest.mark.parametrize("kind", ARCHIVES)
def test_archives_that_would_fill_memory(folio: Folio, room: Path, kind: str) -> None:
    path = lay(room, "ckpt/ckpt.pt", ARCHIVES[kind])
    assert_harmless(folio, room, *READERS["ckpt/ckpt.pt"], words=(path.name,))


# Names and links that lead elsewhere


def _meta(room: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = room / "data" / "meta.json"
    value = json.loads(path.read_text())
    change(value)
    files.write_sealed(path, value)


@pytest.mark.parametrize("name", ["..", "../outside/precious", "/etc/passwd", "", ".", "a\0b", "\ud800"])
def test_names_of_shards(folio: Folio, room: Path, name: str) -> None:
    """Files of such names are neither read nor, when the data set is made again, removed."""
    _meta(room, lambda meta: meta["splits"]["train"]["files"][0].update(name=name))
    assert_harmless(folio, room, "data", "info", "data", words=("data",))
    before = tree(room / "outside"), sorted(p.name for p in room.iterdir())
    shutil.copy(STORY, room / "data" / "input.txt")
    folio("prepare", "shakespeare_char", f"--source={STORY}", "--data_dir=data", "--overwrite")
    assert (tree(room / "outside"), sorted(p.name for p in room.iterdir())) == before


@pytest.mark.parametrize("entry", ["replaces", "names", "place"])
def test_names_in_an_unfinished_preparation(folio: Folio, room: Path, entry: str) -> None:
    """Of which only the moves are left: files are moved only from and to its own folders."""
    argv = ("prepare", "shakespeare_char", f"--source={STORY}", "--data_dir=new")
    assert folio(*argv).code == 0
    meta = json.loads((room / "new" / "meta.json").read_text())
    state = {"made": meta["made"], "block": sources.BLOCK, "meta": meta, "place": "", "replaces": []}
    match entry:
        case "replaces":
            state["replaces"] = ["../outside"]
        case "names":
            meta["splits"]["train"]["files"][0]["name"] = "../../outside/precious"
        case "place":
            state["place"] = "../../outside"
            meta["splits"]["train"]["files"][0]["name"] = "precious"
    shutil.rmtree(room / "new")
    (room / "new" / ".preparing").mkdir(parents=True)
    files.write_sealed(room / "new" / ".preparing" / "state.json", state)
    if entry != "place":
        assert_harmless(folio, room, *argv, words=(".preparing",))
    before = tree(room / "outside")
    folio(*argv)
    assert tree(room / "outside") == before


def test_a_tokenizer_elsewhere(folio: Folio, room: Path) -> None:
    (room / "ds").mkdir()
    for split in ("train", "val"):
        path = room / "ds" / f"{split}_0.ds"
        np.arange(100, dtype="<u2").tofile(path)
        np.array([100], dtype="<u8").tofile(f"{path}.index")
        Path(f"{path}.metadata").write_text("../outside/precious|2\n")
    assert_harmless(folio, room, "data", "info", "ds", words=("../outside/precious",))


@pytest.mark.parametrize(
    "name",
    ["metrics.jsonl", "log.txt", "checkpoints", "tensorboard", ".previous.unfinished", ".folio.lock"],
)
def test_links_out_of_a_run(folio: Folio, room: Path, name: str) -> None:
    """A run neither writes through a link nor moves the files that it leads to."""
    path = room / "out" / name
    files.remove(path)
    files.remove(room / "elsewhere")
    shutil.copytree(room / "outside", room / "elsewhere")
    path.symlink_to("../outside/precious" if "." in name[1:] and name != ".previous.unfinished" else "../outside")
    for begin in ("resume", "scratch"):
        argv = [*RESUME, "--log_txt=True", f"--init_from={begin}"]
        before = tree(room / "outside")
        with little(20):
            outcome = folio(*argv)
        assert tree(room / "outside") == before
        assert outcome.code in (0, 2), outcome
        assert path.is_symlink() or outcome.code == 0


@pytest.mark.parametrize(
    "name", [".best.json.unfinished", ".config.json.unfinished", "checkpoints/.step-00000011.unfinished"]
)
def test_links_in_the_place_of_unfinished_files(folio: Folio, room: Path, name: str) -> None:
    (room / "out" / name).symlink_to(room / "outside" / ("precious" if name.startswith(".") else ""))
    before = tree(room / "outside")
    assert folio(*RESUME).code == 0
    assert tree(room / "outside") == before


@pytest.mark.parametrize("name", ["", "train.bin", "divided"])
def test_links_out_of_a_preparation(folio: Folio, room: Path, name: str) -> None:
    work = room / "new" / ".preparing"
    work.parent.mkdir()
    if name:
        work.mkdir()
    (work / name if name else work).symlink_to(room / "outside" / ("precious" if "." in name else ""))
    before = tree(room / "outside")
    folio("prepare", str(STORY), "--tokenizer=bytes", "--data_dir=new")
    assert tree(room / "outside") == before
