"""A training run: what it computes, says and leaves, and how it begins."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL, STORY, Outcome, python
from safetensors.torch import load_file

from folio import api
from folio.checkpoints import find
from folio.machine import flops
from folio.records import run_folder
from folio.records.metrics import read_metrics

Folio = Callable[..., Outcome]
Train = Callable[..., Path]

# Losses of the first steps on tests/story.txt in float32, without and with dropout
# fmt: off
GOLDEN = [4.08589, 4.05756, 3.97546, 3.87237, 3.77442, 3.65297, 3.57394, 3.48082, 3.38577, 3.35405, 3.25607,
          3.21734, 3.2155, 3.04288, 3.1351, 3.12059, 3.06235, 3.17819, 3.07913, 3.02923]
GOLDEN_DROPOUT = [4.08257, 4.06411, 3.98948, 3.88697, 3.78362, 3.66521, 3.58819, 3.48895, 3.39787, 3.36339, 3.25931,
                  3.22286, 3.21993, 3.049, 3.14018, 3.12454, 3.06729, 3.18024, 3.08338, 3.06985]
# fmt: on


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Fixed bits, and no waiting for a core that another process has."""
    torch.set_num_threads(1)


@pytest.fixture
def train(folio: Folio, story: Path, tmp_path: Path) -> Train:
    """Runs ``folio train`` into a folder, which is returned: ``train("out", "--max_iters=3")``."""

    def run(name: str, *argv: str, code: int = 0) -> Path:
        outcome = folio("train", *SMALL, f"--data_dir={story}", f"--out_dir={tmp_path / name}", *argv)
        assert outcome.code == code, outcome.err
        (tmp_path / f"{name}.txt").write_text(outcome.out)
        return tmp_path / name

    return run


def said(out: Path) -> list[str]:
    """The lines that the last run into this folder printed."""
    return out.with_name(f"{out.name}.txt").read_text().splitlines()


def records(out: Path, kind: str, *names: str) -> list[Any]:
    """What the lines of one kind say, in order: their fields, or their one field."""
    found = [r for r in read_metrics(out / "metrics.jsonl") if r["kind"] == kind]
    return [r[names[0]] for r in found] if len(names) == 1 else [tuple(r[name] for name in names) for r in found]


def timeless(out: Path) -> list[dict[str, Any]]:
    """All records but the starts, without what a clock says."""
    clock = {"seconds", "tokens_per_second", "mfu"}
    kept = [r for r in read_metrics(out / "metrics.jsonl") if r["kind"] != "start"]
    return [{k: v for k, v in r.items() if k not in clock} for r in kept]


def updates(out: Path, step: int) -> set[float]:
    """How many updates the optimiser has made, by its own count."""
    slots = load_file(run_folder.checkpoint_folder(out, step) / "optimizer.safetensors")
    return {float(t) for name, t in slots.items() if name.endswith("/step")}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# What it computes


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_golden_losses(train: Train, dropout: float) -> None:
    """The first 20 losses on tests/story.txt stay what they are."""
    if dropout and not torch.backends.mkl.is_available():
        pytest.skip("torch draws other dropout masks without MKL")
    rate = ("--learning_rate=1e-2", "--min_lr=1e-3", "--warmup_iters=5", "--lr_decay_iters=20", "--max_iters=20")
    out = train("out", *rate, "--seed=7", f"--dropout={dropout}")
    losses = records(out, "train", "loss")
    assert losses == pytest.approx(GOLDEN_DROPOUT if dropout else GOLDEN, abs=1e-4), losses


def test_accumulation_is_one_large_batch(train: Train) -> None:
    """Two micro batches of four rows and one of eight give the same losses."""
    rate = "--learning_rate=1e-2"
    two = train("two", rate)
    one = train("one", rate, "--gradient_accumulation_steps=1", "--batch_size=8")
    assert records(one, "train", "step") == list(range(10))
    assert records(one, "train", "loss") == pytest.approx(records(two, "train", "loss"), abs=1e-5)


