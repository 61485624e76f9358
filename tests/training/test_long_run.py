"""In a long run, memory, file handles and threads do not grow; its speed is printed.

FOLIO_LONG_STEPS sets the number of steps, by default 3,000.
"""

from __future__ import annotations

import os
from pathlib import Path
from statistics import median
from typing import NamedTuple

import pytest
from children import Child, Spawn, to_its_end
from conftest import LINUX, SMALL

from folio.files import parse_json
from folio.records.metrics import read_metrics

STEPS = int(os.environ.get("FOLIO_LONG_STEPS", "3000"))


class Held(NamedTuple):
    """The resources of a process after ``step`` steps."""

    step: int
    memory: int  # bytes that are resident
    handles: int
    threads: int


def held(child: Child, metrics: Path) -> Held | None:
    """The resources now; None before the first line and after the end of the process."""
    proc = Path(f"/proc/{child.process.pid}")
    try:
        lines = metrics.read_bytes()[-2000:].splitlines()
        pages = int((proc / "statm").read_text().split()[1])
        handles, threads = (len(os.listdir(proc / name)) for name in ("fd", "task"))
        return Held(parse_json(lines[-2])["step"], pages * os.sysconf("SC_PAGE_SIZE"), handles, threads)
    except (OSError, IndexError):
        return None


@pytest.mark.slow
@pytest.mark.timeout(600 + STEPS // 10)
@LINUX
def test_nothing_grows(spawn: Spawn, story: Path, items: Path, tmp_path: Path) -> None:
    """With evaluations, HellaSwag, samples, checkpoints in a thread and a log; memory to 2 % after the first fifth."""
    out, found = tmp_path / "out", list[Held]()
    work = [f"--hellaswag_data={items}", "--hellaswag_interval=100", "--sample_interval=100", "--sample_tokens=14"]
    work += ["--eval_interval=50", "--checkpoint_interval=50", "--async_checkpoint=True", "--sample_prompt=The ferry"]
    length = [f"--max_iters={STEPS}", f"--lr_decay_iters={STEPS}", "--log_interval=10"]
    child = spawn("train.py", *SMALL, *work, *length, f"--data_dir={story}", f"--out_dir={out}", threads=1)

    def until_the_end() -> bool:
        if (now := held(child, out / "metrics.jsonl")) and (not found or now.step > found[-1].step):
            found.append(now)
        return bool(found) and found[-1].step >= STEPS - 10

    child.wait_until(until_the_end, timeout=300 + STEPS // 10)
    to_its_end(child)
    early, late = (
        [h for h in found if first * STEPS <= h.step < last * STEPS] for first, last in ((0.2, 0.4), (0.8, 1.0))
    )
    memory, handles, threads = ([median(h[i] for h in part) for part in (early, late)] for i in (1, 2, 3))
    speeds = [
        median(
            r["tokens_per_second"]
            for r in read_metrics(out / "metrics.jsonl")
            if r["kind"] == "train" and first * STEPS <= r["step"] < last * STEPS
        )
        for first, last in ((0.2, 0.4), (0.8, 1.0))
    ]
    print(
        f"{STEPS:,} steps: memory {memory[0] / 2**20:.1f} → {memory[1] / 2**20:.1f} MiB, "
        f"handles {handles[0]} → {handles[1]}, threads {threads[0]} → {threads[1]}, "
        f"{speeds[0]:,.0f} → {speeds[1]:,.0f} tokens/s"
    )
    assert memory[1] <= 1.02 * memory[0]
    assert handles[1] <= handles[0]
    assert threads[1] <= threads[0]
