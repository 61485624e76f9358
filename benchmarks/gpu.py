"""All that needs a GPU, in one call of at most six minutes: its tests, exactness, and a table against nanoGPT.

    python benchmarks/gpu.py --peer PATH_TO_A_NANOGPT_CHECKOUT [--json gpu.json] [--smoke]

It needs torch, numpy, rich, rich-argparse, tiktoken, safetensors and pytest. Each row runs in its own process with a
time limit, and is printed when it is there; the JSON comes last. Meanwhile other processes compile the models of the
table into PyTorch's cache. Token ids and weights are random, which changes no speed. --smoke does everything small, on
a CPU.
"""

from __future__ import annotations

import sys

sys.path.pop(0)  # this folder, whose tokenize.py would hide the standard library's

import hashlib
import importlib.util
import json
import os
import pickle
import re
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("torch", "numpy", "rich", "rich_argparse", "tiktoken", "safetensors", "pytest")
if missing := [name.replace("_", "-") for name in NEEDED if importlib.util.find_spec(name) is None]:
    sys.exit(f"gpu.py: pip install {' '.join(missing)}")
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

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

SECONDS = 350.0  # of the whole call
LIMITS = {"tests": 100, "exact": 80, "preset": 100, "sampling": 60, "step 12": 80, "step 32": 80}  # seconds
SMALL = GPTConfig(block_size=32, vocab_size=65, n_layer=1, n_head=1, n_embd=8, bias=False)
Result = dict[str, Any]
Step = Callable[[], object]


@dataclass(frozen=True)
class Options:
    """Test and measure on a GPU."""

    peer: str = option("", "a checkout of nanoGPT; without it there are no ratios")
    json: str = option("", "also write the results to this file")
    smoke: bool = option(False, "everything small, on a CPU")
    row: str = option("", f"only this row, in this process: {', '.join(LIMITS)}")
    compile_only: bool = option(False, "only compile the models of the row")


def main(options: Options) -> None:
    if options.row:
        name, _, size = options.row.partition(" ")
        print("JSON " + json.dumps(ROWS[name](options, *map(int, size.split()))), flush=True)
        return
    if not options.smoke and not torch.cuda.is_available():
        sys.exit("gpu.py: there is no GPU; --smoke tries this script on a CPU")
    began, found = time.perf_counter(), {}
    machine = {"torch": torch.__version__, "python": sys.version.split()[0], "device": "cpu"}
    if not options.smoke:
        machine["device"] = torch.cuda.get_device_name()
    print(json.dumps(machine), flush=True)
    ahead = [_start(options, name, "--compile_only=True") for name in LIMITS if name.startswith("step")]
    for name, limit in LIMITS.items():
        if name == "preset":  # from here on time counts
            for child in ahead:
                _end(child, began + SECONDS / 2 - time.perf_counter())
        start = time.perf_counter()
        output = _end(_start(options, name), min(limit, began + SECONDS - start))
        *_, last = ["", *output.strip().splitlines()]
        result = json.loads(last[5:]) if last.startswith("JSON ") else {"failed": output[-3000:]}
        found[name] = {**result, "seconds": round(time.perf_counter() - start, 1)}
        print(f"{name}: {json.dumps(found[name])}", flush=True)
    text = json.dumps({**machine, "rows": found, "seconds": round(time.perf_counter() - began, 1)}, indent=1)
    print(text)
    if options.json:
        Path(options.json).write_text(text + "\n", encoding="utf-8")


# Processes


def _start(options: Options, row: str, *more: str) -> subprocess.Popen[str]:
    """A row in its own process, the first of a group that ends with it."""
    argv = [sys.executable, __file__, f"--row={row}", f"--peer={options.peer}", f"--smoke={options.smoke}", *more]
    return _spawn(argv, ROOT, start_new_session=True)


def _spawn(command: list[str], cwd: Path, **how: Any) -> subprocess.Popen[str]:
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **how}
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


# Rows


def tests(options: Options) -> Result:
    """pytest -m gpu."""
    files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    how = ["-W", "ignore::pytest.PytestConfigWarning", *["--collect-only"] * options.smoke]  # without pytest-timeout
    child = _spawn([sys.executable, "-m", "pytest", "-q", "-m", "gpu", *how, *files], ROOT)
    output = _end(child, LIMITS["tests"] - 5)
    return {"passed": child.returncode == 0, "output": _text(output)}


