"""Token files of every format that people have: read as they lie, or refused by name."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SMALL, STORY, Outcome
from numpy.typing import NDArray

from folio.config import Data
from folio.datasets.prepare import prepare
from folio.datasets.recipes import named_by_user
from folio.token_files import GPT2, Split, open_folder
from folio.tokens import Tokens

Ids = NDArray[np.integer[Any]]
Write = Callable[[Path, Ids], None]

IDS = np.arange(100, dtype=np.uint16)
MAGIC = {"uint16": 20240520, "uint32": 20240801}


def bare(path: Path, ids: Ids) -> None:
    """nanoGPT's file: the ids and nothing else."""
    ids.tofile(path)


def npy(path: Path, ids: NDArray[Any], version: tuple[int, int] = (1, 0)) -> None:
    """numpy's file, of any version of the format."""
    with path.open("wb") as file:
        np.lib.format.write_array(file, ids, version)


def headed(path: Path, ids: Ids) -> None:
    """llm.c's file: 256 int32 before the ids."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = MAGIC[ids.dtype.name], 1, len(ids)
    path.write_bytes(header.tobytes() + ids.tobytes())


def ds(path: Path, ids: Ids, tokenizer: str = "gpt2") -> None:
    """datatrove's file of documents of at most 10 tokens, with what lies beside it."""
    path.parent.mkdir(exist_ok=True)
    ids.tofile(path)
    ends = np.append(np.arange(10, len(ids), 10), len(ids))
    ends.astype("<u8").tofile(path.with_name(f"{path.name}.index"))
    path.with_name(f"{path.name}.metadata").write_text(f"{tokenizer}|{ids.dtype.itemsize}\n{len(ids)}\n{len(ids)}")


FORMATS: dict[str, tuple[Write, str, str, str]] = {
    "nanoGPT": (bare, "uint16", "train.bin", "val.bin"),
    "build-nanogpt": (
        npy,
        "uint16",
        "edufineweb_train_000001.npy edufineweb_train_000002.npy",
        "edufineweb_val_000000.npy",
    ),
    **{
        f"npy {dtype}": (npy, dtype, "train_000001.npy train_000002.npy", "val_000000.npy")
        for dtype in ("uint16", "uint32", "int32", "int64")
    },
    "npy 2.0": (partial(npy, version=(2, 0)), "uint16", "train_000001.npy", "val_000000.npy"),
    **{
        f"llm.c {dtype}": (headed, dtype, "fineweb_train_000001.bin fineweb_train_000002.bin", "fineweb_val_000000.bin")
        for dtype in MAGIC
    },
    "llm.c single": (headed, "uint16", "tiny_shakespeare_train.bin", "tiny_shakespeare_val.bin"),
    "datatrove by name": (ds, "uint16", "c4_train_00000.ds", "c4_validation_00000.ds"),
    **{f"datatrove {dtype}": (ds, dtype, "train/00000.ds train/00001.ds", "val/00000.ds") for dtype in MAGIC},
}


@pytest.mark.parametrize("by_glob", [False, True], ids=["folder", "glob"])
@pytest.mark.parametrize("case", FORMATS)
def test_each_format_is_read_as_it_lies(tmp_path: Path, case: str, by_glob: bool) -> None:
    """The files by name, their type, and every id that was written, in a folder and by a glob."""
    write, dtype, *lists = FORMATS[case]
    names: dict[Split, list[str]] = {"train": lists[0].split(), "val": lists[1].split()}
    random, top = np.random.default_rng(1), min(np.iinfo(dtype).max, 2**32)
    wrote = {name: random.integers(0, top, 60 + i, dtype) for i, name in enumerate(names["train"] + names["val"])}
    for name, ids in wrote.items():
        write(tmp_path / name, ids)
    pattern = Path(*["*"] * lists[1].count("/"), f"*{Path(lists[1]).suffix}") if by_glob else ""
    tokens = Tokens.open(Data(data_dir=str(tmp_path / pattern)), 8, 1337)
    for split in names:
        files = tokens.folders[0].splits[split]
        assert [file.path for file in files] == [tmp_path / name for name in names[split]]
        for file in files:
            assert file.map().dtype == dtype
            assert np.array_equal(file.map(), wrote[str(file.path.relative_to(tmp_path))])
        targets = tokens.windows(split, tokens.spread(split, 0))[:, 1:]
        assert np.array_equal(targets[targets >= 0], np.concatenate([wrote[name][1:] for name in names[split]]))
    assert tokens.tokenizer() == GPT2
    assert tokens.known_vocab_size is None


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of this program's: 20 kB of text as bytes, five shards."""
    folder = tmp_path_factory.mktemp("shards") / "story"
    prepare(named_by_user([str(STORY)], "story", tokenizer="bytes", shard_size=5000), folder)
    assert len(list(folder.glob("story_*_00000*.npy"))) == 5
    return folder


