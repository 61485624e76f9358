"""Files of torch.save: each tensor to the bit, whatever the archive is like; what is damaged or no weight is named."""

from __future__ import annotations

import random
import struct
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from folio.checkpoints import torch_files
from folio.checkpoints.torch_files import FLOATS, StoredTensor, unfit

BASE = torch.arange(60, dtype=torch.float32).view(3, 4, 5)
TENSORS: dict[str, Tensor] = {
    "plain": BASE,
    "a scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 3),
    "transposed": BASE[0].t(),
    "permuted": BASE.permute(2, 0, 1),
    "a slice": BASE[1, 1:3, ::2],
    "expanded": torch.tensor([1.0, 2.0])[:, None].expand(2, 1000),
    "overlapping": torch.arange(10.0).as_strided((4, 3), (2, 1)),
    "at an offset": torch.arange(10.0)[7:],
    "a parameter": nn.Parameter(torch.ones(3)),
    "a frozen parameter": nn.Parameter(torch.ones(3), requires_grad=False),
    **{str(dtype): (torch.arange(7) - 3).to(dtype) for dtype in (*FLOATS, torch.int64, torch.bool, torch.uint8)},
}


def saved(content: Any, path: Path, legacy: bool = False) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def rezipped(
    path: Path,
    method: int = zipfile.ZIP_DEFLATED,
    change: Callable[[str, bytes], bytes | None] = lambda name, content: content,
) -> Path:
    """The archive written anew, by another program; ``change`` gives a record's new content, or None."""
    with zipfile.ZipFile(path) as archive:
        records = [(record.filename, archive.read(record)) for record in archive.infolist()]
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in records:
            if (made := change(name, content)) is not None:
                archive.writestr(name, made)
    return path


def with_attributes() -> nn.Parameter:
    parameter = nn.Parameter(torch.arange(3.0))
    parameter.tag = "text"
    return parameter


@pytest.mark.parametrize("form", ["stored", "deflated", "stored anew", "legacy"])
@pytest.mark.parametrize("tensor", [*TENSORS.values(), with_attributes()], ids=[*TENSORS, "with attributes"])
def test_each_tensor_to_the_bit(tmp_path: Path, tensor: Tensor, form: str) -> None:
    path = saved({"it": tensor, "beside": 3}, tmp_path / "it.pt", form == "legacy")
    if form in ("deflated", "stored anew"):
        rezipped(path, zipfile.ZIP_DEFLATED if form == "deflated" else zipfile.ZIP_STORED)
    found = torch_files.load(path)
    assert found["beside"] == 3
    it = found["it"]
    assert (it.shape, it.dtype) == (tensor.shape, tensor.dtype)
    read = it.load()
    assert torch.equal(read, tensor)
    assert read.is_contiguous()
    assert (unfit(it) == "") == (tensor.dtype in FLOATS)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_shared_storages(tmp_path: Path, legacy: bool) -> None:
    """Views of one storage, tied tensors and views of another type; what is read has memory of its own."""
    flat = torch.arange(1000.0)
    content = {f"part {i}": flat[i * 10 : i * 10 + 10] for i in range(100)}
    content |= {"tied": flat, "again": flat}
    found = torch_files.load(saved(content, tmp_path / "it.pt", legacy))
    read = {name: tensor.load() for name, tensor in found.items()}
    assert all(torch.equal(read[name], content[name]) for name in content)
    assert len({tensor.data_ptr() for tensor in read.values()}) == len(read)


def big_endian(path: Path) -> None:
    """As a machine of the other kind writes it."""

    def change(name: str, content: bytes) -> bytes:
        if name.endswith("/byteorder"):
            return b"big"
        return b"".join(content[i : i + 4][::-1] for i in range(0, len(content), 4)) if "/data/" in name else content

    rezipped(path, zipfile.ZIP_STORED, change)


def prepended(path: Path) -> None:
    path.write_bytes(b"#!/bin/sh\nexit\n" + path.read_bytes())


