"""Reads checkpoints that other trainers wrote with ``torch.save``; no code in them is run.

nanoGPT's ``ckpt.pt``, with its optimizer; build-nanogpt's ``model_*.pt``; GPT-from-scratch's
``model_epoch*_iter*.pt``, with its optimizer.
"""

from __future__ import annotations

import contextlib
import math
import re
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from folio import files
from folio.checkpoints import torch_files
from folio.checkpoints.checkpoint import Checkpoint
from folio.checkpoints.safetensors_files import Tensors
from folio.checkpoints.state import State, foreign_state
from folio.checkpoints.torch_files import StoredTensor, number, unfit
from folio.config.compose import checked_value, model_config
from folio.config.options import TrainConfig
from folio.config.table import options_with, table
from folio.data.folders import open_folder
from folio.data.meta_files import read_meta_pkl
from folio.data.pickled_values import Fields, fields_of
from folio.data.pickles import shown
from folio.data.token_files import CLONE, GPT2, GPT2_SIZES, META, META_PKL
from folio.data.tokenizers import IDS_ONLY
from folio.errors import UserError
from folio.model.config import GPTConfig

_CONFIG_CLASSES = ("__main__.GPTConfig", "train_gpt2.GPTConfig", "gpt_from_scratch.models.utils.GPTConfig")
_PREFIXES = ("_orig_mod.", "module.")  # of torch.compile and DDP
_BUFFER = re.compile(r"\.attn\.(bias|masked_bias)$")  # causal masks of old versions
_SLOTS = {"step", "exp_avg", "exp_avg_sq"}  # AdamW's
_NAMES = {  # GPT-from-scratch's names → ours
    "gpt.t_embedding.": "transformer.wte.",
    "gpt.p_embedding.": "transformer.wpe.",
    "gpt.transformers.": "transformer.h.",
    ".norm1.": ".ln_1.",
    ".mha.qkv.": ".attn.c_attn.",
    ".mha.proj.": ".attn.c_proj.",
    ".norm2.": ".ln_2.",
    ".ff.layers.0.": ".mlp.c_fc.",
    ".ff.final_l.": ".mlp.c_proj.",
    "gpt.final_ln.": "transformer.ln_f.",
    "gpt.ln_out.": "lm_head.",
}


@dataclass(frozen=True)
class PtFile(Checkpoint):
    """A checkpoint in one file of ``torch.save``; its tensors are read one at a time, on demand."""

    tensors: dict[str, StoredTensor] = field(default_factory=dict, repr=False)  # in the order of the model's parameters
    optimizer: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def _stored(self) -> Tensors:
        yield from _loaded(self.path, self.tensors)

    def slots(self) -> Tensors:
        """AdamW's tensors. The file numbers its parameters: first those of two and more dimensions, then the others."""
        names = sorted(self.tensors, key=lambda name: len(self.tensors[name].shape) < 2)
        found: dict[str, StoredTensor | float] = {}
        try:
            for key, slots in self.optimizer.get("state", {}).items():
                if key not in range(len(names)) or slots.keys() != _SLOTS:
                    raise UserError(f"of parameter {shown(key)} it has {', '.join(map(shown, slots))[:80]}")
                for slot, value in slots.items():
                    name = f"{names[key]}/{slot}"
                    if isinstance(value, StoredTensor) and (reason := unfit(value)):
                        raise UserError(f"{name} is {reason}")
                    value = value if isinstance(value, StoredTensor) else float(number(value))
                    shape = value.shape if isinstance(value, StoredTensor) else ()
                    if shape != (() if slot == "step" else self.tensors[names[key]].shape):
                        raise UserError(f"{slot} of {names[key]} has the shape {tuple(shape)}")
                    found[name] = value
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
            raise UserError(
                f"{self.path}: its optimizer does not fit its model: {error}; --init_from={self.path} "
                "loads the weights alone"
            ) from None
        yield from ((name, torch.tensor(v)) for name, v in found.items() if not isinstance(v, StoredTensor))
        stored = {name: v for name, v in found.items() if isinstance(v, StoredTensor)}
        yield from ((name, tensor.float()) for name, tensor in _loaded(self.path, stored))

    def _tokenizer_remedy(self) -> str:
        return "put nanoGPT's meta.pkl, or the meta.json of its data set, beside the file"


