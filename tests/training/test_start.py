"""How a run begins: from scratch, from another run's weights, or where an earlier one ended."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import SMALL, Outcome, tree
from run_results import Train, records, said, updates

from folio import api
from folio.checkpoints import find
from folio.records import run_folder

Folio = Callable[..., Outcome]


def test_scratch_moves_an_earlier_run_aside(train: Train) -> None:
    """All of its files move to previous-1, those of the next run to previous-2; other files stay."""
    out = train("out")
    (out / "notes.txt").write_text("mine")
    first = tree(out)
    train("out", "--seed=2")
    second = tree(out)
    assert {k: v for k, v in first.items() if k != "notes.txt"} == tree(out / "previous-1")
    train("out", "--max_iters=0")
    assert tree(out / "previous-1") == {k: v for k, v in first.items() if k != "notes.txt"}
    assert tree(out / "previous-2") == {
        k: v for k, v in second.items() if k != "notes.txt" and not k.startswith("previous-1")
    }
    assert (out / "notes.txt").read_text() == "mine"


def test_auto_starts_or_resumes(train: Train) -> None:
    """From scratch if there is no checkpoint, also beside a run that never saved one; else from the checkpoint."""
    out = train("out", "--init_from=auto", "--max_iters=0")
    train("out", "--init_from=auto", "--max_iters=5")
    assert (out / "previous-1" / "metrics.jsonl").is_file()
    train("out", "--init_from=auto")
    assert not (out / "previous-2").exists()
    assert f"resuming {out} at step 5" in said(out)
    assert run_folder.steps(out) == [5, 10]


@pytest.mark.parametrize("begin", ["auto", "resume"])
@pytest.mark.parametrize("how", ["flag", "file", "call"])
def test_an_existing_run_keeps_its_data(
    folio: Folio, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begin: str, how: str
) -> None:
    """Also if no data is named, OpenWebText is missing and build-nanogpt's shards are there."""
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
    """One line reports that there is none, and nothing is written."""
    outcome = folio("train", *SMALL, f"--data_dir={story}", f"--out_dir={tmp_path / 'out'}", "--init_from=resume")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert f"nothing to resume in {tmp_path / 'out'}" in outcome.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("where", ["other", "out"])
def test_weights_of_another_run(train: Train, where: str) -> None:
    """init_from=<out_dir> uses its best weights and nothing else: a fresh optimizer, step 0, a new folder."""
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


def test_a_resumed_runs_own_file_does_not_undo_its_total(folio: Folio, story: Path, tmp_path: Path) -> None:
    """A step keeps its tokens, though the file names micro steps, since the checkpoint's options override a file's."""
    preset = tmp_path / "preset.toml"
    preset.write_text("gradient_accumulation_steps = 40\n")
    small = [flag for flag in SMALL if "accumulation" not in flag]
    argv = ["train", str(preset), *small, f"--data_dir={story}", f"--out_dir={tmp_path / 'out'}"]
    assert folio(*argv, "--total_batch_size=256", "--max_iters=3").code == 0
    outcome = folio(*argv, "--init_from=resume", "--batch_size=2", "--max_iters=4")
    assert "tokens per iteration will be: 256\n" in outcome.out


def test_files_yield_to_the_checkpoint_and_flags_do_not(
    folio: Folio, train: Train, tmp_path: Path, story: Path
) -> None:
    """defaults < files < checkpoint < command line; overridden values of a file are printed, a typed one counts."""
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


def test_counts_of_one_are_singular(train: Train) -> None:
    assert any(line.endswith(", 1 thread, 1 process") for line in said(train("out", "--max_iters=0")))


def test_an_out_dirs_weights_bring_their_shape(folio: Callable[..., Outcome], story: Path, tmp_path: Path) -> None:
    """Without typed values the shape is the checkpoint's, the context length too."""
    assert folio("train", *SMALL, f"--data_dir={story}", f"--out_dir={tmp_path / 'first'}").code == 0
    others = [flag for flag in SMALL if not flag.startswith(("--block_size", "--n_layer", "--n_head", "--n_embd"))]
    flags = [f"--data_dir={story}", f"--init_from={tmp_path / 'first'}", f"--out_dir={tmp_path / 'second'}"]
    outcome = folio("train", *others, *flags)
    assert outcome.code == 0, outcome.err
    assert find.choose(tmp_path / "second").state["model"]["block_size"] == 16
