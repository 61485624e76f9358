"""Plain values out of a pickle, with nothing in it run.

Python's own unpickler, even where it may import nothing, takes 34 GB for nine bytes (a place in its memo), hashes
nested tuples without end, and believes every length. So ``loads`` runs the opcodes itself: ``pickletools`` reads them,
and what they may build is below.
"""

from __future__ import annotations

import math
import pickletools
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

MOST_BYTES = 1 << 25
_MOST_OPCODES = 5_000_000
_MOST_COPIED = 1 << 24  # values, beside as many as the pickle has bytes
_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}


class RefusedError(ValueError):
    """The pickle asks for something that is not a plain value, or for more than it can need."""


class Dtype:
    """Takes the place of ``numpy.dtype``: of numbers, truth values and text alone."""

    def __init__(self, code: str, *_: object) -> None:
        if not re.fullmatch(r"b1|[iu][1248]|f[248]|[US]\d{1,9}", code):
            raise RefusedError(f"it holds numpy's {code[:20]!r}, which is neither number nor text")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])

    def values(self, content: Any, shape: tuple[int, ...], order: str = "C") -> Any:
        """The values of an array as nested lists, or the one of a scalar, in Python's own types."""
        if type(content) not in (bytes, bytearray) or not all(
            type(n) is int and n.bit_length() < 64 for n in shape[:9]
        ):
            raise TypeError("a numpy value in it has neither bytes nor a shape")
        if len(shape) > 8 or len(content) != math.prod(shape) * self.dtype.itemsize:
            raise RefusedError("a numpy value in it is not as long as it says")
        if not content:
            return [] if shape else self.dtype.type().item()
        return np.frombuffer(content, self.dtype).reshape(shape, order="F" if order == "F" else "C").tolist()


class Array(list[Any]):
    """Takes the place of ``numpy.ndarray``: its values, in lists."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, content = state
        found = dtype.values(content, shape, "F" if fortran else "C")
        self[:] = found if shape else [found]


class Namespace(dict[str, Any]):
    """Takes the place of ``argparse.Namespace`` and its like: their fields, as a dict."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        _store(self, state.items())


def scalar(dtype: Dtype, content: bytes = b"") -> Any:
    """Takes the place of what numpy pickles a scalar with. Returns Python's number or text."""
    return dtype.values(content, ())


def _from_buffer(content: bytes, dtype: Dtype, shape: tuple[int, ...], order: str) -> Any:
    return dtype.values(content, shape, order)


def _bytes_of(text: str = "", encoding: str = "latin1") -> bytes:
    """What protocols below 3 write for bytes."""
    if encoding not in ("latin1", "latin-1"):
        raise RefusedError("it asks for _codecs.encode to other than latin1, which would run code")
    return text.encode("latin-1")


def _mapping(entries: Any = ()) -> dict[Any, Any]:
    made: dict[Any, Any] = {}
    _store(made, entries.items() if isinstance(entries, dict) else ((key, value) for key, value in entries))
    return made


def _store(mapping: dict[Any, Any], entries: Iterable[tuple[Any, Any]]) -> None:
    """Leaves out what is under other keys than text and numbers, since to hash a tuple can take for ever."""
    for key, value in entries:
        if isinstance(key, (str, bytes, float)) or (isinstance(key, int) and key.bit_length() <= 64):
            mapping[key] = value


def _members(of: list[Any] | None = None) -> list[Any]:
    if not isinstance(of, (list, type(None))):
        raise TypeError("it makes a set of what is no list")
    return list(of or ())


def _new(kind: Any, *_: object) -> Any:
    """``copyreg._reconstructor``, which protocols below 2 make an object with."""
    if kind is not Namespace:
        raise RefusedError("it makes an object that is not a plain value")
    return Namespace()


