"""Checkpoints appear whole or not at all, verify themselves, and the right one is found."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from folio import files
from folio.checkpoints import checkpoint
from folio.config.options import TrainConfig
from folio.config.table import flat
from folio.model.config import GPTConfig
from folio.model.gpt import GPT
from folio.records import run_folder
from folio.training.optimizers import adamw

SHAPE = GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=8)
Damage = Callable[[Path], object]


def trained(seed: int = 0, shape: GPTConfig = SHAPE) -> tuple[GPT, torch.optim.AdamW]:
    """A model and an optimiser with moments."""
    torch.manual_seed(seed)
    model = GPT(shape)
    optimizer = adamw(model, 1e-2, (0.9, 0.95), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model.loss(torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]]))[0].backward()
        optimizer.step()
    return model, optimizer


def tensors(model: GPT, optimizer: torch.optim.AdamW) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    names = {p: name for name, p in model.named_parameters()}
    slots = {f"{names[p]}/{slot}": t for p, state in optimizer.state.items() for slot, t in state.items()}
    return {name: p.detach() for p, name in names.items()}, slots


def save(out_dir: Path, step: int, *, run: str = "a1", best: tuple[int, float] | None = None, seed: int = 0) -> Path:
    """A checkpoint as a run writes it."""
    model, optimizer = trained(seed)
    state = {
        "run": run,
        "step": step,
        "best": {"step": best[0], "loss": best[1]} if best else None,
        "model": asdict(model.config),
    }
    checkpoint.save(out_dir, step, *tensors(model, optimizer), state)
    return run_folder.checkpoint_folder(out_dir, step)


def cut(name: str) -> Damage:
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[:-1])


def flip(name: str) -> Damage:
    def damage(path: Path) -> None:
        content = bytearray((path / name).read_bytes())
        content[len(content) // 2] ^= 1
        (path / name).write_bytes(content)

    return damage


DAMAGES = {
    "model cut": cut("model.safetensors"),
    "optimizer cut": cut("optimizer.safetensors"),
    "one bit of the model": flip("model.safetensors"),
    "one bit of the optimizer": flip("optimizer.safetensors"),
    "model missing": lambda path: (path / "model.safetensors").unlink(),
    "state missing": lambda path: (path / "state.json").unlink(),
    "state empty": lambda path: (path / "state.json").write_text(""),
    "state not ours": lambda path: (path / "state.json").write_text("{}"),
    "state no object": lambda path: (path / "state.json").write_text("[1]"),
    "state no text": lambda path: (path / "state.json").write_bytes(b"\xff\xfe\x00"),
    "model a pipe": lambda path: [(path / "model.safetensors").unlink(), os.mkfifo(path / "model.safetensors")],
    "state a device": lambda path: [(path / "state.json").unlink(), (path / "state.json").symlink_to("/dev/zero")],
    "all empty": lambda path: [file.write_bytes(b"") for file in path.iterdir()],
    "no files": lambda path: [file.unlink() for file in path.iterdir()],
}


@pytest.fixture(params=DAMAGES.values(), ids=DAMAGES)
def damage(request: pytest.FixtureRequest) -> Damage:
    """Each way in which a checkpoint can be broken."""
    return request.param


@pytest.mark.parametrize("tied", [True, False])
def test_round_trip(tmp_path: Path, tied: bool) -> None:
    """Weights and moments come back to the bit, into a new model and optimiser that go on alike."""
    shape = GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=8, tie_weights=tied)
    model, optimizer = trained(1, shape)
    weights, slots = tensors(model, optimizer)
    checkpoint.save(tmp_path, 2, weights, slots, {"run": "a1", "step": 2, "model": asdict(model.config)})
    found = checkpoint.choose(tmp_path, "latest")
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


def test_what_lies_in_a_checkpoint(tmp_path: Path) -> None:
    """Three files; parameters by nanoGPT's names, no tied head; optimiser tensors as <parameter>/<slot>."""
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
    """By one whose other content verifies; what an earlier attempt left does not disturb."""
    rest = tmp_path / "checkpoints" / ".step-00000005.unfinished"
    rest.mkdir(parents=True)
    (rest / "model.safetensors").write_bytes(b"half")
    save(tmp_path, 5)
    path = save(tmp_path, 5, run="b2", seed=1)
    assert checkpoint.verify(path).state["run"] == "b2"
    assert [p.name for p in path.parent.iterdir()] == ["step-00000005"]


