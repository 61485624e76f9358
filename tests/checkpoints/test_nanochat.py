"""A model of the modern parts is exported as transformers' NanoChat, with the same logits, or refused by name."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from conftest import SMALL, assert_refused, tree
from exports import (
    _quiet,  # noqa: F401
    assert_the_same_logits,
    theirs,
)
from safetensors.torch import load_file
from small_checkpoints import save_random
from torch import Tensor, nn
from torch.nn import functional as F

from folio.checkpoints import checkpoint, find, hugging_face
from folio.data.tokenizers import Bytes
from folio.model import attention, gpt
from folio.model.config import GPTConfig

transformers = pytest.importorskip("transformers")

MODERN: dict[str, Any] = {
    "position": "rope",
    "norm": "unweighted",
    "activation": "relu2",
    "qk_norm": True,
    "bias": False,
}
SHAPES: dict[str, dict[str, Any]] = {
    "tied": {},
    "own head": {"tie_weights": False},
    "soft cap": {"logit_softcap": 2.0},
    "padded own head, soft cap": {"vocab_size": 300, "tie_weights": False, "logit_softcap": 15.0},
    "wide heads": {"n_head": 1, "n_embd": 48, "block_size": 100, "zero_init": True, "dropout": 0.25},
    "narrowest heads": {"n_layer": 3, "n_head": 3, "n_embd": 6, "qkv_bias": False},
    "one token": {"n_layer": 1, "block_size": 1},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_same_logits(tmp_path, shape) -> None:
    """Although its norms subtract no mean and its scores have another scale."""
    out_dir, to = save_random(tmp_path / "out", Bytes(), **MODERN, **shape), tmp_path / "hf"
    hugging_face.export(find.in_folder(out_dir), to)
    assert_the_same_logits(to, out_dir)
    model = theirs(to)
    assert type(model).__name__ == "NanoChatForCausalLM"
    assert type(model).__module__.startswith("transformers.")
    assert (model.config.vocab_size, model.config.tie_word_embeddings) == (256, shape.get("tie_weights", True))
    assert model.state_dict().keys() >= load_file(to / "model.safetensors").keys()  # none that it does not know


def test_every_field_is_exported_or_refused() -> None:
    """A new field must be added to these tests."""
    exported = {"block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "tie_weights", "zero_init"}
    assert exported | {"logit_softcap"} | {name for name, *_ in REFUSED} == {f.name for f in fields(GPTConfig)}


REFUSED: list[tuple[str, Any, str]] = [
    ("position", "learned", "position=rope"),
    ("norm", "layernorm", "norm=unweighted"),
    ("activation", "gelu_tanh", "activation=relu2"),
    ("qk_norm", False, "qk_norm=True"),
    ("token_shift", 1, "token_shift=0"),
    ("bias", True, "bias=False"),
    ("qkv_bias", True, "qkv_bias=auto"),
]


@pytest.mark.parametrize(("name", "value", "remedy"), REFUSED)
def test_an_option_in_the_way(folio, tmp_path, name, value, remedy) -> None:
    """The error names the option, its value, the nearest architecture and the value that fits."""
    out = save_random(tmp_path / "out", Bytes(), **{**MODERN, "logit_softcap": 15.0, name: value})
    before = tree(tmp_path)
    words = (out, f"{name}={value!r}: ", "NanoChat does not support it", f"train with --{remedy}\n")
    assert_refused(folio("export", f"--out_dir={out}", "--to", tmp_path / "hf"), *words)
    assert tree(tmp_path) == before


def test_several_options_in_the_way(folio, tmp_path) -> None:
    """All are named, for the architecture that lacks fewer of them."""
    out = save_random(tmp_path / "out", Bytes(), position="rope", qk_norm=True)
    words = ("position='rope', qk_norm=True", "GPT-2 does not support them", "--position=learned --qk_norm=False")
    assert_refused(folio("export", f"--out_dir={out}", "--to", tmp_path / "hf"), out, *words)


def test_a_gguf_file(folio, tmp_path) -> None:
    """llama.cpp's GPT-2 is another model; the error names the folder as the remedy."""
    out = save_random(tmp_path / "out", Bytes(), **MODERN)
    outcome = folio("export", f"--out_dir={out}", "--to", tmp_path / "model.gguf")
    assert_refused(outcome, out, "position='rope'", "qk_norm=True", "GPT-2 does not support them", "--to=FOLDER")
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.parametrize("tied", [True, False])
def test_a_run_of_the_command(folio, story, tmp_path, tied) -> None:
    """Trained weights and their averages; the card names the architecture, and its program runs."""
    flags = [f"--{name}={value}" for name, value in {**MODERN, "zero_init": True, "tie_weights": tied}.items()]
    out, to = tmp_path / "out", tmp_path / "tale"
    argv = ("--logit_softcap=15", "--ema_decay=0.5", f"--data_dir={story}", f"--out_dir={out}")
    assert folio("train", *SMALL, *flags, *argv).code == 0
    code, said, err = folio("export", f"--out_dir={out}", "--to", to)
    assert (code, err) == (0, "")
    assert f"wrote {to}" in said
    assert_the_same_logits(to, out)
    card = (to / "README.md").read_text()
    assert "tags: [nanochat, folio]" in card
    assert "A language model of NanoChat's architecture" in card
    assert "squared ReLU, no biases, head" in card
    assert "logits capped at 15 |" in card
    assert folio("export", f"--out_dir={out}", "--to", tmp_path / "ema", "--weights=ema").code == 0
    average, weights = load_file(tmp_path / "ema" / "model.safetensors"), load_file(to / "model.safetensors")
    assert not any(torch.equal(average[name], weights[name]) for name in weights)


