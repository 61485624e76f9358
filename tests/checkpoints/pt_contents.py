"""What trainers save with ``torch.save``, for a model of a few hundred parameters."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Outcome, assert_refused, tree
from torch import Tensor, nn

from folio.checkpoints.pt_files import PtFile
from folio.model.config import GPTConfig
from folio.model.gpt import GPT

Folio = Callable[..., Outcome]
Content = dict[str, Any]
SHAPE = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 16, "vocab_size": 128, "bias": True, "dropout": 0.1}
BUILD = {"block_size": 16, "vocab_size": 128, "n_layer": 2, "n_head": 2, "n_embd": 16}
LN = "transformer.ln_f.weight"
QUICK = ("--device=cpu", "--compile=False", "--dtype=float32", "--eval_iters=1", "--max_iters=3")


def stepped(net: nn.Module, loss: Callable[[Tensor], Tensor]) -> torch.optim.AdamW:
    """AdamW as nanoGPT and its heirs make it, after two steps."""
    params = list(net.parameters())
    groups = [[p for p in params if p.dim() >= 2], [p for p in params if p.dim() < 2]]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups], lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        loss(torch.randint(128, (2, 16))).backward()
        optimizer.step()
    return optimizer


def small() -> Content:
    """What nanoGPT saves, of a tiny model."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE))  # its names and order are nanoGPT's
    optimizer = stepped(model, lambda idx: model.loss(idx[:, :-1], idx[:, 1:])[0])
    return {
        "model": dict(model.state_dict()),
        "optimizer": optimizer.state_dict(),
        "model_args": dict(SHAPE),
        "iter_num": 2,
        "best_val_loss": torch.tensor(2.5),
        "config": {"batch_size": 2, "gradient_accumulation_steps": 1, "dataset": "elsewhere"},
    }


def saved(content: Any, path: Path, legacy: bool = False) -> Path:
    path.parent.mkdir(exist_ok=True)
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def with_value(*path: Any) -> Callable[[Content], None]:
    """Sets the value at a path of keys in a content; the last argument is the value."""

    def change(content: Content) -> None:
        *keys, last, value = path
        for key in keys:
            content = content[key]
        content[last] = value

    return change


def pickled_as(patch: pytest.MonkeyPatch, name: str, **values: Any) -> Any:
    """An object of a class of this full name, which can be imported for as long as the patch holds."""
    module, _, title = name.rpartition(".")
    parts = module.split(".")
    for n in range(1, len(parts) + 1):
        if (package := ".".join(parts[:n])) not in sys.modules:
            patch.setitem(sys.modules, package, types.ModuleType(package))
    kind = type(title, (), {"__module__": module})
    patch.setattr(sys.modules[module], title, kind, raising=False)
    instance = kind()
    vars(instance).update(values)
    return instance


def assert_same(one: PtFile, other: PtFile) -> None:
    for mine, theirs in ((one.weights(), other.weights()), (one.slots(), other.slots())):
        a, b = dict(mine), dict(theirs)
        assert a.keys() == b.keys()
        assert a
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert {**one.state, "run": ""} == {**other.state, "run": ""}
    assert one.asked == other.asked


def assert_not_imported(folio: Folio, story: Path, ckpt: Path, *words: str) -> None:
    before = tree(ckpt.parent)
    resume = ("train", *QUICK, "--init_from=resume", f"--out_dir={ckpt.parent}", f"--data_dir={story}")
    for argv in (("import", ckpt, "--to", ckpt.parent / "imported"), resume):
        assert_refused(folio(*argv), ckpt, *words)
    assert tree(ckpt.parent) == before
