"""A run of version 0.1.0, from before its modules were moved into rooms, is one that this version resumes and reads.

``tests/fixtures/older_version`` has the data set, the out_dir of its first 8 steps, and ``continued.jsonl``: what that
version itself logged when it resumed the run to step 16, on one thread.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, Outcome
from safetensors.torch import load_file

from folio.records import run_folder
from folio.records.metrics import read_metrics

FIXTURE = ROOT / "tests" / "fixtures" / "older_version"
LAST = 8

Folio = Callable[..., Outcome]


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A copy of the run and its data, as it lies in the folder where it was made."""
    return Path(shutil.copytree(FIXTURE, tmp_path / "old"))


def lines(path: Path) -> list[dict[str, Any]]:
    return [r for r in read_metrics(path) if r["kind"] in ("train", "eval")]


def test_it_is_resumed_to_the_losses_of_the_version_that_wrote_it(folio: Folio, old: Path) -> None:
    """To the last digit on the same processor and torch, elsewhere to rounding."""
    if not torch.backends.mkl.is_available():
        pytest.skip("torch draws other dropout masks without MKL")
    out = old / "out"
    before = lines(out / "metrics.jsonl")
    done = folio("train", "--init_from=resume", f"--out_dir={out}", f"--data_dir={old / 'data'}", "--max_iters=16")
    assert done.code == 0, done.err

    logged, expected = lines(out / "metrics.jsonl"), lines(old / "continued.jsonl")
    assert logged[: len(before)] == before
    resolved = json.loads((run_folder.checkpoint_folder(FIXTURE / "out", LAST) / "state.json").read_text())["resolved"]
    here = {"torch": torch.__version__, "processor": torch.backends.cpu.get_cpu_capability()}
    exact = {name: resolved[name] for name in here} == here
    assert exact == ("exact to rounding only" not in done.out), done.out
    for new, old_line in zip(logged[len(before) :], expected, strict=True):
        same = {name: new[name] for name in old_line}
        assert same == (old_line if exact else pytest.approx(old_line, abs=1e-4))


def test_it_is_evaluated_sampled_and_exported(folio: Folio, old: Path) -> None:
    out = old / "out"
    known = [r["val_loss"] for r in lines(out / "metrics.jsonl") if r["kind"] == "eval"][-1]
    done = folio("eval", f"--out_dir={out}", f"--data_dir={old / 'data'}", "--device=cpu", "--eval_iters=2")
    assert done.code == 0, done.err
    found = re.search(r"[Vv]al(?:idation)? loss:? +(\d\.\d+)", done.out)
    assert found
    assert float(found[1]) == pytest.approx(known, abs=2e-3)  # this version computes otherwise in 16 bits

    done = folio("sample", f"--out_dir={out}", "--device=cpu", "--num_samples=1", "--max_new_tokens=20")
    assert done.code == 0, done.err
    text = (FIXTURE / "data" / "meta.json").read_text(encoding="utf-8")
    assert set(done.out) <= set(json.loads(text)["tokenizer"]["characters"]) | set("\n-")

    done = folio("export", f"--out_dir={out}", f"--to={old / 'exported'}")
    assert done.code == 0, done.err
    kept = load_file(run_folder.checkpoint_folder(out, LAST) / "model.safetensors")
    exported = load_file(old / "exported" / "model.safetensors")
    assert torch.equal(exported["transformer.wte.weight"], kept["transformer.wte.weight"])