@pytest.mark.parametrize(
    ("flags", "same"),
    [
        (["--window=8"], ["--block_size=8"]),
        (["--total_batch_size=192"], ["--gradient_accumulation_steps=3"]),
        (["--total_batch_size=96", "--window=8"], ["--gradient_accumulation_steps=3", "--block_size=8"]),
        (["--total_batch_size=999", "--gradient_accumulation_steps=2"], ["--gradient_accumulation_steps=2"]),
    ],
)
def test_rows_and_steps_counted_in_tokens(
    folio: Folio, story: Path, tmp_path: Path, flags: list[str], same: list[str]
) -> None:
    """Rows shorter than the model's positions leave the others out; tokens a step become micro steps.

    But those of a file yield to micro steps that are typed.
    """
    preset = tmp_path / "preset.toml"
    preset.write_text("\n".join(flag.removeprefix("--") for flag in flags[:1]) + "\n")
    small = [flag for flag in SMALL if "accumulation" not in flag]

    def losses_of(name: str, *argv: str) -> list[float]:
        out = tmp_path / name
        assert folio("train", *small, *argv, f"--data_dir={story}", f"--out_dir={out}").code == 0
        return records(out, "train", "loss")

    losses = losses_of("counted", str(preset), *flags[1:]), losses_of("named", *same)
    assert losses[0] == losses[1]
    assert len(losses[0]) == 10


def test_the_learning_rate_and_the_data_begin_again(train: Train) -> None:
    """Every restart_interval steps, also of a run that is resumed within."""
    flags = ["--restart_interval=4", "--lr_decay_iters=4", "--max_iters=12", "--eval_interval=6"]
    out = train("out", *flags)
    rates = records(out, "train", "lr")
    assert rates == rates[:4] * 3
    assert len(set(rates)) == 3
    still = records(train("still", *flags, "--learning_rate=0", "--min_lr=0"), "train", "loss")
    assert still == still[:4] * 3
    assert len(set(still)) == 4
    again = train("again", *flags, "--max_iters=6")
    train("again", *flags, "--init_from=resume")
    assert records(again, "train", "step", "loss") == records(out, "train", "step", "loss")


def test_data_and_learning_rate_begin_again_together(train: Train) -> None:
    """Also where a resumed run has smaller batches, so that other rows were read before."""
    flags = ["--restart_interval=4", "--max_iters=6", "--learning_rate=0", "--min_lr=0"]
    out = train("out", *flags)
    train("out", *flags, "--init_from=resume", "--max_iters=16", "--batch_size=2")
    losses = records(out, "train", "loss")
    assert losses[8:12] == losses[12:16]
    assert len(set(losses[8:12])) == 4


def test_a_resumed_runs_own_file_does_not_undo_its_total(folio: Folio, story: Path, tmp_path: Path) -> None:
    """A step keeps its tokens, though the file names micro steps, since the checkpoint's knobs win over a file's."""
    preset = tmp_path / "preset.toml"
    preset.write_text("gradient_accumulation_steps = 40\n")
    small = [flag for flag in SMALL if "accumulation" not in flag]
    argv = ["train", str(preset), *small, f"--data_dir={story}", f"--out_dir={tmp_path / 'out'}"]
    assert folio(*argv, "--total_batch_size=256", "--max_iters=3").code == 0
    outcome = folio(*argv, "--init_from=resume", "--batch_size=2", "--max_iters=4")
    assert "tokens per iteration will be: 256\n" in outcome.out


def test_without_monitor_files_alone_are_told(train: Train) -> None:
    loud, still = train("loud"), train("still", "--no-monitor")
    assert timeless(still) == timeless(loud)
    assert [line for line in said(still) if line.startswith(("iter", "step 5"))] == []
    assert "number of parameters: 0.01M" in said(still)


def test_a_run_is_a_function_of_its_config(train: Train) -> None:
    """The same bits again; other losses from another seed."""
    flags = ("--dropout=0.1", "--learning_rate=1e-2")
    first, again, other = train("a", *flags), train("b", *flags), train("c", *flags, "--seed=2")
    assert timeless(first) == timeless(again) != timeless(other)
    for name in ("model.safetensors", "optimizer.safetensors"):
        paths = [run_folder.checkpoint_folder(out, 10) / name for out in (first, again)]
        assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.parametrize("sampling", ["epoch", "random", "sequential"])
