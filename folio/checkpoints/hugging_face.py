"""Models in the form of Hugging Face transformers: GPT-2 imported from a folder; GPT-2 and NanoChat exported to one.

Weights are read one tensor at a time, from safetensors or files of ``torch.save`` (``folio.checkpoints.torch_files``).
No code that a folder contains is run. transformers is only used to write configs and tokenizer files.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from folio import __version__, files
from folio.checkpoints import model_card, pt_files, safetensors_files
from folio.checkpoints.checkpoint import Checkpoint
from folio.checkpoints.exportable import Architecture, cast, complete_weights, fitting_tokenizer, require
from folio.checkpoints.gpt2 import GPT2, converted
from folio.checkpoints.nanochat import NANOCHAT
from folio.checkpoints.safetensors_files import Tensors
from folio.checkpoints.state import State, foreign_state
from folio.config.compose import model_config
from folio.config.options import TrainConfig
from folio.config.table import options_with
from folio.config.values import convert
from folio.data import tokenizer_folder
from folio.data.tokenizers import Tokenizer
from folio.errors import UserError
from folio.model.config import GPTConfig

_BUFFERS = (".attn.bias", ".attn.masked_bias")  # causal masks
_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
_FIXED = {  # GPT-2's values of settings that Folio's model does not have
    "model_type": "gpt2",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "position_embedding_type": "absolute",
}
_OF_OTHERS = re.compile(  # keys of other architectures, and of quantized or pruned weights
    r"rope|rotary|alibi|rms_?norm|norm_type|qk_norm|sliding|window|key_value_heads|multi_query|kv_heads|expert|softcap"
    r"|parallel_residual|attention_types|quantization|pruned_heads|sparsity"
)
_IN_ITS_FILE = {"kind": "tokenizers"}  # in place of a tokenizer that is in tokenizer.json
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_PUBLIC = options_with(TrainConfig, public=True)


def weight_files(folder: Path) -> list[Path]:
    """The files of a model's weights, safetensors if there are any.

    Raises:
        ValueError: an index that cannot be read, or names files of other folders.
    """
    for base in _WEIGHTS:
        if (folder / base).exists():
            return [folder / base]
        index = folder / f"{base}.index.json"
        if index.exists():
            raw = files.read_json(index)
            try:
                names = sorted(set(raw["weight_map"].values()))
                if not all(map(files.is_name, names)):
                    raise UserError("it names files of other folders")
                if odd := [name for name in names if not name.endswith(Path(base).suffix)]:
                    raise UserError(f"it names {odd[0][:80]!r}, which is no {Path(base).suffix} file")
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise UserError(f"{index}: not an index of weights: {error}") from None
            return [folder / name for name in names]
    return []


# Import


@dataclass(frozen=True)
class HuggingFace(Checkpoint):
    """A folder as transformers' ``save_pretrained`` writes it, of a GPT-2 in the language modelling form."""

    def _stored(self) -> Tensors:
        left_out = self.parameters(bias=True, qkv_bias=True).keys() - self.parameters().keys()
        if self.config().tie_weights:
            left_out |= {"lm_head.weight"}

        def wanted(name: str) -> bool:
            return not (name.endswith(_BUFFERS) or _our_name(name) in left_out)

        for file in weight_files(self.path):
            read = safetensors_files.read if file.suffix == ".safetensors" else pt_files.tensors
            yield from converted((_our_name(name), tensor) for name, tensor in read(file, wanted))

    def slots(self) -> Tensors:
        yield from ()

    def _tokenizer_remedy(self) -> str:
        return tokenizer_folder.lack(self.path)


def _our_name(name: str) -> str:
    return name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"


