"""Folio as build-nanogpt: the same losses from the same shards, train.py without options, settings and log."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, Outcome, assert_refused, python, succeed, tree
from fineweb_shards import prepare_shards

from folio import rng
from folio.config.compose import accumulated
from folio.config.files import read_file
from folio.config.options import Data, TrainConfig
from folio.config.table import override
from folio.config.values import COMMAND_LINE
from folio.data.tokenizers import Tiktoken
from folio.model.config import GPTConfig
from folio.model.gpt import GPT
from folio.preparation.recipes import known
from folio.records import run_folder
from folio.records.metrics import read_metrics
from folio.training.batches import micro_batches
from folio.training.optimizers import adamw
from folio.training.schedule import learning_rate

Folio = Callable[..., Outcome]

PRESET = "train_gpt2_124m_fineweb"
UNMEASURED = "--hellaswag_interval=0 --sample_interval=0"
SHAPE = GPTConfig(block_size=32, vocab_size=50304, n_layer=2, n_head=2, n_embd=16, bias=True, activation="gelu_tanh")
SAME = (
    "--device=cpu --compile=False --dtype=float32 --matmul_precision=highest --n_layer=2 --n_head=2 --n_embd=16 "
    "--block_size=32 --batch_size=2 --total_batch_size=256 --max_iters=20 --lr_decay_iters=20 --warmup_iters=5 "
    f"--learning_rate=1e-2 --min_lr=1e-3 --eval_interval=100 --eval_iters=1 {UNMEASURED}"
)
NO_STEPS = f"{TINY} {UNMEASURED} --max_iters=0"  # everything except training

# Changes to build-nanogpt's own script that make its run equal to SAME; below, its losses at commit 6104ab1
PATCHES = {
    "from hellaswag import render_example, iterate_examples\n": "",
    "total_batch_size = 524288": "total_batch_size = 256",
    "B = 64 #": "B = 2 #",
    "T = 1024 #": "T = 32 #",
    "set_float32_matmul_precision('high')": "set_float32_matmul_precision('highest')",
    "model = GPT(GPTConfig(vocab_size=50304))\n": (
        "model = GPT(GPTConfig(block_size=32, vocab_size=50304, n_layer=2, n_head=2, n_embd=16))\n"
        "model.load_state_dict(torch.load('weights.pt'))\n"
    ),
    "max_lr = 6e-4": "max_lr = 1e-2",
    "warmup_steps = 715": "warmup_steps = 5",
    "max_steps = 19073": "max_steps = 20",
    "dtype=torch.bfloat16)": "dtype=torch.bfloat16, enabled=False)",
    "last_step = (step == max_steps - 1)": "last_step = False",
    "step % 250 == 0": "False",
}
GLOO = {
    'assert torch.cuda.is_available(), "for now i think we need CUDA for DDP"': "",
    "backend='nccl'": "backend='gloo'",
    "f'cuda:{ddp_local_rank}'": "'cpu'",
    "torch.cuda.set_device(device)": "",
    "DDP(model, device_ids=[ddp_local_rank])": "DDP(model)",
    "dist.all_reduce(loss_accum, op=dist.ReduceOp.AVG)": "dist.all_reduce(loss_accum); loss_accum /= ddp_world_size",
}
LOSSES = (
    *(10.830601, 10.812823, 10.744398, 10.599365, 10.472405, 10.294055, 10.107911, 9.958082, 9.735858, 9.577003),
    *(9.268007, 9.312904, 9.498258, 8.978557, 8.80108, 8.500875, 8.49519, 8.363123, 8.409732, 8.113493),
)


@pytest.fixture(scope="module")
def shards(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real text in shards of 2,500 tokens; a run of 20 steps passes the ends of two."""
    parent = tmp_path_factory.mktemp("shards")
    return prepare_shards(
        lambda source: known("fineweb_edu", parent, source, {"shard_size": 2_500}), parent, shared_data
    )


