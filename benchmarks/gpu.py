"""All that needs a GPU, in one call of at most six minutes: its tests, exactness, and a table against nanoGPT.

    python benchmarks/gpu.py --peer PATH_TO_A_NANOGPT_CHECKOUT [--json gpu.json] [--smoke]

It needs torch, numpy, rich, rich-argparse, tiktoken, safetensors and pytest. Each program of the table is a process of
its own. All of them compile while the tests run, then one at a time is timed, and the programs of a row take turns.
Each row has a time limit and is printed when it is there; the JSON comes last. Token ids and weights are random, which
changes no speed. --smoke does everything small, on a CPU.
"""

from __future__ import annotations

import sys

sys.path.pop(0)  # this folder, whose tokenize.py would hide the standard library's

import hashlib
import importlib.util
import json
import os
import random
import re
import signal
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Empty, Queue
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("torch", "numpy", "rich", "rich_argparse", "tiktoken", "safetensors", "pytest")
if missing := [name.replace("_", "-") for name in NEEDED if importlib.util.find_spec(name) is None]:
    sys.exit(f"gpu.py: pip install {' '.join(missing)}")
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

from benchmarks.nanogpt_shakespeare import random_characters
from folio import cli, rng
from folio.config.declare import option
from folio.config.options import Optimizer, System
from folio.generation.sampling import draws, generate
from folio.machine.choices import resolve
from folio.machine.runtime import Runtime
from folio.model.config import GPTConfig
from folio.model.gpt import GPT
from folio.records.metrics import read_metrics
from folio.training import optimizers
from folio.training.batches import MicroBatch
from folio.training.loop import micro_step
from folio.training.nanogpt import load, load_model

LIMITS = {"tests": 150, "exact": 150, "kills": 150, "preset": 60, "sampling": 40, "step": 40}  # seconds
READY = 170.0  # seconds after the start, until which the programs of the table may compile
SMALL = GPTConfig(block_size=32, vocab_size=65, n_layer=1, n_head=1, n_embd=8, bias=False)
Result = dict[str, Any]
Step = Callable[[], object]


@dataclass(frozen=True)
class Options:
    """Test and measure on a GPU."""

    peer: str = option("", "a checkout of nanoGPT; without it there are no ratios")
    json: str = option("", "also write the results to this file")
    smoke: bool = option(False, "everything small, on a CPU")
    work: str = option("", "be one program of the table, which reads from standard input how many calls to time")


def main(options: Options) -> None:
    if options.work:
        _work(options, *options.work.split())
        return
    if not options.smoke and not torch.cuda.is_available():
        sys.exit("gpu.py: there is no GPU; --smoke tries this script on a CPU")
    began, found = time.perf_counter(), {}
    machine = {"torch": torch.__version__, "python": sys.version.split()[0], "device": "cpu"}
    if not options.smoke:
        machine["device"] = torch.cuda.get_device_name()
    print(json.dumps(machine), flush=True)

    def show(name: str, result: Result) -> None:
        found[name] = {**result, "at": round(time.perf_counter() - began, 1)}
        print(f"{name}: {json.dumps(found[name])}", flush=True)

    with (
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor() as threads,
        _Table(options, Path(folder)) as table,
    ):
        checks = {name: threads.submit(CHECKS[name], options) for name in CHECKS}
        for name, check in checks.items():
            show(name, check.result())
        table.wait(began + READY)
        for name, row in table.rows():
            show(name, row())
    text = json.dumps({**machine, "rows": found, "seconds": round(time.perf_counter() - began, 1)}, indent=1)
    print(text)
    if options.json:
        Path(options.json).write_text(text + "\n", encoding="utf-8")


# Processes


