"""The attention kernel that is fastest on this machine: measured once, remembered, and kept by a resumed run."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import HOME
from run_results import Train, assert_same_bits, records, said
from torch import Tensor

from folio.config.options import System
from folio.machine import autotune
from folio.machine.choices import ATTENTION_BLOCK, Choices, resolve
from folio.model.attention import attend
from folio.model.config import GPTConfig

SHAPE = GPTConfig(block_size=80, vocab_size=65, n_layer=1, n_head=2, n_embd=16, bias=False)
CHOICES = resolve(System(device="cpu", dtype="float32", compile=False, matmul_precision="highest"))
RUN = ["--block_size=80", "--learning_rate=1e-2"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of an empty cache folder, for runs of which none is too small or too short."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(autotune, "LEAST_RUN", 0)
    monkeypatch.setattr(autotune, "LEAST", 0)
    return tmp_path / "cache" / "folio" / "autotune.json"


@pytest.fixture
def fastest(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Makes this block the result of every measurement; None: a measurement is an error."""

    def to(block: int | None) -> None:
        def measured(*args: Any) -> int:
            assert block is not None, "measured"
            return block

        monkeypatch.setattr(autotune, "_fastest", measured)

    return to


def tuned(choices: Choices = CHOICES, shape: GPTConfig = SHAPE) -> tuple[int, list[str]]:
    found, lines = autotune.tuned(choices, shape, 4, 80, 1.0)
    assert replace(found, attention_block=choices.attention_block) == choices
    return found.attention_block, lines


def remember(path: Path, value: Any) -> None:
    """Replaces the value of each entry."""
    path.write_text(json.dumps(dict.fromkeys(json.loads(path.read_text()), value)))


def test_a_measured_kernel_is_remembered(cache: Path, fastest: Callable[[int | None], None]) -> None:
    before = torch.get_rng_state(), torch.get_float32_matmul_precision()
    block, lines = tuned()
    assert block in (0, 64, ATTENTION_BLOCK)
    assert len(lines) == 1
    assert str(cache) in lines[0]
    assert (block, list(json.loads(cache.read_text()).values())) == (block, [block])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.get_float32_matmul_precision() == before[1]
    fastest(None)
    assert tuned() == (block, [])
    remember(cache, 64)
    assert tuned() == (64, [])


def test_what_is_measured_is_told_apart(cache: Path, fastest: Callable[[int | None], None]) -> None:
    """By arithmetic, threads, version and shape."""
    fastest(64)
    others = [replace(CHOICES, dtype="bfloat16"), replace(CHOICES, threads=99), replace(CHOICES, torch="9.9")]
    for choices in (CHOICES, *others):
        tuned(choices)
    tuned(shape=replace(SHAPE, n_head=4))
    assert len(json.loads(cache.read_text())) == 5


@pytest.mark.parametrize(("slow", "block"), [({0: 20, 64: 5, 128: 20}, 64), ({0: 5, 64: 20, 128: 20}, 0), ({}, 128)])
def test_only_a_kernel_that_is_surely_faster_replaces_the_default(
    monkeypatch: pytest.MonkeyPatch, slow: dict[int, int], block: int
) -> None:
    """With kernels that sleep for so many milliseconds, by default 10."""

    def kernel(block: int) -> Callable[..., Tensor]:
        def attention(*args: Any) -> Tensor:
            time.sleep(slow.get(block, 10) / 1000)
            return attend(*args)

        return attention

    monkeypatch.setattr(autotune, "BlockedAttention", kernel)
    monkeypatch.setattr(autotune, "attend", kernel(0))
    monkeypatch.setattr(autotune, "ROUNDS", range(3, 6))
    assert autotune._fastest(CHOICES, SHAPE, 4, 80, [128, 0, 64]) == block


def test_a_machine_too_slow_for_three_rounds_keeps_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "SECONDS", 0.0)
    assert autotune._fastest(CHOICES, SHAPE, 4, 80, [128, 0, 64]) == 128


@pytest.mark.parametrize("content", [b"", b'{"a":', b"[64]", b"\xff", b"[" * 9999, b"7" * (1 << 21), b'{"other": 1}'])
def test_a_damaged_or_foreign_file_is_replaced(
    cache: Path, fastest: Callable[[int | None], None], content: bytes
) -> None:
    """With one line, beside that about the measurement; what else a JSON object has is kept."""
    cache.parent.mkdir(parents=True)
    cache.write_bytes(content)
    fastest(64)
    block, lines = tuned()
    kept = content.startswith(b'{"other')
    assert (block, len(lines)) == (64, 2 - kept)
    assert str(cache) in lines[0]
    assert "\n" not in lines[0]
    assert list(json.loads(cache.read_text()).values()) == [1] * kept + [64]
    fastest(None)
    assert tuned() == (64, [])


