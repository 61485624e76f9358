"""A ``.pt`` file whose parts do not fit together, or that is something else, is refused by name."""

from __future__ import annotations

import math
import zipfile
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_pipe
from pt_contents import (
    LN,
    Content,
    Folio,
    assert_not_imported,
    saved,
    small,
    with_value,
)


def without(*way: str) -> Callable[[Content], None]:
    def change(content: Content) -> None:
        *keys, last = way
        for key in keys:
            content = content[key]
        del content[last]

    return change


MISTAKES: dict[str, tuple[Callable[[Content], None], str]] = {
    "n_layer no number": (with_value("model_args", "n_layer", "2"), "n_layer = '2'"),
    "n_layer negative": (with_value("model_args", "n_layer", -1), "n_layer=-1"),
    "n_embd zero": (with_value("model_args", "n_embd", 0), "n_embd=0"),
    "n_head no divisor": (with_value("model_args", "n_head", 3), "n_head=3"),
    "vocab_size too large": (with_value("model_args", "vocab_size", 2**62), ""),
    "unknown field": (with_value("model_args", "n_layr", 2), "'n_layr'"),
    "model_args a list": (with_value("model_args", [1]), "not a checkpoint of nanoGPT"),
    "iter_num text": (with_value("iter_num", "two"), "two"),
    "iter_num NaN": (with_value("iter_num", math.nan), ""),
    "iter_num infinite": (with_value("iter_num", math.inf), ""),
    "iter_num negative": (with_value("iter_num", -5), "-5"),
    "best_val_loss text": (with_value("best_val_loss", "low"), "low"),
    "best_val_loss two numbers": (with_value("best_val_loss", torch.ones(2)), ""),
    "no model": (without("model"), "it holds no model"),
    "neither config": (without("model_args"), "not a checkpoint of nanoGPT"),
    "a weight missing": (without("model", LN), LN),
    "a weight too many": (with_value("model", "extra.weight", torch.ones(2)), "extra.weight"),
    "a weight of another shape": (with_value("model", LN, torch.ones(2)), LN),
    "a weight no tensor": (with_value("model", LN, 3), "not a checkpoint of nanoGPT"),
    "a weight sparse": (with_value("model", LN, torch.ones(8).to_sparse()), f"{LN} is sparse"),
    "a weight complex": (with_value("model", LN, torch.ones(8) * 1j), f"{LN} is of type complex64"),
    "a weight of integers": (with_value("model", LN, torch.ones(8).int()), f"{LN} is of type int32"),
    "a weight of bytes": (with_value("model", LN, torch.ones(8).byte()), f"{LN} is of type uint8"),
    "a weight of float8": (
        with_value("model", LN, torch.ones(8).to(torch.float8_e5m2)),
        f"{LN} is of type float8_e5m2",
    ),
    "a weight on no device": (with_value("model", LN, torch.empty(8, device="meta")), f"{LN} is without numbers"),
    "a weight under two names": (with_value("model", "module." + LN, torch.ones(8)), f"it holds {LN} twice"),
    "a state dict in itself": (lambda content: content["model"].update(again=content["model"]), "again"),
    "optimizer of integers": (
        with_value("optimizer", "state", 0, "exp_avg", torch.ones(128, 8).int()),
        "of type int32",
    ),
    "optimizer complex": (with_value("optimizer", "state", 0, "step", torch.tensor(1j)), "step is of type complex64"),
    "optimizer's step no number": (with_value("optimizer", "state", 0, "step", None), "is not a number"),
    "iter_num a hundred digits": (with_value("iter_num", 10**100), "its step is"),
    "vocab_size 1e12": (with_value("model_args", "vocab_size", 10**12), "vocab_size=1000000000000: must be at most"),
    "n_embd a nested list": (with_value("model_args", "n_embd", [[[[8, 8]]]]), "is not a number"),
    "n_embd of 5000 digits": (with_value("model_args", "n_embd", 10**4000), "n_embd' is not a number"),
    "a weight's name no text": (with_value("model", 5, torch.ones(2)), "not a checkpoint of nanoGPT"),
    "optimizer a list": (with_value("optimizer", [1]), "optimizer does not fit"),
    "optimizer's state a list": (with_value("optimizer", "state", [1]), "optimizer does not fit"),
    "optimizer of more parameters": (with_value("optimizer", "state", 99, {"step": 1.0}), "optimizer does not fit"),
    "optimizer counts from the end": (
        with_value("optimizer", "state", -1, dict.fromkeys(("exp_avg", "exp_avg_sq"), torch.ones(8)) | {"step": 1.0}),
        "optimizer does not fit",
    ),
    "optimizer of other shapes": (with_value("optimizer", "state", 0, "exp_avg", torch.ones(3)), "(3,)"),
    "optimizer with text": (with_value("optimizer", "state", 0, "exp_avg", "x"), "optimizer does not fit"),
    "optimizer's step a vector": (with_value("optimizer", "state", 0, "step", torch.ones(4)), "optimizer does not fit"),
    "optimizer lacks a slot": (without("optimizer", "state", 0, "exp_avg"), "optimizer does not fit"),
    "SGD": (with_value("optimizer", "state", 0, {"momentum_buffer": torch.ones(128, 8)}), "optimizer does not fit"),
}


@pytest.mark.parametrize(("change", "word"), MISTAKES.values(), ids=MISTAKES)
def test_what_does_not_fit_together(
    tmp_path: Path, story: Path, folio: Folio, change: Callable[[Content], None], word: str
) -> None:
    """import and train: one line that names the file, and nothing written."""
    content = small()
    change(content)
    assert_not_imported(folio, story, saved(content, tmp_path / "ckpt.pt"), word)


def truncated(path: Path) -> None:
    content = saved(small(), path).read_bytes()
    path.write_bytes(content[: len(content) // 2])


def other_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme", "no model")


def linked_to_zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def named(*keys: Any) -> Callable[[Path], object]:
    return lambda path: saved({**small(), "model": dict.fromkeys(keys, torch.ones(1))}, path)


OTHERS: dict[str, Callable[[Path], object]] = {
    "plain state dict": lambda path: saved(small()["model"], path),
    "list": lambda path: saved([1, 2], path),
    "tensor": lambda path: saved(torch.ones(2), path),
    "another class": lambda path: saved({"model": deque()}, path),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no model\nbut text\n"),
    "truncated": truncated,
    "another zip": other_zip,
    "a pipe": make_pipe,
    "endless": linked_to_zeros,
    "a folder": Path.mkdir,
    "a memo of 34 GB": lambda path: path.write_bytes(b"\x80\x02Nr\xff\xff\xff\xff"),
    "names that are no text": named(1, 2.5, None, (1, "a")),
    "other names": named(*map(str, range(1000))),
}


@pytest.mark.parametrize("write", OTHERS.values(), ids=OTHERS)
def test_other_files(tmp_path: Path, story: Path, folio: Folio, write: Callable[[Path], object]) -> None:
    """The same of files that are no such checkpoint at all."""
    write(tmp_path / "ckpt.pt")
    assert_not_imported(folio, story, tmp_path / "ckpt.pt")