def _spawn(command: list[str], cwd: Path, **how: Any) -> subprocess.Popen[str]:
    """A process, the first of a group that ends with it."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "start_new_session": True, **how}
    return subprocess.Popen(command, cwd=cwd, text=True, **streams)


def _end(child: subprocess.Popen[str], limit: float) -> str:
    """The output of a process, which is killed after so many seconds; what is left of its group ends with it."""
    try:
        return child.communicate(timeout=max(0.0, limit))[0] or ""
    except subprocess.TimeoutExpired:
        return f"{_kill(child)}\nended after {limit:.0f} s"
    finally:
        _kill(child)


def _kill(child: subprocess.Popen[str]) -> str:
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.kill()
    return "" if child.stdout and child.stdout.closed else child.communicate()[0] or ""


def _text(output: str) -> str:
    return output.strip()[-1500:]


# Checks


def tests(options: Options) -> Result:
    """pytest -m gpu."""
    files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    how = ["-W", "ignore::pytest.PytestConfigWarning", *["--collect-only"] * options.smoke]  # without pytest-timeout
    child = _spawn([sys.executable, "-m", "pytest", "-q", "-m", "gpu", *how, *files], ROOT)
    output = _end(child, LIMITS["tests"])
    return {"passed": child.returncode == 0, "output": _text(output)}


def exact(options: Options, preset: str = "train_shakespeare_char") -> Result:
    """A run that is killed and resumed has the bits of one that is not, under --deterministic=True, compiled."""
    flags = [f"--compile={not options.smoke}", "--max_iters=150", "--eval_interval=50", "--warmup_iters=10"]
    return _killed(options, preset, flags, [110], LIMITS["exact"])


def kills(options: Options) -> Result:
    """The same with several kills, each soon after a random step, in a run that evaluates and saves every few steps."""
    steps = sorted(random.Random(1).sample(range(290), 2 if options.smoke else 6))
    flags = ["--compile=False", "--max_iters=300", "--eval_interval=10", "--checkpoint_interval=5"]
    return _killed(options, "train_shakespeare_char", flags, steps, LIMITS["kills"])


def _killed(options: Options, preset: str, flags: list[str], steps: list[int], limit: float) -> Result:
    """Compares an undisturbed run and one that is killed soon after each of these steps and started again."""
    until, chance = time.perf_counter() + limit, random.Random(2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        flags = [*_preset(options, folder, preset), *flags, "--deterministic=True", "--always_save_checkpoint=True"]

        def run(out: str) -> subprocess.Popen[str]:
            return _spawn([sys.executable, "train.py", *flags, "--init_from=auto", f"--out_dir={folder / out}"], ROOT)

        whole = run("whole")
        for step in steps:
            killed = run("killed")
            _until(killed, folder / "killed", step)
            time.sleep(chance.uniform(0, 0.1))
            _kill(killed)
        resumed = run("killed")
        outputs = [_end(child, until - time.perf_counter()) for child in (whole, resumed)]
        if whole.returncode or resumed.returncode:
            return {"exact": False, "output": "\n".join(map(_text, outputs))}
        losses, bits = zip(*(_outcome(folder / out) for out in ("whole", "killed")), strict=True)
        warned = [line for output in outputs for line in output.splitlines() if "Warning" in line or "rounding" in line]
        same = losses[0] == losses[1] and bits[0] == bits[1]
        return {"exact": same, "kills": len(steps), "steps": len(losses[0]), "warnings": warned}


def _outcome(out: Path) -> tuple[list[float], list[str]]:
    """The training losses of a run and the hashes of its last checkpoint."""
    losses = [r["loss"] for r in read_metrics(out / "metrics.jsonl") if r["kind"] == "train"]
    last = max((out / "checkpoints").iterdir())
    hashes = [hashlib.sha256((last / f"{n}.safetensors").read_bytes()).hexdigest() for n in ("model", "optimizer")]
    return losses, hashes


def _until(child: subprocess.Popen[str], out: Path, step: int) -> None:
    """Waits until a run's metrics reach a step, or it ends."""
    while child.poll() is None:
        path = out / "metrics.jsonl"
        if path.exists() and any(r["kind"] == "train" and r["step"] >= step for r in read_metrics(path)):
            return
        time.sleep(0.02)


def _preset(options: Options, folder: Path, name: str = "train_shakespeare_char") -> list[str]:
    """Options of a Shakespeare preset on random characters, for both programs; made small for --smoke."""
    data = folder / "data"
    if not data.exists():
        random_characters(data, 1_000_000, 100_000)
    flags = [f"config/{name}.py", f"--dataset={data}", "--eval_iters=1", "--eval_interval=100000"]
    if options.smoke:
        small = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 32, "batch_size": 4}
        flags += ["--device=cpu", "--compile=False", *(f"--{name}={value}" for name, value in small.items())]
    return flags


# The table


class _Program:
    """A process that answers each number of calls with their seconds: ``gpu.py --work``."""

    def __init__(self, options: Options, what: str) -> None:
        argv = [sys.executable, __file__, f"--work={what}", f"--peer={options.peer}", f"--smoke={options.smoke}"]
        self.child = _spawn(argv, ROOT, stdin=subprocess.PIPE)
        self.output: list[str] = []
        self._answers: Queue[Any] = Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.child.stdout is not None
        for line in self.child.stdout:
            if line.startswith("JSON "):
                self._answers.put(json.loads(line[5:]))
            else:
                self.output.append(line)
        self._answers.put(None)

    def answer(self, limit: float) -> Any:
        """The next answer; None if the process ends or is late."""
        with suppress(Empty):
            return self._answers.get(timeout=max(0.1, limit))
        return None

    def ask(self, calls: int, limit: float) -> Any:
        assert self.child.stdin is not None
        with suppress(BrokenPipeError):
            self.child.stdin.write(f"{calls}\n")
            self.child.stdin.flush()
        return self.answer(limit)