def read(folder: Path, assumed: dict[str, Any] | None = None) -> HuggingFace:
    """The model in a folder with ``config.json`` and weights; ``assumed`` is its tokenizer if the folder has none.

    Raises:
        FileNotFoundError: a file is missing. ValueError: it is not a GPT-2, or uses an option that is not
            supported; names the option.
    """
    path = folder / "config.json"
    for needed in (path, *(weight_files(folder) or [folder / _WEIGHTS[0]])):
        if not needed.exists():
            raise FileNotFoundError(f"{needed} is missing: the folder is not a whole model")
        files.require_file(needed)
    raw = files.read_json(path)
    if not isinstance(raw, dict) or not isinstance(kept := raw.get("folio") or {}, dict):
        raise UserError(f"{path}: not a model's config: it is not a JSON object")
    shape = _shape(path, raw)
    tokenizer = _tokenizer(folder, kept) or assumed
    if not kept:
        return HuggingFace(folder, foreign_state(shape, tokenizer))
    try:
        was, state = model_config(path, kept["model"]), State.of(kept["state"])
        known = model_card.checked(kept.get("facts", {}))
        public = {name: value for name, value in kept["asked"].items() if name in _PUBLIC}
        asked = {name: convert(path, name, value, TrainConfig) for name, value in public.items()}
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise UserError(
            f"{path}: its entry 'folio' is damaged ({type(error).__name__} {error}): remove that entry"
        ) from None
    shape = replace(shape, dropout=was.dropout, zero_init=was.zero_init)
    found = HuggingFace(folder, {**foreign_state(shape, tokenizer, state), "facts": known}, asked)
    trained = {name for name, weight in found.weights() if name.endswith(".bias") and weight.any()}
    biases = {"bias": was.bias, "qkv_bias": was.qkv_bias}
    if trained <= found.parameters(**biases).keys():
        return replace(found, state={**found.state, "model": {**found.state["model"], **biases}})
    return found  # another program trained its biases


def _shape(path: Path, raw: dict[str, Any]) -> GPTConfig:
    """Our config from the keys of transformers' ``GPT2Config``; a missing key has the default of that class."""
    if raw.get("model_type") == NANOCHAT.model_type:
        raise UserError(
            f"{path}: model_type = {NANOCHAT.model_type!r}: Folio exports NanoChat models but cannot import them, "
            "since their norms are not Folio's: use the out_dir of the run"
        )
    for key, ours in _FIXED.items():
        if raw.get(key, ours if key != "model_type" else None) != ours:
            raise UserError(f"{path}: {key} = {repr(raw.get(key))[:80]}: only GPT-2's {ours!r} can be read")
    for key, value in raw.items():
        if value and key not in _FIXED and _OF_OTHERS.search(key):
            raise UserError(f"{path}: {key} = {repr(value)[:80]}: neither GPT-2 nor Folio supports it")
    activation = str(raw.get("activation_function", "gelu_new"))
    if activation not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise UserError(f"{path}: activation_function = {activation[:80]!r}: only {known} can be read")
    shape = {
        "block_size": raw.get("n_positions", 1024),
        "vocab_size": raw.get("vocab_size", 50257),
        "n_layer": raw.get("n_layer", 12),
        "n_head": raw.get("n_head", 12),
        "n_embd": raw.get("n_embd", 768),
        "activation": _ACTIVATIONS[activation],
        "tie_weights": raw.get("tie_word_embeddings", True),
    }
    for key, value in shape.items():
        if len(repr(value)) > 80:
            raise UserError(f"{path}: {key} = {repr(value)[:80]} …: no number is that long")
    config = model_config(path, shape)
    if raw.get("n_inner") not in (None, 4 * config.n_embd):
        raise UserError(f"{path}: n_inner = {repr(raw['n_inner'])[:80]}: only 4 × n_embd can be read")
    return config


def _tokenizer(folder: Path, kept: dict[str, Any]) -> dict[str, Any] | None:
    """The tokenizer that an export kept, else the one in the folder's files."""
    if kept and (spec := kept.get("tokenizer")) != _IN_ITS_FILE:
        if spec is not None and not (isinstance(spec, dict) and isinstance(spec.get("kind"), str)):
            raise UserError(
                f"{folder / 'config.json'}: the tokenizer in its entry 'folio' is not valid: remove that entry"
            )
        return spec
    return tokenizer_folder.read(folder)


