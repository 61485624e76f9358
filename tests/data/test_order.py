"""From token files to the rows of a step: their order, and how ranks share them."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from conftest import LINUX

from folio.config.options import Data
from folio.data.folders import open_folder
from folio.data.rows import Tokens
from folio.data.shards import Rows, rows_per_epoch
from folio.data.tokenizers import Bytes
from folio.preparation import recipes
from folio.preparation.job import prepare
from folio.training.batches import micro_batches

Sampling = Literal["epoch", "random", "sequential"]


@pytest.fixture
def count_up(tmp_path: Path) -> Any:
    """Makes Tokens over a split whose tokens are their own positions."""

    def make(n: int, block_size: int, **options: Any) -> Tokens:
        for split in ("train", "val"):
            np.arange(n, dtype=np.uint16).tofile(tmp_path / f"{split}.bin")
        return Tokens([open_folder(tmp_path)], block_size, **options)

    return make


def assert_consecutive(rows: Rows, block_size: int) -> None:
    """Each row is a window of the file: block_size + 1 tokens in a row."""
    assert rows.dtype == np.int64
    assert np.array_equal(rows, rows[:, :1] + np.arange(block_size + 1))


# The order of the rows


@pytest.mark.parametrize(("n", "T"), [(9, 8), (10, 8), (16, 8), (17, 8), (24, 8), (25, 8), (1000, 8), (997, 7), (2, 1)])
def test_an_epoch_visits_each_window_once(count_up: Any, n: int, T: int) -> None:
    """The windows of an epoch are adjacent and inside the split, each once; every epoch has another order."""
    data, per_epoch = count_up(n, T), rows_per_epoch(n, T)
    assert per_epoch >= max(1, (n - 1) // T - 1)
    orders = []
    for epoch in range(12):
        rows = data.rows("train", epoch * per_epoch, per_epoch)
        assert_consecutive(rows, T)
        starts = np.sort(rows[:, 0])
        assert np.array_equal(starts, starts[0] + np.arange(per_epoch) * T)
        orders.append(tuple(rows[:, 0]))
    if n > 2 * T:
        assert len({min(order) for order in orders}) > 1 or T == 1  # every epoch has another offset
    if per_epoch > 20:
        assert len(set(orders)) == 12
        assert all(list(order) != sorted(order) for order in orders)


@pytest.mark.parametrize("sampling", ["epoch", "random", "sequential"])
def test_rows_are_a_pure_function(count_up: Any, sampling: Sampling) -> None:
    """Rows do not depend on how a range is divided or what was read before."""
    data = count_up(203, 8, sampling=sampling, batch_size=3)
    whole = data.rows("train", 0, 100)
    assert_consecutive(whole, 8)
    for size in (1, 7, 33):
        parts = [data.rows("train", first, min(size, 100 - first)) for first in range(0, 100, size)]
        assert np.array_equal(np.concatenate(parts), whole)
    again = count_up(203, 8, sampling=sampling, batch_size=3)
    assert np.array_equal(again.rows("train", 60, 40), whole[60:])
    assert np.array_equal(data.rows("train", 10**15, 2)[1:], data.rows("train", 10**15 + 1, 1))


@pytest.mark.parametrize("sampling", ["epoch", "random"])
def test_the_order_depends_on_the_seed_and_the_split(count_up: Any, sampling: Sampling) -> None:
    """Another seed or another split gives another order."""
    rows = [count_up(999, 8, sampling=sampling, seed=seed).rows("train", 0, 50) for seed in (1, 2)]
    rows.append(count_up(999, 8, sampling=sampling, seed=1).rows("val", 0, 50))
    assert len({r.tobytes() for r in rows}) == 3


def test_the_order_is_pinned(count_up: Any) -> None:
    """A checkpoint of an older version resumes with the same rows: these values never change."""
    assert count_up(100, 8).rows("train", 9, 5)[:, 0].tolist() == [10, 42, 24, 80, 32]
    assert count_up(100, 8, sampling="random").rows("train", 9, 5)[:, 0].tolist() == [50, 60, 86, 77, 2]


def test_random_windows_reach_both_ends(count_up: Any) -> None:
    """Every possible start, with replacement, about equally often."""
    starts = Counter(count_up(20, 8, sampling="random").rows("train", 0, 12_000)[:, 0].tolist())
    assert set(starts) == set(range(12))
    assert all(abs(count - 1000) < 150 for count in starts.values())


@pytest.mark.parametrize(("n", "T", "B"), [(203, 8, 3), (193, 8, 3), (192, 8, 3), (25, 8, 3), (300, 7, 1), (300, 1, 4)])
def test_sequential_is_build_nanogpts_order(count_up: Any, n: int, T: int, B: int) -> None:
    """Batches of its loader on one rank, from the beginning again when the next does not fit."""
    data, position, expected = count_up(n, T, sampling="sequential", batch_size=B), 0, []
    for _ in range(40):
        expected.append(np.arange(position, position + B * T).reshape(B, T))
        position += B * T
        if position + B * T + 1 > n:
            position = 0
    assert np.array_equal(data.rows("train", 0, 40 * B)[:, :-1], np.concatenate(expected))


def test_sequential_with_less_than_a_batch(count_up: Any) -> None:
    """The existing windows repeat."""
    rows = count_up(20, 8, sampling="sequential", batch_size=5).rows("train", 0, 5)
    assert rows[:, 0].tolist() == [0, 8, 0, 8, 0]


# Windows for the evaluation


@pytest.mark.parametrize("n", [9, 10, 16, 17, 18, 100])
def test_all_windows_cover_every_target_once(count_up: Any, n: int) -> None:
    """With count 0 each token but the first is a target once; the tail is filled with −1."""
    data = count_up(n, 8)
    windows = data.windows("val", data.spread("val", 0))
    targets = windows[:, 1:]
    assert targets[targets >= 0].tolist() == list(range(1, n))
    assert (windows[:-1] >= 0).all()
    tail = windows[-1].tolist()
    assert sorted(tail, key=lambda t: t < 0) == tail  # padding comes last
    assert tail.count(-1) == len(windows) * 8 + 1 - n
    assert np.array_equal(data.spread("val", len(windows) + 5), data.spread("val", 0))


@pytest.mark.parametrize("count", [1, 2, 5, 12])
def test_few_windows_are_spread_evenly(count_up: Any, count: int) -> None:
    """From the first token to the last, whole, at equal distances."""
    data = count_up(105, 8)
    starts = data.spread("val", count)
    assert len(starts) == count
    assert_consecutive(data.windows("val", starts), 8)
    assert starts[0] == 0
    assert count == 1 or (starts[-1] == 96 and np.ptp(np.diff(starts)) <= 1)


def test_ids_outside_the_vocabulary_are_refused(count_up: Any) -> None:
    """By file and id, when a batch holds one."""
    data = count_up(50, 8)
    data = replace(data, vocab_size=50)
    data.rows("train", 0, 5)
    data = replace(data, vocab_size=49)
    data.windows("train", np.array([0]))
    with pytest.raises(ValueError, match=r"train\.bin: token id 49 is outside the vocabulary of 49: set --vocab_size"):
        data.windows("train", data.spread("train", 0))


# Files


def test_shakespeare_by_characters(shared_data: Path, tmp_path: Path) -> None:
    """The files of nanoGPT's recipe, byte by byte, and its 65 characters."""
    source = shared_data / "tinyshakespeare.txt"
    prepare(recipes.known("shakespeare_char", tmp_path, str(source), {}), tmp_path)
    text = source.read_text(encoding="utf-8")
    characters = sorted(set(text))
    ids = np.array([characters.index(c) for c in text], dtype=np.uint16)
    cut = int(len(ids) * 0.9)
    assert (tmp_path / "train.bin").read_bytes() == ids[:cut].tobytes()
    assert (tmp_path / "val.bin").read_bytes() == ids[cut:].tobytes()
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["vocab_size"] == len(characters) == 65
    assert meta["tokenizer"] == {"kind": "characters", "characters": "".join(characters)}
    assert {s: v["tokens"] for s, v in meta["splits"].items()} == {"train": 1_003_854, "val": 111_540}
    assert hashlib.sha256(text.encode()).hexdigest() == recipes.SHAKESPEARE_SHA256
    assert sorted(p.name for p in tmp_path.iterdir()) == ["meta.json", "train.bin", "val.bin"]


