"""Reads files of ``torch.save``; each tensor stays in the file until it is loaded.

Both formats are supported: zip archives, stored or deflated, whose checksums are verified, and the format before
torch 1.6. Objects become plain values (``folio.data.pickles``); no code that a file names is run.
Source: torch/serialization.py and torch/_utils.py.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from folio.data import pickles
from folio.data.pickled_values import opaque
from folio.errors import UserError, first_line
from folio.files import open_regular

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # what weights and optimizer state may be
_MOST_REPEATED = 1 << 24  # numbers of a tensor that has more of them than its storage, by strides of 0
_MAGIC = 0x1950A86A20F9469CFC6C  # the first number of a legacy file
_PIECE = 2**20  # bytes read at once
_DENSE = 16  # an archive may expand to a gigabyte and this many times its size: more is a zip bomb
_MOST_AT_ONCE = 16 * 2**20  # bytes: an archive's list of records is the longest thing read at once
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_ZIP_ERRORS = (struct.error, zlib.error, zipfile.BadZipFile)
_STORAGES = {
    "Float": torch.float32,
    "Double": torch.float64,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
    "QInt8": torch.qint8,
    "QUInt8": torch.quint8,
    "QInt32": torch.qint32,
    "QUInt4x2": torch.quint4x2,
    "QUInt2x4": torch.quint2x4,
    "Untyped": torch.uint8,
}


@dataclass
class _File:
    """A file of either format: how many bytes each storage has, and how to open it."""

    records: dict[str, tuple[int, Callable[[], IO[bytes]]]] = field(default_factory=dict)
    swapped: bool = False  # its numbers are big-endian
    _last: tuple[str, Tensor] | None = None

    def read(self, key: str) -> Tensor:
        """The bytes of a storage (n), kept until another is read. Raises ValueError if it is damaged."""
        if self._last is None or self._last[0] != key:
            self._last = None
            size, open_record = self.records[key]
            raw, at = torch.empty(size, dtype=torch.uint8), 0
            view = raw.numpy().data
            with open_record() as record:
                while at < size and (piece := record.read(min(_PIECE, size - at))):
                    view[at : at + len(piece)] = piece
                    at += len(piece)
            if at < size:
                raise UserError(f"its storage {key} is cut short")
            self._last = (key, raw)
        return self._last[1]


@dataclass(frozen=True)
class _Storage:
    """A storage in a file, under ``key``: ``count`` numbers of ``dtype``, from number ``first`` on."""

    file: _File
    key: str
    dtype: torch.dtype
    count: int
    first: int = 0


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is still in its file. ``problem`` says why it cannot be read, or is empty."""

    shape: torch.Size
    dtype: torch.dtype | None = None
    problem: str = ""
    strides: tuple[int, ...] = ()
    offset: int = 0
    storage: _Storage | None = field(default=None, repr=False)

    def load(self) -> Tensor:
        """The tensor, in memory of its own. Raises ValueError if it has a ``problem`` or the file is damaged."""
        if self.problem or self.storage is None or self.dtype is None:
            raise UserError(f"it is {self.problem}")
        raw, size = self.storage.file.read(self.storage.key), self.dtype.itemsize
        numbers = raw[: len(raw) // size * size].view(self.dtype)
        tensor = numbers.as_strided(self.shape, self.strides, self.offset).clone(memory_format=torch.contiguous_format)
        if self.storage.file.swapped and size > 1:
            tensor.view(_INTEGERS[size]).numpy().byteswap(inplace=True)
        return tensor

    def sort_key(self) -> tuple[int, str]:
        """Orders tensors so that the largest storages are first, and tensors of one storage together."""
        return (-self.storage.count * self.storage.dtype.itemsize, self.storage.key) if self.storage else (0, "")


def unfit(tensor: StoredTensor) -> str:
    """Why a tensor cannot be a weight or an optimizer's, or "": it must be dense and of floating-point numbers."""
    return tensor.problem or ("" if tensor.dtype in FLOATS else f"of type {str(tensor.dtype).removeprefix('torch.')}")


def number(value: Any) -> float | int:
    """A number, or the only one of a tensor or list. Raises TypeError, or ValueError where the file is damaged."""
    for _ in range(8):  # a pickled list may contain itself
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
    if isinstance(value, StoredTensor) and value.shape.numel() == 1 and not value.problem:
        value = value.load().item()
    if not isinstance(value, (int, float)):
        raise TypeError(f"{pickles.shown(value)} is not a number")
    return value


def load(path: Path, known: Mapping[str, Any] = {}) -> Any:
    """The content of a file of ``torch.save`` as plain values and ``StoredTensor``, after verifying checksums.

    ``known`` has replacements for globals in addition to torch's own names, as in ``folio.data.pickles``.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it is not a file of ``torch.save``, is damaged, or names
            code (which is not run); names the file.
    """
    with open_regular(path) as file:
        begins_as_pickle = file.read(2) == b"\x80\x02"
    try:
        read = _legacy if begins_as_pickle or not zipfile.is_zipfile(path) else _archive
        return read(path, {**_KNOWN, **known})
    except pickles.RefusedError as error:
        raise UserError(f"{path}: refused: {error}") from None
    except (ValueError, TypeError, LookupError, RuntimeError, EOFError, OSError, *_ZIP_ERRORS) as error:
        raise UserError(f"{path} is damaged, or not a file of torch.save: {first_line(error)[:200]}") from None


# The two formats


class _Bounded(io.FileIO):
    """A file that refuses to read more than ``_MOST_AT_ONCE`` bytes at once, whatever sizes it states."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _MOST_AT_ONCE:
            raise UserError(f"it asks for {size:,} bytes at once")
        return super().read(size)

    def __del__(self) -> None:
        self.close()


def _archive(path: Path, known: Mapping[str, Any]) -> Any:
    """A zip archive: the pickle ``data.pkl``, and each storage in a record of its own."""
    archive = zipfile.ZipFile(_Bounded(path))  # left open: tensors are read later
    records = {record.filename: record for record in archive.infolist()}
    if len(records) < len(archive.infolist()):
        raise UserError("it has two records of one name")
    for name, record in records.items():
        if record.flag_bits & 1:
            raise UserError(f"its record {name} is encrypted")
        if record.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UserError(f"its record {name} has a compression that torch does not use")
    whole = sum(record.file_size for record in records.values())
    if whole > 2**30 + _DENSE * path.stat().st_size:
        raise UserError(f"its {path.stat().st_size:,} bytes would become {whole:,}: it is a zip bomb")
    base = next((name.removesuffix("data.pkl") for name in records if name.endswith("/data.pkl")), "")
    if (pickled := records.get(f"{base}data.pkl")) is None:
        raise UserError("the archive holds no data.pkl")
    if pickled.file_size > pickles.MOST:
        raise UserError(f"its data.pkl has {pickled.file_size:,} bytes, more than a model's {pickles.MOST:,}")
    content = archive.read(pickled)
    order = records.get(f"{base}byteorder")
    file = _File(swapped=order is not None and order.file_size == 3 and archive.read(order) == b"big")
    for name, record in records.items():
        if name.startswith(f"{base}data/"):
            file.records[name.removeprefix(f"{base}data/")] = (record.file_size, _opener(archive, record))
    made = pickles.load(io.BytesIO(content), known, lambda pid: _storage(file, pid, file.records))
    for name, record in records.items():
        with archive.open(record) as stored:  # which verifies its checksum at its end
            if sum(map(len, iter(partial(stored.read, _PIECE), b""))) != record.file_size:
                raise UserError(f"its record {name} is cut short")
    return made


def _opener(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> Callable[[], IO[bytes]]:
    return lambda: archive.open(record)


def _legacy(path: Path, known: Mapping[str, Any]) -> Any:
    """The format before torch 1.6: five pickles, then each storage as its length and its numbers."""
    with open_regular(path) as raw:
        stream = io.BytesIO(raw.read(pickles.MOST))
    if pickles.load(stream) != _MAGIC or pickles.load(stream) != 1001:
        raise UserError("it is in neither of torch's formats")
    pickles.load(stream)  # about the machine that wrote it; numbers are little-endian from every machine
    file, used = _File(), dict[str, _Storage]()

    def storage(pid: Any) -> _Storage:
        found = _storage(file, pid, None)
        used.setdefault(found.key, found)
        return found

    made = pickles.load(stream, known, storage)
    keys, at, end = pickles.load(stream), stream.tell(), path.stat().st_size
    if not isinstance(keys, list) or not used.keys() <= set(map(str, keys)):
        raise UserError("it lacks some of its storages")
    with open_regular(path) as raw:
        for key in map(str, keys):
            raw.seek(at)
            (count,) = struct.unpack("<q", raw.read(8))
            size = used[key].dtype.itemsize * count
            if count < 0 or count < used[key].first + used[key].count or at + 8 + size > end:
                raise UserError(f"its storage {key} is cut short")
            file.records[key] = (size, _opener_at(path, at + 8))
            at += 8 + size
    return made


def _opener_at(path: Path, place: int) -> Callable[[], IO[bytes]]:
    def opened() -> IO[bytes]:
        file = open_regular(path)
        file.seek(place)
        return file

    return opened


def _storage(file: _File, pid: Any, records: Mapping[str, tuple[int, Any]] | None) -> _Storage:
    """The storage that a persistent id names; its length is checked if the records are known."""
    what, kind, key, _, count, *view = pid
    if what != "storage" or not isinstance(kind, torch.dtype) or type(count) is not int or count < 0:
        raise UserError("a storage is described in a way that is not torch's")
    if records is not None and records[str(key)][0] < count * kind.itemsize:
        raise UserError(f"its storage {key} is cut short")
    first = 0
    if view and view[0] is not None:  # torch 0.4 and before
        _, first, length = view[0]
        if not 0 <= first <= first + length <= count:
            raise UserError(f"a view reaches beyond storage {key}")
        count = length
    return _Storage(file, str(key), kind, count, first)


# Names in the pickles


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *more: Any) -> StoredTensor:
    """``torch._utils._rebuild_tensor`` and its later versions, checked."""
    sizes = (offset, *shape, *strides)
    if not isinstance(storage, _Storage) or len(shape) != len(strides) or len(shape) > 64:
        raise TypeError
    if not all(type(n) is int and 0 <= n < 2**62 for n in sizes):
        return StoredTensor(torch.Size(), problem="of an impossible shape")
    dtype = next((value for value in more if isinstance(value, torch.dtype)), storage.dtype)
    end = offset + 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    inside = end * dtype.itemsize <= storage.count * storage.dtype.itemsize
    if 0 not in shape and not (inside and math.prod(shape) <= max(storage.count, _MOST_REPEATED)):
        return StoredTensor(torch.Size(shape), problem="larger than its storage")
    if len(more) > 2 and isinstance(more[-1], dict) and more[-1]:
        return StoredTensor(torch.Size(shape), problem="stored with a lazy negation or conjugation")
    return StoredTensor(torch.Size(shape), dtype, "", tuple(strides), offset + storage.first, storage)


def _unusable(problem: str) -> Callable[..., StoredTensor]:
    return lambda *_, **__: StoredTensor(torch.Size(), problem=problem)


def _first(value: Any = None, *_: Any) -> Any:
    """Returns the first argument: a parameter's tensor, or a shape's tuple."""
    return value


def _of_subclass(function: Any, _: Any, arguments: Any, __: Any = None) -> Any:
    """``torch._tensor._rebuild_from_type_v2``: parameters, and tensors with attributes."""
    if function not in _REBUILT:
        raise TypeError
    return function(*arguments)


_UTILS = {
    "_rebuild_tensor": _tensor,
    "_rebuild_tensor_v2": _tensor,
    "_rebuild_tensor_v3": _tensor,
    "_rebuild_parameter": _first,
    "_rebuild_parameter_with_state": _first,
    "_rebuild_device_tensor_from_cpu_tensor": _first,
    "_rebuild_device_tensor_from_numpy": _unusable("a NumPy array"),
    "_rebuild_qtensor": _unusable("quantized"),
    "_rebuild_sparse_tensor": _unusable("sparse"),
    "_rebuild_nested_tensor": _unusable("nested"),
    "_rebuild_meta_tensor_no_storage": _unusable("without numbers, on the meta device"),
    "_rebuild_wrapper_subclass": _unusable("of a subclass that wraps other tensors"),
}
_REBUILT = tuple(_UTILS.values())
_KNOWN: dict[str, Any] = {
    **{f"torch._utils.{name}": function for name, function in _UTILS.items()},
    "torch._tensor._rebuild_from_type_v2": _of_subclass,
    **dict.fromkeys(("torch.nn.parameter.Parameter", "torch.nn.Parameter", "torch.Size", "torch.Tensor"), _first),
    **dict.fromkeys(("torch.device", "torch.serialization._get_layout"), opaque),
    **{f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    **{f"torch.{name}": None for name, value in vars(torch).items() if isinstance(value, torch.qscheme)},
    **{f"torch.{place}{name}Storage": dtype for place in ("", "cuda.") for name, dtype in _STORAGES.items()},
    "torch.storage.UntypedStorage": torch.uint8,
}
