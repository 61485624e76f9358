"""Token files of every format that people have: read as they lie, or refused by name."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SMALL, STORY, Outcome, assert_refused
from numpy.typing import NDArray

from folio.config.options import Data
from folio.data.folders import open_folder
from folio.data.rows import Tokens
from folio.data.token_files import GPT2, Split
from folio.data.tokenizers import IDS_ONLY
from folio.preparation.job import prepare
from folio.preparation.recipes import named_by_user

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
    assert (folder.vocab_size, folder.tokenizer, folder.note) == (256, {"kind": "bytes"}, "")
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
        ["holds several data sets (train_000001.npy, train.bin)", "--data_dir=", "/*.npy'"],
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
    tokens, _ = replace(tokens, vocab_size=1).with_documents(0)
    rows = [tokens.rows("train", 10**6, 64), tokens.windows("val", tokens.spread("val", 16))]
    assert [len(tokens.fingerprint()["train"]), *map(len, rows)] == [32, 64, 16]
    shards = tokens._splits["train"][0]
    assert len(set(np.searchsorted(shards.starts, tokens.spread("train", 8), side="right").tolist())) == 2
    assert resident() - before < 64 * 2**20


# Which files of a folder are the data


def lay(folder: Path, names: str, ids: Ids = IDS) -> None:
    """Files of the format that each name says, all of the same ids."""
    for name in names.split(","):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        {".npy": npy, ".ds": ds}.get(path.suffix, bare)(path, ids)


PAIR, SHARDS = "train.bin,val.bin", "edufineweb_train_000001.npy,edufineweb_train_000002.npy,edufineweb_val_000000.npy"

# the data set, what lies beside it, and what the line says of that
BESIDE: dict[str, tuple[str, str, str]] = {
    "mask": (PAIR, "train_mask.bin", "left alone: train_mask.bin"),
    "copies": (PAIR, "old_train.bin,train (1).bin,train_copy.bin,val2.bin", "left alone: old_train.bin, train (1).bin"),
    "both words": (PAIR, "train_val.bin", "left alone: train_val.bin"),
    "shards beside nanoGPT's": (PAIR, SHARDS, "left alone: edufineweb_train_000001.npy"),
    "nanoGPT's own shards": (PAIR, "train_000001.bin", "left alone: train_000001.bin"),
    "backup": (PAIR, "train.bin.bak", ""),
    "mask of a shard": (SHARDS, "edufineweb_train_mask_000001.npy", "left alone: edufineweb_train_mask_000001.npy"),
    "copy of a shard": (SHARDS, "edufineweb_train_000001 (1).npy", "left alone: edufineweb_train_000001 (1).npy"),
    "half another family": (SHARDS, "tiny_train_000001.npy", "left alone: tiny_train_000001.npy"),
    "no split": (SHARDS, "embeddings.npy,a.bin,b.bin,c.bin", "left alone: a.bin, b.bin, c.bin and 1 more"),
    "GPT-from-scratch": ("train_000001.npy,val_000000.npy", "train_lengths_000001.npy", "train_lengths_000001.npy"),
    "of": ("t-train-00000-of-00002.npy,t-train-00001-of-00002.npy,t-val-00000-of-00001.npy", "", ""),
    "number first": ("0_train.npy,1_train.npy,2_val.npy", "fold_1_train.npy", "left alone: fold_1_train.npy"),
    "datatrove": ("train/0_a.ds,train/1_a.ds,val/0_a.ds", "val/0_b.ds", "left alone: 0_b.ds"),
    "gap": ("train_000001.npy,train_000003.npy,val_000000.npy", "", "1 shard is missing from the sequence: 2"),
    "large gap": (
        "train_1.npy,train_4000000000.npy,val_0.npy",
        "",
        "3,999,999,998 shards are missing from the sequence: 2, 3",
    ),
    "fewer than of": (
        "train-0-of-3.npy,train-1-of-3.npy,val-0-of-1.npy",
        "",
        "1 shard is missing from the sequence: 2",
    ),
    "validation between": ("train_0.npy,train_2.npy,val_1.npy", "", ""),
    "each counted": ("train_0.npy,train_1.npy,val_0.npy,val_2.npy", "", "1 shard is missing from the sequence: 1"),
}


@pytest.mark.parametrize("case", BESIDE)
def test_one_data_set_is_taken_and_the_rest_named(tmp_path: Path, case: str) -> None:
    """nanoGPT's two names, else one family of shards; all else is left alone, in one line that names it."""
    own, beside, words = BESIDE[case]
    lay(tmp_path, own)
    if beside:
        lay(tmp_path, beside, IDS[::-1])
    folder = open_folder(tmp_path)
    taken = [file.path for split in ("train", "val") for file in folder.splits[split]]
    assert sorted(taken) == sorted(tmp_path / name for name in own.split(","))
    assert words in folder.note
    assert "\n" not in folder.note
    assert bool(words) == bool(folder.note)


