"""An exported model is the same model in transformers, and again when it is imported."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from conftest import STORY, tree
from exports import (
    SHAPES,
    _quiet,  # noqa: F401
    assert_the_same_logits,
    theirs,
)
from safetensors.torch import load_file, save_file
from small_checkpoints import save_random
from tokenizer_kinds import WIDE

from folio.checkpoints import checkpoint, find, hugging_face
from folio.data.decoding import decode
from folio.data.tokenizers import Bytes, Characters, Tiktoken

transformers = pytest.importorskip("transformers")
yaml = pytest.importorskip("yaml")

# The model


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_same_logits(tmp_path, shape) -> None:
    out_dir, to = save_random(tmp_path / "out", Bytes(), **shape), tmp_path / "new" / "hf"
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
    out_dir, to = save_random(tmp_path / "out", tokens, vocab_size=size), tmp_path / "hf"
    hugging_face.export(find.in_folder(out_dir), to)
    assert_the_same_logits(to, out_dir)
    model = theirs(to)
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == tokens.size
    assert model.config.eos_token_id == model.config.bos_token_id == tokens.eot
    assert model.generation_config.eos_token_id == model.generation_config.bos_token_id == tokens.eot


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype(folio, tmp_path, dtype) -> None:
    """Of all the weights, of the config and of the model that is loaded; rounded once."""
    out_dir, to = save_random(tmp_path / "out", Bytes(), bias=False), tmp_path / "hf"
    assert folio("export", f"--out_dir={out_dir}", "--to", to, f"--dtype={dtype}").err == ""
    kind = getattr(torch, dtype)
    assert {weight.dtype for weight in load_file(to / "model.safetensors").values()} == {kind}
    assert json.loads((to / "config.json").read_text())["dtype"] == dtype
    assert theirs(to, dtype="auto").dtype == kind
    embedding = find.in_folder(out_dir).model().transformer.wte.weight
    assert torch.equal(theirs(to, dtype="auto").transformer.wte.weight, embedding.to(kind))


def test_greedy_text(folio, tmp_path, kind) -> None:
    """transformers and folio sample generate the same text, up to the whole context."""
    tokens, size = kind
    out_dir, to = save_random(tmp_path / "out", tokens, vocab_size=size, block_size=24), tmp_path / "hf"
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
    """Only there: folio sample continues, like a corpus, and so does transformers without eos_token_id."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared_data / "tiktoken"))
    out_dir, to = save_random(tmp_path / "out", Tiktoken(), vocab_size=50304, tie_weights=False), tmp_path / "hf"
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
    """AutoTokenizer encodes like ours, keeps every space, and has an end of text only if ours has one."""
    tokens, size = kind
    hugging_face.export(find.in_folder(save_random(tmp_path / "out", tokens, vocab_size=size)), tmp_path / "hf")
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
    """It is exported without a tokenizer, and with all its ids."""
    out_dir, to = save_random(tmp_path / "out", vocab_size=300), tmp_path / "hf"
    hugging_face.export(find.in_folder(out_dir), to)
    assert_the_same_logits(to, out_dir)
    assert theirs(to).config.vocab_size == 300
    assert not list(to.glob("*token*"))


# There and back


def test_a_vocabulary_that_was_only_assumed(tmp_path) -> None:
    """Older checkpoints assumed GPT-2's tokenizer if the data had none; a model with fewer ids cannot have used it."""
    out_dir = save_random(tmp_path / "out", vocab_size=100)
    found = find.in_folder(out_dir)
    found.state["tokenizer"] = {"kind": "tiktoken", "name": "gpt2"}
    hugging_face.export(found, tmp_path / "hf")
    assert_the_same_logits(tmp_path / "hf", out_dir)
    assert not (tmp_path / "hf" / "tokenizer.json").exists()


@pytest.mark.parametrize("shape", [{"tie_weights": False}, {"bias": False}, {"bias": False, "qkv_bias": True}], ids=str)
@pytest.mark.parametrize("by", ["import", "the folder"])
def test_there_and_back_is_the_same_to_the_byte(folio, tmp_path, kind, shape, by) -> None:
    """With folio import in between, or directly from the folder."""
    tokens, size = kind
    back, first, second = tmp_path / "back", tmp_path / "a" / "hf", tmp_path / "b" / "hf"
    out_dir = save_random(tmp_path / "out", tokens, vocab_size=size, **shape)
    assert folio("export", f"--out_dir={out_dir}", "--to", first).code == 0
    if by == "import":
        assert folio("import", first, "--to", back).code == 0
        was = find.in_folder(out_dir).config()
        assert find.in_folder(back).config() == replace(was, vocab_size=tokens.size)
    assert folio("export", f"--out_dir={back if by == 'import' else first}", "--to", second).code == 0
    one, two = tree(first), tree(second)
    assert one.keys() == two.keys() >= {"config.json", "model.safetensors", "tokenizer.json", "README.md"}
    assert [name for name in one if one[name] != two[name]] == []


@pytest.mark.parametrize("name", ["transformer.h.1.attn.c_attn.bias", "transformer.ln_f.bias"])
def test_biases_that_another_program_trained_are_imported(folio, tmp_path, name) -> None:
    """Although the exported model had none."""
    out_dir, to, back = save_random(tmp_path / "out", Bytes(), bias=False), tmp_path / "hf", tmp_path / "back"
    hugging_face.export(find.in_folder(out_dir), to)
    weights = load_file(to / "model.safetensors")
    assert not weights[name].any()
    weights[name][3] = 0.5
    save_file(weights, to / "model.safetensors", metadata={"format": "pt"})
    assert folio("import", to, "--to", back).code == 0
    assert find.in_folder(back).config().bias is True
    assert_the_same_logits(to, back)
    assert torch.equal(dict(find.in_folder(back).model().named_parameters())[name], weights[name])