def exact(options: Options) -> Result:
    """A run that is killed and resumed has the bits of one that is not, under --deterministic=True, compiled."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        flags = [*_preset(options, folder), "--deterministic=True", f"--compile={not options.smoke}"]
        flags += ["--max_iters=150", "--eval_interval=50", "--always_save_checkpoint=True", "--warmup_iters=10"]

        def run(out: str, *more: str) -> subprocess.Popen[str]:
            return _spawn([sys.executable, "train.py", *flags, *more, f"--out_dir={folder / out}"], ROOT)

        whole, killed = run("whole"), run("killed")
        _until(killed, folder / "killed", 110)
        _kill(killed)
        resumed = run("killed", "--init_from=resume")
        outputs = [_end(child, LIMITS["exact"]) for child in (whole, resumed)]
        if whole.returncode or resumed.returncode:
            return {"exact": False, "output": "\n".join(map(_text, outputs))}
        losses, bits = zip(*(_outcome(folder / out) for out in ("whole", "killed")), strict=True)
        warned = [line for output in outputs for line in output.splitlines() if "Warning" in line or "rounding" in line]
        return {"exact": losses[0] == losses[1] and bits[0] == bits[1], "steps": len(losses[0]), "warnings": warned}


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


def _preset(options: Options, folder: Path) -> list[str]:
    """Options of the Shakespeare preset on random characters, for both programs; made small for --smoke."""
    data = folder / "data"
    if not data.exists():
        data.mkdir()
        characters = [chr(48 + i) for i in range(65)]
        for split, size in (("train", 1_000_000), ("val", 100_000)):
            np.random.default_rng(0).integers(0, 65, size, dtype=np.uint16).tofile(data / f"{split}.bin")
        meta = {"vocab_size": 65, "itos": dict(enumerate(characters)), "stoi": {c: i for i, c in enumerate(characters)}}
        (data / "meta.pkl").write_bytes(pickle.dumps(meta))
    flags = ["config/train_shakespeare_char.py", f"--dataset={data}", "--eval_iters=1", "--eval_interval=100000"]
    if options.smoke:
        small = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 32, "batch_size": 4}
        flags += ["--device=cpu", "--compile=False", *(f"--{name}={value}" for name, value in small.items())]
    return flags


def preset(options: Options) -> Result:
    """Milliseconds an iteration of the whole loop of the Shakespeare preset, between two lines of the output."""
    first, last = (20, 100) if options.smoke else (300, 1100)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        flags, found = _preset(options, folder), {}
        programs = {"nanogpt": Path(options.peer)} if options.peer else {}
        for program, cwd in {**programs, "folio": ROOT}.items():
            argv = [sys.executable, "-u", "train.py", *flags, f"--out_dir={folder / program}"]
            child = _spawn(argv, cwd)
            at, lines = {}, []
            assert child.stdout is not None
            for line in child.stdout:
                lines.append(line)
                if match := re.match(r"iter (\d+): loss", line):
                    at[int(match[1])] = time.perf_counter()
                if last in at:
                    break
            _kill(child)
            marks = [at[step] for step in range(first, last + 1, (last - first) // 4) if step in at]
            if len(marks) < 5:
                return {**found, "failed": program, "output": _text("".join(lines))}
            each = [1000 * (b - a) / ((last - first) // 4) for a, b in pairwise(marks)]
            found[program] = {"ms": statistics.median(each), "from": min(each), "to": max(each)}
        return _ratio(found, "ms")


def step(options: Options, size: int) -> Result:
    """Tokens per second and peak memory of training steps of GPT-2 124M in bf16, with so many rows."""
    shape, rounds, count = (SMALL, 2, 2) if options.smoke else (GPTConfig(bias=False), 5, 10)
    makes = {"nanogpt": _their_step, "folio": _our_step} if options.peer else {"folio": _our_step}
    steps: dict[str, Step] = {}
    found: dict[str, Result] = {}
    for name, make in makes.items():
        before = _memory()
        steps[name] = make(options, shape, size)
        for _ in range(3):
            steps[name]()
        found[name] = {"peak_gb": round((_memory(peak=True) - before) / 1e9, 3)}
        if options.compile_only:
            steps.clear()
    if options.compile_only:
        return {}
    times = _in_turn(steps, rounds, count)
    for name, each in times.items():
        found[name] |= {"tokens_per_second": round(size * shape.block_size / statistics.median(each))}
    ratios = [a / b for a, b in zip(times.get("nanogpt", []), times["folio"], strict=False)]
    memory = {"memory": round(found["folio"]["peak_gb"] / (found["nanogpt"]["peak_gb"] or 1), 3)} if ratios else {}
    return {**found, **_spread(ratios), **memory}


def _memory(peak: bool = False) -> int:
    """Bytes of tensors on the GPU: now, which begins a new peak, or at the peak since then."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.synchronize()
    if peak:
        return torch.cuda.max_memory_allocated()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _our_step(options: Options, shape: GPTConfig, size: int) -> Step:
    runtime = Runtime(resolve(System(device="cpu" if options.smoke else "cuda"), flops=1e30))
    model = GPT(shape, rng.generator)
    loss = runtime.wrap(model, (size, shape.block_size))
    optimizer = optimizers.optimizer(Optimizer(learning_rate=6e-4), model)
    runtime.use_graphs(optimizer)
    rows = runtime.move(torch.randint(shape.vocab_size, (size, shape.block_size + 1)))
    batch = MicroBatch(rows[:, :-1], rows[:, 1:], None, 1)

    def step() -> None:
        nats, _ = micro_step(runtime, loss, batch, size * shape.block_size)
        runtime.step(optimizer, 6e-4, 1.0, nats)

    return step


