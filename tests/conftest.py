"""What tests share: real data, a small data set, the command line in this process or in its own.

No test sees what somebody left in the checkout (data, runs, logs) or in a home (caches, settings): the package is
imported from a copy of the tracked files, ``ROOT``, each test begins in an empty folder, and ``HOME`` is empty.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

CHECKOUT = Path(__file__).resolve().parent.parent


def copy_tracked(folder: Path) -> None:
    """The tracked files, and new ones beside them, as a fresh clone will have them: no data, no runs, no venv."""

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
else:  # a copy already, which a process of a test imports
    ROOT = CHECKOUT
sys.path.insert(0, str(ROOT))
for name in [n for n in os.environ if n.startswith(("XDG_", "HF_", "WANDB_", "TRACKIO_")) or n == "TIKTOKEN_CACHE_DIR"]:
    del os.environ[name]
os.environ["HOME"] = str(HOME)

from folio import cli  # noqa: E402
from folio.commands import tokenizer as learn  # noqa: E402
from folio.commands import train as training  # noqa: E402
from folio.data.tokenizers import Bytes, Characters, Tiktoken, Tokenizer, named  # noqa: E402
from folio.preparation.job import prepare  # noqa: E402
from folio.preparation.recipes import known  # noqa: E402
from folio.records import run_folder  # noqa: E402
from folio.records.metrics import read_metrics  # noqa: E402

STORY = ROOT / "tests" / "story.txt"  # 20 kB, written for these tests

# A model and a run so small that a step takes milliseconds
SMALL = shlex.split(
    "--device=cpu --compile=False --dtype=float32 --matmul_precision=highest --n_layer=2 --n_head=2 --n_embd=16 "
    "--block_size=16 --batch_size=4 --gradient_accumulation_steps=2 --eval_iters=2 --eval_interval=5 --max_iters=10 "
    "--warmup_iters=2 --lr_decay_iters=10"
)

# What the first 20 losses of SMALL with these options are on tests/story.txt, without and with dropout
GOLDEN_OPTIONS = shlex.split(
    "--seed=7 --learning_rate=1e-2 --min_lr=1e-3 --warmup_iters=5 --lr_decay_iters=20 --max_iters=20"
)
# fmt: off
GOLDEN = [4.08589, 4.05756, 3.97546, 3.87237, 3.77442, 3.65297, 3.57394, 3.48082, 3.38577, 3.35405, 3.25607,
          3.21734, 3.2155, 3.04288, 3.1351, 3.12059, 3.06235, 3.17819, 3.07913, 3.02923]
GOLDEN_DROPOUT = [4.08257, 4.06411, 3.98948, 3.88697, 3.78362, 3.66521, 3.58819, 3.48895, 3.39787, 3.36339, 3.25931,
                  3.22286, 3.21993, 3.049, 3.14018, 3.12454, 3.06729, 3.18024, 3.08338, 3.06985]
# fmt: on

RUN = [*SMALL, "--init_from=auto", "--dropout=0.1", "--learning_rate=1e-2", "--checkpoint_interval=20"]
ALONE = [*RUN, "--max_iters=230", "--lr_decay_iters=230", "--eval_interval=50", "--log_interval=1"]
# more than one of DDP's buckets, and rows that three processes can share
GROUP = [*RUN, "--max_iters=70", "--lr_decay_iters=70", "--eval_interval=35", "--n_embd=160"]
GROUP += ["--gradient_accumulation_steps=3"]

_COMPILED = shutil.ignore_patterns("__pycache__")

# What makes any training that a manual shows small, behind its own flags
TINY = (
    "--device=cpu --compile=False --dtype=float32 --n_layer=1 --n_head=1 --n_embd=8 --block_size=16 --batch_size=4 "
    "--eval_iters=1 --eval_interval=3"
)

WIDE = "The ferry – naïve, 渡し船, 🚢 – didn't  leave .\n\ttwice !  \U0010ffff it 's\n"
KINDS = {"characters": None, "bytes": 256, "gpt2": 50304, "file": 512}  # their vocab_size, None: no more than there are


Spawn = Callable[..., "Child"]
Train = Callable[..., Path]  # folder, *argv → folder


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
def trained(story: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of SMALL on the story, which tests only read: ten steps, checkpoints of steps 5 and 10."""
    out = tmp_path_factory.mktemp("trained") / "out"
    argv = [*SMALL, "--learning_rate=1e-2", f"--data_dir={story}", f"--out_dir={out}"]
    training.main(cli.parse(training.Options, argv, "folio train", files=True))
    return out