def test_the_standard_library(tmp_path: Path) -> None:
    """More than 5 MB of this Python's sources, every tenth file for validation, decoding to their text."""
    prepare(recipes.known("stdlib", tmp_path, "", {}), tmp_path)
    train, val = ((tmp_path / f"{split}.bin").read_bytes() for split in ("train", "val"))
    assert len(train) + len(val) > 2 * 5e6
    assert json.loads((tmp_path / "meta.json").read_text())["dtype"] == "uint16"
    train_text, val_text = (bytes(np.frombuffer(b, np.uint16).astype(np.uint8)).decode() for b in (train, val))
    for module in (json, hashlib):
        source = Path(module.__file__ or "").read_text(encoding="utf-8")
        assert (source in train_text) != (source in val_text)


def test_sources_of_a_given_folder(tmp_path: Path) -> None:
    """Order, split and what is left out, on files that are known."""
    source = tmp_path / "lib"
    for i in range(20):
        (source / f"p{i % 2}").mkdir(parents=True, exist_ok=True)
        (source / f"p{i % 2}" / f"m{i:02}.py").write_text(f"# é {i}\n", encoding="utf-8")
    for name in ("site-packages", "test"):
        (source / name).mkdir()
        (source / name / "no.py").write_text("no\n")
    (source / "latin.py").write_bytes(b"# \xe9\n")
    prepare(recipes.known("stdlib", tmp_path / "out", str(source), {}), tmp_path / "out")
    order = [*range(0, 20, 2), *range(1, 20, 2)]
    for split, numbers in (("train", order[:9] + order[10:19]), ("val", [order[9], order[19]])):
        ids = np.fromfile(tmp_path / "out" / f"{split}.bin", np.uint16)
        assert Bytes().bytes(ids.tolist()).decode() == "".join(f"# é {i}\n" for i in numbers)


