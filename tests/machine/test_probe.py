"""The properties of this machine."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest
import torch
from conftest import LINUX

from folio.machine import probe


@pytest.mark.parametrize(("content", "limit"), [("1000000000\n", 1e9), ("max\n", float("inf")), (None, float("inf"))])
def test_the_memory_of_a_container(tmp_path: Path, content: str | None, limit: float) -> None:
    if content:
        (tmp_path / "memory.max").write_text(content)
    assert probe.container_memory(tmp_path / "memory.max") == limit


@LINUX
def test_cores_that_the_process_may_use() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert probe.cores() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert probe.cores() == len(before)


@pytest.mark.parametrize(
    ("content", "name"),
    [("processor\t: 0\nmodel name\t: AMD EPYC 9\nmodel name\t: AMD EPYC 9\n", "AMD EPYC 9"), ("processor\t: 0\n", "")],
)
def test_the_name_of_the_processor(tmp_path: Path, content: str, name: str) -> None:
    """As Linux says it, else as Python does."""
    (tmp_path / "cpuinfo").write_text(content)
    usual = platform.processor() or platform.machine()
    assert probe.processor_name(tmp_path / "cpuinfo") == (name or usual)
    assert probe.processor_name(tmp_path / "missing") == usual


def test_the_matmul_precision_is_restored() -> None:
    before = torch.get_float32_matmul_precision()
    with probe.matmul_precision("medium"):
        assert torch.get_float32_matmul_precision() == "medium"
    assert torch.get_float32_matmul_precision() == before
    assert probe.Machine().fast_precision("cpu") in ("medium", "highest")
    assert torch.get_float32_matmul_precision() == before


def test_this_machine() -> None:
    here = probe.Machine()
    assert here.has("cpu")
    assert not here.has("xyzzy")
    assert (here.gpus() > 0) == here.has("cuda")
    assert here.fast_dtype("cpu") in ("float32", "bfloat16")
    assert here.peak("cpu", "float32") > 1e8  # type: ignore[operator]
