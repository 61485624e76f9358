"""NaN and infinity, in weights, moments, logits and losses: one line, and nothing is saved or generated from them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, Outcome, assert_refused, tree
from safetensors.torch import load_file, save_file

from folio import files, rng
from folio.config.options import System
from folio.generation.sampling import draws, generate, pick
from folio.machine.choices import resolve
from folio.machine.runtime import Runtime
from folio.model.config import GPTConfig
from folio.model.gpt import GPT
from folio.records import run_folder
from folio.training.optimizers import adamw

Folio = Callable[..., Outcome]
WEIGHT = "transformer.h.0.attn.c_attn.weight"
FLAGS = ["--device=cpu", "--dtype=float32"]


@pytest.fixture
def damaged(finished: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the run, with one tensor of its newest checkpoint changed, and the checksum made to match."""

    def damage(name: str, change: Callable[[torch.Tensor], Any], file: str = run_folder.MODEL) -> Path:
        out = tmp_path / "out"
        shutil.copytree(finished, out)
        folder = run_folder.checkpoint_folder(out, 10)
        tensors = load_file(folder / file)
        change(tensors[name])
        save_file(tensors, folder / file)
        state, _ = files.read_sealed(folder / run_folder.STATE)
        state["sha256"][file] = files.sha256(folder / file)
        files.write_sealed(folder / run_folder.STATE, state)
        return out

    return damage


