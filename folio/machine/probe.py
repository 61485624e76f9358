"""The cores, memory, devices, compilers and speeds of this machine. No setting of torch changes."""

from __future__ import annotations

import ctypes
import importlib.util
import math
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from folio.files import read_text


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory() -> float:
    """Bytes that this process may use: the least of the machine's memory, the container's and ``ulimit -v``.

    Infinity if the system says none of them.
    """
    return min(machine_memory(), container_memory(), _limit("RLIMIT_AS"))


def machine_memory() -> float:
    """Bytes of memory in this machine; infinity if the system does not say."""
    if sys.platform == "win32":
        kilobytes = ctypes.c_ulonglong()
        known = ctypes.windll.kernel32.GetPhysicallyInstalledSystemMemory(ctypes.byref(kilobytes))
        return 1024.0 * kilobytes.value if known else math.inf
    if not hasattr(os, "sysconf"):
        return math.inf
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def open_files() -> float:
    """Files that this process may have open at once; infinity without a limit."""
    return _limit("RLIMIT_NOFILE")


def _limit(name: str) -> float:
    """One of this process's limits; infinity without one, or on a system without limits."""
    if sys.platform == "win32":
        return math.inf
    try:
        import resource
    except ModuleNotFoundError:
        return math.inf
    limit = resource.getrlimit(getattr(resource, name))[0]
    return math.inf if limit == resource.RLIM_INFINITY else float(limit)


def container_memory(path: Path = Path("/sys/fs/cgroup/memory.max")) -> float:
    """Bytes that a container may use; infinity outside of one."""
    try:
        return float(read_text(path))
    except (OSError, ValueError):  # no such file, or "max"
        return float("inf")


def processor_name(path: Path = Path("/proc/cpuinfo")) -> str:
    """The model of this CPU, as Linux names it; elsewhere its kind, such as arm."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", read_text(path), re.MULTILINE)
    except (OSError, ValueError):
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Sets the precision of float32 products inside, as ``torch.set_float32_matmul_precision`` does."""
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Machine:
    """The properties that ``choices.resolve`` needs: methods, since some take a second.

    ``device`` is "cpu", "mps" or "cuda:0" and so on, ``dtype`` the name of a torch dtype.
    """

    def has(self, kind: str) -> bool:
        """Whether there is a device of this kind: "cpu", "cuda" or "mps"."""
        import torch

        if kind in ("cuda", "mps"):
            return torch.cuda.is_available() if kind == "cuda" else torch.backends.mps.is_available()
        return kind == "cpu"

    def gpus(self) -> int:
        """The number of CUDA devices that torch sees."""
        import torch

        return torch.cuda.device_count()

    def processor(self, device: str) -> str:
        """The name of a GPU, or the instruction set that torch uses on this CPU, such as AVX512."""
        import torch

        if device.startswith("cuda"):
            return torch.cuda.get_device_name(device)
        return torch.backends.cpu.get_cpu_capability()

    def torch_version(self) -> str:
        import torch

        return str(torch.__version__)

    def threads(self) -> int:
        """The number of threads that torch uses now."""
        import torch

        return torch.get_num_threads()

    def fast_dtype(self, device: str) -> str:
        """bfloat16 if the hardware multiplies it, float16 on older GPUs, else float32."""
        import torch

        if device.startswith("cuda"):
            return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"
        if device == "cpu" and sys.platform == "linux":
            fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
            return "bfloat16" if fast else "float32"
        return "float32"

    def has_bfloat16(self, device: str) -> bool:
        """Whether torch computes in bfloat16 there, however slowly: everywhere but on an older macOS's MPS."""
        import torch

        return device != "mps" or torch.backends.mps.is_macos_or_newer(14, 0)

    def fast_precision(self, device: str) -> str:
        """The fastest precision of float32 products that is accurate enough.

        TF32 ("high") on a GPU, as in nanoGPT. On a CPU "medium" selects oneDNN's faster kernels. It may mean
        bfloat16 there, so it is chosen only if a product shows that the result stays accurate to float32.
        """
        import torch

        if device.startswith("cuda"):
            return "high"
        if device != "cpu":
            return "highest"
        with matmul_precision("medium"):
            a = torch.linspace(-1, 1, 256 * 256).view(256, 256)
            exact = a.double() @ a.double().T
            error = ((a @ a.T).double() - exact).abs().max() / exact.abs().max()
        return "medium" if error < 2e-6 else "highest"

    def can_compile(self) -> bool:
        """Whether torch.compile has what it needs for a GPU: Triton and a C compiler."""
        compilers = (os.environ.get("CC", "cc"), "gcc", "clang")
        return importlib.util.find_spec("triton") is not None and any(map(shutil.which, compilers))

    def peak(self, device: str, dtype: str) -> float | None:
        """FLOP/s (see ``flops.peak``)."""
        import torch

        from folio.machine import flops

        return flops.peak(torch.device(device), getattr(torch, dtype))
