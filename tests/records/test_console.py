"""Terminal output: no control characters reach a terminal, and no character or lost console stops a run."""

from __future__ import annotations

import ast
import io
import os
import shlex
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import NO_POSIX, ROOT, SMALL, Outcome, assert_refused

from folio import cli
from folio.commands import train
from folio.preparation.job import prepare
from folio.preparation.recipes import known
from folio.records import console, run_folder

pty = pytest.importorskip("pty", reason=NO_POSIX)

Folio = Callable[..., Outcome]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("naïve 渡し船\u3000🚢\n\tx", "naïve 渡し船\u3000🚢\n\tx"),
        ("\x1b]0;title\x07\x1b[2J", r"\x1b]0;title\x07\x1b[2J"),
        ("a\rb\x08\x7f\x9b31m", r"a\rb\x08\x7f\x9b31m"),
        ("user\u202egnp.exe\u2028", r"user\u202egnp.exe\u2028"),
        ("\udc9b", r"\udc9b"),
        ("👩\u200d🚀", "👩\u200d🚀"),
    ],
)
def test_control_characters_are_escaped(text: str, shown: str) -> None:
    """Text of any language is unchanged; characters that control a terminal become escapes."""
    assert console.printable(text) == shown


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "cp1252"])
def test_characters_that_a_streams_encoding_lacks_are_escaped(encoding: str) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, errors="strict")
    console.say("é – 渡\x1b", stream)
    text = raw.getvalue().decode(encoding)
    assert text.endswith("\\x1b\n")
    assert text.replace("\\xe9", "é").replace("\\u2013", "–").replace("\\u6e21", "渡") == "é – 渡\\x1b\n"


def test_a_closed_stream_is_dropped_with_one_warning() -> None:
    stream = io.StringIO()
    stream.close()
    with pytest.warns(UserWarning, match="closed file.*continuing without it"):
        console.say("one", stream)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        console.say("two", stream)
        console.best_effort(stream).write("three")


def calls(tree: ast.AST) -> Iterator[str]:
    yield from (ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call))


def test_only_one_module_prints() -> None:
    """Only console.py prints; rich's consoles write to its streams, or escaped text."""
    banned = {"print", "sys.stdout.write", "sys.stderr.write", "click.echo"}
    for path in (ROOT / "folio").rglob("*.py"):
        if path.name != "console.py":
            assert not banned & set(calls(ast.parse(path.read_text(encoding="utf-8")))), path


