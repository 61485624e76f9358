"""Pickles of plain values: what is read, what is refused, and that neither takes long or much memory."""

from __future__ import annotations

import argparse
import collections
import os
import pickle
import random
import re
import resource
import struct
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT

from folio import pickles

Case = tuple[Any, Any]

# what is pickled, and what comes of it
PLAIN: dict[str, Case] = {
    "numbers": ([1, -5, 2**70, 1.5, True, None], [1, -5, 2**70, 1.5, True, None]),
    "texts": (["é", "", b"\xff", "\U0010ffff"], ["é", "", b"\xff", "\U0010ffff"]),
    "meta": ({"vocab_size": 2, "itos": {0: "a", 1: "b"}}, {"vocab_size": 2, "itos": {0: "a", 1: "b"}}),
    "nested": ({"a": [(1, 2), {"b": ()}]}, {"a": [(1, 2), {"b": ()}]}),
    "set": ({3}, [3]),
    "frozenset": (frozenset({3}), [3]),
    "OrderedDict": (collections.OrderedDict(a=1), {"a": 1}),
    "Counter": (collections.Counter("aab"), {"a": 2, "b": 1}),
    "defaultdict": (collections.defaultdict(int, a=1), {"a": 1}),
    "path": (Path("/data/input.txt"), "/data/input.txt"),
    "Namespace": (argparse.Namespace(lr=1.5), {"lr": 1.5}),
    "SimpleNamespace": (types.SimpleNamespace(lr=1.5), {"lr": 1.5}),
    "numpy integer": (np.int64(65), 65),
    "numpy float": (np.float32(1.5), 1.5),
    "numpy bool": (np.bool_(True), True),
    "numpy text": (np.str_("ab"), "ab"),
    "numpy array": (np.array([[1, 2], [3, 4]], dtype=">u2", order="F"), [[1, 2], [3, 4]]),
    "numpy texts": (np.array(["a", "bc"]), ["a", "bc"]),
    "numpy nothing": (np.zeros((10**6, 0)), []),
    "keys of pairs": ({(97, 98): 256, "a": 1}, {"a": 1}),
}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("case", PLAIN)
def test_plain_values(case: str, protocol: int) -> None:
    """Of every protocol: in Python's own types, whatever they were."""
    value, expected = PLAIN[case]
    found = pickles.loads(pickle.dumps(value, protocol))
    assert found == expected
    assert isinstance(found, (int, float, str, list, dict))
    assert not isinstance(found, np.generic)


def test_numpys_part_serves_torch(tmp_path: Path) -> None:
    """Its stand-ins let torch's restricted unpickler take numpy's numbers for Python's."""
    torch.save({"iter_num": np.int64(7), "best": np.float32(1.5), "losses": np.array([1, 2])}, tmp_path / "x.pt")
    allowed = [(stand_in, name) for name, stand_in in pickles.NUMPY.items()]
    with torch.serialization.safe_globals(allowed):  # type: ignore[arg-type]
        found = torch.load(tmp_path / "x.pt", weights_only=True)
    assert found == {"iter_num": 7, "best": 1.5, "losses": [1, 2]}
    assert [type(found["iter_num"]), type(found["best"])] == [int, float]


def long(size: int) -> bytes:
    return struct.pack("<Q", size)


REFUSED: dict[str, tuple[bytes, str]] = {
    "system": (b"cos\nsystem\n(S'touch mark'\ntR.", "asks for os.system, which would run code"),
    "instance": (b"(S'touch mark'\nios\nsystem\n.", "asks for os.system, which would run code"),
    "getattr": (b"c__builtin__\ngetattr\n.", "asks for builtins.getattr, which would run code"),
    "inside numpy": (b"\x80\x04\x8c\x05numpy\x8c\x04load\x93.", "asks for numpy.load, which would run code"),
    "objects": (pickle.dumps(np.array([{}], dtype=object)), "'O8', which is neither number nor text"),
    "extension": (b"\x82\x01.", "asks for EXT1"),
    "persistent": (b"Pabc\n.", "asks for PERSID"),
    "control characters": (b"ca\x1b[2J\nb\n.", "asks for a??2J.b, which"),
    "decode": (b"c_codecs\nencode\n(S'a'\nS'rot13'\ntR.", "_codecs.encode"),
    "state of a list": (b"]}b.", "sets the state"),
    "call of a number": (b"K\x01)R.", "damaged"),
    "no end": (b"N", "damaged"),
    "nothing": (b"", "damaged"),
    "text": (b"vocab_size: 65\n", "damaged"),
    "empty stack": (b"0.", "damaged"),
    "long that is not there": (b"\x8b\xff\xff\xff\x7f.", "damaged"),
    "bytes that are not there": (b"\x80\x04\x8e" + long(2**40) + b".", "damaged"),
    "bytearray that is not there": (b"\x80\x05\x96" + long(2**36) + b".", "damaged"),
    "array longer than its bytes": (
        pickle.dumps(np.zeros(5, np.uint8), 4).replace(b"K\x05\x85", b"K\x7f\x85"),
        "not as long as it says",
    ),
    "copies of one list": (
        b"c__builtin__\nset\nq\x00((" + b"N" * 100_000 + b"lq\x01" + b"h\x00h\x01\x85R" * 1000 + b"l.",
        "copies more than it holds",
    ),
    "too many parts": (b"\x80\x04(" + b"N" * 200_000 + b"l.", "more than 200,000 parts"),
    "too long": (bytes(2**25 + 1), "33,554,433 bytes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name, and nothing that it names is called."""
    monkeypatch.setattr(pickles, "_MOST_OPCODES", 200_000)
    content, words = REFUSED[case]
    with pytest.raises(ValueError, match=re.escape(words)) as refused:
        pickles.loads(content)
    assert "\n" not in str(refused.value)
    assert not Path("mark").exists()


# a few bytes that fill memory or hang another unpickler, and end here: as a value or refused
BOMBS = {
    "34 GB of memo": b"Nr\xff\xff\xff\xff.",
    "memo far away": b"Np99999999999999999\n.",
    "frame": b"\x80\x04\x95" + long(2**62) + b"N.",
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
def test_little_is_taken_for_a_little_file(case: str, tmp_path: Path) -> None:
    """In a process that may have one gigabyte and half a minute."""
    (tmp_path / "meta.pkl").write_bytes(BOMBS[case])
    program = f"""
import resource
from pathlib import Path
from folio import pickles
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
    good = [pickle.dumps(value, protocol) for value, _ in PLAIN.values() for protocol in (0, 2, 5)]
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
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 2**23  # kilobytes
