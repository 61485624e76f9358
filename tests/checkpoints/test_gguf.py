"""A GGUF file holds the model under llama.cpp's names, and llama.cpp runs it alike."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import STORY
from small_checkpoints import save_random
from tokenizer_kinds import WIDE
from torch import Tensor

from folio.checkpoints import checkpoint, find, hugging_face
from folio.checkpoints.gguf import export
from folio.data.tokenizers import Bytes, Tiktoken, Tokenizer, TokenizersFile, byte_characters
from folio.generation import sampling
from folio.model.gpt import GPT

gguf = pytest.importorskip("gguf")
tokenizers = pytest.importorskip("tokenizers")

NAMES = {  # of a parameter's module
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.h.N.ln_1": "blk.N.attn_norm",
    "transformer.h.N.attn.c_attn": "blk.N.attn_qkv",
    "transformer.h.N.attn.c_proj": "blk.N.attn_output",
    "transformer.h.N.ln_2": "blk.N.ffn_norm",
    "transformer.h.N.mlp.c_fc": "blk.N.ffn_up",
    "transformer.h.N.mlp.c_proj": "blk.N.ffn_down",
    "transformer.ln_f": "output_norm",
    "lm_head": "output",
}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.cpp's types of tokens


def saved(out_dir: Path, tokens: Tokenizer | None = None, seed: int = 0, **shape: Any) -> checkpoint.Checkpoint:
    """A checkpoint that llama.cpp runs with the same logits."""
    small = {"block_size": 64, "n_embd": 32, "activation": "gelu_tanh"}
    return find.in_folder(save_random(out_dir, tokens, seed, **{**small, **shape}))


def theirs(name: str) -> str:
    """llama.cpp's name for a parameter of ours."""
    module, what = re.sub(r"\.h\.\d+\.", ".h.N.", name).rsplit(".", 1)
    number = re.search(r"\.h\.(\d+)\.", name)
    return f"{NAMES[module]}.{what}".replace("N", number[1] if number else "")


def tensors(path: Path) -> dict[str, Tensor]:
    """By llama.cpp's names, in float32."""
    found = gguf.GGUFReader(path).tensors
    assert len({t.name for t in found}) == len(found)
    return {t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy()) for t in found}