@pytest.mark.parametrize("which", ["best", "latest", "9"])
def test_a_damaged_choice_names_another(tmp_path: Path, which: str) -> None:
    save(tmp_path, 5)
    path = save(tmp_path, 9)
    (path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=f"^{path} is damaged: .*; --checkpoint=5 is another$"):
        checkpoint.choose(tmp_path, which)
    shutil.rmtree(run_folder.checkpoint_folder(tmp_path, 5))
    with pytest.raises(ValueError, match=r"checksum$"):
        checkpoint.choose(tmp_path, which)


def test_of_the_same_tensors_the_state_alone_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that at no moment the checkpoint is away; but not where its tensors were damaged meanwhile."""
    monkeypatch.setattr(checkpoint, "_remove", None)  # to call it would raise
    save(tmp_path, 5)
    path = save(tmp_path, 5, run="b2")
    assert checkpoint.verify(path).state["run"] == "b2"
    assert [p.name for p in path.parent.iterdir()] == ["step-00000005"]
    monkeypatch.undo()
    (path / "model.safetensors").write_bytes(b"damaged")
    assert checkpoint.verify(save(tmp_path, 5, run="c3")).state["run"] == "c3"


def test_an_unfinished_folder_never_counts(tmp_path: Path) -> None:
    """Neither it, nor what was set aside, nor a stray file is a checkpoint."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(save(tmp_path, 5), folder / ".step-00000009.unfinished")
    shutil.copytree(folder / "step-00000005", folder / "step-00000007.damaged")
    (folder / "step-00000008").write_text("a file")
    for name in (
        "step-\u00b2",
        "step-\u0665\u0665\u0665\u0665\u0665\u0665\u0665\u0665",
        "step-5",
        "step-000000005",
        "step-",
    ):
        (folder / name).mkdir()
    (folder / f"step-{'9' * 200}").mkdir()
    assert run_folder.steps(tmp_path) == [5]
    assert checkpoint.choose(tmp_path, "latest").step == 5
    assert run_folder.steps(tmp_path / "nowhere") == []


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the folder and the remedy; the checkpoint that was there stays."""
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


def test_json_appears_whole(tmp_path: Path) -> None:
    """A value that cannot be written leaves the old file as it was."""
    path = tmp_path / "best.json"
    files.write_json(path, {"step": 1})
    with pytest.raises(TypeError):
        files.write_json(path, {"step": 2, "odd": object()})
    assert json.loads(path.read_text()) == {"step": 1}


# Which one


def test_damaged_checkpoints_are_found_out(tmp_path: Path, damage: Damage) -> None:
    """Whatever is wrong with it, the error names the folder."""
    path = save(tmp_path, 5)
    checkpoint.verify(path, "a1")
    damage(path)
    with pytest.raises(ValueError, match="step-00000005 is damaged: "):
        checkpoint.verify(path)
    with pytest.raises(ValueError, match="step-00000005 is damaged: "):
        checkpoint.choose(tmp_path, "latest")


def test_the_latest_that_verifies(tmp_path: Path, damage: Damage) -> None:
    """Damaged ones are set aside under another name, with a line each, and not met again."""
    for step in (5, 10, 15):
        save(tmp_path, step)
    for step in (10, 15):
        damage(run_folder.checkpoint_folder(tmp_path, step))
    found, lines = checkpoint.latest(tmp_path, "a1")
    assert found is not None
    assert (found.step, len(lines)) == (5, 2)
    assert "step-00000015 is damaged: " in lines[0]
    assert lines[1].endswith("; set aside as step-00000010.damaged")
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000005",
        "step-00000010.damaged",
        "step-00000015.damaged",
    ]
    assert checkpoint.latest(tmp_path, "a1")[1] == []


def test_damaged_again(tmp_path: Path) -> None:
    """A second damaged checkpoint of the same step takes the place of the first."""
    for _ in range(2):
        cut("model.safetensors")(save(tmp_path, 5))
        found, lines = checkpoint.latest(tmp_path, "a1")
        assert (found, len(lines)) == (None, 1)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000005.damaged"]


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    """A folder that was copied in is not resumed, though whole."""
    save(tmp_path, 5)
    save(tmp_path, 10, run="b2")
    with pytest.raises(ValueError, match="it is of another run, b2"):
        checkpoint.verify(run_folder.checkpoint_folder(tmp_path, 10), "a1")
    found, lines = checkpoint.latest(tmp_path, "a1")
    assert found is not None
    assert (found.step, len(lines)) == (5, 1)
    assert "another run, b2" in lines[0]


def test_choose(tmp_path: Path) -> None:
    """Best, latest, or a step; best.json names the best."""
    for step in (5, 10, 15):
        save(tmp_path, step, best=(10, 2.5) if step >= 10 else (5, 3.0))
    files.write_json(tmp_path / "best.json", {"step": 5, "loss": 2.5})
    assert [checkpoint.choose(tmp_path, which).step for which in ("best", "latest", "10", "15")] == [5, 15, 10, 15]
    for wrong in ("7", "newest", "-5"):
        with pytest.raises(FileNotFoundError, match=rf"no checkpoint '{wrong}' in .*: .*best, latest and 5, 10, 15"):
            checkpoint.choose(tmp_path, wrong)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*nowhere: train with"):
        checkpoint.choose(tmp_path / "nowhere")


@pytest.mark.parametrize("lost", [None, "", "[]", '{"step": "x"}', '{"loss": 1.0}'])
def test_a_lost_best_json_is_rebuilt(tmp_path: Path, lost: str | None) -> None:
    """From the newest state that can be read."""
    for step in (5, 10, 15, 20):
        save(tmp_path, step, best=(10, 2.5) if step >= 10 else (5, 3.0))
    (run_folder.checkpoint_folder(tmp_path, 20) / "state.json").write_text("{")
    if lost is not None:
        (tmp_path / "best.json").write_text(lost)
    assert checkpoint.best_step(tmp_path) == 10
    assert checkpoint.choose(tmp_path, "best").step == 10


def test_without_a_best_the_latest_is_the_best(tmp_path: Path) -> None:
    """Before the first evaluation, or where the best is gone."""
    assert checkpoint.best_step(tmp_path) is None
    save(tmp_path, 5)
    save(tmp_path, 10)
    assert checkpoint.best_step(tmp_path) is None
    assert checkpoint.choose(tmp_path, "best").step == 10
    files.write_json(tmp_path / "best.json", {"step": 7, "loss": 1.0})
    assert checkpoint.choose(tmp_path, "best").step == 10


@pytest.mark.parametrize(
    ("keep", "interval", "left"),
    [
        (1, 1, [10, 25]),
        (2, 1, [10, 20, 25]),
        (4, 1, [10, 15, 20, 25]),
        (9, 1, None),
        (1, 15, [10, 15, 25]),
        (2, 15, [10, 15, 20, 25]),
        (2, 5, [10, 20, 25]),
    ],
)
def test_prune_keeps_the_newest_and_the_best(tmp_path: Path, keep: int, interval: int, left: list[int] | None) -> None:
    """And so many at multiples of the interval; it touches nothing else."""
    steps = [5, 10, 15, 20, 25]
    for step in steps:
        save(tmp_path, step)
    files.write_json(tmp_path / "best.json", {"step": 10, "loss": 2.5})
    (tmp_path / "checkpoints" / "notes").mkdir()
    checkpoint.prune(tmp_path, keep, interval)
    assert run_folder.steps(tmp_path) == (left or steps)
    assert (tmp_path / "checkpoints" / "notes").is_dir()


# What state.json, config.json and best.json say


def flips(content: bytes) -> Iterator[bytes]:
    """The content with one bit changed, for each of its bits."""
    for i in range(len(content)):
        for bit in range(8):
            yield content[:i] + bytes([content[i] ^ 1 << bit]) + content[i + 1 :]


def older(path: Path, **changes: Any) -> None:
    """Takes the sum of itself out of a file, as an older version would have written it, and changes what it says."""
    value = {**json.loads(path.read_text()), **changes}
    del value["sha256"][path.name]
    path.write_text(json.dumps({k: v for k, v in value.items() if k != "sha256" or v}))


@pytest.fixture
def full(tmp_path: Path) -> Path:
    """An out_dir whose one checkpoint, of step 60, says all that a run's does."""
    model, optimizer = trained()
    known = asdict(checkpoint.State(step=60, rows=240, tokens=1920, seconds=1.5e-05, val_loss=2.3000000000000003))
    more = {"model": asdict(SHAPE), "tokenizer": {"kind": "characters", "characters": "aé\n"}, "data": "0f", "row": 8}
    state = {"run": "a1", **known, **more, "scaler": {}, "resolved": {"device": "cpu", "threads": 1}}
    checkpoint.save(tmp_path, 60, *tensors(model, optimizer), state)
    run_folder.keep_asked(tmp_path, "a1", flat(TrainConfig()))
    files.write_sealed(tmp_path / "best.json", {"step": 60, "loss": 2.3})
    return tmp_path


