"""Token files of every format are read without conversion."""

from __future__ import annotations

import pickle
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import written
from conftest import LINUX, STORY
from written import IDS, MAGIC, Write, bare, ds, headed, npy

from folio.config.options import Data
from folio.data.folders import open_folder
from folio.data.rows import Tokens
from folio.data.token_files import GPT2, Split

shards = written.shards


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
def test_each_format_is_read(tmp_path: Path, case: str, by_glob: bool) -> None:
    """Names, types and all ids of the files, in a folder and by a glob."""
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
    """Also by a glob of all shards or some of them."""
    folder = open_folder(shards / place)
    assert (folder.vocab_size, folder.tokenizer, folder.note) == (256, {"kind": "bytes"}, "")
    assert len(folder.splits["train"]) == (2 if "[" in place else 4)
    text = b"".join(
        bytes(file.map()[:].astype(np.uint8)) for split in ("train", "val") for file in folder.splits[split]
    )
    assert text in STORY.read_bytes() if "[" not in place else text[:10_000] in STORY.read_bytes()


def test_a_folder_with_glob_characters_in_its_name(tmp_path: Path) -> None:
    """The name of an existing folder is not a pattern."""
    folder = tmp_path / "wiki[en]*"
    folder.mkdir()
    for name in ("train.bin", "val.bin"):
        bare(folder / name, IDS)
    assert np.array_equal(Tokens.open(Data(data_dir=str(folder)), 8, 1).folders[0].splits["val"][0].map(), IDS)


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
    """Splits by folder; else validation is the last tenth of the last file, whole documents, with a note."""
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
    """GPT-2's by its names, a local file of the tokenizers library, or else the name alone."""
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


def resident() -> int:
    """Resident memory of this process in bytes, mapped files included."""
    return int(re.findall(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) * 1024


@LINUX
@pytest.mark.parametrize("suffix", [".npy", ".bin"])
def test_no_shard_is_loaded_whole(tmp_path: Path, suffix: str) -> None:
    """Reading some rows of three gigabytes of shards needs only some megabytes."""
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
