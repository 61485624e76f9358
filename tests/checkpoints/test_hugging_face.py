"""GPT-2 as Hugging Face's transformers writes it: the same logits, nothing run, and what does not fit is refused."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import sys
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, STORY, Outcome, assert_refused, python
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from folio.checkpoints import find, hub
from folio.checkpoints.checkpoint import State
from folio.data import tokenizer_folder
from folio.data.tokenizers import Tiktoken
from folio.model.config import GPTConfig
from folio.model.gpt import GPT
from folio.records import run_folder

transformers = pytest.importorskip("transformers")
filter_repo_objects = pytest.importorskip("huggingface_hub.utils").filter_repo_objects
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

TINY = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 24, "vocab_size": 97}  # SMALL's, but for the context
SAMPLE = ("sample", "--device=cpu", "--compile=False", "--dtype=float32", "--temperature=0", "--num_samples=1")
TRAIN = ("train", *(flag for flag in SMALL if not flag.startswith("--n_")))
PYTHON = ("-W", "error::FutureWarning", "-m", "folio")


def random_gpt2(**shape: Any) -> Any:
    """A model of transformers whose every parameter is random, in numbers that bfloat16 has."""
    torch.manual_seed(1)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**{"bos_token_id": None, "eos_token_id": None, **TINY, **shape})
    ).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(float("ln_" in name and name.endswith("weight")), 0.3)
            p.copy_(p.bfloat16())
    return model


def saved(folder: Path, **shape: Any) -> Any:
    model = random_gpt2(**shape)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def logits(model: GPT, idx: Tensor) -> Tensor:
    return model.eval().lm_head(model.hidden(idx))


@torch.no_grad()
def assert_same_logits(ours: GPT, theirs: Any, tolerance: float = 1e-5) -> None:
    c = theirs.config
    idx = torch.randint(c.vocab_size, (2, c.n_positions), generator=torch.Generator().manual_seed(2))
    expected = theirs(idx).logits
    assert expected.std() > 0.1
    assert (logits(ours, idx) - expected).abs().max() <= tolerance * expected.abs().max()


def configured(folder: Path, **changes: Any) -> Path:
    """The folder, with other values in its config."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A folder with a small model."""
    saved(tmp_path / "tiny")
    return tmp_path / "tiny"


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
        block.mlp.gelu.approximate = "none" if block.mlp.gelu.approximate == "tanh" else "tanh"
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


def test_only_dropout_can_be_chosen(tiny) -> None:
    assert configured(tiny, resid_pdrop=0.5) == tiny
    assert GPT.from_pretrained(str(tiny)).config.dropout == 0
    model = GPT.from_pretrained(str(tiny), {"dropout": 0.25})
    assert model.config.dropout == model.transformer.drop.p == model.transformer.h[1].attn.dropout == 0.25
    for odd in ("vocab_size", "n_layer", "droput"):
        with pytest.raises(ValueError, match=f"{odd} is what the weights say, only dropout"):
            GPT.from_pretrained(str(tiny), {"dropout": 0.1, odd: 3})


# Nothing is run


class Hostile:
    def __init__(self, call: Callable[..., Any], *args: Any) -> None:
        self.call = call, args

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("form", ["torch", "pickle", "shard"])
@pytest.mark.parametrize("payload", ["mkdir", "exec", "getattr"])
def test_a_pickle_that_would_run_code(folio, tiny, tmp_path, form, payload) -> None:
    """It is refused by the name of what it asks for; the control shows that it is no empty threat."""
    marker = tmp_path / "marker"
    hostile = {
        "mkdir": Hostile(os.mkdir, str(marker)),
        "exec": Hostile(exec, f"open({str(marker)!r}, 'w').close()"),
        "getattr": Hostile(Path.touch, marker),
    }[payload]
    (tiny / "model.safetensors").unlink()
    file = tiny / ("pytorch_model-1.bin" if form == "shard" else "pytorch_model.bin")
    if form == "pickle":
        file.write_bytes(pickle.dumps({"wte.weight": hostile}, protocol=2))
        pickle.loads(file.read_bytes())
    else:
        torch.save({"wte.weight": torch.zeros(3), "wpe.weight": hostile}, file)
        torch.load(file, weights_only=False)
    if form == "shard":
        (tiny / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"wte.weight": file.name}}))
    assert marker.exists()
    marker.rmdir() if marker.is_dir() else marker.unlink()
    name = rf"(\w+\.)?{payload}"
    with pytest.raises(ValueError, match=rf"{re.escape(str(file))}: refused: it asks for {name}, which would run code"):
        find.by_name(str(tiny)).model()
    (tiny / "tokenizer.json").write_text(tokenizer_file(97))
    assert_refused(folio(*SAMPLE, f"--init_from={tiny}"), file)
    assert not marker.exists()


