"""Isolates tests from the user's files, and gives them data and the command line.

No test sees data, runs or logs of the checkout, or caches and settings of the home: the package is imported from a copy
of the tracked files, ``ROOT``, each test starts in an empty folder, and ``HOME`` is empty.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # waiting threads leave their cores to others; same bits

import pytest
import torch

CHECKOUT = Path(__file__).resolve().parent.parent


def copy_tracked(folder: Path) -> None:
    """Copies the tracked files and new ones beside them, as in a fresh clone: no data, no runs, no venv."""

    def listed(*which: str) -> list[str]:
        command = ["git", "ls-files", "-z", *which]
        found = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True).stdout
        return [name for name in found.split("\0") if name]

    top = sorted({name.split("/")[0] for name in listed()})
    for name in listed("-co", "--exclude-standard", "--", *top):
        if (CHECKOUT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(CHECKOUT / name, folder / name)


_ROOM = tempfile.TemporaryDirectory(prefix="folio-tests-", ignore_cleanup_errors=True)
ROOT, HOME = (Path(_ROOM.name).resolve() / name for name in ("clone", "home"))
HOME.mkdir()
if (CHECKOUT / ".git").exists():
    copy_tracked(ROOT)
else:  # this is such a copy, and a process of a test imports it
    ROOT = CHECKOUT
sys.path.insert(0, str(ROOT))
for name in [n for n in os.environ if n.startswith(("XDG_", "HF_", "WANDB_", "TRACKIO_")) or n == "TIKTOKEN_CACHE_DIR"]:
    del os.environ[name]
os.environ["HOME"] = str(HOME)

from folio import cli  # noqa: E402
from folio.commands import train as training  # noqa: E402
from folio.data.tokenizers import Tiktoken  # noqa: E402
from folio.preparation.job import prepare  # noqa: E402
from folio.preparation.recipes import known  # noqa: E402

pytest_plugins = ["children", "run_results", "tokenizer_kinds"]  # their fixtures

STORY = ROOT / "tests" / "story.txt"  # 20 kB, written for these tests

# A model and a run so small that a step takes milliseconds
SMALL = shlex.split(
    "--device=cpu --compile=False --dtype=float32 --matmul_precision=highest --n_layer=2 --n_head=2 --n_embd=16 "
    "--block_size=16 --batch_size=4 --gradient_accumulation_steps=2 --eval_iters=2 --eval_interval=5 --max_iters=10 "
    "--warmup_iters=2 --lr_decay_iters=10"
)

# What a test needs of the system
NO_POSIX = "Windows has no signals, pipes, limits and terminals of this kind"
POSIX = pytest.mark.skipif(sys.platform == "win32", reason=NO_POSIX)
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, or limits memory or cores as only Linux does")
IS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
_NO_RIGHT = 1314  # Windows's error for a link that only an administrator or a developer may make

_COMPILED = shutil.ignore_patterns("__pycache__")

# Appended to a training command of the documents, these make it small
TINY = (
    "--device=cpu --compile=False --dtype=float32 --n_layer=1 --n_head=1 --n_embd=8 --block_size=16 --batch_size=4 "
    "--eval_iters=1 --eval_interval=3"
)


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


def assert_refused(outcome: Outcome, *words: object, code: int = 2) -> None:
    """Asserts one line on stderr with all these words, and no traceback or advice of torch."""
    assert outcome.code == code, outcome
    assert outcome.err.count("\n") == 1, outcome.err
    assert outcome.err.startswith("folio: ")
    assert "Traceback" not in outcome.out + outcome.err
    assert "pytorch.org" not in outcome.err
    for word in words:
        assert str(word) in outcome.err


def require_posix() -> None:
    """Skips the module, or the test, that calls it on Windows."""
    if sys.platform == "win32":
        pytest.skip(NO_POSIX, allow_module_level=True)


def make_pipe(path: Path | str) -> None:
    """Makes a pipe with a name, or skips the test on Windows."""
    require_posix()
    os.mkfifo(path)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """Skips a test that needs a symbolic link, where Windows refuses to make one."""
    try:
        return (yield)
    except OSError as error:
        if getattr(error, "winerror", None) == _NO_RIGHT:
            pytest.skip("this user may not make symbolic links")
        raise


def tree(folder: Path) -> dict[str, bytes]:
    """The content of every file below a folder, with hidden files and empty folders."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in sorted(folder.rglob("*"))}


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data beside the project; CI has it."""
    folder = Path(os.environ.get("FOLIO_TEST_DATA", CHECKOUT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data in {folder}; FOLIO_TEST_DATA names another folder")
    return folder


@pytest.fixture(scope="session")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of characters, made from the committed text."""
    folder = tmp_path_factory.mktemp("story")
    prepare(known("shakespeare_char", folder, str(STORY), {}), folder)
    return folder


@pytest.fixture(scope="session")
def finished(story: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The out_dir of a run of SMALL: ten steps, checkpoints of steps 5 and 10. Tests only read it."""
    out = tmp_path_factory.mktemp("finished") / "out"
    argv = [*SMALL, "--learning_rate=1e-2", f"--data_dir={story}", f"--out_dir={out}"]
    training.main(cli.parse(training.Options, argv, "folio train", files=True))
    return out


@pytest.fixture(scope="session")
def items(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of twelve questions in HellaSwag's schema, with words of the committed text."""
    words = iter(STORY.read_text(encoding="utf-8").split())
    path = tmp_path_factory.mktemp("items") / "items.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(12):
            context, *endings = (" ".join(next(words) for _ in range(n)) for n in (2, 3, 2, 4, 3))
            item = {"activity_label": "The Ferry", "ctx_a": context, "ctx_b": "", "ctx": context, "endings": endings}
            file.write(json.dumps({"ind": number, **item, "label": number % 4}) + "\n")
    return path


@pytest.fixture
def gpt2(monkeypatch: pytest.MonkeyPatch, shared_data: Path) -> Tiktoken:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared_data / "tiktoken"))
    return Tiktoken("gpt2")


@pytest.fixture
def folio(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Runs a command in this process: ``folio("train", "--max_iters=3")``."""

    def run(*argv: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["folio", *map(str, argv)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capfd.readouterr()
        return Outcome(int(stop.value.code or 0), out, err)

    return run


def python(*argv: str | Path, cwd: Path = ROOT, timeout: float = 240, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs Python in its own process until it ends: ``python("-m", "folio", "--help")``."""
    command = [sys.executable, *map(str, argv)]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(ROOT), **env}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh clone, for tests that write into it."""
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("clone"), dirs_exist_ok=True, ignore=_COMPILED))


def run(line: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs a command line; python, folio and torchrun are those of this Python."""
    words = shlex.split(line)
    interpreter = {"python": [], "folio": ["-m", "folio"], "torchrun": ["-m", "torch.distributed.run"]}
    if words[0] in interpreter:
        words = [sys.executable, *interpreter[words[0]], *words[1:]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def succeed(line: str, cwd: Path, **env: str) -> str:
    done = run(line, cwd, **env)
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Starts each test in an empty folder."""
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))


@pytest.fixture(autouse=True)
def _restored_torch() -> Iterator[None]:
    """Runs each test with one thread, and restores torch's global settings."""
    precision, deterministic = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # idle OpenMP threads spin, which makes tiny steps slow on busy cores
    yield
    torch.set_float32_matmul_precision(precision)
    torch.use_deterministic_algorithms(deterministic)
    torch.set_num_threads(threads)
