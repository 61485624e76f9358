"""The runtime of one process, and of two that exchange gradients."""

from __future__ import annotations

import json
import math
import platform
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LINUX, python

from folio import rng
from folio.config.options import System
from folio.machine.choices import resolve
from folio.machine.runtime import Runtime
from folio.model.config import GPTConfig
from folio.model.gpt import GPT
from folio.training.optimizers import adamw

CPU = System(device="cpu", dtype="float32", compile=False, matmul_precision="highest")
SHAPE = GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=8)

# Writes what each of two ranks computes, as JSON
TWO_RANKS = """
import hashlib, json, sys
from pathlib import Path
import torch
from folio import rng
from folio.config.options import System
from folio.model.config import GPTConfig
from folio.model.gpt import GPT
from folio.training.optimizers import adamw
from folio.machine.choices import resolve
from folio.machine.launch import exit_process
from folio.machine.runtime import Runtime

runtime = Runtime(resolve(System(device="cpu", dtype="float32", compile=False, matmul_precision="highest")))
seen = {"world": runtime.world}
rank = runtime.rank
seen["sum"] = runtime.reduce(torch.tensor([1.0 + rank, 10.0])).tolist()

calls = []
def value():
    calls.append(rank)
    return {"from": rank, "list": [1, 2]}
seen["broadcast"], seen["calls"] = runtime.broadcast(value), calls
for kind in (ValueError, FileNotFoundError):
    def wrong():
        raise kind(f"rank {rank} found it")
    try:
        runtime.broadcast(wrong)
    except (ValueError, OSError) as error:
        seen[kind.__name__] = [type(error).__name__, str(error)]
seen["sum after errors"] = runtime.reduce(torch.tensor([1.0])).tolist()

model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=8), lambda name: rng.generator(name))
optimizer = adamw(model, 1e-2, (0.9, 0.95), 0.1)
loss = runtime.wrap(model, (2, 8))
def gradients():
    return torch.cat([p.grad.flatten() for p in model.parameters()]).tolist()
seen["none at first"] = all(p.grad is None for p in model.parameters())
rows = torch.randint(11, (4, 2, 9), generator=rng.generator("rows"))
for micro in range(2):
    batch = rows[2 * micro + rank]
    with runtime.sync(loss, last=micro == 1):
        nats, _ = loss(batch[:, :-1], batch[:, 1:])
        runtime.backward(nats)
    seen[f"gradients {micro}"] = gradients()
runtime.step(optimizer, 1e-2, 1.0, torch.stack([nats.detach(), torch.tensor(16.0)]))
weights, slots = runtime.full_state(model, optimizer)
assert all(t.is_contiguous() and t.device.type == "cpu" and not t.requires_grad for t in {**weights, **slots}.values())
seen["names"] = [*weights, *slots]
mine = {n: p.detach() for n, p in model.named_parameters()}
mine |= {f"{n}/{s}": v for n, p in model.named_parameters() for s, v in optimizer.state[p].items()}
seen["mine"], seen["gathered"] = (
    hashlib.sha256(b"".join(t[n].numpy().tobytes() for n in t)).hexdigest() for t in (mine, weights | slots)
)
Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(seen))
runtime.close()
exit_process(0)
"""


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """One thread: the same bits each time, and no waiting for cores that other processes use."""
    torch.set_num_threads(1)


def torchrun(ranks: int, *argv: str | Path) -> Any:
    """Runs a command on so many processes."""
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}")
    return python(*launcher, *argv, OMP_NUM_THREADS="1")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of TWO_RANKS, by rank."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "two.py").write_text(TWO_RANKS)
    done = torchrun(2, folder / "two.py", folder)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def trainer() -> tuple[GPT, torch.optim.AdamW, Runtime]:
    """A model, its optimizer and the runtime of one process."""
    torch.manual_seed(1)
    model = GPT(SHAPE)
    return model, adamw(model, 1e-2, (0.9, 0.95), 0.1), Runtime(resolve(CPU))


def step(model: GPT, optimizer: torch.optim.AdamW, runtime: Runtime, loss: float = 1.0, norm: float = 1.0) -> None:
    """A backward pass of ``norm`` times the loss, and an update after this loss."""
    runtime.backward(model.loss(torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]]))[0] * norm)
    runtime.step(optimizer, 1e-2, 1.0, torch.tensor([loss, 1.0]))


def snapshot(model: GPT, optimizer: torch.optim.AdamW, runtime: Runtime) -> dict[str, list[Any]]:
    weights, slots = runtime.full_state(model, optimizer)
    return {name: t.flatten().tolist() for name, t in {**weights, **slots}.items()}


# One process


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_nothing_is_updated_after_a_loss_that_is_not_finite(loss: float, norm: float) -> None:
    """Neither weights nor moments nor the count of updates, in that step and in all later ones."""
    parts = trainer()
    empty = snapshot(*parts)
    step(*parts)
    good = snapshot(*parts)
    assert good != empty
    step(*parts, loss=loss, norm=norm)
    assert snapshot(*parts) == good
    step(*parts)
    assert snapshot(*parts) == good
    assert all(p.grad is None for p in parts[0].parameters())