def test_no_bit_of_a_state_can_change(full: Path) -> None:
    path = run_folder.checkpoint_folder(full, 60) / "state.json"
    content = path.read_bytes()
    for other in flips(content):
        path.write_bytes(other)
        with pytest.raises(ValueError, match="step-00000060 is damaged: "):
            checkpoint.state_of(path.parent)
    path.write_bytes(content)
    assert checkpoint.verify(path.parent, "a1").step == 60


def test_no_bit_of_a_config_can_change(full: Path) -> None:
    content = (full / "config.json").read_bytes()
    for other in flips(content):
        (full / "config.json").write_bytes(other)
        with pytest.raises(ValueError, match=r"config\.json is damaged \("):
            run_folder.asked(full)
    (full / "config.json").write_bytes(content)
    assert run_folder.asked(full).run == "a1"


def test_no_bit_of_the_best_can_change(full: Path) -> None:
    """It is found in the states then: here they know of none."""
    content = (full / "best.json").read_bytes()
    assert checkpoint.best_step(full) == 60
    for other in flips(content):
        (full / "best.json").write_bytes(other)
        assert checkpoint.best_step(full) is None


def test_white_space_is_no_damage(full: Path) -> None:
    for path in (run_folder.checkpoint_folder(full, 60) / "state.json", full / "config.json"):
        path.write_text(json.dumps(json.loads(path.read_text())) + "\n\n")
    assert checkpoint.verify(run_folder.checkpoint_folder(full, 60)).step == 60
    assert run_folder.asked(full).sealed


