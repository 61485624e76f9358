"""Assignments of a Python file: evaluated within bounds, and never run."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest

from folio.config import assignments

PATH = Path("config.py")
OPTIONS = {"n_layer": 12, "n_head": 12, "n_embd": 768, "max_iters": 600_000, "learning_rate": 6e-4, "out_dir": "out"}


def values(text: str) -> dict[str, object]:
    return assignments.read(PATH, text, OPTIONS).values


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("pass", {}),
        ("'''A docstring.'''\nx = 4", {"x": 4}),
        ("x: int = 4\ny: float", {"x": 4}),
        ("x = y = 4", {"x": 4, "y": 4}),
        ("x, (y, z) = 1, (2, 3)", {"x": 1, "y": 2, "z": 3}),
        ("[x, y] = [1, 2]", {"x": 1, "y": 2}),
        ("x = (y := 4) + 1", {"x": 5, "y": 4}),
        ("x = None; y = (1, 2.5, 'a'); z = [True, []]", {"x": None, "y": (1, 2.5, "a"), "z": [True, []]}),
        ("x = {'a': {1: [2]}}", {"x": {"a": {1: [2]}}}),
        # arithmetic
        ("x = (7 + 2 ** 3 - 1) // 2 % 5", {"x": 2}),
        ("x = 0b11; y = 0x10; z = 5_000", {"x": 3, "y": 16, "z": 5000}),
        ("x = 1 / 4; y = 8 / 2", {"x": 0.25, "y": 4.0}),
        ("x = 10 ** -3; y = --+0.5", {"x": 1e-3, "y": 0.5}),
        ("x = 1 << 10; y = 1024 >> 3; z = 6 & 3 | 8 ^ 1; w = ~5", {"x": 1024, "y": 128, "z": 11, "w": -6}),
        ("x = int('4') + int(2.9) + round(2.6) + min(3, 1) + max(0, 2)", {"x": 12}),
        ("x = round(2.345, 2); y = round(2.345, ndigits=1); z = float('0.5')", {"x": 2.35, "y": 2.3, "z": 0.5}),
        ("x = abs(-2) + len([1, 2]) + sum((3, 4)); y = bool('')", {"x": 11, "y": False}),
        ("x = dict(a=1)['a']", {"x": 1}),
        # text
        ("x = 'a' 'b' + str(2) + 3 * 'c'", {"x": "ab2ccc"}),
        ("x = f'out-{n_layer}x{n_embd}-{learning_rate:.0e}'", {"x": "out-12x768-6e-04"}),
        ("w = 6\nx = f'{1:>{w}}|{out_dir!r}|{w=}'", {"w": 6, "x": "     1|'out'|w=6"}),
        ("x = 'gpt2-124M-%d-%.1f%%' % (3, 0.5)", {"x": "gpt2-124M-3-0.5%"}),
        ("x = 'abc'[0] + 'abc'[-2:]; y = [4, 5][1]; z = {'a': 6}['a']", {"x": "abc", "y": 5, "z": 6}),
        # names
        ("x = max_iters // 2", {"x": 300_000}),
        ("x = 6\nx = x * 2\ny = x", {"x": 12, "y": 12}),
        (
            "n_layer += 1; n_head -= 2; n_embd *= 2; max_iters //= 4; learning_rate /= 2; out_dir += '-x'",
            {
                "n_layer": 13,
                "n_head": 10,
                "n_embd": 1536,
                "max_iters": 150_000,
                "learning_rate": 3e-4,
                "out_dir": "out-x",
            },
        ),
        ("x = 2\nx **= 3\nx %= 5\nx <<= 2\nx |= 1", {"x": 13}),
        ("x = 1\ny = x\ndel x", {"y": 1}),
        ("max = 3\nx = max", {"max": 3, "x": 3}),
        # conditions
        ("x = not True", {"x": False}),
        ("x = 'resume' if out_dir else 'scratch'", {"x": "resume"}),
        ("x = 0 < n_layer <= 12 != 13 and ('ou' in out_dir) and n_layer not in (1, 2)", {"x": True}),
        ("x = None or '' or 'auto'; y = 1 and 2; z = out_dir is None", {"x": "auto", "y": 2, "z": False}),
        ("if n_layer > 20:\n x = 1\nelif n_layer > 10:\n if n_head:\n  x = 2\nelse:\n x = 3", {"x": 2}),
        ("if False:\n import os\nelse:\n x = 1", {"x": 1}),
        ("x = 1 if True else 1 / 0", {"x": 1}),
        # modules
        ("from math import ceil, sqrt as root, pi\nx = ceil(1.5) + root(4) + int(pi)", {"x": 7.0}),
        (
            "import math as m, time\nx = m.floor(m.log2(8)); y = m.inf; z = time.time() > 1",
            {"x": 3, "y": math.inf, "z": True},
        ),
        ("from __future__ import annotations\nx = 1", {"x": 1}),
    ],
)
def test_what_is_assigned(text, expected) -> None:
    found = values(text)
    assert found == expected
    assert [*map(type, found.values())] == [*map(type, expected.values())]


def test_the_time_is_now() -> None:
    before = time.time()
    found = values("import time\nfrom time import time as now\nx = str(time.time()); y = now()")
    assert before <= float(str(found["x"])) <= found["y"] <= time.time()


def test_names_that_are_used_and_lines() -> None:
    _, lines, used = assignments.read(PATH, "a = 1\nb, c = 2, a\nif False:\n    d = c\nc = 5", {})
    assert (lines, used) == ({"a": 1, "b": 2, "c": 5}, {"a", "c"})


def test_what_is_printed_is_passed_over() -> None:
    with pytest.warns(UserWarning, match=r"config\.py:1: print\(open\('mark', 'w'\)\) prints nothing"):
        assert values("print(open('mark', 'w'))\nx = 1") == {"x": 1}
    assert not Path("mark").exists()


@pytest.mark.parametrize(
    "line",
    [
        "import os",
        "import time, os",
        "import math.foo",
        "from os import system",
        "from math import factorial",
        "from math import *",
        "from . import math",
        "open({mark!r}, 'w')",
        "x = len(open({mark!r}, 'w').mode)",
        "x = __import__('os').system('touch {mark}')",
        "exec(\"open({mark!r}, 'w')\")",
        "x = eval('4')",
        "x = int(x=4)",
        "x = max(*[1, 2])",
        "x = dict(**{{}})",
        "x = {{**{{}}}}",
        "x = ''.__class__.__name__",
        "x = 'out'.upper()",
        "x = f'{{n_layer.real}}'",
        "x = sum(x for x in (1, 2))",
        "x = [x for x in 'abc']",
        "x = {{1, 2}}",
        "x = lambda: 4",
        "x, *y = 1, 2, 3",
        "x, y = 1",
        "x, y = 1, 2, 3",
        "x[0] = 1",
        "n_layer.x = 1",
        "x += 1",
        "def f(): pass",
        "for x in (1, 2): pass",
        "while x: pass",
        "assert n_layer",
        "del n_layer",
        "del x",
        "x = not_a_name",
        "x = not_a_name if True else 1",
        "x = math.pi",  # without its import
        "time.sleep(9)",
        "x = max",
        "x = ...",
        "x = b'a'",
        "x = 2j",
        "x = (-8) ** 0.5",
        "x = 1 / 0",
        "x = int('four')",
        "x = min(4)",
        "x = [1][2]",
        "x = {{}}[1]",
        "x = {{[]: 1}}",
        "x = 'a' + 1",
        "x = 1 < 'a'",
        "x = '%d' % 'a'",
        "x = 4 +",
    ],
)
def test_anything_else_is_refused_by_file_and_line_and_never_run(tmp_path, line) -> None:
    mark = tmp_path / "mark"
    with pytest.raises(ValueError, match=r"config\.py") as error:
        values("n = 2\n\n" + line.format(mark=str(mark)))
    assert "config.py:3: " in str(error.value) or "line 3" in str(error.value)
    assert "\n" not in str(error.value)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("line", "remedy"),
    [
        ("import os", "remove it, and write the values that it was for"),
        ("exec(open('base.py').read())", "name the other file before this one on the command line"),
        ("x = int(input())", "write the value itself, or give it on the command line"),
        ("x = base", "the name 'base' is not assigned above: write its value, or assign it first"),
    ],
)
def test_what_is_refused_comes_with_a_remedy(line, remedy) -> None:
    with pytest.raises(ValueError, match=remedy):
        values(line)


LARGE = {
    "a power": "x = 2 ** 65",
    "powers": "x = 2 ** 2 ** 7",
    "a tower": "x = 10 ** 10 ** 8",
    "a power of a power": "x = (2 ** 64) ** 64",
    "a small power": "x = 2 ** -65",
    "a power by name": "x = 9\nx **= 99999999",
    "a shift": "x = 1 << 10 ** 12",
    "a long shift": "x = 3 << 1024",
    "digits": "x = int('9' * 4000)",
    "hexadecimal": "x = 0x" + "f" * 10_000,
    "decimal": "x = " + "9" * 10_000,
    "rounding": "x = round(5, -10 ** 8)",
    "rounding by name": "x = round(5, ndigits=-10 ** 8)",
    "factors": "x = 1" + " * 2 ** 64" * 20,
    "doubling": "x = 'ab'\n" + "x = x + x\n" * 24,
    "doubling in place": "x = [1]\n" + "x += x\n" * 24,
    "nesting": "x = [1]\n" + "x = [x, x]\n" * 24,
    "nesting in a dict": "x = 1\n" + "x = {1: x, 2: x}\n" * 24,
    "text in text": "x = 'ab'\n" + "x = f'{x}{x}'\n" * 24,
    "copies": "x = 'a' * 10 ** 9",
    "copies of a list": "x = 10 ** 9 * [1]",
    "a width": "x = f'{1:>99999999}'",
    "a width by name": "w = 10 ** 9\nx = f'{1:{w}}'",
    "digits after the point": "x = f'{1:.99999999f}'",
    "an old width": "x = '%99999999d' % 1",
    "an old width by value": "x = '%*d' % (10 ** 9, 1)",
    "an old width by key": "x = '%(a)99999999d' % {'a': 1}",
    "a literal": "x = '" + "a" * 5000 + "'",
    "signs": "x = " + "-" * 50_000 + "1",
    "a sum": "x = " + "1+" * 30_000 + "1",
    "brackets": "x = " + "(" * 500 + "1" + ")" * 500,
    "lists": "x = " + "[" * 150 + "]" * 150 + " + " + "-" * 900 + "1",
    "blocks": "".join(" " * i + "if 1:\n" for i in range(101)) + " " * 101 + "x = 1",
    "conditions": "x = 1 " + "if 1 else 1 " * 5000,
}


@pytest.mark.parametrize("name", LARGE)
def test_what_is_large_or_deep_is_refused_at_once(name) -> None:
    began = time.perf_counter()
    with pytest.raises(ValueError, match=r"^config\.py"):
        values(LARGE[name])
    assert time.perf_counter() - began < 5
