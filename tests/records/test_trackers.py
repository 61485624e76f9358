"""Records sent to TensorBoard, Weights & Biases and trackio, read back from their files; and trackers that fail."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL, Outcome, assert_refused
from tracker_files import READ, tensorboard, wandb_records, wandb_rows

from folio.records.log import Log
from folio.records.metrics import read_metrics
from folio.records.trackers import KNOWN, parse

CONFIG = {"n_layer": 2, "compile": "auto", "dropout": 0.1}
TEXT = "Hello, <b>\n\n\tit said  twice"
EVALUATIONS = [
    {"kind": "eval", "step": 0, "train_loss": 4.5, "val_loss": 4.75, "lr": 0.125, "mfu": math.nan},
    {"kind": "eval", "step": 8, "train_loss": 3.0, "val_loss": 3.25, "lr": 0.25, "mfu": 0.375},
]


def line(step: int, loss: float) -> dict[str, Any]:
    """A train record. Some numbers are not finite, as with a device of unknown peak, or an overflow in float16."""
    strange = {"grad_norm": math.inf if step == 1 else 1.5, "mfu": math.nan if step == 0 else 0.5}
    counts = {"tokens": 128 * (step + 1), "tokens_per_second": 2048.0}
    return {"kind": "train", "step": step, "loss": loss, "lr": 0.5, **strange, **counts}


LINES = [line(step, 4.0 - step / 8) for step in range(8)]
LOSSES = [(step, 4.0 - step / 8) for step in range(8)]
FIRST = [
    {"kind": "start", "step": 0, "tokens_per_iteration": 128},
    EVALUATIONS[0],
    *LINES,
    EVALUATIONS[1],
    {"kind": "hellaswag", "step": 8, "style": "completion", "acc": 0.25, "acc_norm": 0.3125, "total": 16},
    {"kind": "sample", "step": 8, "number": 1, "text": TEXT},
    {"kind": "wte", "step": 8, "norm": 1.5, "rows": 3, "angle": math.nan, "huge": 10**400, "even": True, "note": "a"},
]


each = pytest.mark.parametrize("name", KNOWN)


@pytest.fixture(scope="session")
def trackio_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """trackio reads the name of its folder once, so each test has its own project."""
    assert "trackio" not in sys.modules
    return tmp_path_factory.mktemp("trackio")


@pytest.fixture(autouse=True)
def out(tmp_path: Path, trackio_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The run's folder, which also receives what trackers write elsewhere. No network, and no server at the end."""
    out = tmp_path / f"out-{time.time_ns()}"
    out.mkdir()
    for variable in [v for v in os.environ if v.startswith(("WANDB_", "TRACKIO_"))]:
        monkeypatch.delenv(variable)
    for variable in ("HOME", "HF_HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / "home"))
    for variable, value in {
        "DIR": out,
        "MODE": "offline",
        "SILENT": True,
        "CONSOLE": "off",
        "FINISH_TIMEOUT": 60,
    }.items():
        monkeypatch.setenv(f"WANDB_{variable}", str(value))
    monkeypatch.setenv("TRACKIO_DIR", str(trackio_dir))
    monkeypatch.chdir(tmp_path)
    yield out
    if (module := sys.modules.get("wandb")) is not None:
        module.teardown()


def follow(out: Path, *names: str, step: int = 0, main: bool = True) -> Log:
    log = Log(main, total=10)
    log.open(out)
    log.follow(names, out, project=out.name, name="first", run_id="abc123", step=step, config=CONFIG)
    return log


def written(log: Log, records: list[dict[str, Any]]) -> None:
    for record in records:
        log.write(record)
    log.close()


def losses(out: Path) -> list[int]:
    return [r["step"] for r in read_metrics(out / "metrics.jsonl") if r["kind"] == "train"]


@each
def test_numbers_and_texts_are_sent(name: str, out: Path) -> None:
    """Over the steps. Numbers that are not finite are left out; mfu is in percent."""
    written(follow(out, name), FIRST)
    points, config = READ[name](out)
    if name == "wandb":  # nanoGPT's, with evaluations
        assert points.pop("iter") == [(0, 0), (8, 8)]
        assert points["lr"].pop(0) == (0, 0.125)
        assert points["lr"].pop() == (8, 0.25)
        assert points["mfu"].pop() == (8, 37.5)
    assert points == {
        "batch/loss": LOSSES,
        "lr": [(s, 0.5) for s in range(8)],
        "grad_norm": [(s, 1.5) for s in range(8) if s != 1],
        "tokens": [(s, 128 * (s + 1)) for s in range(8)],
        "tokens_per_second": [(s, 2048) for s in range(8)],
        "mfu": [(s, 50) for s in range(1, 8)],
        "train/loss": [(0, 4.5), (8, 3.0)],
        "val/loss": [(0, 4.75), (8, 3.25)],
        "hellaswag/acc": [(8, 0.25)],
        "hellaswag/acc_norm": [(8, 0.3125)],
        "sample/1": [(8, TEXT)],
        "wte/norm": [(8, 1.5)],
        "wte/rows": [(8, 3)],
    }
    assert {key: config[key] for key in CONFIG} == CONFIG


@each
def test_a_resumed_run_continues_in_the_tracker(name: str, out: Path) -> None:
    """After a kill at 7 and a checkpoint at 5, the measurements of 5 remain, and steps 5 to 7 are written again."""
    again = [(step, 20.0 - step / 8) for step in (5, 6, 7)]
    measured = [{**record, "step": 5} for record in FIRST if record["kind"] in ("hellaswag", "sample")]
    written(follow(out, name), [{**EVALUATIONS[1], "step": 5}, *measured, *LINES])
    written(follow(out, name, step=5), [line(*point) for point in again])
    points, config = READ[name](out)
    shown = LOSSES[:5] if name == "tensorboard" else LOSSES  # the others hide nothing
    assert points["batch/loss"] == shown + again
    assert points["val/loss"] == [(5, 3.25)]
    assert points["hellaswag/acc"] == [(5, 0.25)]
    assert points["sample/1"] == [(5, TEXT)]
    assert {key: config[key] for key in CONFIG} == CONFIG


def test_tensorboard_reads_a_run_resumed_within_a_second_in_order(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Event files of one second are read by name, where a process's tenth precedes its ninth and would delete it."""
    from tensorboard.summary.writer import event_file_writer

    class Number:
        get = iter((9, 10)).__next__

    monkeypatch.setattr(event_file_writer, "_global_uid", Number)
    written(follow(out, "tensorboard"), LINES[:5])
    written(follow(out, "tensorboard", step=5), LINES[5:])
    assert tensorboard(out).points["batch/loss"] == LOSSES


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_run_without_a_name_gets_one(name: str, out: Path) -> None:
    """As nanoGPT's ``wandb_run_name = None``."""
    log = Log(True, total=10)
    log.open(out)
    log.follow([name], out, project=out.name, name="", run_id="abc123", step=0, config=CONFIG)
    written(log, LINES)
    if name == "wandb":
        (run,) = wandb_records(out, "run")
        assert run.run_id == "abc123"
    else:
        from trackio import Api

        assert [run.name for run in Api().runs(out.name)] == ["abc123"]


def test_wandb_gets_nanogpts_keys(out: Path) -> None:
    """An evaluation is one row with nanoGPT's names; the x axis of everything is the step."""
    written(follow(out, "wandb"), FIRST)
    evaluations = [row for row in wandb_rows(out) if "val/loss" in row]
    assert [set(row) - {"step"} for row in evaluations] == [
        {"iter", "train/loss", "val/loss", "lr"},  # mfu is not known yet
        {"iter", "train/loss", "val/loss", "lr", "mfu"},
    ]
    assert [(m.glob_name, m.step_metric) for m in wandb_records(out, "metric")] == [("*", "step")]
    (run,) = wandb_records(out, "run")
    assert (run.project, run.display_name, run.run_id) == (out.name, "first", "abc123")


def test_all_trackers_at_once(out: Path) -> None:
    """A tracker that is named twice is opened once."""
    written(follow(out, *KNOWN, *KNOWN), FIRST)
    for read in READ.values():
        assert read(out).points["batch/loss"] == LOSSES
    assert len(list((out / "tensorboard").iterdir())) == 1


def test_other_ranks_send_nothing(out: Path) -> None:
    written(follow(out, *KNOWN, main=False), FIRST)
    assert list(out.iterdir()) == []


@each
def test_a_missing_package(name: str, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One warning with the remedy; the run and the other trackers continue."""
    for module in [m for m in sys.modules if m.split(".")[0] == name or m.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.warns(
        UserWarning, match=rf"^{name}: .*: training continues without it \(pip install {name}\)$"
    ) as seen:
        written(follow(out, *KNOWN), FIRST)
    monkeypatch.undo()
    assert len(seen) == 1
    assert losses(out) == list(range(8))
    assert (out / "tensorboard").exists() == (name != "tensorboard")


def test_a_folder_that_cannot_be_created(out: Path) -> None:
    (out / "tensorboard").write_text("in the way")
    with pytest.warns(UserWarning, match=r"^tensorboard: .*File exists.*: training continues without it$") as seen:
        written(follow(out, "tensorboard"), FIRST)
    assert len(seen) == 1
    assert losses(out) == list(range(8))


def test_wandb_without_a_key(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.warns(UserWarning, match=r"^wandb: No API key configured.*: training continues without it$") as seen:
        written(follow(out, "wandb"), FIRST)
    assert len(seen) == 1
    assert losses(out) == list(range(8))


def break_tracker(name: str, out: Path) -> None:
    """Makes an open tracker fail."""
    if name == "tensorboard":
        time.sleep(0.1)  # until its thread has written the configuration
        shutil.rmtree(out / "tensorboard")
    elif name == "wandb":
        sys.modules["wandb"].run.finish()
    else:
        sys.modules["trackio"].finish()


@each
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread
def test_a_tracker_that_fails_during_the_run_is_dropped(name: str, out: Path) -> None:
    log = follow(out, *KNOWN)
    log.write(LINES[0])
    break_tracker(name, out)

    def continue_run() -> None:
        for record in LINES[1:]:
            log.write(record)
            time.sleep(0.02)  # until that thread runs
        log.close()

    with pytest.warns(UserWarning, match=f"^{name}: .*: training continues without it$") as seen:
        continue_run()
    assert len(seen) == 1
    assert losses(out) == list(range(8))
    for other in KNOWN.keys() - {name}:
        assert READ[other](out).points["batch/loss"] == LOSSES


def test_a_tracker_that_fails_at_the_end(out: Path) -> None:
    log = follow(out, *KNOWN)
    break_tracker("trackio", out)
    with pytest.warns(UserWarning, match="^trackio: .*: training continues without it$") as seen:
        log.close()
    assert len(seen) == 1


def test_names_of_trackers() -> None:
    assert parse("") == ()
    assert parse("wandb, tensorboard,") == ("wandb", "tensorboard")
    with pytest.raises(ValueError, match=r"^track=wandb,mlflow: .*'mlflow': choose from tensorboard, wandb, trackio$"):
        parse("wandb,mlflow")


# Through the command


def test_a_tracked_run_is_resumed_in_all_trackers(folio: Callable[..., Outcome], story: Path, out: Path) -> None:
    flags = [*SMALL, f"--data_dir={story}", f"--out_dir={out}", "--track=tensorboard,trackio", "--wandb_log=True"]
    flags += [f"--wandb_project={out.name}", "--wandb_run_name=first", "--init_from=auto"]
    for steps in (5, 10):
        outcome = folio("train", *flags, f"--max_iters={steps}")
        assert outcome.code == 0, outcome.err
    found = [(r["step"], r["val_loss"]) for r in read_metrics(out / "metrics.jsonl") if r["kind"] == "eval"]
    assert [step for step, _ in found] == [0, 5, 10]
    run_id = json.loads((out / "config.json").read_text())["run"]
    seen = tensorboard(out)
    assert seen.points["val/loss"] == [(step, pytest.approx(loss)) for step, loss in found]
    assert seen.config["n_embd"] == 16
    assert len(list((out / "wandb").glob(f"offline-run-*/run-{run_id}.wandb"))) == 2
    (run,) = sys.modules["trackio"].Api().runs(out.name)
    assert run.name == f"first-{run_id}"


def test_an_unknown_tracker(folio: Callable[..., Outcome], story: Path, out: Path) -> None:
    outcome = folio("train", *SMALL, f"--data_dir={story}", f"--out_dir={out}", "--track=mlflow")
    assert_refused(outcome, "track=mlflow", "tensorboard, wandb, trackio")
    assert list(out.iterdir()) == []