# Commands


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on text of many scripts that also contains an escape sequence for red."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text("été – 渡し船 🚢 \x1b[31m\n" * 400, encoding="utf-8")
    prepare(known("shakespeare_char", folder / "data", str(folder / "text.txt"), {}), folder / "data")
    argv = [*SMALL, f"--data_dir={folder / 'data'}", f"--out_dir={folder / 'out'}", "--max_iters=2"]
    train.main(cli.parse(train.Options, argv, "folio train", files=True))
    return folder / "out"


def on_a_terminal(*argv: str, **env: str) -> str:
    """The output of a command whose standard output and error are a terminal."""
    ours, theirs = pty.openpty()
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "NO_COLOR": "1", "TERM": "dumb", **env}
    child = subprocess.Popen([sys.executable, "-m", "folio", *argv], stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    said = b""
    try:
        while part := os.read(ours, 65536):
            said += part
    except OSError:  # the other end is closed
        pass
    child.wait()
    os.close(ours)
    return said.decode()


@pytest.mark.parametrize(
    "argv",
    [
        ["data", "info", "nowhere\x1b[31m"],
        ["trian\x1b[31m"],
        ["train", "--n_layr\x1b[31m=3"],
        ["train", "--out_dir=\x1b[31m", "--init_from=resume", "--dataset=\x1b[31m"],
        ["sample", "--out_dir=a\x1b[31m"],
        ["report", "a\x1b[31m"],
        ["plan", "--gpu=\x1b[31m"],
        ["train", "no\x1b[31m.py"],
    ],
    ids=lambda argv: argv[0].strip("\x1b[31m"),
)
def test_messages_have_no_control_characters(folio: Folio, argv: list[str]) -> None:
    outcome = folio(*argv)
    assert outcome.code == 2
    assert "\x1b" not in outcome.out + outcome.err
    assert_refused(outcome, r"\x1b[31m")


def test_names_in_results_have_no_control_characters(folio: Folio, story: Path, tmp_path: Path) -> None:
    """folio data info and a run escape the name of a folder that has some; also into a pipe."""
    folder = tmp_path / "evil\x1b[31m\x07"
    folder.symlink_to(story)
    outcome = folio("data", "info", str(folder))
    assert (outcome.code, "\x1b" in outcome.out) == (0, False)
    assert r"evil\x1b[31m\x07" in outcome.out
    outcome = folio("train", *SMALL, "--max_iters=1", f"--data_dir={folder}", f"--out_dir={tmp_path}/out\x1b[1m")
    assert (outcome.code, "\x1b" in outcome.out) == (0, False)


@pytest.mark.slow
def test_samples_are_escaped_only_on_a_terminal(folio: Folio, trained: Path) -> None:
    argv = ["sample", f"--out_dir={trained}", "--num_samples=1", "--max_new_tokens=3", "--device=cpu"]
    argv += ["--start=été \x1b[31m", "--temperature=0"]
    assert folio(*argv).out.startswith("été \x1b[31m")
    assert on_a_terminal(*argv).startswith(r"été \x1b[31m")


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_console_that_is_not_utf8(trained: Path, tmp_path: Path, encoding: str) -> None:
    """A run samples characters that the console lacks, and a wrong option is refused in one line."""
    flags = [*SMALL, f"--data_dir={trained.with_name('data')}", f"--out_dir={tmp_path / 'out'}", "--max_iters=1"]
    argv = shlex.join([*flags, "--sample_interval=1", "--sample_prompt=渡し船 🚢"])
    done = shell(f"$FOLIO train {argv} > {tmp_path / 'said.txt'}", PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (0, "")
    assert r"\u6e21\u3057\u8239 \U0001f6a2" in (tmp_path / "said.txt").read_text(encoding=encoding)
    done = shell("$FOLIO train --n_layer=x; $FOLIO --help > /dev/null", PYTHONIOENCODING=encoding)
    assert done.stderr == "folio: --n_layer='x': must be int\n"
    assert done.returncode == 0


def shell(line: str, **names: Any) -> subprocess.CompletedProcess[str]:
    """Runs a line of bash, where $FOLIO is the command and the names are variables."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "FOLIO": f"{sys.executable} -m folio"}
    env |= {name: str(value) for name, value in names.items()}
    return subprocess.run(["bash", "-c", line], env=env, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("console_is", "warned"),
    [
        ("> /dev/full", 1),
        ("| head -1 > /dev/null", 1),
        (">&-", 0),
        (">&- 2>&-", 0),
        ("> /dev/full 2> /dev/full", 0),
    ],
)
def test_a_run_continues_without_its_console(story: Path, tmp_path: Path, console_is: str, warned: int) -> None:
    """Its output does not end up in one of its files, although the descriptor of standard output was free."""
    argv = " ".join([*SMALL, f"--data_dir={story}", f"--out_dir={tmp_path / 'out'}", "--log_txt=True"])
    done = shell(f"set -o pipefail; $FOLIO train {argv} {console_is}")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("continuing without it") == warned
    assert done.stderr.count("\n") == warned
    assert run_folder.steps(tmp_path / "out") == [5, 10]
    assert all(line[0].isdigit() for line in (tmp_path / "out" / "log.txt").read_text().splitlines())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("$FOLIO plan > /dev/full", 2, "folio: standard output cannot be written: No space left on device\n"),
        ("$FOLIO sample $ARGV > /dev/full", 2, "folio: standard output cannot be written: No space left on device\n"),
        ("$FOLIO train --help > /dev/full", 2, "folio: No space left on device\n"),
        ("set -o pipefail; $FOLIO sample $ARGV --num_samples=1 --max_new_tokens=100000 | head -c 5", 141, ""),
        ("$FOLIO plan >&-", 0, ""),
        ("$FOLIO plan --gpu=none 2>&-", 2, ""),
    ],
)
def test_a_result_that_cannot_be_written_is_an_error(trained: Path, line: str, code: int, said: str) -> None:
    done = shell(line, ARGV=f"--out_dir={trained} --device=cpu")
    assert (done.returncode, done.stderr) == (code, said)
