"""--depth: its rules, what wins over them, and what a run keeps."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, STORY, Outcome, assert_refused

from folio import api, cli
from folio.commands import bench, plan
from folio.config.compose import with_depth
from folio.config.depth import PASSES, RECIPE, rules
from folio.config.options import TrainConfig
from folio.config.table import flat, table
from folio.machine.flops import flops_per_token
from folio.model.config import GPTConfig
from folio.model.gpt import GPT
from folio.records import run_folder

SHAPE = {name: RECIPE[name] for name in ("position", "norm", "activation", "tie_weights", "bias")}
TINY = [
    "--device=cpu",
    "--compile=False",
    "--block_size=16",
    "--n_embd=8",
    "--n_head=1",
    "--batch_size=4",
    "--max_iters=6",
    "--eval_iters=2",
]


def parse(*argv: str, options: type = TrainConfig) -> dict[str, Any]:
    return flat(cli.parse(options, list(argv), "folio", files=True))


def values(depth: int, vocab_size: int = 32768, tokens: int | None = None, **given: Any) -> dict[str, Any]:
    """The values of all options that depth sets, with those that are given."""
    return {name: rule.value for name, rule in rules(depth, given, 1024, vocab_size, tokens).items()} | given


def in_step(found: dict[str, Any]) -> int:
    return found.get("total_batch_size") or found["batch_size"] * found["gradient_accumulation_steps"] * 1024


def test_depth_12_is_gpt2s_shape_and_nanochats_step() -> None:
    """2**19 tokens a step, about 12 tokens for each of the 85 M + 25 M parameters of blocks and head; 40 of warm-up.

    Muon's update of a square matrix has the spectral norm 0.2 · √768 · learning_rate: nanochat's rate is 0.02.
    """
    found = values(12)
    assert {name: found[name] for name in ("n_layer", "n_head", "n_embd")} == {
        "n_layer": 12,
        "n_head": 12,
        "n_embd": 768,
    }
    assert in_step(found) == 2**19
    assert found["max_iters"] == found["lr_decay_iters"] == round(12 * (12 * 12 * 768**2 + 32768 * 768) / 2**19)
    assert found["warmup_iters"] in range(35, 41)
    assert 0.2 * 768**0.5 * found["learning_rate"] == pytest.approx(0.02, rel=0.25)


@pytest.mark.parametrize("vocab_size", [65, 257, 50304])
def test_a_larger_depth_is_more_of_everything_and_slower(vocab_size: int) -> None:
    """More layers, width, tokens and tokens of a step; never a higher rate, until steps are of 2**19 tokens."""
    series = [values(depth, vocab_size) for depth in range(1, 13)]
    for small, large in pairwise(series):
        assert all(small[name] < large[name] for name in ("n_layer", "n_embd", "n_head"))
        assert in_step(small) <= in_step(large)
        assert small["max_iters"] * in_step(small) < large["max_iters"] * in_step(large)
        assert small["learning_rate"] > large["learning_rate"] > 0
        assert small["adam_learning_rate"] > large["adam_learning_rate"] > 0
    for found in series:
        assert 16 <= found["max_iters"] < 10_000
        assert found["eval_interval"] * 10 >= found["max_iters"]


def test_a_small_data_set_ends_the_run_after_some_passes() -> None:
    found = values(4, 65, tokens=1_000_000)
    assert found["max_iters"] * in_step(found) == pytest.approx(PASSES * 1_000_000, rel=0.01)
    assert values(1, 65, tokens=1_000_000) == values(1, 65)


@pytest.mark.parametrize("vocab_size", [256, 50304])
def test_a_limit_of_operations_ends_the_run(vocab_size: int) -> None:
    """The steps need at most as many as ``flops_per_token`` counts; a limit above the usual need changes nothing."""
    found = values(3, vocab_size, max_flops=5e12)
    shape = GPTConfig(1024, vocab_size, **{n: found[n] for n in ("n_layer", "n_head", "n_embd")}, **SHAPE)
    with torch.device("meta"):
        needed = flops_per_token(GPT(shape)) * in_step(found) * found["max_iters"]
    assert 0.9 * 5e12 < needed <= 1.01 * 5e12
    assert found["lr_decay_iters"] == found["max_iters"]
    assert values(3, vocab_size, max_flops=1e20) == values(3, vocab_size) | {"max_flops": 1e20}
    assert values(3, vocab_size, max_flops=0) == values(3, vocab_size) | {"max_flops": 0}
    assert values(3, vocab_size, max_flops=5e12, max_iters=500)["lr_decay_iters"] == 500


def test_a_limit_below_one_step_is_refused(folio: Callable[..., Outcome], story: Path) -> None:
    argv = [f"--data_dir={story}", "--depth=1", "--block_size=16", "--max_flops=1000"]
    words = "max_flops=1000 is less than one step takes: "
    assert_refused(folio("plan", *argv), words, "for 16 tokens: raise --max_flops")
    assert_refused(folio("train", *argv, "--device=cpu"), words)
    assert_refused(folio("plan", *argv[:3], "--max_flops=1e9", "--total_batch_size=1048576"), "for 1,048,576 tokens")
    assert folio("plan", *argv, "--max_iters=2").code == 0


@pytest.mark.parametrize(
    ("steps", "tokens"), [(60, 60 * 512 // 16), (1000, 1000 * 512 // 16), (10**6, 2**16), (1, 512)]
)
def test_a_short_run_evaluates_on_few_tokens(steps: int, tokens: int) -> None:
    """A sixteenth of its training tokens in whole micro steps, at least one and at most 65,536 tokens."""
    found = rules(3, {"max_iters": steps, "total_batch_size": 512, "block_size": 256}, 256, 50304)
    micro_step = found["batch_size"].value * 256
    assert found["eval_iters"].value == max(1, tokens // micro_step)


def test_a_micro_step_has_few_logits() -> None:
    """Those of GPT-2's vocabulary fit a laptop's GPU."""
    assert values(12, 50304)["batch_size"] * 1024 * 50304 < 2**28
    assert values(12, 256)["batch_size"] * 1024 == 2**14


def test_the_table_of_the_document_is_that_of_the_rules() -> None:
    """Characters of Shakespeare with their data, GPT-2's vocabulary with enough data."""
    text = (ROOT / "docs" / "depth.md").read_text(encoding="utf-8").replace(",", "")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in re.findall(r"^\| \d+ \|.*", text, re.M)]
    assert len(rows) == 8
    for row in rows:
        ids, context, depth, parameters, tokens, *rest = map(float, row)
        limit = 1_003_854 if ids == 65 else None
        found = {n: rule.value for n, rule in rules(int(depth), {}, int(context), int(ids), limit).items()}
        assert parameters == 12 * found["n_layer"] * found["n_embd"] ** 2 + ids * found["n_embd"]
        assert tokens == found["batch_size"] * found["gradient_accumulation_steps"] * context
        assert rest == [found[n] for n in ("max_iters", "learning_rate", "adam_learning_rate", "weight_decay")]


