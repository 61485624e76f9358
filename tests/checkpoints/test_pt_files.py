"""Files of torch.save by nanoGPT, build-nanogpt and GPT-from-scratch: read to the letter, and no code in them runs."""

from __future__ import annotations

import argparse
import collections
import datetime
import json
import math
import os
import pickle
import shlex
import shutil
import subprocess
import sys
import types
import warnings
import zipfile
from collections import OrderedDict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Outcome, assert_refused, python, tree
from torch import Tensor, nn
from torch.nn import functional as F

from folio.checkpoints import find, pt_files
from folio.checkpoints.pt_files import PtFile
from folio.model.config import GPTConfig
from folio.model.gpt import GPT

Folio = Callable[..., Outcome]
Content = dict[str, Any]
SHAPE = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 16, "vocab_size": 128, "bias": True, "dropout": 0.1}
QUICK = ("--device=cpu", "--compile=False", "--dtype=float32", "--eval_iters=1", "--max_iters=3")


def stepped(net: nn.Module, loss: Callable[[Tensor], Tensor]) -> torch.optim.AdamW:
    """AdamW as nanoGPT and its heirs make it, after two steps."""
    params = list(net.parameters())
    groups = [[p for p in params if p.dim() >= 2], [p for p in params if p.dim() < 2]]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups], lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        loss(torch.randint(128, (2, 16))).backward()
        optimizer.step()
    return optimizer


def small() -> Content:
    """What nanoGPT saves, of a tiny model."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE))  # its names and order are nanoGPT's
    optimizer = stepped(model, lambda idx: model.loss(idx[:, :-1], idx[:, 1:])[0])
    return {
        "model": dict(model.state_dict()),
        "optimizer": optimizer.state_dict(),
        "model_args": dict(SHAPE),
        "iter_num": 2,
        "best_val_loss": torch.tensor(2.5),
        "config": {"batch_size": 2, "gradient_accumulation_steps": 1, "dataset": "elsewhere"},
    }


def saved(content: Any, path: Path, legacy: bool = False) -> Path:
    path.parent.mkdir(exist_ok=True)
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def with_value(*way: Any) -> Callable[[Content], None]:
    """Sets what lies at this way into a content; the last item is the value."""

    def change(content: Content) -> None:
        *keys, last, value = way
        for key in keys:
            content = content[key]
        content[last] = value

    return change


def pickled_as(patch: pytest.MonkeyPatch, name: str, **values: Any) -> Any:
    """An object of a class of this full name, which can be imported for as long as the patch holds."""
    module, _, title = name.rpartition(".")
    parts = module.split(".")
    for n in range(1, len(parts) + 1):
        if (package := ".".join(parts[:n])) not in sys.modules:
            patch.setitem(sys.modules, package, types.ModuleType(package))
    kind = type(title, (), {"__module__": module})
    patch.setattr(sys.modules[module], title, kind, raising=False)
    instance = kind()
    vars(instance).update(values)
    return instance


def assert_same(one: PtFile, other: PtFile) -> None:
    for mine, theirs in ((one.weights(), other.weights()), (one.slots(), other.slots())):
        a, b = dict(mine), dict(theirs)
        assert a.keys() == b.keys()
        assert a
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert {**one.state, "run": ""} == {**other.state, "run": ""}
    assert one.asked == other.asked


# nanoGPT


def test_nanogpt_s_own_numbers(shared_data: Path) -> None:
    """Its loss and logits; its step and best loss; its knobs, but for those of the machine and of the call."""
    expected = json.loads((shared_data / "nanogpt_ckpt" / "expected.json").read_text())
    found = pt_files.read(shared_data / "nanogpt_ckpt" / "ckpt.pt")
    with torch.no_grad():
        logits, loss = found.model().eval()(torch.tensor(expected["idx"]), torch.tensor(expected["targets"]))
    assert loss is not None
    assert loss.item() == pytest.approx(expected["loss"], abs=1e-5)
    torch.testing.assert_close(logits, torch.tensor(expected["logits"]), atol=1e-5, rtol=0)

    assert found.config() == GPTConfig(**expected["model_args"])
    assert (found.config().bias, found.config().dropout) == (False, 0.1)
    assert found.step == expected["iter_num"] == 200
    assert found.state["best"] == {"step": 200, "loss": pytest.approx(2.6147, abs=1e-4)}
    assert (found.state["rows"], found.state["tokens"]) == (200 * 12, 200 * 12 * 64)
    asked = {"learning_rate": 1e-3, "max_iters": 200, "beta2": 0.99, "min_lr": 1e-4, "batch_size": 12, "dropout": 0.1}
    assert found.asked.items() >= {**asked, "warmup": "nanogpt", "dataset": "shakespeare_char"}.items()
    machine = {"device", "dtype", "compile", "backend", "seed", "out_dir", "init_from", "eval_only"}
    assert not machine & found.asked.keys()
    tokenizer = found.tokenizer()  # of the meta.pkl beside it
    assert tokenizer.bytes(expected["idx"][0]).startswith(b"rina, this I know,\nShe is not")


def prefixed(prefix: str) -> Callable[[Content], None]:
    def change(content: Content) -> None:
        content["model"] = {prefix + name: tensor for name, tensor in content["model"].items()}

    return change


def with_masks(content: Content) -> None:
    mask = torch.ones(64, 64).tril().view(1, 1, 64, 64)
    for number in range(2):
        content["model"][f"transformer.h.{number}.attn.bias"] = mask
        content["model"][f"transformer.h.{number}.attn.masked_bias"] = torch.tensor(-1e4)


SAVED = {
    "as it is": lambda content: None,
    "compiled": prefixed("_orig_mod."),
    "DDP": prefixed("module."),
    "compiled in DDP": prefixed("module._orig_mod."),
    "DDP compiled": prefixed("_orig_mod.module."),
    "masks": with_masks,
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("change", SAVED.values(), ids=SAVED)
def test_however_it_was_saved(
    shared_data: Path, tmp_path: Path, change: Callable[[Content], None], legacy: bool
) -> None:
    """Prefixes of wrappers, masks among the weights and either format of torch.save: all read the same."""
    theirs = shared_data / "nanogpt_ckpt"
    shutil.copy(theirs / "meta.pkl", tmp_path)
    content = torch.load(theirs / "ckpt.pt", weights_only=True)
    change(content)
    path = saved(content, tmp_path / "ckpt.pt", legacy)
    assert zipfile.is_zipfile(path) != legacy
    assert_same(pt_files.read(path), pt_files.read(theirs / "ckpt.pt"))


def deflated(path: Path) -> Path:
    """The archive as other programs write it anew."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return path


