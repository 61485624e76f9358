"""Checkpoints of build-nanogpt and GPT-from-scratch give their models' logits, and train on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from conftest import python
from pt_contents import (
    BUILD,
    Folio,
    pickled_as,
    saved,
    stepped,
)
from torch import Tensor, nn
from torch.nn import functional as F

from folio.checkpoints import find, pt_files


def attention(x: Tensor, qkv: Tensor, heads: int) -> Tensor:
    q, k, v = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=2))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)


class BuildNanoGPT(nn.Module):
    """build-nanogpt's model, 2 × 16 wide with 2 heads."""

    def __init__(self) -> None:
        super().__init__()
        C = 16
        blocks = [
            {
                "ln_1": nn.LayerNorm(C),
                "attn": nn.ModuleDict({"c_attn": nn.Linear(C, 3 * C), "c_proj": nn.Linear(C, C)}),
                "ln_2": nn.LayerNorm(C),
                "mlp": nn.ModuleDict({"c_fc": nn.Linear(C, 4 * C), "c_proj": nn.Linear(4 * C, C)}),
            }
            for _ in range(2)
        ]
        parts = {
            "wte": nn.Embedding(128, C),
            "wpe": nn.Embedding(16, C),
            "h": nn.ModuleList(map(nn.ModuleDict, blocks)),
        }
        self.transformer = nn.ModuleDict({**parts, "ln_f": nn.LayerNorm(C)})
        self.lm_head = nn.Linear(C, 128, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight

    def forward(self, idx: Tensor) -> Tensor:
        body = self.transformer
        x = body["wte"](idx) + body["wpe"].weight[: idx.size(1)]
        for block in body["h"]:
            x = x + block["attn"]["c_proj"](attention(x, block["attn"]["c_attn"](block["ln_1"](x)), 2))
            x = x + block["mlp"]["c_proj"](F.gelu(block["mlp"]["c_fc"](block["ln_2"](x)), approximate="tanh"))
        return self.lm_head(body["ln_f"](x))


class GPTFromScratch(nn.Module):
    """GPT-from-scratch's model, 2 × 16 wide with 2 heads: another order, and a head of its own."""

    def __init__(self, qkv_bias: bool) -> None:
        super().__init__()
        C = 16
        blocks = [
            {
                "mha": nn.ModuleDict({"qkv": nn.Linear(C, 3 * C, bias=qkv_bias), "proj": nn.Linear(C, C)}),
                "ff": nn.ModuleDict({"layers": nn.Sequential(nn.Linear(C, 4 * C)), "final_l": nn.Linear(4 * C, C)}),
                "norm1": nn.LayerNorm(C),
                "norm2": nn.LayerNorm(C),
            }
            for _ in range(2)
        ]
        parts = {"t_embedding": nn.Embedding(128, C), "p_embedding": nn.Embedding(16, C)}
        parts["transformers"] = nn.Sequential(*map(nn.ModuleDict, blocks))
        self.gpt = nn.ModuleDict({**parts, "final_ln": nn.LayerNorm(C), "ln_out": nn.Linear(C, 128, bias=False)})

    def forward(self, idx: Tensor) -> Tensor:
        body = self.gpt
        x = body["t_embedding"](idx) + body["p_embedding"].weight[: idx.size(1)]
        for block in body["transformers"]:
            x = x + block["mha"]["proj"](attention(x, block["mha"]["qkv"](block["norm1"](x)), 2))
            x = x + block["ff"]["final_l"](F.gelu(block["ff"]["layers"](block["norm2"](x)), approximate="tanh"))
        return body["ln_out"](body["final_ln"](x))


SCRATCH = {"vocab_size": 128, "emb_dim": 16, "context_length": 16, "drop_rate": 0.2, "n_layers": 2, "n_heads": 2}


@pytest.mark.parametrize("heir", ["build-nanogpt", "GPT-from-scratch", "GPT-from-scratch with qkv_bias"])
def test_heirs(tmp_path: Path, folio: Folio, monkeypatch: pytest.MonkeyPatch, heir: str) -> None:
    """Their logits, step and loss; GPT-from-scratch's optimizer. Imported, all of it is the same."""
    torch.manual_seed(1)
    build, qkv_bias = heir == "build-nanogpt", "qkv_bias" in heir
    net = BuildNanoGPT() if build else GPTFromScratch(qkv_bias)
    for p in net.parameters():  # biases too, and nothing by chance the same
        nn.init.normal_(p, std=0.2)
    optimizer = stepped(net, lambda idx: F.cross_entropy(net(idx).flatten(0, 1), idx.roll(-1, 1).flatten()))
    content = {"model": net.state_dict(), "val_loss": 3.25}
    with monkeypatch.context() as patch:
        if build:
            content |= {"config": pickled_as(patch, "__main__.GPTConfig", **BUILD), "step": 2}
        else:
            config = pickled_as(patch, "gpt_from_scratch.models.utils.GPTConfig", **SCRATCH, qkv_bias=qkv_bias)
            content |= {"config": config, "optimizer": optimizer.state_dict(), "epoch": 0, "iter": 1}
        path = saved(content, tmp_path / ("model_00002.pt" if build else "model_epoch0_iter00001.pt"))

    idx = torch.randint(128, (2, 16))
    out = tmp_path / "out"
    assert folio("import", path, "--to", out).code == 0
    for found in (pt_files.read(path), find.choose(out)):
        assert (found.step, found.state["val_loss"]) == (2, 3.25)
        assert found.config().dropout == (0.0 if build else 0.2)
        with torch.no_grad():
            torch.testing.assert_close(found.model(dropout=0.0)(idx, idx)[0], net(idx), atol=1e-5, rtol=0)
        weights, slots = dict(found.weights()), dict(found.slots())
        if build:
            assert not slots
            continue
        assert len(slots) == 3 * len(list(net.parameters()))
        for p, state in optimizer.state.items():  # parameters are told by their values: no table of names
            name = next(name for name, weight in weights.items() if torch.equal(weight, p))
            assert all(torch.equal(slots[f"{name}/{slot}"], value) for slot, value in state.items())


# Trains the real program's model for two steps and saves what it saves, with logits beside
REAL_BUILD = """
import ast, sys, torch
checkout, out = sys.argv[1:]
names = {"CausalSelfAttention", "MLP", "Block", "GPTConfig", "GPT"}
body = ast.parse(open(checkout + "/train_gpt2.py").read()).body
first = next(i for i, node in enumerate(body) if isinstance(node, ast.ClassDef))
heads = [node for node in body[:first] if "hellaswag" not in ast.unparse(node)]
exec(compile(ast.Module(heads + [n for n in body if getattr(n, "name", "") in names], []), "train_gpt2", "exec"))
config = GPTConfig(block_size=16, vocab_size=128, n_layer=2, n_head=2, n_embd=16)
model = GPT(config)
idx = torch.randint(128, (2, 16))
torch.save({"model": model.state_dict(), "config": model.config, "step": 2, "val_loss": 3.25}, out + "/model_00002.pt")
torch.save({"idx": idx, "logits": model(idx)[0].detach()}, out + "/expected")
"""
REAL_SCRATCH = """
import sys, torch
from gpt_from_scratch.models import GPT, GPTConfig
checkout, out = sys.argv[1:]
model = GPT(GPTConfig(128, 16, 16, 0.0, 2, 2))
params = list(model.parameters())
optimizer = torch.optim.AdamW([{"params": [p for p in params if p.dim() >= 2]},
                               {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}])
idx = torch.randint(128, (2, 16))
for _ in range(2):
    model(idx).logsumexp(2).sum().backward()
    optimizer.step()
content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "config": model.cfg, "epoch": 0, "iter": 1,
           "val_loss": 3.25}
torch.save(content, out + "/model_epoch0_iter00001.pt")
torch.save({"idx": idx, "logits": model(idx).detach()}, out + "/expected")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variable", "script"), [("FOLIO_BUILD_NANOGPT", REAL_BUILD), ("FOLIO_GPT_FROM_SCRATCH", REAL_SCRATCH)]
)
def test_heirs_themselves(tmp_path: Path, variable: str, script: str) -> None:
    """What a checkout of the program itself saves."""
    if not (checkout := os.environ.get(variable)):
        pytest.skip(f"{variable} names no checkout of it")
    done = python("-c", script, checkout, tmp_path, PYTHONPATH=checkout)
    assert done.returncode == 0, done.stderr
    found = pt_files.read(next(tmp_path.glob("*.pt")))
    expected = torch.load(tmp_path / "expected", weights_only=True)
    with torch.no_grad():
        logits, _ = found.model()(expected["idx"], expected["idx"])
    torch.testing.assert_close(logits, expected["logits"], atol=1e-5, rtol=0)
    assert (found.step, found.state["val_loss"]) == (2, 3.25)
    assert len(dict(found.slots())) == (3 * len(found.tensors) if "SCRATCH" in variable else 0)
