"""Rows over shards, in build-nanogpt's order, and over several data sets by weight."""

from __future__ import annotations

import ast
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pytest
import torch
from conftest import SMALL, Outcome, python

from folio import cli
from folio.config.options import Data, TrainConfig
from folio.data.folders import open_folder
from folio.data.mixture import parse as parse_mixture
from folio.data.rows import Tokens
from folio.data.shards import Rows, rows_per_epoch
from folio.records import run_folder
from folio.records.metrics import read_metrics
from folio.training.batches import micro_batches
from folio.training.run import finish
from folio.training.start import build

Sampling = Literal["epoch", "random", "sequential"]
SHARD = 10**6  # token p of shard s is s · SHARD + p, so that an id shows its place


def lay(folder: Path, sizes: Sequence[int], first: int = 0) -> Path:
    """Shards of these sizes to train on, the same to validate; the first one is number ``first``."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "val"):
        for i, size in enumerate(sizes):
            np.save(folder / f"{split}_{i:06d}.npy", (first + i) * SHARD + np.arange(size, dtype=np.uint32))
    return folder


@pytest.fixture
def over(tmp_path: Path) -> Callable[..., Tokens]:
    """Makes Tokens over shards of these sizes."""

    def make(sizes: Sequence[int], block_size: int, **options: Any) -> Tokens:
        where = tmp_path / "-".join(map(str, sizes))
        return Tokens([open_folder(where if where.exists() else lay(where, sizes))], block_size, **options)

    return make


def assert_windows(rows: Rows, sizes: Sequence[int], first: int = 0) -> None:
    """Each row is consecutive tokens of one shard."""
    assert np.array_equal(rows, rows[:, :1] + np.arange(rows.shape[1]))
    assert (rows[:, -1] % SHARD < np.asarray(sizes)[rows[:, -1] // SHARD - first]).all()
    assert (rows[:, 0] // SHARD == rows[:, -1] // SHARD).all()


# Shards


@pytest.mark.parametrize(
    ("sizes", "T"), [([100, 57, 200], 8), ([9, 8, 16, 17, 1, 24], 8), ([5, 5, 90], 8), ([90, 3, 3], 7), ([33], 8)]
)
def test_an_epoch_visits_each_window_of_each_shard_once(over: Callable[..., Tokens], sizes: list[int], T: int) -> None:
    """Windows are adjacent, in an order of the epoch; less than two windows of each shard are left out."""
    data, counts = over(sizes, T), rows_per_epoch(np.array(sizes), T)
    per_epoch, orders = int(counts.sum()), []
    for size, count in zip(sizes, counts, strict=True):
        assert count == 0 if size <= T else count >= 1 and size - 1 - count * T < 2 * T
    for epoch in range(10):
        rows = data.rows("train", epoch * per_epoch, per_epoch)
        assert_windows(rows, sizes)
        for shard, count in enumerate(counts):
            starts = np.sort(rows[rows[:, 0] // SHARD == shard, 0])
            assert len(starts) == count
            assert (np.diff(starts) == T).all()
        orders.append(tuple(rows[:, 0]))
    assert len(set(orders)) > 1
    if per_epoch > 20:
        assert len(set(orders)) == 10
        shards = [start // SHARD for start in orders[0]]
        assert shards != sorted(shards) or len(sizes) == 1  # not one shard after another


def test_one_shard_is_read_as_one_file(over: Callable[..., Tokens], tmp_path: Path) -> None:
    """One shard has the order of a train.bin; the values of that order are fixed."""
    for split in ("train", "val"):
        np.arange(100, dtype=np.uint16).tofile(tmp_path / f"{split}.bin")
    for sampling in ("epoch", "random", "sequential"):
        options: dict[str, Any] = {"sampling": sampling, "batch_size": 3}
        file, shard = Tokens([open_folder(tmp_path)], 8, **options), over([100], 8, **options)
        assert np.array_equal(shard.rows("train", 0, 200), file.rows("train", 0, 200))
    assert over([100], 8).rows("train", 9, 5)[:, 0].tolist() == [10, 42, 24, 80, 32]
    assert over([100], 8, sampling="random").rows("train", 9, 5)[:, 0].tolist() == [50, 60, 86, 77, 2]


@pytest.mark.parametrize("mixed", [False, True], ids=["one", "mixture"])
@pytest.mark.parametrize("sampling", ["epoch", "random", "sequential"])
def test_rows_are_a_pure_function(tmp_path: Path, sampling: Sampling, mixed: bool) -> None:
    """Rows do not depend on how a range is divided or what was read before, also across 1,024 rows of a mixture."""
    folders = [lay(tmp_path / "a", [100, 57, 200]), lay(tmp_path / "b", [80, 90], 3)][: 1 + mixed]

    def made() -> Tokens:
        weights = [0.7, 0.3][: len(folders)]
        return Tokens(list(map(open_folder, folders)), 8, weights=weights, sampling=sampling, batch_size=3)

    data, far = made(), 10**12
    whole = data.rows("train", 1000, 200)
    assert_windows(whole, [100, 57, 200, 80, 90])
    for size in (1, 7, 64):
        parts = [data.rows("train", first, min(size, 1200 - first)) for first in range(1000, 1200, size)]
        assert np.array_equal(np.concatenate(parts), whole)
    assert np.array_equal(made().rows("train", 1150, 50), whole[150:])
    assert np.array_equal(data.rows("train", far, 2)[1:], made().rows("train", far + 1, 1))


def test_random_windows_reach_every_start(over: Callable[..., Tokens]) -> None:
    """Every start in every shard, about equally often."""
    rows = over([20, 8, 9, 5, 15], 8, sampling="random").rows("train", 0, 20_000)
    assert_windows(rows, [20, 8, 9, 5, 15])
    starts = Counter(rows[:, 0].tolist())
    assert set(starts) == {*range(12), 2 * SHARD, *range(4 * SHARD, 4 * SHARD + 7)}
    assert all(abs(count - 1000) < 150 for count in starts.values())


@pytest.mark.parametrize("sizes", [[100, 57, 200], [9, 8, 1, 16, 2, 17], [3, 33]])
def test_windows_for_the_evaluation(over: Callable[..., Tokens], sizes: list[int]) -> None:
    """Count 0: each target of each shard once, the tails filled up. Else whole windows from end to end."""
    data = over(sizes, 8)
    windows = data.windows("val", data.spread("val", 0))
    targets = windows[:, 1:][windows[:, 1:] >= 0]
    assert targets.tolist() == [i * SHARD + p for i, size in enumerate(sizes) for p in range(1, size)]
    assert (windows[:, 0] >= 0).all()
    fitting = [i * SHARD + p for i, size in enumerate(sizes) for p in range(max(0, size - 8))]
    for count in (1, 2, 4):
        rows = data.windows("val", data.spread("val", count))
        assert len(rows) == count
        assert_windows(rows, sizes)
        assert [rows[0, 0], rows[-1, 0]] == [fitting[0], fitting[-1 if count > 1 else 0]]
    places = [fitting.index(start) for start in data.windows("val", data.spread("val", 4))[:, 0]]
    assert np.ptp(np.diff(places)) <= 1


@pytest.mark.parametrize("bad", [70_000, -3, -1])
def test_ids_outside_the_vocabulary_name_their_shard(tmp_path: Path, bad: int) -> None:
    """The file that holds the id, of any data set."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for file in ("train_1", "train_2", "train_3", "val_0"):
            ids = np.full(50, 7, dtype=np.int32)
            ids[20] = bad if (name, file) == ("b", "train_2") else 7
            np.save(tmp_path / name / f"{file}.npy", ids)
    data = Tokens([open_folder(tmp_path / "a"), open_folder(tmp_path / "b")], 8, weights=[0.5, 0.5])
    data = replace(data, vocab_size=50_304)
    data.windows("val", data.spread("val", 0))
    with pytest.raises(ValueError, match=r"b/train_2\.npy: ") as refused:
        data.rows("train", 0, 64)
    assert f"token id {bad} is outside the vocabulary of 50304" in str(refused.value)


