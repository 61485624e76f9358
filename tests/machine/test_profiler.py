"""The time and memory of profiled steps, against counts by hand and the plan."""

from __future__ import annotations

import json
import resource
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from children import Spawn, group, reached, to_its_end
from conftest import SMALL, Outcome, assert_refused
from run_results import assert_same_bits
from torch import nn

from folio import rng
from folio.machine.choices import ATTENTION_BLOCK
from folio.machine.memory import Step, needed
from folio.machine.profiler import Profiler
from folio.machine.wrap import set_attention
from folio.model.config import GPTConfig
from folio.model.gpt import GPT
from folio.model.kernels import BlockedAttention, split_heads_at_once
from folio.records import run_folder
from folio.training.optimizers import adamw

BENCH = [*SMALL[:9], "--vocab_size=64", "--real_data=False", "--profile=True"]
FILES = ["memory.json", "operations.txt", "trace.json"]
CPU = torch.device("cpu")
SHAPE = GPTConfig(block_size=64, vocab_size=256, n_layer=2, n_head=2, n_embd=64, bias=False)
PARAMETERS = 256 * 64 + 64 * 64 + 2 * (12 * 64**2 + 2 * 64) + 64
TENSORS = 2 + 2 * 6 + 1


def read(folder: Path) -> Any:
    return json.loads((folder / "memory.json").read_text())


def trace(folder: Path, name: str) -> int:
    """The number of times that an operation is in the trace."""
    return sum(e["name"] == name for e in json.loads((folder / "trace.json").read_text())["traceEvents"])


def profiled(tmp_path: Path, shape: GPTConfig, rows: int, micro_steps: int, set_to_none: bool = True) -> dict[str, int]:
    """memory.json of two steps."""
    model = GPT(shape, lambda name: rng.generator(1, name))
    set_attention(model, BlockedAttention(ATTENTION_BLOCK), split_heads_at_once)
    optimizer = adamw(model, 1e-3, (0.9, 0.95), 0.1)
    row = torch.zeros(rows, shape.block_size + 1, dtype=torch.long)

    def step() -> None:
        for _ in range(micro_steps):
            model.loss(row[:, :-1], row[:, 1:])[0].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none)

    profiler = Profiler(optimizer, CPU, tmp_path)
    step()
    profiler.start()
    step()
    step()
    profiler.finish()
    return read(tmp_path)


# Profiles of runs


@pytest.fixture
def train(folio: Callable[..., Outcome], story: Path, tmp_path: Path) -> Callable[..., Outcome]:
    """Runs eight steps unless told otherwise."""
    return lambda *more: folio(
        "train", *SMALL, "--max_iters=8", f"--data_dir={story}", f"--out_dir={tmp_path / 'out'}", *more
    )


def test_a_run_writes_a_profile_of_its_steps(train, tmp_path: Path) -> None:
    done = train("--profile=3")
    folder = tmp_path / "out" / "profile"
    assert (done.code, done.err) == (0, "")
    assert sorted(p.name for p in folder.iterdir()) == FILES
    # each of two micro steps has 4 matrices in each of 2 layers, and the head: once forward, twice backward
    assert trace(folder, "aten::mm") == 3 * 2 * 9 * 3
    assert trace(folder, "Optimizer.step#AdamW.step") == 3

    table = (folder / "operations.txt").read_text()
    title, head, *rows = table.splitlines()
    assert title == "the costliest operations of 3 steps"
    assert head.split() == ["ms", "share", "calls"]
    assert len(rows) == 10
    assert [row.split()[2] for row in rows if row.endswith("aten::mm")] == ["162"]
    times = [float(row.split()[0]) for row in rows]
    assert times == sorted(times, reverse=True)
    assert 30 < sum(float(row.split()[1].rstrip("%")) for row in rows) <= 100
    assert table in done.out

    for kind, size in read(folder).items():
        words = {"activations": "activations and the rest"}
        assert f"{size / 1e6:12,.1f} MB  {words.get(kind, kind)}\n" in done.out
    # after the line of the last profiled step
    assert done.out.index("\niter 4:") < done.out.index(table) < done.out.index("\niter 5:")


def test_an_optimizer_that_calls_another_one_is_profiled(train, tmp_path: Path) -> None:
    done = train("--profile=2", "--optimizer=muon")
    assert (done.code, done.err) == (0, "")
    assert trace(tmp_path / "out" / "profile", "Optimizer.step#Muon.step") == 2
    assert read(tmp_path / "out" / "profile")["gradients"] > 0


