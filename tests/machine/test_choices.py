"""What every ``auto`` becomes, on this machine and on others, in a new run and in a resumed one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, Outcome, assert_refused, python

from folio.config.options import Processes, System
from folio.errors import UserError
from folio.machine.choices import resolve
from folio.machine.probe import Machine

CPU = System(device="cpu", dtype="float32", compile=False, matmul_precision="highest")

# The variables of a launcher. The port is invalid, so a process that is not refused fails at once
LAUNCHED = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "99999"}


@dataclass(frozen=True)
class Fake(Machine):
    """Another machine, with a peak of 1 TFLOP/s."""

    kinds: tuple[str, ...] = ("cpu",)
    count: int = 0
    dtype: str = "float32"
    compiler: bool = True
    bfloat16: bool = True

    def has(self, kind: str) -> bool:
        return kind in self.kinds

    def gpus(self) -> int:
        return self.count

    def processor(self, device: str) -> str:
        return f"the processor of {device}"

    def fast_dtype(self, device: str) -> str:
        return self.dtype

    def has_bfloat16(self, device: str) -> bool:
        return self.bfloat16

    def can_compile(self) -> bool:
        return self.compiler

    def peak(self, device: str, dtype: str) -> float:
        return 1e12


GPU = Fake(("cuda", "cpu"), 2, "bfloat16")
LONG = 1e13  # FLOP: 100 s at a tenth of the peak


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets a launcher's variables."""

    def to(**changes: str) -> None:
        for name, value in {**LAUNCHED, **changes}.items():
            monkeypatch.setenv(name, value)

    return to


def state() -> tuple[object, ...]:
    return torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()


# What auto becomes


def test_the_choices_on_a_gpu() -> None:
    found = resolve(System(), machine=GPU, flops=LONG)
    assert found.resolved == {
        "device": "cuda",
        "dtype": "bfloat16",
        "compile": True,
        "matmul_precision": "high",
        "weight_copy": True,
        "attention_block": 0,
        "logits": 1 << 28,
        "graphs": True,
        "deterministic": False,
        "world": 1,
        "parallel": "ddp",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "processor": "the processor of cuda:0",
    }
    assert found.device == "cuda:0"


def test_the_choices_on_this_cpu() -> None:
    found = resolve(replace(CPU, dtype="auto", compile="auto"), flops=LONG)
    assert (found.device, found.compile, found.world, found.grouped) == ("cpu", False, 1, False)
    assert found.processor == torch.backends.cpu.get_cpu_capability()


@pytest.mark.parametrize(
    ("machine", "flops", "compiled"),
    [(GPU, LONG, True), (GPU, LONG / 4, False), (replace(GPU, compiler=False), LONG, False), (Fake(), LONG, False)],
)
def test_a_run_is_compiled_if_that_pays(machine: Fake, flops: float, compiled: bool) -> None:
    """On a GPU with a compiler, if the run takes more than half a minute."""
    assert resolve(System(), machine=machine, flops=flops).compile == compiled


@pytest.mark.parametrize(
    ("system", "how"),
    [
        (System(dtype="float16"), {}),
        (System(device="cpu"), {}),
        (System(), {"documents": True}),
        (System(), {"processes": Processes(activation_checkpointing="block")}),
        (System(), {"before": {"device": "cuda"}}),  # a run that began without them
    ],
)
def test_steps_that_do_not_run_as_graphs(system: System, how: dict[str, Any]) -> None:
    assert not resolve(system, machine=GPU, **how).graphs
    assert resolve(System(), machine=GPU, before={"graphs": True}).graphs


def test_several_processes_have_no_graphs(launched: Callable[..., None]) -> None:
    launched(WORLD_SIZE="2")
    assert not resolve(System(), machine=GPU).graphs


def test_several_processes_do_not_use_mps(launched: Callable[..., None]) -> None:
    """gloo does not support MPS."""
    apple = Fake(("mps", "cpu"))
    assert resolve(System(), machine=apple).device == "mps"
    launched(WORLD_SIZE="2")
    assert resolve(System(), machine=apple).device == "cpu"


def test_each_rank_has_a_gpu_of_its_own(launched: Callable[..., None]) -> None:
    launched(RANK="1", LOCAL_RANK="1", WORLD_SIZE="2")
    found = resolve(System(), Processes(parallel="fsdp"), GPU)
    assert (found.device, found.rank, found.world, found.shards) == ("cuda:1", 1, 2, 2)
    assert found.backend == "nccl"
    assert resolve(System(), Processes(backend="gloo"), GPU).backend == "gloo"


