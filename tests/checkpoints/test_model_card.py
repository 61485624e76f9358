"""An export says of its run what is known, keeps it, and its card's program runs."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import SMALL, assert_refused, tree
from exports import (
    _quiet,  # noqa: F401
)
from small_checkpoints import save_random

from folio import cli
from folio.checkpoints import find, hugging_face, model_card
from folio.commands import train
from folio.data.tokenizers import Bytes, Characters

transformers = pytest.importorskip("transformers")
yaml = pytest.importorskip("yaml")


@pytest.fixture(scope="session")
def trained(story: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An out_dir after ten steps, with checkpoints of steps 5 and 10."""
    out_dir = tmp_path_factory.mktemp("trained") / "out"
    argv = [*SMALL, f"--data_dir={story}", f"--out_dir={out_dir}", "--learning_rate=0.0123", "--bias=False"]
    train.main(cli.parse(train.Options, argv, "folio train", files=True))
    return out_dir


def test_a_run_there_and_back(folio, trained, tmp_path) -> None:
    """What is known of the run stays known."""
    back, first, second = tmp_path / "back", tmp_path / "a" / "hf", tmp_path / "b" / "hf"
    assert folio("export", f"--out_dir={trained}", "--to", first, "--checkpoint=5").code == 0
    assert folio("import", first, "--to", back).code == 0
    assert folio("export", f"--out_dir={back}", "--to", second).code == 0
    assert tree(first) == tree(second)
    was, now = find.choose(trained, "5"), find.choose(back)
    assert now.config() == was.config()
    assert (now.step, now.state["val_loss"], now.asked["learning_rate"]) == (5, was.state["val_loss"], 0.0123)
    assert all(torch.equal(weight, dict(was.weights())[name]) for name, weight in now.weights())