@pytest.mark.parametrize("place", ["", "*.bin"])
def test_nanogpts_meta_file(tmp_path: Path, place: str) -> None:
    """The characters of meta.pkl beside the files, by a glob as well."""
    bare(tmp_path / "train.bin", IDS)
    bare(tmp_path / "val.bin", IDS)
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 3, "itos": dict(enumerate("abc"))}))
    folder = open_folder(tmp_path / place)
    assert (folder.vocab_size, folder.eot) == (3, "none")
    assert folder.tokenizer == {"kind": "characters", "characters": "abc"}


@pytest.mark.parametrize("place", ["", "*.npy", "story_*_00000[012].npy"])
def test_this_programs_meta_file(shards: Path, place: str) -> None:
    """A glob that takes all shards or some of them knows their tokenizer too."""
    folder = open_folder(shards / place)
    assert (folder.vocab_size, folder.tokenizer) == (256, {"kind": "bytes"})
    assert len(folder.splits["train"]) == (2 if "[" in place else 4)
    text = b"".join(
        bytes(file.map()[:].astype(np.uint8)) for split in ("train", "val") for file in folder.splits[split]
    )
    assert text in STORY.read_bytes() if "[" not in place else text[:10_000] in STORY.read_bytes()


def test_a_folder_with_a_globs_letters(tmp_path: Path) -> None:
    """A folder's own name is no pattern."""
    folder = tmp_path / "wiki[en]*"
    folder.mkdir()
    for name in ("train.bin", "val.bin"):
        bare(folder / name, IDS)
    assert np.array_equal(Tokens.open(Data(data_dir=str(folder)), 8, 1).folders[0].splits["val"][0].map(), IDS)


# Files that datatrove itself wrote


def datatrove(path: Path, documents: list[list[int]], width: int) -> None:
    writer = pytest.importorskip("datatrove.pipeline.tokens.tokenizer").TokenizedFile(
        str(path.parent), path.name, tokenizer_name_or_path="gpt2", save_final_metadata=True, token_size=width
    )
    for document in documents:
        writer.write(document, None)
    writer.close()


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize(
    "names",
    [["00000_unshuffled.ds"], ["00000_a.ds", "00001_a.ds", "00002_a.ds"], ["train/0.ds", "train/1.ds", "val/0.ds"]],
    ids=["one", "several", "folders"],
)
def test_datatroves_own_files(tmp_path: Path, names: list[str], width: int) -> None:
    """By folder; else validation is whole documents, about the last tenth of the last file, and it is said."""
    random = np.random.default_rng(1)
    lengths = random.integers(1, 30, (len(names), 40))
    files = [[[*random.integers(0, 50_000, n).tolist(), 50256] for n in lengths[i]] for i in range(len(names))]
    for name, documents in zip(names, files, strict=True):
        datatrove(tmp_path / name, documents, width)
    folder = open_folder(tmp_path)
    read = {s: np.concatenate([f.map() for f in folder.splits[s]]).tolist() for s in ("train", "val")}
    *others, last = [[i for document in documents for i in document] for documents in files]
    before = [i for file in others for i in file]
    if "val/0.ds" in names:
        assert (read, folder.note) == ({"train": before, "val": last}, "")
        return
    ends = np.cumsum([len(document) for document in files[-1]])
    cut = min(ends.tolist(), key=lambda end: abs(end - 0.9 * len(last)))
    assert read == {"train": before + last[:cut], "val": last[cut:]}
    assert last[cut - 1] == 50256
    assert f"the last {len(last) - cut:,} tokens of {names[-1]} are for validation" in folder.note
    assert {file.map().dtype.itemsize for file in folder.splits["val"]} == {width}