def test_it_learns(train: Train, sampling: str) -> None:
    """In any order of the rows the validation loss falls by far more than chance."""
    rate = ("--learning_rate=1e-2", "--min_lr=1e-3", "--max_iters=60", "--lr_decay_iters=60", "--eval_interval=60")
    out = train("out", *rate, f"--sampling={sampling}", "--eval_iters=20")
    before, after = records(out, "eval", "val_loss")
    assert before == pytest.approx(np.log(len(set(STORY.read_text()))), abs=0.2)
    assert after < before - 0.9


def test_the_evaluation_counts_every_token_once(train: Train, story: Path) -> None:
    """With eval_iters=0 the validation loss is the mean over all of them, here computed window by window."""
    out = train("out", "--eval_iters=0", "--learning_rate=1e-2")
    model = find.choose(out, "latest").model().eval()
    ids = torch.from_numpy(np.fromfile(story / "val.bin", np.uint16).astype(np.int64))
    nats = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, 16):
            window = ids[start : start + 17][None]
            nats += model.loss(window[:, :-1], window[:, 1:])[0].item()
    assert records(out, "eval", "val_loss")[-1] == pytest.approx(nats / (len(ids) - 1), abs=1e-5)


def test_dropout_is_off_in_evaluation(train: Train) -> None:
    """The evaluation at step 0 does not know of it; the training loss does."""
    with_it, without = train("with", "--dropout=0.5"), train("without")
    assert records(with_it, "eval", "val_loss")[0] == records(without, "eval", "val_loss")[0]
    assert records(with_it, "train", "loss")[0] != records(without, "train", "loss")[0]


# When it does what