AMBIGUOUS: dict[str, tuple[str, str]] = {
    "two families": (f"{SHARDS},tiny_train_1.npy,tiny_val_0.npy", "/edufineweb_*.npy'"),
    "versions": ("o_v1_train.bin,o_v1_val.bin,o_v2_train.bin,o_v2_val.bin", "/o_v1_*.bin'"),
    "shuffled": ("00000_shuffled.ds,00000_unshuffled.ds", "/*_shuffled.ds'"),
    "half of nanoGPT's": (f"{SHARDS},train.bin", "/edufineweb_*.npy'"),
    "padding": ("train_1.npy,train_000001.npy,val_0.npy", "cannot both be in one data set"),
    "whole and shards": ("train.npy,train_000001.npy,val.npy", "cannot both be in one data set"),
    "two words": ("train.npy,val.npy,validation.npy", "cannot both be in one data set"),
    "two stems": ("tiny_train.bin,owt_val.bin", "not of one data set"),
}


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_where_it_is_not_clear_which_are_meant(tmp_path: Path, case: str) -> None:
    """It is refused; a glob that the line names is then read."""
    names, words = AMBIGUOUS[case]
    lay(tmp_path, names)
    with pytest.raises(ValueError, match=r"glob") as refused:
        open_folder(tmp_path)
    assert words in str(refused.value)
    if named := re.search(r"--data_dir='(.*)'", str(refused.value)):
        assert open_folder(Path(named[1])).note in (
            "",
            f"{named[1]}: the last 10 tokens of 00000_shuffled.ds are for validation",
        )


def test_a_glob_means_every_file_that_it_finds(tmp_path: Path) -> None:
    """Of several families too, which one line says; those of no split are left alone."""
    lay(tmp_path, f"{SHARDS},tiny_train_1.npy,tiny_val_0.npy,x.npy")
    folder = open_folder(tmp_path / "*.npy")
    assert [len(folder.splits[split]) for split in ("train", "val")] == [3, 2]
    assert "several names are used as one data set: edufineweb_*.npy, tiny_*.npy" in folder.note
    assert "left alone: x.npy" in folder.note
    assert open_folder(tmp_path / "tiny_*").note == ""


def test_a_glob_of_listed_and_other_files(shards: Path, tmp_path: Path) -> None:
    """meta.json says of some of them what they are, and of others nothing."""
    folder = shutil.copytree(shards, tmp_path / "data")
    npy(folder / "story_train_mask.npy", IDS)
    found = open_folder(folder)
    assert (found.tokenizer, len(found.splits["train"])) == ({"kind": "bytes"}, 4)
    assert "left alone: story_train_mask.npy" in found.note
    with pytest.raises(ValueError, match=r"story_train_mask\.npy is not in .*meta\.json"):
        open_folder(folder / "*.npy")


