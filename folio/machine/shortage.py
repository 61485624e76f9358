"""Out of memory: how to detect it, how much memory there is, and one line instead of a traceback."""

from __future__ import annotations

import errno
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from folio.errors import UserError
from folio.machine import probe

_WORDS = (  # in RuntimeErrors that have no class: torch's CPU and MPS, C++, cuBLAS, threads, shapes above 2⁶³
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "std::bad_alloc",
    "can't start new thread",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Storage size calculation overflowed",
    "Cannot allocate memory",
)
# torch's errors have the size in their text only
_TRIED = re.compile(r"tried to allocate ([\d.]+) (bytes|[KMGT]iB)", re.IGNORECASE)
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def is_shortage(error: BaseException) -> bool:
    """Whether an error of Python, numpy or torch means that memory ran out, on a device or the machine."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    named = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return named or (isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS))


def line(error: BaseException, doing: str = "", advice: str = "") -> str:
    """The message: what the program was ``doing``, how much memory was requested, and the ``advice``."""
    asked, (reason, *_) = _TRIED.search(str(error)), str(error).splitlines() or [""]
    size = f"{float(asked[1]) * _UNITS[asked[2]] / 1e6:,.0f} MB more were needed" if asked else reason[:80]
    return (
        f"out of memory{f' while {doing}' if doing else ''}{f' ({size})' if size else ''}"
        f"{f': {advice}' if advice else ''}"
    )


@contextmanager
def explained(doing: str, advice: Callable[[], str]) -> Iterator[None]:
    """Turns an out-of-memory error inside into one line.

    Raises:
        UserError: that line; ``advice`` is called once the memory is free again.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_shortage(error):
            raise
        traceback.clear_frames(error.__traceback__)  # their variables hold the memory
        try:
            text = advice()
        except (MemoryError, RuntimeError):
            text = "folio plan computes what a run needs, and what would fit"
        raise UserError(line(error, doing, text)) from None


def room(device: torch.device) -> float:
    """Bytes that this process can use on the device; on a GPU, without the memory of other processes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return probe.memory()