def test_profiling_does_not_change_the_bits(folio, story: Path, tmp_path: Path) -> None:
    for name, steps in (("plain", 0), ("profiled", 4)):
        argv = [*SMALL, "--dropout=0.1", f"--profile={steps}", f"--data_dir={story}", f"--out_dir={tmp_path / name}"]
        assert folio("train", *argv).code == 0
    assert (tmp_path / "profiled" / "profile").is_dir()
    assert_same_bits(tmp_path / "profiled", tmp_path / "plain")


def test_a_run_that_ends_early_writes_a_shorter_profile(train, tmp_path: Path) -> None:
    done = train("--profile=50")
    assert (done.code, done.err) == (0, "")
    assert "the costliest operations of 6 steps\n" in done.out
    assert trace(tmp_path / "out" / "profile", "Optimizer.step#AdamW.step") == 6


def test_a_run_of_two_steps_has_nothing_to_profile(train, tmp_path: Path) -> None:
    done = train("--profile=3", "--max_iters=2")
    assert (done.code, done.err) == (0, "")
    assert "nothing was profiled: profiling begins at step 2, and the run ended at 2\n" in done.out
    assert not (tmp_path / "out" / "profile").exists()


def test_a_resumed_run_counts_from_its_first_step(train, tmp_path: Path) -> None:
    """Its profile replaces the earlier one."""
    train("--max_iters=5", "--profile=3")
    done = train("--init_from=resume", "--profile=1")
    assert (done.code, done.err) == (0, "")
    assert "the costliest operations of 1 step\n" in done.out
    assert done.out.index("iter 7:") < done.out.index("the costliest")
    assert trace(tmp_path / "out" / "profile", "Optimizer.step#AdamW.step") == 1


