"""Resuming and sampling nanoGPT's run: weights, optimizer state and counts are those of nanoGPT."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_refused, tree
from nanogpt_run import BATCH, BEFORE, QUICK, WPE, Folio, argv, assert_equal, run_of, slots_of, their_optimizer
from torch import nn

from folio.checkpoints import find
from folio.records import run_folder
from folio.records.metrics import read_metrics
from folio.training.loop import fit

pytest_plugins = ["nanogpt_folders"]


# Resuming


def test_the_optimizer_is_their_optimizer(begun: Path, shakespeare: Path, theirs: dict[str, Any]) -> None:
    """Each parameter has its weights and moments, to the bit; counts and options are those of nanoGPT's run."""
    _, params, optimizer = their_optimizer(theirs)
    with run_of(begun, shakespeare, "--max_iters=201") as run:
        mine = dict(run.model.named_parameters())
        assert_equal(mine, params)
        slots = slots_of(mine, run.optimizer)
        assert len(slots) == 3 * 15
        assert_equal(slots, slots_of(params, optimizer))
        for group, other in zip(run.optimizer.param_groups, optimizer.param_groups, strict=True):
            assert all(group[name] == other[name] for name in ("betas", "eps", "weight_decay"))
        assert (run.state.step, run.state.rows, run.state.tokens) == (200, 200 * BATCH, BEFORE)
        assert run.model.config.dropout == 0.1
        assert (run.config.optimizer.warmup_iters, run.config.optimizer.warmup) == (100, "nanogpt")


