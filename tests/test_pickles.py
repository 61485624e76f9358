"""Pickles as plain values: what they hold to the letter, and nothing that they ask for is run or built."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import pickle
import struct
import time
import tracemalloc
import types
from collections import Counter, OrderedDict, defaultdict
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest

from folio import pickles

VALUES: dict[str, tuple[Any, Any]] = {  # what was pickled, and what is read
    "text and numbers": ({"a": "é\n'", "b": [1, -1, 2**100, 1e-300], "c": (True, None)}, None),
    "nested": ({"a": [{"b": ({},)}], "c": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4))}, None),
    "bytes": (b"\x00\xff", None),
    "NumPy's float64": (np.float64(1.5), 1.5),
    "NumPy's float32": (np.float32(2.5), 2.5),
    "NumPy's float16": (np.float16(0.5), 0.5),
    "NumPy's int64": (np.int64(-3), -3),
    "NumPy's uint8": (np.uint8(200), 200),
    "NumPy's bool": (np.bool_(True), True),
    "NumPy's, big-endian": (np.array(7, dtype=">i4")[()], 7),
    "a path": (Path("/a") / "b", "/a/b"),
    "a pure path": (PurePosixPath("c"), "c"),
    "Namespace": (argparse.Namespace(lr=0.1, out=Path("x")), {"lr": 0.1, "out": "x"}),
    "SimpleNamespace": (types.SimpleNamespace(n=3), {"n": 3}),
    "OrderedDict": (OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
    "defaultdict": (defaultdict(list, {"x": [1]}), {"x": [1]}),
    "Counter": (Counter("aab"), {"a": 2, "b": 1}),
    "sets": ([{1}, frozenset([2])], [[1], [2]]),
    "keys": ({1: "a", 2.5: "b", None: "c", (1, "d"): "e"}, None),
    "the same object twice": ([[1]] * 2, None),
}


def read(content: bytes, **known: Any) -> Any:
    return pickles.load(io.BytesIO(content), known)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(("value", "wanted"), VALUES.values(), ids=VALUES)
def test_plain_values(value: Any, wanted: Any, protocol: int) -> None:
    found = read(pickle.dumps(value, protocol=protocol))
    assert found == (value if wanted is None else wanted)
    assert type(found) in (type(value), str, dict, list, int, float, bool, pickles.Fields)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("value", [np.arange(3), datetime(2024, 1, 1), 1j, bytearray(b"x"), np.str_("x")], ids=repr)
def test_what_nobody_looks_at(value: Any, protocol: int) -> None:
    """Harmless objects of other kinds stand beside the rest and do no harm."""
    found = read(pickle.dumps({"before": 1, "it": value, "after": 2}, protocol=protocol))
    assert (found["before"], found["after"]) == (1, 2)


def test_several_in_one_file() -> None:
    file = io.BytesIO(pickle.dumps(1) + pickle.dumps({"a": 2}) + b"rest")
    assert [pickles.load(file), pickles.load(file), file.read()] == [1, {"a": 2}, b"rest"]


class Call:
    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    ("function", "name"),
    [(os.mkdir, "posix.mkdir"), (eval, "eval"), (getattr, "getattr"), (pickle.loads, "_?pickle.loads")],
)
def test_code_is_refused_by_its_name(tmp_path: Path, function: Any, name: str, protocol: int) -> None:
    hostile = [OrderedDict(a=Call(function, str(tmp_path / "made")))]
    with pytest.raises(pickles.RefusedError, match=rf"^it asks for {name}, which would run code$"):
        read(pickle.dumps(hostile, protocol=protocol))
    assert not list(tmp_path.iterdir())


def test_a_name_that_a_terminal_would_obey() -> None:
    with pytest.raises(pickles.RefusedError) as error:
        read(b"cos\n\x1b[31m" + b"x" * 10_000 + b"\n.")
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 200


def bomb(opcode: bytes, length: int, form: str) -> bytes:
    return opcode + struct.pack(form, length)


HOSTILE: dict[str, bytes] = {
    "a memo of 34 GB": b"\x80\x02Nr\xff\xff\xff\xff",
    "text of 4 GB": bomb(b"X", 2**32 - 1, "<I") + b"x.",
    "text of exabytes": bomb(b"\x8d", 2**62, "<Q") + b"x.",
    "bytes of exabytes": bomb(b"\x8e", 2**62, "<Q") + b"x.",
    "a bytearray of 34 GB": bomb(b"\x96", 34 * 10**9, "<Q") + b".",
    "a frame of exabytes": bomb(b"\x95", 2**62, "<Q"),
    "digits without end": b"I" + b"9" * 100_000 + b"\n.",
    "an unhashable key": b"(]Nd.",
    "a key that takes for ever": b"()" + b"2\x86" * 60 + b"Nd.",
    "items of a number": b"K\x01K\x02a.",
    "a call of text": b"X\x01\x00\x00\x00x)R.",
    "state of nothing": b"}b.",
    "no mark": b"t.",
    "nothing": b"",
    "no end": b"K\x01",
    "an id of nobody": b"K\x01Q.",
    "a copy of nothing": b"h\x05.",
    "an extension": b"\x82\x01.",
    "no opcode": b"\xff.",
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_hostile_pickles_cost_nothing(content: bytes) -> None:
    """A ValueError, in a moment, and without the memory that is asked for."""
    tracemalloc.start()
    began = time.perf_counter()
    try:
        with pytest.raises(ValueError, match=r"."):
            read(content)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize("call", [b"cbuiltins\nbytearray\n(L34000000000L\ntR.", b"cbuiltins\nlist\n(L9000000L\ntR."])
def test_constructors_build_nothing(call: bytes) -> None:
    """What is called is our own function, which takes no number for a length."""
    tracemalloc.start()
    try:
        with contextlib.suppress(ValueError):
            assert isinstance(read(call), pickles.Opaque)
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


def test_a_structure_that_doubles(tmp_path: Path) -> None:
    """Sixty doublings are sixty objects, as long as nobody walks through them."""
    content = b"]" + b"2\x86" * 60 + b"."
    found = read(content)
    assert len(found) == 2
    with pytest.raises(ValueError, match="a key is neither text nor a number"):
        read(b"}" + content[:-1] + b"Ns.")