@pytest.fixture(scope="session")
def items(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve questions in HellaSwag's schema, in the words of the committed text."""
    words = iter(STORY.read_text(encoding="utf-8").split())
    path = tmp_path_factory.mktemp("items") / "items.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(12):
            context, *endings = (" ".join(next(words) for _ in range(n)) for n in (2, 3, 2, 4, 3))
            item = {"activity_label": "The Ferry", "ctx_a": context, "ctx_b": "", "ctx": context, "endings": endings}
            file.write(json.dumps({"ind": number, **item, "label": number % 4}) + "\n")
    return path


@pytest.fixture(scope="session")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer's file, learnt by folio tokenizer train, into a folder that is not there yet."""
    out = tmp_path_factory.mktemp("tok") / "new" / "tok.json"
    argv = ["train", str(STORY), "--vocab_size=500", f"--out={out}"]
    learn.main(cli.parse(learn.Options, argv, "folio tokenizer", files=False))
    return out


SPELLINGS = ["metaspace", "fallback", "unigram", "wordpiece"]


@pytest.fixture(scope="session")
def spelling(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Files of tokenizers whose ids have no bytes of their own: as sentencepiece makes them, or BERT's."""
    tokenizers = pytest.importorskip("tokenizers")
    models, pre, decoders, trainers = (
        getattr(tokenizers, name) for name in ("models", "pre_tokenizers", "decoders", "trainers")
    )
    folder = tmp_path_factory.mktemp("spelling")

    def made(name: str) -> Path:
        path = folder / f"{name}.json"
        if path.exists():
            return path
        kinds = {"unigram": models.Unigram(), "wordpiece": models.WordPiece(unk_token="[UNK]")}
        fast = tokenizers.Tokenizer(kinds.get(name) or models.BPE(unk_token="<unk>", byte_fallback=name == "fallback"))
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"] if name == "wordpiece" else ["<unk>", "<s>", "</s>"]
        how = {"special_tokens": special, "show_progress": False, "vocab_size": 900}
        if name == "wordpiece":
            fast.normalizer = tokenizers.normalizers.BertNormalizer()
            fast.pre_tokenizer, fast.decoder = pre.BertPreTokenizer(), decoders.WordPiece()
            trainer = trainers.WordPieceTrainer(**how)
        elif name == "unigram":
            fast.pre_tokenizer, fast.decoder = pre.Metaspace(), decoders.Metaspace()
            trainer = trainers.UnigramTrainer(unk_token="<unk>", **how)
        else:
            fast.pre_tokenizer, fast.decoder = pre.Metaspace(), decoders.Metaspace()
            how["special_tokens"] += [f"<0x{b:02X}>" for b in range(256)] if name == "fallback" else []
            trainer = trainers.BpeTrainer(**how)
        fast.train([str(STORY)], trainer)
        spec = json.loads(fast.to_str())
        if name == "fallback":  # as Llama's file: its bytes are no special tokens, and are put together again
            spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] in special[:3]]
            parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
            fast.decoder = decoders.Sequence(parts)
            spec["decoder"] = json.loads(fast.to_str())["decoder"]
        path.write_text(json.dumps(spec), encoding="utf-8")
        return path

    return made


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


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh clone, for tests that leave things in it."""
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("clone"), dirs_exist_ok=True, ignore=_COMPILED))


def run(line: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """One command line with this Python, wherever it says python, folio or torchrun."""
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
    """Where each test begins."""
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))


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


# Processes of their own, and what became of them


class Child:
    """A process of its own session, with what it prints; Python, but for what stands ``before`` it."""

    def __init__(self, argv: list[str], log: Path, threads: int, before: Sequence[str] = (), **more: str) -> None:
        # waiting threads give their core away: other processes may need it, and the bits are the same
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
        self.log = log
        self.out = next((word for word in argv if word.startswith("--out_dir=")), "")
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [*before, sys.executable, *argv],
                cwd=ROOT,
                env=env | more,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    def family(self) -> list[int]:
        """Its own id and those of its children, which may be in sessions of their own."""
        table = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
        pairs = [tuple(map(int, line.split())) for line in table.splitlines()]
        return [self.process.pid, *(pid for pid, parent in pairs if parent == self.process.pid)]

    def left(self) -> list[int]:
        """Every process that was given this one's folder, its own children or not."""
        table = subprocess.run(
            ["ps", "-A", "-ww", "-o", "pid=,args="], capture_output=True, text=True, check=True
        ).stdout
        rows = (line.split() for line in table.splitlines())
        return [int(pid) for pid, *words in rows if self.out and self.out in words]

    def kill(self, pids: list[int] | None = None, number: int = signal.SIGKILL) -> None:
        for pid in self.family() if pids is None else pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def end(self, timeout: float = 120) -> int:
        return self.process.wait(timeout)

    def output(self) -> str:
        return self.log.read_text()

    def wait_until(self, true: Callable[[], bool], timeout: float = 120) -> None:
        """Looks often, for as long as the process lives."""
        end = time.monotonic() + timeout
        while not true():
            assert self.process.poll() is None, f"it ended before:\n{self.output()}"
            assert time.monotonic() < end, f"not within {timeout} s:\n{self.output()}"
            time.sleep(0.002)


