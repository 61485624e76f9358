"""Attention on a CPU, forward and backward: torch's fused kernel against matrix products, whole and in blocks.

    python benchmarks/attention.py

They run in turn. The ratio is that of the medians within a round; its range is over the rounds.
"""

from __future__ import annotations

import sys

sys.path.pop(0)  # this folder, whose tokenize.py would hide the standard library's

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from folio.model import attention
from folio.model.kernels import BlockedAttention

SHAPES = {"B12 H4 T64 D32": (12, 4, 64, 32), "B16 H6 T256 D64": (16, 6, 256, 64), "B1 H12 T1024 D64": (1, 12, 1024, 64)}


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention.attend(q, k, v, None, 0.0)


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "fused": fused,
    "whole": written_out,
    **{f"blocks of {n}": partial(BlockedAttention(n), mask=None, dropout=0.0) for n in (64, 128, 256)},
}


def median_seconds(function, shape: tuple[int, ...], dtype: torch.dtype, calls: int = 20) -> float:  # type: ignore[no-untyped-def]
    qkv = [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3)]
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        function(*qkv).sum().backward()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main(rounds: int = 5) -> None:
    torch.set_float32_matmul_precision("medium")
    # the model uses matrix products for short contexts only
    attention._SHORT = max(shape[2] for shape in SHAPES.values())
    for name, shape in SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            found = [{way: median_seconds(each, shape, dtype) for way, each in WAYS.items()} for _ in range(rounds)]
            for way in list(WAYS)[1:]:
                ratios = [times["fused"] / times[way] for times in found]
                print(
                    f"{name:17} {str(dtype).removeprefix('torch.'):9} {way:13} is {statistics.median(ratios):.2f}× as "
                    f"fast as fused ({min(ratios):.2f} … {max(ratios):.2f})"
                )


if __name__ == "__main__":
    main()