def test_a_deflated_archive(tmp_path: Path) -> None:
    """Weights and optimizer are the same as before."""
    plain = pt_files.read(saved(small(), tmp_path / "plain.pt"))
    assert_same(pt_files.read(deflated(saved(small(), tmp_path / "ckpt.pt"))), plain)


@pytest.mark.parametrize("form", ["stored", "deflated"])
@pytest.mark.parametrize("of", ["the weights", "the optimizer"])
def test_a_flipped_bit_is_found(tmp_path: Path, story: Path, folio: Folio, form: str, of: str) -> None:
    """Among the numbers of a checkpoint: neither import nor resume takes it."""
    content = small()
    tensor = content["model"][LN] if of == "the weights" else content["optimizer"]["state"][0]["exp_avg"]
    tensor[..., :4] = torch.tensor([1.5, 2.5, 3.5, 4.5])
    path = saved(content, tmp_path / "ckpt.pt")
    if form == "deflated":
        deflated(path)
        at = next(r.header_offset for r in zipfile.ZipFile(path).infolist() if r.file_size > 1000) + 100
    else:
        at = path.read_bytes().index(tensor.numpy().tobytes())
    damaged = bytearray(path.read_bytes())
    damaged[at] ^= 1
    path.write_bytes(damaged)
    assert_not_taken(folio, story, path, "is damaged")