# build-nanogpt's order


class Loader(Protocol):
    def next_batch(self) -> tuple[torch.Tensor, torch.Tensor]: ...


class Lite:
    """build-nanogpt's DataLoaderLite (train_gpt2.py) in a few lines; GPT-from-scratch's DataLoader is the same."""

    def __init__(self, B: int, T: int, rank: int, world: int, files: list[Path]) -> None:
        self.shape, self.rank, self.world = (B, T), rank, world
        self.shards = [torch.from_numpy(np.load(file).astype(np.int64)) for file in files]
        self.shard, self.position = 0, B * T * rank

    def next_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        B, T = self.shape
        found = self.shards[self.shard][self.position : self.position + B * T + 1]
        self.position += B * T * self.world
        if self.position + B * T * self.world + 1 > len(self.shards[self.shard]):
            self.shard = (self.shard + 1) % len(self.shards)
            self.position = B * T * self.rank
        return found[:-1].view(B, T), found[1:].view(B, T)


def written_here(folder: Path) -> Callable[..., Loader]:
    files = sorted(folder.glob("*train*"))
    return lambda B, T, rank, world: Lite(B, T, rank, world, files)


def theirs(folder: Path) -> Callable[..., Loader]:
    """The class itself, from the checkout FOLIO_BUILD_NANOGPT; it reads the folder edu_fineweb10B."""
    if not (checkout := os.environ.get("FOLIO_BUILD_NANOGPT")):
        pytest.skip("FOLIO_BUILD_NANOGPT names no checkout of build-nanogpt")
    tree = ast.parse((Path(checkout) / "train_gpt2.py").read_text(encoding="utf-8"))
    wanted = [node for node in tree.body if getattr(node, "name", "") in ("load_tokens", "DataLoaderLite")]
    assert len(wanted) == 2
    scope: dict[str, Any] = {"np": np, "torch": torch, "os": os, "master_process": False}
    exec(compile(ast.Module(wanted, []), "train_gpt2.py", "exec"), scope)
    (folder.parent / "edu_fineweb10B").symlink_to(folder)
    return lambda B, T, rank, world: scope["DataLoaderLite"](B, T, rank, world, "train")