def test_rules_follow_from_values_that_are_given() -> None:
    """A larger batch raises the rates by its square root and lowers the steps; more width lowers the rates."""
    usual, larger = values(6), values(6, total_batch_size=4 * in_step(values(6)))
    assert larger["learning_rate"] == pytest.approx(2 * usual["learning_rate"], rel=0.01)
    assert larger["max_iters"] == pytest.approx(usual["max_iters"] / 4, abs=1)
    assert values(6, n_embd=4 * 384)["learning_rate"] == pytest.approx(usual["learning_rate"] / 2, rel=0.01)
    assert values(6, batch_size=3)["gradient_accumulation_steps"] > usual["gradient_accumulation_steps"]
    assert values(6, max_iters=1000)["lr_decay_iters"] == 1000
    assert values(6, optimizer="adamw")["adam_learning_rate"] == "auto"
    assert values(4, learning_rate=1e-4)["adam_learning_rate"] == pytest.approx(1e-4 * 0.11 / 0.12, rel=0.01)
    assert values(4, n_embd=200)["n_head"] == 2
    assert values(4, total_batch_size=8192)["batch_size"] * 1024 == 8192
    few = values(2, max_iters=1)
    assert few["learning_rate"] * few["weight_decay"] == pytest.approx(0.02, rel=0.01)