# Whatever else a pickle names is refused. The parts of numpy serve torch's unpickler as well (safe_globals).
NUMPY: dict[str, Callable[..., Any]] = {
    "numpy.dtype": Dtype,
    "numpy.ndarray": Array,
    **{
        f"numpy.{core}.{name}": stand_in
        for core in ("core", "_core")
        for name, stand_in in (
            ("multiarray.scalar", scalar),
            ("multiarray._reconstruct", lambda *_: Array()),
            ("numeric._frombuffer", _from_buffer),
        )
    },
}
PLAIN: dict[str, Callable[..., Any] | None] = {
    **NUMPY,
    "_codecs.encode": _bytes_of,
    "builtins.bytes": lambda: b"",
    "builtins.bytearray": lambda content=b"", encoding="latin1": (
        _bytes_of(content, encoding) if isinstance(content, str) else bytes(memoryview(content))
    ),
    "builtins.set": _members,
    "builtins.frozenset": _members,
    "collections.OrderedDict": _mapping,
    "collections.Counter": _mapping,
    "collections.defaultdict": lambda *_: {},
    **{f"builtins.{name}": None for name in ("object", "int", "long", "float", "str", "list", "dict")},  # as arguments
    "argparse.Namespace": Namespace,
    "types.SimpleNamespace": Namespace,
    "copyreg._reconstructor": _new,
    **{
        f"pathlib{inner}.{name}": lambda *parts, kind=kind: str(kind(*parts))
        for inner in ("", "._local")
        for kind, names in (
            (PurePosixPath, ("PosixPath", "PurePosixPath")),
            (PureWindowsPath, ("WindowsPath", "PureWindowsPath")),
        )
        for name in names
    },
}


def loads(content: bytes) -> Any:
    """The value in a pickle, of Python's plain types.

    numpy's numbers become Python's, arrays and sets lists, paths text. Entries of a dict under other keys than text
    and numbers are left out. Time and memory grow with the content alone.

    Raises:
        ValueError: it is damaged, too long, or names anything but plain values, which would run code.
    """
    if len(content) > MOST_BYTES:
        raise RefusedError(f"it has {len(content):,} bytes, more than the {MOST_BYTES:,} that such a file can have")
    try:
        return _Machine(content).run()
    except RefusedError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:80]
        raise ValueError(f"it is damaged, or no pickle ({reason or type(error).__name__})") from None


