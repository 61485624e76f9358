"""Random input for readers: valid content with changes, in bytes or in JSON values; odd values; random pickles."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from hypothesis import strategies as st

_LENGTHS = [n.to_bytes(size, "little") for size in (4, 8) for n in (0, 1, 2**31, 2**32 - 1)]
_LENGTHS += [n.to_bytes(8, "little") for n in (2**64 - 1, 2**63 - 1, 10**12)]
_PIECES = [
    b"",
    b"\0",
    b"\n",
    b"\r",
    b"{",
    b"[",
    b"]" * 9,
    b"[" * 300,
    b'"',
    b"\\ud800",
    b"\xff\xfe",
    b"9" * 400,
    b"1e999",
]
_PIECES += [b"../", b"/dev/zero", b"NaN", b"-", b"\xef\xbb\xbf", b".", *_LENGTHS]

TEXTS = [
    "",
    "\0",
    "\ud800",
    "../x",
    "/dev/zero",
    ".",
    "..",
    "nan",
    "a" * 5000,
    "é",
    "\u2028",
    "{",
    "%s",
    "auto",
    "~",
    "*[",
]
INTS = [0, 1, -1, 2, 3, 7, 255, 2**16, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, 10**400, -(2**63)]
FLOATS = [0.0, -0.0, 0.5, 1.5, 1e300, -1e300, 5e-324, 1e16]
SCALARS = st.one_of(
    st.sampled_from([None, True, False]),
    st.sampled_from(INTS),
    st.integers(-5, 300),
    st.sampled_from(FLOATS),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(TEXTS),
    st.text(max_size=8),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(TEXTS) | st.text(max_size=4), inner),
    max_leaves=6,
) | st.sampled_from([60, 900]).map(lambda depth: json.loads("[" * depth + "]" * depth))


class Choice(NamedTuple):
    """Values to choose from, which hypothesis does not print at length."""

    values: Sequence[Any]

    def __repr__(self) -> str:
        return f"one of {len(self.values)}"


def changed_bytes(contents: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """One of the contents after some changes of its bytes."""
    return _changed_bytes(Choice(contents))


def changed_json(values: Sequence[Any]) -> st.SearchStrategy[Any]:
    """One of the JSON values after changes of some of its parts."""
    return _changed_json(Choice(values))


@st.composite
def _changed_bytes(draw: Any, contents: Choice) -> bytes:
    content = bytearray(contents.values[draw(st.integers(0, len(contents.values) - 1))])
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        match draw(st.sampled_from(["flip", "set", "insert", "over", "remove", "cut", "repeat", "splice"])):
            case "flip" if content:
                content[at] ^= 1 << draw(st.integers(0, 7))
            case "set" if content:
                content[at] = draw(st.integers(0, 255))
            case "insert":
                content[at:at] = draw(st.sampled_from(_PIECES) | st.binary(max_size=16))
            case "over":
                piece = draw(st.sampled_from(_PIECES))
                content[at : at + len(piece)] = piece
            case "remove":
                del content[at : at + draw(st.integers(1, 64))]
            case "cut":
                del content[at:]
            case "repeat":
                content[at:at] = content[at : at + 64] * draw(st.integers(1, 3))
            case "splice":
                other = contents.values[draw(st.integers(0, len(contents.values) - 1))]
                content[at:] = other[draw(st.integers(0, max(0, len(other) - 1))) :]
    return bytes(content)


@st.composite
def _changed_json(draw: Any, values: Choice) -> Any:
    value = copy.deepcopy(values.values[draw(st.integers(0, len(values.values) - 1))])
    for _ in range(draw(st.integers(1, 3))):
        whole: Any = {"": value}
        key: Any = ""
        while isinstance(inner := whole[key], (dict, list)) and inner and draw(st.integers(0, 3)):
            whole, key = inner, draw(st.sampled_from(sorted(inner) if isinstance(inner, dict) else range(len(inner))))
        match draw(st.sampled_from(["replace", "replace", "replace", "remove", "add", "swap"])):
            case "replace":
                whole[key] = draw(VALUES)
            case "remove" if key != "":
                del whole[key]
            case "add" if isinstance(inner, dict):
                inner[draw(st.sampled_from(TEXTS) | st.text(max_size=8))] = draw(VALUES)
            case "add" if isinstance(inner, list):
                inner.append(draw(VALUES))
            case "swap" if isinstance(whole, dict):
                other = draw(st.sampled_from(sorted(whole)))
                whole[key], whole[other] = whole[other], whole[key]
        if isinstance(whole, dict) and whole.keys() == {""} and key == "":
            value = whole[""]
    return value


def changed_text(values: Sequence[Any]) -> st.SearchStrategy[bytes]:
    """JSON with changed parts, or with changed bytes."""
    dumped = changed_json(values).map(lambda value: json.dumps(value).encode())
    return dumped | changed_bytes([json.dumps(value).encode() for value in values])


_OPCODES = [bytes([code]) for code in b".N}])(tldsuaeRbo\x81\x92201\x85\x86\x87\x94Q\x93\x8f\x91\x90\x97"]
_OPCODES += [b"h\0", b"h\1", b"q\0", b"K\1", b"J\xff\xff\xff\xff", b"\x8a\x08" + b"\xff" * 8, b"\x8a\x01\x05"]
_OPCODES += [b"U\x03abc", b"X\x01\0\0\0a", b"\x8c\x07storage", b"G" + b"\0" * 8, b"I1\n", b"L5L\n", b"F1.5\n"]
_OPCODES += [b"S'a'\n", b"Va\n", b"B\x04\0\0\0abcd"]
_NAMES_IN_PICKLES = """
builtins list, builtins dict, numpy dtype, numpy.core.multiarray scalar, numpy.core.multiarray _reconstruct,
numpy.core.numeric _frombuffer, copyreg _reconstructor, pathlib PurePosixPath, collections OrderedDict,
collections defaultdict, _codecs encode, torch FloatStorage, torch._utils _rebuild_tensor_v2, torch Size,
argparse Namespace, os system
"""
_OPCODES += [b"c%s\n%s\n" % tuple(name.encode().split()) for name in _NAMES_IN_PICKLES.split(",")]


def pickles(contents: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """Pickles of random opcodes, and the contents after some changes."""
    made = st.lists(st.sampled_from(_OPCODES), max_size=30).map(lambda parts: b"\x80\x04" + b"".join(parts) + b".")
    return changed_bytes(contents) | made if contents else made