@pytest.fixture
def spawn(tmp_path: Path) -> Iterator[Spawn]:
    """Starts processes, and leaves none behind."""
    children: list[Child] = []

    def start(*argv: str, threads: int = 2, **how: Any) -> Child:
        children.append(Child(list(argv), tmp_path / f"log-{len(children)}.txt", threads, **how))
        return children[-1]

    yield start
    for child in children:
        if child.process.poll() is None:
            child.kill()
            child.end()
        child.kill(child.left())


def to_its_end(child: Child) -> str:
    assert child.end() == 0, child.output()
    return child.output()


@pytest.fixture(scope="session")
def undisturbed(story: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a run that nothing happened to: "alone" or "group"; each made once."""
    folder = tmp_path_factory.mktemp("undisturbed")

    def made(which: str) -> Path:
        out = folder / which
        if not out.exists():
            argv = alone(out, story) if which == "alone" else group(out, story)
            to_its_end(Child(argv, folder / f"{which}.txt", 2 if which == "alone" else 1))
        return out

    return made


def alone(out: Path, data: Path) -> list[str]:
    return ["-m", "folio", "train", *ALONE, f"--data_dir={data}", f"--out_dir={out}"]


def group(
    out: Path,
    data: Path,
    *flags: str,
    launcher: Sequence[str] = ("--standalone", "--nproc_per_node=3"),
    script: Any = "",
) -> list[str]:
    """On three ranks of this machine, unless the launcher is told otherwise; ``train.py`` or another script."""
    command = ["-m", "torch.distributed.run", *launcher, str(script or "train.py")]
    return [*command, *GROUP, *flags, f"--data_dir={data}", f"--out_dir={out}"]


def reached(out: Path, step: int) -> Callable[[], bool]:
    """Whether a run has written its train line of this step."""

    def look() -> bool:
        path = out / "metrics.jsonl"
        lines = read_metrics(path) if path.exists() else []
        return any(r["kind"] == "train" and r["step"] >= step for r in lines)

    return look


@pytest.fixture
def train(folio: Callable[..., Outcome], story: Path, tmp_path: Path) -> Train:
    """Runs ``folio train`` into a folder, which is returned: ``train("out", "--max_iters=3")``."""

    def run(name: str, *argv: str, code: int = 0) -> Path:
        outcome = folio("train", *SMALL, f"--data_dir={story}", f"--out_dir={tmp_path / name}", *argv)
        assert outcome.code == code, outcome.err
        (tmp_path / f"{name}.txt").write_text(outcome.out)
        return tmp_path / name

    return run


def said(out: Path) -> list[str]:
    """The lines that the last run into this folder printed."""
    return out.with_name(f"{out.name}.txt").read_text().splitlines()


def records(out: Path, kind: str, *names: str) -> list[Any]:
    """What the lines of one kind say, in order: their fields, or their one field."""
    found = [r for r in read_metrics(out / "metrics.jsonl") if r["kind"] == kind]
    return [r[names[0]] for r in found] if len(names) == 1 else [tuple(r[name] for name in names) for r in found]


def updates(out: Path, step: int) -> set[float]:
    """How many updates the optimiser has made, by its own count."""
    slots = load_file(run_folder.checkpoint_folder(out, step) / "optimizer.safetensors")
    return {float(t) for name, t in slots.items() if name.endswith("/step")}


def timeless(out: Path) -> list[dict[str, Any]]:
    """All records but the starts, without what a clock says."""
    clock = {"seconds", "tokens_per_second", "mfu"}
    kept = [r for r in read_metrics(out / "metrics.jsonl") if r["kind"] != "start"]
    return [{k: v for k, v in r.items() if k not in clock} for r in kept]


def assert_same_bits(out: Path, other: Path) -> None:
    """Weights, optimiser, every loss and what is kept."""
    assert timeless(out) == timeless(other)
    assert run_folder.steps(out) == run_folder.steps(other)
    last = run_folder.steps(other)[-1]
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (run_folder.checkpoint_folder(out, last) / name).read_bytes() == (
            run_folder.checkpoint_folder(other, last) / name
        ).read_bytes()
    assert (out / "best.json").read_bytes() == (other / "best.json").read_bytes()
    assert [p.name for p in (out / "checkpoints").iterdir() if p.name.startswith(".")] == []


# A server, and where there is none


@contextmanager
def server(content: bytes, promised: int | None = None, status: int = 200) -> Iterator[str]:
    """An address on this machine that answers with this content, and may promise more of it."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content) if promised is None else promised))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.server_port}/file"
        finally:
            listening.shutdown()
            thread.join()


@contextmanager
def closed_port() -> Iterator[str]:
    """An address on this machine where nobody answers."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}/file"
