"""Checkpoints appear whole or not at all, and give back what was saved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from small_checkpoints import SHAPE, save, tensors, trained

from folio.checkpoints import checkpoint, find
from folio.checkpoints.state import State, foreign_state
from folio.model.config import GPTConfig
from folio.model.gpt import GPT
from folio.training.optimizers import adamw


@pytest.mark.parametrize("tied", [True, False])
def test_round_trip(tmp_path: Path, tied: bool) -> None:
    """Weights and moments come back to the bit, into a new model and optimizer, whose next step is the same."""
    shape = GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=8, tie_weights=tied)
    model, optimizer = trained(1, shape)
    weights, slots = tensors(model, optimizer)
    state = {**foreign_state(model.config, None, State(step=2)), "run": "a1"}
    checkpoint.save(tmp_path, 2, weights, slots, state)
    found = find.choose(tmp_path, "latest")
    assert (found.step, found.state["run"]) == (2, "a1")
    assert found.model().config == shape
    assert all(torch.equal(p, weights[name]) for name, p in found.model().named_parameters())
    other = GPT(shape)
    checkpoint.load_weights(other, found.weights())
    fresh = adamw(other, 1e-2, (0.9, 0.95), 0.1)
    checkpoint.load_slots(fresh, other, found.slots())
    for m, o in ((model, optimizer), (other, fresh)):
        o.zero_grad()
        m.loss(torch.tensor([[4, 5]]), torch.tensor([[5, 6]]))[0].backward()
        o.step()
    for mine, theirs in zip(tensors(model, optimizer), tensors(other, fresh), strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_the_files_of_a_checkpoint(tmp_path: Path) -> None:
    """Three files; parameters by nanoGPT's names, no tied head; optimizer tensors as <parameter>/<slot>."""
    path = save(tmp_path, 5)
    assert path == tmp_path / "checkpoints" / "step-00000005"
    assert sorted(p.name for p in path.iterdir()) == ["model.safetensors", "optimizer.safetensors", "state.json"]
    names = [name for name, _ in GPT(SHAPE).named_parameters()]
    with safe_open(path / "model.safetensors", "pt") as file:
        assert sorted(file.keys()) == sorted(names)
        assert "lm_head.weight" not in names
    with safe_open(path / "optimizer.safetensors", "pt") as file:
        slots = ("exp_avg", "exp_avg_sq", "step")
        assert sorted(file.keys()) == sorted(f"{name}/{slot}" for name in names for slot in slots)
    state = json.loads((path / "state.json").read_text())
    assert set(state["sha256"]) == {"model.safetensors", "optimizer.safetensors", "state.json"}


def test_the_same_weights_are_the_same_bytes(tmp_path: Path) -> None:
    """So that two runs can be compared by their files."""
    first, second = save(tmp_path / "a", 5), save(tmp_path / "b", 5)
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    """By another one that verifies, even if an earlier attempt left an unfinished folder."""
    rest = tmp_path / "checkpoints" / ".step-00000005.unfinished"
    rest.mkdir(parents=True)
    (rest / "model.safetensors").write_bytes(b"half")
    save(tmp_path, 5)
    path = save(tmp_path, 5, run="b2", seed=1)
    assert checkpoint.verify(path).state["run"] == "b2"
    assert [p.name for p in path.parent.iterdir()] == ["step-00000005"]


def test_of_the_same_tensors_the_state_alone_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the checkpoint is never missing; if its tensors are damaged, it is replaced whole."""
    monkeypatch.setattr(checkpoint, "_rename_or_put_back", None)  # to call it would raise
    save(tmp_path, 5)
    path = save(tmp_path, 5, run="b2")
    assert checkpoint.verify(path).state["run"] == "b2"
    assert [p.name for p in path.parent.iterdir()] == ["step-00000005"]
    monkeypatch.undo()
    (path / "model.safetensors").write_bytes(b"damaged")
    assert checkpoint.verify(save(tmp_path, 5, run="c3")).state["run"] == "c3"


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the folder and the remedy; the former checkpoint stays."""
    before = save(tmp_path, 5)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match=r"step-00000010 could not be written .*No space left.*make room"):
        save(tmp_path, 10)
    with pytest.raises(OSError, match="could not be written"):
        save(tmp_path, 5)
    assert [p.name for p in before.parent.iterdir()] == ["step-00000005"]
    checkpoint.verify(before)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    """By the parameter's name."""
    found = find.choose(save(tmp_path, 5).parent.parent)
    model = GPT(GPTConfig(**{**vars(SHAPE), "n_layer": 2}))
    with pytest.raises(ValueError, match=r"they lack transformer\.h\.1\."):
        checkpoint.load_weights(model, found.weights())
    model = GPT(GPTConfig(**{**vars(SHAPE), "block_size": 4}))
    with pytest.raises(ValueError, match=r"wpe\.weight has shape \(8, 8\), the model \(4, 8\)"):
        checkpoint.load_weights(model, found.weights())
