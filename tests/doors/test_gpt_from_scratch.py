"""scripts/train_gpt.py as in GPT-from-scratch: flags, model, epochs and log."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import os
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, Outcome, python, succeed, tree
from fineweb_shards import prepare_shards
from run_results import assert_same_bits

from folio import cli, rng
from folio.checkpoints import find
from folio.config.options import TrainConfig
from folio.config.table import override
from folio.doors import train_gpt
from folio.doors.train_gpt import BEFORE_AND_AFTER, Options
from folio.model.gpt import GPT
from folio.preparation.recipes import sharded
from folio.records import run_folder
from folio.records.metrics import read_metrics
from folio.training.showcase import show

Script = Callable[..., Outcome]

DEFAULTS = {  # of its parse_args
    "n_batches": 16,
    "n_tokens": 1024,
    "data_root": "data/edu_fineweb10B",
    "vocab_size": 50304,
    "emb_dim": 768,
    "context_length": 1024,
    "drop_rate": 0.0,
    "n_layers": 12,
    "n_heads": 12,
    "qkv_bias": False,
    "monitor": True,
    "torch_matmul_precision": "high",
    "log_dir": "log",
    "n_epochs": 1,
    "warmup_iters": 715,
    "max_iters": 19073,
    "total_batch_size": 2**19,
    "metrics": "Hellaswag",
    "max_lr": 6e-4,
    "min_lr": 6e-5,
}
# Two epochs of three steps of two micro batches, with flags as its users write them
SMALL = shlex.split(
    "--n_batches 2 --n_tokens 16 --emb_dim 16 --context_length 16 --n_layers 1 --n_heads 2 --warmup_iters 1 "
    "--n_epochs 2 --max_iters 3 --total_batch_size 64 --max_lr 1e-2 --min_lr 1e-3 --metrics none"
)


@pytest.fixture(scope="module")
def shards(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real text as scripts/tokenize_documents_parallel.py writes it."""
    parent, names = tmp_path_factory.mktemp("shards"), "{split}_{index:06d}.npy"
    return prepare_shards(lambda source: sharded(source, "sample-10BT", names, 20_000), parent, shared_data)


@pytest.fixture
def here(shards: Path, items: Path, shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the shards and HellaSwag's items where the script looks for them."""
    (tmp_path / "data" / "hellaswag").mkdir(parents=True)
    (tmp_path / "data" / "edu_fineweb10B").symlink_to(shards)
    shutil.copy(items, tmp_path / "data" / "hellaswag" / "hellaswag_val.jsonl")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared_data / "tiktoken"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def script(here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Script:
    """scripts/train_gpt.py, in this process."""

    def run(*argv: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["train_gpt.py", *argv])
        monkeypatch.setattr(sys, "path", list(sys.path))
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / "scripts" / "train_gpt.py"), run_name="__main__")
        return Outcome(int(stop.value.code or 0), *capfd.readouterr())

    return run


def configured(*argv: str) -> TrainConfig:
    """The options of folio train that these flags stand for."""
    return train_gpt.configured(cli.parse(Options, list(argv), "train_gpt.py", files=False))


def initial(config: TrainConfig) -> dict[str, torch.Tensor]:
    return GPT(config.model, lambda name: rng.generator(config.system.seed, name)).state_dict()


def records(out: Path, kind: str) -> list[dict[str, Any]]:
    return [r for r in read_metrics(out / "metrics.jsonl") if r["kind"] == kind]


def losses(out: Path) -> list[float]:
    return [r["loss"] for r in records(out, "train")]


# Flags


def test_flags_and_their_defaults() -> None:
    assert dataclasses.asdict(Options()) == DEFAULTS