def trailing(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0" * 1000)


def commented(path: Path) -> None:
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"of a comment " * 100


def as_zip64(path: Path) -> None:
    """Every record with 64-bit sizes."""
    with zipfile.ZipFile(path) as archive:
        records = [(record.filename, archive.read(record)) for record in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records:
            with archive.open(name, "w", force_zip64=True) as record:
                record.write(content)


def without_byteorder(path: Path) -> None:
    rezipped(path, change=lambda name, content: None if name.endswith("byteorder") else content)


@pytest.mark.parametrize(
    "change", [big_endian, prepended, trailing, commented, as_zip64, without_byteorder], ids=lambda f: f.__name__
)
def test_unusual_archives(tmp_path: Path, change: Callable[[Path], None]) -> None:
    """The same numbers as ever."""
    path = saved({"it": BASE, "half": BASE.float()}, tmp_path / "it.pt")
    change(path)
    found = torch_files.load(path)
    assert torch.equal(found["it"].load(), BASE)
    assert torch.equal(found["half"].load(), BASE)


@pytest.mark.parametrize("form", ["stored", "deflated"])
def test_a_flipped_bit(tmp_path: Path, form: str) -> None:
    """Anywhere in the file: it is found, or does not matter."""
    torch.manual_seed(0)
    path = saved({"model": {"it": torch.randn(300)}, "n": 5}, tmp_path / "it.pt")
    if form == "deflated":
        rezipped(path)
    wanted, whole = torch_files.load(path), path.read_bytes()
    weights = wanted["model"]["it"].load()
    place = whole.index(weights.numpy().tobytes()) if form == "stored" else None
    draw, refused = random.Random(0), 0
    for turn in range(400):
        bit = draw.randrange(8 * len(whole)) if place is None or turn % 2 else draw.randrange(8 * 1200) + 8 * place
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            found = torch_files.load(path)
            assert torch.equal(found["model"]["it"].load(), weights)
            assert found["n"] == 5
        except ValueError:
            refused += 1
    assert refused > 200


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_file_that_was_cut(tmp_path: Path, legacy: bool, share: float) -> None:
    path = saved({"it": torch.randn(300)}, tmp_path / "it.pt", legacy)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"it\.pt is damaged, or not a file of torch\.save: "):
        torch_files.load(path)


def quantized() -> Tensor:
    return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)


