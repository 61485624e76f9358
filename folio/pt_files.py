"""Checkpoints that other trainers wrote with ``torch.save``, read as they lie and with nothing in them run.

nanoGPT's ``ckpt.pt``, with its optimiser; build-nanogpt's ``model_*.pt``; GPT-from-scratch's
``model_epoch*_iter*.pt``, with its optimiser.
"""

from __future__ import annotations

import contextlib
import math
import pickle
import re
import warnings
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from folio import checkpoint
from folio.checkpoint import Checkpoint, State, Tensors
from folio.config import OF_THE_CALL, Processes, System, TrainConfig, knobs, model_config, typed
from folio.model import GPTConfig
from folio.token_files import CLONE, GPT2, GPT2_SIZES, META, META_PKL, open_folder, read_meta_pkl

NANOGPT = "ckpt.pt"
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
    """A checkpoint in one file of ``torch.save``; its tensors are mapped, not loaded."""

    tensors: dict[str, Tensor] = field(default_factory=dict, repr=False)  # in the order of the model's parameters
    optimizer: dict[str, Any] = field(default_factory=dict, repr=False)

    def _stored(self) -> Tensors:
        yield from self.tensors.items()

    def slots(self) -> Tensors:
        """AdamW's tensors, which are numbered: those of two and more dimensions first, then the others."""
        names = sorted(self.tensors, key=lambda name: self.tensors[name].dim() < 2)
        try:
            for number, slots in self.optimizer.get("state", {}).items():
                if number not in range(len(names)) or slots.keys() != _SLOTS:
                    raise ValueError(f"of parameter {number} it holds {', '.join(map(str, slots))}")
                for slot, value in slots.items():
                    tensor = torch.as_tensor(value, dtype=torch.float32)
                    if tensor.shape != (() if slot == "step" else self.tensors[names[number]].shape):
                        raise ValueError(f"{slot} of {names[number]} has the shape {tuple(tensor.shape)}")
                    yield f"{names[number]}/{slot}", tensor
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise ValueError(
                f"{self.path}: its optimiser does not fit its model: {error}; --init_from={self.path} "
                "takes the weights alone"
            ) from None


class _PlainFields:
    """Takes the place of a peer's pickled config class: its fields, if they are numbers, and no code."""

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict) or not all(isinstance(v, (bool, int, float)) for v in state.values()):
            raise pickle.UnpicklingError("its config holds more than numbers")
        self.__dict__.update(state)


def read(path: Path) -> PtFile:
    """The checkpoint in a ``.pt`` file, by torch's restricted unpickler.

    Raises:
        ValueError: it is damaged, of another program, or names code to run, which is not run.
    """
    content = _load(path)
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise _foreign(path, "it holds no model")
    try:
        if "model_args" in content:
            shape, step, loss = _nanogpt(content)
        elif isinstance(content.get("config"), _PlainFields):
            shape, step, loss = _of_config_class(content)
        else:
            raise ValueError(f"it holds {', '.join(sorted(map(str, content)))[:80] or 'nothing'}")
        if step < 0:
            raise ValueError(f"its step is {step}")
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
    state = checkpoint.state_of_elsewhere(config, _tokenizer(path, config, asked.get("dataset", "")), known)
    made = PtFile(path, state, {**asked, **shape}, found, content.get("optimizer") or {})
    for _ in made.weights():  # checks them all, though they are only mapped
        pass
    return made


def tensors(path: Path) -> Tensors:
    """The tensors of a file that holds nothing else, such as ``pytorch_model.bin``; raises ValueError as ``read``."""
    content = _load(path)
    if not isinstance(content, dict) or not all(isinstance(n, str) and _is_weight(t) for n, t in content.items()):
        raise ValueError(f"{path}: it holds more than weights by name")
    yield from content.items()


def _load(path: Path) -> Any:
    allowed = [(_PlainFields, name) for name in _CONFIG_CLASSES]
    try:
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings():  # type: ignore[arg-type]
            warnings.simplefilter("ignore")  # torch's of unusual pickles
            return torch.load(path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError:
        raise
    except Exception as error:  # damaged files raise anything
        if named := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(f"{path}: refused: it asks for {named[1]}, which would run code") from None
        text = str(error).partition("WeightsUnpickler error: ")[2] or str(error)  # the rest is advice
        reason = (text.strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is damaged, or no file of torch.save: {reason}") from None


def _is_weight(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided


def _foreign(path: Path, why: str) -> ValueError:
    return ValueError(f"{path}: not a checkpoint of nanoGPT, build-nanogpt or GPT-from-scratch: {why}")


def _nanogpt(content: dict[str, Any]) -> tuple[dict[str, Any], int, float | None]:
    """The shape, the updates that were made, the best validation loss."""
    shape = {"bias": True, **content["model_args"]}
    best = content.get("best_val_loss")
    return shape, int(content.get("iter_num", 0)), None if best is None else float(best)


def _of_config_class(content: dict[str, Any]) -> tuple[dict[str, Any], int, float | None]:
    """The same of the two that pickle their config: build-nanogpt, and GPT-from-scratch under other names."""
    loss = content.get("val_loss")
    best = None if loss is None else float(loss)
    config = vars(content["config"])
    if "emb_dim" not in config:
        return {**config, "bias": True, "activation": "gelu_tanh"}, int(content.get("step", 0)), best
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
    slots = (content.get("optimizer") or {}).get("state", {})  # its own count begins anew with each epoch
    return shape, int(slots[0]["step"]) if slots else int(content["iter"]) + 1, best


def _tensors(path: Path, raw: dict[str, Any], config: GPTConfig) -> dict[str, Tensor]:
    """Our names and the tensors, in the file's order, which is that of the model's parameters."""
    found = {}
    for name, tensor in raw.items():
        if not isinstance(name, str) or not _is_weight(tensor):
            raise _foreign(path, f"{name!r} is no weight")
        while name.startswith(_PREFIXES):
            name = name.partition(".")[2]
        for theirs, ours in _NAMES.items():
            name = name.replace(theirs, ours)
        if not _BUFFER.search(name) and not (config.tie_weights and name == "lm_head.weight"):
            found[name] = tensor.detach()
    return found


def _asked(path: Path, config: Any) -> dict[str, Any]:
    """Those of nanoGPT's knobs that tell of the run, and not of the machine it was on."""
    if not isinstance(config, dict):
        return {}
    passed_over = {*knobs(System), *knobs(Processes), *OF_THE_CALL}
    kept = {}
    for name in knobs(TrainConfig):
        if name in config and name not in passed_over:
            value = config[name]
            if isinstance(value, float) and value.is_integer():
                value = int(value)  # max_iters = 6e5
            with contextlib.suppress(ValueError):  # nanoGPT checks no types
                kept[name] = typed(path, name, value, TrainConfig)
    return {**kept, "warmup": "nanogpt"}


def _tokenizer(path: Path, config: GPTConfig, dataset: str) -> dict[str, Any] | None:
    """What ``meta.pkl`` says, beside the file or in the folder of the data set; else GPT-2's if it fits.

    A data set that this program prepared under that name serves as well.
    """
    for folder in (path.parent, *(base / "data" / dataset for base in (Path(), CLONE) if dataset)):
        if (pickled := folder / META_PKL).is_file():
            size, found = read_meta_pkl(pickled)
            if size == config.vocab_size:
                return found
        elif (folder / META).is_file():
            with contextlib.suppress(ValueError, OSError):  # whatever is wrong with the data, this is about the model
                data = open_folder(folder)
                if data.vocab_size == config.vocab_size:
                    return data.tokenizer
    return GPT2 if config.vocab_size in GPT2_SIZES else None