@pytest.mark.slow
def test_a_run_that_gets_sigterm_saves_first(spawn: Spawn, story: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    argv = [*SMALL, "--max_iters=100000", "--eval_interval=100000", "--profile=100000", f"--data_dir={story}"]
    child = spawn("-m", "folio", "train", *argv, f"--out_dir={out}", threads=1)
    child.wait_until(reached(out, 10))
    child.kill([child.process.pid], signal.SIGTERM)
    assert child.end() == 143
    said = child.output()
    assert sorted(p.name for p in (out / "profile").iterdir()) == FILES
    assert said.index("saving checkpoint") < said.index("the costliest")


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_the_first_of_several_processes_is_profiled(spawn: Spawn, story: Path, tmp_path: Path, parallel: str) -> None:
    """With DDP it has all weights, and all gradients in the buckets; with FSDP a third of each tensor, rounded up."""
    out = tmp_path / "out"
    few = ["--max_iters=6", "--lr_decay_iters=6", "--profile=3", f"--parallel={parallel}"]
    assert to_its_end(spawn(*group(out, story, *few), threads=1)).count("the costliest operations of 3 steps") == 1
    assert trace(out / "profile", "Optimizer.step#AdamW.step") == 3
    memory = read(out / "profile")
    shape = GPTConfig(block_size=16, vocab_size=59, n_layer=2, n_head=2, n_embd=160, bias=False)
    parts = 3 if parallel == "fsdp" else 1
    assert memory["weights"] == sum(4 * -(-len(p) // parts) * p[0].numel() for p in GPT(shape).parameters())
    assert memory["gradients"] == memory["weights"] or parallel == "fsdp"


# Memory


def test_weights_gradients_and_moments_are_exact_to_the_byte(tmp_path: Path) -> None:
    """AdamW keeps two moments of each parameter, and the number of updates of each tensor."""
    memory = profiled(tmp_path, SHAPE, rows=8, micro_steps=2)
    assert memory["weights"] == memory["gradients"] == 4 * PARAMETERS
    assert memory["optimizer"] == 2 * 4 * PARAMETERS + 4 * TENSORS
    assert memory["total"] == sum(size for kind, size in memory.items() if kind != "total")


def test_gradients_replace_activations(tmp_path: Path) -> None:
    """The peak of one micro step is at the logits, before the first gradient, unless gradients are kept."""
    assert profiled(tmp_path, SHAPE, rows=8, micro_steps=1)["gradients"] == 0
    assert profiled(tmp_path, SHAPE, rows=8, micro_steps=1, set_to_none=False)["gradients"] == 4 * PARAMETERS


@pytest.mark.parametrize("micro_steps", [1, 2])
@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        (SHAPE, 8),
        (GPTConfig(block_size=128, vocab_size=4096, n_layer=3, n_head=2, n_embd=128, bias=False), 4),
        (GPTConfig(block_size=128, vocab_size=64, n_layer=4, n_head=4, n_embd=256, dropout=0.1), 4),
        (GPTConfig(block_size=16, vocab_size=2048, n_layer=2, n_head=2, n_embd=128), 1),
        (replace(SHAPE, position="rope", norm="unweighted", activation="relu2", qk_norm=True, tie_weights=False), 8),
        (replace(SHAPE, logit_softcap=15.0), 8),
    ],
    ids=["small", "many words", "wide, with dropout", "few tokens", "other parts", "capped logits"],
)
def test_the_peak_is_the_planned_one(tmp_path: Path, shape: GPTConfig, rows: int, micro_steps: int) -> None:
    """Within 0.1 %."""
    memory = profiled(tmp_path, shape, rows, micro_steps)
    planned = needed(shape, Step(rows, micro_steps, torch.float32, gpu=False)).total
    print(f"planned {planned:,}, measured {memory['total']:,}: {planned / memory['total']:.5f}")
    assert memory["total"] == pytest.approx(planned, rel=0.001)


def test_activations_are_the_tensors_of_a_step(tmp_path: Path) -> None:
    """By hand: a product of 4,000 bytes, then a gradient that is added to the kept one, and scalars."""
    weight = nn.Parameter(torch.ones(1000))
    optimizer = torch.optim.SGD([weight], 0.1)
    profiler = Profiler(optimizer, CPU, tmp_path)
    weight.grad = torch.zeros(1000)
    profiler.start()
    (weight * 2).sum().backward()
    optimizer.step()
    profiler.finish()
    memory = read(tmp_path)
    assert (memory["weights"], memory["optimizer"], memory["gradients"]) == (4000, 0, 4000)
    assert 4000 <= memory["activations"] < 4100


def test_gradients_are_those_of_the_step_with_the_peak(tmp_path: Path) -> None:
    a, b = nn.Parameter(torch.ones(1000)), nn.Parameter(torch.ones(2000))
    optimizer = torch.optim.SGD([a, b], 0.1)
    profiler = Profiler(optimizer, CPU, tmp_path)
    profiler.start()
    a.square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    for _ in range(2):
        (a.square().sum() + b.square().sum()).backward()
    optimizer.step()
    profiler.finish()
    assert read(tmp_path)["gradients"] == 4 * 3000
    assert not optimizer._optimizer_step_pre_hooks


# Folders that cannot be written


def test_a_folder_that_cannot_be_made_is_refused(folio, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bench_log").touch()
    assert_refused(folio("bench", *BENCH), "bench_log", "File exists", "elsewhere")


def test_a_run_continues_without_its_profile(train, tmp_path: Path, monkeypatch) -> None:
    """If the folder is deleted or full when the profile ends, only the profile is lost."""
    finish = Profiler.finish

    def after_the_folder_went(profiler: Profiler) -> str:
        profiler._folder.rmdir()
        return finish(profiler)

    monkeypatch.setattr(Profiler, "finish", after_the_folder_went)
    done = train("--profile=3")
    assert done.code == 0
    assert "no profile: " in done.out
    assert run_folder.steps(tmp_path / "out")


def test_a_full_disk_is_an_error_and_leaves_no_files(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.ones(10))
    optimizer = torch.optim.SGD([weight], 0.1)
    profiler = Profiler(optimizer, CPU, tmp_path / "profile")
    profiler.start()
    for _ in range(100):
        weight.sum().backward()
        optimizer.step()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"profile could not be written: make room there"):
            profiler.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list((tmp_path / "profile").iterdir()) == []


# folio bench --profile


@pytest.mark.parametrize("real_data", [True, False])
def test_bench_takes_the_vocabulary_size_of_the_data_set(folio, story, monkeypatch, tmp_path, real_data) -> None:
    monkeypatch.chdir(tmp_path)
    argv = [*SMALL[:9], f"--data_dir={story}", "--vocab_size=auto", "--profile=True", f"--real_data={real_data}"]
    done = folio("bench", *argv)
    if real_data:
        size = json.loads((story / "meta.json").read_text())["vocab_size"]
        assert done.code == 0
        assert f"found vocab_size = {size} " in done.out
    else:
        assert_refused(done, "vocab_size=auto", "real_data=False", "--vocab_size=50304")


def test_bench_profiles_three_steps(folio, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = folio("bench", *BENCH)
    assert (done.code, done.err) == (0, "")
    assert sorted(p.name for p in Path("bench_log").iterdir()) == FILES
    assert "the costliest operations of 3 steps\n" in done.out
    assert trace(Path("bench_log"), "aten::mm") == 3 * 9 * 3