UNFIT: dict[str, tuple[Callable[[], Any], str]] = {
    "complex": (lambda: torch.ones(3, dtype=torch.complex64), "of type complex64"),
    "integer": (lambda: torch.ones(3, dtype=torch.int32), "of type int32"),
    "unsigned": (lambda: torch.ones(3, dtype=torch.uint16), "of type uint16"),
    "boolean": (lambda: torch.ones(3, dtype=torch.bool), "of type bool"),
    "float8": (lambda: torch.ones(3).to(torch.float8_e4m3fn), "of type float8_e4m3fn"),
    "quantized": (quantized, "quantized"),
    "meta": (lambda: torch.empty(3, device="meta"), "without numbers, on the meta device"),
    "sparse": (lambda: torch.eye(3).to_sparse(), "sparse"),
    "sparse rows": (lambda: torch.eye(3).to_sparse_csr(), "sparse"),
    "negated": (lambda: torch.ones(3, dtype=torch.complex64).conj().imag, "a lazy negation or conjugation"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", UNFIT)
def test_what_is_no_weight(tmp_path: Path, kind: str, legacy: bool) -> None:
    """It stands among the rest and can be told by its name; whether it matters is for others to say."""
    make, why = UNFIT[kind]
    found = torch_files.load(saved({"good": torch.ones(2), "bad": make()}, tmp_path / "it.pt", legacy))
    assert unfit(found["good"]) == ""
    assert why in unfit(found["bad"])


class Rebuilt:
    """Pickled, a call of this function with these arguments, whatever they are."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


STORAGE = torch.arange(4.0)._typed_storage()
SHAPES: dict[str, tuple[Any, ...]] = {
    "beyond its end": (0, (5,), (1,)),
    "an offset beyond its end": (4, (1,), (1,)),
    "an offset below 0": (-1, (1,), (1,)),
    "a stride below 0": (3, (4,), (-1,)),
    "a stride beyond its end": (0, (2, 2), (3, 1)),
    "a size below 0": (0, (-4,), (1,)),
    "exabytes": (0, (2**61, 2**61), (2**61, 1)),
    "beyond 64 bits": (0, (2**70,), (0,)),
    "a size no number": (0, (1.5,), (1,)),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_tensor_beyond_what_is_stored(tmp_path: Path, shape: tuple[Any, ...]) -> None:
    made = Rebuilt(torch._utils._rebuild_tensor_v2, STORAGE, *shape, False, OrderedDict())
    found = torch_files.load(saved({"it": made}, tmp_path / "it.pt"))
    assert unfit(found["it"]) in ("larger than its storage", "of an impossible shape")
    with pytest.raises(ValueError, match="it is "):
        found["it"].load()


def short_record(path: Path) -> None:
    rezipped(path, change=lambda name, content: content[:-4] if name.endswith("data/0") else content)


def no_record(path: Path) -> None:
    rezipped(path, change=lambda name, content: None if name.endswith("data/0") else content)


def no_pickle(path: Path) -> None:
    rezipped(path, change=lambda name, content: None if name.endswith("data.pkl") else content)


def twice(path: Path) -> None:
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(next(name for name in archive.namelist() if name.endswith("data/0")), b"\0" * 240)


def encrypted(path: Path) -> None:
    """Says that it is, in both places."""
    content = bytearray(path.read_bytes())
    for magic, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = -1
        while (at := content.find(magic, at + 1)) >= 0:
            content[at + place] |= 1
    path.write_bytes(content)


def by_bzip2(path: Path) -> None:
    rezipped(path, zipfile.ZIP_BZIP2)


def bomb(path: Path) -> None:
    """A storage that inflates to 2 GB, out of 2 MB."""
    zeros = bytes(2**24)
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, content in records.items():
            with archive.open(name, "w", force_zip64=True) as record:
                for piece in [zeros] * 128 if name.endswith("data/0") else [content]:
                    record.write(piece)


def pickle_bomb(path: Path) -> None:
    """A data.pkl that inflates to 64 MB."""
    rezipped(path, change=lambda name, content: b"N0" * 2**25 + content if name.endswith("data.pkl") else content)


def long_directory(path: Path) -> None:
    """Its list of records claims four gigabytes."""
    content = bytearray(rezipped(path).read_bytes())
    struct.pack_into("<I", content, content.rindex(b"PK\x05\x06") + 12, 2**32 - 2)
    path.write_bytes(content)


DAMAGES = {
    short_record: "storage 0 is cut short",
    no_record: "0",
    no_pickle: "holds no data.pkl",
    twice: "two records of one name",
    encrypted: "is encrypted",
    by_bzip2: "a compression that torch does not use",
    bomb: "zip bomb",
    pickle_bomb: "data.pkl has",
    long_directory: "damaged",
}


@pytest.mark.parametrize(
    "damage",
    [pytest.param(f, marks=[pytest.mark.slow] * (f is bomb)) for f in DAMAGES],
    ids=[f.__name__ for f in DAMAGES],
)
def test_archives_that_lie(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    """One line, soon."""
    path = saved({"it": BASE}, tmp_path / "it.pt")
    damage(path)
    began = time.perf_counter()
    with pytest.raises(ValueError, match=DAMAGES[damage]) as error:
        torch_files.load(path)
    assert time.perf_counter() - began < 10
    assert str(error.value).startswith(f"{path} is damaged, or not a file of torch.save: ")
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_million_keys(tmp_path: Path, legacy: bool) -> None:
    path = saved({f"{i:020}": BASE for i in range(1_000_000)}, tmp_path / "it.pt", legacy)
    began = time.perf_counter()
    with pytest.raises(ValueError, match=r"it\.pt is damaged"):
        torch_files.load(path)
    assert time.perf_counter() - began < 60


def test_a_file_that_changes_meanwhile(tmp_path: Path) -> None:
    path = saved({"it": torch.randn(1000)}, tmp_path / "it.pt", legacy=True)
    found = torch_files.load(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cut short"):
        found["it"].load()


def test_numbers() -> None:
    assert torch_files.number(3) == torch_files.number([[3]]) == 3
    for odd in ("3", None, [1, 2], ["3"], StoredTensor(torch.Size([2]))):
        with pytest.raises(TypeError, match="is not a number"):
            torch_files.number(odd)