@pytest.mark.parametrize("value", ["64", 64.0, False, 63, None, [64]])
def test_an_entry_that_is_no_kernel_is_measured_again(
    cache: Path, fastest: Callable[[int | None], None], value: Any
) -> None:
    fastest(0)
    tuned()
    remember(cache, value)
    assert tuned()[0] == 0
    assert list(json.loads(cache.read_text()).values()) == [0]


def test_what_cannot_be_remembered_is_not_used(cache: Path, fastest: Callable[[int | None], None]) -> None:
    """Else the next run would measure again, and might end in other bits."""
    cache.parent.parent.mkdir()
    cache.parent.write_text("a file where the folder should be")
    fastest(64)
    block, lines = tuned()
    assert (block, len(lines)) == (ATTENTION_BLOCK, 1)
    assert f"{cache} could not be written" in lines[0]


def test_the_first_of_two_runs_decides(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one measured at the same time."""

    def measured(*args: Any) -> int:
        monkeypatch.setattr(autotune, "_fastest", lambda *args: 64)
        tuned()
        return 0

    monkeypatch.setattr(autotune, "_fastest", measured)
    assert tuned()[0] == 64


@pytest.mark.parametrize(
    ("choices", "shape"),
    [
        (resolve(System(device="cpu", dtype="float32", compile=True)), SHAPE),
        (replace(CHOICES, deterministic=True), SHAPE),
        (replace(CHOICES, world=2), SHAPE),
        (CHOICES, replace(SHAPE, dropout=0.1)),
    ],
    ids=["compiled", "deterministic", "two processes", "dropout"],
)
def test_runs_that_are_not_measured(
    cache: Path, fastest: Callable[[int | None], None], choices: Choices, shape: GPTConfig
) -> None:
    fastest(None)
    assert tuned(choices, shape) == (choices.attention_block, [])
    assert not cache.exists()


@pytest.mark.parametrize("least", ["LEAST_RUN", "LEAST"])
def test_a_run_for_which_it_does_not_pay(
    cache: Path, fastest: Callable[[int | None], None], monkeypatch: pytest.MonkeyPatch, least: str
) -> None:
    """Too short, or with too small a layer: it does not even look, since the file may change between two such runs."""
    fastest(64)
    tuned()
    monkeypatch.setattr(autotune, least, 1e8)
    assert tuned() == (ATTENTION_BLOCK, [])


def test_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert autotune.cache_file() == HOME / ".cache" / "folio" / "autotune.json"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert autotune.cache_file() == HOME / ".cache" / "folio" / "autotune.json"


def test_without_a_home_folder_nothing_is_measured(
    cache: Path, fastest: Callable[[int | None], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fastest(None)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", str)
    assert tuned() == (ATTENTION_BLOCK, [])


# In training


def test_training_takes_the_remembered_kernel(cache: Path, fastest: Callable[[int | None], None], train: Train) -> None:
    """And differs from the built-in one by rounding only, which is what --autotune=False computes with."""
    fastest(64)
    first = train("first", *RUN)
    assert [line for line in said(first) if str(cache) in line]
    fastest(None)
    again, plain = train("again", *RUN), train("plain", *RUN, "--autotune=False")
    assert not [line for line in said(again) + said(plain) if str(cache) in line]
    assert_same_bits(first, again)
    assert records(again, "start", "attention_block") == [64]
    assert records(plain, "start", "attention_block") == [ATTENTION_BLOCK]
    losses = [torch.tensor(records(out, "train", "loss")) for out in (again, plain)]
    torch.testing.assert_close(*losses, rtol=0, atol=1e-4)


@pytest.mark.parametrize("flag", ["--autotune=False", "--deterministic=True", "--document_mask=True", "--eval_only"])
def test_options_that_measure_nothing(
    cache: Path, fastest: Callable[[int | None], None], train: Train, flag: str
) -> None:
    fastest(None)
    train("out", *RUN, "--max_iters=1", "--eot=0", flag)
    assert not cache.exists()


def test_a_resumed_run_keeps_its_kernel(cache: Path, fastest: Callable[[int | None], None], train: Train) -> None:
    fastest(64)
    whole, cut = train("whole", *RUN), train("cut", *RUN, "--max_iters=5")
    remember(cache, 0)
    fastest(None)
    train("cut", *RUN, "--init_from=resume")
    assert records(cut, "start", "attention_block") == [64, 64]
    assert not [line for line in said(cut) if "rounding" in line]
    assert_same_bits(cut, whole)
