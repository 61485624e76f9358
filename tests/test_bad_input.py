"""Bad input: exit code 2, one line that names what, where and the remedy, and nothing half-written."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import SMALL, STORY, assert_refused, make_pipe, tree
from servers import closed_port, server

from folio.preparation import recipes
from folio.records.metrics import read_metrics


@pytest.fixture
def out_dir(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be damaged or gone on with."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


# Options


OPTIONS = {
    "--n_layr=3": ["n_layr", "did you mean 'n_layer'"],
    "--n-layr 3": ["n_layr", "did you mean 'n_layer'"],
    "--xyzzy=3": ["xyzzy", "--help"],
    "--n_layer=three": ["n_layer", "'three'", "int"],
    "--dropout=some": ["dropout", "'some'", "float"],
    "--compile=maybe": ["compile", "'maybe'", "auto"],
    "--sampling=sorted": ["sampling", "'sorted'", "sequential"],
    "--batch_size=0": ["batch_size=0", "at least 1"],
    "--batch_size=1e12": ["batch_size=1000000000000", "at most 1000000"],
    "--vocab_size=1e12": ["vocab_size=1000000000000", "at most 100000000"],
    "--n_embd=1e12": ["n_embd=1000000000000", "at most 100000"],
    "--n_embd=1e5 --n_layer=1e3": ["parameters take 480,", "lower --n_layer=1000, --n_embd=100000"],
    "--vocab_size=1e8 --n_embd=1e5": ["parameters take 40,", "--vocab_size=100000000"],
    "--n_layer=1e300": ["n_layer=2**63 or more", "at most 1000"],
    "--block_size=1e12": ["block_size=1000000000000", "at most"],
    "--max_iters=1e30": ["max_iters=2**63 or more", "below"],
    "--sample_tokens=1e12": ["sample_tokens=1000000000000", "at most"],
    "--grad_clip=1e999": ["grad_clip=inf", "finite"],
    "--max_iters=2.5": ["max_iters", "2.5", "int"],
    "--compile=2": ["compile", "2", "True or False"],
    "--logit_softcap=1e300": ["logit_softcap=1e+300", "at most 1000000"],
    "--dropout=1": ["dropout=1", "below 1"],
    "--beta2=1.5": ["beta2=1.5", "below 1"],
    "--learning_rate=nan": ["learning_rate=nan", "at least 0"],
    "--max_iters=-1": ["max_iters=-1", "at least 0"],
    "--n_embd=10 --n_head=3": ["n_embd=10", "n_head=3", "choose n_head=2 or 5, or n_embd=9"],
    "--lr=3": ["'lr'", "did you mean 'learning_rate'?"],
    "--epochs=3": ["'epochs'", "did you mean 'max_iters', which counts steps?"],
    "--max_steps 3": ["'max_steps'", "did you mean 'max_iters'?"],
    "--per-device-train-batch-size=3": ["did you mean 'batch_size'?"],
    "--resume": ["did you mean 'init_from', such as --init_from=resume?"],
    "--min_lr=1 --learning_rate=0.1": ["min_lr=1", "learning_rate=0.1", "--decay_lr=False"],
    "--device=nonsense": ["device=nonsense", "must be auto, cpu, cuda"],
    "--block_size=100000": ["train.bin", "block_size + 1 = 100001", "lower --block_size"],
    "--vocab_size=10": ["vocab", "10", "--vocab_size"],
    "--vocab_size=-5": ["vocab_size=-5", "at least 1"],
    "--data_dir=nowhere": ["nowhere/train.bin", "prepare"],
    "--data_dir= --dataset=nowhere": ["data/nowhere/train.bin", "prepare"],
    "--init_from=resume": ["nothing to resume in out", "--init_from=scratch"],
    "--init_from=no/such/folder": ["no/such/folder: there is no such"],
    "--init_from=scrath": ["scrath", "did you mean 'scratch'?"],
    "--init_from=.": ["no checkpoint in .", "train"],
    "nowhere.py": ["'nowhere.py'", "the presets are"],
    "train_shakespear": ["'train_shakespear'", "did you mean 'train_shakespeare_char'"],
}


@pytest.mark.parametrize("flags", OPTIONS)
def test_an_option_that_does_not_fit(folio, story, tmp_path, monkeypatch, flags) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(folio("train", *SMALL, f"--data_dir={story}", *flags.split(" ")), *OPTIONS[flags])
    assert tree(tmp_path) == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_a_device_that_is_not_there(folio, story, tmp_path) -> None:
    out = tmp_path / "out"
    argv = ["train", *SMALL, f"--data_dir={story}", f"--out_dir={out}", "--device=cuda"]
    assert_refused(folio(*argv), "device=cuda", "--device=cpu")
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("n_layer = 'three'", ["config.py:1", "n_layer", "'three'", "int"]),
        ("n_layer = 1e12", ["n_layer=1000000000000", "at most 1000"]),
        ("learning_rate = 1e999", ["learning_rate=inf", "finite"]),
        ("n_layer = 0", ["n_layer=0", "at least 1"]),
        ("import os\nos.system('touch mark')", ["config.py:1", "import os", "never run"]),
        ("n_layer = __import__('os').system('touch mark')", ["config.py:1", "__import__", "never run"]),
        ("n_layer = 2\nexec('import os; os.mkdir(\"mark\")')", ["config.py:2", "exec", "never run"]),
        ("n_layer = 2\nn_layer = ", ["config.py", "line 2", "not Python"]),
    ],
)
def test_a_config_file_that_does_not_fit(folio, story, tmp_path, monkeypatch, text, words) -> None:
    """What would run code is named and has not run."""
    monkeypatch.chdir(tmp_path)
    Path("config.py").write_text(text)
    before = tree(tmp_path)
    assert_refused(folio("train", *SMALL, f"--data_dir={story}", "config.py"), *words)
    assert tree(tmp_path) == before


NO_CONFIGS: dict[str, tuple[str, Callable[[Path], object], list[str]]] = {
    "a pipe": ("config.py", make_pipe, ["a pipe"]),
    "a device": ("config.toml", lambda path: path.symlink_to("/dev/zero"), ["a device"]),
    "megabytes": ("config.py", lambda path: path.write_text("n_layer = 2\n" * 1_000_000), ["more than 65,536"]),
    "UTF-16": ("config.py", lambda path: path.write_text("n_layer = 2", encoding="utf-16"), ["UTF-8"]),
    "YAML": ("config.yaml", lambda path: path.write_text("n_layer: 2"), [".py, .toml or .json"]),
    "a TOML table": ("config.toml", lambda path: path.write_text("[model]\nn_layer = 2"), ["'model' is a table"]),
    "a JSON table": ("config.json", lambda path: path.write_text('{"model": {"n_layer": 2}}'), ["'model' is a table"]),
    "twice": (
        "config.toml",
        lambda path: path.write_text("n_layer = 2\nn_layer = 3"),
        ["not a valid toml", "overwrite"],
    ),
    "deep JSON": ("config.json", lambda path: path.write_text("[" * 60_000), ["nested too deeply"]),
    "deep TOML": ("config.toml", lambda path: path.write_text("a = " + "[" * 60_000), ["nested too deeply"]),
    "an endless number": ("config.json", lambda path: path.write_text('{"dropout": 1e999}'), ["not a finite number"]),
    "an endless TOML number": ("config.toml", lambda path: path.write_text("dropout = 1e999"), ["dropout=inf"]),
    "many digits": ("config.json", lambda path: path.write_text(f'{{"n_layer": {"9" * 9000}}}'), ["not a valid json"]),
    "many TOML digits": ("config.toml", lambda path: path.write_text(f"n_layer = {'9' * 9000}"), ["not a valid toml"]),
    "a long value": ("config.toml", lambda path: path.write_text(f"n_layer = '{'9' * 9000}'"), ["n_layer = '999", "…"]),
}


@pytest.mark.parametrize("what", NO_CONFIGS)
def test_what_is_no_config_file(folio, story, tmp_path, monkeypatch, what) -> None:
    """Refused at once, and by name."""
    name, make, words = NO_CONFIGS[what]
    monkeypatch.chdir(tmp_path)
    make(Path(name))
    outcome = folio("train", *SMALL, f"--data_dir={story}", name)
    assert_refused(outcome, *words)
    assert len(outcome.err) < 400
    assert [path.name for path in tmp_path.iterdir()] == [name]


# Text


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, ["--source"]), (b"caf\xe9", ["not UTF-8", "byte 3"]), (b"", ["too short"]), (b"a", ["too short"])],
    ids=["missing", "latin-1", "empty", "one character"],
)
def test_a_source_that_does_not_fit(folio, tmp_path, content, words) -> None:
    source, folder = tmp_path / "source.txt", tmp_path / "data"
    if content is not None:
        source.write_bytes(content)
    outcome = folio("prepare", "shakespeare_char", f"--source={source}", f"--data_dir={folder}")
    assert_refused(outcome, folder if words == ["too short"] else source, *words)
    assert not folder.exists()


@pytest.mark.parametrize("kind", ["a pipe", "a device", "a folder"])
def test_a_source_that_never_ends(folio, tmp_path, kind) -> None:
    path = tmp_path / "input.txt"
    {"a pipe": make_pipe, "a folder": os.mkdir, "a device": lambda p: os.symlink("/dev/zero", p)}[kind](path)
    for how in (f"--source={path}", f"--data_dir={tmp_path}"):
        assert_refused(folio("prepare", "shakespeare_char", how), f"{path} is {kind}, not a file")


@pytest.mark.parametrize(
    ("name", "hint"), [("shakespear_char", "did you mean"), ("", "nothing to prepare"), ("xyz", "stdlib")]
)
def test_a_data_set_that_nobody_knows(folio, tmp_path, monkeypatch, name, hint) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(folio("prepare", name), name, hint)
    assert tree(tmp_path) == {}


@pytest.mark.parametrize(
    ("source", "words"),
    [
        pytest.param(closed_port, ["failed"], id="no answer"),
        pytest.param(partial(server, b"gone", status=404), ["failed", "404"], id="not found"),
        pytest.param(partial(server, STORY.read_bytes()), ["SHA-256", recipes.SHAKESPEARE_SHA256], id="another file"),
        pytest.param(partial(server, b"First", promised=1_115_394), ["failed"], id="broken off"),
    ],
)
def test_a_download_that_fails(folio, tmp_path, monkeypatch, source, words) -> None:
    """The line names the address and the way round; no input.txt is left for the next attempt to trust."""
    monkeypatch.setenv("no_proxy", "*")
    with source() as url:
        monkeypatch.setattr(recipes, "SHAKESPEARE", url)
        assert_refused(folio("prepare", "shakespeare_char", f"--data_dir={tmp_path / 'data'}"), url, "--source", *words)
    assert tree(tmp_path) == {}


# Checkpoints


REQUESTS = {
    "--checkpoint=999": ["'999'", "best, latest and 5, 10"],
    "--checkpoint=\u00b2": ["'\u00b2'", "best, latest and 5, 10"],
    f"--checkpoint={'9' * 5000}": ["'999", "best, latest and 5, 10"],
    "--checkpoint=newest": ["'newest'", "best, latest and 5, 10"],
    "--out_dir=nowhere": ["nowhere", "train"],
    "--init_from=no/such/folder": ["no/such/folder: there is no such"],
    "--start=caf\u00e9 \u4e16": ["start", "'\u00e9', '\u4e16'", "remove such characters"],
    "--start=": ["start is empty"],
    "--start=FILE:nowhere.txt": ["nowhere.txt", "start"],
    "--start=FILE:binary": ["binary", "not UTF-8"],
    "--temperature=-1": ["temperature=-1", "at least 0"],
    "--top_p=0": ["top_p=0", "above 0"],
    "--num_samples=0": ["num_samples=0", "at least 1"],
}


@pytest.mark.parametrize("flag", REQUESTS)
def test_a_request_that_sampling_refuses(folio, finished, tmp_path, monkeypatch, flag) -> None:
    monkeypatch.chdir(tmp_path)
    Path("binary").write_bytes(b"\xff\xfe")
    before = tree(finished)
    outcome = folio("sample", f"--out_dir={finished}", "--device=cpu", flag)
    assert_refused(outcome, *REQUESTS[flag])
    assert outcome.out == ""
    assert tree(finished) == before


@pytest.mark.parametrize("name", ["n_layer=3", "n_head=1", "n_embd=32", "block_size=32", "vocab_size=64", "bias=True"])
def test_a_typed_shape_that_the_checkpoint_does_not_have(folio, out_dir, story, name) -> None:
    before = tree(out_dir)
    flags = [flag for flag in SMALL if not flag.startswith(f"--{name.split('=')[0]}=")]
    outcome = folio("train", *flags, f"--data_dir={story}", f"--out_dir={out_dir}", "--init_from=resume", f"--{name}")
    assert_refused(outcome, f"--{name}", "does not fit the checkpoint", f"which has {name.split('=')[0]}=")
    assert tree(out_dir) == before


def _damage(path: Path, content: bytes | None) -> None:
    """Without content: half of what was there."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if content is None else content)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", None),
        ("model.safetensors", b""),
        ("optimizer.safetensors", None),
        ("state.json", None),
        ("state.json", b"[]"),
        ("state.json", b"{}"),
        ("state.json", b'{"sha256": {}}'),
    ],
)
def test_a_run_whose_checkpoints_are_all_damaged(folio, out_dir, story, name, content) -> None:
    """They are named and set aside at the most, and neither gone on with nor sampled from."""
    for path in sorted(out_dir.glob("checkpoints/*")):
        _damage(path / name, content)
    before = tree(out_dir)
    assert_refused(folio("sample", f"--out_dir={out_dir}", "--device=cpu"), out_dir / "checkpoints", "damaged")
    assert tree(out_dir) == before
    outcome = folio("train", *SMALL, f"--data_dir={story}", f"--out_dir={out_dir}", "--init_from=resume")
    assert_refused(outcome, out_dir, "damaged", "--init_from=scratch")
    assert {name.replace(".damaged", ""): content for name, content in tree(out_dir).items()} == before


