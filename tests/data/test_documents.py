"""Attention within documents: how documents are found, and that each is computed as if it were alone."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from conftest import SMALL, Outcome, python
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from folio import rng
from folio.checkpoints import checkpoint, find
from folio.config.options import System
from folio.data.documents import Documents
from folio.data.folders import open_folder
from folio.data.rows import Tokens
from folio.files import sha256
from folio.machine.choices import resolve
from folio.machine.runtime import Runtime
from folio.machine.wrap import Objective
from folio.model.attention import within_documents
from folio.model.config import GPTConfig
from folio.model.gpt import GPT
from folio.records import run_folder
from folio.records.metrics import read_metrics

GPT2_EOT = 50256
Ids = NDArray[np.uint16]


def texts(count: int, seed: int, eot: int, first: bool) -> Ids:
    """``count`` documents of 1 to 25 ids from 1 to 30, with an end-of-text before or after each."""
    random, found = np.random.default_rng(seed), []
    for length in random.integers(1, 25, count):
        document = np.minimum(random.geometric(0.15, length), 30).tolist()
        found += [eot, *document] if first else [*document, eot]
    return np.array(found, dtype=np.uint16)


def lay(folder: Path, eot: int, first: bool, meta: str = "") -> Path:
    """Shards of build-nanogpt, with documents that cross shards; with ``meta``, Folio's, whose ``eot`` it is."""
    folder.mkdir()
    ids, files = texts(120, 1, eot, first), {}
    within = np.flatnonzero((ids != eot)[1:] & (ids != eot)[:-1]) + 1  # only the first shard begins with a document
    cuts = [within[len(within) // 3], within[len(within) * 2 // 3]]
    for name, shard in zip(("val_000000", "train_000001", "train_000002"), np.split(ids, cuts), strict=True):
        np.save(folder / f"{name}.npy", shard)
        listed = {"name": f"{name}.npy", "tokens": len(shard), "sha256": sha256(folder / f"{name}.npy")}
        files.setdefault(name.split("_")[0], []).append(listed)
    if meta:
        about = {"vocab_size": 50257, "dtype": "uint16", "tokenizer": {"kind": "tiktoken", "name": "gpt2"}, "eot": meta}
        about["splits"] = {split: {"files": found} for split, found in files.items()}
        (folder / "meta.json").write_text(json.dumps(about))
    return folder


def segments(x: NDArray[Any], eot: int, first: bool) -> Iterator[slice]:
    """The documents in a row of inputs, found by a loop."""
    begin = 0
    for i in range(1, len(x)):
        if x[i if first else i - 1] == eot:
            yield slice(begin, i)
            begin = i
    yield slice(begin, len(x))


# Numbers


@pytest.mark.parametrize(
    ("row", "before", "after"),
    [
        ([9, 1, 2, 9, 3, 9, 9, 4], [1, 1, 1, 2, 2, 3, 4], [0, 1, 1, 1, 2, 2, 3]),
        ([1, 2, 9, 3, 4, 5, 6, 9], [0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1]),
        ([1, 2, 3, 4, 5, 6, 9, 7], [0, 0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0]),
        ([1, 2, 9, 3, -1, -1, -1, -1], [0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1]),
        ([1, 2, 3, 4, 5, 6, 7, 8], [0] * 7, [0] * 7),
    ],
)
def test_the_number_of_each_tokens_document(row: list[int], before: list[int], after: list[int]) -> None:
    """An end-of-text begins or ends a document; a row may begin within a document."""
    rows = np.array([row, [9] * 8], dtype=np.int64)
    found = [Documents(9, first)(rows) for first in (True, False)]
    assert [numbers[0].tolist() for numbers in found] == [before, after]
    assert [numbers[1].tolist() for numbers in found] == [list(range(1, 8)), list(range(7))]
    assert {(numbers.dtype.name, numbers.shape) for numbers in found} == {("int32", (2, 7))}


# The model


def small(T: int, heads: int = 2) -> GPT:
    torch.manual_seed(1)
    model = GPT(GPTConfig(block_size=T, vocab_size=31, n_layer=2, n_head=heads, n_embd=16))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)  # so large that attention to a masked token would change the result
    return model


def batch(T: int, first: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Three rows of documents, the last one cut off: inputs, targets, document numbers."""
    rows = np.stack([texts(T, seed, 0, first)[seed * 5 :][: T + 1] for seed in (1, 2, 3)]).astype(np.int64)
    documents = torch.from_numpy(Documents(0, first)(rows))
    rows[2, T // 2 :] = -1
    found = torch.from_numpy(rows)
    return found[:, :-1].clamp(min=0), found[:, 1:], documents


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("T", [24, 300])
def test_documents_are_as_if_alone(T: int, grad: bool, first: bool) -> None:
    """States, loss and gradients are those of a forward pass of each document, with positions from 0."""
    model, (idx, targets, documents) = small(T).double(), batch(T, first)
    apart = []
    for row, numbers in zip(idx, documents, strict=True):
        changes = (numbers.diff().nonzero().flatten() + 1).tolist()
        apart += [row[a:b] for a, b in zip([0, *changes], [*changes, T], strict=True)]
    assert len(apart) > 2 * T // 25
    with torch.set_grad_enabled(grad):
        positions, mask = within_documents(documents)
        together = model.hidden(idx, positions=positions, mask=mask)
        alone = torch.cat([model.hidden(part[None])[0] for part in apart]).view(3, T, -1)
        torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)
        losses = [
            F.cross_entropy(model.lm_head(h).flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum")
            for h in (together, alone)
        ]
        runtime = Runtime(resolve(System(device="cpu", dtype="float32", compile=False, matmul_precision="highest")))
        nats, counted = runtime.wrap(model, None)(idx, targets, documents)
        assert counted.item() == (targets != -1).sum().item()
        assert nats.item() == pytest.approx(losses[1].item(), rel=1e-6)
        assert (model.hidden(idx) - together).abs().max() > 0.1  # the mask makes a difference
    if grad:
        parameters = list(model.parameters())
        for mine, theirs in zip(*(torch.autograd.grad(loss, parameters) for loss in losses), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("T", [24, 300])
def test_flex_attention_gives_the_same_states(T: int) -> None:
    """The block mask and the dense one give the same states, at the same positions."""
    model, (idx, _, documents) = small(T), batch(T, True)
    (positions, dense), (again, blocks) = within_documents(documents), within_documents(documents, flex=True)
    assert isinstance(dense, Tensor)
    assert not isinstance(blocks, Tensor)
    assert torch.equal(positions, again)
    with torch.no_grad():
        states = [model.hidden(idx, positions=positions, mask=mask) for mask in (dense, blocks)]
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-5)


# How documents are found


@pytest.mark.parametrize(
    ("eot", "first", "meta", "asked", "way", "source"),
    [
        (GPT2_EOT, True, "", "auto", "begins", "the files in"),
        (GPT2_EOT, False, "", "auto", "ends", "the files in"),
        (31, True, "", 31, "begins", "the files in"),
        (31, False, "", 31, "ends", "the files in"),
        (GPT2_EOT, False, "after", "auto", "ends", "meta file"),
        (GPT2_EOT, True, "before", "auto", "begins", "meta file"),
        (GPT2_EOT, True, "after", "auto", "ends", "meta file"),  # the meta file decides
    ],
)
def test_whether_the_end_of_text_is_first_or_last(
    tmp_path: Path, eot: int, first: bool, meta: str, asked: int | Literal["auto"], way: str, source: str
) -> None:
    """The meta file says so; without one it is first if a file begins with it, else last."""
    tokens = Tokens([open_folder(lay(tmp_path / "data", eot, first, meta))], 16)
    tokens, said = tokens.with_documents(asked)
    assert said.startswith(f"token {eot} {way} a document, by ")
    assert source in said
    assert str(tmp_path / "data") in said
    assert tokens.documents == Documents(eot, way == "begins")


def test_characters_with_an_id_given_as_end_of_text(tmp_path: Path) -> None:
    """--eot works for files whose tokenizer has no end-of-text."""
    lay(tmp_path / "data", 0, False)
    characters = "".join(map(chr, range(97, 128)))
    meta = {"vocab_size": 31, "itos": dict(enumerate(characters))}
    (tmp_path / "data" / "meta.pkl").write_bytes(pickle.dumps(meta))
    tokens = Tokens([open_folder(tmp_path / "data")], 16)
    assert tokens.with_documents(0)[1].startswith("token 0 ends a document")


def of_an_unknown_tokenizer(folder: Path) -> None:
    """datatrove's files of a tokenizer that Folio does not know."""
    folder.mkdir()
    for split in ("train", "val"):
        ids = texts(40, 1, 0, False)
        ids.tofile(folder / f"{split}.ds")
        np.array([len(ids)], dtype="<u8").tofile(folder / f"{split}.ds.index")
        (folder / f"{split}.ds.metadata").write_text(f"HuggingFaceTB/SmolLM-135M|2\n{len(ids)}\n{len(ids)}")


REFUSED: dict[str, tuple[Callable[[Path], object], list[str], list[str]]] = {
    "characters": (lambda d: None, [], ["has no known token between documents", "--eot"]),
    "no end-of-text": (lambda d: lay(d, 0, True), [], ["no token 50256 near the beginning", "--document_mask=False"]),
    "not in the files": (lambda d: lay(d, 0, True), ["--eot=40"], ["no token 40 near the beginning", "--eot"]),
    "not in files with a meta file": (lambda d: lay(d, GPT2_EOT, True, "before"), ["--eot=40"], ["no token 40"]),
    "unknown tokenizer": (of_an_unknown_tokenizer, [], ["HuggingFaceTB/SmolLM-135M", "--eot"]),
    "mixture": (
        lambda d: (lay(d, GPT2_EOT, True), lay(d.parent / "other", GPT2_EOT, False)),
        ["--data_mixture={0}=0.5,{0}/../other=0.5"],
        ["documents are separated in different ways in"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_documents_that_cannot_be_found(folio: Callable[..., Outcome], story: Path, tmp_path: Path, case: str) -> None:
    """One line names the files and the remedy; nothing is written."""
    lie, flags, words = REFUSED[case]
    lie(tmp_path / "data")
    data = tmp_path / "data" if case != "characters" else story
    argv = ["--document_mask", f"--out_dir={tmp_path / 'out'}", *(flag.format(data) for flag in flags)]
    outcome = folio("train", *SMALL, f"--data_dir={data}", *argv)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1), outcome
    assert [word for word in [str(data), *words] if word not in outcome.err] == [], outcome.err
    assert not (tmp_path / "out").exists()


# The train command

RUN = [*SMALL, "--document_mask", "--eot=0", "--vocab_size=32", "--learning_rate=1e-2", "--eval_iters=0"]


@torch.no_grad()
def nats(model: GPT, x: NDArray[Any], y: NDArray[Any], first: bool) -> float:
    """The loss of a row, summed over its documents, each computed alone."""
    total = 0.0
    for part in segments(x, 0, first):
        inputs, targets = (torch.from_numpy(a[part].astype(np.int64)) for a in (x, y))
        total += model.loss(inputs[None], targets[None])[0].item()
    return total


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_training_under_the_mask(folio: Callable[..., Outcome], tmp_path: Path, first: bool) -> None:
    """The first train loss and the last validation loss are those of single documents; a resumed run is exact."""
    data = lay(tmp_path / "data", 0, first)
    six = folio("train", *RUN, f"--data_dir={data}", f"--out_dir={tmp_path / 'six'}", "--max_iters=6")
    three = folio("train", *RUN, f"--data_dir={data}", f"--out_dir={tmp_path / 'three'}", "--max_iters=3")
    resumed = folio("train", f"--out_dir={tmp_path / 'three'}", "--init_from=resume", "--max_iters=6")
    assert [(o.code, o.err) for o in (six, three, resumed)] == [(0, "")] * 3
    way = "begins" if first else "ends"
    for outcome in (six, resumed):
        said = f"attention stays within documents: token 0 {way} a document, by the files in {data}"
        assert said in outcome.out
    assert "exact to rounding" not in resumed.out
    for name in ("model.safetensors", "optimizer.safetensors"):
        a, b = (run_folder.checkpoint_folder(tmp_path / out, 6) / name for out in ("six", "three"))
        assert a.read_bytes() == b.read_bytes()
    records = read_metrics(tmp_path / "six" / "metrics.jsonl")
    found = find.choose(tmp_path / "six")
    shape = GPTConfig(**found.state["model"])
    model = GPT(shape, lambda name: rng.generator(1337, name))
    rows = Tokens([open_folder(data)], 16).rows("train", 0, 8)
    expected = sum(nats(model, row[:-1], row[1:], first) for row in rows) / (8 * 16)
    assert next(r["loss"] for r in records if r["kind"] == "train") == pytest.approx(expected, abs=1e-5)
    checkpoint.load_weights(model, found.weights())
    ids = np.load(data / "val_000000.npy")
    windows = [(ids[i : i + 16][: len(ids) - 1 - i], ids[i + 1 : i + 17]) for i in range(0, len(ids) - 1, 16)]
    expected = sum(nats(model, x, y, first) for x, y in windows) / (len(ids) - 1)
    assert [r["val_loss"] for r in records if r["kind"] == "eval"][-1] == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_two_ranks_under_the_mask(tmp_path: Path) -> None:
    """Every loss is that of one process, also with dropout."""
    data, losses = lay(tmp_path / "data", 0, True), []
    group = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    for name, how in (("one", ()), ("two", group)):
        argv = [*RUN, "--dropout=0.1", f"--data_dir={data}", f"--out_dir={tmp_path / name}"]
        done = python(*how, "train.py", *argv)
        assert done.returncode == 0, done.stderr
        assert "attention stays within documents: token 0 begins a document" in done.stdout
        records = read_metrics(tmp_path / name / "metrics.jsonl")
        losses.append([r[key] for r in records for key in ("loss", "train_loss", "val_loss") if key in r])
    assert len(losses[0]) == 10 + 2 * 3
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.filterwarnings("default::DeprecationWarning")  # of torch 2.11's compiler
def test_documents_train_on_a_gpu(heads: int) -> None:
    """Loss and gradients on CUDA are those of the CPU: with FlexAttention, and for heads too narrow for it."""
    found = []
    for device in map(torch.device, ("cpu", "cuda")):
        model = small(256, heads).to(device)
        nats, _ = Objective(model, model.loss, device, torch.float32)(*(t.to(device) for t in batch(256, first=True)))
        nats.backward()
        found.append([nats.detach().cpu(), *(p.grad.cpu() for p in model.parameters() if p.grad is not None)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
