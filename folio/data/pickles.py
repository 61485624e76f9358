"""Reads pickles as plain values, with an interpreter of pickle's opcodes that imports nothing.

It calls only the functions in ``PLAIN`` and those that its caller passes. The standard library's ``pickletools`` parses
the format.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

from folio.data.pickled_values import PLAIN, Opaque, build, call, fill
from folio.errors import UserError

MOST = 8 * 2**20  # bytes of a pickle; that of GPT-2 XL with its optimizer has a quarter of a million
_MOST_OPCODES = 1_000_000
_MOST_COPIED = 1 << 24  # values and bytes that calls may copy, in addition to MOST
_VALUES = ("INT", "LONG", "FLOAT", "STRING", "UNICODE", "BYTEARRAY", "BYTES")  # opcodes whose argument is a value
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}


class RefusedError(UserError):
    """The pickle names a global that is not known; an ordinary unpickler would import and call it."""


def load(file: IO[bytes], known: Mapping[str, Any] = {}, persistent: Callable[[Any], Any] | None = None) -> Any:
    """Reads one pickle at the file's position, and leaves the position after it.

    ``known``: replacements for globals by full name, in addition to ``PLAIN``; functions among them are called with
    arguments from the pickle. ``persistent``: returns the value of a persistent id.

    Sets and NumPy arrays become lists, NumPy's numbers Python's, paths strings, and subclasses of dict dicts.

    Raises:
        RefusedError: it names another global. ValueError: it is damaged, has keys that are neither text nor numbers,
            or needs too much memory or time.
    """
    interpreter = _Interpreter({**PLAIN, **known}, persistent)
    try:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            if number >= _MOST_OPCODES:
                raise UserError(f"it has more than {_MOST_OPCODES:,} parts")
            interpreter.run(opcode.name, argument)
        return interpreter.stack.pop()
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


class _Interpreter:
    """Runs opcodes on a stack, with marks in the stack and a memo of values to use again."""

    def __init__(self, known: Mapping[str, Any], persistent: Callable[[Any], Any] | None) -> None:
        self.known, self.persistent = known, persistent
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.copied = 0

    def run(self, name: str, argument: Any) -> None:
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
                self.pop_mark()
            case "DUP":
                stack.append(stack[-1])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[int(argument)] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self.memo[int(argument)])
            case "BINPERSID" if self.persistent:
                stack.append(self.persistent(stack.pop()))
            case _ if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            case _ if name.removeprefix("SHORT_").removeprefix("BIN").startswith(_VALUES):
                stack.append(argument)
            case _:
                self.run_container(name, argument)

    def run_container(self, name: str, argument: Any) -> None:
        """Runs an opcode that makes or extends a tuple, list, set or dict."""
        stack = self.stack
        match name:
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_LIST" | "EMPTY_SET":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "TUPLE":
                stack.append(tuple(self.pop_mark()))
            case "LIST" | "FROZENSET":
                stack.append(self.pop_mark())
            case "DICT":
                items = self.pop_mark()
                stack.append(fill({}, items[::2], items[1::2]))
            case "APPEND":
                value = stack.pop()
                _extend(stack[-1], [value])
            case "APPENDS" | "ADDITEMS":
                items = self.pop_mark()
                _extend(stack[-1], items)
            case "SETITEM":
                key, value = stack[-2:]
                del stack[-2:]
                fill(stack[-1], [key], [value])
            case "SETITEMS":
                items = self.pop_mark()
                fill(stack[-1], items[::2], items[1::2])
            case _:
                self.run_object(name, argument)

    def run_object(self, name: str, argument: Any) -> None:
        """Runs an opcode that looks up a global, calls one, or sets the state of an object."""
        stack = self.stack
        match name:
            case "GLOBAL":
                stack.append(self.look_up(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                module, what = stack[-2:]
                del stack[-2:]
                stack.append(self.look_up(module, what))
            case "INST":
                function = self.look_up(*argument.split(" ", 1))
                stack.append(self.call(function, self.pop_mark()))
            case "OBJ":
                function, *arguments = self.pop_mark()
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
                build(stack[-1], state)
            case _:
                raise UserError(f"a pickle with the opcode {name}")

    def pop_mark(self) -> list[Any]:
        """Removes and returns the values above the last mark, with the mark."""
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def call(self, function: Any, arguments: Any, named: Any = None) -> Any:
        if not isinstance(arguments, (tuple, list)):
            raise TypeError
        self.spend(arguments)
        return call(function, arguments, named)

    def spend(self, arguments: Sequence[Any]) -> None:
        """Counts what a call may copy. Raises ValueError if calls copy a long value again and again."""
        sizes = (len(a) for a in arguments if isinstance(a, (str, bytes, bytearray, list, dict, tuple)))
        self.copied += len(arguments) + sum(sizes)
        if self.copied > _MOST_COPIED + MOST:
            raise UserError("its calls copy too much")

    def look_up(self, module: str, what: str) -> Any:
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
