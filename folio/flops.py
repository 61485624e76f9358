"""Arithmetic of a training step, against what the device can do."""

from __future__ import annotations

import functools
import time
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from folio.model import GPT

# Dense peak of the matrix units in TFLOP/s, 16-bit and (TF32 where there is one) 32-bit, from the makers'
# data sheets, without sparsity. The first name that the device's name contains counts.
_PEAKS = {
    "B200": (2250, 1100),
    "GH200": (989, 494),
    "H200": (989, 494),
    "H100 PCIe": (756, 378),
    "H100 NVL": (835, 417),
    "H100": (989, 494),
    "A100": (312, 156),
    "A10G": (70, 35),
    "A10": (125, 62.5),
    "L40S": (362, 183),
    "L40": (181, 91),
    "L4": (121, 60),
    "V100": (125, 15.7),
    "T4": (65, 8.1),
    "RTX 4090": (165, 82.6),
    "RTX 3090": (71, 35.6),
    "MI300X": (1307, 653),
    "MI250X": (383, 95.7),
}


def flops_per_token(model: GPT) -> int:
    """Forward and backward: 6 N + 12 · layers · width · context, N without position embeddings.

    PaLM (Chowdhery et al., 2022), Appendix B, as nanoGPT's ``estimate_mfu``; an untied input embedding is a
    look-up and is not counted.
    """
    c = model.config
    n = model.get_num_params()
    if not c.tie_weights:
        n -= model.transformer.wte.weight.numel()
    return 6 * n + 12 * c.n_layer * c.n_embd * c.block_size


@functools.cache
def peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s that this device can reach: by table for a GPU, measured once for a CPU; None where unknown."""
    if device.type == "cpu":
        return None if dtype == torch.float16 else _measured(dtype)  # CPUs emulate float16
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, (half, single) in _PEAKS.items():
            if part in name:
                return 1e12 * (single if dtype == torch.float32 else half)
    return None


def _measured(dtype: torch.dtype, n: int = 1024, tries: int = 8) -> float:
    a = torch.ones(n, n, dtype=dtype)
    a @ a
    times = []
    for _ in range(tries):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return float(2 * n**3 / min(times))


def mfu(model: GPT, tokens_per_second: float, device: torch.device, dtype: torch.dtype, world: int = 1) -> float:
    """Model FLOPs utilisation: share of the peak of ``world`` such devices; NaN where it is unknown."""
    limit = peak(device, dtype)
    return tokens_per_second * flops_per_token(model) / (limit * world) if limit else float("nan")