def read(path: Path) -> PtFile:
    """The checkpoint in a ``.pt`` file; no code in it is run.

    Raises:
        ValueError: it is damaged, was not written by one of these programs, or names code to run.
    """
    content = torch_files.load(path, dict.fromkeys(_CONFIG_CLASSES, fields_of))
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise _foreign(path, "it holds no model")
    try:
        if "model_args" in content:
            shape, step, loss = _nanogpt(content)
        elif isinstance(content.get("config"), Fields):
            shape, step, loss = _of_config_class(content)
        else:
            raise UserError(f"it has {', '.join(sorted(map(shown, content)))[:80] or 'nothing'}")
        for name, value in shape.items():
            if not isinstance(value, (bool, int, float, str)) or len(str(value)) > 100:
                raise UserError(f"{shown(name)} is not a number")
        if not 0 <= step < 2**53:
            raise UserError(f"its step is {step}")
    except (TypeError, AttributeError, LookupError, ValueError, ArithmeticError, RuntimeError) as error:
        raise _foreign(path, f"{type(error).__name__} {error}") from None
    config = model_config(path, shape)
    found = _tensors(path, content["model"], config)
    asked = _asked(path, content.get("config"))
    rows = asked.get("gradient_accumulation_steps", 0) * asked.get("batch_size", 0)
    best = loss if loss is not None and math.isfinite(loss) else None
    known = State(
        step=step,
        rows=step * rows,
        tokens=step * rows * config.block_size,
        val_loss=best,
        best=None if best is None else {"step": step, "loss": best},
    )
    try:
        State.of(asdict(known))
    except ValueError as error:
        raise _foreign(path, str(error)) from None
    state = foreign_state(config, _tokenizer(path, config, asked.get("dataset", "")), known)
    made = PtFile(path, state, {**asked, **shape}, found, content.get("optimizer") or {})
    for _ in made.fitting(found.items()):  # checks them all
        pass
    return made


def tensors(path: Path, wanted: Callable[[str], bool]) -> Tensors:
    """The tensors of these names in a file that holds nothing else, such as ``pytorch_model.bin``.

    Raises:
        ValueError: as ``read``, or a tensor is not a weight.
    """
    content = torch_files.load(path)
    if not isinstance(content, dict) or not all(isinstance(tensor, StoredTensor) for tensor in content.values()):
        raise UserError(f"{path}: it holds more than weights by name")
    found = {name: tensor for name, tensor in content.items() if isinstance(name, str) and wanted(name)}
    for name, tensor in found.items():
        if reason := unfit(tensor):
            raise UserError(f"{path}: {name[:100]} is {reason}, not of floating-point numbers as a weight is")
    yield from _loaded(path, found)


def _loaded(path: Path, stored: Mapping[str, StoredTensor]) -> Tensors:
    """Reads one tensor at a time, in the order that needs the least memory and time."""
    for name, tensor in sorted(stored.items(), key=lambda item: item[1].sort_key()):
        try:
            whole = tensor.load()
        except (ValueError, OSError, zipfile.BadZipFile, zlib.error) as error:  # it was changed after it was verified
            raise UserError(f"{path} is damaged: {name}: {error}") from None
        yield name, whole


def _foreign(path: Path, why: str) -> UserError:
    return UserError(f"{path}: not a checkpoint of nanoGPT, build-nanogpt or GPT-from-scratch: {why}")