def test_a_glob_of_a_wide_data_set(shards: Path, tmp_path: Path) -> None:
    """Its meta.json says the type, so that nothing is guessed; and what else there is to say."""
    folder = shutil.copytree(shards, tmp_path / "data")
    meta = json.loads((folder / "meta.json").read_text())
    for split in ("train", "val"):
        for file in meta["splits"][split]["files"]:
            path = folder / file["name"]
            np.load(path).astype(np.uint32).tofile(path.with_suffix(".bin"))
            path.unlink()
            file["name"] = path.with_suffix(".bin").name
    (folder / "meta.json").write_text(json.dumps(meta | {"dtype": "uint32"}))
    for place in (folder, folder / "*.bin", folder / "*_00000[012].bin"):
        found = open_folder(place, "uint32")
        assert found == open_folder(place)
        assert (found.tokenizer, found.splits["train"][0].dtype) == ({"kind": "bytes"}, np.uint32)
    with pytest.raises(FileNotFoundError, match=r"val is missing"):
        open_folder(folder / "*train*")


def test_training_names_what_it_leaves_alone(folio: Callable[..., Outcome], tmp_path: Path) -> None:
    """A mask beside the ids changes no loss, and is named; so it is by data info."""
    lay(tmp_path / "alone", PAIR)
    lay(tmp_path / "beside", f"{PAIR}")
    lay(tmp_path / "beside", "train_mask.bin", IDS % 2)
    losses = []
    for name in ("alone", "beside"):
        out = f"--out_dir={tmp_path / 'out' / name}"
        code, said, err = folio("train", *SMALL, "--max_iters=2", f"--data_dir={tmp_path / name}", out)
        assert (code, err) == (0, "")
        assert ("left alone: train_mask.bin" in said) == (name == "beside")
        losses.append(re.findall(r"iter \d+: loss ([\d.]+)", said))
    assert losses[0] == losses[1] != []
    assert "left alone: train_mask.bin" in folio("data", "info", tmp_path / "beside").out


# The type of files that do not say it

RANDOM = np.random.default_rng(1)
TEXT = np.frombuffer(STORY.read_bytes(), dtype=np.uint8)[:9000]
LETTERS = np.unique(TEXT, return_inverse=True)[1]
MANY = np.minimum(50256, RANDOM.zipf(1.2, 9000))
LABELS = np.where(np.arange(9000) % 7, MANY, -100)

# the ids, the type that they are written in, and the option's value that the line names
OTHER: dict[str, tuple[NDArray[Any], str, str]] = {
    "uint32": (MANY, "<u4", "uint32"),
    "int64": (MANY, "<i8", "int64"),
    "uint32 of characters": (LETTERS, "<u4", "uint32"),
    "int32": (LABELS, "<i4", "int32"),
    "int64 with labels": (LABELS, "<i8", "int64"),
    "a wide vocabulary": (RANDOM.integers(0, 151_936, 9000), "<u4", "uint32"),
    "few": (LETTERS[:30], "<u4", "uint32"),
    "bytes": (TEXT, "u1", "uint8"),
    "characters in bytes": (LETTERS, "u1", "uint8"),
    "few bytes": (TEXT[:300], "u1", "uint8"),
}


@pytest.mark.parametrize("case", OTHER)
def test_another_type_is_refused_until_it_is_said(folio: Callable[..., Outcome], tmp_path: Path, case: str) -> None:
    """One line names the option; with it, the ids are those that were written, and training takes them."""
    ids, dtype, name = OTHER[case]
    lay(tmp_path, PAIR, ids.astype(dtype))
    outcome = folio("data", "info", tmp_path)
    assert_refused(outcome, tmp_path / "train.bin", f"seems to hold {name}", f"--token_dtype={name}")
    found = open_folder(tmp_path, name)  # type: ignore[arg-type]
    assert np.array_equal(found.splits["train"][0].map(), ids)
    assert open_folder(tmp_path, "uint16").splits["val"][0].tokens == ids.astype(dtype).nbytes // 2
    if case == "uint32":
        (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 50257}))
        out = f"--out_dir={tmp_path / 'out'}"
        refused = folio("train", *SMALL, f"--data_dir={tmp_path}", out)
        assert_refused(refused, "--token_dtype=uint32")
        code, _, err = folio("train", *SMALL, "--max_iters=1", f"--data_dir={tmp_path}", out, "--token_dtype=uint32")
        assert (code, err) == (0, "")
        code, _, err = folio("train", "--init_from=resume", "--max_iters=2", out)
        assert (code, err) == (0, "")
        assert folio("eval", out, "--eval_iters=1").code == 0
        assert folio("plan", f"--data_dir={tmp_path}", "--token_dtype=uint32").code == 0