def nan_in_the_middle(tensor: torch.Tensor) -> None:
    tensor.view(-1)[tensor.numel() // 2] = torch.nan


CHANGES: dict[str, Callable[[torch.Tensor], Any]] = {
    "a NaN": nan_in_the_middle,
    "all NaN": lambda tensor: tensor.fill_(torch.nan),
    "inf": lambda tensor: tensor[0].fill_(torch.inf),
    "-inf": lambda tensor: tensor[-1].fill_(-torch.inf),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    "argv",
    [["sample", "--temperature=0"], ["sample", "--num_samples=3"], ["eval"], ["eval", "hellaswag"], ["train"]],
    ids=" ".join,
)
def test_weights_that_are_not_finite(
    folio: Folio, damaged: Callable[..., Path], story: Path, items: Path, change: str, argv: list[str]
) -> None:
    """Every command names the checkpoint, the weight and the checkpoint before; resume changes nothing."""
    out = damaged(WEIGHT, CHANGES[change])
    before = tree(out)
    more = {"hellaswag": [f"--data={items}"], "train": [f"--data_dir={story}", "--init_from=resume", "--max_iters=12"]}
    flags = more.get(argv[-1], []) + ([] if argv == ["train"] else ["--checkpoint=latest"])
    outcome = folio(*argv, *flags, *FLAGS, f"--out_dir={out}")
    assert_refused(
        outcome, run_folder.checkpoint_folder(out, 10), WEIGHT, "not finite", "--checkpoint=5", "move this folder away"
    )
    assert "Traceback" not in outcome.err
    assert tree(out) == before
    if argv == ["train"]:  # as it says
        shutil.move(run_folder.checkpoint_folder(out, 10), out / "elsewhere")
        outcome = folio(*argv, *flags, *FLAGS, f"--out_dir={out}")
        assert f"resuming {out} at step 5" in outcome.out


def test_another_runs_weights_that_are_not_finite(folio: Folio, damaged: Callable[..., Path], story: Path) -> None:
    out = damaged(WEIGHT, nan_in_the_middle)
    shutil.rmtree(run_folder.checkpoint_folder(out, 5))
    outcome = folio("train", f"--init_from={out}", f"--data_dir={story}", *FLAGS, f"--out_dir={out.with_name('new')}")
    assert_refused(outcome, run_folder.checkpoint_folder(out, 10), WEIGHT, "not finite")
    assert not out.with_name("new").exists()


def test_moments_that_are_not_finite(folio: Folio, damaged: Callable[..., Path], story: Path) -> None:
    """They would ruin the next update."""
    out = damaged(f"{WEIGHT}/exp_avg_sq", CHANGES["inf"], run_folder.OPTIMIZER)
    before = tree(out)
    argv = ["train", "--init_from=resume", f"--data_dir={story}", f"--out_dir={out}", "--max_iters=12"]
    assert_refused(folio(*argv), run_folder.checkpoint_folder(out, 10), f"{WEIGHT}/exp_avg_sq", "not finite")
    assert tree(out) == before


@pytest.mark.parametrize("first", [1, 5])
def test_an_update_to_infinity_is_not_saved(folio: Folio, story: Path, tmp_path: Path, first: int) -> None:
    """The loss was finite and the update was not: the scheduled checkpoint is refused, and no step is suggested."""
    flags = [*SMALL, "--learning_rate=1e39", "--decay_lr=False", "--weight_decay=0", "--eval_interval=100"]
    outcome = folio("train", *flags, f"--checkpoint_interval={first}", f"--data_dir={story}", f"--out_dir={tmp_path}")
    assert_refused(outcome, "is not finite", "lower --learning_rate", "there is no checkpoint yet", code=1)
    assert run_folder.steps(tmp_path) == []
    assert (f"not finite after {first} steps" in outcome.err) == (first == 1)


@pytest.mark.parametrize("name", ["transformer.wte.weight", "transformer.ln_f.weight"])
def test_a_checkpoint_that_overflows_is_not_suggested(
    folio: Folio, damaged: Callable[..., Path], story: Path, name: str
) -> None:
    """Its weights are finite, its loss is not: the error names the checkpoint before, and that one resumes."""
    out = damaged(name, lambda tensor: tensor.copy_(tensor.sign() * 1e30))
    argv = ["train", "--init_from=resume", f"--data_dir={story}", *FLAGS, f"--out_dir={out}", "--max_iters=12"]
    outcome = folio(*argv)
    assert_refused(
        outcome, "of step 10 is not finite", f"move {run_folder.checkpoint_folder(out, 10)} away", "step 5", code=1
    )
    assert "--learning_rate" not in outcome.err
    shutil.move(run_folder.checkpoint_folder(out, 10), out / "elsewhere")
    assert f"resuming {out} at step 5" in folio(*argv).out


def test_another_runs_weights_that_overflow(folio: Folio, damaged: Callable[..., Path], story: Path) -> None:
    """No learning rate would help, since nothing was trained."""
    out = damaged("transformer.wte.weight", lambda tensor: tensor.copy_(tensor.sign() * 1e30))
    shutil.rmtree(run_folder.checkpoint_folder(out, 5))
    new = out.with_name("new")
    outcome = folio("train", *SMALL, f"--init_from={out}", f"--data_dir={story}", f"--out_dir={new}")
    assert_refused(outcome, "is not finite at step 0", "begin with other weights", code=1)
    assert run_folder.steps(new) == []


def overflowing(damaged: Callable[..., Path]) -> Path:
    """Weights that float32 holds and float16 does not."""
    return damaged("transformer.ln_f.weight", lambda tensor: tensor.fill_(1e6))


@pytest.mark.parametrize("argv", [["sample", "--temperature=0"], ["sample", "--num_samples=1"]], ids=" ".join)
def test_logits_that_overflow_float16(folio: Folio, damaged: Callable[..., Path], argv: list[str]) -> None:
    out = overflowing(damaged)
    flags = ["--checkpoint=latest", "--device=cpu", f"--out_dir={out}", "--max_new_tokens=4"]
    outcome = folio(*argv, *flags, "--dtype=float16")
    assert_refused(outcome, run_folder.checkpoint_folder(out, 10), "logits are not finite", "--dtype=float32", code=1)
    assert folio(*argv, *flags, "--dtype=float32").code == 0


@pytest.mark.parametrize("argv", [["eval"], ["eval", "hellaswag"]], ids=" ".join)
def test_what_cannot_be_measured_in_float32(
    folio: Folio, damaged: Callable[..., Path], items: Path, argv: list[str]
) -> None:
    """Finite weights that overflow it, too."""
    out = damaged("transformer.ln_f.weight", lambda tensor: tensor.fill_(3e38))
    data = [f"--data={items}"] if argv[-1] == "hellaswag" else []
    outcome = folio(*argv, *data, "--checkpoint=latest", *FLAGS, f"--out_dir={out}")
    assert_refused(outcome, run_folder.checkpoint_folder(out, 10), "not finite", code=1)
    assert not (out / "evaluations.jsonl").exists()


def test_a_run_from_weights_that_overflow(
    folio: Folio, damaged: Callable[..., Path], story: Path, tmp_path: Path
) -> None:
    """It ends at its first evaluation with the step in the error, and saves nothing; so does --eval_only."""
    out, new = damaged("transformer.ln_f.weight", lambda tensor: tensor.fill_(3e38)), tmp_path / "new"
    argv = ["train", f"--init_from={out}", f"--data_dir={story}", *FLAGS, f"--out_dir={new}", "--eval_iters=1"]
    for more in ([], ["--eval_only"]):
        outcome = folio(*argv, *more)
        assert_refused(outcome, "the train loss is not finite at step 0", code=1)
        assert run_folder.steps(new) == []


def test_every_tensor_is_looked_at() -> None:
    """The last weight and the last moment as well; none where all are finite."""
    model = GPT(GPTConfig(block_size=4, vocab_size=5, n_layer=1, n_head=1, n_embd=4))
    optimizer = adamw(model, 1e-3, (0.9, 0.95), 0.1)
    model(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long))[1].backward()
    optimizer.step()
    runtime = Runtime(resolve(System(device="cpu")))
    try:
        assert runtime.find_not_finite(model, optimizer) == ""
        for name, p in model.named_parameters():
            for of, tensor in ((name, p.data), (f"{name}/exp_avg", optimizer.state[p]["exp_avg"])):
                last = tensor.view(-1)[-1:]
                before = last.clone()
                for value in (torch.nan, torch.inf, -torch.inf):
                    last.fill_(value)
                    assert runtime.find_not_finite(model, optimizer) == of
                last.copy_(before)
    finally:
        runtime.close()