@pytest.fixture
def beside(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with edu_fineweb10B/; the clone has no data."""
    (tmp_path / "edu_fineweb10B").symlink_to(shards)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("folio.data.folders.CLONE", tmp_path / "clone")
    return tmp_path


def asked(out: Path) -> dict[str, Any]:
    options: dict[str, Any] = json.loads((out / "config.json").read_text())["asked"]
    return options


def losses(log: Path) -> list[float]:
    return [float(line.split()[2]) for line in log.read_text().splitlines() if line.split()[1] == "train"]


# The same losses


def patched(script: str, changes: dict[str, str]) -> str:
    for there, instead in changes.items():
        assert there in script, there
        script = script.replace(there, instead)
    return script


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_losses_equal_those_of_its_script(
    clone: Path, shards: Path, tmp_path: Path, gpt2: Tiktoken, processes: int
) -> None:
    """Runs train_gpt2.py of a checkout from our initial weights: losses to 1e-4, learning rates to its five digits."""
    if not (checkout := os.environ.get("FOLIO_BUILD_NANOGPT")):
        pytest.skip("FOLIO_BUILD_NANOGPT names no checkout of build-nanogpt")
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] * (processes > 1)
    for folder in (tmp_path, clone):
        (folder / "edu_fineweb10B").unlink(missing_ok=True)
        (folder / "edu_fineweb10B").symlink_to(shards)
    torch.save(GPT(SHAPE, lambda name: rng.generator(1337, name)).state_dict(), tmp_path / "weights.pt")
    script = (Path(checkout) / "train_gpt2.py").read_text(encoding="utf-8")
    (tmp_path / "train_gpt2.py").write_text(patched(script, PATCHES | GLOO), encoding="utf-8")
    theirs = python(*launcher, "train_gpt2.py", cwd=tmp_path, CUDA_VISIBLE_DEVICES="")
    assert theirs.returncode == 0, theirs.stderr
    ours = python(*launcher, "train.py", *shlex.split(SAME), cwd=clone, PYTHONPATH="")
    assert ours.returncode == 0, ours.stderr
    assert losses(clone / "log" / "log.txt") == pytest.approx(losses(tmp_path / "log" / "log.txt"), abs=1e-4)
    rates = [r["lr"] for r in read_metrics(clone / "log" / "metrics.jsonl") if r["kind"] == "train"]
    assert [f"{rate:.4e}" for rate in rates] == re.findall(r"\| lr (\S+) \|", theirs.stdout)
    assert len(rates) == 20


def test_recorded_losses(folio: Folio, beside: Path) -> None:
    """Its script's losses from the same shards and initial weights, in float32."""
    outcome = folio("train", *shlex.split(SAME))
    assert outcome.code == 0, outcome.err
    assert losses(beside / "log" / "log.txt") == pytest.approx(LOSSES, abs=1e-4)


# train.py without options


@pytest.mark.parametrize("place", ["edu_fineweb10B", "data/edu_fineweb10B", "data/fineweb_edu"])
def test_train_without_options_uses_the_preset(folio: Folio, beside: Path, place: str) -> None:
    """Beside shards of either name, with a line that says so; typed options win."""
    (beside / "data").mkdir()
    (beside / "edu_fineweb10B").rename(beside / place)
    outcome = folio("train", *shlex.split(NO_STEPS))
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith(f"{place} is here and data/openwebtext is not: using config/{PRESET}.py\n")
    options, typed = asked(beside / "log"), dict(word[2:].split("=") for word in shlex.split(NO_STEPS))
    preset = read_file(PRESET, TrainConfig)
    assert {name: options[name] for name in preset.keys() - typed.keys() - {"out_dir"}} == {
        name: value for name, value in preset.items() if name not in typed and name != "out_dir"
    }
    assert len(preset.keys() & typed.keys()) > 5
    assert all(str(options[name]) == value for name, value in typed.items())


def test_typed_flags_win(folio: Folio, beside: Path) -> None:
    """They replace the preset's values: micro steps its tokens per step, another folder its log/."""
    flags = "--gradient_accumulation_steps=3 --out_dir=mine --learning_rate=1e-3 --log_txt=False"
    assert folio("train", *shlex.split(f"{NO_STEPS} {flags}")).code == 0
    options = asked(beside / "mine")
    chosen = {name: options[name] for name in ("gradient_accumulation_steps", "total_batch_size", "learning_rate")}
    assert chosen == {"gradient_accumulation_steps": 3, "total_batch_size": 0, "learning_rate": 1e-3}
    assert {path.name for path in beside.iterdir()} == {"edu_fineweb10B", "mine"}
    assert not (beside / "mine" / "log.txt").exists()


def test_the_dial_sizes_the_model_on_its_data(folio: Folio, beside: Path) -> None:
    """The preset's data and order of rows stay; size, batch and rates are those of --depth."""
    outcome = folio("train", *shlex.split(NO_STEPS), "--depth=3", "--out_dir=mine")
    assert (outcome.code, outcome.err) == (0, "")
    options, preset = asked(beside / "mine"), read_file(PRESET, TrainConfig)
    assert options["sampling"] == preset["sampling"]
    chosen = {name: options[name] for name in ("total_batch_size", "optimizer", "activation", "decay_share")}
    assert chosen == {"total_batch_size": 0, "optimizer": "muon", "activation": "relu2", "decay_share": 0.7}


@pytest.mark.parametrize("begin", ["auto", "resume"])
def test_train_without_options_resumes(folio: Folio, beside: Path, begin: str) -> None:
    """In log/, the preset's folder, with the preset's settings."""
    assert folio("train", *shlex.split(f"{NO_STEPS} --total_batch_size=64 --max_iters=1")).code == 0
    outcome = folio("train", f"--init_from={begin}", "--max_iters=2")
    assert (outcome.code, outcome.err) == (0, "")
    assert run_folder.steps(beside / "log") == [1, 2]
    assert not (beside / "out").exists()


def test_nothing_to_resume(folio: Folio, beside: Path) -> None:
    (beside / "edu_fineweb10B").unlink()
    assert_refused(folio("train", "--init_from=resume"), "nothing to resume in out")
    assert tree(beside) == {}


def test_openwebtext_comes_first(folio: Folio, beside: Path) -> None:
    """It is trained as nanoGPT does, into out/."""
    shutil.copytree(beside / "edu_fineweb10B", beside / "data" / "openwebtext")
    outcome = folio("train", *shlex.split(NO_STEPS))
    assert (outcome.code, "config/" in outcome.out) == (0, False)
    assert asked(beside / "out")["dataset"] == "openwebtext"
    assert not (beside / "log").exists()


@pytest.mark.parametrize("choice", ["--dataset=openwebtext", "--data_dir=data/openwebtext", "own.py", "train_gpt2"])
def test_a_choice_of_data_or_file_disables_the_preset(folio: Folio, beside: Path, choice: str) -> None:
    (beside / "own.py").write_text("dropout = 0.1\n")
    before = tree(beside)
    assert_refused(folio("train", choice, *shlex.split(NO_STEPS)), "data/openwebtext/train.bin is missing")
    assert tree(beside) == before


def test_neither_data_set_exists(folio: Folio, beside: Path) -> None:
    """One line with the commands that prepare each."""
    (beside / "edu_fineweb10B").unlink()
    outcome = folio("train")
    assert_refused(outcome, "python -m folio prepare openwebtext", "python -m folio prepare fineweb_edu")
    assert tree(beside) == {}


@pytest.mark.slow
def test_two_processes(clone: Path, shards: Path, items: Path, gpt2: Tiktoken) -> None:
    """Each rank draws four samples, none at step 0; there is one log.txt, with its script's lines only."""
    (clone / "edu_fineweb10B").unlink(missing_ok=True)
    (clone / "edu_fineweb10B").symlink_to(shards)
    flags = f"{SAME.replace(UNMEASURED, '')} --max_iters=4 --eval_interval=2 --hellaswag_interval=2 --sample_interval=2"
    line = f"torchrun --standalone --nproc_per_node=2 train.py {flags} --hellaswag_data={items} --out_dir=log-two"
    said = succeed(line, clone)
    texts = [r for r in read_metrics(clone / "log-two" / "metrics.jsonl") if r["kind"] == "sample"]
    assert [(r["step"], r["number"]) for r in texts] == [(step, number) for step in (2, 4) for number in range(8)]
    assert all(r["text"].startswith("Hello, I'm a language model,") for r in texts)
    assert said.count("Hello, I'm a language model,") == 16
    assert all(len({r["text"] for r in texts if r["step"] == step}) == 8 for step in (2, 4))
    kinds = {"train": r"\d+\.\d{6}", "val": r"\d+\.\d{4}", "hella": r"[01]\.\d{4}"}
    lines = (clone / "log-two" / "log.txt").read_text().splitlines()
    assert all(re.fullmatch(rf"\d+ {kind} {kinds[kind]}", line) for line in lines for kind in line.split()[1:2])
    order = "0 val,0 hella,0 train,1 train,2 val,2 hella,2 train,3 train,4 val,4 hella"
    assert ",".join(line.rpartition(" ")[0] for line in lines) == order
    assert len(list((clone / "log-two").rglob("log.txt"))) == 1


# Tokens a step


@pytest.mark.parametrize("world", [1, 2, 8])
def test_micro_steps(world: int) -> None:
    """Micro steps of 64 rows: 8 on one GPU, 4 on each of two, 1 on each of eight."""
    preset = override(TrainConfig(), read_file(PRESET, TrainConfig))
    data = accumulated(preset.data, preset.model.block_size, dict.fromkeys(["total_batch_size"], PRESET))
    shares = [micro_batches(data, rank, world) for rank in range(world)]
    assert [len(share) for share in shares] == [8 // world] * world
    assert sum(rows for share in shares for _, rows, _ in share) * 1024 == 2**19


@pytest.mark.parametrize(
    ("total", "fitting"),
    [
        (96, [{"total_batch_size": 128}, {"batch_size": 3}]),
        (1000, [{"total_batch_size": 1024}]),
        (1, [{"total_batch_size": 64}]),
    ],
)
def test_tokens_that_do_not_fit(folio: Folio, beside: Path, total: int, fitting: list[dict[str, int]]) -> None:
    """They are refused with values that fit, and those do fit."""
    typed = {"block_size": 16, "batch_size": 4, "total_batch_size": total}
    outcome = folio("train", *shlex.split(NO_STEPS), *(f"--{name}={value}" for name, value in typed.items()))
    named = [f"--{name}={value}" for choice in fitting for name, value in choice.items()]
    assert_refused(outcome, f"total_batch_size={total} is no multiple", "4 × 16 = 64", *named)
    assert re.findall(r"--\S+", outcome.err) == named
    for choice in fitting:
        options = typed | choice
        data = Data(batch_size=options["batch_size"], total_batch_size=options["total_batch_size"])
        found = accumulated(data, 16, {})
        assert found.gradient_accumulation_steps * found.batch_size * 16 == found.total_batch_size
    assert not (beside / "log").exists()


def test_tokens_or_micro_steps(folio: Folio, beside: Path) -> None:
    flags = ["--total_batch_size=128", "--gradient_accumulation_steps=2"]
    outcome = folio("train", *shlex.split(NO_STEPS), *flags)
    assert_refused(outcome, "total_batch_size=128 and gradient_accumulation_steps=2 exclude each other")
    assert not (beside / "log").exists()


def test_typed_tokens_win_over_micro_steps_of_a_file() -> None:
    data = Data(batch_size=4, gradient_accumulation_steps=9, total_batch_size=128)
    sources = {"gradient_accumulation_steps": "own.py", "total_batch_size": COMMAND_LINE}
    assert accumulated(data, 16, sources) == replace(data, gradient_accumulation_steps=2)


# Settings


def test_the_presets_settings() -> None:
    """The settings in its train_gpt2.py, and no others."""
    preset = read_file(PRESET, TrainConfig)
    assert {name: preset[name] for name in preset if not name.startswith("wandb")} == {
        "out_dir": "log",
        "log_txt": True,
        "dataset": "fineweb_edu",
        "sampling": "sequential",
        "batch_size": 64,
        "block_size": 1024,
        "total_batch_size": 524_288,
        "max_iters": 19_073,
        "learning_rate": 6e-4,
        "min_lr": 6e-5,
        "warmup_iters": 715,
        "lr_decay_iters": 19_073,
        "vocab_size": 50_304,
        "bias": True,
        "activation": "gelu_tanh",
        "dtype": "bfloat16",
        "eval_interval": 250,
        "eval_iters": 20,
        "hellaswag_interval": 250,
        "sample_interval": 250,
        "checkpoint_interval": 5_000,
        "keep_checkpoints": 4,
    }
    rest = override(TrainConfig(), preset)
    assert (rest.model.n_layer, rest.model.n_head, rest.model.n_embd, rest.model.dropout) == (12, 12, 768, 0)
    assert (rest.optimizer.grad_clip, rest.evaluation.sample_prompt) == (1.0, "Hello, I'm a language model,")
    assert (rest.evaluation.sample_count, rest.evaluation.sample_tokens, rest.evaluation.sample_top_k) == (4, 32, 50)


def test_optimizer() -> None:
    """Matrices and embeddings decay, biases and layer norms do not; 124,475,904 parameters."""
    preset = override(TrainConfig(), read_file(PRESET, TrainConfig))
    model, o = GPT.empty(preset.model), preset.optimizer
    assert model.get_num_params(non_embedding=False) == 124_475_904
    optimizer = adamw(model, o.learning_rate, (o.beta1, o.beta2), o.weight_decay)
    groups = [(group["weight_decay"], group["betas"], group["eps"]) for group in optimizer.param_groups]
    assert groups == [(0.1, (0.9, 0.95), 1e-8), (0.0, (0.9, 0.95), 1e-8)]
    assert [{p.dim() for p in group["params"]} for group in optimizer.param_groups] == [{2}, {1}]
    assert [len(group["params"]) for group in optimizer.param_groups] == [50, 98]


def test_learning_rate_schedule() -> None:
    def get_lr(it: int) -> float:
        if it < 715:
            return 6e-4 * (it + 1) / 715
        if it > 19_073:
            return 6e-5
        return 6e-5 + 0.5 * (1 + math.cos(math.pi * (it - 715) / (19_073 - 715))) * (6e-4 - 6e-5)

    config = override(TrainConfig(), read_file(PRESET, TrainConfig)).optimizer
    for step in (0, 714, 715, *range(716, 19_072, 97), 19_072):
        assert learning_rate(step, config) == pytest.approx(get_lr(step), rel=1e-12), step


def test_checkpoints_that_are_kept(folio: Folio, beside: Path) -> None:
    """The latest at multiples of checkpoint_interval, the best, and the newest."""
    flags = "--max_iters=10 --learning_rate=0 --min_lr=0 --eval_interval=2 --checkpoint_interval=3 --keep_checkpoints=2"
    outcome = folio("train", *shlex.split(f"{TINY} {UNMEASURED} --total_batch_size=64 {flags}"))
    assert outcome.code == 0, outcome.err
    assert json.loads((beside / "log" / "best.json").read_text())["step"] == 2  # no later one is better
    assert run_folder.steps(beside / "log") == [2, 6, 9, 10]