def test_the_later_of_two_sizes_of_a_step_counts(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("depth = 3\ntotal_batch_size = 2**19\n", encoding="utf-8")
    large, small = parse(str(tmp_path / "own.py")), parse(str(tmp_path / "own.py"), "--gradient_accumulation_steps=1")
    assert small["learning_rate"] < large["learning_rate"]
    assert small["max_iters"] > large["max_iters"]


def test_the_recipe_and_the_rules_set_options_of_a_run() -> None:
    assert values(2).keys() <= table(TrainConfig).keys()
    found = parse("--depth=2", "--vocab_size=32768")
    assert {name: found[name] for name in values(2)} == values(2)
    assert found["depth"] == 2


def test_without_depth_nothing_changes() -> None:
    assert parse("--depth=0") == parse()
    assert parse("shakespeare_char", "--depth=4", "--depth=0") == parse("shakespeare_char")


def test_a_file_sizes_the_model_of_every_command(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("depth = 3\nblock_size = 64\n", encoding="utf-8")
    for options in (TrainConfig, plan.Options, bench.Options):
        found = parse(str(tmp_path / "own.py"), options=options)
        assert (found["n_layer"], found["n_embd"], found["optimizer"], found["position"]) == (3, 192, "muon", "rope")


def test_typed_values_win_wherever_they_stand() -> None:
    typed = ["--n_layer=3", "--learning_rate=0.5", "--position=learned", "--gradient_accumulation_steps=5"]
    for argv in (["--depth=2", *typed], [*typed, "--depth=2"]):
        found = parse(*argv)
        assert (found["n_layer"], found["learning_rate"], found["position"]) == (3, 0.5, "learned")
        assert found["gradient_accumulation_steps"] == 5
        assert found["n_embd"] == 128


def test_depth_wins_over_files_before_it_only(tmp_path: Path) -> None:
    """A preset's data, context and intervals stay; a file after depth, or with depth in it, wins over it."""
    found, preset = parse("shakespeare_char", "--depth=2"), parse("shakespeare_char")
    kept = ("dataset", "block_size", "out_dir", "log_interval", "always_save_checkpoint")
    assert [found[name] for name in kept] == [preset[name] for name in kept]
    assert (found["n_layer"], found["n_embd"], found["dropout"]) == (2, 128, 0.0)
    assert found["learning_rate"] == parse("--depth=2")["learning_rate"]
    assert parse("--depth=2", "shakespeare_char")["n_layer"] == preset["n_layer"]
    (tmp_path / "own.py").write_text("depth = 3\nn_layer = 5\ntotal_batch_size = 2048\n")
    own = str(tmp_path / "own.py")
    assert (parse(own)["n_layer"], parse(own)["n_embd"], parse(own)["total_batch_size"]) == (5, 192, 2048)
    found = parse(own, "--depth=2")
    assert (found["n_layer"], found["n_embd"], found["total_batch_size"]) == (2, 128, 0)


def test_a_config_object_keeps_its_values() -> None:
    config = TrainConfig(depth=2)
    assert flat(with_depth(config)[0])["n_embd"] == 128
    other = api._options(TrainConfig(), "train", {"depth": 2, "max_iters": 7}, config)
    assert (other.model.n_layer, other.optimizer.max_iters, other.optimizer.lr_decay_iters) == (2, 7, 7)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--depth=-1"], ["depth=-1", "at least 0"]),
        (["--depth=1000"], ["depth=1000", "at most 100"]),
        (["--depth=many"], ["--depth='many'", "int"]),
        (["--depth=4", "--init_from=gpt2"], ["depth=4", "init_from=gpt2", "--depth=0"]),
        (["--max_flops=1e15"], ["max_flops=1e+15 has no effect with depth=0", "--depth"]),
        (["--depth=4", "--max_flops=-1"], ["max_flops=-1", "at least 0"]),
        (["--depth=4", "--batch_size=0"], ["batch_size=0", "at least 1"]),
        (["--depth=4", "--n_head=3"], ["n_embd=256", "n_head=3", "choose n_head=2 or 4"]),
    ],
)
def test_what_does_not_go_with_it_is_refused(folio: Callable[..., Outcome], argv: list[str], words: list[str]) -> None:
    assert_refused(folio("train", *argv), *words)


def test_a_run_prints_its_values_and_keeps_them(folio: Callable[..., Outcome], story: Path, tmp_path: Path) -> None:
    """A resumed run has the same values, with depth or without it; another depth is refused."""
    out = tmp_path / "out"
    first = folio("train", *TINY, "--depth=2", f"--data_dir={story}", f"--out_dir={out}")
    assert first.code == 0, first.err
    assert "depth=2: n_layer=2, n_head=1, n_embd=8, learning_rate=0.06, max_iters=6; folio plan" in first.out
    kept = run_folder.read_config(out)[1]
    assert {name: kept[name] for name in RECIPE} == RECIPE
    assert (kept["depth"], kept["lr_decay_iters"], kept["vocab_size"]) == (2, 6, "auto")
    for dial in ([], ["--depth=2"]):
        more = folio("train", "--init_from=resume", "--max_iters=8", *dial, f"--out_dir={out}")
        assert more.code == 0, more.err
        assert "from the checkpoint, not" not in more.out
        assert run_folder.read_config(out)[1] == kept | {"max_iters": 8}
    assert_refused(
        folio("train", "--init_from=resume", "--depth=3", f"--out_dir={out}"),
        "--depth=3 does not fit the checkpoint, which has depth=2",
    )
    assert_refused(
        folio("train", "--init_from=resume", "--max_flops=1e9", f"--out_dir={out}"),
        "--max_flops=1e+09 does not fit the checkpoint, which has max_flops=0: set --max_iters",
    )


