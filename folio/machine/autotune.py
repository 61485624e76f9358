"""Measures once which attention kernel of a CPU is fastest for a model, and remembers it in the user's cache folder.

Two runs with the same options end in the same bits, since the second one takes the kernel that the first one measured.
So nothing that varies from run to run may decide whether the file is read, and a result that cannot be written is not
used.
"""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from folio import files
from folio.errors import first_line
from folio.machine import probe
from folio.machine.choices import Choices
from folio.model.attention import attend, rotation_at
from folio.model.config import GPTConfig
from folio.model.gpt import CausalSelfAttention
from folio.model.kernels import BlockedAttention, split_heads_at_once

BLOCKS = (0, 64, 128, 256)  # of queries; 0: attention.attend
LEAST_RUN = 2e13  # FLOP of a run, some minutes on two cores, of which the measurement is a percent
LEAST, MOST = 1e8, 1e10  # FLOP of the layer: a smaller one is not measured, a larger one with fewer rows
SECONDS, ROUNDS = 2.0, range(3, 16)  # of a measurement, without the round in progress
GAIN = 1.1  # times as fast as the default, some percent of a step, or the default stays


def tuned(choices: Choices, shape: GPTConfig, rows: int, tokens: int, flops: float) -> tuple[Choices, list[str]]:
    """The choices with the attention kernel that is fastest for micro batches (rows, tokens), and lines for the user.

    A run keeps its choices if it is on another device than a CPU, compiled, deterministic, of several processes, with
    dropout, or too small or too short (``flops``: of all its steps) for a measurement to pay, and also if the result
    could not be written down, since the next run would then compute with other bits.
    """
    default = choices.attention_block
    fixed = not default or choices.deterministic or choices.world > 1 or shape.dropout > 0
    layer = 24.0 * tokens * shape.n_embd**2 + 12.0 * tokens**2 * shape.n_embd  # forward and backward of a row
    path = cache_file()
    if fixed or flops < LEAST_RUN or rows * layer < LEAST or not path.is_absolute():
        return choices, []
    sizes = {min(block, tokens): block for block in (*BLOCKS, default)}
    blocks = sorted(sizes.values(), key=lambda block: block != default)  # the default first
    key = (
        f"{probe.processor_name()}, {choices.processor}, {choices.threads} threads, torch {choices.torch}, "
        f"{choices.dtype}: {shape.n_head} heads of {shape.n_embd // shape.n_head}, {rows} rows of {tokens} tokens"
        f"{', rotary' if shape.position == 'rope' else ''}{', qk_norm' if shape.qk_norm else ''}"
    )
    known, lines = _read(path)
    if _block(known.get(key), blocks) is None:
        with probe.matmul_precision(choices.matmul_precision):
            found = _fastest(choices, shape, max(1, min(rows, int(MOST / layer))), tokens, blocks)
        known = _read(path)[0]  # another run may have measured in the meantime
        if _block(known.get(key), blocks) is None:
            known[key] = found
            try:
                files.write_json(path, known)
            except OSError as error:
                why = error.strerror or first_line(error)
                return choices, [f"{path} could not be written ({why}), so attention is not tuned"]
        what = f"in blocks of {known[key]} queries" if known[key] else "in one piece"
        lines.append(f"measured on this machine: attention {what} is fastest; {path} remembers it")
    return replace(choices, attention_block=known[key]), lines


def cache_file() -> Path:
    """Below XDG_CACHE_HOME, else ~/.cache (XDG Base Directory Specification); relative if there is no home folder."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    return Path(given if os.path.isabs(given) else os.path.expanduser("~/.cache"), "folio", "autotune.json")


def _read(path: Path) -> tuple[dict[str, Any], list[str]]:
    """What the file remembers; a line if it cannot be read, and then nothing."""
    try:
        known = files.read_json(path, 1 << 20)
        return (known, []) if isinstance(known, dict) else ({}, [f"{path} is not a JSON object and is replaced"])
    except FileNotFoundError:
        return {}, []
    except (OSError, ValueError) as error:
        return {}, [f"{first_line(error)}; it is replaced"]


def _block(value: Any, blocks: list[int]) -> int | None:
    """A remembered value, unless something else wrote it."""
    return value if type(value) is int and value in blocks else None


def _fastest(choices: Choices, shape: GPTConfig, rows: int, tokens: int, blocks: list[int]) -> int:
    """The block with which an attention layer is fastest, forward and backward; the first, unless another is surely so.

    That is: faster in each round, in which they take turns, and by more than noise in the median.
    """
    dtype = getattr(torch, choices.dtype)
    with torch.random.fork_rng(devices=[]):
        layer = CausalSelfAttention(shape).to(dtype)
        layer.split_heads = split_heads_at_once
        turn = rotation_at(torch.arange(tokens), shape.n_embd // shape.n_head, dtype)
        rotation = turn if shape.position == "rope" else None
        x = torch.randn(rows, tokens, shape.n_embd, dtype=dtype, requires_grad=True)

    def seconds(block: int) -> float:
        layer.attend = BlockedAttention(block) if block else attend
        start = time.perf_counter()
        y = layer(x, rotation=rotation)
        y.backward(y.detach())
        return time.perf_counter() - start

    rounds: list[dict[int, float]] = []
    end = time.perf_counter() + SECONDS
    for block in blocks:  # its memory and oneDNN's kernels
        seconds(block)
    while len(rounds) < ROUNDS.stop - 1 and time.perf_counter() < end:
        rounds.append({block: seconds(block) for block in blocks})
    if len(rounds) < ROUNDS.start:
        return blocks[0]
    ratios = {block: [times[blocks[0]] / times[block] for times in rounds] for block in blocks[1:]}
    gains = {blocks[0]: GAIN} | {block: statistics.median(each) for block, each in ratios.items() if min(each) > 1}
    return max(gains, key=gains.__getitem__)
