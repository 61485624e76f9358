"""Pickles are read as plain values, and nothing in them is imported or called."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import pickle
import random
import struct
import subprocess
import sys
import time
import tracemalloc
import types
from collections import Counter, OrderedDict, defaultdict, deque
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
from conftest import LINUX, NO_POSIX, ROOT

from folio.data import pickles
from folio.data.pickled_values import Opaque

VALUES: dict[str, tuple[Any, Any]] = {  # pickled value, and the value read; None: the same
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
    "NumPy's text": (np.str_("ab"), "ab"),
    "an array": (np.array([[1, 2], [3, 4]], dtype=">u2", order="F"), [[1, 2], [3, 4]]),
    "an array of texts": (np.array(["a", "bc"]), ["a", "bc"]),
    "an array of nothing": (np.zeros((10**6, 0)), []),
    "a path": (Path("/a") / "b", "/a/b"),
    "a pure path": (PurePosixPath("c"), "c"),
    "Namespace": (argparse.Namespace(lr=0.1, out=Path("x")), {"lr": 0.1, "out": "x"}),
    "SimpleNamespace": (types.SimpleNamespace(n=3), {"n": 3}),
    "OrderedDict": (OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
    "defaultdict": (defaultdict(list, {"x": [1]}), {"x": [1]}),
    "Counter": (Counter("aab"), {"a": 2, "b": 1}),
    "a deque": (deque([1, 2], maxlen=3), [1, 2]),
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
    assert isinstance(found, (str, bytes, dict, list, tuple, int, float))
    assert not isinstance(found, np.generic)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "value",
    [
        *(np.array([{}]), np.array([1j]), datetime(2024, 1, 1), 1j, bytearray(b"x")),
        *(np.uint16, np.float32, np.bool_, int, str, range(3), slice(1)),
    ],
    ids=repr,
)
def test_unused_objects(value: Any, protocol: int) -> None:
    """Harmless objects of other kinds do not prevent reading the rest."""
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


def test_a_name_with_control_characters() -> None:
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
    "a key that takes forever to hash": b"()" + b"2\x86" * 60 + b"Nd.",
    "items of a number": b"K\x01K\x02a.",
    "a call of text": b"X\x01\x00\x00\x00x)R.",
    "state of nothing": b"}b.",
    "no mark": b"t.",
    "nothing": b"",
    "no end": b"K\x01",
    "an unknown persistent id": b"K\x01Q.",
    "a copy of nothing": b"h\x05.",
    "an extension": b"\x82\x01.",
    "no opcode": b"\xff.",
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_hostile_pickles_cost_nothing(content: bytes) -> None:
    """A ValueError in little time and memory."""
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
    """The function that is called is ours, and allocates nothing."""
    tracemalloc.start()
    try:
        with contextlib.suppress(ValueError):
            assert isinstance(read(call), Opaque)
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


def test_a_structure_that_doubles(tmp_path: Path) -> None:
    """Sixty doublings are sixty objects, unless they are traversed."""
    content = b"]" + b"2\x86" * 60 + b"."
    found = read(content)
    assert len(found) == 2
    with pytest.raises(ValueError, match="a key is neither text nor a number"):
        read(b"}" + content[:-1] + b"Ns.")


REFUSED: dict[str, tuple[bytes, str]] = {
    "an array longer than its bytes": (
        pickle.dumps(np.zeros(5, np.uint8), 4).replace(b"K\x05\x85", b"K\x7f\x85"),
        "not as long as its shape says",
    ),
    "copies of one list": (
        b"c__builtin__\nset\nq\x00((" + b"N" * 100_000 + b"lq\x01" + b"h\x00h\x01\x85R" * 1000 + b"l.",
        "its calls copy too much",
    ),
    "many parts": (b"\x80\x04(" + b"N" * 200_000 + b"l.", "more than 200,000 parts"),
    "a long one": (bytes(pickles.MOST + 1), "8,388,609 bytes"),
    "inside numpy": (b"\x80\x04\x8c\x05numpy\x8c\x04load\x93.", "asks for numpy.load, which would run code"),
    "an instance": (b"(S'touch mark'\nios\nsystem\n.", "asks for os.system, which would run code"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_the_reason(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles, "_MOST_OPCODES", 200_000)
    content, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        pickles.loads(content)
    assert not Path("mark").exists()


# a few bytes that fill the memory or hang an ordinary unpickler; here they give a value or are refused
BOMBS = {
    "34 GB of memo": b"Nr\xff\xff\xff\xff.",
    "memo far away": b"Np99999999999999999\n.",
    "frame": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N.",
    "hash of doubled tuples": b"})" + b"2\x86" * 60 + b"Ns.",
    "hash of a deep tuple": b"}N" + b"\x85" * 400_000 + b"Ns.",
    "name of doubled lists": b"(" + b"](" + b"2" * 3 + b"l" * 2 + b"\x93.",
    "deep lists": b"\x80\x04" + b"]" * 400_000 + b"a" * 399_999 + b".",
    "keys of large numbers": b"}q\x00\x8b"
    + struct.pack("<i", 2**20)
    + b"\x7f" * 2**20
    + b"q\x01"
    + b"0h\x00h\x01Ns" * 9999
    + b".",
}


@pytest.mark.parametrize("case", BOMBS)
@LINUX
def test_a_small_file_needs_little_memory_and_time(case: str, tmp_path: Path) -> None:
    """In a process limited to one gigabyte and a minute."""
    (tmp_path / "meta.pkl").write_bytes(BOMBS[case])
    program = f"""
import resource
from pathlib import Path
from folio.data import pickles
resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
try:
    print(type(pickles.loads(Path({str(tmp_path / "meta.pkl")!r}).read_bytes())).__name__)
except ValueError as error:
    print(error)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=environment)
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 1), done


def test_damage_is_never_more_than_a_line() -> None:
    """A thousand pickles with bytes changed: a value of plain types, or a ValueError of one line."""
    draw = random.Random(1)
    good = [pickle.dumps(value, protocol) for value, _ in VALUES.values() for protocol in (0, 2, 5)]
    said = []
    for _ in range(1000):
        content = bytearray(draw.choice(good))
        for _ in range(draw.randint(1, 3)):
            content[draw.randrange(len(content))] = draw.randrange(256)
        try:
            pickles.loads(bytes(content))
        except ValueError as error:
            said.append(str(error))
    assert len(said) > 300
    assert not [line for line in said if "\n" in line]
    resource = pytest.importorskip("resource", reason=NO_POSIX)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 2**23  # kilobytes
