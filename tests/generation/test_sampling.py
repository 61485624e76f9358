"""Sampling: cached as uncached, each sample by its own number, and the command."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, STORY, Outcome, assert_refused, make_pipe
from torch import Tensor

from folio import rng
from folio.data.tokenizers import from_json
from folio.generation.sampling import draws, encode_prompt, generate, pick, stream
from folio.model.config import GPTConfig
from folio.model.gpt import GPT
from folio.preparation.job import prepare
from folio.preparation.recipes import named_by_user

LINE = "-" * 15


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Fixed bits, and no waiting for a core that another process has."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model() -> GPT:
    """Random weights, large enough that the context matters, in float64 (a row of a product differs from the
    same row in a batch in float32)."""
    model = GPT(GPTConfig(block_size=8, vocab_size=19, n_layer=2, n_head=2, n_embd=8))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(0.0, 0.5, generator=rng.generator(name))
    return model.double().eval()


def prompt(B: int, T: int) -> Tensor:
    return torch.randint(19, (B, T), generator=rng.generator("prompt", T))


@torch.no_grad()
def uncached(model: GPT, idx: Tensor, uniform: Tensor) -> Tensor:
    """The whole context through the model for every token, one row at a time, and the draw by hand."""
    rows = []
    for row, draws_of_row in zip(idx.tolist(), uniform.tolist(), strict=True):
        for u in draws_of_row:
            context = torch.tensor([row[-model.config.block_size :]])
            probs = model(context)[0][0, -1].softmax(-1).tolist()
            total, token = 0.0, -1
            while total <= u:
                token += 1
                total += probs[token]
            row.append(token)
        rows.append(row)
    return torch.tensor(rows)


@pytest.mark.parametrize("T", [1, 3, 8, 13])
@pytest.mark.parametrize("new", [1, 4, 20])
def test_cached_is_uncached(model: GPT, T: int, new: int) -> None:
    """With a cache, token by token what the whole context gives, up to block_size and beyond."""
    idx, uniform = prompt(3, T), draws(1, 3, new)
    found = generate(model, idx, new, uniform=uniform)
    assert found.tolist() == uncached(model, idx, uniform).tolist()
    assert found.shape == (3, T + new)


@pytest.mark.parametrize("how", [{"temperature": -1.0}, {"temperature": math.nan}, {"top_k": 0}])
def test_what_cannot_be_drawn(model: GPT, how: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be at least"):
        model.generate(prompt(1, 3), 2, **how)


def test_a_sample_does_not_depend_on_the_others(model: GPT) -> None:
    """Sample 1 is the same alone, as the second of two and as the second of five."""
    idx = prompt(1, 3)
    assert torch.equal(draws(7, 2, 12), draws(7, 5, 12)[:2])
    assert torch.equal(draws(7, 2, 12), draws(7, 2, 30)[:, :12])
    assert not torch.equal(draws(7, 1, 12), draws(8, 1, 12))
    assert not torch.equal(draws(7, 2, 12)[1], draws(8, 1, 12)[0])
    alone = generate(model, idx, 12, uniform=draws(7, 2, 12)[1:])
    for n in (2, 5):
        assert torch.equal(generate(model, idx.expand(n, -1), 12, uniform=draws(7, n, 12))[1:2], alone)


def test_stream_gives_columns_as_they_come(model: GPT) -> None:
    """The first is there before the second is asked for."""
    idx, uniform = prompt(2, 3), draws(1, 2, 6)
    new = stream(model, idx, 6, uniform=uniform)
    first = next(new)
    assert first.shape == (2, 1)
    assert torch.equal(torch.cat([idx, first, *new], 1), generate(model, idx, 6, uniform=uniform))


def test_without_draws_the_global_generator_decides(model: GPT) -> None:
    """As in nanoGPT: torch.manual_seed reproduces, and the samples differ."""

    def sample() -> list[list[int]]:
        return model.generate(prompt(1, 3).expand(4, -1), 12).tolist()

    torch.manual_seed(1)
    first, second = sample(), sample()
    torch.manual_seed(1)
    assert first == sample() != second
    assert len(set(map(tuple, first))) > 1


# pick


def by_hand(uniform: list[float], **options: float | int | None) -> list[int]:
    """Ids drawn from the probabilities 0.1, 0.4, 0.2, 0.3."""
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64).log().expand(len(uniform), -1)
    draw = torch.tensor(uniform, dtype=torch.float64)[:, None]
    return pick(logits, draw, **{"temperature": 1.0, **options})[:, 0].tolist()  # type: ignore[arg-type]


def test_pick_inverts_the_cumulative_distribution() -> None:
    """Below 0.1 the first, below 0.5 the second, below 0.7 the third, below 1 the last."""
    assert by_hand([0.0, 0.09, 0.11, 0.49, 0.51, 0.69, 0.71, 1 - 1e-16]) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_top_k() -> None:
    """The two likeliest share everything by their odds, 4 to 3; k above the vocabulary changes nothing."""
    assert by_hand([0.0, 0.57, 0.572, 1 - 1e-16], top_k=2) == [1, 1, 3, 3]
    assert by_hand([0.0, 0.5, 0.999], top_k=1) == [1, 1, 1]
    assert by_hand([0.05, 0.95], top_k=100) == [0, 3]


def test_top_k_keeps_all_that_are_equal() -> None:
    """However many; ids are in their order."""
    logits = torch.zeros(2, 1000, dtype=torch.bfloat16)
    logits[:, 500:] = -1.0
    ends = torch.tensor([[0.0], [1 - 2**-53]], dtype=torch.float64)
    assert pick(logits, ends, 1.0, top_k=3)[:, 0].tolist() == [0, 499]


def test_top_p() -> None:
    """The fewest that reach p: 0.4 alone, then with 0.3, then with 0.2."""
    assert by_hand([0.0, 0.999], top_p=0.35) == [1, 1]
    assert by_hand([0.0, 0.57, 0.572, 0.999], top_p=0.6) == [1, 1, 3, 3]
    assert by_hand([0.0, 0.44, 0.45, 0.66, 0.67, 0.999], top_p=0.85) == [1, 1, 2, 2, 3, 3]
    assert by_hand([0.05, 0.95], top_p=1.0) == [0, 3]
    assert by_hand([0.0, 0.999], top_k=2, top_p=0.5) == [1, 1]  # 4/7 reaches it after top_k
    halves = torch.tensor([[1.0, 1.0, 2.0]], dtype=torch.float64).log()
    assert pick(halves, torch.zeros(1, 1).double(), 1.0, top_p=0.5).item() == 2  # reaching it is enough


def test_temperature() -> None:
    """0 takes the likeliest whatever is drawn; 1/2 squares the odds: 1, 16, 4, 9 of 30."""
    assert by_hand([0.0, 0.5, 0.999], temperature=0.0) == [1, 1, 1]
    assert by_hand([0.03, 0.04, 0.56, 0.57, 0.69, 0.71], temperature=0.5) == [0, 1, 1, 2, 2, 3]


def test_what_has_no_probability_is_never_drawn() -> None:
    """Also where the draw is 0 or all but 1 and sums are rounded."""
    logits = torch.full((2, 1000), -torch.inf, dtype=torch.float64)
    logits[:, 100:900] = torch.randn(800, dtype=torch.float64, generator=rng.generator("logits"))
    ends = torch.tensor([[0.0], [1 - 2**-53]], dtype=torch.float64)
    assert pick(logits, ends, 1.0)[:, 0].tolist() == [100, 899]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_padding_of_the_vocabulary_is_never_drawn(model: GPT, temperature: float) -> None:
    """Ids from vocab_size on are not drawn, however large their logits."""
    head = model.lm_head.weight
    huge = torch.nn.Linear(8, 19, bias=True).double()
    with torch.no_grad():
        huge.weight.copy_(head)
        huge.bias.zero_()
        huge.bias[11:] = 1e4
    padded = GPT(model.config).double().eval()
    padded.load_state_dict(model.state_dict())
    padded.lm_head = huge
    idx = prompt(4, 3) % 11
    assert (generate(padded, idx, 12, temperature=temperature, uniform=draws(1, 4, 12))[:, 3:] >= 11).all()
    ids = generate(padded, idx, 12, temperature=temperature, uniform=draws(1, 4, 12), vocab_size=11)
    assert (ids < 11).all()


# The command


def sampled(outcome: Outcome) -> list[str]:
    """The samples of what was printed."""
    assert (outcome.code, outcome.err) == (0, "")
    *texts, rest = outcome.out.split(f"\n{LINE}\n")
    assert rest == ""
    return texts


def test_samples_are_set_apart_by_dashes(folio: Callable[..., Outcome], finished: Path) -> None:
    """Each begins with the prompt and has as many tokens more; another seed is another text."""
    argv = ("sample", f"--out_dir={finished}", "--start=The ", "--num_samples=3", "--max_new_tokens=30", "--device=cpu")
    texts = sampled(folio(*argv))
    assert len(texts) == len(set(texts)) == 3
    assert all(text.startswith("The ") and len(text) == 34 for text in texts)
    assert sampled(folio(*argv)) == texts
    assert sampled(folio(*argv, "--seed=1")) != texts
    assert sampled(folio(*argv, "--num_samples=2")) == texts[:2]


def test_one_sample_streamed_is_the_first_of_a_batch(folio: Callable[..., Outcome], finished: Path) -> None:
    """Character for character, beyond block_size too."""
    argv = ("sample", f"--out_dir={finished}", "--max_new_tokens=60", "--device=cpu", "--dtype=float32")
    (alone,) = sampled(folio(*argv, "--num_samples=1"))
    assert sampled(folio(*argv, "--num_samples=4"))[0] == alone
    assert len(alone) == 61


def test_the_command_imports_little(finished: Path) -> None:
    """Neither torch's compiler nor what draws progress bars: they take longer than the text."""
    argv = [sys.executable, "-X", "importtime", "-m", "folio", "sample", f"--out_dir={finished}", "--device=cpu"]
    done = subprocess.run([*argv, "--max_new_tokens=3"], cwd=ROOT, capture_output=True, text=True, check=True)
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "torch" in modules
    assert not modules & {"torch._dynamo", "torch._inductor", "sympy", "rich"}


