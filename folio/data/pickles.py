"""Reads pickles as plain values, with an interpreter of its own for pickle's opcodes: it imports and calls nothing.

The standard library's ``pickletools`` parses the format.
"""

from __future__ import annotations

import io
import math
import pickletools
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from types import FunctionType
from typing import IO, Any

import numpy as np

from folio.errors import UserError

MOST = 8 * 2**20  # bytes of a pickle: GPT-2 XL with its optimizer takes a quarter of a million
_MOST_OPCODES = 5_000_000
_MOST_COPIED = 1 << 24  # values and bytes that calls may copy, beside as many as the pickle has bytes
_KEYS = 50_000  # of a dict, where they are not text
_VALUES = ("INT", "LONG", "FLOAT", "STRING", "UNICODE", "BYTEARRAY", "BYTES")  # opcodes that bring a value with them
_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}
_NUMBERS_AND_TEXT = re.compile(r"[<>=|]?(b1|[iu][1248]|f[248]|[US]\d{1,9})")  # NumPy's names of their types


class RefusedError(UserError):
    """The pickle names something unknown, which an ordinary unpickler would import and call."""


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
            raise UserError("a NumPy value is not as long as it says")
        if not content:
            return [] if shape else self.dtype.type().item()
        codes = np.dtype("u4").newbyteorder(self.dtype.byteorder)
        if self.dtype.kind == "U" and np.frombuffer(content, codes).max(initial=0) > sys.maxunicode:
            raise UserError("a NumPy text has an invalid character")
        return np.frombuffer(content, self.dtype).reshape(shape, order="F" if order == "F" else "C").tolist()


class _Array(list[Any]):
    """A NumPy array as nested lists; empty if its elements are neither numbers nor text."""


def load(file: IO[bytes], known: Mapping[str, Any] = {}, persistent: Callable[[Any], Any] | None = None) -> Any:
    """Reads one pickle from the file's position on, and leaves the position after it.

    ``known``: replacements for globals by full name, in addition to ``PLAIN``; functions among them are called with
    arguments from the pickle. ``persistent``: returns the value of a persistent id. Sets become lists, paths text,
    NumPy's numbers Python's, its arrays lists, and subclasses of dict dicts.

    Raises:
        RefusedError: it names any other global. ValueError: it is damaged, has keys that are neither text nor numbers,
            or needs more memory or time than a small file should.
    """
    machine = _Machine({**PLAIN, **known}, persistent)
    try:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            if number >= _MOST_OPCODES:
                raise UserError(f"it has more than {_MOST_OPCODES:,} parts")
            machine.do(opcode.name, argument)
        return machine.stack.pop()
    except (LookupError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"not a valid pickle ({type(error).__name__})") from None


def loads(content: bytes) -> Any:
    """As ``load``, for a pickle of at most ``MOST`` bytes."""
    if len(content) > MOST:
        raise UserError(f"it has {len(content):,} bytes, more than the {MOST:,} that such a pickle can have")
    return load(io.BytesIO(content))


def shown(value: Any) -> str:
    """A key or a name in a short form for messages."""
    if isinstance(value, str):
        return repr(value[:80])
    return str(value)[:80] if isinstance(value, float) or (type(value) is int and abs(value) < 2**63) else "something"