def a_sample_of(path: Path) -> Any:
    """What a trainer may put beside its numbers: values of NumPy, paths, objects that are only their fields."""
    return {
        "iter_num": np.int64(2),
        "best_val_loss": np.float32(2.5),
        "config": argparse.Namespace(
            batch_size=np.int32(2), gradient_accumulation_steps=1, dataset="elsewhere", out_dir=path
        ),
        "args": types.SimpleNamespace(when=datetime.datetime(2024, 1, 1), seen={1, 2}),
        "history": collections.defaultdict(list, loss=[np.float64(3.0)]),
        "rng_state": torch.get_rng_state(),
        "numpy_rng": np.random.RandomState(0).get_state(),
        "types": [np.uint16, np.float32, np.bool_, torch.bfloat16, int, range(3), slice(1)],
        "last_losses": collections.deque([2.5, 2.0], maxlen=4),
        "version": torch.__version__,
    }


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_plain_values_of_other_kinds(tmp_path: Path, legacy: bool) -> None:
    """Nothing in them would run, and what they say is taken."""
    plain = pt_files.read(saved(small(), tmp_path / "plain.pt"))
    content = small() | a_sample_of(tmp_path)
    content["model"] = OrderedDict(content["model"])
    content["model_args"] = {name: np.array(value)[()] for name, value in SHAPE.items()}
    assert_same(pt_files.read(saved(content, tmp_path / "ckpt.pt", legacy)), plain)


@pytest.mark.parametrize("hold", [np.array, lambda n: np.array([n]), torch.tensor, lambda n: torch.tensor([n])])
def test_a_number_alone(tmp_path: Path, hold: Callable[[Any], Any]) -> None:
    plain = pt_files.read(saved(small() | {"iter_num": 2, "best_val_loss": 2.5}, tmp_path / "plain.pt"))
    content = small() | {"iter_num": hold(2), "best_val_loss": hold(2.5)}
    content["model_args"] = {name: hold(value) if type(value) is int else value for name, value in SHAPE.items()}
    assert_same(pt_files.read(saved(content, tmp_path / "ckpt.pt")), plain)


def test_older_nanogpt_says_nothing_of_biases(tmp_path: Path) -> None:
    """Where model_args lacks bias, the model has them."""
    content = small()
    before = pt_files.read(saved(content, tmp_path / "with.pt"))
    del content["model_args"]["bias"]
    assert_same(pt_files.read(saved(content, tmp_path / "without.pt")), before)
    assert before.config().bias


# Its heirs


def attention(x: Tensor, qkv: Tensor, heads: int) -> Tensor:
    q, k, v = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=2))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)