def test_config_and_card(folio, trained, story, tmp_path) -> None:
    """Our own config, the run's figures, and nothing of this machine."""
    to = tmp_path / "tale-10"
    assert folio("export", f"--out_dir={trained}", "--to", to, "--checkpoint=latest").code == 0
    files_there = {path.name for path in to.iterdir()}
    assert {"config.json", "generation_config.json", "README.md", "tokenizer_config.json"} <= files_there
    found, raw = find.choose(trained, "latest"), json.loads((to / "config.json").read_text())
    assert (raw["model_type"], raw["architectures"]) == ("gpt2", ["GPT2LMHeadModel"])
    assert raw["folio"]["model"] == asdict(found.config())
    assert raw["folio"]["state"]["step"] == 10
    assert raw["folio"]["state"]["val_loss"] == found.state["val_loss"]
    assert raw["folio"]["asked"]["learning_rate"] == 0.0123
    for path in to.glob("*.*"):
        content = path.read_bytes()
        assert b"_dir" not in content
        assert not any(str(place).encode() in content for place in (trained, story, tmp_path, trained.parent, "/tmp"))
    _, front, text = (to / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    meta = yaml.safe_load(front)
    assert (meta["library_name"], meta["pipeline_tag"]) == ("transformers", "text-generation")
    assert "gpt2" in meta["tags"]
    assert text.lstrip().startswith("# tale-10\n")
    facts = dict(re.findall(r"^\| ([a-z ]+) \| (.+) \|$", text, re.MULTILINE))
    assert int(facts["parameters"].replace(",", "")) == sum(p.numel() for p in found.model().parameters())
    assert (facts["steps"], facts["tokens seen"]) == ("10", f"{10 * 4 * 2 * 16:,}")
    assert facts["validation loss"].startswith(f"{found.state['val_loss']:.4f} ")
    assert facts["training loss"].startswith(f"{found.state['train_loss']:.4f} ")
    assert float(facts["learning rate"]) == 0.0123
    assert "context 16" in facts["shape"]
    assert "no biases" in facts["shape"]
    assert facts["data"] == f"{story.name} ({(story / 'train.bin').stat().st_size // 2:,} tokens to train on)"
    assert facts["seed"] == "1337"
    assert facts["machine"].startswith("cpu, ")
    assert facts["machine"].endswith(f", float32, 1 process, PyTorch {torch.__version__}")
    assert (facts["license"], meta["license"]) == ("not known", "unknown")
    assert "not known" in facts["languages"]
    assert "## Limits\n\nThe context is 16 tokens" in text
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert '"tale-10"' in program


def card_of(folio, out_dir: Path, to: Path, *more: str) -> dict[str, str]:
    assert folio("export", f"--out_dir={out_dir}", "--to", to, *more).code == 0
    assert not any(str(to.parent) in (to / name).read_text() for name in ("README.md", "config.json"))
    return dict(re.findall(r"^\| ([A-Za-z ]+) \| (.+) \|$", (to / "README.md").read_text(), re.MULTILINE))


def test_the_card_names_the_data_that_was_opened(folio, story, tmp_path, monkeypatch) -> None:
    """By --dataset or --data_dir, a folder or a glob, one or a mixture; and as well where the checkpoint is older."""
    monkeypatch.chdir(tmp_path)
    for name in ("tales", "legends"):
        shutil.copytree(story, tmp_path / "data" / name)
    ways = {
        "--dataset=tales": ["tales"],
        f"--dataset={tmp_path / 'data/tales'}": ["tales"],
        f"--data_dir={tmp_path / 'data/legends'}": ["legends"],
        "--data_dir=data/legends/*.bin": ["legends"],
        "--data_mixture=tales=0.25,legends=0.75": ["tales (", "25% of the rows); legends (", "75% of the rows)"],
        f"--data_mixture={tmp_path / 'data/tales'}=0.5,legends=0.5": ["tales (", "50%", "legends ("],
    }
    for number, (data, names) in enumerate(ways.items()):
        out = tmp_path / f"out{number}"
        assert folio("train", *SMALL, "--max_iters=1", data, f"--out_dir={out}").code == 0
        told = card_of(folio, out, tmp_path / f"hf{number}")["data"]
        assert all(name in told for name in names)
        older = find.choose(out)
        del older.state["sources"]
        assert model_card.facts(older)["data"].startswith(names[0].removesuffix(" ("))
        assert "openwebtext" not in told + model_card.facts(older)["data"]  # which only --dataset's default names


def test_the_card_of_a_model_of_which_little_is_known(folio, tmp_path) -> None:
    """It says so, and invents nothing."""
    told = card_of(folio, save_random(tmp_path / "out", Bytes()), tmp_path / "hf")
    assert (told["data"], told["seed"], told["machine"]) == ("not known",) * 3
    assert told["HellaSwag"] == "not measured"
    assert {"validation loss", "learning rate", "batch size"} & told.keys() == set()


def test_what_the_card_says_stays_known(folio, trained, tmp_path) -> None:
    """HellaSwag as it was measured of this step; all of it after an import as well."""
    out_dir = Path(shutil.copytree(trained, tmp_path / "out"))
    record = {"kind": "hellaswag", "style": "completion", "acc": 0.25, "acc_norm": 0.5, "total": 8}
    lines = [{**record, "step": 5}, {**record, "step": 10, "acc_norm": 0.75}, {**record, "step": 5, "acc_norm": 0.625}]
    (out_dir / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert folio("export", f"--out_dir={out_dir}", "--to", tmp_path / "a" / "hf", "--checkpoint=5").code == 0
    assert folio("import", tmp_path / "a" / "hf", "--to", tmp_path / "back").code == 0
    shutil.rmtree(out_dir)
    told = card_of(folio, tmp_path / "back", tmp_path / "b" / "hf")
    assert told["HellaSwag"] == "acc_norm 0.6250 (5/8), acc 0.2500, completion"
    assert told["seed"] == "1337"
    assert tree(tmp_path / "a" / "hf") == tree(tmp_path / "b" / "hf")


def test_averaged_weights_have_no_figures_of_the_trained_ones(folio, story, tmp_path) -> None:
    """Neither in the card nor in the run's folder, and the other way round."""
    out_dir, ema = tmp_path / "out", "--weights=ema"
    argv = [*SMALL, f"--data_dir={story}", f"--out_dir={out_dir}", "--ema_decay=0.5", "--max_iters=5"]
    assert folio("train", *argv).code == 0
    flags = [f"--out_dir={out_dir}", "--device=cpu", "--eval_iters=1", "--batch_size=2"]
    assert "step 5, averaged weights\n" in folio("eval", *flags, ema).out
    assert "step 5\n" in folio("eval", *flags).out
    lines = [json.loads(line) for line in (out_dir / "evaluations.jsonl").read_text().splitlines()]
    assert [line.get("weights") for line in lines] == ["ema", None]
    record = {"kind": "hellaswag", "step": 5, "style": "completion", "acc": 0.25, "total": 8}
    lines += [{**record, "acc_norm": 0.5}, {**record, "acc_norm": 0.75, "weights": "ema"}]
    (out_dir / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert folio("report", str(out_dir)).code == 0
    assert "hellaswag, completion, averaged weights" in (out_dir / "report.html").read_text()
    trained = card_of(folio, out_dir, tmp_path / "trained")
    averaged = card_of(folio, out_dir, tmp_path / "averaged", ema)
    assert (averaged["weights"], averaged["HellaSwag"][:15]) == ("moving averages over the steps", "acc_norm 0.7500")
    assert trained["HellaSwag"][:15] == "acc_norm 0.5000"
    assert trained.keys() - averaged.keys() == {"validation loss", "training loss"}
    assert averaged.keys() - trained.keys() == {"weights"}
    assert folio("import", tmp_path / "averaged", "--to", tmp_path / "back").code == 0
    assert card_of(folio, tmp_path / "back", tmp_path / "again") == averaged


@pytest.mark.parametrize("told", [[1], {"data": 3}, {"data": "x" * 2000}, {"data": "a\n# b"}], ids=str)
def test_facts_of_a_folder_that_may_come_from_anybody(folio, tmp_path, told) -> None:
    hugging_face.export(find.in_folder(save_random(tmp_path / "out", Bytes())), tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    config["folio"]["facts"] = told
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    assert_refused(folio("import", tmp_path / "hf", "--to", tmp_path / "back"), "config.json", "'folio'")


@pytest.mark.parametrize("context", [64, 24, 5, 2, 1])
@pytest.mark.parametrize(
    "tokens", [Bytes(), Characters(" abc\n"), Characters("\n渡"), None], ids=["bytes", "abc", "two", "unknown"]
)
def test_the_card_s_program_runs(tmp_path, monkeypatch, capsys, context, tokens) -> None:
    """However short the context and whatever the vocabulary; with ids alone where nothing says what they mean."""
    size = tokens.size if tokens else 100
    out_dir = save_random(tmp_path / "out", tokens, vocab_size=size, block_size=context)
    hugging_face.export(find.in_folder(out_dir), tmp_path / 'a "model"')
    text = (tmp_path / 'a "model"' / "README.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "card", "exec"), {})
    assert capsys.readouterr().out.strip() or tokens
    assert ("Once upon a time" in program) == (context >= 32 and isinstance(tokens, Bytes))
