"""An exported folder is, to transformers, the same model and tokenizer; and comes back as it went."""

from __future__ import annotations

import base64
import json
import re
import resource
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, STORY, WIDE, Outcome, assert_refused, python, tree
from safetensors.torch import load_file, save_file
from torch import Tensor

from folio import cli, files
from folio.checkpoints import checkpoint, find, gguf, hugging_face, model_card
from folio.checkpoints.checkpoint import State
from folio.commands import train
from folio.data.tokenizers import Bytes, Characters, Tiktoken, Tokenizer, decode
from folio.model.config import GPTConfig
from folio.model.gpt import GPT

transformers = pytest.importorskip("transformers")
yaml = pytest.importorskip("yaml")

SHAPES: dict[str, dict[str, Any]] = {
    "all biases": {},
    "no biases": {"bias": False},
    "only qkv biases": {"bias": False, "qkv_bias": True},
    "all but qkv biases": {"bias": True, "qkv_bias": False},
    "tanh": {"activation": "gelu_tanh"},
    "own head": {"tie_weights": False},
    "padded": {"vocab_size": 300},
    "padded own head": {"vocab_size": 300, "tie_weights": False, "bias": False},
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging = transformers.utils.logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.set_verbosity(before)
    logging.enable_progress_bar()


@pytest.fixture(scope="session")
def trained(story: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An out_dir after ten steps, with checkpoints of steps 5 and 10."""
    out_dir = tmp_path_factory.mktemp("trained") / "out"
    argv = [*SMALL, f"--data_dir={story}", f"--out_dir={out_dir}", "--learning_rate=0.0123", "--bias=False"]
    train.main(cli.parse(train.Options, argv, "folio train", files=True))
    return out_dir


def saved(out_dir: Path, tokens: Tokenizer | None = None, seed: int = 0, **shape: Any) -> Path:
    """An out_dir with a model whose every parameter, biases too, is drawn at random."""
    config = GPTConfig(**{"block_size": 32, "vocab_size": 256, "n_layer": 2, "n_head": 2, "n_embd": 16, **shape})
    generator = torch.Generator().manual_seed(seed)
    model = GPT(config)
    weights = {
        name: torch.randn(p.shape, generator=generator) * 0.3 + (p.dim() == 1 and name.endswith("weight"))
        for name, p in model.named_parameters()
    }
    state = checkpoint.state_of_elsewhere(config, tokens and tokens.to_json(), State(step=7, tokens=1234))
    checkpoint.save(out_dir, 7, weights, {}, state)
    return out_dir


def theirs(folder: Path, **how: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **how).eval()


@torch.no_grad()
def logits_of(out_dir: Path, idx: Tensor) -> Tensor:
    model = find.in_folder(out_dir).model().eval()
    return model.lm_head(model.hidden(idx))


@torch.no_grad()
def assert_the_same_logits(folder: Path, out_dir: Path) -> None:
    """To 1e-5 of the largest, in float32, for all the ids that the folder has."""
    model = theirs(folder)
    size = model.config.vocab_size
    idx = torch.randint(size, (3, model.config.n_positions), generator=torch.Generator().manual_seed(1))
    wanted, found = logits_of(out_dir, idx)[..., :size], model(idx).logits
    assert found.dtype == torch.float32
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


# The model


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_same_logits(tmp_path, shape) -> None:
    out_dir, to = saved(tmp_path / "out", Bytes(), **shape), tmp_path / "new" / "hf"
    hugging_face.export(find.in_folder(out_dir), to)
    assert_the_same_logits(to, out_dir)
    assert (theirs(to).config.vocab_size, theirs(to).config.tie_word_embeddings) == (
        256,
        shape.get("tie_weights", True),
    )
    assert set(theirs(to).state_dict()) >= load_file(to / "model.safetensors").keys()  # none that it does not know


def test_a_padded_vocabulary_is_cut(tmp_path, kind) -> None:
    """The ids beyond the tokenizer's mean nothing; all others keep their logits."""
    tokens, size = kind
    out_dir, to = saved(tmp_path / "out", tokens, vocab_size=size), tmp_path / "hf"
    hugging_face.export(find.in_folder(out_dir), to)
    assert_the_same_logits(to, out_dir)
    model = theirs(to)
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == tokens.size
    assert model.config.eos_token_id == model.config.bos_token_id == tokens.eot
    assert model.generation_config.eos_token_id == model.generation_config.bos_token_id == tokens.eot


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype(folio, tmp_path, dtype) -> None:
    """Of all the weights, of the config and of the model that is loaded; rounded once."""
    out_dir, to = saved(tmp_path / "out", Bytes(), bias=False), tmp_path / "hf"
    assert folio("export", f"--out_dir={out_dir}", "--to", to, f"--dtype={dtype}").err == ""
    kind = getattr(torch, dtype)
    assert {weight.dtype for weight in load_file(to / "model.safetensors").values()} == {kind}
    assert json.loads((to / "config.json").read_text())["dtype"] == dtype
    assert theirs(to, dtype="auto").dtype == kind
    embedding = find.in_folder(out_dir).model().transformer.wte.weight
    assert torch.equal(theirs(to, dtype="auto").transformer.wte.weight, embedding.to(kind))


def test_greedy_text(folio, tmp_path, kind) -> None:
    """What transformers generates is what folio sample writes, up to the whole context."""
    tokens, size = kind
    out_dir, to = saved(tmp_path / "out", tokens, vocab_size=size, block_size=24), tmp_path / "hf"
    hugging_face.export(find.in_folder(out_dir), to)
    fast, prompt = transformers.AutoTokenizer.from_pretrained(to), "The ferry"
    given = fast(prompt, return_tensors="pt")
    new = 24 - given["input_ids"].size(1)
    written = theirs(to).generate(**given, max_new_tokens=new, do_sample=False)[0]
    how = ("--temperature=0", "--dtype=float32", "--device=cpu", "--num_samples=1", f"--max_new_tokens={new}")
    code, out, _ = folio("sample", f"--out_dir={out_dir}", f"--start={prompt}", *how)
    assert code == 0
    assert tokens.eot not in written.tolist()
    assert out.startswith(fast.decode(written) + "\n---")
    assert len(set(written.tolist())) > 2  # no single token over and over


def test_an_end_of_text_ends_what_transformers_generates(folio, tmp_path, monkeypatch, shared_data) -> None:
    """There only: folio sample goes on, as a corpus does; transformers does so as well when it is asked to."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared_data / "tiktoken"))
    out_dir, to = saved(tmp_path / "out", Tiktoken(), vocab_size=50304, tie_weights=False), tmp_path / "hf"
    weights = dict(find.choose(out_dir).weights())
    weights["transformer.ln_f.weight"].zero_()
    weights["transformer.ln_f.bias"].fill_(1)
    weights["lm_head.weight"].zero_()[50256] = 1  # the likeliest token is always the end of text
    checkpoint.save(out_dir, 7, weights, {}, {**find.choose(out_dir).state, "step": 7})
    hugging_face.export(find.in_folder(out_dir), to)
    fast, model = transformers.AutoTokenizer.from_pretrained(to), theirs(to)
    given = fast("The ferry", return_tensors="pt")
    written = fast.decode(model.generate(**given, max_new_tokens=4, do_sample=False)[0])
    assert written == "The ferry<|endoftext|>"
    how = ("--temperature=0", "--dtype=float32", "--device=cpu", "--num_samples=1", "--max_new_tokens=4")
    out = folio("sample", f"--out_dir={out_dir}", "--start=The ferry", *how).out
    assert out.startswith("The ferry" + "<|endoftext|>" * 4 + "\n---")
    model.generation_config.eos_token_id = None
    assert out.startswith(fast.decode(model.generate(**given, max_new_tokens=4, do_sample=False)[0]) + "\n---")


# Its tokenizer


def test_the_tokenizer(tmp_path, kind) -> None:
    """AutoTokenizer encodes as ours, brings back every space, and knows an end of text only where there is one."""
    tokens, size = kind
    hugging_face.export(find.in_folder(saved(tmp_path / "out", tokens, vocab_size=size)), tmp_path / "hf")
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert len(fast) == tokens.size
    assert (fast.eos_token_id, fast.bos_token_id, fast.model_max_length) == (tokens.eot, tokens.eot, 32)
    texts = [WIDE, " ", "\n\n", " leading", "a . b , c ! do n't", STORY.read_text(encoding="utf-8")[:5000]]
    if not isinstance(tokens, Characters):
        texts += ["\x00\r\n\u0301", "".join(map(chr, range(0x250))), "\ufffd 日本"]
    for text in texts:
        ids = fast(text)["input_ids"]
        assert ids == tokens.encode(text).tolist(), text
        assert fast.decode(ids) == decode(tokens, ids) == text
    if tokens.eot is not None:
        assert fast("a<|endoftext|>b")["input_ids"] == tokens.encode("a<|endoftext|>b", special=True).tolist()
        assert fast.decode([tokens.eot]) == "<|endoftext|>"
        assert fast.decode([tokens.eot], skip_special_tokens=True) == ""


def test_a_model_of_unknown_tokens(tmp_path) -> None:
    """It is handed on without a tokenizer, and with all its ids."""
    out_dir, to = saved(tmp_path / "out", vocab_size=300), tmp_path / "hf"
    hugging_face.export(find.in_folder(out_dir), to)
    assert_the_same_logits(to, out_dir)
    assert theirs(to).config.vocab_size == 300
    assert not list(to.glob("*token*"))


# There and back


def test_a_vocabulary_that_was_only_assumed(tmp_path) -> None:
    """Files of tokens that say nothing are taken for GPT-2's: a model with fewer ids was not trained on those."""
    out_dir = saved(tmp_path / "out", vocab_size=100)
    found = find.in_folder(out_dir)
    found.state["tokenizer"] = {"kind": "tiktoken", "name": "gpt2"}
    hugging_face.export(found, tmp_path / "hf")
    assert_the_same_logits(tmp_path / "hf", out_dir)
    assert not (tmp_path / "hf" / "tokenizer.json").exists()


@pytest.mark.parametrize("shape", [{"tie_weights": False}, {"bias": False}, {"bias": False, "qkv_bias": True}], ids=str)
@pytest.mark.parametrize("by", ["import", "the folder"])
def test_there_and_back_is_the_same_to_the_byte(folio, tmp_path, kind, shape, by) -> None:
    """With folio import between, or straight from the folder."""
    tokens, size = kind
    back, first, second = tmp_path / "back", tmp_path / "a" / "hf", tmp_path / "b" / "hf"
    out_dir = saved(tmp_path / "out", tokens, vocab_size=size, **shape)
    assert folio("export", f"--out_dir={out_dir}", "--to", first).code == 0
    if by == "import":
        assert folio("import", first, "--to", back).code == 0
        was = find.in_folder(out_dir).config()
        assert find.in_folder(back).config() == replace(was, vocab_size=tokens.size)
    assert folio("export", f"--out_dir={back if by == 'import' else first}", "--to", second).code == 0
    one, two = tree(first), tree(second)
    assert one.keys() == two.keys() >= {"config.json", "model.safetensors", "tokenizer.json", "README.md"}
    assert [name for name in one if one[name] != two[name]] == []


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


@pytest.mark.parametrize("name", ["transformer.h.1.attn.c_attn.bias", "transformer.ln_f.bias"])
def test_biases_that_were_trained_elsewhere_come_back(folio, tmp_path, name) -> None:
    """Though the model that was exported had none."""
    out_dir, to, back = saved(tmp_path / "out", Bytes(), bias=False), tmp_path / "hf", tmp_path / "back"
    hugging_face.export(find.in_folder(out_dir), to)
    weights = load_file(to / "model.safetensors")
    assert not weights[name].any()
    weights[name][3] = 0.5
    save_file(weights, to / "model.safetensors", metadata={"format": "pt"})
    assert folio("import", to, "--to", back).code == 0
    assert find.in_folder(back).config().bias is True
    assert_the_same_logits(to, back)
    assert torch.equal(dict(find.in_folder(back).model().named_parameters())[name], weights[name])


# What is said of it


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


def card_of(folio, out_dir: Path, to: Path) -> dict[str, str]:
    assert folio("export", f"--out_dir={out_dir}", "--to", to).code == 0
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
    told = card_of(folio, saved(tmp_path / "out", Bytes()), tmp_path / "hf")
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


@pytest.mark.parametrize("told", [[1], {"data": 3}, {"data": "x" * 2000}, {"data": "a\n# b"}], ids=str)
def test_facts_of_a_folder_that_may_come_from_anybody(folio, tmp_path, told) -> None:
    hugging_face.export(find.in_folder(saved(tmp_path / "out", Bytes())), tmp_path / "hf")
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
    out_dir = saved(tmp_path / "out", tokens, vocab_size=size, block_size=context)
    hugging_face.export(find.in_folder(out_dir), tmp_path / 'a "model"')
    text = (tmp_path / 'a "model"' / "README.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "card", "exec"), {})
    assert capsys.readouterr().out.strip() or tokens
    assert ("Once upon a time" in program) == (context >= 32 and isinstance(tokens, Bytes))


# Refusals


REFUSALS: dict[str, tuple[list[str], list[str]]] = {
    "a target that holds something": (["--to=full/hf"], ["full/hf", "is there already"]),
    "a target that is a file": (["--to=file"], ["file", "is there already"]),
    "a gguf that is there": (["--to=mine.gguf"], ["mine.gguf", "is there already"]),
    "no target": (["--to=."], ["."]),
    "below a file": (["--to=file/hf"], ["file/hf", "could not be written"]),
    "far below a file": (["--to=file/a/hf"], ["file/a/hf", "could not be written"]),
    "a gguf below a file": (["--to=file/x.gguf"], ["file/x.gguf", "could not be written"]),
    "no out_dir": (["--out_dir=nowhere"], ["no checkpoint in nowhere", "train"]),
    "an empty out_dir": (["--out_dir=empty"], ["no checkpoint in empty", "train"]),
    "an unknown step": (["--checkpoint=8"], ["'8'", "out", "latest", "7"]),
    "an unknown checkpoint": (["--checkpoint=newest"], ["'newest'", "out", "latest", "7"]),
    "an unknown dtype": (["--dtype=float64"], ["dtype", "float64", "bfloat16"]),
    "a tokenizer larger than the model": (["--out_dir=large"], ["large", "256 token ids", "its model 100"]),
    "the same for a gguf": (["--out_dir=large", "--to=x.gguf"], ["large", "256 token ids", "its model 100"]),
    "a damaged checkpoint": (["--out_dir=damaged"], ["step-00000007 is damaged"]),
    "a gguf to the hub": (["--to=x.gguf", "--push_to_hub=me/it"], ["push_to_hub", "me/it", "x.gguf", "folder"]),
}


@pytest.mark.parametrize(("argv", "words"), REFUSALS.values(), ids=REFUSALS)
def test_refusals(folio, tmp_path, monkeypatch, argv, words) -> None:
    """In one line, and all is as it was."""
    monkeypatch.chdir(tmp_path)
    for folder in ("full/hf", "empty"):
        Path(folder).mkdir(parents=True)
    for file in ("full/hf/mine.txt", "file", "mine.gguf"):
        Path(file).write_text("mine")
    saved(Path("out"), Bytes(), activation="gelu_tanh")
    saved(Path("large"), Bytes(), vocab_size=100)
    (saved(Path("damaged"), Bytes()) / "checkpoints" / "step-00000007" / "model.safetensors").write_bytes(b"")
    before = tree(tmp_path)
    assert_refused(folio("export", "--out_dir=out", "--to=hf", *argv), *words)
    assert tree(tmp_path) == before


def damaged(out_dir: Path, name: str, value: float) -> Path:
    """The out_dir, with another number in the middle of a parameter."""
    found = find.choose(out_dir)
    weights = dict(found.weights())
    weights[name].view(-1)[weights[name].numel() // 2] = value
    checkpoint.save(out_dir, 7, weights, {}, found.state)
    return out_dir


WTE, LN_F = "transformer.wte.weight", "transformer.ln_f.weight"


@pytest.mark.parametrize("to", ["hf", "new/hf", "model.gguf"])
@pytest.mark.parametrize(
    ("name", "value", "dtype", "words"),
    [
        (WTE, float("nan"), "float32", [WTE, "1 numbers", "not finite"]),
        (LN_F, float("inf"), "bfloat16", [LN_F, "not finite"]),
        ("transformer.h.1.mlp.c_fc.bias", float("-inf"), "float16", ["h.1.mlp.c_fc.bias", "not finite"]),
        (WTE, 7e4, "float16", [WTE, "70000", "beyond float16", "65504", "another --dtype"]),
        (WTE, -7e4, "float16", [WTE, "beyond float16"]),
        (WTE, 3.4e38, "bfloat16", [WTE, "beyond bfloat16"]),
    ],
)
def test_numbers_that_are_not_finite(folio, tmp_path, to, name, value, dtype, words) -> None:
    """In the weights, or once they are rounded: the parameter is named, and nothing is written."""
    damaged(saved(tmp_path / "out", Bytes(), activation="gelu_tanh"), name, value)
    before = tree(tmp_path)
    argv = ("export", f"--out_dir={tmp_path / 'out'}", "--to", tmp_path / to, f"--dtype={dtype}")
    assert_refused(folio(*argv), tmp_path / "out", *words)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("to", ["hf", "model.gguf"])
def test_numbers_that_just_fit(folio, tmp_path, to) -> None:
    """The largest of the type; and one that is not finite in a row which is cut off."""
    damaged(saved(tmp_path / "out", Bytes(), activation="gelu_tanh", vocab_size=300), WTE, 65504.0)
    found = find.choose(tmp_path / "out")
    weights = dict(found.weights())
    weights[WTE][299] = float("nan")
    checkpoint.save(tmp_path / "out", 7, weights, {}, found.state)
    argv = ("export", f"--out_dir={tmp_path / 'out'}", "--to", tmp_path / to, "--dtype=float16")
    assert folio(*argv).code == 0


@dataclass(frozen=True)
class Later(GPTConfig):
    """What a later version may have."""

    norm: str = "layer"
    rope_theta: float = 0.0
    windows: tuple[int, ...] = field(default_factory=tuple)


LATER = {
    "norm='rms'": {"norm": "rms"},
    "rope_theta=10000.0": {"rope_theta": 1e4},
    "windows=(8,)": {"windows": (8,)},
    "activation='relu'": {"activation": "relu"},
}


@pytest.mark.parametrize("to", ["hf", "model.gguf"])
@pytest.mark.parametrize("what", LATER)
def test_fields_that_the_formats_lack(tmp_path, to, what) -> None:
    """A field that the exporter does not know is refused by its name where it is not at its default."""
    found = find.in_folder(saved(tmp_path / "out", Bytes(), activation="gelu_tanh"))
    export = gguf.export if to.endswith(".gguf") else hugging_face.export

    class Newer(checkpoint.Checkpoint):
        def config(self) -> GPTConfig:
            return Later(**{**self.state["model"], **self.asked})

    newer = Newer(found.path, found.state, LATER[what])
    with pytest.raises(ValueError, match=re.escape(f"{found.path}: {what}: other programs' GPT-2 does not support it")):
        export(newer, tmp_path / to)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    export(replace(newer, asked={}), tmp_path / to)
    assert (tmp_path / to).exists()


def test_every_field_is_exported_or_refused(tmp_path) -> None:
    """Each of today's fields comes back as it was; one that is added must be thought of here."""
    shape = {"block_size": 8, "vocab_size": 256, "n_layer": 1, "n_head": 3, "n_embd": 12, "dropout": 0.25}
    shape |= {"bias": False, "qkv_bias": True, "activation": "gelu_tanh", "tie_weights": False}
    assert shape.keys() == {f.name for f in fields(GPTConfig)}
    hugging_face.export(find.in_folder(saved(tmp_path / "out", Bytes(), **shape)), tmp_path / "hf")
    assert find.by_name(str(tmp_path / "hf")).config() == GPTConfig(**shape)


@contextmanager
def small_files(size: int) -> Iterator[None]:
    """Files of this process cannot grow beyond ``size``, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("to", ["hf", "model.gguf"])
@pytest.mark.parametrize("size", [1_000, 40_000])
def test_a_write_that_fails_leaves_nothing(folio, tmp_path, to, size) -> None:
    """Of files that cannot grow to their length, one line is said."""
    saved(tmp_path / "out", Bytes(), activation="gelu_tanh")
    before = tree(tmp_path)
    with small_files(size):
        outcome = folio("export", f"--out_dir={tmp_path / 'out'}", "--to", tmp_path / to)
    assert_refused(outcome, to, "could not be written")
    assert tree(tmp_path) == before


def test_appearing_in_an_empty_folder_and_after_a_kill(tmp_path) -> None:
    """An empty folder is taken; what a killed attempt left is swept away."""
    rest = tmp_path / ".hf.unfinished"
    (tmp_path / "hf").mkdir()
    rest.mkdir()
    (rest / "half").write_text("half")
    with files.appearing(tmp_path / "hf") as unfinished:
        assert unfinished == rest
        unfinished.mkdir()
        (unfinished / "whole").write_text("whole")
        assert not list((tmp_path / "hf").iterdir())
    assert tree(tmp_path) == {"hf": b"", "hf/whole": b"whole"}


def test_appearing_is_undone_by_any_error(tmp_path) -> None:
    def attempt() -> None:
        with files.appearing(tmp_path / "new" / "hf") as unfinished:
            unfinished.mkdir()
            (unfinished / "half").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attempt()
    assert tree(tmp_path) == {"new": b""}


# To the hub


class Hub(BaseHTTPRequestHandler):
    """What the hub answers to who creates a repository and commits to it."""

    protocol_version = "HTTP/1.1"
    pushed: dict[str, bytes]

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length")
        body = self.rfile.read(int(length)) if length else self._chunks()
        here = f"http://127.0.0.1:{self.server.server_address[1]}"  # type: ignore[attr-defined]
        answer: dict[str, Any] = {}
        if self.headers.get("Authorization") != "Bearer hf_dummy":
            return self._answer(401, {"error": "no access"})
        if self.path.startswith("/api/repos/create"):
            answer = {"url": f"{here}/me/it", "name": "me/it"}
        elif "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]}
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.pushed[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            answer = {"commitUrl": f"{here}/me/it/commit/abc", "commitOid": "abc", "success": True}
        return self._answer(200, answer)

    def do_GET(self) -> None:
        self._answer(404, {"error": "nothing"})

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, code: int, answer: dict[str, Any]) -> None:
        content = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


def push(tmp_path: Path, endpoint: str, token: str = "hf_dummy") -> Any:
    saved(tmp_path / "out", Bytes())
    argv = ["-m", "folio", "export", f"--out_dir={tmp_path / 'out'}", f"--to={tmp_path / 'hf'}", "--push_to_hub=me/it"]
    env = {"HF_ENDPOINT": endpoint, "HF_TOKEN": token, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
    return python(*argv, **env, no_proxy="127.0.0.1", HF_HUB_OFFLINE="0", HF_HUB_DISABLE_PROGRESS_BARS="1")


@pytest.mark.slow
@pytest.mark.parametrize("token", ["hf_dummy", "hf_wrong"])
def test_push(tmp_path, token) -> None:
    """All of the folder is sent, by who may; the address is said."""
    Hub.pushed = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        done = push(tmp_path, f"http://127.0.0.1:{server.server_address[1]}", token)
    finally:
        server.shutdown()
        server.server_close()
    sent = {name: content for name, content in tree(tmp_path / "hf").items() if not name.startswith(".")}
    assert {"config.json", "model.safetensors", "README.md", "tokenizer.json"} <= sent.keys()
    if token == "hf_dummy":
        assert done.returncode == 0, done.stderr
        assert Hub.pushed == sent
        assert re.search(r"^pushed to .*/me/it$", done.stdout, re.MULTILINE), done.stdout
    else:
        assert_refused(Outcome(done.returncode, done.stdout, done.stderr), "me/it", "was not pushed", "401")
        assert Hub.pushed == {}


@pytest.mark.slow
def test_push_without_a_network(tmp_path) -> None:
    """The folder is there and whole; one line says that it was not pushed."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = server.getsockname()[1]
    done = push(tmp_path, f"http://127.0.0.1:{closed}")
    assert_refused(Outcome(done.returncode, done.stdout, done.stderr), "hf", "is written", "was not pushed", "me/it")
    assert_the_same_logits(tmp_path / "hf", tmp_path / "out")
    assert not list(tmp_path.glob(".*"))
