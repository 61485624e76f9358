"""Loading a model of GPT-2's 124M shape from the hub's cache: peak memory and time, against nanoGPT and transformers.

    python benchmarks/pretrained.py --peer NANOGPT [--rounds 3]

NANOGPT is a checkout of nanoGPT. The weights are random, in the layout of the hub's cache. Each load runs in
its own process, in turn. Memory is the peak (VmHWM) above that after the imports, as a multiple of the weights' size.
All weights are read once at the end, since transformers only memory-maps them.
"""

from __future__ import annotations

import sys

sys.path.pop(0)  # this folder, whose tokenize.py would hide the standard library's

import argparse
import os
import statistics
import subprocess
import tempfile
from pathlib import Path

LOADS = {
    "folio": (
        "from folio.model.gpt import GPT\nimport folio.checkpoints.find, huggingface_hub",
        "GPT.from_pretrained('gpt2')",
    ),
    "nanoGPT": ("from model import GPT\nimport transformers.models.gpt2", "GPT.from_pretrained('gpt2')"),
    "transformers": ("from transformers import GPT2LMHeadModel as GPT", "GPT.from_pretrained('gpt2')"),
}
MEASURED = """
import re, time, torch
{imports}

def status(what):
    return int(re.search(what + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

open("/proc/self/clear_refs", "w").write("5")  # reset the peak
start = status("VmRSS")
began = time.perf_counter()
model = {load}
sum(p.sum() for p in model.parameters()).item()
seconds = time.perf_counter() - began
weights = sum(p.numel() * p.element_size() for p in model.parameters())
print((status("VmHWM") - start) / weights, seconds, weights)
"""


def lay_out(cache: Path) -> None:
    """A random GPT-2 124M under both names that the hub has for it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config())
    for name in ("models--openai-community--gpt2", "models--gpt2"):
        folder = cache / name
        model.save_pretrained(folder / "snapshots" / ("0" * 40))
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("0" * 40)


def main() -> None:
    parser = argparse.ArgumentParser(description="Loading GPT-2 124M: peak memory and time")
    parser.add_argument("--peer", type=Path, required=True, help="a checkout of nanoGPT")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    root = Path(__file__).resolve().parent.parent
    with tempfile.TemporaryDirectory() as cache:
        lay_out(Path(cache))
        paths = os.pathsep.join(map(str, (root, options.peer.resolve())))
        environment = {**os.environ, "HF_HUB_CACHE": cache, "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}
        figures: dict[str, list[tuple[float, float]]] = {name: [] for name in LOADS}
        for _ in range(options.rounds):
            for name, (imports, load) in LOADS.items():
                code = MEASURED.format(imports=imports, load=load)
                where = options.peer if name == "nanoGPT" else cache
                done = subprocess.run(
                    [sys.executable, "-c", code], env=environment, cwd=where, capture_output=True, text=True, check=True
                )
                memory, seconds, weights = map(float, done.stdout.split()[-3:])
                figures[name].append((memory, seconds))
    print(f"weights of {weights / 2**20:.0f} MiB, {options.rounds} rounds")
    for name, rounds in figures.items():
        memory, seconds = zip(*rounds, strict=True)
        print(
            f"{name:12}  peak {statistics.median(memory):.2f} × the weights ({min(memory):.2f} … {max(memory):.2f})  "
            f"{statistics.median(seconds):.2f} s ({min(seconds):.2f} … {max(seconds):.2f})"
        )


if __name__ == "__main__":
    main()