@pytest.mark.parametrize("content", [None, b"[]", b"{}", b'{"run": "x", "asked": 5}', b"\xff"])
def test_a_run_whose_config_is_damaged(folio, out_dir, story, content) -> None:
    _damage(out_dir / "config.json", content)
    before = tree(out_dir)
    outcome = folio("train", *SMALL, f"--data_dir={story}", f"--out_dir={out_dir}", "--init_from=resume")
    assert_refused(outcome, out_dir / "config.json", f"--init_from={out_dir}")
    assert tree(out_dir) == before


@pytest.mark.parametrize("init_from", ["scratch", "resume", "auto"])
def test_a_folder_below_a_file(folio, story, tmp_path, init_from) -> None:
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "file" / "out"
    outcome = folio("train", *SMALL, f"--data_dir={story}", f"--out_dir={out}", f"--init_from={init_from}")
    assert_refused(outcome, out, "--init_from=scratch" if init_from == "resume" else "choose another --out_dir")
    assert tree(tmp_path) == {"file": b"mine"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("only root on Linux can mount a small file system")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk(folio, story, small_disk) -> None:
    """The checkpoint that did not fit is named, nothing of it is left, and the metrics so far are."""
    out = small_disk / "out"
    argv = ["train", *SMALL, "--n_embd=128", "--n_head=4", f"--data_dir={story}", f"--out_dir={out}"]
    outcome = folio(*argv)
    assert_refused(outcome, out / "checkpoints" / "step-00000010", "No space left", "--out_dir")
    assert re.search(r"warning: step 5 could not be saved \(.*No space left.*\): training continues", outcome.out)
    assert sorted(tree(out)) == ["checkpoints", "config.json", "metrics.jsonl"]
    assert [r["step"] for r in read_metrics(out / "metrics.jsonl") if r["kind"] == "train"] == list(range(10))


@pytest.mark.parametrize("eval_interval", [1, 5])
def test_a_loss_that_is_not_finite(folio, out_dir, story, eval_interval) -> None:
    """Exit code 1; the good checkpoints stay as they were, and no other is written."""
    before = tree(out_dir / "checkpoints")
    rate = ["--learning_rate=1e38", "--decay_lr=False", "--grad_clip=0", f"--eval_interval={eval_interval}"]
    more = ["--init_from=resume", "--max_iters=20", *rate]
    flags = [flag for flag in SMALL if not flag.startswith(("--max_iters", "--eval_interval"))]
    outcome = folio("train", *flags, f"--data_dir={story}", f"--out_dir={out_dir}", *more)
    assert_refused(outcome, "not finite", "--learning_rate", "resume from step 10", code=1)
    assert tree(out_dir / "checkpoints") == before
    assert folio("sample", f"--out_dir={out_dir}", "--device=cpu", "--checkpoint=latest").code == 0