def _nanogpt(content: dict[str, Any]) -> tuple[dict[str, Any], int, float | None]:
    """The shape, the number of updates, and the best validation loss."""
    shape: dict[str, Any] = {"bias": True}
    for name, value in content["model_args"].items():
        shape[name] = number(value) if isinstance(value, (StoredTensor, list)) else value
    best = content.get("best_val_loss")
    return shape, int(number(content.get("iter_num", 0))), None if best is None else float(number(best))


def _of_config_class(content: dict[str, Any]) -> tuple[dict[str, Any], int, float | None]:
    """As ``_nanogpt``, for the programs that pickle their config: build-nanogpt and GPT-from-scratch."""
    loss = content.get("val_loss")
    best = None if loss is None else float(number(loss))
    config = content["config"]
    if not all(isinstance(value, (int, float)) for value in config.values()):
        raise UserError("its config holds more than numbers")
    if "emb_dim" not in config:
        return {**config, "bias": True, "activation": "gelu_tanh"}, int(number(content.get("step", 0))), best
    shape = {
        "block_size": config["context_length"],
        "vocab_size": config["vocab_size"],
        "n_layer": config["n_layers"],
        "n_head": config["n_heads"],
        "n_embd": config["emb_dim"],
        "dropout": config["drop_rate"],
        "bias": True,
        "qkv_bias": config["qkv_bias"],
        "activation": "gelu_tanh",
        "tie_weights": False,
    }
    slots = (content.get("optimizer") or {}).get("state", {})  # its ``iter`` starts from zero with each epoch
    return shape, int(number(slots[0]["step"]) if slots else number(content["iter"]) + 1), best


def _tensors(path: Path, raw: dict[Any, Any], config: GPTConfig) -> dict[str, StoredTensor]:
    """The tensors by our names, in the file's order, which is that of the model's parameters."""
    found = {}
    for name, tensor in raw.items():
        if not isinstance(name, str) or len(name) > 200 or not isinstance(tensor, StoredTensor):
            raise _foreign(path, f"{shown(name)} is not a weight")
        while name.startswith(_PREFIXES):
            name = name.partition(".")[2]
        for theirs, ours in _NAMES.items():
            name = name.replace(theirs, ours)
        if _BUFFER.search(name) or (config.tie_weights and name == "lm_head.weight"):
            continue
        if reason := unfit(tensor):
            raise UserError(f"{path}: {name} is {reason}, not of floating-point numbers as a weight is")
        if name in found:
            raise _foreign(path, f"it holds {name} twice")
        found[name] = tensor
    return found


def _asked(path: Path, config: Any) -> dict[str, Any]:
    """nanoGPT's options of the run, without those about its machine or about one call."""
    if not isinstance(config, dict):
        return {}
    passed_over = options_with(TrainConfig, role="machine") | options_with(TrainConfig, role="call")
    kept = {}
    for name in table(TrainConfig):
        if name in config and name not in passed_over:
            value = config[name]
            if isinstance(value, float) and value.is_integer():
                value = int(value)  # max_iters = 6e5
            with contextlib.suppress(ValueError):  # nanoGPT checks no types
                kept[name] = checked_value(path, name, value)
    return {**kept, "warmup": "nanogpt"}


def _tokenizer(path: Path, config: GPTConfig, dataset: str) -> dict[str, Any] | None:
    """The tokenizer of the ``meta.pkl`` beside the file or in the data set's folder, else GPT-2's if its size fits.

    The ``meta.json`` of a data set that Folio prepared under that name is used too.
    """
    named = len(dataset) < 200 and files.is_name(dataset)
    for folder in (path.parent, *(base / "data" / dataset for base in (Path(), CLONE) if named)):
        if (pickled := folder / META_PKL).is_file():
            size, found = read_meta_pkl(pickled)
            if size == config.vocab_size:
                return None if found == IDS_ONLY else found
        elif (folder / META).is_file():
            with contextlib.suppress(ValueError, OSError):  # the model can be read without its data
                data = open_folder(folder)
                if data.vocab_size == config.vocab_size:
                    return data.tokenizer
    return GPT2 if config.vocab_size in GPT2_SIZES else None