class _Machine:
    """The stack, the marks in it, and the memo."""

    def __init__(self, known: Mapping[str, Any], persistent: Callable[[Any], Any] | None) -> None:
        self.known, self.persistent = known, persistent
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.copied = 0

    def do(self, name: str, argument: Any) -> None:
        """Runs one opcode. Raises ValueError, LookupError, TypeError or AttributeError if the pickle is not valid."""
        stack = self.stack
        match name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "MARK":
                self.marks.append(len(stack))
            case "POP":
                stack.pop()
            case "POP_MARK":
                self.above()
            case "DUP":
                stack.append(stack[-1])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[int(argument)] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self.memo[int(argument)])
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            case "EMPTY_LIST" | "EMPTY_SET":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "TUPLE":
                stack.append(tuple(self.above()))
            case "LIST" | "FROZENSET":
                stack.append(self.above())
            case "DICT":
                items = self.above()
                stack.append(_fill({}, items[::2], items[1::2]))
            case "APPEND":
                value = stack.pop()
                _extend(stack[-1], [value])
            case "APPENDS" | "ADDITEMS":
                items = self.above()
                _extend(stack[-1], items)
            case "SETITEM":
                key, value = stack[-2:]
                del stack[-2:]
                _fill(stack[-1], [key], [value])
            case "SETITEMS":
                items = self.above()
                _fill(stack[-1], items[::2], items[1::2])
            case "BINPERSID" if self.persistent:
                stack.append(self.persistent(stack.pop()))
            case _ if name.removeprefix("SHORT_").removeprefix("BIN").startswith(_VALUES):
                stack.append(argument)
            case _:
                self.make(name, argument)

    def make(self, name: str, argument: Any) -> None:
        """Runs one of the opcodes for globals, for calls and for the state of objects."""
        stack = self.stack
        match name:
            case "GLOBAL":
                stack.append(self.named(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                module, what = stack[-2:]
                del stack[-2:]
                stack.append(self.named(module, what))
            case "INST":
                function = self.named(*argument.split(" ", 1))
                stack.append(self.call(function, self.above()))
            case "OBJ":
                function, *arguments = self.above()
                stack.append(self.call(function, arguments))
            case "REDUCE" | "NEWOBJ":
                arguments = stack.pop()
                stack.append(self.call(stack.pop(), arguments))
            case "NEWOBJ_EX":
                arguments, named = stack[-2:]
                del stack[-2:]
                stack.append(self.call(stack.pop(), arguments, named))
            case "BUILD":
                state = stack.pop()
                self.spend(state if isinstance(state, tuple) else (state,))
                _build(stack[-1], state)
            case _:
                raise UserError(f"a pickle with the opcode {name}")

    def above(self) -> list[Any]:
        """Removes and returns the values above the last mark."""
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def call(self, function: Any, arguments: Any, named: Any = None) -> Any:
        if not isinstance(arguments, (tuple, list)):
            raise TypeError
        self.spend(arguments)
        return _call(function, arguments, named)

    def spend(self, arguments: Sequence[Any]) -> None:
        """Raises ValueError if calls copy a long value again and again."""
        sizes = (len(a) for a in arguments if isinstance(a, (str, bytes, bytearray, list, dict, tuple)))
        self.copied += len(arguments) + sum(sizes)
        if self.copied > _MOST_COPIED + MOST:
            raise UserError("its calls copy too much")

    def named(self, module: str, what: str) -> Any:
        name = f"{_PYTHON_2.get(module, module)}.{what}"
        if name not in self.known:
            text = "".join(c if c.isprintable() else "?" for c in name.removeprefix("builtins.")[:100])
            raise RefusedError(f"it asks for {text}, which would run code")
        return self.known[name]


def _extend(target: Any, items: list[Any]) -> None:
    if type(target) is list:
        target.extend(items)
    elif not isinstance(target, Opaque):
        raise TypeError


def _fill(target: Any, keys: list[Any], values: list[Any]) -> Any:
    """Sets items of a dict; raises ValueError for a key that might take forever to hash or to find."""
    if isinstance(target, Opaque):
        return target
    if not isinstance(target, dict):
        raise TypeError
    for key, value in zip(keys, values, strict=True):
        flat = key if type(key) is tuple else (key,)
        if len(flat) > 64 or not all(part is None or isinstance(part, (str, bytes, int, float)) for part in flat):
            raise UserError("a key is neither text nor a number")
        if not isinstance(key, str) and len(target) >= _KEYS:
            raise UserError(f"more than {_KEYS:,} keys of one dict are no text")
        target[key] = value
    return target


def _call(function: Any, arguments: Iterable[Any], named: Mapping[str, Any] | None = None) -> Any:
    if not isinstance(function, FunctionType):
        raise TypeError
    return function(*arguments, **(named or {}))


def _build(made: Any, state: Any) -> None:
    """Sets the state of an object, if that state is used."""
    if isinstance(made, Fields):
        if not isinstance(state, dict):
            raise TypeError
        _fill(made, list(state), list(state.values()))
    elif isinstance(made, _Dtype) and state[1] in ("<", ">"):
        made.dtype = made.dtype.newbyteorder(state[1])
    elif isinstance(made, _Array):
        _, shape, dtype, fortran, content = state
        if isinstance(dtype, _Dtype):
            found = dtype.values(content, shape, "F" if fortran else "C")
            made[:] = found if shape else [found]


def _dict(items: Any = ()) -> dict[Any, Any]:
    pairs = list(items.items()) if isinstance(items, dict) else list(items)
    return dict(_fill({}, [key for key, _ in pairs], [value for _, value in pairs]))


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
    """How protocols 0 to 2 write bytes."""
    if isinstance(text, str) and encoding in ("latin1", "latin-1"):
        return text.encode("latin1")
    if not isinstance(text, bytes):
        raise TypeError
    return text


def _scalar(dtype: Any, content: Any = b"") -> Any:
    """One of NumPy's numbers, or its text."""
    return dtype.values(content, ()) if isinstance(dtype, _Dtype) else Opaque()


def _from_buffer(content: Any, dtype: Any, shape: Any, order: Any = "C") -> Any:
    """How protocol 5 writes an array."""
    return dtype.values(content, shape, order) if isinstance(dtype, _Dtype) else Opaque()


def _dtype(name: Any, *_: Any) -> Any:
    return _Dtype(name) if isinstance(name, str) and _NUMBERS_AND_TEXT.fullmatch(name) else Opaque()


def _array(*_: Any) -> _Array:
    return _Array()


def opaque(*_: Any, **__: Any) -> Opaque:
    return Opaque()


def fields_of(*arguments: Any) -> Fields:
    """A plain object without its fields yet."""
    if arguments:
        raise TypeError
    return Fields()


def _reconstructed(function: Any, *_: Any) -> Any:
    """How protocols 0 and 1 make an object."""
    return _call(function, ())


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
