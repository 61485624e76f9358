"""Going on with nanoGPT's run, in its own folder or imported: weights, optimizer and counts are those it left."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Outcome, assert_refused, python, tree
from torch import Tensor, nn

from folio import cli
from folio.checkpoints import checkpoint, find
from folio.commands import train
from folio.model.config import GPTConfig
from folio.model.gpt import GPT
from folio.preparation.job import prepare
from folio.preparation.recipes import known
from folio.records import run_folder
from folio.records.metrics import read_metrics
from folio.training.loop import fit
from folio.training.run import Run, finish
from folio.training.start import build

Folio = Callable[..., Outcome]
WPE = "transformer.wpe.weight"
BATCH = 12  # rows of a step of nanoGPT's run
BEFORE = 200 * BATCH * 64  # tokens that it consumed
QUICK = ["--device=cpu", "--compile=False", "--dtype=float32", "--matmul_precision=highest"]


@pytest.fixture(scope="session")
def shakespeare(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What nanoGPT's checkpoint was trained on."""
    folder = tmp_path_factory.mktemp("shakespeare")
    prepare(known("shakespeare_char", folder, str(shared_data / "tinyshakespeare.txt"), {}), folder)
    return folder


@pytest.fixture
def theirs(shared_data: Path) -> dict[str, Any]:
    """What nanoGPT saved, as torch reads it."""
    return dict(torch.load(shared_data / "nanogpt_ckpt" / "ckpt.pt", weights_only=True))


@pytest.fixture
def out_dir(shared_data: Path, tmp_path: Path) -> Path:
    """nanoGPT's out_dir: there is nothing in it but its checkpoint."""
    folder = tmp_path / "out"
    folder.mkdir()
    shutil.copyfile(shared_data / "nanogpt_ckpt" / "ckpt.pt", folder / "ckpt.pt")
    return folder


@pytest.fixture
def imported(out_dir: Path, tmp_path: Path, folio: Folio) -> Path:
    assert folio("import", out_dir / "ckpt.pt", "--to", tmp_path / "imported").code == 0
    return tmp_path / "imported"


@pytest.fixture(params=["ckpt.pt", "imported"])
def begun(request: pytest.FixtureRequest) -> Path:
    """A folder to go on in: nanoGPT's own, or what import made of it."""
    return Path(request.getfixturevalue("out_dir" if request.param == "ckpt.pt" else "imported"))


def argv(out_dir: Path, data: Path, *more: str, begin: str = "resume") -> list[str]:
    return [
        *QUICK,
        "--eval_iters=1",
        "--log_interval=1",
        f"--init_from={begin}",
        f"--out_dir={out_dir}",
        f"--data_dir={data}",
        *more,
    ]


@contextmanager
def run_of(out_dir: Path, data: Path, *more: str) -> Iterator[Run]:
    run = build(cli.parse(train.Options, argv(out_dir, data, *more), "folio train", files=True))
    try:
        yield run
    finally:
        finish(run)


def nanogpt_s(theirs: dict[str, Any]) -> tuple[GPT, dict[str, nn.Parameter], torch.optim.AdamW]:
    """Its model, its parameters in its order, and its optimizer as its configure_optimizers makes it."""
    model = GPT(GPTConfig(**{**theirs["model_args"], "dropout": 0.0}))
    model.load_state_dict(theirs["model"])
    params = {name: model.get_parameter(name) for name in theirs["model"] if name != "lm_head.weight"}
    decayed = [p for p in params.values() if p.dim() >= 2]
    others = [p for p in params.values() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), fused=False)
    optimizer.load_state_dict(theirs["optimizer"])
    return model, params, optimizer


def slots_of(params: dict[str, nn.Parameter], optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    return {f"{name}/{slot}": value for name, p in params.items() for slot, value in optimizer.state[p].items()}


def assert_equal(mine: dict[str, Any], others: dict[str, Any]) -> None:
    assert mine.keys() == others.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, others[name]), name


# Going on


def test_the_optimizer_is_nanogpt_s(begun: Path, shakespeare: Path, theirs: dict[str, Any]) -> None:
    """Each parameter has its tensors, to the bit, and its weights; the counts and knobs are those of its run."""
    _, params, optimizer = nanogpt_s(theirs)
    with run_of(begun, shakespeare, "--max_iters=201") as run:
        mine = dict(run.model.named_parameters())
        assert_equal(mine, params)
        slots = slots_of(mine, run.optimizer)
        assert len(slots) == 3 * 15
        assert_equal(slots, slots_of(params, optimizer))
        for group, other in zip(run.optimizer.param_groups, optimizer.param_groups, strict=True):
            assert all(group[name] == other[name] for name in ("betas", "eps", "weight_decay"))
        assert (run.state.step, run.state.rows, run.state.tokens) == (200, 200 * BATCH, BEFORE)
        assert run.model.config.dropout == 0.1
        assert (run.config.optimizer.warmup_iters, run.config.optimizer.warmup) == (100, "nanogpt")


