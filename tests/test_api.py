"""import folio: the commands as functions."""

from __future__ import annotations

import json
import math
import pydoc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, STORY, python, tree
from small_runs import TINY

import folio
from folio.config.compose import typed
from folio.config.options import TrainConfig
from folio.config.table import flat, override
from folio.records import run_folder
from folio.records.metrics import read_metrics


@pytest.fixture(scope="module")
def trained(story: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return folio.train(**TINY, data_dir=story, out_dir=tmp_path_factory.mktemp("api") / "out")


def test_train_is_the_command(trained: Any, story: Path, tmp_path: Path, folio: Any) -> None:
    """The same bits."""
    assert folio("train", *SMALL, f"--data_dir={story}", f"--out_dir={tmp_path}").code == 0
    paths = [run_folder.checkpoint_folder(out, 10) / "model.safetensors" for out in (trained.out_dir, tmp_path)]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert trained.state.step == 10
    assert trained.state.val_loss == read_metrics(tmp_path / "metrics.jsonl")[-1]["val_loss"]


def test_presets_a_config_and_options_from_left_to_right(story: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("max_iters = 3\nn_embd = 8\nlog_interval = 2\n", encoding="utf-8")
    config = override(TrainConfig(), {**TINY, "data_dir": str(story), "out_dir": str(tmp_path / "out")})
    run = folio.train(config, tmp_path / "mine.toml", max_iters=2)
    asked = run.config
    assert (asked.optimizer.max_iters, asked.model.n_embd, asked.logging.log_interval) == (2, 8, 2)
    assert asked.data.batch_size == TINY["batch_size"]


def test_scalars_of_numpy_and_torch_are_numbers() -> None:
    given = {"n_layer": np.int64(3), "learning_rate": np.float64(0.5), "bias": np.True_, "dropout": torch.tensor(0.25)}
    found = flat(typed("train", folio.TrainConfig(), given))
    assert {name: (found[name], type(found[name])) for name in given} == {
        "n_layer": (3, int), "learning_rate": (0.5, float), "bias": (True, bool), "dropout": (0.25, float)
    }  # fmt: skip


def test_resume(story: Path, tmp_path: Path, trained: Any) -> None:
    """Ten steps at once, or five and five."""
    half = {**TINY, "data_dir": story, "out_dir": tmp_path}
    folio.train(**{**half, "max_iters": 5})
    run = folio.train(out_dir=tmp_path, init_from="resume", max_iters=10)
    paths = [run_folder.checkpoint_folder(out, 10) / "model.safetensors" for out in (trained.out_dir, run.out_dir)]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_a_config_says_what_differs(story: Path, tmp_path: Path) -> None:
    """On resume what it sets wins over the checkpoint; its micro steps yield to a total that is given later."""
    config = override(TrainConfig(), {**TINY, "data_dir": str(story), "out_dir": str(tmp_path), "max_iters": 3})
    folio.train(config)
    run = folio.train(override(config, {"max_iters": 5}), init_from="resume")
    assert run.state.step == 5
    run = folio.train(config, total_batch_size=192)
    assert run.tokens_per_step == 192
    assert folio.train(run.config, max_iters=1).tokens_per_step == 192
    assert folio.train(run.config, max_iters=1, gradient_accumulation_steps=1).tokens_per_step == 64


def test_eval_only_leaves_all_as_it_is(trained: Any, story: Path) -> None:
    before = tree(trained.out_dir)
    run = folio.train(**TINY, data_dir=story, out_dir=trained.out_dir, eval_only=True, init_from="resume")
    assert run.state.step == 10
    folio.train(**{**TINY, "n_embd": 8}, data_dir=story, out_dir=trained.out_dir, eval_only=True)
    assert tree(trained.out_dir) == before


def test_settings_of_torch_are_those_of_the_run(story: Path, tmp_path: Path) -> None:
    for deterministic in (True, False):
        folio.train(**{**TINY, "max_iters": 1}, data_dir=story, out_dir=tmp_path, deterministic=deterministic)
        assert torch.are_deterministic_algorithms_enabled() == deterministic


def test_ctrl_c_ends_the_program_too(story: Path, tmp_path: Path) -> None:
    """After the step, with a checkpoint; what stands behind the call is not run."""
    script = (
        "import signal, folio\n"
        f"kw = {TINY!r} | {{'max_iters': 10**6, 'data_dir': {str(story)!r}, 'out_dir': {str(tmp_path / 'out')!r}}}\n"
        "from folio.training import loop\n"
        "log_step = loop.log_step\n"
        "def wrapped(run):\n"
        "    log_step(run)\n"
        "    run.state.step == 7 and signal.raise_signal(signal.SIGINT)\n"
        "loop.log_step = wrapped\n"
        "folio.train(**kw)\n"
        "print('behind')\n"
    )
    done = python("-c", script)
    assert done.returncode != 0
    assert done.stderr.rstrip().endswith("KeyboardInterrupt")
    assert "behind" not in done.stdout
    assert "(SIGINT), folio train --init_from=resume" in done.stdout
    assert run_folder.steps(tmp_path / "out")[-1] in (7, 8)


def test_generate_and_evaluate(trained: Any, folio: Any) -> None:
    """What the commands say, as text and numbers."""
    from folio import evaluate, generate

    out = str(trained.out_dir)
    texts = generate("The ", out_dir=out, num_samples=2, max_new_tokens=12, device="cpu")
    said = folio("sample", f"--out_dir={out}", "--start=The ", "--num_samples=2", "--max_new_tokens=12", "--device=cpu")
    assert said.out == "".join(f"{text}\n{'-' * 15}\n" for text in texts)
    assert [len(text) for text in texts] == [16, 16]
    found = evaluate(out_dir=out, device="cpu", dtype="float32")
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert f"{found['loss']:.4f} nats" in folio("eval", f"--out_dir={out}", "--device=cpu", "--dtype=float32").out
    kept = [json.loads(line) for line in (trained.out_dir / "evaluations.jsonl").read_text().splitlines()]
    assert kept[0] == kept[1] == {"kind": "eval", "step": 10, **found}


def test_prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Returns where the files are; a second call finds them."""
    monkeypatch.chdir(tmp_path)
    assert folio.prepare(STORY, name="tale", tokenizer="bytes") == Path("data/tale")
    before = (tmp_path / "data/tale/train.bin").stat().st_mtime_ns
    assert folio.prepare(STORY, name="tale", tokenizer="bytes") == Path("data/tale")
    assert (tmp_path / "data/tale/train.bin").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: folio.train(n_layr=4), "train: unknown option 'n_layr': did you mean 'n_layer'?"),
        (lambda: folio.train(n_layer="four"), "train: n_layer = 'four': must be int"),
        (lambda: folio.train(n_layer=0), "n_layer=0: must be at least 1"),
        (lambda: folio.train("shakespear_char"), "did you mean"),
        (lambda: folio.evaluate("los"), "evaluate: what = 'los': must be loss or hellaswag or lm_eval"),
        (lambda: folio.evaluate(out_dir="nowhere"), "nowhere"),
        (lambda: folio.generate(out_dir="nowhere"), "nowhere"),
        (lambda: folio.prepare(), "nothing to prepare"),
        (lambda: folio.load("nowhere"), "nowhere"),
        (lambda: folio.plot("nowhere"), "nowhere"),
        (lambda: folio.plot(outputt="x.png"), "plot: unknown option 'outputt': did you mean 'output'?"),
        (lambda: folio.report("nowhere"), "nowhere"),
        (lambda: folio.report(["a", "b"]), "['a', 'b'], of the type list, is no path"),
        (lambda: folio.train({"n_layer": 4}), "{'n_layer': 4}, of the type dict, is no path"),
        (lambda: folio.fit("out"), "'out' is no run: folio.build makes one"),
        (lambda: folio.build(callbacks=None), "callbacks is of type NoneType: must be a list of pairs"),
    ],
)
def test_what_is_wrong_is_one_line(call: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on the command line, but as an exception."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError)) as raised:
        call()
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_help_shows_it_all() -> None:
    """help(folio) has every public name with its docstring."""
    text = pydoc.plain(pydoc.render_doc(folio))
    for name in folio.__all__:
        assert name in text
        assert getattr(folio, name).__doc__ or name == "Callback"  # an alias
    assert "as ``folio eval`` does" in text
    assert set(folio.__all__) <= set(dir(folio))
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        folio.trian  # noqa: B018


def test_the_import_alone_is_light() -> None:
    """And torch comes when something is asked for, whatever was imported before."""
    done = python(
        "-c",
        "import sys, folio; assert 'torch' not in sys.modules; from folio.training.start import build; "
        "import folio.generation.sampling; "
        "assert callable(folio.train) and callable(folio.generate); from folio import GPT, GPTConfig; "
        "print(GPT(GPTConfig(block_size=8, vocab_size=9, n_layer=1, n_head=1, n_embd=4)).get_num_params())",
        cwd=ROOT,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_load(trained: Any, tmp_path: Path) -> None:
    """The model and the tokenizer of a folder, by any name of a model."""
    model, tokenizer = folio.load(trained.out_dir, device="cpu", checkpoint=10)
    assert not model.training
    for p, q in zip(model.parameters(), trained.model.parameters(), strict=True):
        assert torch.equal(p, q)
    idx = torch.tensor([tokenizer.encode("The ").tolist()])
    text = tokenizer.decode(model.generate(idx, max_new_tokens=5)[0])
    assert (text[:4], len(text)) == ("The ", 9)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    assert isinstance(folio.load(str(trained.out_dir)), folio.Loaded)
    with pytest.raises(ValueError, match=f"is a checkpoint of the run .*: give {trained.out_dir}, and checkpoint=10"):
        folio.load(trained.save())


def test_plot_and_report(trained: Any, tmp_path: Path) -> None:
    """What the commands write; a notebook shows the picture."""
    picture = folio.plot(trained.out_dir, output=tmp_path / "a.png")
    shown = picture._repr_png_()
    assert shown is not None
    assert Path(picture).read_bytes() == shown[0]
    assert folio.plot(trained.out_dir).path == trained.out_dir / "loss.png"
    svg = folio.plot(trained.out_dir, output=tmp_path / "a.svg")
    assert svg._repr_png_() is None
    assert str(svg._repr_svg_()).startswith("<?xml")
    assert folio.report(trained.out_dir, output=tmp_path / "a.html").read_text(encoding="utf-8").endswith("</html>\n")


@pytest.mark.slow
def test_a_typed_program(tmp_path: Path) -> None:
    """mypy --strict has nothing to say about a program that uses the public names."""
    (tmp_path / "program.py").write_text(
        "import folio\nimport torch\nfrom pathlib import Path\n\n\n"
        "def norm(run: folio.Run) -> dict[str, float | str]:\n"
        "    return {'kind': 'norm', 'x': run.model.lm_head.weight.norm().item()}\n\n\n"
        "def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:\n"
        "    return logits.mean() + targets.sum()\n\n\n"
        "callbacks: list[folio.Callback] = [(10, norm), (lambda run: run.state.step == 3, lambda run: None)]\n"
        "where: Path = folio.prepare(texts=(str(i) for i in range(9)), name='x')\n"
        "with folio.build('shakespeare_char', out_dir='out', callbacks=callbacks, loss=loss) as run:\n"
        "    why: str = folio.fit(run)\n"
        "    texts: list[str] = run.generate('x', num_samples=2)\n"
        "    found: float = run.evaluate('val')['loss']\n"
        "    saved: Path = run.save()\n"
        "model, tokenizer = folio.load('out')\n"
        "ids: torch.Tensor = model.generate(torch.tensor([tokenizer.encode('x').tolist()]), 5)\n"
        "print(tokenizer.decode(ids[0].tolist()), folio.plot('out').path, folio.report('out'), folio.GPTConfig())\n",
        encoding="utf-8",
    )
    done = python("-m", "mypy", "--strict", f"--cache-dir={tmp_path}", "program.py", cwd=tmp_path, MYPYPATH=str(ROOT))
    assert (done.returncode, done.stdout) == (0, "Success: no issues found in 1 source file\n"), done.stdout