def test_what_older_versions_wrote_is_taken_with_a_line(full: Path) -> None:
    older(run_folder.checkpoint_folder(full, 60) / "state.json")
    older(full / "config.json")
    older(full / "best.json")
    found, lines = checkpoint.latest(full, "a1")
    assert found is not None
    assert lines == [f"{found.path / 'state.json'} has no checksum, as older versions wrote it: it is used as it is"]
    assert not run_folder.asked(full).sealed
    with pytest.warns(UserWarning, match="has no checksum"):
        assert checkpoint.choose(full).step == 60


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"step": 70}, "it says step 70"),
        ({"step": "60"}, "format code"),
        ({"rows": 340}, "its 340 rows are more than its 1920 tokens make"),
        ({"tokens": 1919}, "its 240 rows are more"),
        ({"tokens": -1}, "whole numbers from 0 on"),
        ({"rows": 240.0}, "whole numbers from 0 on"),
        ({"evaluations_without_improvement": True}, "whole numbers from 0 on"),
        ({"sha256": {"model.safetensors": "0", "state.json": ""}}, "its sha256 names model.safetensors"),
        ({"sha256": {"model.safetensors": "0", "optimizer.safetensors": "0", "other": "", "state.json": ""}}, "other"),
        ({"model": {**asdict(SHAPE), "n_head": 0}}, "n_head"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_an_older_state_cannot_say(full: Path, changes: dict[str, Any], words: str) -> None:
    path = run_folder.checkpoint_folder(full, 60)
    older(path / "state.json", **changes)
    with pytest.raises(ValueError, match=f"step-00000060 is damaged: .*{words}"):
        checkpoint.state_of(path)
    found, lines = checkpoint.latest(full, "a1")
    assert found is None
    assert lines[0].endswith("; set aside as step-00000060.damaged")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("grad_clip", -1.0, "grad_clip=-1.0: must be at least 0"),
        ("seed", "1337", "seed = '1337': must be int"),
        ("batch_size", True, "batch_size = True"),
        ("dtype", "float33", "dtype = 'float33'"),
        ("beta2", 1.5, "beta2=1.5: must be below 1"),
        ("n_layer", 0, "n_layer=0"),
    ],
)
def test_what_was_asked_must_be_possible(full: Path, name: str, value: Any, words: str) -> None:
    """A file that was changed by hand has no sum, or a wrong one; without one its values are looked at."""
    values = flat(TrainConfig()) | {name: value}
    (full / "config.json").write_text(json.dumps({"run": "a1", "folio": "0", "asked": values}))
    with pytest.raises(ValueError, match=rf"config\.json is damaged \({words}.*--init_from={full}"):
        run_folder.asked(full)
    with pytest.warns(UserWarning, match="config.json is damaged"):
        assert checkpoint.choose(full).asked == {}


