"""A Hugging Face folder gives transformers' model: its logits in every form, shape and text."""

from __future__ import annotations

import json
import math
import re
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LINUX, STORY, assert_refused, python
from gpt2_folders import SAMPLE, TRAIN, assert_same_logits, logits, random_gpt2, saved
from safetensors.torch import save_file
from torch.nn import functional as F

from folio.checkpoints import find
from folio.data.tokenizers import Tiktoken
from folio.model.config import GPTConfig
from folio.model.gpt import GPT
from folio.records import run_folder

transformers = pytest.importorskip("transformers")
filter_repo_objects = pytest.importorskip("huggingface_hub.utils").filter_repo_objects

# The same model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"n_layer": 1, "n_head": 1, "n_embd": 7, "vocab_size": 5, "n_positions": 3},
        {"n_layer": 5, "n_head": 3, "n_embd": 48, "vocab_size": 211, "n_inner": 192},
        {"n_layer": 1, "n_head": 4, "vocab_size": 50257, "n_positions": 8},
        {"n_layer": 1, "n_head": 16, "vocab_size": 50304, "n_positions": 9},
        {"n_layer": 1, "n_embd": 64, "n_positions": 1024},
    ],
    ids=str,
)
def test_logits_are_those_of_transformers(tmp_path, shape, tied) -> None:
    theirs = saved(tmp_path, **shape, tie_word_embeddings=tied)
    ours = GPT.from_pretrained(str(tmp_path))
    assert_same_logits(ours, theirs)
    assert (ours.lm_head.weight is ours.transformer.wte.weight) == ours.config.tie_weights == tied
    assert sum(p.numel() for p in ours.parameters()) == theirs.num_parameters()
    assert all(p.dtype == torch.float32 and p.requires_grad for p in ours.parameters())


@pytest.mark.parametrize(
    ("name", "ours"), [("gelu_new", "gelu_tanh"), ("gelu_pytorch_tanh", "gelu_tanh"), ("gelu", "gelu"), (None, "")]
)
def test_each_gelu(tmp_path, name, ours) -> None:
    """The tanh and the exact one differ by more than rounding does; without a name it is transformers' default."""
    theirs = saved(tmp_path, n_embd=64, **({"activation_function": name} if name else {}))
    if name is None:
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if "activation" not in k}))
    model = GPT.from_pretrained(str(tmp_path))
    assert model.config.activation == ours or name is None
    assert_same_logits(model, theirs)
    for block in model.transformer.h:
        gelu = block.mlp.activation
        gelu.approximate = "none" if gelu.approximate == "tanh" else "tanh"
    with pytest.raises(AssertionError):
        assert_same_logits(model, theirs)


