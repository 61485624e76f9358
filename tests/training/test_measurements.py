"""What a run measures while it trains, and what ends it before max_iters."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from children import Spawn, reached, to_its_end
from conftest import SMALL, Outcome, assert_refused, python, require_posix, tree
from run_results import assert_same_bits, timeless

from folio.checkpoints import find
from folio.evaluation import scoring
from folio.machine.runtime import Runtime
from folio.records import run_folder
from folio.records.log import Log
from folio.records.metrics import read_metrics

require_posix()

Run = Callable[..., Outcome]

WATCH = ["--hellaswag_interval=4", "--sample_interval=3", "--sample_prompt=The ferry", "--sample_count=2"]
WATCH += ["--sample_tokens=14", "--sample_top_k=9", "--learning_rate=1e-2", "--dropout=0.1"]
STILL = ["--learning_rate=0", "--min_lr=0", "--eval_interval=2", "--warmup_iters=0"]  # learns nothing


@pytest.fixture
def argv(story: Path, items: Path) -> list[str]:
    return [*SMALL, f"--data_dir={story}", f"--hellaswag_data={items}"]


def lines(out: Path, kind: str) -> list[dict[str, Any]]:
    return [r for r in read_metrics(out / "metrics.jsonl") if r["kind"] == kind]


def test_each_has_its_own_interval(folio: Run, argv: list[str], tmp_path: Path) -> None:
    """All are measured at the end too; an untrained model is not sampled."""
    out = tmp_path / "out"
    outcome = folio("train", *argv, *WATCH, f"--out_dir={out}")
    assert outcome.code == 0, outcome.err
    assert [r["step"] for r in lines(out, "eval")] == [0, 5, 10]
    assert [r["step"] for r in lines(out, "hellaswag")] == [0, 4, 8, 10]
    assert [(r["step"], r["number"]) for r in lines(out, "sample")] == [(s, n) for s in (3, 6, 9, 10) for n in (0, 1)]
    assert all(len(r["text"]) == 14 and r["text"].startswith("The ferry") for r in lines(out, "sample"))
    assert all(r["total"] == 12 and 0 <= r["acc_norm"] <= 1 for r in lines(out, "hellaswag"))
    assert "step 4: HellaSwag acc_norm" in outcome.out
    assert "step 9: sample 1: The ferry" in outcome.out


def test_measuring_changes_nothing(folio: Run, argv: list[str], tmp_path: Path) -> None:
    """A run with measurements ends in the same bits as one without."""
    for name, flags in {"watched": WATCH, "alone": WATCH[-2:]}.items():
        assert folio("train", *argv, *flags, f"--out_dir={tmp_path / name}").code == 0
    kept = [run_folder.checkpoint_folder(tmp_path / name, 10) / "model.safetensors" for name in ("watched", "alone")]
    assert kept[0].read_bytes() == kept[1].read_bytes()


def test_the_commands_find_the_same(folio: Run, argv: list[str], items: Path, tmp_path: Path) -> None:
    """folio eval finds the same numbers for a checkpoint as its run found at that step."""
    out = tmp_path / "out"
    assert folio("train", *argv, *WATCH, f"--out_dir={out}", "--eval_iters=0").code == 0
    flags = [f"--out_dir={out}", "--checkpoint=latest", "--dtype=float32", "--device=cpu"]
    assert folio("eval", *flags).code == 0
    assert folio("eval", "hellaswag", *flags, f"--data={items}").code == 0
    loss, answers = (json.loads(line) for line in (out / "evaluations.jsonl").read_text().splitlines())
    assert (loss["step"], loss["loss"]) == (10, lines(out, "eval")[-1]["val_loss"])
    last = lines(out, "hellaswag")[-1]
    assert answers == {name: last[name] for name in ("kind", "step", "style", "acc", "acc_norm", "total")}


def test_a_resumed_run_measures_the_same(folio: Run, argv: list[str], tmp_path: Path) -> None:
    """Resumed in another folder: every line of an uninterrupted run, and none twice."""
    whole, again = tmp_path / "whole", tmp_path / "again"
    flags = [*argv, *WATCH, "--max_iters=20", "--lr_decay_iters=20", "--log_txt=True", "--keep_checkpoints=9"]
    assert folio("train", *flags, f"--out_dir={whole}").code == 0
    shutil.copytree(whole, again)
    for step in (15, 20):
        shutil.rmtree(run_folder.checkpoint_folder(again, step))
    assert folio("train", *flags, f"--out_dir={again}", "--init_from=resume").code == 0
    assert_same_bits(again, whole)
    assert (again / "log.txt").read_bytes() == (whole / "log.txt").read_bytes()
    steps = [line.split()[0] for line in (whole / "log.txt").read_text().splitlines() if " hella " in line]
    assert steps == ["0", "4", "8", "12", "16", "20"]


INTERRUPTED = {  # what the bar says when the signal comes, at which of such moments, and its step
    "the first loss": ("evaluating", 1, 0),
    "an evaluation": ("evaluating, batch 1 of 2", 4, 5),
    "answers": ("HellaSwag, batch 1 of", 3, 8),
    "a sample": ("sampling, token 3 of 5", 2, 6),
    "the last evaluation": ("evaluating", 9, 10),
    "the last answers": ("HellaSwag, batch 2 of", 4, 10),
    "the last sample": ("sampling", 16, 10),
}


@pytest.fixture
def signalled(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int, signal.Signals], None]:
    """Sends this process a signal, once the bar has said this so often."""
    busy = Log.busy

    def after(says: str, times: int, number: signal.Signals) -> None:
        left = itertools.count(times, -1)

        def said(self: Log, what: str) -> None:
            busy(self, what)
            if what.startswith(says) and next(left) == 1:
                os.kill(os.getpid(), number)

        monkeypatch.setattr(Log, "busy", said)

    return after


@pytest.mark.parametrize("moment", INTERRUPTED)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_ends_a_measurement(
    folio: Run,
    argv: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    signalled: Any,
    moment: str,
    number: signal.Signals,
) -> None:
    """It is abandoned and its step saved; the resumed run makes it first and ends as an uninterrupted one."""
    says, times, step = INTERRUPTED[moment]
    monkeypatch.setitem(scoring._TOKENS, "cpu", 64)  # in several batches
    whole, out = tmp_path / "whole", tmp_path / "out"
    flags = [*argv, *WATCH, "--log_txt=True", "--init_from=auto"]
    assert folio("train", *flags, f"--out_dir={whole}").code == 0
    signalled(says, times, number)
    outcome = folio("train", *flags, f"--out_dir={out}")
    assert outcome.code == 128 + number, outcome
    assert f"\nstep {step} of 10 ({number.name})" in outcome.out
    assert run_folder.steps(out)[-1:] == ([step] if step else [])
    signalled(says, 1, signal.SIGTERM)  # again, in the same measurement if it is owed
    assert folio("train", *flags, f"--out_dir={out}").code == 143
    signalled("", -1, signal.SIGTERM)
    assert folio("train", *flags, f"--out_dir={out}").code == 0
    assert timeless(out) == timeless(whole)
    last = "checkpoints/step-00000010"
    for name in ("log.txt", "best.json", f"{last}/model.safetensors", f"{last}/optimizer.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    states = [json.loads((folder / last / "state.json").read_text()) for folder in (out, whole)]
    for state in states:
        del state["run"], state["seconds"], state["sha256"]["state.json"]  # which is of these too
    assert states[0] == states[1]
    before = timeless(out)
    assert "nothing to do: the run is at step 10" in folio("train", *flags, f"--out_dir={out}").out
    assert timeless(out) == before


def test_a_signal_before_a_measurement(
    folio: Run, argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the step before it: the measurement is not begun, and is owed."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    flags = [*argv, *WATCH, "--init_from=auto"]
    assert folio("train", *flags, f"--out_dir={whole}").code == 0
    update, steps = Runtime.step, itertools.count(1)

    def signal_in_step_five(self: Runtime, *args: Any) -> Any:
        norm = update(self, *args)
        if next(steps) == 5:
            os.kill(os.getpid(), signal.SIGUSR1)
        return norm

    monkeypatch.setattr(Runtime, "step", signal_in_step_five)
    assert folio("train", *flags, f"--out_dir={out}").code == 128 + signal.SIGUSR1
    assert [r["step"] for r in lines(out, "eval")] == [0]
    assert folio("train", *flags, f"--out_dir={out}").code == 0
    assert_same_bits(out, whole)


def test_an_owed_measurement_that_is_no_longer_scheduled(
    folio: Run, argv: list[str], tmp_path: Path, signalled: Any
) -> None:
    """A run resumes with another interval: the measurement is not made, and not owed at later steps."""
    out = tmp_path / "out"
    signalled("evaluating, batch 1 of 2", 4, signal.SIGTERM)
    assert folio("train", *argv, f"--out_dir={out}").code == 143
    signalled("", -1, signal.SIGTERM)
    flags = ["--init_from=resume", "--eval_interval=7", "--checkpoint_interval=7", f"--out_dir={out}"]
    assert folio("train", *argv, *flags).code == 0
    assert [r["step"] for r in lines(out, "eval")] == [0, 7, 10]
    assert find.choose(out, "latest").state["owed"] == []


def test_an_owed_average_that_another_optimizer_does_not_have(
    folio: Run, argv: list[str], tmp_path: Path, signalled: Any
) -> None:
    """A run resumes with another optimizer: its average starts with the next update, and is not measured before."""
    out = tmp_path / "out"
    argv = [*argv, "--ema_decay=0.9", f"--out_dir={out}"]
    signalled("evaluating the average", 1, signal.SIGTERM)
    assert folio("train", *argv).code == 143
    assert find.choose(out, "latest").state["owed"] == ["ema"]
    signalled("", -1, signal.SIGTERM)
    outcome = folio("train", *argv, "--init_from=resume", "--optimizer=muon")
    assert (outcome.code, outcome.err) == (0, "")
    assert [r["step"] for r in lines(out, "ema")] == [10]


@pytest.mark.slow
def test_a_kill_between_measurements(spawn: Spawn, argv: list[str], tmp_path: Path) -> None:
    flags = [*argv, *WATCH, "--max_iters=120", "--lr_decay_iters=120", "--checkpoint_interval=20", "--init_from=auto"]
    flags = ["-m", "folio", "train", *flags]
    to_its_end(spawn(*flags, f"--out_dir={tmp_path / 'whole'}", threads=1))
    child = spawn(*flags, f"--out_dir={tmp_path / 'out'}", threads=1)
    child.wait_until(reached(tmp_path / "out", 53))
    child.kill()
    assert child.end() == -signal.SIGKILL
    to_its_end(spawn(*flags, f"--out_dir={tmp_path / 'out'}", threads=1))
    assert_same_bits(tmp_path / "out", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_several_processes_measure_the_same(
    spawn: Spawn, folio: Run, argv: list[str], tmp_path: Path, parallel: str
) -> None:
    """The counts are those of one process, and the texts of the first rank; the others write theirs."""
    flags = [*argv, *WATCH[:-1], "--n_embd=20", "--max_iters=4"]
    assert folio("train", *flags, f"--out_dir={tmp_path / 'one'}").code == 0
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    to_its_end(spawn(*launcher, *flags, f"--parallel={parallel}", f"--out_dir={tmp_path / 'two'}", threads=1))
    assert lines(tmp_path / "two", "hellaswag") == lines(tmp_path / "one", "hellaswag") != []
    one, two = (lines(tmp_path / name, "sample") for name in ("one", "two"))
    assert [r for r in two if r["number"] < 2] == one
    assert [(r["step"], r["number"]) for r in two] == [(step, number) for step in (3, 4) for number in range(4)]
    assert len({r["text"] for r in two if r["step"] == 4}) == 4


@pytest.mark.slow
def test_beside_torch_compile(folio: Run, argv: list[str], tmp_path: Path) -> None:
    """It measures the same as an eager run, without messages about recompiling."""
    flags = [*argv, *WATCH[:-1], "--max_iters=4", "--lr_decay_iters=4"]
    compiled = python("-m", "folio", "train", *flags, "--compile=True", f"--out_dir={tmp_path / 'compiled'}")
    assert (compiled.returncode, compiled.stderr) == (0, "")
    assert folio("train", *flags, f"--out_dir={tmp_path / 'eager'}").code == 0
    for kind in ("hellaswag", "sample"):
        assert lines(tmp_path / "compiled", kind) == lines(tmp_path / "eager", kind) != []


# What ends a run


def test_patience(folio: Run, argv: list[str], tmp_path: Path) -> None:
    """The best loss is that of step 2; two evaluations later the run ends, with all measured and saved."""
    out = tmp_path / "out"
    flags = [*argv, *STILL, "--patience=2", "--hellaswag_interval=100", f"--out_dir={out}"]
    outcome = folio("train", *flags)
    assert outcome.code == 0
    assert [r["step"] for r in lines(out, "eval")] == [0, 2, 4, 6]
    assert [r["step"] for r in lines(out, "hellaswag")] == [0, 6]
    assert run_folder.steps(out)[-1] == 6
    how = f"folio train --init_from=resume --out_dir={out} --patience=4"
    assert f"step 6 of 10 (patience), {how} resumes it; best" in outcome.out
    before = timeless(out)
    outcome = folio("train", *flags, "--init_from=resume")
    assert "nothing to do: no better loss in 2 evaluations: raise --patience=2 above that" in outcome.out
    assert timeless(out) == before
    assert folio("train", *flags, "--init_from=resume", "--patience=3").code == 0
    assert run_folder.steps(out)[-1] == 8


def test_patience_restarts_when_the_loss_improves(folio: Run, argv: list[str], tmp_path: Path) -> None:
    outcome = folio("train", *argv, "--learning_rate=1e-2", "--patience=1", f"--out_dir={tmp_path / 'out'}")
    assert "step 10 of 10; best validation loss" in outcome.out


def test_max_minutes(folio: Run, argv: list[str], tmp_path: Path) -> None:
    """The run ends with an evaluation and a checkpoint of the step it has reached, and resumes from there."""
    out = tmp_path / "out"
    flags = [*argv, "--max_iters=1000000", "--eval_interval=1000000", "--log_interval=1000", f"--out_dir={out}"]
    outcome = folio("train", *flags, "--max_minutes=0.02")
    (step,) = run_folder.steps(out)
    assert outcome.code == 0
    assert f"step {step} of 1000000 (max_minutes), folio train --init_from=resume --out_dir=" in outcome.out
    assert [r["step"] for r in lines(out, "eval")] == [0, step]
    assert 0 < step < 1_000_000
    outcome = folio("train", *flags, "--init_from=resume", f"--max_iters={step + 2}")
    assert run_folder.steps(out)[-1] == step + 2


def test_no_time_at_all(folio: Run, argv: list[str], tmp_path: Path) -> None:
    """Nothing was trained, so no command to resume is printed."""
    outcome = folio("train", *argv, "--max_minutes=1e-9", f"--out_dir={tmp_path / 'out'}")
    assert outcome.code == 0
    assert outcome.out.splitlines()[-1] == "step 0 of 10 (max_minutes)"


def test_a_prompt_from_a_file(folio: Run, argv: list[str], tmp_path: Path) -> None:
    """Its tokens count as any prompt's do."""
    (tmp_path / "prompt.txt").write_text("The ferry")
    flags = ["--sample_interval=5", f"--sample_prompt=FILE:{tmp_path / 'prompt.txt'}", "--sample_tokens=12"]
    assert folio("train", *argv, *flags, f"--out_dir={tmp_path / 'out'}").code == 0
    assert {r["text"][:9] for r in lines(tmp_path / "out", "sample")} == {"The ferry"}
    assert {len(r["text"]) for r in lines(tmp_path / "out", "sample")} == {12}


