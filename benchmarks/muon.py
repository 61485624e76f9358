"""An update of a GPT's matrices by Muon: torch.optim.Muon, one matrix at a time, against Folio's, in stacks.

    python benchmarks/muon.py

They run in turn, in bfloat16. The ratio is that of the medians within a round; its range is over the rounds.
"""

from __future__ import annotations

import sys

sys.path.pop(0)  # this folder, whose tokenize.py would hide the standard library's

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from folio.training.muon import Muon

MODELS = {"4 layers, 128 wide": (4, 128), "6 layers, 384 wide": (6, 384), "12 layers, 768 wide": (12, 768)}


def matrices(layers: int, width: int, device: str) -> list[nn.Parameter]:
    """Those of the blocks, with gradients; queries, keys and values apart."""
    shapes = [(width, width)] * 4 + [(4 * width, width), (width, 4 * width)]
    made = [nn.Parameter(torch.randn(shape, device=device)) for _ in range(layers) for shape in shapes]
    for p in made:
        p.grad = torch.randn_like(p)
    return made


def median_seconds(step: Callable[[], object], device: str, calls: int = 5) -> float:
    times = []
    for _ in range(calls + 1):
        start = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main(rounds: int = 3) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, (layers, width) in MODELS.items():
        theirs = torch.optim.Muon(matrices(layers, width, device), adjust_lr_fn="match_rms_adamw")
        other = [{"params": [nn.Parameter(torch.zeros(1, device=device))]}]
        mine = Muon([{"params": matrices(layers, width, device)}], other, 1e-3, 0.95, (0.9, 0.95), 0.1)
        found = [[median_seconds(made.step, device) for made in (theirs, mine)] for _ in range(rounds)]
        ratios = [torchs / folios for torchs, folios in found]
        torchs, folios = (1e3 * statistics.median(each) for each in zip(*found, strict=True))
        print(
            f"{name}, {device}: torch's {torchs:.1f} ms, Folio's {folios:.1f} ms: "
            f"{statistics.median(ratios):.2f}× as fast ({min(ratios):.2f} … {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