@pytest.mark.parametrize(
    ("flags", "trained", "evaluated", "kept"),
    [
        ([], range(10), [0, 5, 10], [5, 10]),
        (["--max_iters=12"], range(12), [0, 5, 10, 12], [10, 12]),
        (["--max_iters=3", "--log_interval=2"], [0, 2], [0, 3], [3]),
        (["--eval_interval=4", "--keep_checkpoints=9"], range(10), [0, 4, 8, 10], [4, 8, 10]),
        (["--eval_interval=10", "--checkpoint_interval=3", "--keep_checkpoints=9"], range(10), [0, 10], [3, 6, 9, 10]),
        (["--keep_checkpoints=1"], range(10), [0, 5, 10], [10]),
        (["--max_iters=0"], [], [0], []),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value and isinstance(value[0], str) else "",
)
def test_steps(train: Train, flags: list[str], trained: Sequence[int], evaluated: list[int], kept: list[int]) -> None:
    """Step N is N updates done: max_iters of them, evaluated at 0, at every interval and at the end."""
    out = train("out", "--learning_rate=1e-2", *flags)
    assert records(out, "train", "step") == list(trained)
    assert records(out, "eval", "step") == evaluated
    assert run_folder.steps(out) == kept
    if kept:
        assert updates(out, kept[-1]) == {float(evaluated[-1])}
        state = find.choose(out, "latest").state
        assert (state["step"], state["rows"], state["tokens"]) == (kept[-1], 8 * kept[-1], 128 * kept[-1])


def test_records(train: Train) -> None:
    """A start, then train and eval lines with their fields; tokens are those seen so far."""
    out = train("out", "--learning_rate=1e-2")
    found = read_metrics(out / "metrics.jsonl")
    assert found[0]["kind"] == "start"
    assert found[0]["dtype"] == "float32"
    assert found[0]["tokens_per_iteration"] == 128
    fields = {"kind", "step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "mfu", "seconds"}
    assert all(set(r) == fields for r in found if r["kind"] == "train")
    assert all({"kind", "step", "train_loss", "val_loss"} <= set(r) for r in found if r["kind"] == "eval")
    assert records(out, "train", "tokens") == [128 * (n + 1) for n in range(10)]
    assert records(out, "train", "lr")[:3] == pytest.approx([5e-3, 1e-2, 1e-2])
    times = [r["seconds"] for r in found if "seconds" in r]
    assert times == sorted(times)
    best = json.loads((out / "best.json").read_text())
    assert (best["step"], best["loss"]) == min(records(out, "eval", "step", "val_loss")[1:], key=lambda r: r[1])


def test_lines_are_nanogpts(train: Train) -> None:
    """Scripts that read nanoGPT's output read ours."""
    out = train("out", "--max_iters=12")
    lines = said(out)
    assert lines[0] == "tokens per iteration will be: 128"
    numbers = r"\d+\.\d{4}"
    evals = [line for line in lines if line.startswith("step ") and "loss" in line and "best" not in line]
    iters = [line for line in lines if line.startswith("iter ")]
    assert [line.split(":")[0] for line in evals] == ["step 0", "step 5", "step 10", "step 12"]
    assert [line.split(":")[0] for line in iters] == [f"iter {n}" for n in range(12)]
    assert all(re.fullmatch(rf"step \d+: train loss {numbers}, val loss {numbers}", line) for line in evals)
    pattern = rf"iter \d+: loss {numbers}, time \d+\.\d\dms(, mfu \d+\.\d\d%)?"
    assert all(re.fullmatch(pattern, line) for line in iters)
    assert f"saving checkpoint to {run_folder.checkpoint_folder(out, 5)}" in lines
    assert re.fullmatch(r"number of parameters: \d+\.\d\dM", lines[2])


# How it begins


def test_scratch_moves_an_earlier_run_aside(train: Train) -> None:
    """Whole, into previous-1, and the next one into previous-2; other files stay where they are."""
    out = train("out")
    (out / "notes.txt").write_text("mine")
    first = contents(out)
    train("out", "--seed=2")
    second = contents(out)
    assert {k: v for k, v in first.items() if k != "notes.txt"} == contents(out / "previous-1")
    train("out", "--max_iters=0")
    assert contents(out / "previous-1") == {k: v for k, v in first.items() if k != "notes.txt"}
    assert contents(out / "previous-2") == {
        k: v for k, v in second.items() if k != "notes.txt" and not k.startswith("previous-1")
    }
    assert (out / "notes.txt").read_text() == "mine"


def test_auto_starts_or_resumes(train: Train) -> None:
    """From scratch where there is no checkpoint, also beside a run that never saved one; else from it."""
    out = train("out", "--init_from=auto", "--max_iters=0")
    train("out", "--init_from=auto", "--max_iters=5")
    assert (out / "previous-1" / "metrics.jsonl").is_file()
    train("out", "--init_from=auto")
    assert not (out / "previous-2").exists()
    assert f"resuming {out} at step 5" in said(out)
    assert run_folder.steps(out) == [5, 10]


@pytest.mark.parametrize("begin", ["auto", "resume"])
@pytest.mark.parametrize("how", ["flag", "file", "call"])
def test_a_run_that_is_there_knows_its_data(
    folio: Folio, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begin: str, how: str
) -> None:
    """Though no data is named, OpenWebText is not there and build-nanogpt's shards are."""
    out = train("out", "--max_iters=5")
    (tmp_path / "edu_fineweb10B").mkdir()
    (tmp_path / "edu_fineweb10B" / "edufineweb_train_000001.npy").write_bytes(b"")
    (tmp_path / "own.py").write_text(f"out_dir = {str(out)!r}\ninit_from = {begin!r}\n")
    monkeypatch.chdir(tmp_path)
    if how == "call":
        api.train(out_dir=out, init_from=begin, max_iters=7)
    else:
        words = ["own.py"] if how == "file" else [f"--out_dir={out}", f"--init_from={begin}"]
        outcome = folio("train", *words, "--max_iters=7")
        assert outcome.code == 0, outcome.err
        assert "fineweb" not in outcome.out
    assert records(out, "train", "step") == list(range(7))
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.txt", "own.py", "edu_fineweb10B"}


def test_resume_needs_a_checkpoint(folio: Folio, story: Path, tmp_path: Path) -> None:
    """One line that says so, and nothing is written."""
    outcome = folio("train", *SMALL, f"--data_dir={story}", f"--out_dir={tmp_path / 'out'}", "--init_from=resume")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert f"nothing to resume in {tmp_path / 'out'}" in outcome.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("where", ["other", "out"])
def test_weights_of_another_run(train: Train, where: str) -> None:
    """init_from=<out_dir> takes its best weights and nothing else: a fresh optimiser, step 0, a new folder."""
    source = train("out", "--learning_rate=1e-2")
    best = records(source, "eval", "val_loss")[-1]
    run_id = json.loads((source / "config.json").read_text())["run"]
    out = train(where, f"--init_from={source}", "--max_iters=5", "--dropout=0.2", "--n_layer=2")
    assert any(line.startswith(f"weights of {run_folder.checkpoint_folder(source, 10)}, step 10") for line in said(out))
    assert records(out, "eval", "val_loss")[0] == best
    assert records(out, "train", "step") == list(range(5))
    assert updates(out, 5) == {5.0}
    assert json.loads((out / "config.json").read_text())["run"] != run_id
    kept = source / "previous-1" if where == "out" else source
    assert run_folder.steps(kept) == [5, 10]


def test_files_yield_to_the_checkpoint_and_flags_do_not(
    folio: Folio, train: Train, tmp_path: Path, story: Path
) -> None:
    """defaults < files < checkpoint < command line; what a file loses is printed, a typed dropout is taken."""
    out = train("out", "--max_iters=5", "--learning_rate=1e-3", "--min_lr=1e-4", "--weight_decay=0.3")
    config = tmp_path / "mine.py"
    config.write_text("learning_rate = 5.0\nn_layer = 7\nbeta2 = 0.95\nbatch_size = 4\nlog_interval = 2\n")
    flags = (f"--data_dir={story}", f"--out_dir={out}", "--init_from=resume", "--dropout=0.1", "--max_iters=10")
    outcome = folio("train", str(config), *flags, "--log_interval=1", "--grad_clip=0.5")
    assert (outcome.code, outcome.err) == (0, "")
    assert f"learning_rate=0.001 from the checkpoint, not 5.0 from {config}" in outcome.out
    assert f"n_layer=2 from the checkpoint, not 7 from {config}" in outcome.out
    assert "beta2" not in outcome.out  # the same on both sides
    assert "log_interval" not in outcome.out  # typed
    asked = json.loads((out / "config.json").read_text())["asked"]
    wanted = {
        "dropout": 0.1,
        "grad_clip": 0.5,
        "learning_rate": 1e-3,
        "weight_decay": 0.3,
        "n_layer": 2,
        "max_iters": 10,
    }
    assert {name: asked[name] for name in wanted} == wanted
    assert find.choose(out, "latest").state["model"]["dropout"] == 0.1


def test_a_longer_run_goes_on_at_min_lr(train: Train) -> None:
    """And says so; the shorter one's records stay."""
    flags = ("--learning_rate=1e-2", "--min_lr=1e-3")
    out = train("out", *flags)
    before = timeless(out)
    train("out", *flags, "--init_from=resume", "--max_iters=13")
    assert any("max_iters grew from 10 to 13" in line and "stays at min_lr=0.001" in line for line in said(out))
    assert timeless(out)[: len(before)] == before
    assert records(out, "train", "lr")[10:] == [1e-3] * 3
    assert updates(out, 13) == {13.0}


def test_a_longer_run_within_its_decay_has_nothing_to_say(train: Train) -> None:
    out = train("out", "--lr_decay_iters=600")
    train("out", "--init_from=resume", "--max_iters=11")
    assert not any("grew" in line for line in said(out))
    assert said(out)[-1].startswith("step 11 of 11")


def test_one_of_a_kind_is_singular(train: Train) -> None:
    assert any(line.endswith(", 1 thread, 1 process") for line in said(train("out", "--max_iters=0")))


def test_resuming_a_finished_run(train: Train) -> None:
    """There is nothing to do, and that is what it says; the files stay as they are."""
    out = train("out")
    before = contents(out / "checkpoints"), timeless(out)
    train("out", "--init_from=resume")
    assert said(out)[-1] == "nothing to do: the run is at step 10: raise --max_iters=10 above that"
    assert (contents(out / "checkpoints"), timeless(out)) == before


def test_resume_is_exact_in_this_process(train: Train) -> None:
    """Ten steps in one go, and five and five, are the same bits, with dropout on."""
    flags = ("--dropout=0.1", "--learning_rate=1e-2")
    whole = train("whole", *flags)
    halves = train("halves", *flags, "--max_iters=5")
    train("halves", *flags, "--init_from=resume", "--max_iters=10")
    assert not any("exact to rounding" in line for line in said(halves))
    assert timeless(halves) == timeless(whole)
    for name in ("model.safetensors", "optimizer.safetensors"):
        a, b = (run_folder.checkpoint_folder(out, 10) / name for out in (whole, halves))
        assert a.read_bytes() == b.read_bytes()


def test_the_position_in_the_data_is_kept(train: Train) -> None:
    """Rows seen, not steps: another batch size goes on behind the last row."""
    out = train("out", "--max_iters=5")
    train("out", "--init_from=resume", "--batch_size=8")
    state = find.choose(out, "latest").state
    assert (state["rows"], state["tokens"]) == (5 * 8 + 5 * 16, 5 * 128 + 5 * 256)


def test_what_differs_on_resume_is_said(train: Train) -> None:
    """Another number of threads: exact to rounding only, and why."""
    out = train("out", "--max_iters=5")
    torch.set_num_threads(2)
    train("out", "--init_from=resume")
    assert "exact to rounding only: threads was 1 and is 2" in said(out)


def test_other_data_on_resume_is_said(folio: Folio, train: Train, tmp_path: Path, story: Path) -> None:
    """The fingerprint of the data is part of the state."""
    out = train("out", "--max_iters=5")
    moved = tmp_path / "moved"
    moved.mkdir()
    for name, cut in (("train", 4000), ("val", 1000)):
        np.fromfile(story / f"{name}.bin", np.uint16)[:cut].tofile(moved / f"{name}.bin")
    outcome = folio("train", f"--data_dir={moved}", f"--out_dir={out}", "--init_from=resume", "--max_iters=6")
    assert outcome.code == 0
    assert f"exact to rounding only: the data in {moved} changed" in outcome.out


@pytest.mark.parametrize("half", ['{"kind": "train", "step": 9, "lo', ""])
def test_metrics_are_rewound(train: Train, half: str) -> None:
    """A run that died after its checkpoint of step 5 writes each later line once, and no half line stays."""
    flags = ("--dropout=0.1", "--learning_rate=1e-2")
    whole, out = train("whole", *flags), train("out", *flags)
    for path in run_folder.checkpoint_folder(out, 10).iterdir():
        path.unlink()
    run_folder.checkpoint_folder(out, 10).rmdir()
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[:-2]) + half)
    train("out", *flags, "--init_from=auto")
    assert timeless(out) == timeless(whole)
    assert len((out / "metrics.jsonl").read_text().splitlines()) == len(timeless(whole)) + 2  # two starts


