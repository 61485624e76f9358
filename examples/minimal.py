"""GPT-2 pretraining in one file, on one device, with torch and numpy alone. To be read and forked.

    python -m folio prepare shakespeare_char
    python examples/minimal.py --data_dir=data/shakespeare_char --max_iters=500

It reads the token files of ``folio prepare`` and computes what ``folio train --dropout=0 --dtype=float32`` computes:
the same initial weights, rows, learning rates and updates from the same seed. A test compares the losses.
"""

import argparse
import hashlib
import json
import math
from pathlib import Path

import numpy as np
import torch
from torch import nn

OPTIONS = {  # a shape and a schedule for 1 MB of text and a laptop
    "data_dir": "data/shakespeare_char", "device": "cpu", "seed": 1337, "max_iters": 500, "eval_interval": 250,
    "batch_size": 12, "gradient_accumulation_steps": 1, "block_size": 64, "n_layer": 4, "n_head": 4, "n_embd": 128,
    "learning_rate": 1e-3, "min_lr": 1e-4, "warmup_iters": 100, "lr_decay_iters": 500,
    "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.99, "grad_clip": 1.0,
}  # fmt: skip


def key(*parts):
    """63 bits from any parts. Every random choice is keyed by what it is for, so no generator state is stored."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


class Data:
    """One split of a data set: its files as memmaps, and an endless order of rows of T + 1 tokens."""

    def __init__(self, folder, split, T, seed):
        meta = json.loads((Path(folder) / "meta.json").read_text(encoding="utf-8"))
        files = [Path(folder) / file["name"] for file in meta["splits"][split]["files"]]
        maps = [np.load(f, "r") if f.suffix == ".npy" else np.memmap(f, meta["dtype"], "r") for f in files]
        self.maps, self.vocab_size, self.split, self.T, self.seed = maps, meta["vocab_size"], split, T, seed
        self.windows = [max(1, (len(m) - T) // T) if len(m) > T else 0 for m in maps]  # rows of each file
        self.epoch = sum(self.windows)

    def row(self, number):
        """Each epoch cuts the files into windows at a new offset and visits each window once, in a random order."""
        epoch, index = divmod(number, self.epoch)
        seed = key(self.seed, self.split, epoch)
        window = permute(index, self.epoch, seed)
        for tokens, windows in zip(self.maps, self.windows, strict=True):
            if window < windows:
                start = seed % min(self.T, len(tokens) - windows * self.T) + window * self.T
                return tokens[start : start + self.T + 1]
            window -= windows

    def batch(self, first, count, device):  # inputs and targets, both (count, T)
        rows = torch.from_numpy(np.stack([self.row(first + i) for i in range(count)]).astype(np.int64)).to(device)
        return rows[:, :-1], rows[:, 1:]


def mix(x):
    """A bijection of 64-bit integers that looks random (the finalizer of SplitMix64)."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def permute(x, n, seed):
    """Where a permutation of 0 … n − 1 sends x: a Feistel network, repeated until the result is below n."""
    half = max(1, ((n - 1).bit_length() + 1) // 2)  # bits
    left, right = divmod(x, 2**half)
    for turn in range(8):
        left, right = right, left ^ mix((right + key(seed, turn)) % 2**64) % 2**half
    x = left * 2**half + right
    return x if x < n else permute(x, n, seed)


class Block(nn.Module):
    def __init__(self, C, heads):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(C, bias=False), nn.LayerNorm(C, bias=False)
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(C, 3 * C, False), "c_proj": nn.Linear(C, C, False)})
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(C, 4 * C, False), "c_proj": nn.Linear(4 * C, C, False)})

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.attn.c_attn(self.ln_1(x)).view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, heads, T, C // heads)
        x = x + self.attn.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.mlp.c_proj(nn.functional.gelu(self.mlp.c_fc(self.ln_2(x))))


class GPT(nn.Module):
    """GPT-2 without biases and dropout. Its parameters have nanoGPT's names; the head shares the embedding."""

    def __init__(self, vocab_size, T, layers, heads, C, seed):
        super().__init__()
        parts = {"wte": nn.Embedding(vocab_size, C), "wpe": nn.Embedding(T, C)}
        parts |= {"h": nn.Sequential(*(Block(C, heads) for _ in range(layers))), "ln_f": nn.LayerNorm(C, bias=False)}
        self.transformer = nn.ModuleDict(parts)
        for name, p in self.named_parameters():
            if p.dim() == 2:  # the ends of residual branches start smaller (GPT-2 paper, section 2.3)
                std = 0.02 / math.sqrt(2 * layers) if name.endswith("c_proj.weight") else 0.02
                nn.init.normal_(p, 0.0, std, torch.Generator().manual_seed(key(seed, name)))

    def forward(self, idx, targets):  # both (B, T) → the mean loss in nats per token
        x = self.transformer.wte(idx) + self.transformer.wpe(torch.arange(idx.size(1), device=idx.device))
        logits = self.transformer.ln_f(self.transformer.h(x)) @ self.transformer.wte.weight.T  # (B, T, V)
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def learning_rate(step, o):
    """Linear warm-up, then a cosine down to ``min_lr``."""
    if step < o.warmup_iters:
        return o.learning_rate * (step + 1) / o.warmup_iters
    done = min(1.0, (step - o.warmup_iters) / max(1, o.lr_decay_iters - o.warmup_iters))
    return o.min_lr + 0.5 * (1 + math.cos(math.pi * done)) * (o.learning_rate - o.min_lr)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in OPTIONS.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    o = parser.parse_args()
    train, val = (Data(o.data_dir, split, o.block_size, o.seed) for split in ("train", "val"))
    model = GPT(train.vocab_size, o.block_size, o.n_layer, o.n_head, o.n_embd, o.seed).to(o.device)
    matrices, gains = ([p for p in model.parameters() if p.dim() == n] for n in (2, 1))
    groups = [{"params": matrices}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(o.beta1, o.beta2), weight_decay=o.weight_decay)
    for step in range(o.max_iters + 1):
        if step % o.eval_interval == 0 or step == o.max_iters:
            with torch.no_grad():  # once over the split, in rows that do not overlap
                losses = [model(*val.batch(i, o.batch_size, o.device)) for i in range(0, val.epoch, o.batch_size)]
            print(f"step {step}: val loss {torch.stack(losses).mean():.4f}", flush=True)
        if step == o.max_iters:
            return
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = learning_rate(step, o)
        loss = 0.0
        for micro in range(step * o.gradient_accumulation_steps, (step + 1) * o.gradient_accumulation_steps):
            part = model(*train.batch(micro * o.batch_size, o.batch_size, o.device)) / o.gradient_accumulation_steps
            part.backward()
            loss += part.item()
        nn.utils.clip_grad_norm_(model.parameters(), o.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        print(f"iter {step}: loss {loss:.5f}", flush=True)


if __name__ == "__main__":
    main()
