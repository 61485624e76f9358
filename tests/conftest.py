"""What tests share: real data, a small data set, the command line in this process or in its own."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from folio import cli
from folio.commands import tokenizer as learn
from folio.datasets.prepare import prepare
from folio.datasets.recipes import known
from folio.tokenizer import Bytes, Characters, Tiktoken, Tokenizer, named

ROOT = Path(__file__).resolve().parent.parent
STORY = ROOT / "tests" / "story.txt"  # 20 kB, written for these tests

# A model and a run so small that a step takes milliseconds
SMALL = shlex.split(
    "--device=cpu --compile=False --dtype=float32 --matmul_precision=highest --n_layer=2 --n_head=2 --n_embd=16 "
    "--block_size=16 --batch_size=4 --gradient_accumulation_steps=2 --eval_iters=2 --eval_interval=5 --max_iters=10 "
    "--warmup_iters=2 --lr_decay_iters=10"
)


WIDE = "The ferry – naïve, 渡し船, 🚢 – didn't  leave .\n\ttwice !  \U0010ffff it 's\n"
KINDS = {"characters": None, "bytes": 256, "gpt2": 50304, "file": 512}  # their vocab_size, None: no more than there are


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


def assert_refused(outcome: Outcome, *words: object, code: int = 2) -> None:
    """One line on stderr, which holds all these words; no traceback anywhere, none of torch's advice."""
    assert outcome.code == code, outcome
    assert outcome.err.count("\n") == 1, outcome.err
    assert outcome.err.startswith("folio: ")
    assert "Traceback" not in outcome.out + outcome.err
    assert "pytorch.org" not in outcome.err
    for word in words:
        assert str(word) in outcome.err


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, with what it holds; hidden ones and empty folders as well."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in sorted(folder.rglob("*"))}


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data beside the project; CI has it."""
    folder = Path(os.environ.get("FOLIO_TEST_DATA", ROOT.parent / "shared" / "data"))
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
def tok(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer's file, learnt by folio tokenizer train, into a folder that is not there yet."""
    out = tmp_path_factory.mktemp("tok") / "new" / "tok.json"
    argv = ["train", str(STORY), "--vocab_size=500", f"--out={out}"]
    learn.main(cli.parse(learn.Options, argv, "folio tokenizer", files=False))
    return out


@pytest.fixture
def gpt2(monkeypatch: pytest.MonkeyPatch, shared_data: Path) -> Tiktoken:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared_data / "tiktoken"))
    return Tiktoken("gpt2")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> tuple[Tokenizer, int]:
    """Each tokenizer, and a vocab_size for it, more than it needs where that is usual."""
    makers: dict[str, Callable[[], Tokenizer]] = {
        "characters": lambda: Characters("".join(sorted(set(WIDE + STORY.read_text(encoding="utf-8"))))),
        "bytes": Bytes,
        "gpt2": lambda: request.getfixturevalue("gpt2"),
        "file": lambda: named(str(request.getfixturevalue("tok"))),
    }
    made = makers[request.param]()
    return made, KINDS[request.param] or made.size


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
    """Runs Python in its own process, to its end; ``python("-m", "folio", "--help")``."""
    command = [sys.executable, *map(str, argv)]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(ROOT), **env}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(autouse=True)
def _restored_torch() -> Iterator[None]:
    """One thread for each test; torch's global settings are left as they were."""
    precision, deterministic = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # idle OpenMP threads spin, which makes tiny steps slow on busy cores
    yield
    torch.set_float32_matmul_precision(precision)
    torch.use_deterministic_algorithms(deterministic)
    torch.set_num_threads(threads)