@pytest.mark.parametrize("dtype", [">u2", ">u4", ">i8", "<f4", "<f8"])
@pytest.mark.parametrize("ids", [MANY, LETTERS], ids=["many", "characters"])
def test_types_that_are_not_read(tmp_path: Path, dtype: str, ids: Ids) -> None:
    """The line names what makes them fit, and it does."""
    lay(tmp_path, PAIR, ids.astype(dtype))
    with pytest.raises(ValueError, match=r"train\.bin seems to hold .*, which is not read") as refused:
        open_folder(tmp_path)
    remedy = re.search(r"np.fromfile\(FILE, '(.*?)'\)\.astype\('(.*?)'\)\.tofile", str(refused.value))
    assert remedy
    for name in PAIR.split(","):
        np.fromfile(tmp_path / name, remedy[1]).astype(remedy[2]).tofile(tmp_path / name)
    said = "uint32" if "--token_dtype=uint32" in str(refused.value) else "auto"
    assert np.array_equal(open_folder(tmp_path, said).splits["train"][0].map(), ids)  # type: ignore[arg-type]


ORDINARY: dict[str, NDArray[Any]] = {
    "words": MANY,
    "characters": LETTERS,
    "bytes": TEXT,
    "bases": RANDOM.integers(0, 4, 9000),
    "bits": RANDOM.integers(0, 2, 9000),
    "one": np.full(9000, 512),
    "zeros": np.zeros(9000),
    "nearly zeros": np.eye(1, 9000)[0],
    "all of 16 bits": RANDOM.integers(0, 2**16, 90_000),
    "counting": np.arange(9000),
    "few": np.array([5, 0, 7, 0, 9, 1]),
}


@pytest.mark.parametrize("case", ORDINARY)
def test_uint16_stays_uint16(tmp_path: Path, case: str) -> None:
    """Ids below 256, in which every second byte is zero, and data that is odd in itself."""
    lay(tmp_path, PAIR, ORDINARY[case].astype("<u2"))
    assert open_folder(tmp_path).splits["train"][0].dtype == np.uint16


def test_zeros_in_every_second_place_can_be_meant(tmp_path: Path) -> None:
    """They are refused, and read once they are said to be uint16."""
    lay(tmp_path, PAIR, np.stack([LETTERS[:900], np.zeros(900)], axis=1).ravel().astype("<u2"))
    with pytest.raises(ValueError, match="--token_dtype=uint16"):
        open_folder(tmp_path)
    assert open_folder(tmp_path, "uint16").splits["train"][0].tokens == 1800


