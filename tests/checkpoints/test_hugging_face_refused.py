"""No code of a folder is run; what is damaged, or no GPT-2, is refused by name."""

from __future__ import annotations

import json
import os
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_refused, make_pipe
from gpt2_folders import SAMPLE, TRAIN, configured, saved
from safetensors.torch import load_file, save_file

from folio.checkpoints import find
from folio.checkpoints.state import State
from folio.model.gpt import GPT

transformers = pytest.importorskip("transformers")
filter_repo_objects = pytest.importorskip("huggingface_hub.utils").filter_repo_objects


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A folder with a small model."""
    saved(tmp_path / "tiny")
    return tmp_path / "tiny"


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
    "shard elsewhere": (index(a="../model.safetensors"), ["model.safetensors.index.json", "files of other folders"]),
    "shard at a root": (index(a="/model.safetensors"), ["model.safetensors.index.json", "files of other folders"]),
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
    "a config that is a pipe": (in_place("config.json", make_pipe), ["config.json is a pipe, not a file"]),
    "a config without end": (in_place("config.json", zeros), ["config.json is a device, not a file"]),
    "weights that are a pipe": (in_place("model.safetensors", make_pipe), ["model.safetensors is a pipe"]),
    "weights without end": (in_place("model.safetensors", zeros), ["model.safetensors is a device"]),
    "an index that is a pipe": (
        lambda f: (index()(f), in_place("model.safetensors.index.json", make_pipe)(f)),
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


def test_options_that_an_export_would_not_keep_are_passed_over(tiny) -> None:
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


def test_only_dropout_can_be_chosen(tiny) -> None:
    assert configured(tiny, resid_pdrop=0.5) == tiny
    assert GPT.from_pretrained(str(tiny)).config.dropout == 0
    model = GPT.from_pretrained(str(tiny), {"dropout": 0.25})
    assert model.config.dropout == model.transformer.drop.p == model.transformer.h[1].attn.dropout == 0.25
    for odd in ("vocab_size", "n_layer", "droput"):
        with pytest.raises(ValueError, match=f"{odd} is fixed by the weights, only dropout"):
            GPT.from_pretrained(str(tiny), {"dropout": 0.1, odd: 3})


@pytest.mark.parametrize(
    "flag", ["--block_size=25", "--vocab_size=96", "--n_layer=3", "--bias=False", "--activation=gelu"]
)
def test_a_shape_that_the_weights_have_not(folio, story, tiny, tmp_path, flag) -> None:
    argv = (*TRAIN, f"--data_dir={story}", f"--out_dir={tmp_path / 'out'}", f"--init_from={tiny}", flag)
    assert_refused(folio(*argv), flag, flag[2:].split("=")[0])
    assert not (tmp_path / "out").exists()
