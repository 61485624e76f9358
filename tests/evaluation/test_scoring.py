"""Scores are those of each continuation alone behind its context, however they are put together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import python

from folio.config.options import System
from folio.evaluation import scoring
from folio.evaluation.scoring import Query, Scores, cut_to_context, score
from folio.generation.sampling import generate
from folio.machine.choices import resolve
from folio.machine.runtime import Runtime
from folio.model.config import GPTConfig
from folio.model.gpt import GPT

BLOCK, VOCAB = 24, 67


def model_of(dropout: float = 0.0, **shape: Any) -> GPT:
    """Far from indifference, in each position and token."""
    shape = {"block_size": BLOCK, "vocab_size": VOCAB, "n_layer": 2, "n_head": 2, "n_embd": 32, **shape}
    model, generator = GPT(GPTConfig(**shape, dropout=dropout)), torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        p.data = torch.randn(p.shape, generator=generator) * 0.3 + (p.dim() == 1 and name.endswith("weight"))
    return model


def wrapped(model: GPT, dtype: str = "float32") -> Runtime:
    runtime = Runtime(resolve(System(device="cpu", dtype=dtype, compile=False, matmul_precision="highest")))
    runtime.wrap(model, None)
    return runtime


def queries(seed: int = 0, count: int = 12) -> list[Query]:
    """Of all lengths that a model takes: contexts and continuations of one token too, and of the whole context."""
    rng = np.random.default_rng(seed)

    def ids(length: int) -> list[int]:
        return rng.integers(VOCAB, size=length).tolist()

    found = [Query(ids(1), [ids(BLOCK), ids(1)]), Query(ids(BLOCK), [ids(1), ids(1), ids(1)]), Query(ids(5), [ids(9)])]
    while len(found) < count:
        context = int(rng.integers(1, BLOCK))
        lengths = rng.integers(1, BLOCK + 2 - context, size=rng.integers(1, 6))
        found.append(Query(ids(context), [ids(length) for length in lengths]))
    return found


@torch.no_grad()
def one_at_a_time(model: GPT, queries: Sequence[Query]) -> Scores:
    """The plain computation; in float64 for a model in float64."""
    nats, likeliest = [], []
    for context, continuations in queries:
        for continuation in continuations:
            x = model.hidden(torch.tensor([[*context, *continuation[:-1]]]))
            log_p = model.lm_head(x)[0, len(context) - 1 :].log_softmax(-1)
            target = torch.tensor(continuation)
            nats.append(-log_p.gather(1, target[:, None]).sum().item())
            likeliest.append(bool((log_p.argmax(1) == target).all()))
    return Scores(np.array(nats), np.array(likeliest))


def assert_close(found: Scores, wanted: Scores, atol: float) -> None:
    assert np.abs(found.nats - wanted.nats).max() < atol
    assert found.likeliest.tolist() == wanted.likeliest.tolist()


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-4), (torch.float64, 2e-5)])
@pytest.mark.parametrize("tokens", [1, 50, 10**6])
def test_as_one_at_a_time(monkeypatch, dtype, atol, tokens) -> None:
    """Whatever a batch holds; in float64 but for the logits, which are rounded to float32."""
    monkeypatch.setitem(scoring._TOKENS, "cpu", tokens)
    model = model_of().to(dtype)
    assert_close(score(model, queries(), wrapped(model)), one_at_a_time(model, queries()), atol)


def test_together_and_apart() -> None:
    """One row of many continuations, longer than the model's context, has the scores of many rows."""
    model = model_of().double()
    runtime = wrapped(model)
    together = queries()
    assert max(q.length for q in together) > BLOCK
    apart = [Query(q.context, [c]) for q in together for c in q.continuations]
    assert_close(score(model, together, runtime), score(model, apart, runtime), 2e-5)


def test_the_order_of_queries() -> None:
    """Scores come in the order of the queries, whose batches are by length."""
    model = model_of()
    runtime = wrapped(model)
    there, back = score(model, queries(), runtime), score(model, queries()[::-1], runtime)
    sizes = [len(q.continuations) for q in queries()]
    parts = np.split(there.nats, np.cumsum(sizes)[:-1])
    assert np.allclose(np.concatenate(parts[::-1]), back.nats, atol=1e-4, rtol=0)


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_continuations_do_not_see_each_other(changed) -> None:
    """Not one bit of the others' scores."""
    model = model_of()
    runtime = wrapped(model)
    context, parts = [1, 2, 3], [[4, 5, 6, 7], [8, 9, 10], [11, 12, 13, 14, 15]]
    before = score(model, [Query(context, parts)], runtime).nats
    parts[changed] = [(i + 30) % VOCAB for i in parts[changed]]
    after = score(model, [Query(context, parts)], runtime).nats
    assert [a == b for a, b in zip(before, after, strict=True)] == [i != changed for i in range(3)]


def test_the_same_continuation_twice() -> None:
    """Places in the row do not matter, but for rounding."""
    model = model_of().double()
    first, _, last = score(model, [Query([1, 2], [[3, 4, 5], [6, 7], [3, 4, 5]])], wrapped(model)).nats
    assert abs(first - last) < 1e-6