def test_what_a_meta_file_bounds(tmp_path: Path) -> None:
    """Ids that are in the vocabulary as another type, and not as uint16; a vocabulary that uint16 cannot hold."""
    size = int(LETTERS.max()) + 1
    for ids, vocab_size, words in (
        (LETTERS.astype("u1"), size, "uint8"),
        (LETTERS[:40].astype(">u2"), size, "big-endian"),
        (MANY.astype("<u2"), 100_277, "100,277 token ids, for which nanoGPT's uint16 is too narrow"),
    ):
        lay(tmp_path, PAIR, ids)
        (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": vocab_size}))
        with pytest.raises(ValueError, match=words):
            open_folder(tmp_path)


def test_val_of_another_type_than_train(tmp_path: Path) -> None:
    lay(tmp_path, "train.bin", LETTERS.astype("<u2"))
    lay(tmp_path, "val.bin", LETTERS.astype("<u4"))
    with pytest.raises(ValueError, match=r"val\.bin seems to hold uint32, and train\.bin uint16: write them again"):
        open_folder(tmp_path)


@pytest.mark.parametrize("write", [headed, npy, ds])
def test_the_option_does_not_overrule_what_a_file_says(tmp_path: Path, write: Write, shards: Path) -> None:
    suffix = {headed: ".bin", npy: ".npy", ds: ".ds"}[write]
    for name in ("x_train_0", "x_val_0"):
        write(tmp_path / f"{name}{suffix}", IDS)
    assert open_folder(tmp_path, "uint16").splits["train"][0].tokens == 100
    with pytest.raises(ValueError, match=r"token_dtype=uint32: .* states its own type, uint16"):
        open_folder(tmp_path, "uint32")
    with pytest.raises(ValueError, match=r"token_dtype=int64: .*meta\.json states the type of its files, uint16"):
        open_folder(shards, "int64")


# nanoGPT's meta.pkl

ITOS = dict(enumerate("abc"))
SIZES: dict[str, tuple[Any, int, str | None]] = {
    "characters": ({"vocab_size": 3, "itos": ITOS}, 3, "abc"),
    "a list": ({"vocab_size": 3, "itos": ["a", "b", "c"]}, 3, "abc"),
    "numpy": ({"vocab_size": np.int64(3), "itos": {np.int32(i): np.str_(c) for i, c in ITOS.items()}}, 3, "abc"),
    "arrays": ({"vocab_size": np.array([3]), "itos": np.array(["a", "b", "c"])}, 3, "abc"),
    "a whole float": ({"vocab_size": 3.0, "source": Path("input.txt"), "seen": {1, 2}}, 3, None),
    "the size alone": ({"vocab_size": 3}, 3, None),
    "words": ({"vocab_size": 3, "itos": {0: "the", 1: "cat", 2: "."}}, 3, None),
    "a word among characters": ({"vocab_size": 3, "itos": {0: "a", 1: "b", 2: "[PAD]"}}, 3, None),
    "too few": ({"vocab_size": 3, "itos": {0: "a"}}, 3, None),
    "two alike": ({"vocab_size": 3, "itos": dict(enumerate("aba"))}, 3, None),
    "half a pair": ({"vocab_size": 3, "itos": dict(enumerate("ab\ud800"))}, 3, None),
    "keys of text": ({"vocab_size": 3, "itos": {"0": "a", "1": "b", "2": "c"}}, 3, None),
    "merges": ({"vocab_size": 3, "merges": {(97, 98): 256}}, 3, None),
}


@pytest.mark.parametrize("protocol", [0, 4, 5])
@pytest.mark.parametrize("case", SIZES)
def test_what_meta_pkl_says(tmp_path: Path, case: str, protocol: int) -> None:
    """How many ids there are, which is all that training needs; and the characters where each id has one."""
    value, size, found = SIZES[case]
    try:
        content = pickle.dumps(value, protocol)
    except UnicodeEncodeError:
        content = pickle.dumps(value, 0)
    lay(tmp_path, PAIR, IDS % 3)
    (tmp_path / "meta.pkl").write_bytes(content)
    folder = open_folder(tmp_path)
    assert folder.vocab_size == size
    assert folder.tokenizer == ({"kind": "characters", "characters": found} if found else IDS_ONLY)
    assert ("not what they mean" in folder.note) == (found is None)


def test_a_run_on_ids_alone(folio: Callable[..., Outcome], tmp_path: Path) -> None:
    """It trains and is evaluated; sampling says in one line why there is no text."""
    lay(tmp_path, PAIR, IDS % 3)
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": np.int64(3)}))
    out = f"--out_dir={tmp_path / 'out'}"
    code, said, err = folio("train", *SMALL, "--max_iters=2", f"--data_dir={tmp_path}", out)
    assert (code, err) == (0, "")
    assert "found vocab_size = 3" in said
    assert "meta.pkl says how many token ids there are, but not what they mean" in said
    assert_refused(folio("sample", out, "--device=cpu"), "nothing says what")
    refused = folio("train", *SMALL, "--sample_interval=1", f"--data_dir={tmp_path}", f"--out_dir={tmp_path / 'two'}")
    assert_refused(refused, "nothing says what")
    code, said, err = folio("eval", out, "--eval_iters=1", "--device=cpu")
    assert (code, err) == (0, "")
    assert "nats per token" in said
    assert "tokenizer   not said" in folio("data", "info", tmp_path).out


# Files that never end, or are of no program's kind

META: dict[str, tuple[Any, str]] = {
    "deep": ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
    "deep below a key": ('{"made": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
    "infinite": ({"text_bytes": "1e999"}, "1e999 is not a finite number"),
    "many ids": ({"vocab_size": "1e12"}, "vocab_size=1,000,000,000,000 is not a whole number from 1 to 65,536"),
    "half an id": ({"vocab_size": "64.5"}, "vocab_size"),
    "truth": ({"vocab_size": "true"}, "vocab_size=bool"),
    "a huge number": ({"vocab_size": "9" * 4000}, "vocab_size=int"),
    "dtype a list": ({"dtype": '["uint16"]'}, "dtype"),
    "dtype of objects": ({"dtype": '"O"'}, "dtype"),
    "eot a dict": ({"eot": "{}"}, "eot"),
    "documents text": ({"text_bytes": '"many"'}, "text_bytes=str"),
    "skipped a list": ({"skipped": "[1, 2]"}, "meta.json"),
    "skipped text": ({"skipped": '{"too long": "a few"}'}, "skipped too long=str"),
}


@pytest.mark.parametrize("case", META)
def test_an_odd_meta_json(folio: Callable[..., Outcome], shards: Path, tmp_path: Path, case: str) -> None:
    """One line, by training and by data info."""
    folder = shutil.copytree(shards, tmp_path / "data")
    change, words = META[case]
    path = folder / "meta.json"
    if isinstance(change, dict):
        ((key, value),) = change.items()
        change = json.dumps(json.loads(path.read_text()) | {key: "HERE"}).replace('"HERE"', value)
    path.write_text(change)
    for argv in (("data", "info", folder), ("train", *SMALL, f"--data_dir={folder}", f"--out_dir={tmp_path / 'out'}")):
        assert_refused(folio(*argv), path, words)
    assert not (tmp_path / "out").exists()


KINDS: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["train.bin", "val.bin", "meta.pkl", "meta.json", "x_train_0.npy", "0.ds.metadata"])
def test_what_is_no_file(folio: Callable[..., Outcome], tmp_path: Path, name: str, kind: str) -> None:
    """It is neither waited for, nor read without end, nor passed over."""
    lay(tmp_path, {".npy": "x_train_0.npy,x_val_0.npy", ".metadata": "0.ds"}.get(Path(name).suffix, PAIR))
    (tmp_path / name).unlink(missing_ok=True)
    KINDS[kind](tmp_path / name)
    outcome = folio("train", *SMALL, f"--data_dir={tmp_path}", f"--out_dir={tmp_path / 'out'}")
    assert_refused(outcome, tmp_path / name, kind if kind != "a link to" or name != "0.ds.metadata" else "No such file")
    assert not (tmp_path / "out").exists()


def described(path: Path, header: bytes, version: int = 2) -> None:
    path.write_bytes(b"\x93NUMPY" + bytes([version, 0]) + len(header).to_bytes(4, "little") + header)


HEADERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a huge array": (
        lambda p: described(p, b"{'descr': '<u2', 'fortran_order': False, 'shape': (1000000000000000000,), }\n"),
        "empty",
    ),
    "fewer than none": (
        lambda p: (described(p, b"{'descr': '<u2', 'fortran_order': False, 'shape': (-5,), }\n"), grown(p)),
        "its header says -5",
    ),
    "a header of megabytes": (lambda p: described(p, b" " * (8 << 20)), "not a .npy file"),
    "a header that is deep": (lambda p: described(p, b"-" * 9000 + b"1"), "not a .npy file"),
    "booleans": (lambda p: npy(p, IDS > 5), "an array of bool"),
    "a struct": (lambda p: npy(p, np.zeros(9, dtype=[("id", "<u2")])), "not a row of token ids"),
    "dates": (lambda p: npy(p, np.zeros(9, dtype="M8[s]")), "not a row of token ids"),
}