def test_a_prompt_from_a_file(folio: Callable[..., Outcome], finished: Path, tmp_path: Path) -> None:
    """FILE:name holds it, longer than block_size here."""
    path = tmp_path / "prompt.txt"
    path.write_text("The river was slow that morning", encoding="utf-8")
    argv = ("sample", f"--out_dir={finished}", f"--start=FILE:{path}", "--num_samples=1", "--max_new_tokens=5")
    (text,) = sampled(folio(*argv, "--temperature=0"))
    assert text.startswith("The river was slow that morning")
    assert len(text) == 31 + 5
    assert sampled(folio(*argv, "--temperature=0", "--seed=9")) == [text]  # nothing is drawn


@pytest.mark.parametrize("end", ["\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "mark"])
def test_a_prompt_is_read_as_a_text_is_prepared(finished: Path, tmp_path: Path, end: str, mark: str) -> None:
    """The ids of the same file, whatever its line ends; a byte order mark is no character of either."""
    lines = STORY.read_text(encoding="utf-8").splitlines()[:20]
    path, data = tmp_path / "a.txt", tmp_path / "data"
    path.write_bytes((mark + end.join(lines)).encode())
    prepare(named_by_user([str(path)], "a", tokenizer="char"), data)
    spec = json.loads((data / "meta.json").read_text())["tokenizer"]
    text, ids = encode_prompt("start", f"FILE:{path}", from_json(spec), GPTConfig(vocab_size=99))
    assert text == "\n".join(lines)
    prepared = [np.fromfile(data / f"{split}.bin", np.uint16) for split in ("train", "val")]
    assert ids == np.concatenate(prepared).tolist()


@pytest.mark.parametrize("kind", ["a pipe", "a device", "a folder"])
def test_a_prompt_that_never_ends(folio: Callable[..., Outcome], finished: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "prompt"
    {"a pipe": make_pipe, "a folder": os.mkdir, "a device": lambda p: os.symlink("/dev/zero", p)}[kind](path)
    assert_refused(folio("sample", f"--out_dir={finished}", f"--start=FILE:{path}"), f"{path} is {kind}, not a file")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--start="], "start is empty: give at least one token to continue"),
        (["--start=The €"], "characters lacks '€'"),
        (["--start=FILE:nowhere.txt"], "nowhere.txt: No such file or directory"),
        (["--checkpoint=7"], "no checkpoint '7' in"),
        (["--init_from=resme"], "did you mean 'resume'?"),
        (["--temperature=-1"], "temperature=-1.0: must be at least 0"),
        (["--top_p=0"], "top_p=0.0: must be above 0"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_be_sampled(folio: Callable[..., Outcome], finished: Path, argv: list[str], message: str) -> None:
    """One line that names it, and exit code 2."""
    outcome = folio("sample", f"--out_dir={finished}", *argv)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert message in outcome.err