def test_code_in_the_folder_is_never_run(folio, tiny, tmp_path, monkeypatch) -> None:
    """Neither for a model of GPT-2's kind, nor for another."""
    marker = tmp_path / "marker"
    code = f"open({str(marker)!r}, 'w').close()\nclass Model: pass\nclass Config: pass\n"
    for name in ("modeling_gpt2", "configuration_gpt2", "model", "conftest", "sitecustomize", "transformers"):
        (tiny / f"{name}.py").write_text(code)
    own = {"AutoModelForCausalLM": "modeling_gpt2.Model", "AutoConfig": "configuration_gpt2.Config"}
    configured(tiny, auto_map=own, architectures=["Model"], trust_remote_code=True)
    monkeypatch.chdir(tiny)
    GPT.from_pretrained(str(tiny))
    assert find.by_name(".").config().vocab_size == 97
    configured(tiny, model_type="mine")
    assert_refused(folio(*SAMPLE, f"--init_from={tiny}"), "model_type = 'mine'")
    assert not marker.exists()


# What is refused


OPTIONS = {
    "model_type": ("llama", None),
    "n_inner": (63, "64"),
    "activation_function": ("relu", ["gelu"]),
    "layer_norm_epsilon": (1e-6, "1e-5"),
    "scale_attn_weights": (False, None),
    "scale_attn_by_inverse_layer_idx": (True, None),
    "add_cross_attention": (True, None),
    "reorder_and_upcast_attn": (True,),
    "is_encoder_decoder": (True,),
    "position_embedding_type": ("relative_key",),
    "rope_theta": (10000.0,),
    "rope_scaling": ({"type": "linear"},),
    "rotary_dim": (8,),
    "alibi": (True,),
    "rms_norm_eps": (1e-6,),
    "sliding_window": (16,),
    "num_key_value_heads": (1,),
    "quantization_config": ({"load_in_8bit": True},),
    "pruned_heads": ({"0": [1]},),
    "n_embd": (17, None, "16", {}),
    "n_head": (3, 0),
    "n_layer": (0, [2]),
    "vocab_size": (0, "97", 2.5, True, None, "auto"),
    "n_positions": (0, "1024"),
    "tie_word_embeddings": ("no", None),
}
OURS = {"tie_word_embeddings": "tie_weights", "n_positions": "block_size"}


@pytest.mark.parametrize(("option", "value"), [(option, value) for option in OPTIONS for value in OPTIONS[option]])
def test_options_that_gpt2_here_has_not(folio, tiny, option, value) -> None:
    """And values of a wrong type: the file, the option and the value are named."""
    path = configured(tiny, **{option: value}) / "config.json"
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: .*({option}|{OURS.get(option, option)})"):
        find.by_name(str(tiny))
    assert_refused(folio(*SAMPLE, f"--init_from={tiny}"), path, value)


def test_keys_that_change_nothing(tiny) -> None:
    """What a config says besides, and other programs' keys at nothing."""
    more = {"rope_scaling": None, "sliding_window": None, "alibi": False, "pruned_heads": {}, "my_note": "window"}
    more |= {"n_ctx": 24, "gradient_checkpointing": True, "summary_type": "cls_index", "task_specific_params": {}}
    assert find.by_name(str(configured(tiny, **more))).config().vocab_size == 97


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])