# What it leaves


def test_eval_only_writes_nothing(train: Train) -> None:
    """It prints the loss of the weights that are there: new ones, or the latest checkpoint's."""
    out = train("out", "--eval_only=True")
    assert not out.exists()
    assert re.match(r"step 0: train loss 4\.\d+, val loss 4\.", said(out)[-1])
    train("out")
    before, line = contents(out), next(line for line in said(out) if line.startswith("step 10: "))
    train("out", "--eval_only=True", "--init_from=resume")
    assert line in said(out)
    assert contents(out) == before


def test_the_best_and_the_latest_are_kept(train: Train) -> None:
    """always_save_checkpoint=False keeps these two, where the loss rises again; sampling takes the best."""
    out = train("out", "--learning_rate=1e-2")
    ruin = ("--learning_rate=3.0", "--decay_lr=False", "--always_save_checkpoint=False", "--max_iters=25")
    train("out", "--init_from=resume", *ruin)
    assert run_folder.steps(out) == [10, 25]
    assert json.loads((out / "best.json").read_text())["step"] == 10
    assert find.choose(out).step == 10
    assert find.choose(out, "latest").state["evaluations_without_improvement"] == 3


def test_the_first_evaluation_is_never_the_best(train: Train) -> None:
    """It is of weights that nobody trained, and no checkpoint holds them, however bad it gets."""
    out = train("out", "--learning_rate=3.0", "--decay_lr=False")
    steps = records(out, "eval", "step", "val_loss")
    assert min(steps, key=lambda r: r[1])[0] == 0
    best = json.loads((out / "best.json").read_text())
    assert (best["step"], best["loss"]) == min(steps[1:], key=lambda r: r[1])