def said(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


# Tensors


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"bias": False},
        {"bias": False, "qkv_bias": True},
        {"bias": True, "qkv_bias": False},
        {"tie_weights": False, "vocab_size": 300},
    ],
    ids=str,
)
def test_tensor_by_tensor(tmp_path, shape) -> None:
    """Each as it is in the model; biases that it lacks are zeros, and nothing else is there."""
    found, path = saved(tmp_path / "out", Bytes(), **shape), tmp_path / "m.gguf"
    export(found, path)
    there, weights = tensors(path), dict(found.weights())
    for name in {"transformer.wte.weight", "lm_head.weight"} & weights.keys():
        rows = weights[name][:256]
        weights[name] = torch.cat([rows, rows.mean(0, keepdim=True)])  # an end of text, that bytes lack
    full = GPT(replace(found.config(), bias=True, qkv_bias=True)).named_parameters()
    wanted = {theirs(name): weights.get(name, torch.zeros(p.shape)) for name, p in full}
    assert there.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(there[name], wanted[name])] == []
    assert ("output.weight" in there) == (shape.get("tie_weights") is False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("before", ["float32", "bfloat16", "float16"])
def test_from_a_hugging_face_folder(tmp_path, before, dtype) -> None:
    """Whose matrices lie the other way round, and in any dtype."""
    pytest.importorskip("transformers")
    hugging_face.export(saved(tmp_path / "out", Bytes()), tmp_path / "hf", before)
    export(find.in_folder(tmp_path / "hf"), tmp_path / "m.gguf", dtype)
    there = tensors(tmp_path / "m.gguf")
    for name, weight in find.in_folder(tmp_path / "hf").weights():
        kept = weight if weight.dim() < 2 or "wpe" in name else weight.to(getattr(torch, dtype))
        assert torch.equal(there[theirs(name)][: len(weight)], kept.float()), name


@pytest.mark.parametrize(
    ("dtype", "kind", "number"), [("float32", "F32", 0), ("float16", "F16", 1), ("bfloat16", "BF16", 32)]
)
def test_dtype(folio, tmp_path, dtype, kind, number) -> None:
    """Of the matrices; vectors and positions stay float32, as llama.cpp wants them."""
    found, path = saved(tmp_path / "out", Bytes(), bias=False, tie_weights=False), tmp_path / "new" / "m.gguf"
    code, out, err = folio("export", f"--out_dir={tmp_path / 'out'}", "--to", path, f"--dtype={dtype}")
    assert (code, err) == (0, "")
    assert dtype in out
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    vectors = {name for name in kinds if name.endswith(".bias") or "norm" in name or name == "position_embd.weight"}
    assert {kinds[name] for name in vectors} == {"F32"}
    assert {kinds[name] for name in kinds.keys() - vectors} == {kind}
    assert said(path)["general.file_type"] == number
    weights, there = dict(found.weights()), tensors(path)
    for name in ("transformer.h.1.mlp.c_fc.weight", "transformer.h.0.attn.c_attn.weight"):
        assert torch.equal(there[theirs(name)], weights[name].to(getattr(torch, dtype)).float())
    assert [p.name for p in path.parent.iterdir()] == ["m.gguf"]


# Metadata


def test_what_is_said_of_the_model(tmp_path) -> None:
    export(saved(tmp_path / "out", Bytes(), n_layer=3, n_head=4), tmp_path / "tale-1.gguf")
    facts = said(tmp_path / "tale-1.gguf")
    assert facts["general.architecture"] == "gpt2"
    assert facts["general.name"] == "tale-1"
    wanted = {
        "context_length": 64,
        "block_count": 3,
        "embedding_length": 32,
        "feed_forward_length": 128,
        "attention.head_count": 4,
        "attention.layer_norm_epsilon": pytest.approx(1e-5),
    }
    assert {name: facts[f"gpt2.{name}"] for name in wanted} == wanted


def test_the_vocabulary(tmp_path, kind) -> None:
    """Each token's bytes in GPT-2's printable characters; one end of text, which the vocabulary may lack."""
    tokens, size = kind
    export(saved(tmp_path / "out", tokens, vocab_size=size), tmp_path / "m.gguf")
    facts = said(tmp_path / "m.gguf")
    assert (facts["tokenizer.ggml.model"], facts["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    there, types = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.token_type"]
    end = tokens.size if tokens.eot is None else tokens.eot
    assert facts["tokenizer.ggml.eos_token_id"] == facts["tokenizer.ggml.bos_token_id"] == end
    assert len(there) == len(types) == len(set(there)) == tokens.size + (tokens.eot is None)
    assert there[end] == "<|endoftext|>"
    assert [i for i, kind in enumerate(types) if kind == CONTROL] == [end]
    bytes_of = {c: b for b, c in byte_characters().items()}
    for i in set(range(tokens.size)) - {end}:
        assert types[i] == NORMAL
        assert bytes(bytes_of[c] for c in there[i]) == tokens.bytes([i])
    if isinstance(tokens, Tiktoken):
        assert len(facts["tokenizer.ggml.merges"]) == 50_000
        assert facts["tokenizer.ggml.merges"][0] == "Ġ t"


def changed(tok: Path, **parts: Any) -> TokenizersFile:
    return TokenizersFile(json.dumps({**json.loads(tok.read_text(encoding="utf-8")), **parts}))


LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
OTHERS = {
    "a prefix": {"pre_tokenizer": {**LEVEL, "add_prefix_space": True}},
    "no words": {"pre_tokenizer": {**LEVEL, "use_regex": False}},
    "other words": {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, LEVEL]}
    },
    "none": {"pre_tokenizer": None},
    "a normalizer": {"normalizer": {"type": "Lowercase"}},
    "whole words": {
        "model": {"type": "WordLevel", "vocab": {"a": 0, "[UNK]": 1}, "unk_token": "[UNK]"},
        "added_tokens": [],
    },
}


@pytest.mark.parametrize("parts", OTHERS.values(), ids=OTHERS)
def test_a_tokenizer_of_another_kind_is_refused(folio, tok, tmp_path, parts) -> None:
    saved(tmp_path / "out", changed(tok, **parts), vocab_size=512)
    code, _, err = folio("export", f"--out_dir={tmp_path / 'out'}", f"--to={tmp_path / 'm.gguf'}")
    assert (code, err.count("\n")) == (2, 1), err
    assert re.search("tokenizer .*GPT-2", err)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_unknown_tokens_are_refused(folio, tmp_path) -> None:
    saved(tmp_path / "out", None)
    code, _, err = folio("export", f"--out_dir={tmp_path / 'out'}", f"--to={tmp_path / 'm.gguf'}")
    assert (code, err.count("\n")) == (2, 1), err
    assert "nothing says what its token ids mean" in err
    assert "export a folder" in err