class _Loop:
    """A run of ``train.py``, which is stopped between its turns."""

    def __init__(self, argv: list[str], cwd: Path, first: int) -> None:
        self.child = _spawn([sys.executable, "-u", "train.py", *argv], cwd)
        self.first, self.output = first, list[str]()
        self._at: dict[int, float] = {}
        self._pauses = first
        self._paused = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.child.stdout is not None
        for line in self.child.stdout:
            self.output.append(line)
            if match := re.match(r"iter (\d+): loss", line):
                self._at[int(match[1])] = time.perf_counter()
                if int(match[1]) >= self._pauses:
                    os.kill(self.child.pid, signal.SIGSTOP)
                    self._paused.set()
        self._paused.set()

    def wait(self, limit: float) -> bool:
        """Whether the run has paused in time."""
        return self._paused.wait(max(0.1, limit)) and self._pauses in self._at

    def seconds(self, iterations: int, limit: float) -> float | None:
        """Seconds an iteration of so many, after a tenth of them to get going."""
        begin = self._pauses + iterations // 10
        self._pauses = begin + iterations
        self._paused.clear()
        os.kill(self.child.pid, signal.SIGCONT)
        if not self.wait(limit) or begin not in self._at:
            return None
        return (self._at[self._pauses] - self._at[begin]) / iterations


class _Table:
    """The programs, which start and compile at once, and the rows that time them in turn."""

    def __init__(self, options: Options, folder: Path) -> None:
        self._options = options
        self._names = ("nanogpt", "folio") if options.peer else ("folio",)
        self._programs = {(w, n): _Program(options, f"{n} {w}") for w in WORK for n in self._names}
        flags, self._first = _preset(options, folder), 20 if options.smoke else 300
        places = {"nanogpt": Path(options.peer), "folio": ROOT}
        self._loops = {
            n: _Loop([*flags, f"--out_dir={folder / n}"], places[n].resolve(), self._first) for n in self._names
        }

    def __enter__(self) -> _Table:
        return self

    def __exit__(self, *error: object) -> None:
        for each in (*self._programs.values(), *self._loops.values()):
            _kill(each.child)

    def wait(self, until: float) -> None:
        """Waits until all are ready, or late."""
        for loop in self._loops.values():
            loop.wait(until - time.perf_counter())
        self._ready = {key: p.answer(until - time.perf_counter()) for key, p in self._programs.items()}

    def rows(self) -> Iterator[tuple[str, Callable[[], Result]]]:
        yield "preset", self._preset
        for what in WORK:
            yield what, partial(self._row, what)

    def _preset(self) -> Result:
        """Milliseconds an iteration of the whole loop of the Shakespeare preset."""
        until, count = time.perf_counter() + LIMITS["preset"], 100 if self._options.smoke else 400
        times: dict[str, list[float]] = {name: [] for name in self._names}
        for _ in range(4):
            for name, loop in self._loops.items():
                if (each := loop.seconds(count, until - time.perf_counter())) is None:
                    return {"failed": name, "output": _text("".join(loop.output))}
                times[name].append(each)
        found = {name: {"ms": round(1000 * statistics.median(each), 2)} for name, each in times.items()}
        return {**found, **_ratios(times)}

    def _row(self, what: str) -> Result:
        """Tokens per second, and the peak of memory."""
        limit = LIMITS[what.split()[0]]
        until, calls = time.perf_counter() + limit, {name: WORK[what][name] for name in self._names}
        times: dict[str, list[float]] = {name: [] for name in self._names}
        for _ in range(2 if self._options.smoke else 6):  # the first is a warm-up
            for name in self._names:
                program = self._programs[what, name]
                ready = self._ready[what, name]
                each = None if ready is None else program.ask(calls[name], until - time.perf_counter())
                if each is None:
                    return {"failed": name, "output": _text("".join(program.output))}
                times[name].append(each["seconds"] / each["tokens"])
                ready["peak_gb"] = each["peak_gb"]
        times = {name: each[1:] for name, each in times.items()}
        found = {
            name: {
                "tokens_per_second": round(1 / statistics.median(each), 1),
                "peak_gb": self._ready[what, name]["peak_gb"],
            }
            for name, each in times.items()
        }
        memory = [found[n]["peak_gb"] for n in ("folio", "nanogpt") if n in found]
        more = {"memory": round(memory[0] / memory[1], 3)} if len(memory) == 2 and memory[1] else {}
        return {**found, **_ratios(times), **more}