def test_the_data_decide_the_steps(folio: Callable[..., Outcome], story: Path) -> None:
    """folio plan shows them with memory and time: the passes over a small data set, for its vocabulary."""
    found = folio("plan", "--depth=3", f"--data_dir={story}", "--block_size=64", "--gpu=h100")
    assert found.code == 0, found.err
    train_tokens = json.loads((story / "meta.json").read_text())["splits"]["train"]["tokens"]
    assert f"{PASSES} passes over {train_tokens:,} tokens" in found.out
    assert "3 layers, 3 heads, width 192" in found.out
    assert "depth=3 sets the options below" in found.out
    assert "n_layer = 3" in found.out
    assert "block_size = " not in found.out  # it is typed
    assert all(word in found.out for word in ("total", "epochs", "time "))
    assert parse("--depth=3", options=plan.Options)["n_layer"] == 3


@pytest.mark.parametrize("name", ["small", "medium", "gpt2"])
def test_warm_up_and_decay_of_a_preset_follow_its_steps(name: str) -> None:
    usual, short = parse(name), parse(name, "--max_iters=640")
    assert usual["max_iters"] == usual["lr_decay_iters"]
    assert (short["lr_decay_iters"], short["warmup_iters"]) == (640, 10)
    assert {n: v for n, v in flat(TrainConfig()).items() if n in ("out_dir", "dataset", "device")} == {
        n: usual[n] for n in ("out_dir", "dataset", "device")
    }


def test_gpt2_is_openais_architecture_with_adamw() -> None:
    found = parse("gpt2")
    shape = GPTConfig(activation="gelu_tanh")
    assert {f.name: found[f.name] for f in fields(GPTConfig)} == asdict(shape) | {"vocab_size": "auto"}
    assert (found["optimizer"], found["learning_rate"], found["adam_learning_rate"]) == ("adamw", 6e-4, "auto")
    assert found["max_iters"] * in_step(found) == pytest.approx(12 * 123.6e6, rel=0.01)


def test_a_preset_fits_a_text_of_a_few_tokens(
    folio: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The context is lowered to a power of two that each split has; one that is typed is refused, as without depth."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.txt").write_text("To be, or not to be, that is the question.\n" * 4, encoding="utf-8")
    made = folio("prepare", "tiny.txt", "--tokenizer=bytes")
    assert made.out.splitlines()[-1].startswith("next: folio train small --dataset=tiny (")
    counts = {s: n["tokens"] for s, n in json.loads(Path("data/tiny/meta.json").read_text())["splits"].items()}
    context = 2 ** int(math.log2(min(counts.values()) - 1))
    again = ["--dataset=tiny", "--device=cpu", "--max_iters=2"]
    found = folio("train", "small", *again)
    assert found.code == 0, found.err
    assert f"block_size = {context}, not 256: a split of the data has only {min(counts.values())} tokens" in found.out
    assert run_folder.read_config(Path("out"))[1]["block_size"] == context
    assert f"context {context}, " in folio("plan", "small", *again, "--gpu=h100").out
    assert folio("sample", "--num_samples=1", "--max_new_tokens=5", "--device=cpu").code == 0
    assert_refused(folio("train", "small", *again, "--block_size=512"), "fewer than block_size + 1 = 513")


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (["story.txt"], "folio train small --dataset=story ("),
        (["story.txt", "--data_dir=my data"], "folio train small '--data_dir=my data' ("),
        (["shakespeare_char", "--source=story.txt"], "folio train shakespeare_char"),
        (["story.txt", "--name=shakespeare"], "folio train small --dataset=shakespeare ("),
    ],
)
def test_prepare_names_the_next_command(
    folio: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str], command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "story.txt").write_bytes(STORY.read_bytes())
    tokenizer = [] if argv[0] == "shakespeare_char" else ["--tokenizer=char"]
    assert folio("prepare", *argv, *tokenizer).out.splitlines()[-1].startswith(f"next: {command}")
