"""Devices by name, for ``folio plan``: their memory, their peak, and the dtype in which they compute."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from folio.config.names import did_you_mean
from folio.config.options import System
from folio.errors import UserError
from folio.machine import flops, probe
from folio.machine.choices import resolve


class Device(NamedTuple):
    """One of several equal devices: ``memory`` in bytes, ``peak`` in FLOP/s, None if it is unknown."""

    name: str
    dtype: torch.dtype
    memory: float
    peak: float | None


def find_device(name: str, count: int, system: System) -> Device:
    """The GPU of this name; "cpu": this machine's processor, divided among ``count`` processes.

    Raises:
        UserError: the name is unknown, or the GPU lacks the dtype.
    """
    if name.lower() == "cpu":
        choices = resolve(replace(system, device="cpu"))
        dtype: torch.dtype = getattr(torch, choices.dtype)
        with probe.matmul_precision(choices.matmul_precision):
            peak = flops.peak(torch.device("cpu"), dtype)
        return Device("CPU", dtype, probe.memory() / count, peak and peak / count)
    names = {normalize(known): known for known in flops.GPUS}
    if normalize(name) not in names:
        hint = did_you_mean(name.upper(), flops.GPUS) or f"choose {', '.join(flops.GPUS)} or cpu"
        raise UserError(f"gpu={name} is unknown: {hint}")
    name = names[normalize(name)]
    gpu = flops.GPUS[name]
    if system.dtype == "bfloat16" and not gpu.bfloat16:
        raise UserError(f"dtype=bfloat16: {name} does not support it: use --dtype=float16 or --dtype=float32")
    fast = "bfloat16" if gpu.bfloat16 else "float16"
    dtype = getattr(torch, fast if system.dtype == "auto" else system.dtype)
    return Device(name, dtype, gpu.memory * 1e9, gpu.peak(dtype))


def normalize(name: str) -> str:
    """A device's name in lower case, without spaces and punctuation."""
    return "".join(c for c in name.lower() if c.isalnum())