def test_keep_checkpoints_spares_the_best(train: Train) -> None:
    """The newest two, and the best besides."""
    out = train("out", "--learning_rate=1e-2")
    train("out", "--init_from=resume", "--learning_rate=3.0", "--decay_lr=False", "--max_iters=25")
    assert run_folder.steps(out) == [10, 20, 25]


def test_a_damaged_checkpoint_is_skipped(train: Train) -> None:
    """It is named and set aside, and the run goes on from the one before, exactly."""
    whole, out = train("whole"), train("out")
    model = run_folder.checkpoint_folder(out, 10) / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-8])
    train("out", "--init_from=resume")
    assert any("step-00000010 is damaged" in line and "set aside" in line for line in said(out))
    assert f"resuming {out} at step 5" in said(out)
    assert timeless(out) == timeless(whole)
    assert (out / "checkpoints" / "step-00000010.damaged").is_dir()


def test_losses_that_are_not_finite(folio: Folio, train: Train, story: Path) -> None:
    """Exit code 1 and one line; the checkpoints before stay, and what they hold is finite."""
    out = train("out", "--max_iters=5", "--eval_interval=100", "--checkpoint_interval=5")
    ruin = ("--learning_rate=1e30", "--decay_lr=False", "--grad_clip=0", "--max_iters=50", "--checkpoint_interval=1")
    outcome = folio("train", f"--data_dir={story}", f"--out_dir={out}", "--init_from=resume", *ruin)
    assert (outcome.code, outcome.err.count("\n")) == (1, 1)
    assert re.search(
        r"the (loss|gradient) of step \d+ is not finite.*lower --learning_rate, or resume from step \d+", outcome.err
    )
    found = find.choose(out, "latest")
    assert f"resume from step {found.step}\n" in outcome.err
    assert all(weight.isfinite().all() for _, weight in found.weights())