def test_the_tokenizer_that_datatrove_names(tmp_path: Path) -> None:
    """GPT-2's by its names, a file of the tokenizers library where it lies here, else a name to remember."""
    library = pytest.importorskip("tokenizers")
    made = library.Tokenizer(library.models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    made.add_special_tokens(["</s>"])
    made.save(str(tmp_path / "words.json"))
    found = {}
    for name in ("gpt2", "openai-community/gpt2", "HuggingFaceTB/SmolLM-135M", str(tmp_path / "words.json")):
        ds(tmp_path / "one.ds", IDS, name)
        found[name] = open_folder(tmp_path)
    own, two, foreign, local = found.values()
    assert own.tokenizer is two.tokenizer is None
    assert foreign.tokenizer == {"kind": "datatrove", "name": "HuggingFaceTB/SmolLM-135M"}
    assert (local.tokenizer or {})["kind"] == "tokenizers"
    assert local.vocab_size == 2


# What is refused


def three(d: Path, write: Write = npy, suffix: str = ".npy", ids: Ids = IDS) -> None:
    """Two shards to train on and one to validate."""
    for name in ("train_000001", "train_000002", "val_000000"):
        write(d / f"{name}{suffix}", ids)


def cut(path: Path, size: int) -> None:
    os.truncate(path, size)


def garbled(d: Path, header: bytes) -> None:
    three(d)
    (d / "train_000002.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)


def relisted(d: Path, name: str) -> None:
    """Has meta.json list its first training shard under another name."""
    path = d / "meta.json"
    meta = json.loads(path.read_text())
    (d / meta["splits"]["train"]["files"][0]["name"]).rename(d / name)
    meta["splits"]["train"]["files"][0]["name"] = name
    path.write_text(json.dumps(meta))


def changed(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    later = path.with_name("meta.json").stat().st_mtime_ns + 1_000_000_000
    os.utime(path, ns=(later, later))


class Hostile:
    """Its pickle makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> object:
        return os.mkdir, (str(self.mark),)


def hostile(d: Path) -> None:
    """Makes d/mark if anything unpickles it."""
    three(d)
    np.save(d / "train_000002.npy", np.array([Hostile(d / "mark")], dtype=object), allow_pickle=True)


# what is done to an empty folder, and what the line says; None: the folder is a copy of this program's data set
FOREIGN: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "formats": (
        lambda d: (three(d), bare(d / "train.bin", IDS)),
        ["holds .bin and .npy files, train.bin, train_000001.npy", "--data_dir="],
    ),
    "types": (lambda d: (three(d), npy(d / "train_000002.npy", IDS.astype("<i4"))), ["train_000002.npy int32"]),
    "types of headed": (
        lambda d: (three(d, headed, ".bin"), headed(d / "val_000000.bin", IDS.astype("<u4"))),
        ["train_000001.bin holds uint16", "val_000000.bin uint32"],
    ),
    "some headers": (
        lambda d: (three(d, headed, ".bin"), bare(d / "train_000002.bin", IDS)),
        ["train_000002.bin has no header", "train_000001.bin has one"],
    ),
    "npy cut": (lambda d: (three(d), cut(d / "train_000002.npy", 228)), ["000002.npy: 50 tokens", "says 100"]),
    "npy cut in header": (lambda d: (three(d), cut(d / "train_000002.npy", 60)), ["000002.npy: not a .npy"]),
    "npy empty": (lambda d: (three(d), cut(d / "train_000002.npy", 0)), ["000002.npy: not a .npy"]),
    "npy open brace": (lambda d: garbled(d, b"{'descr': '<u2', 'shape': ("), ["000002.npy: not a .npy"]),
    "npy open quote": (lambda d: garbled(d, b"'''"), ["000002.npy: not a .npy"]),
    "npy of nothing": (lambda d: (three(d), npy(d / "val_000000.npy", IDS[:0])), ["val_000000.npy is empty"]),
    "npy of rows": (lambda d: (three(d), npy(d / "val_000000.npy", IDS.reshape(10, 10))), ["val_000000.npy", "2 dim"]),
    "npy of floats": (lambda d: (three(d), npy(d / "val_000000.npy", IDS / 2)), ["val_000000.npy", "float64"]),
    "npy of objects": (hostile, ["train_000002.npy", "object"]),
    "headed cut": (
        lambda d: (three(d, headed, ".bin"), cut(d / "val_000000.bin", 1124)),
        ["val_000000.bin: 50 tokens", "its header says 100"],
    ),
    "headed cut in header": (
        lambda d: [(headed(d / name, IDS), cut(d / name, 1000)) for name in ("train.bin", "val.bin")],
        ["train.bin", "cut short"],
    ),
    "bin of odd length": (lambda d: (three(d, bare, ".bin"), cut(d / "val_000000.bin", 99)), ["bin: 99 bytes"]),
    "bin empty": (lambda d: (three(d, bare, ".bin"), cut(d / "val_000000.bin", 0)), ["val_000000.bin is empty"]),
    "ds cut": (lambda d: (ds(d / "0.ds", IDS), cut(d / "0.ds", 150)), ["0.ds: 150 bytes for the 100 tokens"]),
    "ds empty": (lambda d: (ds(d / "0.ds", IDS), cut(d / "0.ds", 0)), ["0.ds: 0 bytes for the 100 tokens"]),
    "ds without index": (lambda d: (ds(d / "0.ds", IDS), (d / "0.ds.index").unlink()), ["0.ds.index is missing"]),
    "no train": (lambda d: (three(d), [p.unlink() for p in d.glob("train*")]), ["train is missing"]),
    "no val": (lambda d: (three(d, headed, ".bin"), (d / "val_000000.bin").unlink()), ["val is missing", "val_000000"]),
    "no val.bin": (lambda d: bare(d / "train.bin", IDS), ["val.bin is missing"]),
    "no names": (lambda d: npy(d / "tokens.npy", IDS), ["train is missing"]),
    "both names": (lambda d: npy(d / "train_without_val.npy", IDS), ["has both train and val in its name"]),
    "unfinished": (lambda d: (d / ".preparing").mkdir(), ["not finished", "prepare"]),
}
OWN: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "elsewhere": (lambda d: relisted(d, "../x.npy"), ["meta.json", "elsewhere"]),
    "shard missing": (lambda d: (d / "story_train_000003.npy").unlink(), ["story_train_000003.npy is missing"]),
    "shard changed": (lambda d: changed(d / "story_train_000003.npy"), ["000003.npy is not what its meta.json"]),
    "shard cut": (lambda d: cut(d / "story_train_000003.npy", 3000), ["000003.npy", "its header says 5,000"]),
    "shard another": (
        lambda d: npy(d / "story_train_000003.npy", IDS),
        ["000003.npy: 100 tokens, but its meta.json says 5,000"],
    ),
}
REMEDY = re.compile("prepare|--data_dir=|rename|give those of one|name a file|save_index=True")


def damaged(case: str, folder: Path, shards: Path) -> list[str]:
    if case in OWN:
        shutil.copytree(shards, folder)
    else:
        folder.mkdir()
    spoil, words = {**FOREIGN, **OWN}[case]
    spoil(folder)
    return words


@pytest.mark.parametrize("case", [*FOREIGN, *OWN])
def test_what_does_not_fit_is_refused(tmp_path: Path, shards: Path, case: str) -> None:
    """In one line that says which file, what about it and what to do."""
    words = damaged(case, tmp_path / "data", shards)
    with pytest.raises((ValueError, FileNotFoundError)) as refused:
        open_folder(tmp_path / "data")
    said = str(refused.value)
    assert "\n" not in said
    assert [word for word in [str(tmp_path), *words] if word not in said] == [], said
    assert REMEDY.search(said), f"no remedy: {said}"
    if case == "npy of objects":
        assert not (tmp_path / "data" / "mark").exists()
        np.load(tmp_path / "data" / "train_000002.npy", allow_pickle=True)
        assert (tmp_path / "data" / "mark").exists(), "a trusting reader would have run it"


TYPICAL = "formats,some headers,npy cut,npy open brace,npy of objects,ds without index,no val,unfinished,shard changed"


@pytest.mark.parametrize("case", [*TYPICAL.split(","), "elsewhere"])
def test_training_refuses_it_in_one_line(
    folio: Callable[..., Outcome], tmp_path: Path, shards: Path, case: str
) -> None:
    """Exit code 2, nothing is written, nothing has run."""
    damaged(case, tmp_path / "data", shards)
    outcome = folio("train", *SMALL, f"--data_dir={tmp_path / 'data'}", f"--out_dir={tmp_path / 'out'}")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1), outcome
    assert str(tmp_path / "data") in outcome.err
    assert REMEDY.search(outcome.err)
    assert "Traceback" not in outcome.out + outcome.err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "data" / "mark").exists()


# Memory


def resident() -> int:
    """Bytes of memory that this process has, files that it maps included."""
    return int(re.findall(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell memory in use")
@pytest.mark.parametrize("suffix", [".npy", ".bin"])
def test_no_shard_is_loaded_whole(tmp_path: Path, suffix: str) -> None:
    """Three gigabytes of shards, some rows of each: the process grows by some megabytes."""
    count = 500_000_000
    for name in ("train_000001", "train_000002", "val_000000"):
        path = (tmp_path / name).with_suffix(suffix)
        with path.open("wb") as file:
            if suffix == ".npy":
                described = {"descr": "<u2", "fortran_order": False, "shape": (count,)}
                np.lib.format.write_array_header_1_0(file, described)
            else:
                file.write(np.array([MAGIC["uint16"], 1, count, *[0] * 253], dtype="<i4").tobytes())
            file.truncate(file.tell() + 2 * count)
    before = resident()
    tokens = Tokens.open(Data(data_dir=str(tmp_path)), 1024, 1337)
    tokens.vocab_size = 1
    tokens.tell_documents_apart(0)
    rows = [tokens.rows("train", 10**6, 64), tokens.windows("val", tokens.spread("val", 16))]
    assert [len(tokens.fingerprint()["train"]), *map(len, rows)] == [32, 64, 16]
    shards = tokens._splits["train"][0]
    assert len(set(np.searchsorted(shards.starts, tokens.spread("train", 8), side="right").tolist())) == 2
    assert resident() - before < 64 * 2**20