# The rows of a step, shared out over ranks


def covered(data: Data, world: int) -> list[int]:
    """All rows of a step that the ranks read."""
    shares = [micro_batches(data, rank, world) for rank in range(world)]
    return sorted(row for share in shares for first, size, _ in share for row in range(first, first + size))


@pytest.mark.parametrize(
    ("steps", "size", "world"),
    [(8, 3, 1), (8, 3, 2), (8, 3, 4), (8, 3, 8), (40, 12, 16), (1, 4, 2), (1, 4, 4), (2, 3, 3), (5, 8, 4), (3, 2, 6)],
)
def test_ranks_share_the_rows_of_a_step(steps: int, size: int, world: int) -> None:
    """Each row belongs to one rank, ranks have equally many, and a micro batch has at most batch_size."""
    data = Data(gradient_accumulation_steps=steps, batch_size=size)
    assert covered(data, world) == list(range(steps * size))
    shares = [micro_batches(data, rank, world) for rank in range(world)]
    assert len({sum(n for _, n, _ in share) for share in shares}) == 1
    assert all(0 < n <= size for share in shares for _, n, _ in share)
    keys = [m for share in shares for _, _, m in share]
    assert len(set(keys)) == len(keys)  # no two micro batches share a dropout mask


@pytest.mark.parametrize("world", [1, 2, 4])
def test_micro_steps_are_those_of_one_process(world: int) -> None:
    """If the world divides the accumulation, rank r's micro step m is m · world + r of one process."""
    data = Data(gradient_accumulation_steps=8, batch_size=3)
    (one,) = (micro_batches(data, 0, 1),)
    assert one == [(3 * m, 3, m) for m in range(8)]
    for rank in range(world):
        assert micro_batches(data, rank, world) == one[rank::world]


def test_forty_micro_steps_on_sixteen_ranks() -> None:
    """16 does not divide nanoGPT's 40 micro steps: 30 rows per rank, in micro batches of 12, 12 and 6."""
    data = Data(gradient_accumulation_steps=40, batch_size=12)
    assert [size for _, size, _ in micro_batches(data, 5, 16)] == [12, 12, 6]
    assert [first for first, _, _ in micro_batches(data, 5, 16)] == [150, 162, 174]


def test_one_micro_step_on_two_ranks() -> None:
    """Each rank reads half of the batch."""
    data = Data(gradient_accumulation_steps=1, batch_size=64)
    assert [micro_batches(data, rank, 2) for rank in (0, 1)] == [[(0, 32, 0)], [(32, 32, 1)]]


@pytest.mark.parametrize(
    ("steps", "size", "world", "message"),
    [
        (5, 2, 3, "5 × 2 = 10 rows cannot be shared by 3 processes: 2 processes or 9 rows would fit"),
        (1, 1, 2, "1 × 1 = 1 row cannot be shared by 2 processes: 1 process or 2 rows would fit"),
        (40, 12, 7, "40 × 12 = 480 rows cannot be shared by 7 processes: 6 processes or 483 rows would fit"),
    ],
)
def test_rows_that_cannot_be_shared(steps: int, size: int, world: int, message: str) -> None:
    """The error names the nearest world and the nearest number of rows that fit."""
    with pytest.raises(ValueError, match=message):
        micro_batches(Data(gradient_accumulation_steps=steps, batch_size=size), 0, world)


# Many files


@pytest.fixture(params=[0, 200])
def few_files(request: pytest.FixtureRequest) -> Iterator[int]:
    """A limit of some twenty files more than this process has open, be those few or many."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ExitStack() as others:
        for _ in range(request.param):
            others.enter_context(open(os.devnull))
        limit = (
            len(os.listdir("/proc/self/fd")) + 20
        )  # the system gives the lowest free numbers, which must be below the limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
        yield limit
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@LINUX
@pytest.mark.parametrize("sampling", ["epoch", "random", "sequential"])
def test_more_shards_than_the_process_may_open(tmp_path: Path, few_files: int, sampling: Sampling) -> None:
    """Rows of all shards are right, in any order and repeatedly."""
    for i in range(200):
        np.save(tmp_path / f"{'train' if i else 'val'}_{i:06d}.npy", np.arange(100 * i, 100 * i + 99, dtype=np.uint16))
    found = Tokens.open(Data(data_dir=str(tmp_path), sampling=sampling), 8, 1337)
    found = replace(found, vocab_size=20_000)
    rows = [found.rows("train", first, 500) for first in (0, 500, 0)]
    assert np.array_equal(rows[0], rows[2])
    assert len(np.unique(np.concatenate(rows) // 100)) > (50 if sampling == "sequential" else 190)
    assert_consecutive(np.concatenate(rows), 8)
    everything = found.windows("train", found.spread("train", 0))
    assert len(np.unique(everything[everything >= 0])) == 199 * 99
    assert len(found.fingerprint()["train"]) == 32
    assert len(os.listdir("/proc/self/fd")) < few_files