def grown(path: Path) -> None:
    path.write_bytes(path.read_bytes() + bytes(1000))


@pytest.mark.parametrize("case", HEADERS)
def test_an_odd_npy_header(tmp_path: Path, case: str) -> None:
    npy(tmp_path / "x_val_0.npy", IDS)
    write, words = HEADERS[case]
    write(tmp_path / "x_train_0.npy")
    with pytest.raises(ValueError, match=words) as refused:
        open_folder(tmp_path)
    assert str(tmp_path / "x_train_0.npy") in str(refused.value)
    assert "\n" not in str(refused.value)


def llmc(*head: int) -> bytes:
    return np.array([*head, *[0] * (256 - len(head))], dtype="<i4").tobytes() + IDS.tobytes()


BINS: dict[str, tuple[bytes, str]] = {
    "another version": (llmc(20240520, 2, 100), "version 2, and only 1 can be read"),
    "a version of uint32": (llmc(20240801, 3, 50), "version 3, and only 1 and 7"),
    "a larger count": (llmc(20240520, 1, 101), "its header says 101: it is cut short"),
    "a smaller count": (llmc(20240520, 1, 99), "its header says 99: it holds more than that"),
    "a negative count": (llmc(20240520, 1, -1), "its header says -1"),
    "a model of llm.c's": (llmc(20240326, 3, 100), "another kind of llm.c's files"),
    "HellaSwag of llm.c's": (llmc(20240522, 1, 100), "another kind of llm.c's files"),
    "lit-gpt's": (b"LITPKDS" + bytes(1000), "is lit-gpt's"),
    "zip": (b"PK\x03\x04" + bytes(1000), "is a zip file"),
    "npy": (b"\x93NUMPY\x01\x00" + bytes(1000), "is a .npy file"),
}