def test_resolve_does_not_change_torchs_state(launched: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    launched(WORLD_SIZE="2")
    before = state()
    found = resolve(System(device="cpu", deterministic=True))
    assert found.deterministic
    assert state() == before


def test_the_module_does_not_import_torch() -> None:
    done = python("-c", "import sys, folio.machine.choices, folio.machine.probe; print('torch' in sys.modules)")
    assert done.stdout == "False\n", done.stderr


# The choices of the run that is resumed


def test_auto_repeats_the_choices_of_the_resumed_run() -> None:
    """A resumed run keeps its choices if the machine allows it; explicit options win."""
    before = {"device": "cpu", "dtype": "float32", "compile": False, "matmul_precision": "highest"}
    again = resolve(System(), before=before).resolved
    assert {name: again[name] for name in before} == before
    asked = System(device="cpu", dtype="bfloat16", matmul_precision="medium", compile=False)
    found = resolve(asked, before=before)
    assert (found.dtype, found.matmul_precision) == ("bfloat16", "medium")


def test_choices_that_this_machine_does_not_allow_are_resolved_again() -> None:
    before = {"device": "cuda", "dtype": "float16"}
    found = resolve(System(), machine=Fake(dtype="bfloat16"), before=before)
    assert (found.device, found.dtype) == ("cpu", "bfloat16")
    assert resolve(System(), machine=GPU, before=before).dtype == "float16"


def test_differences_are_named() -> None:
    """Each choice that changes the bits is named; equal choices have no differences."""
    found = resolve(CPU)
    assert found.differences(dict(found.resolved)) == []
    before = {**found.resolved, "world": 4, "torch": "2.0"}
    assert found.differences(before) == ["world was 4 and is 1", f"torch was 2.0 and is {torch.__version__}"]


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_gpu_needs_an_option_for_the_same_bits(deterministic: bool) -> None:
    found = resolve(System(deterministic=deterministic), machine=GPU)
    why = [] if deterministic else ["a GPU needs --deterministic=True for the same bits"]
    assert found.differences(dict(found.resolved)) == why


# Refused


@pytest.mark.parametrize("local_rank", ["0", "3"])
def test_more_processes_than_gpus(launched: Callable[..., None], local_rank: str) -> None:
    """Every process is refused, also those that would have a GPU."""
    launched(LOCAL_RANK=local_rank, WORLD_SIZE="8", LOCAL_WORLD_SIZE="4")
    with pytest.raises(ValueError, match="there is no cuda:3, this machine has 2 GPUs"):
        resolve(System(device="cuda"), machine=GPU)


@pytest.mark.parametrize(
    ("device", "words"),
    [("xyzzy", "must be auto, cpu, cuda"), ("mps", "this machine has none"), ("cuda:2", "there is no cuda:2")],
)
def test_a_missing_device(device: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        resolve(System(device=device), machine=GPU)


@pytest.mark.parametrize("name", LAUNCHED)
def test_a_missing_variable_of_the_launcher(
    folio: Callable[..., Outcome], story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The missing variable is named in one line."""
    for other, value in LAUNCHED.items():
        monkeypatch.setenv(other, value)
    monkeypatch.delenv(name)
    outcome = folio("train", *SMALL, f"--data_dir={story}", f"--out_dir={tmp_path / 'out'}")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert (
        f"{name} is not set, but a launcher sets all of RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT"
        in outcome.err
    )


@pytest.mark.parametrize(
    ("env", "flags", "words"),
    [
        ({"RANK": "abc"}, [], ["RANK=abc: must be a whole number"]),
        ({"LOCAL_RANK": "-1"}, [], ["LOCAL_RANK=-1: must be a whole number"]),
        ({"WORLD_SIZE": ""}, [], ["WORLD_SIZE=: must be a whole number"]),
        ({"RANK": "5", "WORLD_SIZE": "2"}, [], ["RANK=5", "below WORLD_SIZE=2"]),
        ({}, ["--parallel=fsdp", "--dtype=float16"], ["dtype=float16", "parallel=fsdp", "--dtype=bfloat16"]),
        ({}, ["--parallel=fsdp", "--check_replicas_every=5"], ["check_replicas_every=5", "parallel=fsdp"]),
        ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, ["--parallel=hsdp"], ["WORLD_SIZE=2", "use --parallel=fsdp"]),
        ({"WORLD_SIZE": "4"}, ["--parallel=hsdp"], ["LOCAL_WORLD_SIZE=not set", "use --parallel=fsdp"]),
        (
            {"WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "4"},
            ["--parallel=hsdp"],
            ["LOCAL_WORLD_SIZE=4", "use --parallel=fsdp"],
        ),
    ],
)
def test_inconsistent_variables_and_options_are_refused(
    folio: Callable[..., Outcome],
    story: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    env: dict[str, str],
    flags: list[str],
    words: list[str],
) -> None:
    for name, value in {**LAUNCHED, **env}.items():
        monkeypatch.setenv(name, value)
    outcome = folio("train", *SMALL, f"--data_dir={story}", f"--out_dir={tmp_path / 'out'}", *flags)
    assert_refused(outcome, *words)
    assert not (tmp_path / "out").exists()


def test_what_mps_lacks(launched: Callable[..., None]) -> None:
    """bfloat16 on an older macOS, and other processes; each in one line."""
    apple = Fake(("mps", "cpu"), bfloat16=False)
    assert resolve(System(), machine=apple).dtype == "float32"
    with pytest.raises(UserError, match="dtype=bfloat16: on MPS it needs macOS 14 or later: use --dtype=float16"):
        resolve(System(dtype="bfloat16"), machine=apple)
    assert resolve(System(dtype="bfloat16"), machine=replace(apple, bfloat16=True)).kind == "mps"
    launched(WORLD_SIZE="2")
    assert resolve(System(), machine=apple).kind == "cpu"
    with pytest.raises(UserError, match="device=mps: several processes cannot train on it"):
        resolve(System(device="mps"), machine=apple)