class _Machine:
    """The stack, the marks in it and the memo, as Python's documentation of ``pickletools`` has them."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []  # the stacks below each mark
        self.memo: dict[int, Any] = {}
        self.left = len(content) + _MOST_COPIED  # how much calls may copy, all together

    def run(self) -> Any:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(self.content)):
            if number >= _MOST_OPCODES:
                raise RefusedError(f"it has more than {_MOST_OPCODES:,} parts")
            if opcode.name == "STOP":
                return self.stack.pop()
            if opcode.name in _CONSTANTS:
                self.stack.append(argument)
            elif opcode.name in _ACTIONS:
                _ACTIONS[opcode.name](self, argument)
            else:
                raise RefusedError(f"it asks for {opcode.name}, which is not in a pickle of plain values")
        raise ValueError("it has no end")

    def mark(self, _: Any) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def items(self) -> list[Any]:
        """What lies above the last mark, which is taken away."""
        found, self.stack = self.stack, self.marked.pop()
        return found

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def put(self, place: int | None) -> None:
        self.memo[len(self.memo) if place is None else place] = self.stack[-1]

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise ValueError("its stack is empty")
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def extend(self, members: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise TypeError("it adds members to what has none")
        self.stack[-1].extend(members)

    def set_items(self, pairs: list[Any]) -> None:
        if not isinstance(self.stack[-1], dict):
            raise TypeError("it adds entries to what has none")
        _store(self.stack[-1], zip(pairs[::2], pairs[1::2], strict=True))

    def find(self, module: str, name: str) -> Any:
        full = f"{_PYTHON_2.get(module, module)}.{name}"
        if full not in PLAIN:
            shown = re.sub(r"[^\w.]", "?", full[:80])
            raise RefusedError(f"it asks for {shown}, which would run code")
        return PLAIN[full]

    def spend(self, arguments: Sequence[Any]) -> None:
        """Refuses many calls that copy one long value, which would take more memory than the pickle has bytes."""
        self.left -= len(arguments)
        if self.left > 0:
            self.left -= sum(len(a) for a in arguments if isinstance(a, (str, bytes, bytearray, list, dict, tuple)))
        if self.left < 0:
            raise RefusedError("it copies more than it holds")

    def call(self, stand_in: Any, arguments: Any) -> None:
        if not callable(stand_in) or not isinstance(arguments, (tuple, list)):
            raise TypeError("it calls what is no function")
        self.spend(arguments)
        self.push(stand_in(*arguments))

    def build(self, _: Any) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], (Dtype, Array, Namespace)):
            raise RefusedError("it sets the state of what has none, which would run code")
        self.spend(state if isinstance(state, tuple) else (state,))
        self.stack[-1].__setstate__(state)


def _global(machine: _Machine, argument: str) -> Any:
    module, _, name = argument.partition(" ")
    return machine.find(module, name)


def _stack_global(machine: _Machine, _: Any) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    if not isinstance(module, str) or not isinstance(name, str):
        raise TypeError("it names what is no text")
    machine.push(machine.find(module, name))


def _reduce(machine: _Machine, _: Any) -> None:
    arguments, stand_in = machine.stack.pop(), machine.stack.pop()
    machine.call(stand_in, arguments)


def _object(machine: _Machine, _: Any) -> None:
    stand_in, *arguments = machine.items()
    machine.call(stand_in, arguments)


def _dict(machine: _Machine, _: Any) -> None:
    pairs = machine.items()
    machine.push({})
    machine.set_items(pairs)


def _two(machine: _Machine) -> list[Any]:
    value, key = machine.stack.pop(), machine.stack.pop()
    return [key, value]


_TEXTS = ("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8")
_BYTES = ("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8")
_NUMBERS = ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT")
_CONSTANTS = frozenset((*_TEXTS, *_BYTES, *_NUMBERS))
_ACTIONS: dict[str, Callable[[_Machine, Any], object]] = {
    "PROTO": lambda m, _: None,
    "FRAME": lambda m, _: None,
    "NONE": lambda m, _: m.push(None),
    "NEWTRUE": lambda m, _: m.push(True),
    "NEWFALSE": lambda m, _: m.push(False),
    "MARK": _Machine.mark,
    "POP": lambda m, _: m.stack.pop() if m.stack else m.items(),
    "POP_MARK": lambda m, _: m.items(),
    "DUP": lambda m, _: m.push(m.stack[-1]),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine.put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda m, place: m.push(m.memo[place])),
    "EMPTY_TUPLE": lambda m, _: m.push(()),
    "TUPLE": lambda m, _: m.push(tuple(m.items())),
    "TUPLE1": lambda m, _: m.tuple_of(1),
    "TUPLE2": lambda m, _: m.tuple_of(2),
    "TUPLE3": lambda m, _: m.tuple_of(3),
    "EMPTY_LIST": lambda m, _: m.push([]),
    "EMPTY_SET": lambda m, _: m.push([]),
    "LIST": lambda m, _: m.push(m.items()),
    "FROZENSET": lambda m, _: m.push(m.items()),
    "APPEND": lambda m, _: m.extend([m.stack.pop()]),
    "APPENDS": lambda m, _: m.extend(m.items()),
    "ADDITEMS": lambda m, _: m.extend(m.items()),
    "EMPTY_DICT": lambda m, _: m.push({}),
    "DICT": _dict,
    "SETITEM": lambda m, _: m.set_items(_two(m)),
    "SETITEMS": lambda m, _: m.set_items(m.items()),
    "GLOBAL": lambda m, named: m.push(_global(m, named)),
    "STACK_GLOBAL": _stack_global,
    "REDUCE": _reduce,
    "NEWOBJ": _reduce,
    "INST": lambda m, named: m.call(_global(m, named), m.items()),
    "OBJ": _object,
    "BUILD": _Machine.build,
}