def sharded(model: Any, folder: Path) -> None:
    model.save_pretrained(folder, max_shard_size="10KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2


def only_config(model: Any, folder: Path) -> None:
    folder.mkdir()
    model.config.save_pretrained(folder)


def without_a_head(model: Any, folder: Path) -> None:
    model.transformer.save_pretrained(folder)


def by_torch(model: Any, folder: Path, zipped: bool = True) -> None:
    only_config(model, folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)


def before_torch_1_6(model: Any, folder: Path) -> None:
    by_torch(model, folder, zipped=False)


def sharded_by_torch(model: Any, folder: Path) -> None:
    only_config(model, folder)
    weights = model.state_dict()
    shards = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(weights)}
    for file in set(shards.values()):
        torch.save({name: weights[name].clone() for name in weights if shards[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))


def as_on_the_hub(model: Any, folder: Path) -> None:
    """gpt2's own file: no prefix, and the causal masks of the time."""
    only_config(model, folder)
    weights = {name.removeprefix("transformer."): p.detach().clone() for name, p in model.named_parameters()}
    for i in range(model.config.n_layer):
        size, kind = model.config.n_positions, (torch.bool, torch.uint8, torch.float32)[i % 3]
        weights[f"h.{i}.attn.bias"] = torch.ones(size, size).tril()[None, None].to(kind)
        weights[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(weights, folder / "model.safetensors")


def in_bfloat16(model: Any, folder: Path) -> None:
    random_gpt2(tie_word_embeddings=model.config.tie_word_embeddings).to(torch.bfloat16).save_pretrained(folder)


def deflated_by_another_program(model: Any, folder: Path) -> None:
    by_torch(model, folder)
    path = folder / "pytorch_model.bin"
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)


FORMS = [sharded, by_torch, before_torch_1_6, deflated_by_another_program, sharded_by_torch, as_on_the_hub, in_bfloat16]


@pytest.mark.parametrize(
    ("write", "tied"), [(without_a_head, True), *((write, tied) for write in FORMS for tied in (True, False))]
)
def test_each_form_gives_the_same_weights(tmp_path, write, tied) -> None:
    """To the bit, in float32."""
    theirs = random_gpt2(tie_word_embeddings=tied)
    write(theirs, tmp_path / "form")
    ours = GPT.from_pretrained(str(tmp_path / "form"))
    assert_same_logits(ours, theirs)
    weights = theirs.state_dict()
    for name, p in ours.named_parameters():
        expected = weights[name]
        assert p.dtype == torch.float32
        assert torch.equal(p, expected if p.shape == expected.shape and torch.equal(p, expected) else expected.t())


# Other shapes


def test_more_token_ids() -> None:
    """Old ids keep their logits; new rows are the mean, which takes at most its share of the probability."""
    for tied in (True, False):
        torch.manual_seed(3)
        model = GPT(GPTConfig(block_size=32, vocab_size=97, n_layer=2, n_head=2, n_embd=32, tie_weights=tied))
        with torch.no_grad():  # all logits far below 0, as GPT-2's are
            model.lm_head.weight.normal_(1.0, 0.6)
            model.transformer.ln_f.bias.fill_(-1.0)
        idx = torch.randint(97, (8, 32))
        before, rows = logits(model, idx), model.lm_head.weight.detach().clone()
        assert before.max() < 0
        model.grow_vocab_size(128)
        after = logits(model, idx)
        torch.testing.assert_close(after[..., :97], before, rtol=1e-6, atol=1e-6)
        assert torch.equal(model.lm_head.weight[:97], rows)
        for table in (model.lm_head.weight, model.transformer.wte.weight):
            assert table.shape == (128, 32)
            torch.testing.assert_close(table[97:], table[:97].mean(0).expand(31, -1))
        assert (model.lm_head.weight is model.transformer.wte.weight) == tied
        assert (model.config.vocab_size, model.get_num_params()) == (128, GPT(model.config).get_num_params())
        targets = before.argmax(-1).view(-1)
        change = F.cross_entropy(after.view(-1, 128), targets) - F.cross_entropy(before.view(-1, 97), targets)
        assert 0 < change < 1e-2 < math.log(128 / 97)
        model.loss(idx, idx)[0].backward()
        with pytest.raises(ValueError, match="vocab_size=127 is below the 128"):
            model.grow_vocab_size(127)
        model.grow_vocab_size(128)
        assert torch.equal(logits(model, idx), after)


def test_fewer_positions(tmp_path) -> None:
    """Short inputs have the same logits as before."""
    theirs = saved(tmp_path)
    model = GPT.from_pretrained(str(tmp_path))
    model.crop_block_size(10)
    idx = torch.randint(97, (2, 10))
    torch.testing.assert_close(logits(model, idx), theirs(idx).logits.detach(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="11 tokens do not fit block_size=10"):
        model(torch.randint(97, (1, 11)))


def test_training_crops_and_grows(folio, story, tmp_path) -> None:
    """And says so; the checkpoints have the new shape, and tanh GELU."""
    saved(tmp_path / "hf", vocab_size=50257, n_embd=16)
    out = tmp_path / "out"
    argv = (*TRAIN, f"--data_dir={story}", f"--out_dir={out}", f"--init_from={tmp_path / 'hf'}")
    code, said, err = folio(*argv, "--vocab_size=50304", "--max_iters=1")
    assert (code, err) == (0, "")
    for line in ("block_size cropped from 24 to 16", "vocab_size grown from 50257 to 50304", f"weights of {tmp_path}"):
        assert line in said
    found = find.choose(out, "latest").config()
    assert (found.block_size, found.vocab_size, found.activation, found.bias) == (16, 50304, "gelu_tanh", True)
    code, said, err = folio("train", f"--out_dir={out}", "--init_from=resume", "--max_iters=2", "--device=cpu")
    assert (code, err) == (0, "")
    assert find.choose(out, "latest").config() == found


# Text


def own_files(fast: Any, folder: Path) -> None:
    """vocab.json and merges.txt, as they were before tokenizer.json."""
    spec = json.loads(fast.to_str())["model"]
    merges = [" ".join(pair) for pair in spec["merges"]]
    added = {"<|endoftext|>": 50256} if len(spec["vocab"]) >= 50256 else {}
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({**spec["vocab"], **added}), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


@pytest.mark.parametrize("size", [50257, 50300, 97])
def test_ids_of_which_nothing_is_known(folio, story, tmp_path, size) -> None:
    """A folder without a tokenizer is not GPT-2's, whatever its size; it trains, and is imported and exported."""
    saved(tmp_path / "hf", vocab_size=size)
    assert find.by_name(str(tmp_path / "hf")).state["tokenizer"] is None
    said = folio(*SAMPLE, f"--init_from={tmp_path / 'hf'}")
    assert_refused(said, tmp_path / "hf", f"nothing says what its {size} token ids mean", "neither a tokenizer.json")
    code, said, _ = folio("import", tmp_path / "hf", "--to", tmp_path / "out")
    assert (code, f"nothing says what the model's {size} token ids mean" in said) == (0, True)
    assert folio("export", f"--out_dir={tmp_path / 'out'}", "--to", tmp_path / "back").code == 0
    assert not list((tmp_path / "back").glob("*token*"))
    argv = (*TRAIN, f"--data_dir={story}", f"--out_dir={tmp_path / 'new'}", f"--init_from={tmp_path / 'hf'}")
    assert folio(*argv, "--max_iters=1").code == 0


@pytest.mark.parametrize("kind", ["file", "gpt2", "another language"])
def test_greedy_text_is_that_of_transformers(folio, tmp_path, monkeypatch, shared_data, kind) -> None:
    """With the tokenizer.json beside the model, with OpenAI's own files, and with those of another language."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared_data / "tiktoken"))
    tokenizers = pytest.importorskip("tokenizers")
    if kind == "file":
        path = tmp_path / "hf" / "tokenizer.json"
        assert folio("tokenizer", "train", STORY, "--vocab_size=400", f"--out={path}").code == 0
        fast = tokenizers.Tokenizer.from_file(str(path))
    elif kind == "gpt2":
        fast = Tiktoken("gpt2").fast()
        own_files(fast, tmp_path / "hf")
    else:  # with as many ids as GPT-2's
        fast = tokenizers.ByteLevelBPETokenizer()
        fast.train([str(STORY)], vocab_size=700, special_tokens=["<s>"], show_progress=False)
        own_files(fast, tmp_path / "hf")
    size = 50257 if kind == "another language" else fast.get_vocab_size()
    theirs = saved(tmp_path / "hf", vocab_size=size, n_embd=32, n_positions=64)
    if kind == "another language":
        with torch.no_grad():  # the others are never the likeliest
            theirs.lm_head.weight[700:] = 0
            theirs.save_pretrained(tmp_path / "hf")
    prompt = "The ferry left at dawn"
    ids = fast.encode(prompt).ids
    how = transformers.GenerationConfig(do_sample=False, max_new_tokens=40, pad_token_id=0, use_cache=False)
    expected = theirs.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), generation_config=how)
    assert len(set(expected[0, len(ids) :].tolist())) > 3
    code, out, err = folio(*SAMPLE, f"--init_from={tmp_path / 'hf'}", f"--start={prompt}", "--max_new_tokens=40")
    assert (code, err) == (0, "")
    assert out == fast.decode(expected[0].tolist(), skip_special_tokens=False) + f"\n{'-' * 15}\n"


# At size


@pytest.mark.slow
def test_fine_tuning(folio, tmp_path, monkeypatch, shared_data) -> None:
    """The loss falls clearly; with always_save_checkpoint=False the best is kept, and it is what samples."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared_data / "tiktoken"))
    data, out = tmp_path / "data", tmp_path / "out"
    source = f"--source={shared_data / 'tinyshakespeare.txt'}"
    assert folio("prepare", "shakespeare", source, f"--data_dir={data}").code == 0
    torch.manual_seed(4)
    transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=1, n_head=1, n_embd=32, n_positions=64)
    ).save_pretrained(tmp_path / "hf")
    argv = (
        *("train", f"--out_dir={out}", "--device=cpu", "--compile=False", "--dtype=float32", "--dropout=0.1"),
        *("--batch_size=4", "--gradient_accumulation_steps=1", "--eval_iters=4", "--eval_interval=40"),
        *("--decay_lr=False", "--always_save_checkpoint=False"),
    )
    begin = (f"--data_dir={data}", f"--init_from={tmp_path / 'hf'}", "--block_size=32")
    code, said, err = folio(*argv, *begin, "--max_iters=80", "--learning_rate=1e-2")
    assert (code, err) == (0, "")
    losses = [float(loss) for loss in re.findall(r"val loss (\d+\.\d+)", said)]
    assert len(losses) == 3
    assert losses[0] > 10.5
    assert min(losses) < 7
    code, said, err = folio(*argv, "--init_from=resume", "--max_iters=120", "--learning_rate=2")  # spoils it
    assert (code, err) == (0, "")
    best = find.best_step(out)
    assert best in (40, 80)
    assert run_folder.steps(out) == [best, 120]
    text = {
        which: folio(*SAMPLE, f"--out_dir={out}", "--start=ROMEO:", "--max_new_tokens=20", *which.split())
        for which in ("", f"--checkpoint={best}", "--checkpoint=latest")
    }
    assert {t.code for t in text.values()} == {0}
    assert text[""].out == text[f"--checkpoint={best}"].out != text["--checkpoint=latest"].out


@pytest.mark.slow
@LINUX
@pytest.mark.parametrize("form", ["safetensors", "ckpt.pt", "legacy ckpt.pt"])
def test_memory_of_loading(tmp_path, form) -> None:
    """The weights, and little more; of a model in the shape of GPT-2 124M."""
    if form == "safetensors":
        transformers.GPT2LMHeadModel(transformers.GPT2Config()).save_pretrained(tmp_path)
    else:
        model = GPT(GPTConfig())
        content = {"model": model.state_dict(), "model_args": asdict(model.config), "iter_num": 0}
        torch.save(content, tmp_path / "ckpt.pt", _use_new_zipfile_serialization=form == "ckpt.pt")
    script = f"""
import re, torch
from folio.checkpoints import find
def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
before = peak()
model = find.by_name({str(tmp_path)!r}).model()
print((peak() - before) / (4 * sum(p.numel() for p in model.parameters())))
"""
    done = python("-c", script)
    assert done.returncode == 0, done.stderr
    share = float(done.stdout)
    assert 1 <= share <= 1.3, f"the peak was {share:.3f} × the weights"
