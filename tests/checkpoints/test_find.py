"""The right checkpoint of a run is found: the best, the latest that verifies, or a step; old ones are removed."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest
import torch
from conftest import make_pipe
from small_checkpoints import SHAPE, Damage, cut, flip, save

from folio import files
from folio.checkpoints import checkpoint, find
from folio.records import run_folder

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
    "model a pipe": lambda path: [(path / "model.safetensors").unlink(), make_pipe(path / "model.safetensors")],
    "state a device": lambda path: [(path / "state.json").unlink(), (path / "state.json").symlink_to("/dev/zero")],
    "all empty": lambda path: [file.write_bytes(b"") for file in path.iterdir()],
    "no files": lambda path: [file.unlink() for file in path.iterdir()],
}


@pytest.fixture(params=DAMAGES.values(), ids=DAMAGES)
def damage(request: pytest.FixtureRequest) -> Damage:
    """Each way in which a checkpoint can be broken."""
    return request.param


def test_an_unfinished_folder_never_counts(tmp_path: Path) -> None:
    """Nor a damaged one that was renamed, nor a stray file."""
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
    assert find.choose(tmp_path, "latest").step == 5
    assert run_folder.steps(tmp_path / "nowhere") == []


@pytest.mark.parametrize("which", ["best", "latest", "9"])
def test_a_damaged_choice_names_another(tmp_path: Path, which: str) -> None:
    save(tmp_path, 5)
    path = save(tmp_path, 9)
    (path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=f"^{path} is damaged: .*; --checkpoint=5 is another$"):
        find.choose(tmp_path, which)
    shutil.rmtree(run_folder.checkpoint_folder(tmp_path, 5))
    with pytest.raises(ValueError, match=r"checksum$"):
        find.choose(tmp_path, which)


def test_damaged_checkpoints_are_detected(tmp_path: Path, damage: Damage) -> None:
    """Whatever is wrong with it, the error names the folder."""
    path = save(tmp_path, 5)
    checkpoint.verify(path, "a1")
    damage(path)
    with pytest.raises(ValueError, match="step-00000005 is damaged: "):
        checkpoint.verify(path)
    with pytest.raises(ValueError, match="step-00000005 is damaged: "):
        find.choose(tmp_path, "latest")


def test_the_latest_that_verifies(tmp_path: Path, damage: Damage) -> None:
    """Damaged ones are renamed, with a line each, and not found again."""
    for step in (5, 10, 15):
        save(tmp_path, step)
    for step in (10, 15):
        damage(run_folder.checkpoint_folder(tmp_path, step))
    found, lines = find.latest(tmp_path, "a1")
    assert found is not None
    assert (found.step, len(lines)) == (5, 2)
    assert "step-00000015 is damaged: " in lines[0]
    assert lines[1].endswith("; set aside as step-00000010.damaged")
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000005",
        "step-00000010.damaged",
        "step-00000015.damaged",
    ]
    assert find.latest(tmp_path, "a1")[1] == []


def test_damaged_again(tmp_path: Path) -> None:
    """A second damaged checkpoint of the same step takes the place of the first."""
    save(tmp_path, 4)
    for _ in range(2):
        cut("model.safetensors")(save(tmp_path, 5))
        found, lines = find.latest(tmp_path, "a1")
        assert found is not None
        assert (found.step, len(lines)) == (4, 1)
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000004", "step-00000005.damaged"]


def test_if_none_is_whole_none_is_set_aside(tmp_path: Path) -> None:
    """The damage may be in another file: here, config.json would be that of another run."""
    save(tmp_path, 5)
    found, lines = find.latest(tmp_path, "of another run")
    assert found is None
    assert "it is of another run, a1" in lines[0]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000005"]


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    """A folder that was copied in is not resumed, though whole."""
    save(tmp_path, 5)
    save(tmp_path, 10, run="b2")
    with pytest.raises(ValueError, match="it is of another run, b2"):
        checkpoint.verify(run_folder.checkpoint_folder(tmp_path, 10), "a1")
    found, lines = find.latest(tmp_path, "a1")
    assert found is not None
    assert (found.step, len(lines)) == (5, 1)
    assert "another run, b2" in lines[0]


def test_choose(tmp_path: Path) -> None:
    """Best, latest, or a step; best.json names the best."""
    for step in (5, 10, 15):
        save(tmp_path, step, best=(10, 2.5) if step >= 10 else (5, 3.0))
    files.write_json(tmp_path / "best.json", {"step": 5, "loss": 2.5})
    assert [find.choose(tmp_path, which).step for which in ("best", "latest", "10", "15")] == [5, 15, 10, 15]
    for wrong in ("7", "newest", "-5"):
        with pytest.raises(FileNotFoundError, match=rf"no checkpoint '{wrong}' in .*: .*best, latest and 5, 10, 15"):
            find.choose(tmp_path, wrong)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*nowhere: train with"):
        find.choose(tmp_path / "nowhere")


@pytest.mark.parametrize("lost", [None, "", "[]", '{"step": "x"}', '{"loss": 1.0}'])
def test_a_lost_best_json_is_rebuilt(tmp_path: Path, lost: str | None) -> None:
    """From the newest state that can be read."""
    for step in (5, 10, 15, 20):
        save(tmp_path, step, best=(10, 2.5) if step >= 10 else (5, 3.0))
    (run_folder.checkpoint_folder(tmp_path, 20) / "state.json").write_text("{")
    if lost is not None:
        (tmp_path / "best.json").write_text(lost)
    assert find.best_step(tmp_path) == 10
    assert find.choose(tmp_path, "best").step == 10


def test_without_a_best_the_latest_is_the_best(tmp_path: Path) -> None:
    """Before the first evaluation, or if the best was removed."""
    assert find.best_step(tmp_path) is None
    save(tmp_path, 5)
    save(tmp_path, 10)
    assert find.best_step(tmp_path) is None
    assert find.choose(tmp_path, "best").step == 10
    files.write_json(tmp_path / "best.json", {"step": 7, "loss": 1.0})
    assert find.choose(tmp_path, "best").step == 10


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
    """And ``keep`` at multiples of the interval; it removes nothing else."""
    steps = [5, 10, 15, 20, 25]
    for step in steps:
        save(tmp_path, step)
    files.write_json(tmp_path / "best.json", {"step": 10, "loss": 2.5})
    (tmp_path / "checkpoints" / "notes").mkdir()
    find.prune(tmp_path, keep, interval)
    assert run_folder.steps(tmp_path) == (left or steps)
    assert (tmp_path / "checkpoints" / "notes").is_dir()


# Checkpoints that are removed while they are read


def test_what_was_chosen_can_be_read_to_its_end(tmp_path: Path) -> None:
    """From the verified files, even if their folder is removed or replaced."""
    weights = dict(find.choose(save(tmp_path, 5).parent.parent).weights())
    found = find.choose(tmp_path, "5")
    stored = found.weights()
    first = next(stored)
    for step in (10, 15, 20):
        save(tmp_path, step)
    find.prune(tmp_path, 1)
    assert run_folder.steps(tmp_path) == [20]
    save(tmp_path, 5, seed=1)
    assert all(torch.equal(weights[name], weight) for name, weight in [first, *stored])
    assert len(dict(found.slots())) == 3 * len(weights)


def test_models_are_read_while_the_run_continues(tmp_path: Path) -> None:
    """A reader of the latest or the best always gets one, however soon it is removed."""
    save(tmp_path, 1)
    done = threading.Event()

    def train() -> None:
        step = 1
        while not done.is_set():
            save(tmp_path, step := step + 1, best=(step, 1.0))
            find.prune(tmp_path, 1)

    thread = threading.Thread(target=train)
    thread.start()
    try:
        found = [find.choose(tmp_path)]
        while len({f.step for f in found}) < 9:
            found += [find.choose(tmp_path, which) for which in ("latest", "best")]
        assert all(f.model().config == SHAPE for f in found)
    finally:
        done.set()
        thread.join()
    with pytest.raises(FileNotFoundError, match=r"no checkpoint '1' in .*: there are best, latest and \d+"):
        find.choose(tmp_path, "1")
