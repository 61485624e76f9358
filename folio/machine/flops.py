"""The arithmetic of a training step, and the peak speed of devices."""

from __future__ import annotations

import functools
import time
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from folio.model.gpt import GPT


class Gpu(NamedTuple):
    """Dense peak of the matrix units in TFLOP/s, in 16 bits and in 32 bits (TF32 if there is one); memory in GB."""

    half: float
    single: float
    memory: int
    bfloat16: bool = True

    def peak(self, dtype: torch.dtype) -> float:
        """FLOP/s."""
        return 1e12 * (self.single if dtype == torch.float32 else self.half)


# From the data sheets, without sparsity. A device gets the first row whose name is part of the device's name.
GPUS = {
    "B200": Gpu(2250, 1100, 180),
    "GH200": Gpu(989, 494, 96),
    "H200": Gpu(989, 494, 141),
    "H100 PCIe": Gpu(756, 378, 80),
    "H100 NVL": Gpu(835, 417, 94),
    "H100": Gpu(989, 494, 80),
    "A100": Gpu(312, 156, 80),
    "A100 40GB": Gpu(312, 156, 40),
    "A10G": Gpu(70, 35, 24),
    "A10": Gpu(125, 62.5, 24),
    "L40S": Gpu(362, 183, 48),
    "L40": Gpu(181, 91, 48),
    "L4": Gpu(121, 60, 24),
    "V100": Gpu(125, 15.7, 32, bfloat16=False),
    "V100 16GB": Gpu(125, 15.7, 16, bfloat16=False),
    "T4": Gpu(65, 8.1, 16, bfloat16=False),
    "RTX 4090": Gpu(165, 82.6, 24),
    "RTX 3090": Gpu(71, 35.6, 24),
    "MI300X": Gpu(1307, 653, 192),
    "MI250X": Gpu(191.5, 47.9, 64),  # one of its two dies, which are two devices
}


def flops_per_token(model: GPT, context: int | None = None) -> int:
    """Forward and backward: 6 N + 12 · layers · width · context, N without position embeddings.

    ``context``: tokens of a row, if fewer than block_size. An untied input embedding is a look-up and not counted.
    PaLM (Chowdhery et al., 2022), Appendix B, as nanoGPT's ``estimate_mfu``.
    """
    c = model.config
    n = model.get_num_params()
    if not c.tie_weights:
        n -= model.transformer.wte.weight.numel()
    return 6 * n + 12 * c.n_layer * c.n_embd * (context or c.block_size)


@functools.cache
def peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of this device: from the table for a GPU, measured once for a CPU; None if unknown."""
    if device.type == "cpu":
        return None if dtype == torch.float16 else _measured(dtype)  # CPUs emulate float16
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((gpu.peak(dtype) for part, gpu in GPUS.items() if part in name), None)
    return None


def _measured(dtype: torch.dtype, tries: int = 8) -> float:
    """The speed of the fastest product. A larger one is tried if that takes less than a second."""
    fastest = 0.0
    for n in (256, 512, 1024):
        a = torch.ones(n, n, dtype=dtype)
        a @ a
        times = []
        for _ in range(tries):
            start = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - start)
        fastest = max(fastest, 2 * n**3 / min(times))
        if 8 * sum(times) > 1:
            break
    return fastest


def mfu(
    model: GPT,
    tokens_per_second: float,
    device: torch.device,
    dtype: torch.dtype,
    world: int = 1,
    context: int | None = None,
) -> float:
    """Model FLOPs utilization: share of the peak of ``world`` such devices; NaN if the peak is unknown."""
    limit = peak(device, dtype)
    return tokens_per_second * flops_per_token(model, context) / (limit * world) if limit else float("nan")