def test_a_checkpoint_under_another_steps_name(full: Path) -> None:
    """Though each of its files is whole."""
    shutil.copytree(run_folder.checkpoint_folder(full, 60), run_folder.checkpoint_folder(full, 70))
    found, lines = checkpoint.latest(full, "a1")
    assert found is not None
    assert found.step == 60
    assert "step-00000070 is damaged: it says step 60; set aside" in lines[0]


# Checkpoints that are removed while they are read


def test_what_was_chosen_can_be_read_to_its_end(tmp_path: Path) -> None:
    """From the files that verified, though their names are gone, or are another's."""
    weights = dict(checkpoint.choose(save(tmp_path, 5).parent.parent).weights())
    found = checkpoint.choose(tmp_path, "5")
    stored = found.weights()
    first = next(stored)
    for step in (10, 15, 20):
        save(tmp_path, step)
    checkpoint.prune(tmp_path, 1)
    assert run_folder.steps(tmp_path) == [20]
    save(tmp_path, 5, seed=1)
    assert all(torch.equal(weights[name], weight) for name, weight in [first, *stored])
    assert len(dict(found.slots())) == 3 * len(weights)


def test_a_run_goes_on_while_its_models_are_read(tmp_path: Path) -> None:
    """Whoever asks for the latest, or the best, gets one, however soon it is removed."""
    save(tmp_path, 1)
    done = threading.Event()

    def train() -> None:
        step = 1
        while not done.is_set():
            save(tmp_path, step := step + 1, best=(step, 1.0))
            checkpoint.prune(tmp_path, 1)

    thread = threading.Thread(target=train)
    thread.start()
    try:
        found = [checkpoint.choose(tmp_path)]
        while len({f.step for f in found}) < 9:
            found += [checkpoint.choose(tmp_path, which) for which in ("latest", "best")]
        assert all(f.model().config == SHAPE for f in found)
    finally:
        done.set()
        thread.join()
    with pytest.raises(FileNotFoundError, match=r"no checkpoint '1' in .*: there are best, latest and \d+"):
        checkpoint.choose(tmp_path, "1")


# What does not fit


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    """By the parameter's name."""
    found = checkpoint.choose(save(tmp_path, 5).parent.parent)
    model = GPT(GPTConfig(**{**vars(SHAPE), "n_layer": 2}))
    with pytest.raises(ValueError, match=r"transformer\.h\.1\..* is not among them"):
        checkpoint.load_weights(model, found.weights())
    model = GPT(GPTConfig(**{**vars(SHAPE), "block_size": 4}))
    with pytest.raises(ValueError, match=r"wpe\.weight has shape \(8, 8\), the model \(4, 8\)"):
        checkpoint.load_weights(model, found.weights())