@pytest.mark.parametrize("case", BINS)
def test_a_bin_file_with_another_header(tmp_path: Path, case: str) -> None:
    content, words = BINS[case]
    for name in ("x_train_0.bin", "x_val_0.bin"):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        open_folder(tmp_path)


def test_llama_3s_version(tmp_path: Path) -> None:
    """llm.c writes version 7 before uint32."""
    for name in ("x_train_0.bin", "x_val_0.bin"):
        (tmp_path / name).write_bytes(llmc(20240801, 7, 50))
    assert open_folder(tmp_path).splits["train"][0].tokens == 50


INDEXES: dict[str, tuple[Any, str]] = {
    "backwards": ([60, 40, 100], "ends before the one that it follows"),
    "another end": ([10, 99], "200 bytes for the 99 tokens"),
    "beyond": ([10, 2**63], "200 bytes for the 9,223,372,036,854,775,808 tokens"),
    "none": ([0], "200 bytes for the 0 tokens"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_an_index_that_does_not_fit(tmp_path: Path, case: str) -> None:
    ds(tmp_path / "0.ds", IDS)
    ends, words = INDEXES[case]
    np.array(ends, dtype="<u8").tofile(tmp_path / "0.ds.index")
    with pytest.raises(ValueError, match=words):
        open_folder(tmp_path)


def test_an_index_that_is_cut(tmp_path: Path) -> None:
    ds(tmp_path / "0.ds", IDS)
    cut(tmp_path / "0.ds.index", 77)
    with pytest.raises(ValueError, match=r"0\.ds\.index: 77 bytes are not a multiple of 8"):
        open_folder(tmp_path)
