"""What a run says about its length, and advice where its size or its schedule does not fit."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL, Outcome
from run_results import Train, said

from folio.config.options import TrainConfig
from folio.config.values import COMMAND_LINE
from folio.data.rows import Tokens
from folio.machine.choices import resolve
from folio.machine.runtime import Runtime
from folio.model.gpt import GPT
from folio.training import forecast
from folio.training.forecast import advise_on_size, rounded_duration
from folio.training.schedule import learning_rate, unreached

Folio = Callable[..., Outcome]


def left(out: Path) -> list[str]:
    return [line for line in said(out) if re.search(r" left$", line)]


def test_a_run_begins_with_its_steps_and_says_once_how_long_it_takes(train: Train, story: Path) -> None:
    """After ten steps of a process, if twenty more remain; a resumed one says it again, of the steps that remain."""
    out, count = train("out", "--max_iters=32"), Tokens.open(replace(TrainConfig().data, data_dir=str(story)), 16, 1)
    tokens = 32 * 128
    lines = said(out)
    line = f"32 steps, {tokens:,} tokens: {tokens / count.length('train'):.2g} epochs of {story.name}"
    assert lines.index(line) < next(i for i, text in enumerate(lines) if text.startswith("step 0: "))
    assert len(left(out)) == 1
    assert re.fullmatch(r"about \d+ seconds? left", left(out)[0])
    assert lines[lines.index(left(out)[0]) - 1].startswith("iter 9: ")
    train("out", "--init_from=resume", "--max_iters=70")
    assert any(line.startswith("38 steps more, ") for line in said(out))
    assert len(left(out)) == 1
    train("out", "--init_from=resume", "--max_iters=80")
    assert left(out) == []


@pytest.mark.parametrize("flags", [["--eval_only=True"], ["--max_iters=29"], ["--max_iters=40", "--no-monitor"]])
def test_a_short_or_quiet_run_does_not_say_it(train: Train, flags: list[str]) -> None:
    assert left(train("out", *flags)) == []


def test_only_the_time_of_later_steps_and_of_evaluations_counts(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 100 s after first ones of 1,000 s; an evaluation over all tokens of both splits costs its forwards."""
    now = iter([1000.0 * n if n < 3 else 2000.0 + 100.0 * n for n in range(99)])
    monkeypatch.setattr(forecast, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    out = train("out", "--max_iters=110", "--eval_interval=1000", "--eval_iters=1")  # 8 rows of each split, once
    # 100 steps and the end's evaluation, of a step's tokens twice
    assert left(out) == [f"about {rounded_duration(100 * (100 + 2 / 3 / 2))} left"] == ["about 3 hours left"]


@pytest.mark.parametrize(("interval", "each"), [(1, 300), (2, 100)])
def test_no_evaluation_counts_twice(train: Train, monkeypatch: pytest.MonkeyPatch, interval: int, each: float) -> None:
    """Steps of 100 s, and evaluations of 200 s: in the time of every step, or in none that counts."""
    now = itertools.accumulate(itertools.cycle([100.0] * (interval - 1) + [300.0]))
    monkeypatch.setattr(forecast, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    out = train("out", "--max_iters=110", f"--eval_interval={interval}", "--eval_iters=1")
    evaluations = 0 if interval == 1 else 51 * 2 / 3 / 2
    assert left(out) == [f"about {rounded_duration(each * (100 + evaluations))} left"]


def test_a_mixture_has_epochs_of_each_data_set(train: Train, story: Path) -> None:
    out = train("out", f"--data_mixture={story}=0.75,{story.resolve()}/=0.25", "--data_dir=", "--max_iters=2")
    assert any(re.fullmatch(r"2 steps, 256 tokens: \S+ epochs of \w+, \S+ epochs of \w+", line) for line in said(out))


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "1 second"),
        (12.4, "12 seconds"),
        (44.0, "40 seconds"),
        (58.0, "1 minute"),
        (240.0, "4 minutes"),
        (3000.0, "50 minutes"),
        (7200.0, "2 hours"),
        (2e5, "2 days"),
        (5e9, "158 years"),
    ],
)
def test_durations_in_words(seconds: float, words: str) -> None:
    assert rounded_duration(seconds) == words


# Size