def test_a_step_is_that_of_torch(begun: Path, shakespeare: Path, theirs: dict[str, Any]) -> None:
    """The next step is what torch's AdamW makes of nanoGPT's own optimizer state and the same batch."""
    model, params, optimizer = nanogpt_s(theirs)
    with run_of(begun, shakespeare, "--max_iters=201", "--dropout=0.0") as run:
        rows = torch.from_numpy(run.tokens.rows("train", run.state.rows, BATCH))
        fit(run)
        mine = dict(run.model.named_parameters())
    record = next(r for r in read_metrics(begun / "metrics.jsonl") if r["kind"] == "train")
    assert record["lr"] == pytest.approx(1e-4)  # nanoGPT's schedule has ended there

    _, loss = model(rows[:, :-1], rows[:, 1:])
    assert loss is not None
    assert record["loss"] == pytest.approx(loss.item(), abs=1e-5)
    loss.backward()
    nn.utils.clip_grad_norm_(params.values(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = 1e-4
    optimizer.step()
    for name, p in params.items():
        torch.testing.assert_close(mine[name], p, atol=1e-6, rtol=0)
        assert (p - theirs["model"][name]).abs().max() > 1e-5  # more than is allowed above


def test_the_run_goes_on_in_nanogpt_s_folder(out_dir: Path, shakespeare: Path, folio: Folio) -> None:
    """First from ckpt.pt, then from its own checkpoints; ckpt.pt stays as it is."""
    before = (out_dir / "ckpt.pt").read_bytes()
    for begin, last, line in (
        ("resume", 202, f"resuming {out_dir / 'ckpt.pt'} at step 200"),
        ("resume", 203, f"resuming {out_dir} at step 202"),
        ("auto", 204, f"resuming {out_dir} at step 203"),
    ):
        outcome = folio("train", *argv(out_dir, shakespeare, f"--max_iters={last}", begin=begin))
        assert (outcome.code, outcome.err) == (0, "")
        assert line in outcome.out.splitlines()
        assert run_folder.steps(out_dir)[-1] == last
    records = read_metrics(out_dir / "metrics.jsonl")
    trained = {r["step"]: r["tokens"] for r in records if r["kind"] == "train"}
    assert trained == {200 + n: BEFORE + (n + 1) * BATCH * 64 for n in range(4)}
    assert len({r.get("run") for r in records}) == 1
    assert (out_dir / "ckpt.pt").read_bytes() == before


def test_auto_takes_nanogpt_s_checkpoint(out_dir: Path, shakespeare: Path, folio: Folio) -> None:
    """Where there is nothing else."""
    outcome = folio("train", *argv(out_dir, shakespeare, "--max_iters=200", begin="auto"))
    assert outcome.code == 0
    assert f"resuming {out_dir / 'ckpt.pt'} at step 200" in outcome.out
    assert run_folder.steps(out_dir) == [200]


@pytest.mark.parametrize("begin", ["resume", "auto"])
def test_eval_only_writes_nothing(begun: Path, shakespeare: Path, folio: Folio, begin: str) -> None:
    """It tells the loss, which is about what nanoGPT had."""
    before = tree(begun)
    outcome = folio("train", *argv(begun, shakespeare, "--eval_only=True", "--eval_iters=20", begin=begin))
    assert outcome.code == 0
    line = next(line for line in outcome.out.splitlines() if line.startswith("step 200: "))
    assert float(line.rpartition(" ")[2]) == pytest.approx(2.6147, abs=0.1)
    assert tree(begun) == before


# Fewer positions


@pytest.mark.parametrize("own", [False, True], ids=["nanoGPT's", "our own"])
def test_positions_are_cropped(
    out_dir: Path, shakespeare: Path, folio: Folio, theirs: dict[str, Any], own: bool
) -> None:
    """Of the model and of the optimizer; it says so, counts on rightly, and keeps them. There are no more to be had."""
    first = 200
    if own:
        assert folio("train", *argv(out_dir, shakespeare, "--max_iters=201")).code == 0
        first = 201
        found = find.choose(out_dir, "latest")
        weights, slots = dict(found.weights()), dict(found.slots())
    else:
        _, params, optimizer = nanogpt_s(theirs)
        weights, slots = params, slots_of(params, optimizer)
    consumed = BEFORE + (first - 200) * BATCH * 64

    assert_refused(
        folio("train", *argv(out_dir, shakespeare, "--max_iters=210", "--block_size=128")), "--block_size=128"
    )
    copy = shutil.copytree(out_dir, out_dir.with_name("copy"))
    with run_of(copy, shakespeare, f"--max_iters={first}", "--block_size=32") as run:
        mine = dict(run.model.named_parameters())
        assert_equal(mine, {**weights, WPE: weights[WPE][:32]})
        cut = {f"{WPE}/{slot}": slots[f"{WPE}/{slot}"][:32] for slot in ("exp_avg", "exp_avg_sq")}
        assert_equal(slots_of(mine, run.optimizer), {**slots, **cut})
        assert run.state.tokens == consumed

    outcome = folio("train", *argv(out_dir, shakespeare, f"--max_iters={first + 2}", "--block_size=32"))
    assert outcome.code == 0
    assert "block_size cropped from 64 to 32" in outcome.out.splitlines()
    outcome = folio("train", *argv(out_dir, shakespeare, f"--max_iters={first + 3}"))
    assert outcome.code == 0
    assert "block_size" not in outcome.out
    assert f"tokens per iteration will be: {BATCH * 32}" in outcome.out
    assert find.choose(out_dir, "latest").config().block_size == 32
    records = read_metrics(out_dir / "metrics.jsonl")
    trained = [r["tokens"] for r in records if r["kind"] == "train" and r["step"] >= first]
    assert trained == [consumed + (n + 1) * BATCH * 32 for n in range(3)]

    before = tree(out_dir)
    outcome = folio("train", *argv(out_dir, shakespeare, "--max_iters=210", "--block_size=64"))
    assert_refused(outcome, "--block_size=64", "block_size=32")
    assert tree(out_dir) == before


def test_a_crop_outlives_a_kill(imported: Path, shakespeare: Path, folio: Folio) -> None:
    """Though no checkpoint of it was written; data goes on at the same token, and the best is looked for anew."""
    with run_of(imported, shakespeare, "--max_iters=300", "--block_size=32"):
        pass
    assert [find.choose(imported, "latest").config().block_size, run_folder.steps(imported)] == [64, [200]]
    with run_of(imported, shakespeare, "--max_iters=300") as run:
        assert run.model.config.block_size == run.tokens.block_size == 32
        assert (run.state.rows, run.state.tokens) == (400 * BATCH, BEFORE)
        assert run.state.best is None
    assert not (imported / "best.json").exists()
    outcome = folio("train", *argv(imported, shakespeare, "--max_iters=202"))
    assert outcome.code == 0
    assert find.choose(imported).step == 202


def test_a_new_run_moves_nanogpt_s_checkpoint_aside(
    out_dir: Path, shakespeare: Path, folio: Folio, shared_data: Path
) -> None:
    """So that going on later is going on with the new one."""
    small = ["--n_layer=1", "--n_head=1", "--n_embd=8", "--block_size=16", "--batch_size=2"]
    few = ["--gradient_accumulation_steps=1", "--max_iters=1"]
    assert folio("train", *argv(out_dir, shakespeare, *small, *few, begin="scratch")).code == 0
    assert not (out_dir / "ckpt.pt").exists()
    aside = out_dir / "previous-1" / "ckpt.pt"
    assert aside.read_bytes() == (shared_data / "nanogpt_ckpt" / "ckpt.pt").read_bytes()


def test_options_as_nanogpt_takes_them(out_dir: Path, tmp_path: Path, theirs: dict[str, Any], folio: Folio) -> None:
    """It checks no types: whole numbers are taken, what cannot be meant is left out."""
    config = {**theirs["config"], "max_iters": 6e5, "batch_size": "twelve", "dataset": None}
    torch.save({**theirs, "config": config}, out_dir / "ckpt.pt")
    found = find.in_folder(out_dir)
    assert found.asked["max_iters"] == 600_000
    assert type(found.asked["max_iters"]) is int
    assert not {"batch_size", "dataset"} & found.asked.keys()


def test_damaged_data_is_no_matter_of_the_model(
    out_dir: Path, tmp_path: Path, shakespeare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data set that its config names tells the vocabulary, where it is whole."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(shakespeare, tmp_path / "data" / "shakespeare_char")
    assert find.in_folder(out_dir).tokenizer().size == 65
    (tmp_path / "data" / "shakespeare_char" / "meta.json").write_text("{")
    assert find.in_folder(out_dir).state["tokenizer"] is None


# Sampling


def test_sampling_from_nanogpt_s_folder(out_dir: Path, shared_data: Path, folio: Folio) -> None:
    """The likeliest tokens are nanoGPT's, in the characters of the meta.pkl beside the checkpoint."""
    given = shared_data / "nanogpt_ckpt"
    shutil.copyfile(given / "meta.pkl", out_dir / "meta.pkl")
    expected = json.loads((given / "expected.json").read_text())["greedy_from_first_8"]
    text = find.by_name(str(out_dir)).tokenizer().bytes(expected).decode()
    for which in (f"--out_dir={out_dir}", f"--init_from={out_dir}", f"--init_from={out_dir / 'ckpt.pt'}"):
        outcome = folio(
            "sample", which, *QUICK, f"--start={text[:8]}", "--temperature=0", "--num_samples=1",
            f"--max_new_tokens={len(expected) - 8}",
        )  # fmt: skip
        assert (outcome.code, outcome.err) == (0, "")
        assert outcome.out.startswith(f"{text}\n---")
    assert_refused(folio("sample", f"--out_dir={out_dir}", "--checkpoint=100"), "100", "200")


def test_sampling_without_a_vocabulary(out_dir: Path, theirs: dict[str, Any], folio: Folio) -> None:
    """One line that says what to put where."""
    content = {**theirs, "config": {**theirs["config"], "dataset": "of nowhere"}}
    torch.save(content, out_dir / "ckpt.pt")
    assert_refused(folio("sample", f"--out_dir={out_dir}"), out_dir / "ckpt.pt", "65 token ids", "meta.pkl")


# Importing


@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_import(out_dir: Path, tmp_path: Path, shakespeare: Path, folio: Folio, folder: bool) -> None:
    """A whole out_dir: verified, with what was asked and the best; it can be gone on with, and imported in turn."""
    to = tmp_path / "new" / "run"
    outcome = folio("import", out_dir if folder else out_dir / "ckpt.pt", "--to", to)
    assert (outcome.code, outcome.err) == (0, "")
    assert "step 200" in outcome.out
    assert f"--init_from=resume --out_dir={to}" in outcome.out
    one, two = find.by_name(str(out_dir)), find.by_name(str(to))
    checkpoint.verify(two.path, run_folder.asked(to)[0])
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
    """The first ids keep weights and optimizer, the new ones begin at the mean and without a past; training goes on."""
    to = tmp_path / "grown"
    assert folio("import", out_dir / "ckpt.pt", "--to", to, "--vocab_size=128").code == 0
    assert find.by_name(str(to)).state["best"] is None  # nobody measured this model
    _, params, optimizer = nanogpt_s(theirs)
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


def test_import_refuses_fewer_ids(out_dir: Path, tmp_path: Path, folio: Folio) -> None:
    outcome = folio("import", out_dir, "--to", tmp_path / "to", "--vocab_size=64")
    assert_refused(outcome, "vocab_size=64", "65")
    assert not (tmp_path / "to").exists()


def test_import_replaces_nothing(out_dir: Path, tmp_path: Path, folio: Folio) -> None:
    """A folder that holds anything is left as it is; an empty one is taken."""
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
    """One line that names it, and nothing is left; nor of one whose optimizer does not fit, found out late."""
    path = out_dir / "ckpt.pt"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    before = tree(tmp_path)
    assert_refused(folio("import", path, "--to", tmp_path / "to"), path, "damaged")
    assert_refused(folio("import", tmp_path / "ckpt.pt", "--to", tmp_path / "to"), tmp_path / "ckpt.pt")
    assert tree(tmp_path) == before


def test_import_that_fails_late(out_dir: Path, tmp_path: Path, folio: Folio, theirs: dict[str, Any]) -> None:
    """An optimizer's last tensor that does not fit leaves nothing behind either."""
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


@pytest.mark.skipif(sys.platform == "win32", reason="no such limits")
def test_import_without_room(out_dir: Path, tmp_path: Path) -> None:
    """Where files may not grow to the model's size, the error names the folder, and nothing is left."""
    before = tree(tmp_path)
    done = python("-c", LIMITED, out_dir, "--to", tmp_path / "to")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert f"{tmp_path / 'to'} could not be written" in done.stderr
    assert tree(tmp_path) == before