def test_float16_trains_with_a_scaler(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU too; the scaler's state is in the checkpoint, and a resumed run goes on exactly."""
    monkeypatch.setattr(flops, "peak", lambda device, dtype: None)  # slow to measure where float16 is
    flags = ("--dtype=float16", "--learning_rate=1e-2", "--dropout=0.1")
    whole, out = train("whole", *flags), train("out", *flags, "--max_iters=5")
    assert find.choose(out, "latest").state["scaler"]["_growth_tracker"] == 5
    train("out", *flags, "--init_from=resume", "--max_iters=10")
    scalers = [find.choose(folder, "latest").state["scaler"] for folder in (out, whole)]
    assert scalers[0] == scalers[1]
    assert (scalers[0]["scale"], scalers[0]["_growth_tracker"]) == (65536.0, 10)
    assert timeless(out) == timeless(whole)
    assert records(out, "train", "loss")[-1] < records(out, "train", "loss")[0] - 0.1


# What it does without


def test_a_compiler_that_fails_warns_once(tmp_path: Path, story: Path) -> None:
    """compile=True goes on without, and gets the same losses."""
    env = {"CXX": "/bin/false", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = python(
        *("-m", "folio", "train", *SMALL, f"--data_dir={story}", f"--out_dir={tmp_path / 'out'}"),
        *("--compile=True", "--max_iters=3", "--eval_interval=100"),
        **env,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("torch.compile failed, going on without: ") == 1
    assert records(tmp_path / "out", "train", "step") == [0, 1, 2]


def test_an_out_dirs_weights_bring_their_shape(folio: Callable[..., Outcome], story: Path, tmp_path: Path) -> None:
    """What is not typed of the shape, the context length too, is the checkpoint's."""
    assert folio("train", *SMALL, f"--data_dir={story}", f"--out_dir={tmp_path / 'first'}").code == 0
    others = [flag for flag in SMALL if not flag.startswith(("--block_size", "--n_layer", "--n_head", "--n_embd"))]
    flags = [f"--data_dir={story}", f"--init_from={tmp_path / 'first'}", f"--out_dir={tmp_path / 'second'}"]
    outcome = folio("train", *others, *flags)
    assert outcome.code == 0, outcome.err
    assert find.choose(tmp_path / "second").state["model"]["block_size"] == 16
