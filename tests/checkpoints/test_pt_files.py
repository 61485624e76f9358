"""nanoGPT's checkpoints are read however they were saved, and a changed bit is found."""

from __future__ import annotations

import argparse
import collections
import datetime
import json
import shutil
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pt_contents import (
    LN,
    SHAPE,
    Content,
    Folio,
    assert_not_imported,
    assert_same,
    saved,
    small,
)

from folio.checkpoints import pt_files
from folio.model.config import GPTConfig


def test_nanogpt_s_own_numbers(shared_data: Path) -> None:
    """Its loss and logits; its step and best loss; its options, except those of the machine and of the call."""
    expected = json.loads((shared_data / "nanogpt_ckpt" / "expected.json").read_text())
    found = pt_files.read(shared_data / "nanogpt_ckpt" / "ckpt.pt")
    with torch.no_grad():
        logits, loss = found.model().eval()(torch.tensor(expected["idx"]), torch.tensor(expected["targets"]))
    assert loss is not None
    assert loss.item() == pytest.approx(expected["loss"], abs=1e-5)
    torch.testing.assert_close(logits, torch.tensor(expected["logits"]), atol=1e-5, rtol=0)

    assert found.config() == GPTConfig(**expected["model_args"])
    assert (found.config().bias, found.config().dropout) == (False, 0.1)
    assert found.step == expected["iter_num"] == 200
    assert found.state["best"] == {"step": 200, "loss": pytest.approx(2.6147, abs=1e-4)}
    assert (found.state["rows"], found.state["tokens"]) == (200 * 12, 200 * 12 * 64)
    asked = {"learning_rate": 1e-3, "max_iters": 200, "beta2": 0.99, "min_lr": 1e-4, "batch_size": 12, "dropout": 0.1}
    assert found.asked.items() >= {**asked, "warmup": "nanogpt", "dataset": "shakespeare_char"}.items()
    machine = {"device", "dtype", "compile", "backend", "seed", "out_dir", "init_from", "eval_only"}
    assert not machine & found.asked.keys()
    tokenizer = found.tokenizer()  # of the meta.pkl beside it
    assert tokenizer.bytes(expected["idx"][0]).startswith(b"rina, this I know,\nShe is not")


def prefixed(prefix: str) -> Callable[[Content], None]:
    def change(content: Content) -> None:
        content["model"] = {prefix + name: tensor for name, tensor in content["model"].items()}

    return change


def with_masks(content: Content) -> None:
    mask = torch.ones(64, 64).tril().view(1, 1, 64, 64)
    for number in range(2):
        content["model"][f"transformer.h.{number}.attn.bias"] = mask
        content["model"][f"transformer.h.{number}.attn.masked_bias"] = torch.tensor(-1e4)


SAVED = {
    "as it is": lambda content: None,
    "compiled": prefixed("_orig_mod."),
    "DDP": prefixed("module."),
    "compiled in DDP": prefixed("module._orig_mod."),
    "DDP compiled": prefixed("_orig_mod.module."),
    "masks": with_masks,
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("change", SAVED.values(), ids=SAVED)
def test_however_it_was_saved(
    shared_data: Path, tmp_path: Path, change: Callable[[Content], None], legacy: bool
) -> None:
    """Prefixes of wrappers, masks among the weights and either format of torch.save: all read the same."""
    theirs = shared_data / "nanogpt_ckpt"
    shutil.copy(theirs / "meta.pkl", tmp_path)
    content = torch.load(theirs / "ckpt.pt", weights_only=True)
    change(content)
    path = saved(content, tmp_path / "ckpt.pt", legacy)
    assert zipfile.is_zipfile(path) != legacy
    assert_same(pt_files.read(path), pt_files.read(theirs / "ckpt.pt"))


def deflated(path: Path) -> Path:
    """The archive as other programs write it anew."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return path


def test_a_deflated_archive(tmp_path: Path) -> None:
    """Weights and optimizer are the same as before."""
    plain = pt_files.read(saved(small(), tmp_path / "plain.pt"))
    assert_same(pt_files.read(deflated(saved(small(), tmp_path / "ckpt.pt"))), plain)


@pytest.mark.parametrize("form", ["stored", "deflated"])
@pytest.mark.parametrize("of", ["the weights", "the optimizer"])
def test_a_flipped_bit_is_found(tmp_path: Path, story: Path, folio: Folio, form: str, of: str) -> None:
    """Among the numbers of a checkpoint: neither import nor resume takes it."""
    content = small()
    tensor = content["model"][LN] if of == "the weights" else content["optimizer"]["state"][0]["exp_avg"]
    tensor[..., :4] = torch.tensor([1.5, 2.5, 3.5, 4.5])
    path = saved(content, tmp_path / "ckpt.pt")
    if form == "deflated":
        deflated(path)
        at = next(r.header_offset for r in zipfile.ZipFile(path).infolist() if r.file_size > 1000) + 100
    else:
        at = path.read_bytes().index(tensor.numpy().tobytes())
    damaged = bytearray(path.read_bytes())
    damaged[at] ^= 1
    path.write_bytes(damaged)
    assert_not_imported(folio, story, path, "is damaged")


def a_sample_of(path: Path) -> Any:
    """What a trainer may put beside its numbers: values of NumPy, paths, objects that are only their fields."""
    return {
        "iter_num": np.int64(2),
        "best_val_loss": np.float32(2.5),
        "config": argparse.Namespace(
            batch_size=np.int32(2), gradient_accumulation_steps=1, dataset="elsewhere", out_dir=path
        ),
        "args": types.SimpleNamespace(when=datetime.datetime(2024, 1, 1), seen={1, 2}),
        "history": collections.defaultdict(list, loss=[np.float64(3.0)]),
        "rng_state": torch.get_rng_state(),
        "numpy_rng": np.random.RandomState(0).get_state(),
        "types": [np.uint16, np.float32, np.bool_, torch.bfloat16, int, range(3), slice(1)],
        "last_losses": collections.deque([2.5, 2.0], maxlen=4),
        "version": torch.__version__,
    }


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_plain_values_of_other_kinds(tmp_path: Path, legacy: bool) -> None:
    """Nothing in them would run, and what they say is taken."""
    plain = pt_files.read(saved(small(), tmp_path / "plain.pt"))
    content = small() | a_sample_of(tmp_path)
    content["model"] = OrderedDict(content["model"])
    content["model_args"] = {name: np.array(value)[()] for name, value in SHAPE.items()}
    assert_same(pt_files.read(saved(content, tmp_path / "ckpt.pt", legacy)), plain)


@pytest.mark.parametrize("hold", [np.array, lambda n: np.array([n]), torch.tensor, lambda n: torch.tensor([n])])
def test_a_number_alone(tmp_path: Path, hold: Callable[[Any], Any]) -> None:
    plain = pt_files.read(saved(small() | {"iter_num": 2, "best_val_loss": 2.5}, tmp_path / "plain.pt"))
    content = small() | {"iter_num": hold(2), "best_val_loss": hold(2.5)}
    content["model_args"] = {name: hold(value) if type(value) is int else value for name, value in SHAPE.items()}
    assert_same(pt_files.read(saved(content, tmp_path / "ckpt.pt")), plain)


def test_older_nanogpt_says_nothing_of_biases(tmp_path: Path) -> None:
    """Where model_args lacks bias, the model has them."""
    content = small()
    before = pt_files.read(saved(content, tmp_path / "with.pt"))
    del content["model_args"]["bias"]
    assert_same(pt_files.read(saved(content, tmp_path / "without.pt")), before)
    assert before.config().bias
