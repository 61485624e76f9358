"""The notebooks of docs/ run in Jupyter's own kernel; and a run that its stop button ends."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from kernel import kernel
from run_results import timeless
from small_runs import TINY

import folio

pytestmark = pytest.mark.slow


@pytest.fixture
def executed(shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Runs a notebook beside the data, with parts of its text replaced; returns its cells of code."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    (tmp_path / "data" / "shakespeare_char").mkdir(parents=True)
    text = (shared_data / "tinyshakespeare.txt").read_bytes()
    (tmp_path / "data" / "shakespeare_char" / "input.txt").write_bytes(text)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run(name: str, **replaced: str) -> list[Any]:
        notebook = nbformat.read(ROOT / "docs" / name, as_version=4)
        cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert all(cell.outputs for cell in cells if "import" not in cell.source and "append" not in cell.source)
        for cell in cells:
            for old, new in replaced.items():
                cell.source = cell.source.replace(old.replace("_", " "), new)
        nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
        return cells

    return run


def said(cell: Any) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def pictures(cell: Any) -> int:
    return sum("image/png" in output.get("data", {}) for output in cell.outputs)


def test_a_first_run(executed: Callable[..., list[Any]]) -> None:
    """The second cell shows its curve; the last measures what it trained."""
    cells = executed("first-run.ipynb", **{"1000": "20"})
    assert len(cells) == 5
    assert "step 20 of 20" in said(cells[1])
    assert "iter 0" not in said(cells[1])  # the bar shows it
    assert [pictures(cell) for cell in cells] == [0, 1, 1, 0, 0]
    assert said(cells[3]).startswith("ROMEO:")
    assert "'tokens': 111539" in cells[4].outputs[0].data["text/plain"]


def test_experiments(executed: Callable[..., list[Any]], tmp_path: Path) -> None:
    cells = executed(
        "experiments.ipynb", **{"300": "20", '"eval_interval":_100': '"eval_interval": 10', "(50,": "(10,"}
    )
    assert "step 10: norm/block 0" in said(cells[1])
    assert "loss: smoothed" in said(cells[2])
    assert [pictures(cell) for cell in cells] == [0, 1, 1, 0, 1, 0]
    assert (tmp_path / "rates.png").exists()
    assert said(cells[3]).count("step 20 of 20") == 3


def test_the_stop_button(story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends fit with a checkpoint and one line; the run is usable, and goes on to the same bits."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT)]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = {**TINY, "data_dir": str(story), "dropout": 0.1, "eval_interval": 40, "max_iters": 400}
    with kernel(tmp_path) as cells:
        text, _ = cells.run(f"import folio; how = {options!r}; run = folio.build(**how, out_dir='fit')")
        assert text == ""
        text, shown = cells.run("folio.fit(run)", interrupt_at="step 40:")
        assert text.count("SIGINT") == 2
        assert "(SIGINT), folio.fit(run) continues it" in text.splitlines()[-1]
        assert "Traceback" not in text
        assert "image/png" in shown[0]
        assert shown[1] == {"text/html": "", "text/plain": ""}  # the bar is gone
        assert shown[-1]["text/plain"] == "'SIGINT'"
        text, _ = cells.run(
            "print(len(run.generate(num_samples=3, max_new_tokens=3)), run.save().name, run.state.step)"
        )
        count, name, step = text.splitlines()[-1].split()
        assert (count, name) == ("3", f"step-{int(step):08d}")
        text, shown = cells.run("folio.fit(run)")
        assert shown[-1]["text/plain"] == "'max_iters'"
        text, _ = cells.run("run = folio.train(**how, out_dir='train')", interrupt_at="step 40:")
        assert "folio.fit(run) continues it" in text.splitlines()[-1]
        text, shown = cells.run("print(run.stop); folio.fit(run)")
        assert (text.splitlines()[0], shown[-1]["text/plain"]) == ("SIGINT", "'max_iters'")
    folio.train(**{**options, "out_dir": tmp_path / "whole"})
    assert timeless(tmp_path / "fit") == timeless(tmp_path / "train") == timeless(tmp_path / "whole")
