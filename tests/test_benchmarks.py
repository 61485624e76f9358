"""Benchmarks that use the parts of a run, small and on a CPU."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, STORY, python
from torch.nn import functional as F

from benchmarks import time_to_loss
from benchmarks.nanogpt_shakespeare import Result, score
from folio import cli
from folio.model.config import GPTConfig
from folio.model.gpt import GPT

SHORT = shlex.split(
    "--device=cpu --compile=False --n_layer=1 --n_head=1 --n_embd=8 --block_size=64 --batch_size=2 --max_iters=4 "
    "--lr_decay_iters=4 --warmup_iters=0 --eval_iters=1 --eval_interval=2 --log_interval=1"
)
# What the benchmark needs of nanoGPT's train.py
NANOGPT = """
import pathlib, pickle, sys, time, torch
from folio.model.gpt import GPT, GPTConfig

torch.manual_seed(1337 + 0)
values = dict(word[2:].split("=") for word in sys.argv[2:])
out = pathlib.Path(values["out_dir"])
out.mkdir()
print("tokens per iteration will be: 128")
for i in range(5):
    time.sleep(0.1)
    if i % 4 == 0:
        print(f"step {i}: train loss 4.{9 - i}, val loss 4.{9 - i}")
    print(f"iter {i}: loss 4.0, time {200 if i % 4 == 0 else 100}.00ms, mfu -100.00%")
with open(values["dataset"] + "/meta.pkl", "rb") as file:
    size = pickle.load(file)["vocab_size"]
shape = {"block_size": 128, "vocab_size": size, "n_layer": 1, "n_head": 1, "n_embd": 8, "bias": False}
torch.save({"model_args": shape, "model": GPT(GPTConfig(**shape)).state_dict()}, out / "ckpt.pt")
"""


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["gpu.py", "--smoke=True", "--work=folio step 2"], "JSON {}"),
        (["gpu.py", "--smoke=True", "--work=folio sampling 2"], "JSON {}"),
        (["gpu_recipe.py", "--smoke=True", "--seeds=1"], '"lowest": 4.'),  # about ln 65
        (["host.py", "--rounds=1", "--steps=2"], "Folio host time"),
    ],
)
def test_the_parts_of_a_run(argv: list[str], said: str) -> None:
    """They are called as a run calls them."""
    done = python(f"benchmarks/{argv[0]}", *argv[1:])
    assert done.returncode == 0, done.stderr
    assert said in done.stdout


@pytest.mark.slow
def test_the_rows_of_a_gpu() -> None:
    """Each row has a result, printed before the JSON of all."""
    done = python("benchmarks/gpu.py", "--smoke=True")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout[done.stdout.index("{\n") :])
    assert [name for name, row in found["rows"].items() if "failed" in row] == []
    assert all(found["rows"][name]["exact"] for name in ("exact", "exact recipe", "kills"))
    lines = done.stdout.splitlines()[1 : len(found["rows"]) + 1]
    assert [line.split(":")[0] for line in lines] == list(found["rows"])


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    """A preset with Muon, rotary positions and averages, small."""
    path = tmp_path / "small.py"
    lines = [word[2:].replace("=", " = ").replace("cpu", "'cpu'") for word in SHORT]
    more = "optimizer = 'muon'\nposition = 'rope'\nema_decay = 0.9\nlearning_rate = 0.01\nmin_lr = 0"
    path.write_text("\n".join([*lines, more]))
    return path


def time_to_loss_of(preset: Path, *argv: str) -> None:
    options = [f"--source={STORY}", f"--presets={preset}", "--seeds=1", *argv]
    time_to_loss.main(cli.parse(time_to_loss.Options, options, "time_to_loss.py", files=False))


@pytest.fixture
def short(preset: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The option for a stand-in for nanoGPT; Folio's run of its command is short."""
    (preset.parent / "train.py").write_text(NANOGPT)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(time_to_loss, "COMMAND", [time_to_loss.PRESET, *SHORT])
    return f"--peer={preset.parent}"


def test_every_token_counts_once_in_rows_of_64(story: Path) -> None:
    """Also for a model with more positions."""
    model = GPT(GPTConfig(block_size=128, vocab_size=256, n_layer=1, n_head=1, n_embd=8))
    ids = torch.from_numpy(np.fromfile(story / "val.bin", dtype=np.uint16).astype(np.int64))
    rows = [ids[start : start + 65] for start in range(0, len(ids) - 1, 64)]
    nats = [F.cross_entropy(model(row[None, :-1], row[None, 1:])[0][0], row[1:], reduction="sum") for row in rows]
    assert score(model, story, 64) == pytest.approx(sum(nats).item() / (len(ids) - 1), rel=1e-6)


