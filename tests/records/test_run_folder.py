"""A run's folder: one training at a time, and other programs' files stay untouched."""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from children import Spawn, reached
from conftest import ROOT, SMALL, Outcome, assert_refused, tree
from run_results import timeless

import folio as package
from folio import cli, files
from folio.checkpoints import find
from folio.config.options import TrainConfig
from folio.records import run_folder
from folio.training import ownership
from folio.training.loop import fit
from folio.training.run import Run, finish
from folio.training.start import build

Folio = Callable[..., Outcome]
Train = Callable[..., Outcome]


@pytest.fixture
def train(folio: Folio, story: Path, tmp_path: Path) -> Train:
    """Runs ``folio train`` into a folder; ``train("out", "--max_iters=3")``."""

    def run(out: str | Path, *argv: str) -> Outcome:
        return folio("train", *SMALL, f"--data_dir={story}", f"--out_dir={tmp_path / out}", *argv)

    return run


def configured(story: Path, out: Path, *argv: str) -> TrainConfig:
    argv = (*SMALL, f"--data_dir={story}", f"--out_dir={out}", *argv)
    return cli.parse(TrainConfig, list(argv), "folio train", files=True)


@pytest.fixture(scope="module")
def trained(story: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "out"
    run = build(configured(story, out, "--max_iters=5", "--learning_rate=1e-2", "--dropout=0.1"))
    fit(run)
    finish(run)
    return out


@pytest.fixture
def out(trained: Path, tmp_path: Path) -> Path:
    """A copy of a folder after five steps."""
    return Path(shutil.copytree(trained, tmp_path / "out"))


@pytest.fixture
def running(story: Path, out: Path) -> Iterator[Run]:
    """A run that is still training in the folder."""
    run = build(configured(story, out, "--init_from=resume", "--max_iters=10"))
    yield run
    finish(run)


# One training at a time


@pytest.mark.parametrize("begin", ["scratch", "resume", "auto"])
def test_a_second_training_is_refused(train: Train, running: Run, out: Path, begin: str) -> None:
    """The message names the first run. Nothing is moved, rewound or created, and the first run completes."""
    before = tree(out)
    who = f"(host {socket.gethostname()}, process {os.getpid()}, since 20"
    assert_refused(train("out", f"--init_from={begin}"), f"{out}: another run trains there {who}", "--out_dir")
    (out.parent / "link").symlink_to(out)
    assert_refused(train("link", f"--init_from={begin}"), "another run trains there")
    assert tree(out) == before
    fit(running)
    assert run_folder.steps(out) == [5, 10]


def test_a_run_that_only_evaluates_needs_no_lock(
    folio: Folio, train: Train, running: Run, story: Path, out: Path
) -> None:
    before = tree(out)
    assert train("out", "--eval_only", "--init_from=resume").code == 0
    assert tree(out) == before
    assert folio("sample", f"--out_dir={out}", "--device=cpu", "--num_samples=1", "--max_new_tokens=3").code == 0
    assert folio("eval", f"--out_dir={out}", "--device=cpu", "--eval_iters=1").code == 0
    assert folio("export", f"--out_dir={out}", f"--to={out.parent / 'hf'}").code == 0
    assert folio("plot", str(out)).code == folio("report", str(out)).code == 0
    assert_refused(folio("import", str(out), "--to", str(out)), out, "is there already")


def test_the_lock_is_released(train: Train, story: Path, tmp_path: Path) -> None:
    """After a run, after one that could not start, and after one that failed; the lock file is gone."""
    for argv, code in ((["--max_iters=2"], 0), (["--vocab_size=3"], 2), (["--learning_rate=1e38"], 1), ([], 0)):
        assert train("out", *argv, "--decay_lr=False", "--grad_clip=0").code == code, argv
        assert not (tmp_path / "out" / ".folio.lock").exists()
    assert_refused(train("a/b/c", "--vocab_size=3"), "vocab_size=3")
    assert not (tmp_path / "a").exists()
    (tmp_path / "mine").mkdir()
    assert_refused(train("mine/c", "--vocab_size=3"), "vocab_size=3")
    assert tree(tmp_path / "mine") == {}


def test_two_runs_of_one_program(story: Path, tmp_path: Path) -> None:
    """In one folder they can run in turn; at the same time only the first can."""
    knobs: dict[str, Any] = {"data_dir": story, "out_dir": tmp_path / "out", "device": "cpu", "max_iters": 2}
    knobs |= {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 8, "eval_iters": 1, "batch_size": 2}
    for _ in range(2):
        package.train(**knobs)
    assert (tmp_path / "out" / "previous-1").is_dir()
    together, found, config = threading.Barrier(4), [], configured(story, tmp_path / "new")

    def begin() -> None:
        together.wait()
        try:
            found.append(build(config))
        except ValueError as error:
            found.append(error)

    threads = [threading.Thread(target=begin) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (run,) = (f for f in found if isinstance(f, Run))
    assert [str(f) for f in found if f is not run and "another run trains there" not in str(f)] == []
    finish(run)


@pytest.mark.slow
def test_two_processes_that_start_together(spawn: Spawn, train: Train, story: Path, tmp_path: Path) -> None:
    """One gets the lock and completes. If it is killed, the lock is released, and the run can be resumed."""
    out = tmp_path / "out"
    argv = ["-m", "folio", "train", *SMALL, f"--data_dir={story}", f"--out_dir={out}", "--max_iters=100000"]
    children = [spawn(*argv, "--eval_interval=50", "--init_from=auto", threads=1) for _ in range(2)]
    while all(child.process.poll() is None for child in children):
        children[0].process.poll()
    (second,) = (child for child in children if child.process.poll() is not None)
    (first,) = (child for child in children if child is not second)
    assert second.end() == 2
    assert f"process {first.process.pid}, since" in second.output()
    first.wait_until(lambda: run_folder.steps(out) != [] and reached(out, 60)())
    first.kill()
    first.end()
    assert (out / ".folio.lock").exists()
    outcome = train("out", "--init_from=auto", "--max_iters=70", "--eval_interval=50")
    assert outcome.code == 0, outcome.err
    assert "resuming" in outcome.out
    assert [r["step"] for r in timeless(out) if r["kind"] == "train"][:60] == list(range(60))
    assert sorted(p.name for p in out.iterdir() if p.name.startswith(("previous", "."))) == []


# Files of other programs

FOREIGN = {
    "config.json": '{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}',
    "config.json/x": "",
    "metrics.jsonl": '{"step": 3, "loss": 2.5}\n',
    "evaluations.jsonl": '["a"]\n',
    "best.json": '{"accuracy": 0.5}',
    "best.json ": '{"step": 3, "loss": 0.5}',
    "checkpoints": "",
    "checkpoints/epoch=3.ckpt": "",
    "checkpoints/checkpoint-500/model.safetensors": "",
    "checkpoints/step-500/model.safetensors": "",
    "checkpoints/step-00000500/lit_model.pth": "",
    "checkpoints/step-00000500/state.json": '{"step": 500}',
    "profile/mine.txt": "",
    "tensorboard/events.out.tfevents.1": "",
    "tensorboard/mine/run": "",
    "ckpt.pt": "",
    "loss.png": "",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_another_programs_file_is_refused(train: Train, tmp_path: Path, name: str) -> None:
    """The message names it and the remedy, and it stays in place."""
    path = tmp_path / "out" / name.strip()
    path.parent.mkdir(parents=True)
    path.write_text(FOREIGN[name])
    before = tree(tmp_path)
    for begin in ("scratch", "auto") if name != "ckpt.pt" else ("scratch",):
        outcome = train("out", f"--init_from={begin}")
        assert_refused(outcome, tmp_path / "out" / name.strip().split("/")[0], "choose another --out_dir")
        assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["config.json", "checkpoints/epoch=3.ckpt", "metrics.jsonl", "log.txt"])
def test_another_programs_file_in_a_runs_folder_is_refused(train: Train, out: Path, name: str) -> None:
    """Although the folder also contains a run."""
    (out / name).write_text(FOREIGN.get(name, "mine\n"))
    before = tree(out)
    assert_refused(train("out", "--log_txt"), out / name.split("/")[0], "choose another --out_dir")
    assert tree(out) == before


def test_a_model_folder_keeps_its_model(folio: Folio, train: Train, trained: Path, tmp_path: Path) -> None:
    """Training into it is refused; a folder within it is allowed."""
    hf = tmp_path / "hf"
    assert folio("export", f"--out_dir={trained}", f"--to={hf}").code == 0
    before = tree(hf)
    assert_refused(train("hf", f"--init_from={hf}", "--block_size=16"), hf / "config.json", "--out_dir")
    assert tree(hf) == before
    assert train("hf/out", f"--init_from={hf}", "--max_iters=2").code == 0
    assert {name: content for name, content in tree(hf).items() if not name.startswith("out")} == before


def test_other_names_are_left_alone(train: Train, story: Path, tmp_path: Path) -> None:
    """Files of a clone, a data set or another trainer stay in place, as do empty folders."""
    data = Path(shutil.copytree(story, tmp_path / "out"))
    for name in ("checkpoint-500/model.safetensors", "mlruns/0/meta.yaml", "model.py", "log.txt", "wandb/latest-run"):
        (data / name).parent.mkdir(exist_ok=True, parents=True)
        (data / name).write_text("mine")
    (data / "checkpoints").mkdir()
    before = tree(data)
    for _ in range(2):
        assert train("out", "--max_iters=2", f"--data_dir={data}").code == 0
    after = tree(data)
    assert {name: after.get(name) for name in before} == before


def test_a_line_says_where_an_earlier_run_was_moved(train: Train, out: Path) -> None:
    """Also if the run is damaged, or has samples, a profile, a plot and a report."""
    (out / "config.json").write_text("{")
    (out / "metrics.jsonl").write_bytes(b"\0\0\n" + (out / "metrics.jsonl").read_bytes())
    for name in ("evaluations.jsonl", "metrics.jsonl.damaged", "metrics.jsonl.damaged-2"):
        (out / name).write_text("")
    (out / "checkpoints" / "step-00000005").rename(out / "checkpoints" / "step-00000005.damaged")
    for name in ("loss.png", "profile/trace.json", "tensorboard/events.out.tfevents.1", "checkpoints/.DS_Store"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("")
    before = tree(out)
    outcome = train("out", "--max_iters=2")
    assert (outcome.code, outcome.err) == (0, "")
    (line,) = (line for line in outcome.out.splitlines() if "previous" in line)
    assert line == f"an earlier run was in {out}: its files were moved to {out / 'previous-1'}"
    assert tree(out / "previous-1") == before
    assert "previous" not in train("new", "--max_iters=2").out


@pytest.mark.parametrize("moved", range(1, 6))
def test_killed_while_an_earlier_run_is_moved(
    train: Train, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: int
) -> None:
    """Nothing is lost or mixed: the next call finds the earlier run unchanged, and resumes it or moves all of it."""
    before, rename, count = tree(out), files.rename, [0]

    def die(source: Path, target: Path) -> None:
        count[0] += 1
        if count[0] == moved:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(files, "rename", die)
    assert train("out", "--max_iters=2").code == 130
    monkeypatch.undo()
    assert tree(out) != before
    other = Path(shutil.copytree(out, tmp_path / "other"))
    outcome = train("out", "--init_from=resume", "--max_iters=7")
    assert "resuming" in outcome.out
    assert [r["step"] for r in timeless(out) if r["kind"] == "train"] == list(range(7))
    assert train("other", "--max_iters=2").code == 0
    assert tree(other / "previous-1") == before
    assert [p.name for p in other.iterdir() if p.name.startswith(".")] == []


# Damage to a run's own files


def test_lost_metrics_are_named(train: Train, out: Path) -> None:
    lines = (out / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (out / "metrics.jsonl").write_bytes(b"".join([*lines[:2], b"\0\n", *lines[2:-2]]))
    said = train("out", "--init_from=resume", "--max_iters=7").out
    assert f"{out / 'metrics.jsonl'}: line 3 is damaged, and left out; the original is kept as" in said
    assert "ends at step 3, but the run resumes at step 5" in said
    assert [r["step"] for r in timeless(out) if r["kind"] == "train"] == [0, 1, 2, 3, 5, 6]
    (out / "metrics.jsonl").unlink()
    assert "metrics.jsonl is missing" in train("out", "--init_from=resume", "--max_iters=9").out


def test_the_remedy_for_a_damaged_config_is_true(train: Train, out: Path, tmp_path: Path) -> None:
    """Without the file, and with the same options, the resumed run ends in the same bits."""
    whole = Path(shutil.copytree(out, tmp_path / "whole"))
    content = (out / "config.json").read_bytes()
    (out / "config.json").write_bytes(content.replace(b'"grad_clip": 1.0', b'"grad_clip": 0.0'))
    options = ("--init_from=resume", "--learning_rate=1e-2", "--dropout=0.1")
    before = tree(out)
    words = (
        out / "config.json",
        "does not match its checksum",
        "remove it and repeat the run's options with --init_from=resume",
    )
    assert_refused(train("out", *options), *words)
    assert tree(out) == before
    (out / "config.json").unlink()
    assert f"{out / 'config.json'} is missing: options that are not given now" in train("out", *options).out
    train("whole", *options)
    assert timeless(out) == timeless(whole)
    assert run_folder.read_config(out) == run_folder.read_config(whole)
    models = [dict(find.choose(o, "latest").weights()) for o in (out, whole)]
    assert all(torch.equal(weight, models[1][name]) for name, weight in models[0].items())


@pytest.mark.parametrize(
    ("old", "new"), [(b'"step": 5', b'"step": 7'), (b'"rows": 40', b'"rows": 44'), (b'"row"', b'"rox"')]
)
def test_an_edited_state_is_set_aside(train: Train, out: Path, old: bytes, new: bytes) -> None:
    train("out", "--init_from=resume", "--max_iters=10")
    path = run_folder.checkpoint_folder(out, 10) / "state.json"
    path.write_bytes(path.read_bytes().replace(old.replace(b"5", b"10").replace(b"40", b"80"), new))
    said = train("out", "--init_from=resume", "--max_iters=10").out
    assert "step-00000010 is damaged: " in said
    assert "set aside as step-00000010.damaged" in said
    assert f"resuming {out} at step 5" in said


def test_an_older_run_resumes_with_a_note(train: Train, out: Path) -> None:
    for path in (out / "config.json", *out.glob("checkpoints/*/state.json"), out / "best.json"):
        value = json.loads(path.read_text())
        del value["sha256"][path.name]
        path.write_text(json.dumps({k: v for k, v in value.items() if v != {} or k != "sha256"}))
    said = train("out", "--init_from=resume", "--max_iters=10").out
    assert said.count("has no checksum, since an older version wrote it") == 2
    assert run_folder.steps(out) == [5, 10]


def test_every_name_that_a_run_writes_is_known(train: Train, folio: Folio, tmp_path: Path) -> None:
    """An unknown name would stay behind when the run is moved aside."""
    out = tmp_path / "out"
    pytest.importorskip("tensorboard")
    assert train("out", "--log_txt", "--track=tensorboard", "--profile=1").code == 0
    assert folio("plot", str(out)).code == folio("eval", f"--out_dir={out}", "--device=cpu").code == 0
    ownership.move_aside(out, log_txt=True)
    assert [p.name for p in out.iterdir()] == ["previous-1"]


def test_the_clone_as_out_dir(train: Train, clone: Path) -> None:
    """It has no file with a name of a run's files, so nothing is moved."""
    before = tree(clone)
    ownership.refuse_foreign(clone, log_txt=True, resuming=False)
    assert ownership.move_aside(clone, log_txt=True) == ""
    assert tree(clone) == before
    assert (clone / "README.md").read_bytes() == (ROOT / "README.md").read_bytes()