# Export


def export(found: Checkpoint, folder: Path, dtype: str = "float32", name: str = "") -> None:
    """Writes a folder that transformers' ``AutoModelForCausalLM`` and ``AutoTokenizer`` load.

    The model becomes a GPT-2, which ``find.by_name`` loads too, or a NanoChat, whichever lacks fewer of its options.
    Biases that it lacks are written as zeros; token ids beyond the tokenizer's are cut off. Our own config is kept
    under the key ``folio``, so that importing a GPT-2 and exporting it again gives the same files. ``name`` is the
    model's name in its card, by default the folder's.

    Raises:
        FileExistsError: the folder is not empty. ValueError: the model or its tokenizer cannot be expressed, or
            its numbers are not finite in ``dtype``.
        OSError: the disk is full or not writable; nothing is left of the attempt.
    """
    architecture = min((GPT2, NANOCHAT), key=lambda known: len(known.lacks(found.config())))
    shape, tokenizer = require(found, architecture), fitting_tokenizer(found)
    size = tokenizer.size if tokenizer else shape.vocab_size
    assert isinstance(size, int)
    asked = _public(found.asked)
    configs = _configs(found, architecture, size, tokenizer, dtype, asked)
    weights = {
        name: cast(found, name, weight, dtype).contiguous()
        for name, weight in architecture.converted(complete_weights(found, architecture, size))
    }
    with files.written_atomically(folder) as unfinished:
        files.make_folder(unfinished)
        files.write_with(unfinished / "model.safetensors", partial(save_file, weights, metadata={"format": "pt"}))
        for config in configs:
            config.save_pretrained(unfinished)
        # safetensors makes a file that only its owner can read
        shutil.copymode(unfinished / "config.json", unfinished / "model.safetensors")
        text = model_card.card(found, architecture, name or folder.name, size, tokenizer, asked)
        files.write(unfinished / "README.md", text.encode())


def _configs(
    found: Checkpoint,
    architecture: Architecture,
    size: int,
    tokenizer: Tokenizer | None,
    dtype: str,
    asked: dict[str, Any],
) -> list[Any]:
    """transformers' objects that are saved beside the weights: the configs of model and generation, the tokenizer."""
    from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedTokenizerFast

    config, eot = found.config(), tokenizer.eot if tokenizer else None
    if architecture.model_type not in CONFIG_MAPPING:
        raise UserError(f"this transformers does not have {architecture.name}: pip install --upgrade transformers")
    model = CONFIG_MAPPING[architecture.model_type](
        **architecture.settings(config),
        vocab_size=size,
        bos_token_id=eot,
        eos_token_id=eot,
        tie_word_embeddings=config.tie_weights,
        dtype=dtype,
        folio={
            "version": __version__,
            "model": {**found.state["model"], "vocab_size": size},
            "tokenizer": _kept_tokenizer(found.state["tokenizer"]),
            "state": {f.name: found.state[f.name] for f in fields(State)},
            "facts": model_card.facts(found),
            "asked": asked,
        },
    )
    made = [model, GenerationConfig(bos_token_id=eot, eos_token_id=eot)]
    if tokenizer:
        fast = tokenizer.fast()
        end = None if eot is None else fast.id_to_token(eot)
        made.append(
            PreTrainedTokenizerFast(
                tokenizer_object=fast, model_max_length=config.block_size, bos_token=end, eos_token=end
            )
        )
    return made


def _kept_tokenizer(spec: dict[str, Any] | None) -> dict[str, Any] | None:
    return _IN_ITS_FILE if spec and spec["kind"] == "tokenizers" else spec


def _public(asked: dict[str, Any]) -> dict[str, Any]:
    """The options of a run that may be published: no paths, and no data set that was not used."""
    other_data = asked.get("data_dir") or asked.get("data_mixture")
    public = {k: v for k, v in asked.items() if k in _PUBLIC and not (k == "dataset" and other_data)}
    return public | ({"dataset": Path(public["dataset"]).name} if public.get("dataset") else {})
