"""What a resumed run restores and reports."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Outcome, assert_refused, tree
from run_results import Train, assert_same_bits, records, said, timeless, updates

from folio.checkpoints import find
from folio.machine import flops
from folio.records import run_folder

Folio = Callable[..., Outcome]


def test_learning_rate_and_data_restart(train: Train) -> None:
    """Every restart_interval steps, also if the run resumes between them."""
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


def test_learning_rate_and_data_restart_together(train: Train) -> None:
    """Also if a resumed run has smaller batches, so that its steps read other rows than before."""
    flags = ["--restart_interval=4", "--max_iters=6", "--learning_rate=0", "--min_lr=0"]
    out = train("out", *flags)
    train("out", *flags, "--init_from=resume", "--max_iters=16", "--batch_size=2")
    losses = records(out, "train", "loss")
    assert losses[8:12] == losses[12:16]
    assert len(set(losses[8:12])) == 4


@pytest.mark.parametrize("how", [["--dtype=bfloat16"], ["--document_mask=True", "--eot=0"]], ids=str)
def test_every_option_of_the_model(train: Train, folio: Folio, how: list[str]) -> None:
    """The same bits as without the interruption; the checkpoint generates text, and trains on a shorter context."""
    flags = ["--position=rope", "--norm=unweighted", "--activation=relu2", "--qk_norm=True", "--logit_softcap=15"]
    flags += ["--zero_init=True", "--tie_weights=False", "--token_shift=2", "--learning_rate=1e-2", *how]
    whole, out = train("whole", *flags), train("out", *flags, "--max_iters=5")
    train("out", *flags, "--init_from=resume")
    assert_same_bits(out, whole)
    losses = records(out, "eval", "val_loss")
    assert losses[-1] < losses[0] - 0.2
    sample = folio("sample", f"--out_dir={out}", "--device=cpu", "--num_samples=1", "--max_new_tokens=40")
    assert (sample.code, sample.err) == (0, "")
    crop = folio("train", "--init_from=resume", f"--out_dir={out}", "--block_size=8", "--max_iters=12")
    assert crop.code == 0, crop.err


def test_a_longer_run_continues_at_min_lr(train: Train) -> None:
    """And reports it; the shorter run's records stay."""
    flags = ("--learning_rate=1e-2", "--min_lr=1e-3")
    out = train("out", *flags)
    before = timeless(out)
    train("out", *flags, "--init_from=resume", "--max_iters=13")
    assert any("max_iters grew from 10 to 13" in line and "stays at min_lr=0.001" in line for line in said(out))
    assert timeless(out)[: len(before)] == before
    assert records(out, "train", "lr")[10:] == [1e-3] * 3
    assert updates(out, 13) == {13.0}


def test_options_go_together_with_those_of_the_checkpoint(train: Train, folio: Folio, story: Path) -> None:
    """Not with the defaults, in place of which the checkpoint's options will be."""
    out = train("out", "--learning_rate=1e-2", "--optimizer=muon", "--max_iters=1")
    flags = ["train", f"--data_dir={story}", f"--out_dir={out}", "--max_iters=2", "--init_from=resume"]
    assert folio(*flags, "--min_lr=5e-3", "--adam_learning_rate=7e-3", "--momentum=0.9").code == 0
    assert records(out, "train", "lr")[-1] > 5e-3
    assert_refused(folio(*flags, "--min_lr=0.02"), "min_lr=0.02 is above learning_rate=0.01")
    assert_refused(folio(*flags, "--optimizer=adamw"), "adam_learning_rate=0.007", "--adam_learning_rate=auto")
    assert_refused(folio(*flags, "--decay_share=0.5"), "decay_share=0.5 has no effect with schedule=cosine")
    new = ["train", f"--data_dir={story}", f"--out_dir={out.parent / 'new'}", "--init_from=auto", "--min_lr=0.02"]
    assert_refused(folio(*new), "min_lr=0.02 is above learning_rate=0.0006")


def test_a_longer_run_within_its_decay_reports_nothing(train: Train) -> None:
    out = train("out", "--lr_decay_iters=600")
    train("out", "--init_from=resume", "--max_iters=11")
    assert not any("grew" in line for line in said(out))
    assert said(out)[-1].startswith("step 11 of 11")


def test_resuming_a_finished_run(train: Train) -> None:
    """It reports that there is nothing to do; the files stay as they are."""
    out = train("out")
    before = tree(out / "checkpoints"), timeless(out)
    train("out", "--init_from=resume")
    assert said(out)[-1] == "nothing to do: the run is at step 10: raise --max_iters=10 above that"
    assert (tree(out / "checkpoints"), timeless(out)) == before


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
    """The position counts rows, not steps: another batch size continues after the last row."""
    out = train("out", "--max_iters=5")
    train("out", "--init_from=resume", "--batch_size=8")
    state = find.choose(out, "latest").state
    assert (state["rows"], state["tokens"]) == (5 * 8 + 5 * 16, 5 * 128 + 5 * 256)


def test_differences_on_resume_are_reported(train: Train) -> None:
    """Another number of threads: exact to rounding only, and why."""
    out = train("out", "--max_iters=5")
    torch.set_num_threads(2)
    train("out", "--init_from=resume")
    assert "exact to rounding only: threads was 1 and is 2" in said(out)


def test_other_data_on_resume_is_reported(folio: Folio, train: Train, tmp_path: Path, story: Path) -> None:
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
    """A run that died after its checkpoint of step 5 writes each later line once, and removes the half line."""
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


def test_a_damaged_checkpoint_is_skipped(train: Train) -> None:
    """It is named and set aside, and the run resumes exactly from the one before."""
    whole, out = train("whole"), train("out")
    model = run_folder.checkpoint_folder(out, 10) / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-8])
    train("out", "--init_from=resume")
    assert any("step-00000010 is damaged" in line and "set aside" in line for line in said(out))
    assert f"resuming {out} at step 5" in said(out)
    assert timeless(out) == timeless(whole)
    assert (out / "checkpoints" / "step-00000010.damaged").is_dir()


def test_float16_trains_with_a_scaler(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU too; the scaler's state is in the checkpoint, and a resumed run is exact."""
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
