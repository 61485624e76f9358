"""The device and what ``auto`` becomes on it, the compiler, memory and disk."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from folio.checks.finding import Finding, findings, gigabytes, python_command
from folio.config.options import System
from folio.files import read_text
from folio.machine import probe
from folio.machine.choices import Choices, resolve

_STATE = 2.0e9  # bytes of GPT-2 124M's weights, gradients and AdamW's moments, in float32
_CHECKPOINTS = 6.0e9  # bytes of at most four checkpoints of it: two, the best, and one being written
_CPP = {  # the C++ compiler that torch._inductor looks for, and the command that installs it
    "darwin": ("clang++", "xcode-select --install"),
    "win32": ("cl", "winget install Microsoft.VisualStudio.2022.BuildTools"),
}
_MATMUL = {"highest": "full float32", "high": "TF32", "medium": "faster kernels, as accurate here"}


def arithmetic() -> Iterator[Finding]:
    """The device, and what ``auto`` becomes on it for a run that is long enough to compile."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        auto = resolve(System(), flops=float("inf"))
    reasons = [str(w.message) for w in caught]
    yield from findings("device", lambda: _devices(auto.kind, auto.processor, reasons))
    yield _cores(auto.threads)
    yield _dtype(auto)
    yield Finding("ok", "float32", f"matmul precision {auto.matmul_precision}: {_MATMUL[auto.matmul_precision]}")
    yield _compiler(auto.kind == "cuda", auto.compile)


def _devices(kind: str, processor: str, reasons: list[str]) -> Iterator[Finding]:
    """``reasons``: the warnings of torch, which may say why it does not use a GPU."""
    if kind == "cuda":
        for i in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(i)
            text = f"cuda:{i}, {torch.cuda.get_device_name(i)}, {gigabytes(free, total)} free"
            if free > total / 2:
                yield Finding("ok", "device", text)
            else:
                yield Finding("note", "device", f"{text}: other processes use the rest", "nvidia-smi")
    elif kind == "mps":
        yield Finding("ok", "device", "mps, Apple's GPU, which shares the machine's memory")
    elif not (shutil.which("nvidia-smi") or Path("/dev/nvidia0").exists()):
        text = f"cpu, {processor}: there is no GPU, so training a large model takes long"
        yield Finding("note", "device", text, python_command("-m folio plan --gpu=cpu"))
    elif torch.version.cuda is None:
        text = f"torch is built without CUDA, so the GPU is not used; cpu, {processor}"
        yield Finding("missing", "device", text, python_command("-m pip install --force-reinstall torch"))
    elif "CUDA_VISIBLE_DEVICES" in os.environ:
        text = f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']} hides the GPU; cpu, {processor}"
        yield Finding("missing", "device", text, "unset CUDA_VISIBLE_DEVICES")
    else:
        reason = reasons[0] if reasons else f"torch for CUDA {torch.version.cuda} cannot use its driver"
        yield Finding("missing", "device", f"the GPU is not used: {reason}; cpu, {processor}", "nvidia-smi")


def _cores(threads: int) -> Finding:
    cores, limit = probe.cores(), os.environ.get("OMP_NUM_THREADS")
    if limit and threads < cores:
        text = f"{cores}; OMP_NUM_THREADS={limit} limits torch to {threads}"
        return Finding("note", "cores", text, "unset OMP_NUM_THREADS")
    return Finding("ok", "cores", f"{cores}; torch uses {threads}")


def _dtype(auto: Choices) -> Finding:
    fast = {auto.dtype, *(["float16"] if auto.kind == "cuda" else [])}
    slow = [name for name in ("bfloat16", "float16") if name not in fast]
    with probe.matmul_precision(auto.matmul_precision):
        limit = probe.Machine().peak(auto.device, auto.dtype)
    speed = "peak unknown, so no MFU is shown"
    if limit:
        speed = f"{limit / 1e12:,.3g} TFLOP/s {'measured' if auto.kind == 'cpu' else 'by its data sheet'}"
    others = f"{' and '.join(slow)} would be slower" if slow else "float16 is fast too"
    return Finding("ok" if limit else "note", "dtype", f"{auto.dtype}, {speed}; {others}")


def _compiler(on_gpu: bool, compiled: bool) -> Finding:
    """What torch.compile needs: Triton and a C compiler on a GPU, a C++ compiler on a CPU, Python.h on both."""
    header = Path(sysconfig.get_path("include"), "Python.h")
    usual, remedy = _CPP.get(sys.platform, ("g++", "sudo apt install g++"))
    name, missing = os.environ.get("CXX", usual), ""
    if on_gpu and not compiled and not importlib.util.find_spec("triton"):
        missing, remedy = "Triton", python_command("-m pip install triton")
    elif on_gpu and not compiled:
        missing = "a C compiler"
    elif not on_gpu and not shutil.which(name):
        missing = name
    elif not header.is_file():
        missing, remedy = str(header), "sudo apt install python3-dev"
    if missing:
        effect = "long runs are not compiled, and slower" if on_gpu else "--compile=True would run uncompiled"
        return Finding("missing" if on_gpu else "note", "compiler", f"{missing} is missing: {effect}", remedy)
    text = "Triton and a C compiler: long runs are compiled" if on_gpu else f"{name}, used with --compile=True"
    return Finding("ok", "compiler", text)


def memory() -> Iterator[Finding]:
    total = available = probe.memory()
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file() and (found := re.search(r"^MemAvailable:\s+(\d+) kB", read_text(meminfo), re.MULTILINE)):
        available = min(total, 1024 * int(found[1]))
    text = f"{gigabytes(available, total)} available"
    if available >= _STATE:
        yield Finding("ok", "memory", text)
    else:
        text += f": training GPT-2 124M needs {gigabytes(_STATE)} without activations"
        yield Finding("note", "memory", text, python_command("-m folio plan --gpu=cpu"))


def disk() -> Iterator[Finding]:
    here = Path.cwd()
    total, _, free = shutil.disk_usage(here)
    text = f"{gigabytes(free, total)} free in {here}, where data/ and out/ go"
    if not os.access(here, os.W_OK):
        yield Finding("missing", "disk", f"{here} cannot be written: set --out_dir and --data_dir to another folder")
    elif free < _CHECKPOINTS:
        effect = f"checkpoints of GPT-2 124M take up to {gigabytes(_CHECKPOINTS)}: set --out_dir to another disk"
        yield Finding("note", "disk", f"{text}; {effect}")
    else:
        yield Finding("ok", "disk", text)