def test_clip() -> None:
    """``clip`` returns the norm of all gradients together; max_norm 0 leaves them as they are."""
    model, optimizer, runtime = trainer()
    runtime.backward(model.loss(torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]]))[0])

    def norm() -> float:
        return math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters() if p.grad is not None))

    before = norm()
    assert runtime.clip(optimizer, 0.0)[0].item() == pytest.approx(before)
    assert norm() == pytest.approx(before)
    assert runtime.clip(optimizer, 0.5)[0].item() == pytest.approx(before)
    assert norm() == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_arithmetic_has_the_chosen_dtype(dtype: str) -> None:
    """Products have that dtype; weights and loss are float32."""
    model = GPT(SHAPE)
    runtime = Runtime(resolve(System(device="cpu", dtype=dtype, compile=False)))  # type: ignore[arg-type]
    seen: list[torch.dtype] = []
    model.transformer.h[0].mlp.c_fc.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    nats, counted = runtime.wrap(model, (2, 2))(torch.tensor([[1, 2]]), torch.tensor([[2, -1]]))
    assert seen == [getattr(torch, dtype)]
    assert nats.dtype == model.lm_head.weight.dtype == torch.float32
    assert counted.item() == 1
    assert runtime.scaler.is_enabled() == (dtype == "float16")


# Two processes


def test_reduce_sums(two: list[dict[str, Any]]) -> None:
    """Over all ranks, on all ranks, after an error too."""
    assert [seen["world"] for seen in two] == [2, 2]
    assert [seen["sum"] for seen in two] == [[3.0, 20.0]] * 2
    assert [seen["sum after errors"] for seen in two] == [[2.0]] * 2


def test_broadcast_returns_rank_0s_value(two: list[dict[str, Any]]) -> None:
    """Its value or its error; the other ranks do not call the function."""
    assert [seen["broadcast"] for seen in two] == [{"from": 0, "list": [1, 2]}] * 2
    assert [seen["calls"] for seen in two] == [[0], []]
    for kind in ("ValueError", "FileNotFoundError"):
        assert [seen[kind] for seen in two] == [[kind, "rank 0 found it"]] * 2


def test_gradients_are_exchanged_in_the_last_micro_step(two: list[dict[str, Any]]) -> None:
    """Before it each rank has its own gradients; after it all have the mean over the ranks of their sums."""
    assert all(seen["none at first"] for seen in two)
    own = [torch.tensor(seen["gradients 0"]) for seen in two]
    assert not torch.allclose(own[0], own[1])
    assert two[0]["gradients 1"] == two[1]["gradients 1"]
    model = GPT(SHAPE, lambda name: rng.generator(name))
    rows = torch.randint(11, (4, 2, 9), generator=rng.generator("rows"))
    for batch in rows:
        (model.loss(batch[:, :-1], batch[:, 1:])[0] / 2).backward()
    alone = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(torch.tensor(two[0]["gradients 1"]), alone, rtol=1e-4, atol=1e-5)


def test_full_state_is_gathered_on_rank_0(two: list[dict[str, Any]]) -> None:
    """All weights by name, all optimizer tensors as <parameter>/<slot>, the same bits as on each rank."""
    assert two[0]["gathered"] == two[0]["mine"] == two[1]["mine"]
    names = [name for name, _ in GPT(SHAPE).named_parameters()]
    slots = {f"{name}/{slot}" for name in names for slot in ("step", "exp_avg", "exp_avg_sq")}
    assert set(two[0]["names"]) == {*names, *slots}
    assert two[1]["names"] == []


class _IgnoresFoundInf(torch.optim.AdamW):
    """Fused AdamW on MPS, where torch's kernels ignore ``found_inf``."""

    def step(self, closure: Any = None) -> None:
        self.found_inf = None
        super().step(closure)


@pytest.mark.parametrize("norm", [1.0, math.nan])
def test_an_update_is_left_out_on_mps(norm: float) -> None:
    """By the host, since its kernels do not; here on a CPU, in whose place the runtime believes to have MPS."""
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.full((3,), norm)
    optimizer = _IgnoresFoundInf([weight], lr=0.1, fused=True)
    runtime = Runtime(resolve(CPU))
    runtime.device = torch.device("mps")
    left_out, *_ = runtime.step(optimizer, 0.1, 0.0, torch.tensor([1.0, 1.0])).tolist()
    assert left_out == math.isnan(norm)
    assert torch.equal(weight.detach(), torch.ones(3)) == math.isnan(norm)


PAGE_FAULTS = """
import resource, torch
from folio.machine.runtime import keep_freed_memory

def step():
    return [torch.zeros(1 << 19) for _ in range(10)]  # 2 MB each

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
before = faults()
keep_freed_memory()
step()
print(before, faults())
"""


@LINUX
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_kept_for_the_next_step() -> None:
    """The system gives 20 MB again and again before, and once after."""
    before, after = map(int, python("-c", PAGE_FAULTS).stdout.split())
    assert after < 1000 < before