@pytest.mark.slow
def test_max_minutes_of_several_processes(spawn: Spawn, argv: list[str], tmp_path: Path) -> None:
    """All leave at the same step, with exit code 0."""
    out = tmp_path / "out"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    flags = ["--max_iters=1000000", "--eval_interval=1000000", "--log_interval=1000", "--max_minutes=0.05"]
    said = to_its_end(spawn(*launcher, *argv, *flags, f"--out_dir={out}", threads=1))
    assert f"step {run_folder.steps(out)[-1]} of 1000000 (max_minutes)" in said


# Bad input


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--hellaswag_interval=5", "--hellaswag_data=nowhere.jsonl"], ["nowhere.jsonl", "HellaSwag"]),
        (["--sample_interval=5", "--sample_prompt=caf\u00e9"], ["sample_prompt", "'\u00e9'"]),
        (["--sample_interval=5", "--sample_prompt="], ["sample_prompt is empty"]),
        (
            ["--sample_interval=5", "--sample_prompt=The ferry", "--sample_tokens=9"],
            ["sample_tokens=9", "raise --sample_tokens"],
        ),
        (["--sample_interval=5", "--sample_prompt=FILE:none.txt"], ["sample_prompt=FILE:none.txt", "none.txt"]),
        (["--track=tensorbord"], ["track", "tensorbord", "tensorboard"]),
        (["--patience=-1"], ["patience=-1", "at least 0"]),
    ],
)
def test_what_cannot_be_measured(
    folio: Run, argv: list[str], tmp_path: Path, flags: list[str], words: list[str]
) -> None:
    """Is refused before anything is written."""
    assert_refused(folio("train", *argv, f"--out_dir={tmp_path / 'out'}", *flags), *words)
    assert tree(tmp_path) == {}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["holds no items"]),
        ('{"ctx": "The ferry"', [":1:", "not a HellaSwag item"]),
        ('{"ctx": "The ferry", "endings": ["a", "b", "c", "d"], "label": 4}', [":1:", "label is 4", "0, 1, 2 or 3"]),
    ],
)
def test_items_that_are_none(folio: Run, argv: list[str], tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text(text)
    before = tree(tmp_path)
    outcome = folio(
        "train", *argv, "--hellaswag_interval=5", f"--hellaswag_data={path}", f"--out_dir={tmp_path / 'out'}"
    )
    assert_refused(outcome, path, *words)
    assert tree(tmp_path) == before