def test_its_parser_has_the_same_flags() -> None:
    if not (checkout := os.environ.get("FOLIO_GPT_FROM_SCRATCH")):
        pytest.skip("FOLIO_GPT_FROM_SCRATCH names no checkout of GPT-from-scratch")
    body = ast.parse((Path(checkout) / "scripts" / "train_gpt.py").read_text(encoding="utf-8")).body
    (wanted,) = (node for node in body if getattr(node, "name", "") == "parse_args")
    scope: dict[str, Any] = {"argparse": argparse}
    exec(compile(ast.Module([wanted], []), "train_gpt.py", "exec"), scope)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_gpt.py"])
        assert vars(scope["parse_args"]()) == DEFAULTS | {"metrics": ["Hellaswag"]}


@pytest.mark.parametrize(("flags", "parameters"), [([], 163_081_728), (["--qkv_bias"], 163_109_376)])
def test_the_model_with_default_flags(flags: list[str], parameters: int) -> None:
    """The head is not tied to the embeddings; queries, keys and values have biases on request."""
    with torch.device("meta"):
        assert sum(p.numel() for p in GPT(configured(*flags).model).parameters()) == parameters


def test_every_flag_sets_its_option() -> None:
    flags = (
        "--n_batches 3 --n_tokens 8 --data_root elsewhere --vocab_size 60000 --emb_dim 20 --context_length 32 "
        "--drop_rate 0.25 --n_layers 5 --n_heads 4 --qkv_bias --no-monitor --torch_matmul_precision medium "
        "--log_dir mine --n_epochs 4 --warmup_iters 6 --max_iters 9 --total_batch_size 48 --metrics none "
        "--max_lr 0.5 --min_lr 0.125"
    )
    config = configured(*flags.split())
    model, optimizer, data = config.model, config.optimizer, config.data
    assert (model.vocab_size, model.n_embd, model.block_size, model.dropout) == (60_000, 20, 32, 0.25)
    assert (model.n_layer, model.n_head, model.bias, model.qkv_bias) == (5, 4, True, True)
    assert (data.data_dir, data.batch_size, data.window, data.total_batch_size) == ("elsewhere", 3, 8, 48)
    assert (optimizer.max_iters, optimizer.restart_interval, optimizer.lr_decay_iters) == (36, 9, 9)
    assert (optimizer.warmup_iters, optimizer.learning_rate, optimizer.min_lr) == (6, 0.5, 0.125)
    assert (config.output.out_dir, config.logging.monitor) == ("mine", False)
    assert (config.system.matmul_precision, config.evaluation.hellaswag_interval) == ("medium", 0)
    assert configured().evaluation.hellaswag_interval == 250


def test_monitor_and_qkv_bias(script: Script, here: Path) -> None:
    """Flags without a value. With --no-monitor a run prints nothing about its steps, but records them."""
    assert script(*SMALL, "--qkv_bias", "--monitor").out.count("\niter ") == 6
    weights = dict(find.choose(here / "log").weights())
    assert weights["transformer.h.0.attn.c_attn.bias"].shape == (48,)
    outcome = script(*SMALL, "--no-monitor")
    assert (outcome.code, outcome.err) == (0, "")
    assert not re.search(r"^(iter|step \d+:) ", outcome.out, re.MULTILINE)
    assert len(losses(here / "log")) == 6
    assert "transformer.h.0.attn.c_attn.bias" not in dict(find.choose(here / "log").weights())


# Epochs


def test_each_epoch_restarts(script: Script, here: Path) -> None:
    """With the rows and the learning rates of the first."""
    assert script(*SMALL).code == 0
    rates = [r["lr"] for r in records(here / "log", "train")]
    assert rates[:3] == rates[3:]
    assert rates[:3] == pytest.approx([1e-2, 1e-2, (1e-2 + 1e-3) / 2])
    still = [*SMALL, "--max_lr", "0", "--min_lr", "0", "--log_dir", "still"]
    assert script(*still).code == 0
    assert losses(here / "still")[:3] == losses(here / "still")[3:]
    assert len(set(losses(here / "still"))) == 3