def test_likeliest() -> None:
    """Of a greedy continuation every token; not where any one of them is another."""
    model = model_of()
    context = [5, 6, 7]
    greedy = generate(model, torch.tensor([context]), 6, temperature=0)[0, 3:].tolist()
    others = [[(t + (i == place)) % VOCAB for i, t in enumerate(greedy)] for place in range(6)]
    found = score(model, [Query(context, [greedy, *others, greedy[:1]])], wrapped(model))
    assert found.likeliest.tolist() == [True, *[False] * 6, True]


def test_fitted() -> None:
    """Of each continuation and its context the last ``block_size`` + 1 tokens, at least one of them for context."""
    rng = np.random.default_rng(1)
    for _ in range(500):
        context = list(range(int(rng.integers(1, 40))))
        sizes = rng.integers(1, 40, size=rng.integers(1, 5)).tolist()
        query = Query(context, [list(range(100 * i, 100 * i + size)) for i, size in enumerate(sizes, 1)])
        block_size = int(rng.integers(1, 40))
        parts = cut_to_context(query, block_size)
        if len(context) + max(sizes) <= block_size + 1:
            assert parts == [query]
            continue
        for part, whole in zip(parts, query.continuations, strict=True):
            (kept,) = part.continuations
            assert kept == whole[-block_size:]
            assert [*part.context, *kept] == [*context, *whole][-(block_size + 1) :]


def test_fitted_queries_fit() -> None:
    model = model_of()
    long = [Query(list(range(30)), [[1, 2, 3], list(range(40))]), Query([1], [list(range(BLOCK + 9))])]
    parts = [part for query in long for part in cut_to_context(query, BLOCK)]
    assert_close(score(model, parts, wrapped(model)), one_at_a_time(model, parts), 1e-4)


def test_a_model_in_training() -> None:
    """No dropout, no gradients; the model is back in training mode afterwards."""
    model = model_of(dropout=0.5)
    runtime = wrapped(model)
    model.train()
    before = torch.get_rng_state()
    found = score(model, queries(), runtime)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(part.training for part in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert_close(found, one_at_a_time(model_of(), queries()), 1e-4)
    model.eval()
    score(model, queries(), runtime)
    assert not any(part.training for part in model.modules())


def test_bfloat16() -> None:
    """Its arithmetic, and close to float32's."""
    exact = score(model := model_of(), queries(), wrapped(model)).nats
    rounded = score(model := model_of(), queries(), wrapped(model, "bfloat16")).nats
    assert 0 < np.abs(rounded / exact - 1).max() < 0.05
    assert abs(rounded.sum() / exact.sum() - 1) < 0.005


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, in what it imports to compile
def test_beside_a_compiled_loss(request) -> None:
    """Scoring compiles nothing, and leaves nothing to be compiled anew."""
    request.addfinalizer(torch.compiler.reset)
    model = model_of()
    runtime = Runtime(resolve(System(device="cpu", dtype="float32", compile=True, matmul_precision="highest")))
    loss = runtime.wrap(model, None)
    idx = torch.arange(2 * BLOCK).view(2, BLOCK)
    before = loss(idx, idx)[0].item()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with torch.compiler.set_stance("fail_on_recompile"):
        found = score(model, queries(), runtime)
        assert loss(idx, idx)[0].item() == before
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs > 0
    assert_close(found, one_at_a_time(model_of(), queries()), 1e-4)


# Several processes

SCRIPT = """
import json, sys
sys.path[:0] = ["tests", "tests/evaluation"]
from test_scoring import model_of, queries
from folio.evaluation import scoring
from folio.config.options import Processes, System
from folio.machine.choices import resolve
from folio.machine.launch import exit_process
from folio.machine.runtime import Runtime

out, parallel = sys.argv[1:]
scoring._TOKENS["cpu"] = 90
system = System(device="cpu", dtype="float32", compile=False, matmul_precision="highest")
runtime = Runtime(resolve(system, Processes(parallel=parallel)))
model = model_of(dropout=0.5)
runtime.wrap(model, (4, 16) if parallel == "ddp" else None)
found = scoring.score(model, queries(count=30), runtime)
few = scoring.score(model, queries()[:1], runtime)
told = [found.nats.tolist(), found.likeliest.tolist(), few.nats.tolist()]
print(json.dumps(told), file=open(f"{out}-{runtime.rank}.json", "w"))
runtime.close()
exit_process(0)
"""


def on_ranks(folder: Path, ranks: int, parallel: str) -> list[Any]:
    """What every rank finds, once: it is one and the same."""
    (folder / "ranks.py").write_text(SCRIPT)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    done = python(*launcher, folder / "ranks.py", folder / f"out{ranks}", parallel)
    assert done.returncode == 0, done.stderr
    first, *others = (json.loads((folder / f"out{ranks}-{rank}.json").read_text()) for rank in range(ranks))
    assert all(other == first for other in others)
    return first


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "parallel"), [(3, "ddp"), (2, "fsdp")])
def test_several_processes(tmp_path, monkeypatch, ranks, parallel) -> None:
    """The bits of one process, as its batches are the same; with less to do than there are ranks, too."""
    monkeypatch.setitem(scoring._TOKENS, "cpu", 90)
    model = model_of()
    runtime = wrapped(model)
    alone, few = score(model, queries(count=30), runtime), score(model, queries()[:1], runtime)
    nats, likeliest, few_nats = on_ranks(tmp_path, ranks, parallel)
    assert (nats, few_nats, likeliest) == (alone.nats.tolist(), few.nats.tolist(), alone.likeliest.tolist())