def test_exact_gelu_is_warned_of(folio, tmp_path) -> None:
    """And goes through; tanh GELU goes without a word."""
    saved(tmp_path / "exact", Bytes(), activation="gelu")
    with pytest.warns(UserWarning, match="activation=gelu .*llama.cpp.*gelu_tanh"):
        assert folio("export", f"--out_dir={tmp_path / 'exact'}", f"--to={tmp_path / 'm.gguf'}").code == 0
    assert len(tensors(tmp_path / "m.gguf")) == 4 + 12 * 2


def test_ids_that_the_vocabulary_leaves_out(tok, tmp_path) -> None:
    """They are unused, not cut: those after them keep their places."""
    spec = json.loads(tok.read_text(encoding="utf-8"))
    (last,) = (token for token, i in spec["model"]["vocab"].items() if i == 499)
    spec["model"]["vocab"][last] = 510
    export(saved(tmp_path / "out", TokenizersFile(json.dumps(spec)), vocab_size=512), tmp_path / "m.gguf")
    facts = said(tmp_path / "m.gguf")
    assert len(facts["tokenizer.ggml.tokens"]) == 511
    assert facts["tokenizer.ggml.tokens"][510] == last
    assert facts["tokenizer.ggml.token_type"][499:] == [*[UNUSED] * 11, NORMAL]


def added(tok: Path) -> TokenizersFile:
    """With a token that is found in any text, as no special one is."""
    fast = tokenizers.Tokenizer.from_file(str(tok))
    fast.add_tokens(["the ferry"])
    return TokenizersFile(fast.to_str())


def test_an_added_token_that_is_not_special(tok, tmp_path) -> None:
    export(saved(tmp_path / "out", added(tok), vocab_size=512), tmp_path / "m.gguf")
    facts = said(tmp_path / "m.gguf")
    assert facts["tokenizer.ggml.tokens"][500] == "the ferry"
    assert facts["tokenizer.ggml.token_type"][500] == USER_DEFINED


# llama.cpp


def llama(path: Path) -> Any:
    module = pytest.importorskip("llama_cpp", reason="llama.cpp is not installed")
    return module.Llama(str(path), n_ctx=64, logits_all=True, verbose=False, n_threads=1)


@pytest.mark.parametrize("text", [WIDE, " ", "\n\n a", STORY.read_text(encoding="utf-8")[:400]], ids=range(4))
def test_llama_cpps_tokens(tmp_path, kind, text) -> None:
    """Are ours, and come back as the text."""
    tokens, size = kind
    export(saved(tmp_path / "out", tokens, vocab_size=size), tmp_path / "m.gguf")
    runs = llama(tmp_path / "m.gguf")
    ids = runs.tokenize(text.encode(), add_bos=False, special=False)
    assert ids == tokens.encode(text).tolist()
    assert runs.detokenize(ids) == text.encode()
    assert runs.token_eos() == (tokens.size if tokens.eot is None else tokens.eot)
    if tokens.eot is not None:
        assert runs.tokenize(b"a<|endoftext|>", add_bos=False, special=True)[-1] == tokens.eot


def test_llama_cpp_finds_an_added_token(tok, tmp_path) -> None:
    tokens = added(tok)
    export(saved(tmp_path / "out", tokens, vocab_size=512), tmp_path / "m.gguf")
    runs = llama(tmp_path / "m.gguf")
    ids = tokens.encode("On the ferry, so").tolist()
    assert 500 in ids
    assert runs.tokenize(b"On the ferry, so", add_bos=False, special=False) == ids


@pytest.mark.parametrize(
    "shape", [{}, {"bias": False, "tie_weights": False}, {"bias": False, "qkv_bias": True}], ids=str
)
@torch.no_grad()
def test_llama_cpps_logits_and_text(tmp_path, kind, shape) -> None:
    """To 2e-3 of the largest, for its GELU goes through half precision; and the same first tokens."""
    tokens, size = kind
    found = saved(tmp_path / "out", tokens, vocab_size=size, **shape)
    export(found, tmp_path / "m.gguf")
    runs, model = llama(tmp_path / "m.gguf"), found.model().eval()
    ids = tokens.encode(STORY.read_text(encoding="utf-8"))[:40].astype(np.int64)
    runs.eval(ids.tolist())
    there = torch.tensor(np.array(runs.scores[: len(ids)]))[:, : tokens.size]
    ours = model.lm_head(model.hidden(torch.from_numpy(ids)[None]))[0, :, : tokens.size]
    assert (there - ours).abs().max() < 2e-3 * ours.abs().max()
    wanted = sampling.generate(model, torch.from_numpy(ids)[None], 5, temperature=0, vocab_size=tokens.size)
    runs.reset()
    written = runs.generate(ids.tolist(), temp=0.0, repeat_penalty=1.0)
    assert [next(written) for _ in range(5)] == wanted[0, -5:].tolist()
