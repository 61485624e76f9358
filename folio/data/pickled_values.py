"""The plain values that replace the objects in a pickle, and the functions that make them."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from types import FunctionType
from typing import Any

import numpy as np

from folio.errors import UserError

_KEYS = 50_000  # most keys of a dict whose keys are not text
_NUMBERS_AND_TEXT = re.compile(r"[<>=|]?(b1|[iu][1248]|f[248]|[US]\d{1,9})")  # NumPy's names of their types


class Opaque:
    """An object of a harmless class whose content is not used."""


class Fields(dict[str, Any]):
    """The fields of a plain object, such as an ``argparse.Namespace``."""


class _Dtype:
    """A NumPy dtype of numbers or text, such as ``f8``."""

    def __init__(self, name: str) -> None:
        self.dtype = np.dtype(name)

    def values(self, content: Any, shape: Any, order: Any = "C") -> Any:
        """A scalar, or an array as nested lists, in Python's own types."""
        if (
            not isinstance(content, (bytes, bytearray))
            or len(shape) > 8
            or not all(type(n) is int and 0 <= n < 2**63 for n in shape)
        ):
            raise TypeError
        if len(content) != math.prod(shape) * self.dtype.itemsize:
            raise UserError("a NumPy value is not as long as its shape says")
        if not content:
            return [] if shape else self.dtype.type().item()
        codes = np.dtype("u4").newbyteorder(self.dtype.byteorder)
        if self.dtype.kind == "U" and np.frombuffer(content, codes).max(initial=0) > sys.maxunicode:
            raise UserError("a NumPy text has an invalid character")
        return np.frombuffer(content, self.dtype).reshape(shape, order="F" if order == "F" else "C").tolist()


class _Array(list[Any]):
    """A NumPy array as nested lists; empty if its elements are neither numbers nor text."""


def fill(target: Any, keys: list[Any], values: list[Any]) -> Any:
    """Sets items of a dict. Raises ValueError for keys that could take forever to hash or to find."""
    if isinstance(target, Opaque):
        return target
    if not isinstance(target, dict):
        raise TypeError
    for key, value in zip(keys, values, strict=True):
        flat = key if type(key) is tuple else (key,)
        if len(flat) > 64 or not all(map(_is_quick_to_hash, flat)):
            raise UserError("a key is neither text nor a number of 64 bits")
        if not isinstance(key, str) and len(target) >= _KEYS:
            raise UserError(f"one dict has more than {_KEYS:,} keys that are not text")
        target[key] = value
    return target


def _is_quick_to_hash(part: Any) -> bool:
    if isinstance(part, int):
        return part.bit_length() <= 64
    return part is None or isinstance(part, (str, bytes, float))


def call(function: Any, arguments: Iterable[Any], named: Mapping[str, Any] | None = None) -> Any:
    """Calls a function of ``PLAIN`` or of the caller of ``load``. Raises TypeError for any other object."""
    if not isinstance(function, FunctionType):
        raise TypeError
    return function(*arguments, **(named or {}))


def build(made: Any, state: Any) -> None:
    """Sets the state of a ``Fields``, dtype or array; the state of any other object is ignored."""
    if isinstance(made, Fields):
        if not isinstance(state, dict):
            raise TypeError
        fill(made, list(state), list(state.values()))
    elif isinstance(made, _Dtype) and state[1] in ("<", ">"):
        made.dtype = made.dtype.newbyteorder(state[1])
    elif isinstance(made, _Array):
        _, shape, dtype, fortran, content = state
        if isinstance(dtype, _Dtype):
            found = dtype.values(content, shape, "F" if fortran else "C")
            made[:] = found if shape else [found]


def _dict(items: Any = ()) -> dict[Any, Any]:
    pairs = list(items.items()) if isinstance(items, dict) else list(items)
    return dict(fill({}, [key for key, _ in pairs], [value for _, value in pairs]))


def _list(items: Any = ()) -> list[Any]:
    if not isinstance(items, (list, tuple)):
        raise TypeError
    return list(items)


def _path(*parts: Any) -> str:
    return str(PurePosixPath(*parts))


def _text(text: Any = "") -> str:
    if not isinstance(text, str):
        raise TypeError
    return text


def _bytes(text: Any = b"", encoding: str = "latin1") -> bytes:
    """Bytes as protocols 0 to 2 write them."""
    if isinstance(text, str) and encoding in ("latin1", "latin-1"):
        return text.encode("latin1")
    if not isinstance(text, bytes):
        raise TypeError
    return text


def _scalar(dtype: Any, content: Any = b"") -> Any:
    """A NumPy number or text."""
    return dtype.values(content, ()) if isinstance(dtype, _Dtype) else Opaque()


def _from_buffer(content: Any, dtype: Any, shape: Any, order: Any = "C") -> Any:
    """An array as protocol 5 writes it."""
    return dtype.values(content, shape, order) if isinstance(dtype, _Dtype) else Opaque()


def _dtype(name: Any, *_: Any) -> Any:
    return _Dtype(name) if isinstance(name, str) and _NUMBERS_AND_TEXT.fullmatch(name) else Opaque()


def _array(*_: Any) -> _Array:
    return _Array()


def opaque(*_: Any, **__: Any) -> Opaque:
    return Opaque()


def fields_of(*arguments: Any) -> Fields:
    """A plain object; ``build`` sets its fields later."""
    if arguments:
        raise TypeError
    return Fields()


def _reconstructed(function: Any, *_: Any) -> Any:
    """An object as protocols 0 and 1 write it."""
    return call(function, ())


PLAIN: dict[str, Any] = {
    **dict.fromkeys(("builtins.dict", "collections.OrderedDict", "collections.Counter"), _dict),
    "collections.defaultdict": lambda factory=None, items=(): _dict(items),
    **dict.fromkeys(("builtins.list", "builtins.set", "builtins.frozenset"), _list),
    "builtins.tuple": lambda items=(): tuple(_list(items)),
    **dict.fromkeys(("builtins.str", "builtins.unicode", "torch.torch_version.TorchVersion"), _text),
    **dict.fromkeys(("builtins.bytes", "_codecs.encode"), _bytes),
    **{
        f"pathlib{module}.{pure}{kind}Path": _path
        for module in ("", "._local")
        for pure in ("", "Pure")
        for kind in ("", "Posix", "Windows")
    },
    **dict.fromkeys(("argparse.Namespace", "types.SimpleNamespace"), fields_of),
    "collections.deque": lambda items=(), *_: _list(items),
    "copyreg._reconstructor": _reconstructed,
    "numpy.dtype": _dtype,
    **{
        f"numpy.{core}.multiarray.{what}": function
        for core in ("core", "_core")
        for what, function in (("scalar", _scalar), ("_reconstruct", _array))
    },
    **dict.fromkeys(("numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer"), _from_buffer),
    **dict.fromkeys(
        (
            *(f"builtins.{name}" for name in ("object", "int", "float", "bool", "complex", "bytearray")),
            *(f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")),
            *("decimal.Decimal", "fractions.Fraction", "uuid.UUID"),
            *(f"builtins.{name}" for name in ("range", "xrange", "slice", "long")),
            "numpy.ndarray",
            *(f"numpy.{kind.__name__}" for kind in np.sctypeDict.values()),
        ),
        opaque,
    ),
}