@pytest.fixture
def advice(story: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """The advice for a run with these options on a device of this kind and peak."""
    runtime = Runtime(resolve(replace(TrainConfig().system, device="cpu", dtype="float32")))
    tokens = Tokens.open(replace(TrainConfig().data, data_dir=str(story)), 1024, 1)
    with torch.device("meta"):
        model = GPT(replace(TrainConfig().model, vocab_size=50304))

    def advise(
        device: str, peak: float | None, count: int = 10**9, config: TrainConfig | None = None, by: str = COMMAND_LINE
    ) -> list[str]:
        monkeypatch.setattr(forecast, "peak", lambda *_: peak)
        monkeypatch.setattr(Tokens, "length", lambda *_: count)
        monkeypatch.setattr(runtime, "device", torch.device(device))
        config = replace(config or TrainConfig(), sources={"dataset": by})
        config = replace(config, data=replace(config.data, dataset="my text"))
        return advise_on_size(config, model, tokens, runtime)

    yield advise
    runtime.close()


@pytest.mark.parametrize(
    ("device", "peak", "count", "words"),
    [
        ("cpu", 4e11, 10**9, "about 50 years on this machine"),
        ("cpu", None, 10**9, "more than a day on this machine"),
        ("mps", None, 10**9, "more than a day on this machine"),
        ("cuda", 1e15, 10**9, "about 7 days on this machine"),
        ("cuda", 1e15, 10**6, "folio train medium '--dataset=my text'"),
        ("cuda", 1e13, 10**9, "folio train medium '--dataset=my text'"),
    ],
)
def test_a_size_that_no_option_names(
    advice: Callable[..., list[str]], device: str, peak: float | None, count: int, words: str
) -> None:
    (line,) = advice(device, peak, count)
    assert words in line
    preset = {"cpu": "small", "mps": "medium", "cuda": "gpt2" if (peak, count) == (1e15, 10**9) else "medium"}[device]
    assert line.endswith(f"folio train {preset} '--dataset=my text'")


def test_no_advice_where_a_size_is_named_or_fits(advice: Callable[..., list[str]]) -> None:
    usual = TrainConfig()
    assert advice("cpu", 4e11, by="own.py") == []
    assert advice("cuda", None) == []
    assert advice("cuda", 1e16) == []
    few = replace(usual, optimizer=replace(usual.optimizer, max_iters=2))
    assert advice("cpu", None, config=few) == advice("mps", None, config=few) == []
    for config in (
        replace(usual, model=replace(usual.model, n_layer=2)),
        replace(usual, optimizer=replace(usual.optimizer, max_minutes=5.0)),
        replace(usual, optimizer=replace(usual.optimizer, max_iters=1)),
    ):
        assert advice("cpu", 4e11, config=config) == []


# Schedule


def unreached_by(sources: str, **options: float) -> list[str]:
    config = replace(TrainConfig().optimizer, **options)
    return unreached(config, dict.fromkeys(sources.split(), COMMAND_LINE))


def test_a_schedule_that_outlasts_the_run() -> None:
    (line,) = unreached_by("max_iters", max_iters=500)
    assert line.startswith("the learning rate rises to only 0.00015 of 0.0006: its warm-up has 2,000 steps.")
    assert line.endswith("set --warmup_iters=10 --lr_decay_iters=500")
    (line,) = unreached_by("max_iters warmup_iters", max_iters=50_000, warmup_iters=300)
    assert line.startswith("the learning rate ends at 0.00059, not 6e-05: its decay has 600,000 steps")
    assert line.endswith("set --warmup_iters=300 --lr_decay_iters=50000")
    fitting = replace(TrainConfig().optimizer, max_iters=500, warmup_iters=10, lr_decay_iters=500)
    assert max(learning_rate(step, fitting) for step in range(500)) == fitting.learning_rate
    assert learning_rate(500, fitting) == fitting.min_lr


@pytest.mark.parametrize(
    ("sources", "options"),
    [
        ("", {}),
        ("max_iters warmup_iters lr_decay_iters", {"max_iters": 500}),
        ("max_iters", {"max_iters": 500, "decay_lr": False}),
        ("max_iters", {"max_iters": 500, "restart_interval": 50}),
        ("max_iters warmup_iters", {"max_iters": 600_000, "warmup_iters": 5}),
    ],
)
def test_nothing_is_said_of_a_schedule_that_fits_or_was_meant(sources: str, options: dict[str, float]) -> None:
    assert unreached_by(sources, **options) == []


def test_a_run_says_it_once(folio: Folio, story: Path, tmp_path: Path) -> None:
    """Not one that resumes with more steps."""
    flags = [flag for flag in SMALL if not flag.startswith(("--max_iters", "--warmup", "--lr_decay"))]
    argv = ["train", *flags, f"--data_dir={story}", f"--out_dir={tmp_path / 'out'}"]
    assert "its warm-up has 2,000" in folio(*argv, "--max_iters=3").out
    assert "warm-up" not in folio(*argv, "--max_iters=4", "--init_from=resume").out