# the size of each shard: rounds of all ranks, more batches, more tokens; a batch needs 1 token more to be read
ROUNDS = {
    "one": [(3, 0, 5)],
    "just enough": [(1, 0, 1), (2, 0, 1), (1, 0, 1)],
    "uneven": [(2, 0, 7), (1, 0, 3), (4, 1, 0), (3, 0, 0)],
    "more batches": [(2, 1, 1), (2, 2, 1), (3, 1, 0), (2, 3, 2)],
    "short at the end": [(3, 0, 2), (1, 0, 2)],  # no further round fits at the end
}


@pytest.mark.parametrize("made", [written_here, theirs], ids=["written here", "theirs"])
@pytest.mark.parametrize("case", ROUNDS)
def test_sequential_is_build_nanogpts_loader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, made: Callable[[Path], Callable[..., Loader]]
) -> None:
    """Rank r's micro step m reads rank r's next batch, for any world, over more than two epochs."""
    for world in (1, 2, 3, 4, 8):
        for B, T in ((1, 8), (3, 8), (4, 5), (2, 1)):
            sizes = [(rounds * world + more) * B * T + rest for rounds, more, rest in ROUNDS[case]]
            folder = lay(tmp_path / f"{world}-{B}-{T}" / "shards", sizes)
            monkeypatch.chdir(folder.parent)
            loader = made(folder)
            data = Tokens([open_folder(folder)], T, sampling="sequential", batch_size=B, world=world)
            options = Data(batch_size=B, gradient_accumulation_steps=2 * world)
            steps = 2 + sum(rounds + 1 + more for rounds, more, _ in ROUNDS[case])  # of two turns each
            for rank in range(world):
                reference = loader(B, T, rank, world)
                for step in range(steps):
                    for first, count, _ in micro_batches(options, rank, world):
                        rows = data.rows("train", step * 2 * world * B + first, count)
                        x, y = reference.next_batch()
                        assert np.array_equal(rows[:, :-1], x.numpy()), (world, B, T, rank, step)
                        assert np.array_equal(rows[:, 1:], y.numpy())