def test_time_to_loss(preset: Path, short: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each program has a row, and ratios to nanoGPT of the same round."""
    time_to_loss_of(preset, short)
    assert re.findall(r"^\| (.+?) \| [\d.]+ .*? \| [\d.]+ × ", capsys.readouterr().out, re.MULTILINE) == [
        "nanoGPT",
        "Folio, GPT-2",
        "small",
    ]


def test_the_table_of_times() -> None:
    """Medians with the worst, ratios within a round, and the rounds that reach nanoGPT's loss in its time."""

    def result(wall: float, loop: float, loss: float) -> Result:
        return Result(wall, [(0, "start"), (1, "step 0: "), (loop, "end")], loss)

    rounds = {"nanoGPT": [result(40, 30, 1.9), result(44, 32, 1.8)], "a": [result(10, 5, 1.9), result(10, 5, 1.9)]}
    rows = time_to_loss._table(rounds).splitlines()
    assert rows[-1] == (
        "| a | 5.0 (5.0) | 10.0 (10.0) | 1.9000 (1.9000) | 6.2 × (6.0) | 4.2 × (4.0) | no, no | 1 of 2 |"
    )


def test_a_picture_of_loss_against_seconds(
    preset: Path, short: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """nanoGPT's iterations with an evaluation count as its median one; averages are drawn in place of the weights."""
    pytest.importorskip("matplotlib")
    drawn = {}
    monkeypatch.setattr(time_to_loss, "_picture", lambda curves, form: drawn.update(curves) or form.encode())
    time_to_loss_of(preset, short, f"--plot={tmp_path / 'recipe.svg'}")
    assert (tmp_path / "recipe.svg").read_bytes() == b"svg"
    assert drawn["nanoGPT"] == ([pytest.approx(0.4)], [4.5])


def test_hyperparameters_are_chosen_without_the_validation_split(story: Path, tmp_path: Path) -> None:
    (data := tmp_path / "data").mkdir()
    for name in ("train.bin", "val.bin"):
        (data / name).write_bytes((story / name).read_bytes())
    (data / "meta.pkl").touch()
    third = time_to_loss._third_split(data)
    parts = [(third / name).read_bytes() for name in ("train.bin", "val.bin")]
    assert b"".join(parts) == (story / "train.bin").read_bytes()
    assert len(parts[1]) == pytest.approx(len(parts[0]) / 9, abs=2)


def test_what_is_varied_is_what_the_preset_has(preset: Path) -> None:
    """Of two presets that share a piece, it is taken off the first."""
    taken = time_to_loss._ablations({"one": [str(preset)], "other": [str(preset), "--qk_norm"]})
    names = [[flags.split("=")[0] for flags in each] for each in taken.values()]
    assert names[0] == ["--position", "--optimizer", "--schedule", "--ema_decay", "--sampling", "--dtype"]
    assert names[1] == ["--qk_norm"]
    near = time_to_loss._neighbors([str(preset)])
    assert near == ["--learning_rate=0.007", "--learning_rate=0.014", "--ema_decay=0.93", "--ema_decay=0.86"]


@pytest.mark.parametrize(("how", "flags"), [("tune", "--learning_rate=0.014"), ("ablate", "--position=learned")])
def test_variants_of_a_preset(
    preset: Path, how: str, flags: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A hyper-parameter at another value, or a piece taken off that the preset has."""
    monkeypatch.setattr(time_to_loss, "TUNED", ("learning_rate",))
    monkeypatch.setattr(time_to_loss, "TUNED_DECAYS", ())
    monkeypatch.setattr(time_to_loss, "FACTORS", (1.4,))
    monkeypatch.setattr(time_to_loss, "ABLATIONS", ("--qk_norm=False", "--position=learned"))
    time_to_loss_of(preset, f"--{how}=True")
    rows = re.findall(r"^\| `(.+?)` \| ([\d.]+) \| (\S*) \|", capsys.readouterr().out, re.MULTILINE)
    assert [row[0] for row in rows] == ["small", flags]
    assert float(rows[1][2]) == pytest.approx(float(rows[1][1]) - float(rows[0][1]), abs=2e-4)