def test_the_next_step_is_that_of_torchs_adamw(begun: Path, shakespeare: Path, theirs: dict[str, Any]) -> None:
    """torch's AdamW with nanoGPT's own optimizer state and the same batch gives the same weights."""
    model, params, optimizer = their_optimizer(theirs)
    with run_of(begun, shakespeare, "--max_iters=201", "--dropout=0.0") as run:
        rows = torch.from_numpy(run.tokens.rows("train", run.state.rows, BATCH))
        fit(run)
        mine = dict(run.model.named_parameters())
    record = next(r for r in read_metrics(begun / "metrics.jsonl") if r["kind"] == "train")
    assert record["lr"] == pytest.approx(1e-4)  # nanoGPT's schedule has ended there

    _, loss = model(rows[:, :-1], rows[:, 1:])
    assert loss is not None
    assert record["loss"] == pytest.approx(loss.item(), abs=1e-5)
    loss.backward()
    nn.utils.clip_grad_norm_(params.values(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = 1e-4
    optimizer.step()
    for name, p in params.items():
        torch.testing.assert_close(mine[name], p, atol=1e-6, rtol=0)
        assert (p - theirs["model"][name]).abs().max() > 1e-5  # more than the tolerance above


def test_a_run_resumes_in_nanogpts_folder(out_dir: Path, shakespeare: Path, folio: Folio) -> None:
    """First from ckpt.pt, then from its own checkpoints; ckpt.pt stays as it is."""
    before = (out_dir / "ckpt.pt").read_bytes()
    for begin, last, line in (
        ("resume", 202, f"resuming {out_dir / 'ckpt.pt'} at step 200"),
        ("resume", 203, f"resuming {out_dir} at step 202"),
        ("auto", 204, f"resuming {out_dir} at step 203"),
    ):
        outcome = folio("train", *argv(out_dir, shakespeare, f"--max_iters={last}", begin=begin))
        assert (outcome.code, outcome.err) == (0, "")
        assert line in outcome.out.splitlines()
        assert run_folder.steps(out_dir)[-1] == last
    records = read_metrics(out_dir / "metrics.jsonl")
    trained = {r["step"]: r["tokens"] for r in records if r["kind"] == "train"}
    assert trained == {200 + n: BEFORE + (n + 1) * BATCH * 64 for n in range(4)}
    assert len({r.get("run") for r in records}) == 1
    assert (out_dir / "ckpt.pt").read_bytes() == before


def test_auto_resumes_from_nanogpts_checkpoint(out_dir: Path, shakespeare: Path, folio: Folio) -> None:
    """If the folder has no other checkpoint."""
    outcome = folio("train", *argv(out_dir, shakespeare, "--max_iters=200", begin="auto"))
    assert outcome.code == 0
    assert f"resuming {out_dir / 'ckpt.pt'} at step 200" in outcome.out
    assert run_folder.steps(out_dir) == [200]


@pytest.mark.parametrize("begin", ["resume", "auto"])
def test_eval_only_writes_nothing(begun: Path, shakespeare: Path, folio: Folio, begin: str) -> None:
    """It prints the loss, which is close to nanoGPT's."""
    before = tree(begun)
    outcome = folio("train", *argv(begun, shakespeare, "--eval_only=True", "--eval_iters=20", begin=begin))
    assert outcome.code == 0
    line = next(line for line in outcome.out.splitlines() if line.startswith("step 200: "))
    assert float(line.rpartition(" ")[2]) == pytest.approx(2.6147, abs=0.1)
    assert tree(begun) == before


# Fewer positions


@pytest.mark.parametrize("own", [False, True], ids=["nanoGPT's", "our own"])
def test_positions_are_cropped(
    out_dir: Path, shakespeare: Path, folio: Folio, theirs: dict[str, Any], own: bool
) -> None:
    """In the model and the optimizer, for good; the count of tokens continues. More positions are refused."""
    first = 200
    if own:
        assert folio("train", *argv(out_dir, shakespeare, "--max_iters=201")).code == 0
        first = 201
        found = find.choose(out_dir, "latest")
        weights, slots = dict(found.weights()), dict(found.slots())
    else:
        _, params, optimizer = their_optimizer(theirs)
        weights, slots = params, slots_of(params, optimizer)
    consumed = BEFORE + (first - 200) * BATCH * 64

    assert_refused(
        folio("train", *argv(out_dir, shakespeare, "--max_iters=210", "--block_size=128")), "--block_size=128"
    )
    copy = shutil.copytree(out_dir, out_dir.with_name("copy"))
    with run_of(copy, shakespeare, f"--max_iters={first}", "--block_size=32") as run:
        mine = dict(run.model.named_parameters())
        assert_equal(mine, {**weights, WPE: weights[WPE][:32]})
        cut = {f"{WPE}/{slot}": slots[f"{WPE}/{slot}"][:32] for slot in ("exp_avg", "exp_avg_sq")}
        assert_equal(slots_of(mine, run.optimizer), {**slots, **cut})
        assert run.state.tokens == consumed

    outcome = folio("train", *argv(out_dir, shakespeare, f"--max_iters={first + 2}", "--block_size=32"))
    assert outcome.code == 0
    assert "block_size cropped from 64 to 32" in outcome.out.splitlines()
    outcome = folio("train", *argv(out_dir, shakespeare, f"--max_iters={first + 3}"))
    assert outcome.code == 0
    assert "block_size" not in outcome.out
    assert f"tokens per iteration will be: {BATCH * 32}" in outcome.out
    assert find.choose(out_dir, "latest").config().block_size == 32
    records = read_metrics(out_dir / "metrics.jsonl")
    trained = [r["tokens"] for r in records if r["kind"] == "train" and r["step"] >= first]
    assert trained == [consumed + (n + 1) * BATCH * 32 for n in range(3)]

    before = tree(out_dir)
    outcome = folio("train", *argv(out_dir, shakespeare, "--max_iters=210", "--block_size=64"))
    assert_refused(outcome, "--block_size=64", "block_size=32")
    assert tree(out_dir) == before


def test_a_crop_survives_a_kill(imported: Path, shakespeare: Path, folio: Folio) -> None:
    """Even if the kill comes before a checkpoint; data continues at the same token, and the best starts anew."""
    with run_of(imported, shakespeare, "--max_iters=300", "--block_size=32"):
        pass
    assert [find.choose(imported, "latest").config().block_size, run_folder.steps(imported)] == [64, [200]]
    with run_of(imported, shakespeare, "--max_iters=300") as run:
        assert run.model.config.block_size == run.tokens.block_size == 32
        assert (run.state.rows, run.state.tokens) == (400 * BATCH, BEFORE)
        assert run.state.best is None
    assert not (imported / "best.json").exists()
    outcome = folio("train", *argv(imported, shakespeare, "--max_iters=202"))
    assert outcome.code == 0
    assert find.choose(imported).step == 202


def test_a_new_run_moves_nanogpts_checkpoint_aside(
    out_dir: Path, shakespeare: Path, folio: Folio, shared_data: Path
) -> None:
    """So that a later resume resumes the new run."""
    small = ["--n_layer=1", "--n_head=1", "--n_embd=8", "--block_size=16", "--batch_size=2"]
    few = ["--gradient_accumulation_steps=1", "--max_iters=1"]
    assert folio("train", *argv(out_dir, shakespeare, *small, *few, begin="scratch")).code == 0
    assert not (out_dir / "ckpt.pt").exists()
    aside = out_dir / "previous-1" / "ckpt.pt"
    assert aside.read_bytes() == (shared_data / "nanogpt_ckpt" / "ckpt.pt").read_bytes()


def test_options_of_other_types(out_dir: Path, tmp_path: Path, theirs: dict[str, Any], folio: Folio) -> None:
    """nanoGPT checks no types: whole floats become integers, and values of no use are dropped."""
    config = {**theirs["config"], "max_iters": 6e5, "batch_size": "twelve", "dataset": None}
    torch.save({**theirs, "config": config}, out_dir / "ckpt.pt")
    found = find.in_folder(out_dir)
    assert found.asked["max_iters"] == 600_000
    assert type(found.asked["max_iters"]) is int
    assert not {"batch_size", "dataset"} & found.asked.keys()


def test_damaged_data_does_not_prevent_reading_the_model(
    out_dir: Path, tmp_path: Path, shakespeare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data set that its config names gives the tokenizer, unless it is damaged."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(shakespeare, tmp_path / "data" / "shakespeare_char")
    assert find.in_folder(out_dir).tokenizer().size == 65
    (tmp_path / "data" / "shakespeare_char" / "meta.json").write_text("{")
    assert find.in_folder(out_dir).state["tokenizer"] is None


# Sampling


def test_sampling_from_nanogpts_folder(out_dir: Path, shared_data: Path, folio: Folio) -> None:
    """The most likely tokens are nanoGPT's, in the characters of the meta.pkl beside the checkpoint."""
    given = shared_data / "nanogpt_ckpt"
    shutil.copyfile(given / "meta.pkl", out_dir / "meta.pkl")
    expected = json.loads((given / "expected.json").read_text())["greedy_from_first_8"]
    text = find.by_name(str(out_dir)).tokenizer().bytes(expected).decode()
    for which in (f"--out_dir={out_dir}", f"--init_from={out_dir}", f"--init_from={out_dir / 'ckpt.pt'}"):
        outcome = folio(
            "sample", which, *QUICK, f"--start={text[:8]}", "--temperature=0", "--num_samples=1",
            f"--max_new_tokens={len(expected) - 8}",
        )  # fmt: skip
        assert (outcome.code, outcome.err) == (0, "")
        assert outcome.out.startswith(f"{text}\n---")
    assert_refused(folio("sample", f"--out_dir={out_dir}", "--checkpoint=100"), "100", "200")


def test_sampling_without_a_vocabulary(out_dir: Path, theirs: dict[str, Any], folio: Folio) -> None:
    """One line that names the missing file."""
    content = {**theirs, "config": {**theirs["config"], "dataset": "of nowhere"}}
    torch.save(content, out_dir / "ckpt.pt")
    assert_refused(folio("sample", f"--out_dir={out_dir}"), out_dir / "ckpt.pt", "65 token ids", "meta.pkl")
