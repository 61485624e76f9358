"""folio bench: rounds in turn with nanoGPT, and where a step's time goes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import SMALL, Outcome, assert_refused

from folio import rng
from folio.commands import bench
from folio.config.options import Data, Output, System, TrainConfig
from folio.model.config import GPTConfig
from folio.training.batches import batches
from folio.training.muon import Muon
from folio.training.run import Run
from folio.training.start import running
from folio.training.timing import OURS, PARTS, in_turn, parts

Folio = Callable[..., Outcome]
BENCH = [*SMALL[:9], "--vocab_size=64", "--real_data=False"]

# What folio calls of nanoGPT's model.py
NANOGPT = """
from dataclasses import dataclass
import torch

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        print("number of parameters")
        self.table = torch.nn.Embedding(config.vocab_size, config.vocab_size)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.SGD(self.parameters(), learning_rate)

    def forward(self, idx, targets):
        logits = self.table(idx)
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
"""


def config(story: Path, out: Path, steps: int = 2) -> TrainConfig:
    return TrainConfig(
        Output(out_dir=str(out)),
        Data(data_dir=str(story), batch_size=3, gradient_accumulation_steps=steps),
        GPTConfig(block_size=8, vocab_size="auto", n_layer=1, n_head=1, n_embd=8, bias=False),
        system=System(device="cpu", dtype="float32"),
    )


@pytest.fixture
def run(story: Path, tmp_path: Path):  # type: ignore[no-untyped-def]
    with running(config(story, tmp_path / "out")) as run:
        yield run


def test_steps_read_at_once_are_those_of_one_after_another(run: Run) -> None:
    """The rows of each micro step, and the seed of its dropout, also after the steps that were read first."""
    with batches(run) as steps:
        for step in range(200):
            for micro, batch in enumerate(next(steps)):
                rows = run.tokens.rows("train", 6 * step + 3 * micro, 3)
                assert batch.idx.tolist() == rows[:, :-1].tolist()
                assert batch.targets.tolist() == rows[:, 1:].tolist()
                assert batch.seed == rng.key(run.config.system.seed, "dropout", step, micro)


def test_each_program_makes_as_many_steps(run: Run) -> None:
    calls: list[int] = []
    times = in_turn(run, {"other": lambda: calls.append(run.state.step)}, rounds=3, count=5)
    assert {name: len(each) for name, each in times.items()} == {OURS: 3, "other": 3}
    assert [calls.count(step) for step in sorted(set(calls))] == [5, 5, 5, 5]  # the first warms up
    assert run.state.step == len(calls)
    assert run.stop == ""


def test_the_parts_of_a_step(run: Run) -> None:
    """All of its time, and the run trains as before."""
    found = parts(run, 4)
    assert tuple(found) == PARTS
    assert all(seconds >= 0 for part, seconds in found.items() if part != "host")
    assert run.state.step == 4
    assert "forward" not in vars(run.loss)
    assert parts(run, 2).keys() == found.keys()


def test_bench_shows_speed_time_and_memory(folio: Folio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With nanoGPT in turn; nothing is left in the folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "peer").mkdir()
    (tmp_path / "peer" / "model.py").write_text(NANOGPT)
    done = folio("bench", *BENCH, "--peer=peer")
    assert (done.code, done.err) == (0, "")
    assert re.search(
        r"^time per iteration: [\d.]+ms \(.* in 9 rounds\), [\d,]+ tokens/s, MFU: ", done.out, re.MULTILINE
    )
    assert re.search(r"^nanoGPT: [\d.]+ms; Folio is [\d.]+ × as fast \([\d.]+ … [\d.]+\)$", done.out, re.MULTILINE)
    for word in (*PARTS, "weights", "optimizer", "gradients", "activations and the rest"):
        assert re.search(rf"^ .*  {word}$", done.out, re.MULTILINE), word
    assert [path.name for path in tmp_path.iterdir()] == ["peer"]


def test_a_peer_that_is_no_checkout(folio: Folio, tmp_path: Path) -> None:
    assert_refused(folio("bench", *BENCH, f"--peer={tmp_path}"), f"peer={tmp_path}", "model.py", "nanoGPT")


def test_bench_trains_with_the_optimizer_of_a_run(folio: Folio, monkeypatch: pytest.MonkeyPatch) -> None:
    """And keeps no averages, which a run makes between the steps."""
    found = []
    monkeypatch.setattr(bench, "_measured", lambda run, *_: found.append(run) or ["measured"])
    done = folio("bench", *BENCH, "--optimizer=muon", "--momentum=0.9", "--ema_decay=0.9", "--max_iters=5")
    assert (done.code, done.out.splitlines()[-1]) == (0, "measured")
    assert isinstance(found[0].optimizer, Muon)
    assert found[0].optimizer.param_groups[0]["momentum"] == 0.9
    assert found[0].config.optimizer.ema_decay == 0