# Temperatures, and other ends of what can be asked for


@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-320, 1e-300, 1e-40, 1e-9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_smallest_temperatures_take_the_likeliest(temperature: float, dtype: torch.dtype) -> None:
    """Also where logits divided by them overflow, in the arithmetic of any device."""
    logits = torch.randn(9, 50, generator=rng.generator("logits")) * 100
    uniform = torch.rand(9, 1, dtype=torch.float64, generator=rng.generator("draws")).to(dtype)
    assert pick(logits, uniform, temperature).tolist() == logits.argmax(-1, keepdim=True).tolist()


@pytest.mark.parametrize("temperature", [1e9, 1e300, 1e308])
def test_the_largest_temperatures_draw_evenly(temperature: float) -> None:
    logits = torch.randn(1, 10, generator=rng.generator("logits")).double().expand(10, -1)
    uniform = torch.arange(0.05, 1, 0.1, dtype=torch.float64)[:, None]
    assert pick(logits, uniform, temperature)[:, 0].tolist() == list(range(10))
    assert pick(logits, uniform, temperature, top_p=1e-320)[:, 0].max() < 10


def test_generate_refuses_to_draw_from_what_is_not_finite() -> None:
    model = GPT(GPTConfig(block_size=8, vocab_size=19, n_layer=1, n_head=2, n_embd=8)).eval()
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(torch.nan)
    for temperature in (0.0, 1.0):
        with pytest.raises(FloatingPointError, match="logits are not finite"):
            generate(model, torch.zeros(2, 3, dtype=torch.long), 4, temperature=temperature, uniform=draws(1, 2, 4))


@pytest.mark.parametrize("flag", ["--temperature=1e-320", "--temperature=1e308", "--top_p=1e-320", "--top_k=999999999"])
def test_ends_of_what_can_be_asked_for(folio: Folio, finished: Path, flag: str) -> None:
    argv = ["sample", f"--out_dir={finished}", *FLAGS, "--num_samples=2", "--max_new_tokens=20", flag]
    outcome = folio(*argv)
    assert (outcome.code, outcome.err) == (0, "")
    assert all(len(text) == 21 for text in outcome.out.split("\n" + "-" * 15 + "\n")[:2])


@pytest.mark.parametrize(
    "flag",
    ["--temperature=nan", "--temperature=inf", "--temperature=-0.5", "--top_p=nan", "--top_p=1.1", "--top_k=-1"],
)
def test_what_is_no_temperature(folio: Folio, finished: Path, flag: str) -> None:
    name, value = flag.removeprefix("--").split("=")
    assert_refused(folio("sample", f"--out_dir={finished}", *FLAGS, flag), name, value)