def _their_step(options: Options, shape: GPTConfig, size: int) -> Step:
    """What nanoGPT's train.py does with its model; on a GPU compiled, in bf16."""
    ids = np.random.default_rng(0).integers(0, shape.vocab_size, 2 * shape.block_size, dtype=np.uint16)
    device = torch.device("cpu" if options.smoke else "cuda")
    return load(Path(options.peer), shape, size, ids, device).operations


def _in_turn(steps: dict[str, Step], rounds: int, count: int) -> dict[str, list[float]]:
    """Seconds a step, for each program and round."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for _ in range(rounds):
        for name, step in steps.items():
            wait()
            start = time.perf_counter()
            for _ in range(count):
                step()
            wait()
            times[name].append((time.perf_counter() - start) / count)
    return times


def sampling(options: Options) -> Result:
    """Tokens per second of sampling from GPT-2 124M in bf16, the recording of the graphs included."""
    kind = "cpu" if options.smoke else "cuda"
    shape, ours, theirs = (SMALL, 20, 4) if options.smoke else (GPTConfig(), 500, 40)
    model = GPT(shape, rng.generator).to(kind, torch.bfloat16).eval()
    peer = load_model(Path(options.peer), shape).to(kind).eval() if options.peer else None
    found: Result = {}
    for B in (1, 16):
        idx = torch.zeros(B, 1, dtype=torch.long, device=kind)

        def folio(B: int = B, idx: torch.Tensor = idx) -> None:
            generate(model, idx, ours, temperature=0.8, top_k=200, uniform=draws(1, B, ours))

        def nanogpt(idx: torch.Tensor = idx) -> None:
            with torch.no_grad(), nullcontext() if options.smoke else torch.amp.autocast(kind, dtype=torch.bfloat16):
                peer.generate(idx, theirs, temperature=0.8, top_k=200)

        steps: dict[str, Step] = {"nanogpt": nanogpt, "folio": folio} if peer else {"folio": folio}
        _in_turn(steps, 1, 1)
        times = _in_turn(steps, 3, 1)
        speeds = {name: [B * (ours if name == "folio" else theirs) / t for t in each] for name, each in times.items()}
        ratios = [b / a for a, b in zip(speeds.get("nanogpt", []), speeds["folio"], strict=False)]
        medians = {name: {"tokens_per_second": round(statistics.median(each), 1)} for name, each in speeds.items()}
        found[f"batch {B}"] = {**medians, **_spread(ratios)}
        print(B, found[f"batch {B}"], flush=True)
    return found


def _ratio(found: dict[str, Result], name: str) -> Result:
    return {**found, **(_spread([found["nanogpt"][name] / found["folio"][name]]) if "nanogpt" in found else {})}


def _spread(ratios: list[float]) -> Result:
    """The median of the rounds' ratios, and their range."""
    if not ratios:
        return {}
    return {"ratio": round(statistics.median(ratios), 3), "from": round(min(ratios), 3), "to": round(max(ratios), 3)}


ROWS: dict[str, Callable[..., Result]] = {
    "tests": tests,
    "exact": exact,
    "preset": preset,
    "step": step,
    "sampling": sampling,
}

if __name__ == "__main__":
    main(cli.parse(Options, sys.argv[1:], "benchmarks/gpu.py", files=False))