def index(**weight_map: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return damage


def in_place(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Something else under the name of a file."""

    def damage(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return damage


def zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def in_type(dtype: torch.dtype, by_torch: bool = False) -> Callable[[Path], None]:
    """The matrices in another type."""

    def damage(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        weights = {name: p.to(dtype) if p.dim() > 1 else p for name, p in weights.items()}
        if by_torch:
            (folder / "model.safetensors").unlink()
            torch.save(weights, folder / "pytorch_model.bin")
        else:
            save_file(weights, folder / "model.safetensors")

    return damage


DAMAGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no config": (lambda f: (f / "config.json").unlink(), ["config.json is missing"]),
    "config not JSON": (lambda f: (f / "config.json").write_text("{'a': 1}"), ["config.json cannot be read"]),
    "config no object": (lambda f: (f / "config.json").write_text("[1]"), ["config.json", "not a model's config"]),
    "config no text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), ["config.json cannot be read"]),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["tiny"]),
    "weights cut": (lambda f: cut(f / "model.safetensors"), ["model.safetensors is damaged"]),
    "weights empty": (lambda f: (f / "model.safetensors").write_bytes(b""), ["model.safetensors is damaged"]),
    "shard missing": (index(a="model-2.safetensors"), ["model-2.safetensors is missing"]),
    "shard elsewhere": (index(a="../model.safetensors"), ["model.safetensors.index.json", "files elsewhere"]),
    "shard at a root": (index(a="/model.safetensors"), ["model.safetensors.index.json", "files elsewhere"]),
    "empty index": (lambda f: index()(f), ["tiny"]),
    "no index": (
        lambda f: (index()(f), (f / "model.safetensors.index.json").write_text("[]")),
        ["model.safetensors.index.json: not an index of weights"],
    ),
    "an index of itself": (
        index(a="model.safetensors.index.json"),
        ["model.safetensors.index.json: not an index of weights", "no .safetensors file"],
    ),
    "an index of pickles": (index(a="pytorch_model.bin"), ["not an index of weights", "no .safetensors file"]),
    "an index of its folder": (index(a=".."), ["not an index of weights"]),
    "an index of numbers": (index(a=3), ["not an index of weights"]),  # type: ignore[arg-type]
    "a deep index": (
        lambda f: (index()(f), (f / "model.safetensors.index.json").write_text("[" * 100_000)),
        ["model.safetensors.index.json cannot be read: it is nested too deeply"],
    ),
    "a deep config": (lambda f: (f / "config.json").write_text('{"a":' * 100_000), ["config.json", "too deeply"]),
    "a config beyond numbers": (
        lambda f: (f / "config.json").write_text('{"model_type": "gpt2", "n_embd": 1e999}'),
        ["config.json", "1e999 is not a finite number"],
    ),
    "a config that is a pipe": (in_place("config.json", os.mkfifo), ["config.json is a pipe, not a file"]),
    "a config without end": (in_place("config.json", zeros), ["config.json is a device, not a file"]),
    "weights that are a pipe": (in_place("model.safetensors", os.mkfifo), ["model.safetensors is a pipe"]),
    "weights without end": (in_place("model.safetensors", zeros), ["model.safetensors is a device"]),
    "an index that is a pipe": (
        lambda f: (index()(f), in_place("model.safetensors.index.json", os.mkfifo)(f)),
        ["model.safetensors.index.json is a pipe"],
    ),
    "a header without end": (
        lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 7 + b"\x7f" + b" " * 100),
        ["model.safetensors is damaged: its header has"],
    ),
    "vocab_size 1e12": (lambda f: configured(f, vocab_size=10**12), ["tiny"]),
    "vocab_size in floats": (lambda f: configured(f, vocab_size=1e12), ["vocab_size=1000000000000: must be at most"]),
    "complex weights": (in_type(torch.complex64), ["tiny", ".weight is of type complex64"]),
    "integer weights": (in_type(torch.int64), ["tiny", ".weight is of type int64"]),
    "8-bit weights": (in_type(torch.int8), ["tiny", ".weight is of type int8"]),
    "float8 weights": (in_type(torch.float8_e4m3fn), ["tiny", ".weight is of type float8_e4m3fn"]),
    "complex weights by torch": (in_type(torch.complex64, by_torch=True), [".weight is of type complex64"]),
    "integer weights by torch": (in_type(torch.int32, by_torch=True), [".weight is of type int32"]),
    "weights and more by torch": (
        lambda f: ((f / "model.safetensors").unlink(), torch.save({"a": 1}, f / "pytorch_model.bin")),
        ["pytorch_model.bin: it holds more than weights by name"],
    ),
    "other shape": (lambda f: configured(f, vocab_size=98), ["tiny", "wte.weight", "(97, 16)", "(98, 16)"]),
    "fewer blocks": (lambda f: configured(f, n_layer=1), ["tiny", "transformer.h.1."]),
    "more blocks": (lambda f: configured(f, n_layer=3), ["tiny", "transformer.h.2.", "is not among its weights"]),
    "no head": (
        lambda f: configured(f, tie_word_embeddings=False),
        ["tiny", "lm_head.weight is not among its weights"],
    ),
    "no tokenizer": (lambda f: None, ["tiny", "what its 97 token ids mean", "tokenizer.json"]),
    "tokenizer not JSON": (lambda f: (f / "tokenizer.json").write_text("{"), ["tokenizer.json cannot be read"]),
    "tokenizer not one": (lambda f: (f / "tokenizer.json").write_text("{}"), ["tiny", "tokenizers library"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders(folio, story, tiny, tmp_path, damage) -> None:
    """The line names the file or the folder; neither sampling nor training begins."""
    harm, words = DAMAGES[damage]
    harm(tiny)
    if "tokenizer" not in damage:
        train = (*TRAIN, f"--data_dir={story}", f"--out_dir={tmp_path / 'out'}", f"--init_from={tiny}")
        assert_refused(folio(*train), *words)
        assert not (tmp_path / "out").exists()
        (tiny / "tokenizer.json").write_text(tokenizer_file(97))
    assert_refused(folio(*SAMPLE, f"--init_from={tiny}"), *words)


def test_there_is_one_checkpoint_in_it(folio, tiny) -> None:
    assert_refused(folio(*SAMPLE, f"--init_from={tiny}", "--checkpoint=777"), "'777'", tiny, "of step 0")


def without_a_matrix(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["transformer.h.0.mlp.c_fc.weight"]
    save_file(weights, folder / "model.safetensors")


HALVES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a weight missing": (without_a_matrix, "transformer.h.0.mlp.c_fc.weight"),
    "other shape": (lambda f: configured(f, n_positions=5), "transformer.wpe.weight"),
    "beyond any memory": (lambda f: configured(f, n_embd=2**31, n_head=1), "n_embd=2147483648: must be at most"),
    "too many blocks": (lambda f: configured(f, n_layer=10**7), "n_layer=10000000"),
}


@pytest.mark.parametrize("halves", HALVES)
def test_a_damaged_model_is_not_handed_on(folio, tiny, tmp_path, halves) -> None:
    harm, words = HALVES[halves]
    harm(tiny)
    for command in (["export", f"--out_dir={tiny}"], ["import", str(tiny)]):
        assert_refused(folio(*command, "--to", str(tmp_path / "to")), "tiny", words)
    assert [p.name for p in tmp_path.iterdir()] == ["tiny"]


SHAPE = {"block_size": 24, "vocab_size": 97, "n_layer": 2, "n_head": 2, "n_embd": 16}  # TINY's
KEPT = {
    "model": {"n_layer": "2"},
    "state": {"step": None},
    "a step below 0": {"state": {"step": -3}},
    "tokenizer": {"a": 1},
    "asked": {"learning_rate": "fast"},
}


@pytest.mark.parametrize("part", KEPT)
def test_what_an_export_kept_is_checked(folio, tiny, tmp_path, part) -> None:
    """A folder may come from anybody: what it says of its run is no more than numbers."""
    kept = {"model": SHAPE, "state": vars(State(step=3)), "tokenizer": None, "asked": {}}
    told = KEPT[part].get("state", KEPT[part])
    name = "state" if "step" in told else part
    configured(tiny, folio={**kept, name: {**(kept[name] or {}), **told}})
    assert_refused(folio("import", str(tiny), "--to", str(tmp_path / "to")), "config.json", "'folio'")
    assert not (tmp_path / "to").exists()


def test_knobs_that_an_export_would_not_keep_are_passed_over(tiny) -> None:
    """Those of other machines, other places and later versions."""
    asked = {"wandb_log": True, "data_dir": "elsewhere", "device": "cuda", "of_the_future": 1, "batch_size": 5}
    configured(tiny, folio={"model": SHAPE, "state": vars(State(step=3)), "tokenizer": None, "asked": asked})
    found = find.by_name(str(tiny))
    assert (found.step, found.asked) == (3, {"batch_size": 5})


def tokenizer_file(size: int) -> str:
    """The tokenizer.json of as many letters."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {chr(0x4E00 + i): i for i in range(size)}
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    fast.decoder = tokenizers.decoders.Fuse()
    return fast.to_str()


def test_a_tokenizer_with_more_ids_than_the_model(folio, tiny) -> None:
    """A prompt that the model has no row for is bad input."""
    (tiny / "tokenizer.json").write_text(tokenizer_file(120))
    argv = (*SAMPLE, f"--init_from={tiny}", "--max_new_tokens=2")
    assert_refused(folio(*argv, f"--start={chr(0x4E00 + 110)}"), 97)


@pytest.mark.parametrize("name", ["rsume", "./nowhere", "no/such/folder", "-x/y", "~nobody-of-this-name/model"])
def test_names_that_the_hub_is_not_asked_for(folio, tmp_path, monkeypatch, name) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # to import it would be an error
    said = folio("sample", f"--init_from={name}")
    assert_refused(said, name, "did you mean 'resume'?" if name == "rsume" else "no")
    assert "huggingface_hub" not in said.err


# The hub's cache


def test_what_is_fetched_from_the_hub() -> None:
    """Every file that a tokenizer is read from, and none of other programs."""
    wanted = [*tokenizer_folder.FILES, "config.json", "model.safetensors", "model-00001-of-00002.safetensors"]
    wanted += ["model.safetensors.index.json"]
    others = ["tf_model.h5", "rust_model.ot", "flax_model.msgpack", "onnx/model.onnx", "pytorch_model.bin", "run.py"]
    assert list(filter_repo_objects([*wanted, *others], allow_patterns=hub._FILES)) == wanted
    assert {"vocab.json", "merges.txt", "vocab.txt", "tokenizer.json", "added_tokens.json"} <= set(wanted)


def cached(hub: Path, name: str, **shape: Any) -> None:
    """A model as the hub's library lays it out: its files are links to blobs."""
    repository = hub / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("607a30d783dfa663caf39e06633721c8d4cfcd7" + str(len(name) % 10))
    saved(repository / "blobs", **shape)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    for number, file in enumerate(sorted((repository / "blobs").iterdir())):
        blob = file.rename(file.with_name(f"{number:040x}"))
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)


def test_the_hubs_cache(tmp_path) -> None:
    """Under the organisation's name first, then the old one; what is not whole is passed over."""
    hub = tmp_path / "hub"
    cached(hub, "openai-community/gpt2", n_layer=1)
    cached(hub, "gpt2", n_layer=2)
    cached(hub, "gpt2-large", n_layer=3)
    cached(hub, "user/name.x", n_layer=4)
    cached(hub, "openai-community/gpt2-xl", n_layer=5)
    next((hub / "models--openai-community--gpt2-xl").rglob("snapshots/*/model.safetensors")).unlink()
    cached(hub, "gpt2-xl", n_layer=6)
    script = (
        "import sys\nfrom folio.model.gpt import GPT\n"
        "print([GPT.from_pretrained(n).config.n_layer for n in ('gpt2', 'gpt2-large', 'user/name.x', 'gpt2-xl')])\n"
        "print('transformers' in sys.modules)"
    )
    for where in ({"HF_HUB_CACHE": str(hub)}, {"HF_HOME": str(tmp_path)}):
        done = python("-c", script, cwd=tmp_path, HF_HUB_OFFLINE="1", **where)
        assert (done.stdout, done.returncode) == ("[1, 3, 4, 6]\nFalse\n", 0), done.stderr


def test_models_of_the_cache_at_the_command_line(tmp_path, story, shared_data) -> None:
    cached(tmp_path / "hub", "openai-community/gpt2", n_layer=1, n_embd=8, vocab_size=50257)
    cached(tmp_path / "hub", "user/name")
    offline = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "TIKTOKEN_CACHE_DIR": str(shared_data / "tiktoken")}
    done = python(*PYTHON, *SAMPLE, "--init_from=gpt2", "--start=The ferry", "--max_new_tokens=9", **offline)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("The ferry")
    argv = (*TRAIN, f"--data_dir={story}", f"--out_dir={tmp_path / 'out'}", "--init_from=user/name")
    done = python(*PYTHON, *argv, "--eval_only", **offline)
    assert (done.returncode, done.stderr) == (0, "")
    assert "models--user--name" in done.stdout
    assert "val loss" in done.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["gpt2-medium", "user/name"])
def test_nothing_in_the_cache(tmp_path, name) -> None:
    done = python(*PYTHON, "sample", f"--init_from={name}", cwd=tmp_path, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert_refused(Outcome(done.returncode, done.stdout, done.stderr), name, "cache of the Hugging Face hub")


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


@pytest.mark.parametrize(
    "flag", ["--block_size=25", "--vocab_size=96", "--n_layer=3", "--bias=False", "--activation=gelu"]
)
def test_a_shape_that_the_weights_have_not(folio, story, tiny, tmp_path, flag) -> None:
    argv = (*TRAIN, f"--data_dir={story}", f"--out_dir={tmp_path / 'out'}", f"--init_from={tiny}", flag)
    assert_refused(folio(*argv), flag, flag[2:].split("=")[0])
    assert not (tmp_path / "out").exists()


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
    assert (code, f"nothing says what its {size} token ids mean" in said) == (0, True)
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
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="only Linux says what the peak of memory was")
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
