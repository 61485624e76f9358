"""folio import: a run that can be resumed, from nanoGPT's checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import POSIX, SMALL, assert_refused, python, tree
from nanogpt_run import Folio, argv, assert_equal, run_of, slots_of, their_optimizer

from folio.checkpoints import checkpoint, find
from folio.records import run_folder
from folio.records.metrics import read_metrics

pytest_plugins = ["nanogpt_folders"]


@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_import(out_dir: Path, tmp_path: Path, shakespeare: Path, folio: Folio, folder: bool) -> None:
    """A whole out_dir: verified, with the options and the best; it can be resumed, and imported again."""
    to = tmp_path / "new" / "run"
    outcome = folio("import", out_dir if folder else out_dir / "ckpt.pt", "--to", to)
    assert (outcome.code, outcome.err) == (0, "")
    assert "step 200" in outcome.out
    assert f"--init_from=resume --out_dir={to}" in outcome.out
    one, two = find.by_name(str(out_dir)), find.by_name(str(to))
    checkpoint.verify(two.path, run_folder.read_config(to)[0])
    for mine, others in ((one.weights(), two.weights()), (one.slots(), two.slots())):
        assert_equal(dict(mine), dict(others))
    assert (two.step, two.asked) == (200, one.asked)
    best = json.loads((to / "best.json").read_text())
    assert (best["step"], best["loss"]) == (200, pytest.approx(2.6147, abs=1e-4))
    assert folio("train", *argv(to, shakespeare, "--max_iters=201")).code == 0
    assert folio("import", to, "--to", tmp_path / "again").code == 0
    assert sorted(p.name for p in out_dir.iterdir()) == ["ckpt.pt"]


def test_import_grows_the_vocabulary(
    out_dir: Path, tmp_path: Path, shakespeare: Path, folio: Folio, theirs: dict[str, Any]
) -> None:
    """The old ids keep weights and moments; the new ones start at the mean, with zero moments. Training continues."""
    to = tmp_path / "grown"
    assert folio("import", out_dir / "ckpt.pt", "--to", to, "--vocab_size=128").code == 0
    assert find.by_name(str(to)).state["best"] is None  # this model was not evaluated
    _, params, optimizer = their_optimizer(theirs)
    slots, wte = slots_of(params, optimizer), "transformer.wte.weight"
    with run_of(to, shakespeare, "--max_iters=200") as run:
        mine = dict(run.model.named_parameters())
        found = slots_of(mine, run.optimizer)
    assert mine[wte].shape == (128, 64)
    assert torch.equal(mine[wte][:65], params[wte])
    torch.testing.assert_close(mine[wte][65:], params[wte].mean(0).expand(63, -1))
    for slot in ("exp_avg", "exp_avg_sq"):
        grown = found[f"{wte}/{slot}"]
        assert grown.shape == (128, 64)
        assert torch.equal(grown[:65], slots[f"{wte}/{slot}"])
        assert not grown[65:].any()
    unchanged = [name for name in slots if not name.startswith(f"{wte}/exp")]
    assert_equal({name: found[name] for name in unchanged}, {name: slots[name] for name in unchanged})

    outcome = folio("train", *argv(to, shakespeare, "--max_iters=205"))
    assert (outcome.code, outcome.err) == (0, "")
    losses = [r["loss"] for r in read_metrics(to / "metrics.jsonl") if r["kind"] == "train"]
    assert len(losses) == 5
    assert max(losses) < 3


def test_import_grows_the_average_too(tmp_path: Path, story: Path, folio: Folio) -> None:
    """As it grows the weights."""
    out, to = tmp_path / "out", tmp_path / "grown"
    argv = [*SMALL, f"--data_dir={story}", f"--out_dir={out}", "--max_iters=2", "--ema_decay=0.5"]
    assert folio("train", *argv).code == 0
    assert folio("import", out, "--to", to, "--vocab_size=64").code == 0
    before, after = (dict(find.by_name(str(run)).with_weights("ema").weights()) for run in (out, to))
    wte = before["transformer.wte.weight"]
    torch.testing.assert_close(after["transformer.wte.weight"], torch.cat([wte, wte.mean(0).expand(64 - len(wte), -1)]))


def test_import_refuses_fewer_ids(out_dir: Path, tmp_path: Path, folio: Folio) -> None:
    outcome = folio("import", out_dir, "--to", tmp_path / "to", "--vocab_size=64")
    assert_refused(outcome, "vocab_size=64", "65")
    assert not (tmp_path / "to").exists()


def test_import_overwrites_nothing(out_dir: Path, tmp_path: Path, folio: Folio) -> None:
    """A folder that is not empty is left as it is; an empty one is used."""
    to = tmp_path / "to"
    to.mkdir()
    (to / "notes.txt").write_text("mine")
    for there in (to, out_dir, to / "notes.txt"):
        before = tree(tmp_path)
        assert_refused(folio("import", out_dir / "ckpt.pt", "--to", there), there, "is there already")
        assert tree(tmp_path) == before
    (to / "notes.txt").unlink()
    assert folio("import", out_dir / "ckpt.pt", "--to", to).code == 0
    assert run_folder.steps(to) == [200]


@pytest.mark.parametrize("part", [0.3, 0.999])
def test_import_of_a_damaged_file(out_dir: Path, tmp_path: Path, folio: Folio, part: float) -> None:
    """One line that names it, and no files are left."""
    path = out_dir / "ckpt.pt"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    before = tree(tmp_path)
    assert_refused(folio("import", path, "--to", tmp_path / "to"), path, "damaged")
    assert_refused(folio("import", tmp_path / "ckpt.pt", "--to", tmp_path / "to"), tmp_path / "ckpt.pt")
    assert tree(tmp_path) == before


def test_import_that_fails_late(out_dir: Path, tmp_path: Path, folio: Folio, theirs: dict[str, Any]) -> None:
    """If the optimizer's last tensor does not fit, no files are left either."""
    state = {**theirs["optimizer"]["state"], 14: {"step": torch.tensor(200.0), "exp_avg": torch.ones(3)}}
    torch.save({**theirs, "optimizer": {**theirs["optimizer"], "state": state}}, out_dir / "ckpt.pt")
    before = tree(tmp_path)
    assert_refused(folio("import", out_dir, "--to", tmp_path / "to"), out_dir / "ckpt.pt", "optimizer does not fit")
    assert tree(tmp_path) == before


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (2**17, 2**17))
from folio import cli
cli.main("import")
"""


@POSIX
def test_import_without_room(out_dir: Path, tmp_path: Path) -> None:
    """If files may not grow to the model's size, the error names the folder, and no files are left."""
    before = tree(tmp_path)
    done = python("-c", LIMITED, out_dir, "--to", tmp_path / "to")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert f"{tmp_path / 'to'} could not be written" in done.stderr
    assert tree(tmp_path) == before