def test_resume(script: Script, folio: Callable[..., Outcome], here: Path) -> None:
    """In the middle of an epoch, with rows shorter than the context: ends in the bits of an uninterrupted run."""
    often = {"checkpoint_interval": 1, "keep_checkpoints": 9, "device": "cpu"}
    show(override(configured(*SMALL, "--context_length", "32"), often), BEFORE_AND_AFTER)
    for step in (2, 4):
        shutil.copytree("log", f"from-{step}")
        for later in range(step + 1, 7):
            shutil.rmtree(run_folder.checkpoint_folder(Path(f"from-{step}"), later))
        outcome = folio("train", "--init_from=resume", f"--out_dir=from-{step}")
        assert (outcome.code, outcome.err) == (0, "")
        assert "a row had" not in outcome.out
        assert_same_bits(Path(f"from-{step}"), Path("log"))
        assert Path(f"from-{step}/log.txt").read_bytes() == Path("log/log.txt").read_bytes()


def test_rows_shorter_than_the_context(script: Script, here: Path) -> None:
    """The model has all positions and trains the first ones; the tokens per step are the same."""
    outcome = script(*SMALL, "--context_length", "32", "--total_batch_size", "128")
    assert outcome.code == 0, outcome.err
    assert "tokens per iteration will be: 128" in outcome.out
    shorter = dict(find.choose(here / "log", "latest").weights())["transformer.wpe.weight"]
    untrained = initial(configured(*SMALL, "--context_length", "32"))["transformer.wpe.weight"]
    moved = (shorter - untrained).abs().amax(dim=1) > 1e-3  # weight decay alone moves a weight by 1e-4 of itself
    assert moved.tolist() == [True] * 16 + [False] * 16


# Output


def test_log(script: Script, here: Path) -> None:
    """Its trainer's lines. An evaluation after an epoch's last step belongs to that epoch."""
    argv = [word if word != "none" else "Hellaswag" for word in SMALL]
    outcome = script(*argv)
    assert outcome.code == 0, outcome.err
    lines = (here / "log" / "log.txt").read_text().splitlines()
    shapes = {"train loss": r"\d+\.\d{6}", "validation loss": r"\d+\.\d{3}", "Hellaswag accuracy": r"[01]\.\d{3}"}
    parts = [re.fullmatch(r"Epoch (\d) \| iter (\d) \| ([\w ]+): (\S+)", line) for line in lines]
    assert all(part and re.fullmatch(shapes[part[3]], part[4]) for part in parts), lines
    trained = [(epoch, step, "train loss") for epoch in "01" for step in "012"]
    both = ["validation loss", "Hellaswag accuracy"]
    expected = [("0", "0", what) for what in both] + trained + [("1", "3", what) for what in both]
    assert [part.groups()[:3] for part in parts if part] == expected
    rounded = [f"{loss:.6f}" for loss in losses(here / "log")]
    assert [part[4] for part in parts if part and part[3] == "train loss"] == rounded