def _ratios(times: dict[str, list[float]]) -> Result:
    """How many times as fast as nanoGPT: the median of the rounds' ratios, and their range."""
    if len(times) < 2:
        return {}
    ratios = [theirs / ours for theirs, ours in zip(times["nanogpt"], times["folio"], strict=True)]
    return {"ratio": round(statistics.median(ratios), 3), "from": round(min(ratios), 3), "to": round(max(ratios), 3)}


# A program


def _work(options: Options, program: str, what: str, size: str) -> None:
    """Times as many calls as each line of standard input says, and answers with the seconds and the tokens of them."""
    make = {"folio step": _our_step, "nanogpt step": _their_step, "folio sampling": _our_sampling}
    call, tokens = make.get(f"{program} {what}", _their_sampling)(options, int(size))
    for _ in range(2):
        call()
    gpu = torch.cuda.is_available()
    wait: Callable[[], object] = torch.cuda.synchronize if gpu else lambda: None
    wait()
    if gpu:
        torch.cuda.empty_cache()  # for the programs beside this one
    print("JSON {}", flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        for _ in range(int(line)):
            call()
        wait()
        seconds = time.perf_counter() - start
        peak = round(torch.cuda.max_memory_allocated() / 1e9, 3) if gpu else 0.0
        print("JSON " + json.dumps({"seconds": seconds, "tokens": tokens * int(line), "peak_gb": peak}), flush=True)


def _shape(options: Options, bias: bool) -> GPTConfig:
    return SMALL if options.smoke else GPTConfig(bias=bias)


def _our_step(options: Options, size: int) -> tuple[Step, int]:
    shape = _shape(options, bias=False)
    runtime = Runtime(resolve(System(device=_device(options)), flops=1e30))
    model = GPT(shape, rng.generator)
    loss = runtime.wrap(model, (size, shape.block_size))
    optimizer = optimizers.optimizer(Optimizer(learning_rate=6e-4), model, runtime.dtype)
    runtime.use_graphs(optimizer)
    rows = runtime.move(torch.randint(shape.vocab_size, (size, shape.block_size + 1)))
    batch, tokens = MicroBatch(rows[:, :-1], rows[:, 1:], None, 1), size * shape.block_size

    def step() -> None:
        runtime.step(optimizer, 6e-4, 1.0, micro_step(runtime, loss, batch, tokens))

    return step, tokens


def _their_step(options: Options, size: int) -> tuple[Step, int]:
    """What nanoGPT's train.py does with its model; on a GPU compiled, in bf16."""
    shape = _shape(options, bias=False)
    ids = np.random.default_rng(0).integers(0, shape.vocab_size, 2 * shape.block_size, dtype=np.uint16)
    device = torch.device(_device(options))
    return load(Path(options.peer), shape, size, ids, device).operations, size * shape.block_size


def _our_sampling(options: Options, size: int) -> tuple[Step, int]:
    """In bf16; the recording of the graphs is in the time."""
    device, count = _device(options), 20 if options.smoke else 500
    model = GPT(_shape(options, bias=True), rng.generator).to(device, torch.bfloat16).eval()
    idx = torch.zeros(size, 1, dtype=torch.long, device=device)

    def sample() -> None:
        generate(model, idx, count, temperature=0.8, top_k=200, uniform=draws(1, size, count))

    return sample, size * count


def _their_sampling(options: Options, size: int) -> tuple[Step, int]:
    """As its sample.py does: weights in float32, bf16 by autocast."""
    device, count = _device(options), 4 if options.smoke else 40
    peer = load_model(Path(options.peer), _shape(options, bias=True)).to(device).eval()
    idx = torch.zeros(size, 1, dtype=torch.long, device=device)

    def sample() -> None:
        with torch.no_grad(), nullcontext() if options.smoke else torch.amp.autocast(device, dtype=torch.bfloat16):
            peer.generate(idx, count, temperature=0.8, top_k=200)

    return sample, size * count


def _device(options: Options) -> str:
    return "cpu" if options.smoke else "cuda"


CHECKS: dict[str, Callable[[Options], Result]] = {
    "tests": tests,
    "exact": exact,
    "exact recipe": partial(exact, preset="speedrun_shakespeare_gpu"),
    "kills": kills,
}
WORK = {  # calls in a round
    "sampling 1": {"nanogpt": 1, "folio": 1},
    "sampling 16": {"nanogpt": 1, "folio": 1},
    "step 12": {"nanogpt": 20, "folio": 20},
    "step 32": {"nanogpt": 10, "folio": 10},
}

if __name__ == "__main__":
    main(cli.parse(Options, sys.argv[1:], "benchmarks/gpu.py", files=False))
