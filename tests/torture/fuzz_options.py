"""Random config files and command lines."""

from __future__ import annotations

import json
from typing import Any

from fuzz_inputs import SCALARS, VALUES, changed_bytes, changed_text
from hypothesis import strategies as st

from folio import cli
from folio.config.files import PRESETS
from folio.config.options import TrainConfig
from folio.config.table import table

_NAMES = sorted(table(TrainConfig))
_WORDS = ["x", "1e9", "'a'", "[1, 2]", "{'a': 1}", "()", "math", "time.time()", "math.pi", "2**31", "f'{x}'"]
_ATOMS = st.one_of(st.sampled_from(_NAMES), SCALARS.map(repr), st.sampled_from(_WORDS))
_OPERATORS = ["+", "-", "*", "/", "//", "%", "**", "<<", ">>", "&", "|", "^", "<", "==", "in", "is", "and", "or"]
_CALLS = ["-", "not ", "~", "int", "str", "min", "round", "abs", "len", "math.sqrt"]
_FORMATS = ["", ":>9", "!r", ":.3f", ":99999", ":x"]
_EXPRESSIONS = st.recursive(
    _ATOMS,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(_OPERATORS), inner).map(" ".join),
        st.tuples(st.sampled_from(_CALLS), inner).map(lambda pair: f"{pair[0]}({pair[1]})"),
        st.tuples(inner, inner, inner).map(lambda three: f"({three[0]} if {three[1]} else {three[2]})"),
        st.tuples(inner, inner).map(lambda pair: f"({pair[0]})[{pair[1]}]"),
        st.tuples(inner, st.sampled_from(_FORMATS)).map(lambda pair: "f'{" + "".join(pair) + "}'"),
    ),
    max_leaves=6,
)
_LEFT = st.sampled_from([*_NAMES, "x", "_y"])
_ASSIGNMENTS = st.sampled_from([" = ", " += ", ": int = ", " = x = "])
_STATEMENTS = ["import math", "from math import *", "del x", "exec('x')", "a, b = 1, 2", "*a, b = 1, 2", "x[0] = 1"]
_STATEMENTS += ["(" * 300, "-" * 3000 + "1", "x = " + "[" * 150 + "]" * 150, "\f", "\\", "'''", "é = 1"]
_LINES = st.one_of(
    st.tuples(_LEFT, _ASSIGNMENTS, _EXPRESSIONS).map("".join),
    _EXPRESSIONS.map(lambda e: f"if {e}:\n    x = 1\nelse:\n    n_layer = 2"),
    st.sampled_from([*_STATEMENTS, "async def f(): 1"]),
)


def config_py() -> st.SearchStrategy[bytes]:
    made = st.lists(_LINES, max_size=6).map(lambda lines: "\n".join(lines).encode("utf-8", "replace"))
    return made | changed_bytes([path.read_bytes() for path in sorted(PRESETS.glob("*.py"))])


_OPTIONS = st.dictionaries(st.sampled_from(_NAMES) | st.text(max_size=5), VALUES, max_size=5)


def config_json() -> st.SearchStrategy[bytes]:
    changed = changed_text([{"n_layer": 2, "dropout": 0.1, "dtype": "auto"}])
    return changed | _OPTIONS.map(lambda options: json.dumps(options).encode())


_TOML = [
    b"n_layer = 2\ndropout = 0.1\nout_dir = 'x'\n[a]\nb = 1\n",
    b"a = {b = 1}\nn_head = 0x10\nlearning_rate = inf\n",
    b"x = 1979-05-27T07:32:00Z\ny = '''\n'''\nz = [[1], [2.5, \"\\u00e9\"]]\n",
]


def config_toml() -> st.SearchStrategy[bytes]:
    def lines(options: dict[str, Any]) -> bytes:
        return "\n".join(f"{json.dumps(name)} = {json.dumps(value)}" for name, value in options.items()).encode()

    return changed_bytes(_TOML) | _OPTIONS.map(lines)


_ODD_WORDS = ["--", "-", "-h", "--help=all", "--help=n_layer", "-o", "train_gpt2", "--=", "---x", ".", "c.py"]


def command_lines() -> st.SearchStrategy[tuple[str, list[str]]]:
    commands = [*cli.COMMANDS, "train_gpt", "tokenize_documents_parallel"]
    text = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=6)
    values = SCALARS.map(str).filter(lambda s: "\0" not in s and s.isprintable()) | text | _EXPRESSIONS

    def words(command: str) -> st.SearchStrategy[tuple[str, list[str]]]:
        names = st.sampled_from(sorted(table(cli.module_of(command).Options)) or ["help"])
        word = st.one_of(
            st.tuples(names, values).map(lambda pair: f"--{pair[0]}={pair[1]}"),
            names.map(lambda name: f"--{name}"),
            names.map(lambda name: f"--no-{name.replace('_', '-')}"),
            text,
            values,
            text.map(lambda t: f"--{t}"),
            st.sampled_from(_ODD_WORDS),
        )
        return st.tuples(st.just(command), st.lists(word, max_size=6))

    return st.sampled_from(commands).flatmap(words)