def test_samples_before_and_after(script: Script, here: Path) -> None:
    """Both continue the same prompt; between them is the sample of every 250 steps; then comes the figure."""
    pytest.importorskip("matplotlib")
    said = script(*SMALL).out
    order = ["The untrained model writes:\n\nOn a clear day", "\nstep 0:", "sample 0: Once upon a time"]
    order += ["The model after 6 steps writes:\n\nOn a clear day", "The losses over the steps: log/loss.png"]
    assert sorted(order, key=said.index) == order
    assert [said.count(words) for words in order] == [1] * 5
    assert (here / "log" / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    (sample,) = records(here / "log", "sample")
    assert (sample["step"], sample["number"]) == (6, 0)


@pytest.mark.slow
def test_two_processes(clone: Path, shards: Path, shared_data: Path) -> None:
    """The same steps, printed once; a sample of each process; one figure."""
    (clone / "data" / "edu_fineweb10B").symlink_to(shards)
    flags = " ".join(SMALL).replace("--n_batches 2", "--n_batches 1")
    line = f"torchrun --standalone --nproc_per_node=2 scripts/train_gpt.py {flags}"
    said = succeed(line, clone, TIKTOKEN_CACHE_DIR=str(shared_data / "tiktoken"), CUDA_VISIBLE_DEVICES="")
    for words in ("The untrained model writes", "The model after 6 steps writes", "2 processes", "log/loss.png"):
        assert said.count(words) == 1
    assert [(r["step"], r["number"]) for r in records(clone / "log", "sample")] == [(6, 0), (6, 1)]
    assert [r["tokens"] for r in records(clone / "log", "train")] == [64 * step for step in range(1, 7)]
    assert len((clone / "log" / "log.txt").read_text().splitlines()) == 6 + 2


# Bad input


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data_root", "nowhere"], "--data_root nowhere: no token files are there; python scripts/tokenize"),
        (["--n_tokens", "17"], "17"),
        (["--total_batch_size", "65"], "total_batch_size=65 is no multiple"),
        (["--min_lr", "1"], "min_lr=1"),
        (["--metrics", "loss"], "--metrics"),
        (["--n_head", "2"], "did you mean 'n_heads'"),
    ],
)
def test_flags_that_do_not_fit(script: Script, here: Path, flags: list[str], words: str) -> None:
    """One line, and nothing is written."""
    before = tree(here)
    outcome = script(*SMALL, *flags)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1), outcome
    assert outcome.err.startswith("train_gpt.py: ")
    assert words in outcome.err
    assert tree(here) == before


# Its trainer


PATCHES = {
    "scripts/train_gpt.py": {
        "model.to(device)": "torch.save({'model': model.state_dict(), 'config': model.cfg, 'iter': -1}, 'initial.pt')"
    },
    "gpt_from_scratch/trainers/trainer.py": {
        "dtype=torch.bfloat16)": "dtype=torch.bfloat16, enabled=False)",
        "if iter % 250 == 0 or is_last_step:": "if False:",
    },
}


@pytest.mark.slow
def test_losses_equal_those_of_its_trainer(here: Path) -> None:
    """Runs the script of a checkout in float32 from the same initial weights: losses to 1e-4."""
    if not (checkout := os.environ.get("FOLIO_GPT_FROM_SCRATCH")):
        pytest.skip("FOLIO_GPT_FROM_SCRATCH names no checkout of GPT-from-scratch")
    for part, changes in PATCHES.items():
        shutil.copytree(Path(checkout) / Path(part).parts[0], here / Path(part).parts[0])
        text = (here / part).read_text(encoding="utf-8")
        for there, instead in changes.items():
            assert there in text, there
            text = text.replace(there, instead)
        (here / part).write_text(text, encoding="utf-8")
    flags = [*SMALL, "--n_tokens", "32", "--context_length", "64", "--max_iters", "20", "--total_batch_size", "128"]
    flags += ["--warmup_iters", "5", "--torch_matmul_precision", "highest"]
    done = python(
        "scripts/train_gpt.py", *flags, "--log_dir=theirs", cwd=here, PYTHONPATH=str(here), CUDA_VISIBLE_DEVICES=""
    )
    assert done.returncode == 0, done.stderr
    show(
        override(configured(*flags), {"device": "cpu", "dtype": "float32", "init_from": "initial.pt"}), BEFORE_AND_AFTER
    )
    logs = [(here / log / "log.txt").read_text().splitlines() for log in ("theirs", "log")]
    theirs, ours = ([line.rpartition(" ") for line in log if "train loss" in line] for log in logs)
    assert [words for words, _, _ in ours] == [words for words, _, _ in theirs]
    assert [float(loss) for *_, loss in ours] == pytest.approx([float(loss) for *_, loss in theirs], abs=1e-4)
    assert len(ours) == 40