def test_greedy_text(folio, tmp_path, monkeypatch, capfd) -> None:
    """generate and folio sample continue with the same tokens, up to the whole context; the card's program runs."""
    out, to = save_random(tmp_path / "out", Bytes(), **MODERN, logit_softcap=15.0), tmp_path / "hf"
    hugging_face.export(find.in_folder(out), to)
    fast, prompt = transformers.AutoTokenizer.from_pretrained(to), "The ferry"
    given = fast(prompt, return_tensors="pt")
    written = theirs(to).generate(**given, max_new_tokens=23, do_sample=False)[0]
    how = ("--temperature=0", "--dtype=float32", "--device=cpu", "--num_samples=1", "--max_new_tokens=23")
    code, said, _ = folio("sample", f"--out_dir={out}", f"--start={prompt}", *how)
    assert (code, len(written)) == (0, 32)
    assert said.startswith(fast.decode(written) + "\n---")
    assert len(set(written.tolist())) > 4
    (program,) = re.findall(r"```python\n(.*?)```", (to / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "card", "exec"), {})
    assert capfd.readouterr().out.startswith("Once upon a time")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype(tmp_path, dtype) -> None:
    """The centered weights are rounded once, and the logits stay near."""
    out, to = save_random(tmp_path / "out", Bytes(), **MODERN), tmp_path / "hf"
    hugging_face.export(find.in_folder(out), to, dtype)
    embedding = find.in_folder(out).model().transformer.wte.weight.detach()
    centered = embedding - embedding.mean(1, keepdim=True)
    assert torch.equal(
        load_file(to / "model.safetensors")["model.embed_tokens.weight"], centered.to(getattr(torch, dtype))
    )
    assert json.loads((to / "config.json").read_text())["dtype"] == dtype
    idx = torch.arange(32)[None]
    expected = find.in_folder(out).model()(idx, idx)[0]
    assert (theirs(to, dtype="float32")(idx).logits - expected).abs().max() < 0.03 * expected.abs().max()


@pytest.mark.parametrize(("value", "words"), [(math.nan, ["1 numbers", "not finite"]), (7e6, ["beyond float16"])])
def test_numbers_that_do_not_fit(folio, tmp_path, value, words) -> None:
    out = save_random(tmp_path / "out", Bytes(), **MODERN)
    found = find.choose(out)
    weights = dict(found.weights())
    weights["transformer.h.1.mlp.c_proj.weight"][3, 5] = value
    checkpoint.save(out, 7, weights, {}, found.state)
    named = "h.1.mlp.c_proj.weight" if math.isnan(value) else "layers.1.mlp.fc2.weight"
    assert_refused(folio("export", f"--out_dir={out}", "--to", tmp_path / "hf", "--dtype=float16"), out, named, *words)


def test_an_exported_folder_is_not_imported(folio, tmp_path) -> None:
    out, to = save_random(tmp_path / "out", Bytes(), **MODERN), tmp_path / "hf"
    hugging_face.export(find.in_folder(out), to)
    for argv in (("import", to, "--to", tmp_path / "back"), ("sample", f"--init_from={to}")):
        assert_refused(folio(*argv), to / "config.json", "'nanochat'", "cannot import", "out_dir")


def test_a_transformers_without_nanochat(folio, tmp_path, monkeypatch) -> None:
    monkeypatch.delitem(transformers.CONFIG_MAPPING._mapping, "nanochat")
    out = save_random(tmp_path / "out", Bytes(), **MODERN)
    outcome = folio("export", f"--out_dir={out}", "--to", tmp_path / "hf")
    assert_refused(outcome, "NanoChat", "pip install --upgrade transformers")


# A model whose code was changed


def counterclockwise(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    return ROTATE(x, (rotation[0], -rotation[1]))


def equal_norms(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return F.rms_norm(q, q.shape[-1:], eps=1e-5), F.rms_norm(k, k.shape[-1:], eps=1e-5)


def smaller_epsilon(config: GPTConfig) -> nn.Module:
    return nn.LayerNorm(config.n_embd, eps=1e-6, elementwise_affine=False)


def root_mean_square(config: GPTConfig) -> nn.Module:
    return nn.RMSNorm(config.n_embd, eps=1e-5, elementwise_affine=False)


def weighted(config: GPTConfig) -> nn.Module:
    return nn.LayerNorm(config.n_embd, bias=False)


ROTATE = attention.rotate
CHANGES: dict[str, tuple[Any, str, Callable[..., Any], str]] = {
    "turned the other way": (attention, "rotate", counterclockwise, "logits differ"),
    "another scale": (attention, "normalize", equal_norms, "logits differ"),
    "another epsilon": (gpt, "norm", smaller_epsilon, "logits differ"),
    "another norm": (gpt, "norm", root_mean_square, "logits differ"),
    "norms with weights": (gpt, "norm", weighted, "ln_e.weight"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_architecture_is_not_exported(folio, tmp_path, monkeypatch, change) -> None:
    """Even with the same parameter names and shapes: transformers would run the weights as NanoChat's."""
    where, name, value, word = CHANGES[change]
    monkeypatch.setattr(where, name, value)
    out = save_random(tmp_path / "out", Bytes(), **MODERN)
    outcome = folio("export", f"--out_dir={out}", "--to", tmp_path / "hf")
    assert_refused(outcome, out, word, "NanoChat", "cannot be exported")
    assert not (tmp_path / "hf").exists()
