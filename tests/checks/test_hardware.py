"""What folio doctor finds out about the device, the compiler and the cores."""

from __future__ import annotations

import os
import sysconfig

import pytest
import torch

from folio.checks.finding import Finding
from folio.machine import probe

pytest_plugins = ["doctoring"]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def test_fewer_threads_than_cores(one, monkeypatch) -> None:
    cores = probe.cores()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert one("cores") == Finding("ok", "cores", f"{cores}; torch uses 1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    if cores > 1:
        text = f"{cores}; OMP_NUM_THREADS=1 limits torch to 1"
        assert one("cores") == Finding("note", "cores", text, "unset OMP_NUM_THREADS")
    torch.set_num_threads(cores)
    assert one("cores").mark == "ok"


@no_gpu
def test_a_missing_compiler(one, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("CXX", "xyzzy++")
    row = one("compiler")
    assert (row.mark, row.text) == ("note", "xyzzy++ is missing: --compile=True would run uncompiled")
    (tmp_path / "xyzzy++").write_text("#!/bin/sh\n")
    (tmp_path / "xyzzy++").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    assert one("compiler").text.startswith(f"{tmp_path / 'Python.h'} is missing")
    (tmp_path / "Python.h").touch()
    assert one("compiler") == Finding("ok", "compiler", "xyzzy++, used with --compile=True")


@no_gpu
@pytest.mark.parametrize(
    ("cuda", "visible", "words", "remedy"),
    [
        (None, None, "torch is built without CUDA, so the GPU is not used", "--force-reinstall torch"),
        ("13.0", "", "CUDA_VISIBLE_DEVICES= hides the GPU", "unset CUDA_VISIBLE_DEVICES"),
        ("13.0", None, "torch for CUDA 13.0 cannot use its driver", "nvidia-smi"),
    ],
    ids=["built for CPUs", "hidden", "old driver"],
)
def test_a_gpu_that_torch_does_not_use(one, monkeypatch, tmp_path, cuda, visible, words, remedy) -> None:
    """A machine with a GPU has the driver's nvidia-smi."""
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    row = one("device")
    assert row.mark == "missing"
    assert words in row.text
    assert row.remedy.endswith(remedy)


@pytest.mark.gpu
def test_a_gpu_is_named_with_its_memory(look) -> None:
    found = look()
    assert len(found["device"]) == torch.cuda.device_count()
    for i, row in enumerate(found["device"]):
        assert f"cuda:{i}, {torch.cuda.get_device_name(i)}, " in row.text
    assert found["float32"][0].text == "matmul precision high: TF32"