class BuildNanoGPT(nn.Module):
    """build-nanogpt's model, 2 × 16 wide with 2 heads."""

    def __init__(self) -> None:
        super().__init__()
        C = 16
        blocks = [
            {
                "ln_1": nn.LayerNorm(C),
                "attn": nn.ModuleDict({"c_attn": nn.Linear(C, 3 * C), "c_proj": nn.Linear(C, C)}),
                "ln_2": nn.LayerNorm(C),
                "mlp": nn.ModuleDict({"c_fc": nn.Linear(C, 4 * C), "c_proj": nn.Linear(4 * C, C)}),
            }
            for _ in range(2)
        ]
        parts = {
            "wte": nn.Embedding(128, C),
            "wpe": nn.Embedding(16, C),
            "h": nn.ModuleList(map(nn.ModuleDict, blocks)),
        }
        self.transformer = nn.ModuleDict({**parts, "ln_f": nn.LayerNorm(C)})
        self.lm_head = nn.Linear(C, 128, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight

    def forward(self, idx: Tensor) -> Tensor:
        body = self.transformer
        x = body["wte"](idx) + body["wpe"].weight[: idx.size(1)]
        for block in body["h"]:
            x = x + block["attn"]["c_proj"](attention(x, block["attn"]["c_attn"](block["ln_1"](x)), 2))
            x = x + block["mlp"]["c_proj"](F.gelu(block["mlp"]["c_fc"](block["ln_2"](x)), approximate="tanh"))
        return self.lm_head(body["ln_f"](x))


class GPTFromScratch(nn.Module):
    """GPT-from-scratch's model, 2 × 16 wide with 2 heads: another order, and a head of its own."""

    def __init__(self, qkv_bias: bool) -> None:
        super().__init__()
        C = 16
        blocks = [
            {
                "mha": nn.ModuleDict({"qkv": nn.Linear(C, 3 * C, bias=qkv_bias), "proj": nn.Linear(C, C)}),
                "ff": nn.ModuleDict({"layers": nn.Sequential(nn.Linear(C, 4 * C)), "final_l": nn.Linear(4 * C, C)}),
                "norm1": nn.LayerNorm(C),
                "norm2": nn.LayerNorm(C),
            }
            for _ in range(2)
        ]
        parts = {"t_embedding": nn.Embedding(128, C), "p_embedding": nn.Embedding(16, C)}
        parts["transformers"] = nn.Sequential(*map(nn.ModuleDict, blocks))
        self.gpt = nn.ModuleDict({**parts, "final_ln": nn.LayerNorm(C), "ln_out": nn.Linear(C, 128, bias=False)})

    def forward(self, idx: Tensor) -> Tensor:
        body = self.gpt
        x = body["t_embedding"](idx) + body["p_embedding"].weight[: idx.size(1)]
        for block in body["transformers"]:
            x = x + block["mha"]["proj"](attention(x, block["mha"]["qkv"](block["norm1"](x)), 2))
            x = x + block["ff"]["final_l"](F.gelu(block["ff"]["layers"](block["norm2"](x)), approximate="tanh"))
        return body["ln_out"](body["final_ln"](x))


BUILD = {"block_size": 16, "vocab_size": 128, "n_layer": 2, "n_head": 2, "n_embd": 16}
SCRATCH = {"vocab_size": 128, "emb_dim": 16, "context_length": 16, "drop_rate": 0.2, "n_layers": 2, "n_heads": 2}


@pytest.mark.parametrize("heir", ["build-nanogpt", "GPT-from-scratch", "GPT-from-scratch with qkv_bias"])
def test_heirs(tmp_path: Path, folio: Folio, monkeypatch: pytest.MonkeyPatch, heir: str) -> None:
    """Their logits, step and loss; GPT-from-scratch's optimiser. Imported, all of it is the same."""
    torch.manual_seed(1)
    build, qkv_bias = heir == "build-nanogpt", "qkv_bias" in heir
    net = BuildNanoGPT() if build else GPTFromScratch(qkv_bias)
    for p in net.parameters():  # biases too, and nothing by chance the same
        nn.init.normal_(p, std=0.2)
    optimizer = stepped(net, lambda idx: F.cross_entropy(net(idx).flatten(0, 1), idx.roll(-1, 1).flatten()))
    content = {"model": net.state_dict(), "val_loss": 3.25}
    with monkeypatch.context() as patch:
        if build:
            content |= {"config": pickled_as(patch, "__main__.GPTConfig", **BUILD), "step": 2}
        else:
            config = pickled_as(patch, "gpt_from_scratch.models.utils.GPTConfig", **SCRATCH, qkv_bias=qkv_bias)
            content |= {"config": config, "optimizer": optimizer.state_dict(), "epoch": 0, "iter": 1}
        path = saved(content, tmp_path / ("model_00002.pt" if build else "model_epoch0_iter00001.pt"))

    idx = torch.randint(128, (2, 16))
    out = tmp_path / "out"
    assert folio("import", path, "--to", out).code == 0
    for found in (pt_files.read(path), find.choose(out)):
        assert (found.step, found.state["val_loss"]) == (2, 3.25)
        assert found.config().dropout == (0.0 if build else 0.2)
        with torch.no_grad():
            torch.testing.assert_close(found.model(dropout=0.0)(idx, idx)[0], net(idx), atol=1e-5, rtol=0)
        weights, slots = dict(found.weights()), dict(found.slots())
        if build:
            assert not slots
            continue
        assert len(slots) == 3 * len(list(net.parameters()))
        for p, state in optimizer.state.items():  # parameters are told by their values: no table of names
            name = next(name for name, weight in weights.items() if torch.equal(weight, p))
            assert all(torch.equal(slots[f"{name}/{slot}"], value) for slot, value in state.items())


# Trains the real program's model for two steps and saves what it saves, with logits beside
REAL_BUILD = """
import ast, sys, torch
checkout, out = sys.argv[1:]
names = {"CausalSelfAttention", "MLP", "Block", "GPTConfig", "GPT"}
body = ast.parse(open(checkout + "/train_gpt2.py").read()).body
first = next(i for i, node in enumerate(body) if isinstance(node, ast.ClassDef))
heads = [node for node in body[:first] if "hellaswag" not in ast.unparse(node)]
exec(compile(ast.Module(heads + [n for n in body if getattr(n, "name", "") in names], []), "train_gpt2", "exec"))
config = GPTConfig(block_size=16, vocab_size=128, n_layer=2, n_head=2, n_embd=16)
model = GPT(config)
idx = torch.randint(128, (2, 16))
torch.save({"model": model.state_dict(), "config": model.config, "step": 2, "val_loss": 3.25}, out + "/model_00002.pt")
torch.save({"idx": idx, "logits": model(idx)[0].detach()}, out + "/expected")
"""
REAL_SCRATCH = """
import sys, torch
from gpt_from_scratch.models import GPT, GPTConfig
checkout, out = sys.argv[1:]
model = GPT(GPTConfig(128, 16, 16, 0.0, 2, 2))
params = list(model.parameters())
optimizer = torch.optim.AdamW([{"params": [p for p in params if p.dim() >= 2]},
                               {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}])
idx = torch.randint(128, (2, 16))
for _ in range(2):
    model(idx).logsumexp(2).sum().backward()
    optimizer.step()
content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "config": model.cfg, "epoch": 0, "iter": 1,
           "val_loss": 3.25}
torch.save(content, out + "/model_epoch0_iter00001.pt")
torch.save({"idx": idx, "logits": model(idx).detach()}, out + "/expected")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variable", "script"), [("FOLIO_BUILD_NANOGPT", REAL_BUILD), ("FOLIO_GPT_FROM_SCRATCH", REAL_SCRATCH)]
)
def test_heirs_themselves(tmp_path: Path, variable: str, script: str) -> None:
    """What a checkout of the program itself saves."""
    if not (checkout := os.environ.get(variable)):
        pytest.skip(f"{variable} names no checkout of it")
    done = python("-c", script, checkout, tmp_path, PYTHONPATH=checkout)
    assert done.returncode == 0, done.stderr
    found = pt_files.read(next(tmp_path.glob("*.pt")))
    expected = torch.load(tmp_path / "expected", weights_only=True)
    with torch.no_grad():
        logits, _ = found.model()(expected["idx"], expected["idx"])
    torch.testing.assert_close(logits, expected["logits"], atol=1e-5, rtol=0)
    assert (found.step, found.state["val_loss"]) == (2, 3.25)
    assert len(dict(found.slots())) == (3 * len(found.tensors) if "SCRATCH" in variable else 0)


# Files that would run code


class Calls:
    """Pickled, it is a call of this function."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


def shell(marker: Path) -> str:
    return f"touch {shlex.quote(str(marker))}"


# How the marker appears, and the callable that is named: torch lets OrderedDict pass, in meta.pkl it has no business
HOSTILE: dict[str, tuple[Callable[[Path], Calls], str]] = {
    "os.system": (lambda marker: Calls(os.system, shell(marker)), f"{os.name}.system"),
    "eval": (lambda marker: Calls(eval, f"open({str(marker)!r}, 'w').close()"), "eval"),
    "Path.touch": (lambda marker: Calls(Path.touch, marker), "(getattr|Path.touch)"),
    "Popen": (lambda marker: Calls(subprocess.Popen, ["touch", str(marker)]), "Popen"),
    "torch.hub.load": (lambda marker: Calls(torch.hub.load, "pytorch/evil:main", "entry"), "torch.hub.load"),
    "nested": (
        lambda marker: Calls(OrderedDict, [["a", Calls(OrderedDict, [["b", Calls(os.system, shell(marker))]])]]),
        f"({os.name}.system|OrderedDict)",
    ),
}


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is there once hostile code ran; torch's hub has a program that makes it."""
    path = tmp_path / "marker"
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    program = tmp_path / "home" / "hub" / "pytorch_evil_main" / "hubconf.py"
    program.parent.mkdir(parents=True)
    program.write_text(f"def entry():\n    open({str(path)!r}, 'w').close()\n")
    return path


def assert_hostile(load: Callable[[], Any], marker: Path) -> None:
    """Loaded without care, it does run its code."""
    for value in load():
        if isinstance(value, subprocess.Popen):
            value.wait()
    assert marker.exists()
    marker.unlink()


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("place", ["model", "config", "optimizer"])
@pytest.mark.parametrize("kind", HOSTILE)
def test_code_in_a_checkpoint(tmp_path: Path, marker: Path, kind: str, place: str, legacy: bool) -> None:
    """Wherever it hides: refused by the name of what it would call, which is not called."""
    make, name = HOSTILE[kind]
    content = small()
    content[place]["hostile"] = make(marker)
    path = saved(content, tmp_path / "ckpt.pt", legacy)
    assert_hostile(lambda: torch.load(path, weights_only=False)[place].values(), marker)
    with pytest.raises(ValueError, match=rf"ckpt\.pt: refused: it asks for \S*{name}, which would run code$"):
        pt_files.read(path)
    assert not marker.exists()


@pytest.mark.parametrize("protocol", [None, *range(6)])
def test_code_in_a_bare_pickle(tmp_path: Path, marker: Path, protocol: int | None) -> None:
    """Under the name of a checkpoint; every protocol, and one written by hand. No word of torch's beside."""
    path = tmp_path / "model_00002.pt"
    by_hand = f"cos\nsystem\n(S{shell(marker)!r}\ntR.".encode()
    hostile = [Calls(os.system, shell(marker))]
    path.write_bytes(by_hand if protocol is None else pickle.dumps(hostile, protocol=protocol))
    assert_hostile(lambda: [pickle.loads(path.read_bytes())], marker)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with pytest.raises(ValueError, match=r"model_00002\.pt") as error:
            pt_files.read(path)
    assert "pytorch.org" not in str(error.value)
    assert not said
    assert not marker.exists()


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_code_in_meta_pkl(tmp_path: Path, marker: Path, kind: str, protocol: int) -> None:
    """Beside a harmless checkpoint."""
    make, name = HOSTILE[kind]
    pickled = tmp_path / "meta.pkl"
    pickled.write_bytes(pickle.dumps({"vocab_size": 128, "itos": make(marker)}, protocol=protocol))
    assert_hostile(lambda: pickle.loads(pickled.read_bytes()).values(), marker)
    with pytest.raises(ValueError, match=rf"meta\.pkl: refused: it asks for \S*{name}, which would run code"):
        pt_files.read(saved(small(), tmp_path / "ckpt.pt"))
    assert not marker.exists()


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("what", ["ckpt.pt", "meta.pkl"])
def test_code_at_the_command_line(
    tmp_path: Path, marker: Path, story: Path, folio: Folio, what: str, legacy: bool
) -> None:
    """train, sample and import: one line, exit code 2, and nothing written."""
    content, hostile = small(), Calls(os.system, shell(marker))
    if what == "ckpt.pt":
        content["optimizer"]["state"][0]["exp_avg"] = hostile
    ckpt = saved(content, tmp_path / "out" / "ckpt.pt", legacy)
    if what == "meta.pkl":
        ckpt.with_name(what).write_bytes(pickle.dumps(hostile))
    before = tree(tmp_path)
    for argv in (
        ("train", *QUICK, "--init_from=resume", f"--out_dir={ckpt.parent}", f"--data_dir={story}"),
        ("train", *QUICK, f"--init_from={ckpt}", f"--out_dir={tmp_path / 'new'}", f"--data_dir={story}"),
        ("sample", f"--out_dir={ckpt.parent}", "--device=cpu"),
        ("import", ckpt, "--to", tmp_path / "imported"),
    ):
        assert_refused(folio(*argv), ckpt.with_name(what), "posix.system")
    assert tree(tmp_path) == before


FIELDS = {"a container": OrderedDict(a=1), "text": "rm", "an allowed class": torch.Size([1]), "a tensor": torch.ones(1)}


@pytest.mark.parametrize("value", FIELDS.values(), ids=FIELDS)
def test_objects_in_a_config_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: object) -> None:
    """The one class that is let in holds numbers or nothing, whatever torch thinks harmless."""
    with monkeypatch.context() as patch:
        config = pickled_as(patch, "__main__.GPTConfig", **BUILD, extra=value)
        path = saved({"model": {}, "config": config, "step": 2}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model\.pt.*its config holds more than numbers"):
        pt_files.read(path)


@pytest.mark.parametrize("way", ["field", "state", "arguments"])
def test_code_in_a_config_class(tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """In a field, in the place of its fields, or handed to its constructor."""
    hostile = Calls(os.system, shell(marker))
    with monkeypatch.context() as patch:
        config = pickled_as(patch, "__main__.GPTConfig", **BUILD)
        kind = type(config)
        if way == "field":
            config.n_layer = hostile
        elif way == "state":
            kind.__getstate__ = lambda self: hostile
            kind.__setstate__ = lambda self, state: None
        else:
            kind.__init__ = lambda self, given=None: None
            kind.__reduce__ = lambda self: (kind, (hostile,))
        path = saved({"model": {}, "config": config}, tmp_path / "model.pt")
        assert_hostile(lambda: torch.load(path, weights_only=False), marker)
    with pytest.raises(ValueError, match=r"model\.pt: refused: it asks for \S*system"):
        pt_files.read(path)
    assert not marker.exists()


# Other files


def without(*way: str) -> Callable[[Content], None]:
    def change(content: Content) -> None:
        *keys, last = way
        for key in keys:
            content = content[key]
        del content[last]

    return change


LN = "transformer.ln_f.weight"
MISTAKES: dict[str, tuple[Callable[[Content], None], str]] = {
    "n_layer no number": (with_value("model_args", "n_layer", "2"), "n_layer = '2'"),
    "n_layer negative": (with_value("model_args", "n_layer", -1), "n_layer=-1"),
    "n_embd zero": (with_value("model_args", "n_embd", 0), "n_embd=0"),
    "n_head no divisor": (with_value("model_args", "n_head", 3), "n_head=3"),
    "vocab_size too large": (with_value("model_args", "vocab_size", 2**62), ""),
    "unknown field": (with_value("model_args", "n_layr", 2), "'n_layr'"),
    "model_args a list": (with_value("model_args", [1]), "not a checkpoint of nanoGPT"),
    "iter_num text": (with_value("iter_num", "two"), "two"),
    "iter_num NaN": (with_value("iter_num", math.nan), ""),
    "iter_num infinite": (with_value("iter_num", math.inf), ""),
    "iter_num negative": (with_value("iter_num", -5), "-5"),
    "best_val_loss text": (with_value("best_val_loss", "low"), "low"),
    "best_val_loss two numbers": (with_value("best_val_loss", torch.ones(2)), ""),
    "no model": (without("model"), "it holds no model"),
    "neither config": (without("model_args"), "not a checkpoint of nanoGPT"),
    "a weight missing": (without("model", LN), LN),
    "a weight too many": (with_value("model", "extra.weight", torch.ones(2)), "extra.weight"),
    "a weight of another shape": (with_value("model", LN, torch.ones(2)), LN),
    "a weight no tensor": (with_value("model", LN, 3), "not a checkpoint of nanoGPT"),
    "a weight sparse": (with_value("model", LN, torch.ones(8).to_sparse()), f"{LN} is sparse"),
    "a weight complex": (with_value("model", LN, torch.ones(8) * 1j), f"{LN} is of type complex64"),
    "a weight of integers": (with_value("model", LN, torch.ones(8).int()), f"{LN} is of type int32"),
    "a weight of bytes": (with_value("model", LN, torch.ones(8).byte()), f"{LN} is of type uint8"),
    "a weight of float8": (
        with_value("model", LN, torch.ones(8).to(torch.float8_e5m2)),
        f"{LN} is of type float8_e5m2",
    ),
    "a weight on no device": (with_value("model", LN, torch.empty(8, device="meta")), f"{LN} is without numbers"),
    "a weight under two names": (with_value("model", "module." + LN, torch.ones(8)), f"it holds {LN} twice"),
    "a state dict in itself": (lambda content: content["model"].update(again=content["model"]), "again"),
    "optimizer of integers": (
        with_value("optimizer", "state", 0, "exp_avg", torch.ones(128, 8).int()),
        "of type int32",
    ),
    "optimizer complex": (with_value("optimizer", "state", 0, "step", torch.tensor(1j)), "step is of type complex64"),
    "optimizer's step no number": (with_value("optimizer", "state", 0, "step", None), "is not a number"),
    "iter_num a hundred digits": (with_value("iter_num", 10**100), "its step is"),
    "vocab_size 1e12": (with_value("model_args", "vocab_size", 10**12), "vocab_size=1000000000000: must be at most"),
    "n_embd a nested list": (with_value("model_args", "n_embd", [[[[8, 8]]]]), "is not a number"),
    "n_embd of 5000 digits": (with_value("model_args", "n_embd", 10**4000), "n_embd' is not a number"),
    "a weight's name no text": (with_value("model", 5, torch.ones(2)), "not a checkpoint of nanoGPT"),
    "optimizer a list": (with_value("optimizer", [1]), "optimizer does not fit"),
    "optimizer's state a list": (with_value("optimizer", "state", [1]), "optimizer does not fit"),
    "optimizer of more parameters": (with_value("optimizer", "state", 99, {"step": 1.0}), "optimizer does not fit"),
    "optimizer counts from the end": (
        with_value("optimizer", "state", -1, dict.fromkeys(("exp_avg", "exp_avg_sq"), torch.ones(8)) | {"step": 1.0}),
        "optimizer does not fit",
    ),
    "optimizer of other shapes": (with_value("optimizer", "state", 0, "exp_avg", torch.ones(3)), "(3,)"),
    "optimizer with text": (with_value("optimizer", "state", 0, "exp_avg", "x"), "optimizer does not fit"),
    "optimizer's step a vector": (with_value("optimizer", "state", 0, "step", torch.ones(4)), "optimizer does not fit"),
    "optimizer lacks a slot": (without("optimizer", "state", 0, "exp_avg"), "optimizer does not fit"),
    "SGD": (with_value("optimizer", "state", 0, {"momentum_buffer": torch.ones(128, 8)}), "optimizer does not fit"),
}


def assert_not_taken(folio: Folio, story: Path, ckpt: Path, *words: str) -> None:
    before = tree(ckpt.parent)
    resume = ("train", *QUICK, "--init_from=resume", f"--out_dir={ckpt.parent}", f"--data_dir={story}")
    for argv in (("import", ckpt, "--to", ckpt.parent / "imported"), resume):
        assert_refused(folio(*argv), ckpt, *words)
    assert tree(ckpt.parent) == before


@pytest.mark.parametrize(("change", "word"), MISTAKES.values(), ids=MISTAKES)
def test_what_does_not_fit_together(
    tmp_path: Path, story: Path, folio: Folio, change: Callable[[Content], None], word: str
) -> None:
    """import and train: one line that names the file, and nothing written."""
    content = small()
    change(content)
    assert_not_taken(folio, story, saved(content, tmp_path / "ckpt.pt"), word)


def truncated(path: Path) -> None:
    content = saved(small(), path).read_bytes()
    path.write_bytes(content[: len(content) // 2])


def other_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme", "no model")


def linked_to_zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def named(*keys: Any) -> Callable[[Path], object]:
    return lambda path: saved({**small(), "model": dict.fromkeys(keys, torch.ones(1))}, path)


OTHERS: dict[str, Callable[[Path], object]] = {
    "plain state dict": lambda path: saved(small()["model"], path),
    "list": lambda path: saved([1, 2], path),
    "tensor": lambda path: saved(torch.ones(2), path),
    "another class": lambda path: saved({"model": deque()}, path),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no model\nbut text\n"),
    "truncated": truncated,
    "another zip": other_zip,
    "a pipe": os.mkfifo,
    "endless": linked_to_zeros,
    "a folder": Path.mkdir,
    "a memo of 34 GB": lambda path: path.write_bytes(b"\x80\x02Nr\xff\xff\xff\xff"),
    "names that are no text": named(1, 2.5, None, (1, "a")),
    "other names": named(*map(str, range(1000))),
}


@pytest.mark.parametrize("write", OTHERS.values(), ids=OTHERS)
def test_other_files(tmp_path: Path, story: Path, folio: Folio, write: Callable[[Path], object]) -> None:
    """The same of files that are no such checkpoint at all."""
    write(tmp_path / "ckpt.pt")
    assert_not_taken(folio, story, tmp_path / "ckpt.pt")
