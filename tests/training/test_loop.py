"""What a training run computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, STORY, Outcome, python
from golden import GOLDEN, GOLDEN_DROPOUT, GOLDEN_OPTIONS
from run_results import Train, records, timeless

from folio.checkpoints import find
from folio.records import run_folder

Folio = Callable[..., Outcome]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_golden_losses(train: Train, dropout: float) -> None:
    """The first 20 losses on tests/story.txt stay what they are."""
    if dropout and not torch.backends.mkl.is_available():
        pytest.skip("torch draws other dropout masks without MKL")
    out = train("out", *GOLDEN_OPTIONS, f"--dropout={dropout}")
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
    """A shorter window uses fewer positions; a total of tokens becomes micro steps.

    Typed micro steps override the total of a file.
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
    """In any order of the rows the validation loss falls far below chance."""
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
    """It changes the training loss, not the evaluation at step 0."""
    with_it, without = train("with", "--dropout=0.5"), train("without")
    assert records(with_it, "eval", "val_loss")[0] == records(without, "eval", "val_loss")[0]
    assert records(with_it, "train", "loss")[0] != records(without, "train", "loss")[0]


def test_a_compiler_that_fails_warns_once(tmp_path: Path, story: Path) -> None:
    """compile=True continues in eager mode, with the same losses."""
    env = {"CXX": "/bin/false", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = python(
        *("-m", "folio", "train", *SMALL, f"--data_dir={story}", f"--out_dir={tmp_path / 'out'}"),
        *("--compile=True", "--max_iters=3", "--eval_interval=100"),
        **env,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("torch.compile failed, continuing without it: ") == 1
    assert records(tmp_path / "out", "train", "step") == [0, 1, 2]
