"""``state.json``, ``config.json`` and ``best.json`` verify themselves, and say nothing impossible."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from small_checkpoints import SHAPE, tensors, trained

from folio import files
from folio.checkpoints import checkpoint, find
from folio.checkpoints.state import State
from folio.config.options import TrainConfig
from folio.config.table import flat
from folio.records import run_folder


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
    known = asdict(State(step=60, rows=240, tokens=1920, seconds=1.5e-05, val_loss=2.3000000000000003))
    more = {"model": asdict(SHAPE), "tokenizer": {"kind": "characters", "characters": "aé\n"}, "data": "0f", "row": 8}
    state = {"run": "a1", **known, **more, "scaler": {}, "resolved": {"device": "cpu", "threads": 1}}
    checkpoint.save(tmp_path, 60, *tensors(model, optimizer), state)
    run_folder.write_config(tmp_path, "a1", flat(TrainConfig()))
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
        with pytest.raises(ValueError, match=r"config\.json.*: restore a copy of that file"):
            run_folder.read_config(full)
    (full / "config.json").write_bytes(content)
    assert run_folder.read_config(full).run == "a1"


def test_no_bit_of_the_best_can_change(full: Path) -> None:
    """It is found in the states then: here they know of none."""
    content = (full / "best.json").read_bytes()
    assert find.best_step(full) == 60
    for other in flips(content):
        (full / "best.json").write_bytes(other)
        assert find.best_step(full) is None


def test_white_space_is_no_damage(full: Path) -> None:
    for path in (run_folder.checkpoint_folder(full, 60) / "state.json", full / "config.json"):
        path.write_text(json.dumps(json.loads(path.read_text())) + "\n\n")
    assert checkpoint.verify(run_folder.checkpoint_folder(full, 60)).step == 60
    assert run_folder.read_config(full).sealed


def test_what_older_versions_wrote_is_taken_with_a_line(full: Path) -> None:
    older(run_folder.checkpoint_folder(full, 60) / "state.json")
    older(full / "config.json")
    older(full / "best.json")
    found, lines = find.latest(full, "a1")
    assert found is not None
    assert lines == [
        f"{found.path / 'state.json'} has no checksum, since an older version wrote it: it is used without a check"
    ]
    assert not run_folder.read_config(full).sealed
    with pytest.warns(UserWarning, match="has no checksum"):
        assert find.choose(full).step == 60


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"step": 70}, "its state.json is of step 70"),
        ({"step": "60"}, "format code"),
        ({"rows": 340}, "its 340 rows need more than its 1920 tokens"),
        ({"tokens": 1919}, "its 240 rows need more"),
        ({"tokens": -1}, "not all whole numbers"),
        ({"rows": 240.0}, "not all whole numbers"),
        ({"evaluations_without_improvement": True}, "not all whole numbers"),
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
    found, lines = find.latest(full, "a1")
    assert found is None
    assert words in lines[0] or lines[0].startswith(str(path))


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
    with pytest.raises(ValueError, match=rf"config\.json: {words}.*: restore a copy.*--init_from={full}"):
        run_folder.read_config(full)
    with pytest.warns(UserWarning, match="config.json: .*: restore a copy"):
        assert find.choose(full).asked == {}


def test_a_checkpoint_under_another_steps_name(full: Path) -> None:
    """Though each of its files is whole."""
    shutil.copytree(run_folder.checkpoint_folder(full, 60), run_folder.checkpoint_folder(full, 70))
    found, lines = find.latest(full, "a1")
    assert found is not None
    assert found.step == 60
    assert "step-00000070 is damaged: its state.json is of step 60; set aside" in lines[0]