def test_sequential_skips_shards_that_are_too_small(over: Callable[..., Tokens]) -> None:
    """If build-nanogpt's loader would fail, a rank continues with the next shard; no row crosses shards."""
    sizes = [100, 24, 25, 17, 60]
    for world in (1, 2, 4, 8):
        data = over(sizes, 8, sampling="sequential", batch_size=3, world=world)
        rows = data.rows("train", 0, 40 * world)
        assert_windows(rows, sizes)
        assert {0, 4} & set((rows[:, 0] // SHARD).tolist())


@pytest.mark.slow
def test_two_ranks_train_on_build_nanogpts_batches(tmp_path: Path) -> None:
    """The losses of a real group are those of its loaders' batches, put through the model in one process."""
    (tmp_path / "data").mkdir()
    random = np.random.default_rng(1)
    for i, size in enumerate((4 * 128 + 70, 2 * 128 + 1, 6 * 128)):
        ids = np.minimum(random.geometric(0.2, size), 63).astype(np.uint16)
        np.save(tmp_path / "data" / f"edufineweb_{'train' if i else 'val'}_{i:06d}.npy", ids)
    argv = [*SMALL, f"--data_dir={tmp_path / 'data'}", "--sampling=sequential", "--gradient_accumulation_steps=4"]
    argv += ["--vocab_size=64", "--max_iters=3", "--decay_lr=False", "--learning_rate=1e-2", "--grad_clip=0"]
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    done = python(*launcher, "train.py", *argv, f"--out_dir={tmp_path / 'two'}")
    assert done.returncode == 0, done.stderr
    losses = [r["loss"] for r in read_metrics(tmp_path / "two" / "metrics.jsonl") if r["kind"] == "train"]
    run = build(cli.parse(TrainConfig, [*argv, f"--out_dir={tmp_path / 'one'}"], "folio train", files=True))
    make, expected = written_here(tmp_path / "data"), []
    loaders = [make(4, 16, rank, 2) for rank in (0, 1)]
    for _ in range(3):
        summed = torch.zeros(())
        for loader in loaders * 2:
            nats, _ = run.loss(*loader.next_batch())
            (nats / run.tokens_per_step).backward()
            summed += nats.detach()
        run.optimizer.step()
        run.optimizer.zero_grad()
        expected.append(summed.item() / run.tokens_per_step)
    finish(run)
    assert losses == pytest.approx(expected, abs=1e-5)
    assert len(set(losses)) == 3


# Mixtures


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the data set "large", and one elsewhere, "small"; both of shards."""
    lay(tmp_path / "data" / "large", [300, 200, 500])
    lay(tmp_path / "elsewhere" / "small", [90, 70], 3)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("weights", "shares"), [((0.7, 0.3), (717, 307)), ((2, 1), (683, 341)), ((999, 1), (1023, 1)), ((5, 5), (512, 512))]
)
def test_a_mixture_has_its_shares(two: Path, weights: tuple[float, float], shares: tuple[int, int]) -> None:
    """Of each 1,024 rows the nearest whole numbers; each data set's rows are its own order, none left out."""
    names = ("large", str(two / "elsewhere" / "small"))
    mixture = ",".join(f"{name}={weight}" for name, weight in zip(names, weights, strict=True))
    data = Tokens.open(Data(data_mixture=mixture), 8, 7)
    rows = data.rows("train", 0, 3 * 1024)
    assert_windows(rows, [300, 200, 500, 90, 70])
    small = rows[:, 0] // SHARD >= 3
    assert small.reshape(3, 1024).sum(axis=1).tolist() == [shares[1]] * 3
    assert len({group.tobytes() for group in small.reshape(3, 1024)}) == 3  # shuffled again
    for place, here, share in zip(("data/large", names[1]), (~small, small), shares, strict=True):
        alone = Tokens([open_folder(Path(place))], 8, seed=7)
        for group in range(3):
            mine = rows[group * 1024 : (group + 1) * 1024][here[group * 1024 : (group + 1) * 1024], 0]
            own = alone.rows("train", group * share, share)[:, 0]
            assert sorted(mine.tolist()) == sorted(own.tolist())
            assert share == 1 or mine.tolist() != sorted(mine.tolist())


def test_the_evaluation_of_a_mixture(two: Path) -> None:
    """By weight over both; 0: each target of both once."""
    data = Tokens.open(Data(data_mixture="large=3,elsewhere/small=1"), 8, 7)
    windows = data.windows("val", data.spread("val", 16))
    assert_windows(windows, [300, 200, 500, 90, 70])
    assert Counter((windows[:, 0] // SHARD >= 3).tolist()) == {False: 12, True: 4}
    everything = data.windows("val", data.spread("val", 0))[:, 1:]
    counted = Counter(everything[everything >= 0].tolist())
    assert set(counted.values()) == {1}
    assert len(counted) == 300 + 200 + 500 + 90 + 70 - 5


def test_weights_need_not_sum_to_one() -> None:
    """Names may be folders, with an = in them."""
    assert parse_mixture("a=2, data/b=1 ,/c=d=0.5") == {"a": 2.0, "data/b": 1.0, "/c=d": 0.5}


@pytest.mark.parametrize(
    ("mixture", "words"),
    [
        ("large", "'large' must be NAME=WEIGHT"),
        ("large=0.5,", "'' must be NAME=WEIGHT"),
        ("large=x", "'large=x' must be NAME=WEIGHT"),
        ("large=0", "'large=0' must be NAME=WEIGHT"),
        ("large=nan", "'large=nan' must be NAME=WEIGHT"),
        ("large=inf", "'large=inf' must be NAME=WEIGHT"),
        ("large=1,large=2", "'large=2' must be NAME=WEIGHT, each name once"),
        ("large=1,elsewhere/small=1e-6", "the weight of elsewhere/small is too small"),
        ("large=1,nowhere=1", "data/nowhere/train.bin is missing"),
        ("large=1,elsewhere/bytes=1", "elsewhere/bytes and data/large have different tokenizers"),
    ],
)
def test_an_invalid_mixture(two: Path, folio: Callable[..., Outcome], mixture: str, words: str) -> None:
    """One line names the wrong part."""
    (two / "story.txt").write_text("Some bytes.\n" * 50)
    if "bytes" in mixture:
        assert folio("prepare", "story.txt", "--tokenizer=bytes", "--data_dir=elsewhere/bytes").code == 0
    outcome = folio("train", *SMALL, f"--data_mixture={mixture}", "--vocab_size=9000000")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1), outcome
    assert words in outcome.err
    assert not Path("out").exists()


def test_a_run_on_a_mixture_resumes_exactly(folio: Callable[..., Outcome], tmp_path: Path) -> None:
    """Three steps and three more are six steps, to the bit, on exactly the rows of the mixture."""
    random = np.random.default_rng(2)
    for name, low in (("a", 0), ("b", 32)):
        (tmp_path / name).mkdir()
        for file in ("train_1", "train_2", "val_0"):
            np.save(tmp_path / name / file, random.integers(low, low + 32, 300, np.uint16))
    mixture = f"--data_mixture={tmp_path / 'a'}=0.8,{tmp_path / 'b'}=0.2"
    argv = [*SMALL, mixture, "--vocab_size=64", "--dropout=0.1", "--learning_rate=1e-2"]
    for out, *flags in (("six", "--max_iters=6"), ("three", "--max_iters=3")):
        assert folio("train", *argv, f"--out_dir={tmp_path / out}", *flags).code == 0
    resumed = folio("train", f"--out_dir={tmp_path / 'three'}", "--init_from=resume", "--max_iters=6")
    assert (resumed.code, resumed.err) == (0, "")
    assert f"resuming {tmp_path / 'three'} at step 3" in resumed.out
    assert "exact to rounding" not in resumed.out
    for name in ("model.safetensors", "optimizer.safetensors"):
        a, b = (run_folder.checkpoint_folder(tmp_path / out, 6) / name for out in ("six", "three"))
        assert a.read_bytes() == b.read_bytes()
