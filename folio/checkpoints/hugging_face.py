"""GPT-2 models of other programs, in and out: OpenAI's weights, Hugging Face folders and the hub, ``.pt`` files.

Weights are read one tensor at a time, from safetensors or files of ``torch.save``
(``folio.checkpoints.torch_files``). No code that a folder brings is ever run. transformers only
writes: configs and tokenizer files.
"""

from __future__ import annotations

import difflib
import re
import shutil
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from folio import __version__, files
from folio.checkpoints import checkpoint, model_card, pt_files
from folio.checkpoints.checkpoint import Checkpoint, State, Tensors
from folio.config.compose import model_config
from folio.config.options import Source, TrainConfig
from folio.config.table import those
from folio.config.values import typed
from folio.data import tokenizer_folder
from folio.data.token_files import GPT2
from folio.data.tokenizers import Tokenizer
from folio.errors import UserError
from folio.model.config import GPTConfig
from folio.model.gpt import GPT
from folio.records import run_folder

OPENAI = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
# The key table, for both directions: parameters have the same names on both sides, but Hugging Face keeps these,
# of its Conv1D, as (in, out)
_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_BUFFERS = (".attn.bias", ".attn.masked_bias")  # causal masks
_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
_FIXED = {  # what GPT-2 is here and elsewhere, but not everywhere
    "model_type": "gpt2",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "position_embedding_type": "absolute",
}
_OF_OTHERS = re.compile(  # keys of other architectures, and of weights that are not whole
    r"rope|rotary|alibi|rms_?norm|norm_type|qk_norm|sliding|window|key_value_heads|multi_query|kv_heads|expert|softcap"
    r"|parallel_residual|attention_types|quantization|pruned_heads|sparsity"
)
_FIELDS = (  # of GPTConfig: what exporters know how to say
    *("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout"),
    *("bias", "qkv_bias", "activation", "tie_weights"),
)
_IN_ITS_FILE = {"kind": "tokenizers"}  # tokenizer.json
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_PUBLIC = those(TrainConfig, public=True)
_FILES = ["config.json", *tokenizer_folder.FILES, "model*.safetensors", "model.safetensors.index.json"]
_BIN_FILES = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]


def from_pretrained(name: str, override_args: dict[str, Any] | None = None) -> GPT:
    """The model of any source that ``find`` knows, in float32 on the CPU; dropout is 0 unless overridden.

    Matches nanoGPT's ``GPT.from_pretrained``, with OpenAI's tanh GELU where nanoGPT's is the exact one.

    Raises:
        ValueError: ``override_args`` names anything but dropout, or as ``find``. FileNotFoundError: as ``find``.
    """
    changes = {"dropout": 0.0, **(override_args or {})}
    if odd := sorted(changes.keys() - {"dropout"}):
        raise UserError(f"override_args: {odd[0]} is what the weights say, only dropout can be chosen")
    return find(name).model(**changes)


# Finding


def choose(source: Source) -> Checkpoint:
    """The model that a command was given; raises as ``find``."""
    if source.init_from == "resume":
        return in_folder(Path(source.out_dir), source.checkpoint)
    return find(source.init_from, source.checkpoint)


def find(name: str, which: str = "best") -> Checkpoint:
    """A model by name: an out_dir, a ``.pt`` file or its folder, a Hugging Face folder, a model of the hub.

    Raises:
        FileNotFoundError: there is none. ValueError: it is damaged, no GPT-2, or a pickle that asks for code.
    """
    try:
        path = Path(name).expanduser()
    except RuntimeError:
        raise FileNotFoundError(f"{name}: there is no such user") from None
    if path.is_dir():
        return in_folder(path, which)
    if path.suffix == ".pt":
        return _the_only(pt_files.read(path), which)
    if path.is_file():
        raise UserError(f"{path}: a model is a folder or a .pt file")
    by_name = GPT2 if name.removeprefix("openai-community/") in OPENAI else None
    return _the_only(hugging_face(_download(name), by_name), which)


def in_folder(path: Path, which: str = "best") -> Checkpoint:
    """An out_dir's checkpoint ``which`` (best, latest or a step), nanoGPT's ``ckpt.pt``, or a Hugging Face folder.

    Raises:
        FileNotFoundError, ValueError: as ``find``.
    """
    if not run_folder.steps(path):
        if (path / run_folder.NANOGPT).exists():
            return _the_only(pt_files.read(path / run_folder.NANOGPT), which)
        if _weight_files(path):
            return _the_only(hugging_face(path), which)
    return checkpoint.choose(path, which)


def _the_only(found: Checkpoint, which: str) -> Checkpoint:
    """Where there is one, it is the best and the latest; raises FileNotFoundError for another step."""
    if which not in ("best", "latest", str(found.step)):
        raise FileNotFoundError(f"no checkpoint {which!r} in {found.path}: there is one, of step {found.step}")
    return found


def _download(name: str) -> Path:
    """The folder of a model of the hub, from the hub's cache or, where it is not there, by the hub's library."""
    if close := difflib.get_close_matches(name, ("scratch", "resume", "auto"), n=1, cutoff=0.7):
        raise UserError(f"{name}: there is no such folder: did you mean {close[0]!r}?")
    if not re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", name):
        raise FileNotFoundError(f"{name}: there is no such file or folder")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError
    except ModuleNotFoundError:
        raise FileNotFoundError(
            f"{name}: there is no such file or folder; to ask the Hugging Face hub for it: pip install huggingface_hub"
        ) from None

    names = [f"openai-community/{name}", name] if name in OPENAI else [name]
    for cached in names:
        try:
            folder = Path(snapshot_download(cached, local_files_only=True))
        except LocalEntryNotFoundError:
            continue
        wanted = _weight_files(folder)
        if wanted and all(p.is_file() for p in (folder / "config.json", *wanted)):
            return folder
    try:
        folder = Path(snapshot_download(names[0], allow_patterns=_FILES))
        if not _weight_files(folder):
            folder = Path(snapshot_download(names[0], allow_patterns=[*_FILES, *_BIN_FILES]))
    except Exception as error:  # the library's, its client's and the network's
        raise FileNotFoundError(
            f"{name} is no file or folder here, nor in the cache of the Hugging Face hub, and it could not be fetched: "
            f"{_reason(error)}"
        ) from None
    return folder


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _weight_files(folder: Path) -> list[Path]:
    """The files that hold a model, safetensors if there are any.

    Raises:
        ValueError: an index that cannot be read, or names files elsewhere.
    """
    for base in _WEIGHTS:
        if (folder / base).exists():
            return [folder / base]
        index = folder / f"{base}.index.json"
        if index.exists():
            raw = files.read_json(index)
            try:
                names = sorted(set(raw["weight_map"].values()))
                if any(Path(name).name != name for name in names):
                    raise UserError("it names files elsewhere")
                if odd := [name for name in names if not name.endswith(Path(base).suffix)]:
                    raise UserError(f"it names {odd[0][:80]!r}, which is no {Path(base).suffix} file")
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise UserError(f"{index}: not an index of weights: {error}") from None
            return [folder / name for name in names]
    return []


# In


@dataclass(frozen=True)
class HuggingFace(Checkpoint):
    """A folder as transformers' ``save_pretrained`` writes it, of a GPT-2 in the language modelling form."""

    def _stored(self) -> Tensors:
        left_out = self.parameters(bias=True, qkv_bias=True).keys() - self.parameters().keys()
        if self.config().tie_weights:
            left_out |= {"lm_head.weight"}

        def wanted(name: str) -> bool:
            return not (name.endswith(_BUFFERS) or _our_name(name) in left_out)

        for file in _weight_files(self.path):
            for name, tensor in (
                checkpoint.read(file, wanted) if file.suffix == ".safetensors" else pt_files.tensors(file, wanted)
            ):
                yield _our_name(name), _turned(_our_name(name), tensor)

    def slots(self) -> Tensors:
        yield from ()

    def tokenizer(self) -> Tokenizer:
        if self.state["tokenizer"] is None:
            raise UserError(
                f"{self.path}: nothing says what its {self.config().vocab_size} token ids mean: "
                f"{tokenizer_folder.lack(self.path)}"
            )
        return super().tokenizer()


def _our_name(name: str) -> str:
    return name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"


def hugging_face(folder: Path, assumed: dict[str, Any] | None = None) -> HuggingFace:
    """The model in a folder with ``config.json`` and weights; its tokenizer is the ``assumed`` one if it has none.

    Raises:
        FileNotFoundError: a file is missing. ValueError: it is no GPT-2, or one with what GPT-2 here has not; names the
            option.
    """
    path = folder / "config.json"
    for needed in (path, *(_weight_files(folder) or [folder / _WEIGHTS[0]])):
        if not needed.exists():
            raise FileNotFoundError(f"{needed} is missing: the folder is not a whole model")
        files.require_file(needed)
    raw = files.read_json(path)
    if not isinstance(raw, dict) or not isinstance(kept := raw.get("folio") or {}, dict):
        raise UserError(f"{path}: not a model's config: it is not a JSON object")
    shape = _shape(path, raw)
    tokenizer = _tokenizer(folder, kept) or assumed
    if not kept:
        return HuggingFace(folder, checkpoint.state_of_elsewhere(shape, tokenizer))
    try:
        was, state = model_config(path, kept["model"]), State.of(kept["state"])
        known = model_card.checked(kept.get("facts", {}))
        told = {name: value for name, value in kept["asked"].items() if name in _PUBLIC}
        asked = {name: typed(path, name, value, TrainConfig) for name, value in told.items()}
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise UserError(f"{path}: 'folio': {type(error).__name__} {error}: take that part out") from None
    shape = replace(shape, dropout=was.dropout)
    found = HuggingFace(folder, {**checkpoint.state_of_elsewhere(shape, tokenizer, state), "facts": known}, asked)
    trained = {name for name, weight in found.weights() if name.endswith(".bias") and weight.any()}
    biases = {"bias": was.bias, "qkv_bias": was.qkv_bias}
    if trained <= found.parameters(**biases).keys():
        return replace(found, state={**found.state, "model": {**found.state["model"], **biases}})
    return found  # somebody trained its biases, elsewhere


def _shape(path: Path, raw: dict[str, Any]) -> GPTConfig:
    """Our shape from transformers' ``GPT2Config``; what is missing there has its defaults."""
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
    """What an export kept, else what the folder's files say."""
    if kept and (spec := kept.get("tokenizer")) != _IN_ITS_FILE:
        if spec is not None and not (isinstance(spec, dict) and isinstance(spec.get("kind"), str)):
            raise UserError(f"{folder / 'config.json'}: 'folio': its tokenizer is not valid: remove that part")
        return spec
    return tokenizer_folder.read(folder)


# Out


def export(found: Checkpoint, folder: Path, dtype: str = "float32", name: str = "") -> None:
    """Writes a folder that transformers' ``AutoModelForCausalLM`` and ``AutoTokenizer`` load, and ``find`` as well.

    Biases that the model has not are written as zeros; token ids beyond the tokenizer's are cut off; our own config
    is kept under the key ``folio``, so that importing and exporting again gives the same files. The model card calls it
    ``name``, by default as the folder.

    Raises:
        FileExistsError: the folder holds something. ValueError: the model or its tokenizer cannot be expressed, or
            its numbers are not finite in ``dtype``.
        OSError: the disk is full or not writable; nothing is left of the attempt.
    """
    from transformers import GenerationConfig, GPT2Config, PreTrainedTokenizerFast

    config, tokenizer = expressible(found), vocabulary(found)
    size = tokenizer.size if tokenizer else config.vocab_size
    assert isinstance(size, int)
    eot, asked = tokenizer.eot if tokenizer else None, _public(found.asked)
    theirs = GPT2Config(
        vocab_size=size,
        n_positions=config.block_size,
        n_embd=config.n_embd,
        n_layer=config.n_layer,
        n_head=config.n_head,
        activation_function="gelu_new" if config.activation == "gelu_tanh" else "gelu",
        resid_pdrop=config.dropout,
        embd_pdrop=config.dropout,
        attn_pdrop=config.dropout,
        bos_token_id=eot,
        eos_token_id=eot,
        tie_word_embeddings=config.tie_weights,
        architectures=["GPT2LMHeadModel"],
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
    weights = {
        name: _turned(name, rounded(found, name, weight, dtype)).contiguous() for name, weight in complete(found, size)
    }
    with files.appearing(folder) as unfinished:
        unfinished.mkdir()
        save_file(weights, unfinished / "model.safetensors", metadata={"format": "pt"})
        theirs.save_pretrained(unfinished)
        GenerationConfig(bos_token_id=eot, eos_token_id=eot).save_pretrained(unfinished)
        if tokenizer:
            fast = tokenizer.fast()
            end = None if eot is None else fast.id_to_token(eot)
            PreTrainedTokenizerFast(
                tokenizer_object=fast, model_max_length=config.block_size, bos_token=end, eos_token=end
            ).save_pretrained(unfinished)
        # safetensors lets nobody else read
        shutil.copymode(unfinished / "config.json", unfinished / "model.safetensors")
        text = model_card.card(found, name or folder.name, size, tokenizer, asked)
        (unfinished / "README.md").write_text(text, encoding="utf-8")


def expressible(found: Checkpoint) -> GPTConfig:
    """The model's config; raises ValueError where it has what GPT-2 has not, in the formats of other programs."""
    config = found.config()
    for f in fields(config):
        value = getattr(config, f.name)
        default = f.default if f.default_factory is MISSING else f.default_factory()
        known = f.name in _FIELDS and (f.name != "activation" or value in _ACTIVATIONS.values())
        if not known and value != default:
            raise UserError(
                f"{found.path}: {f.name}={value!r}: other programs' GPT-2 does not support it, so it cannot be exported"
            )
    return config


def rounded(found: Checkpoint, name: str, weight: Tensor, dtype: str) -> Tensor:
    """A parameter in another type; raises ValueError where one of its numbers is not finite there."""
    made = weight.to(getattr(torch, dtype))
    if made.isfinite().all():
        return made
    if not weight.isfinite().all():
        raise UserError(
            f"{found.path}: {(~weight.isfinite()).sum():,} numbers of {name} are not finite: "
            "export an earlier checkpoint"
        )
    raise UserError(
        f"{found.path}: {name} has a value of {weight.abs().max():g}, beyond {dtype}'s largest, "
        f"{torch.finfo(made.dtype).max:g}: export in another --dtype"
    )


def vocabulary(found: Checkpoint) -> Tokenizer | None:
    """The model's tokenizer, None where it is not known; raises ValueError where the model has too few ids for it."""
    spec, size = found.tokenizer_spec, found.config().vocab_size
    assert isinstance(size, int)
    if spec is None or spec.get("kind") == "datatrove":
        return None
    tokenizer = found.tokenizer()
    if tokenizer.size > size:
        raise UserError(
            f"{found.path}: its tokenizer has {tokenizer.size} token ids, its model {size}: they are of different runs"
        )
    return tokenizer


def complete(found: Checkpoint, vocab_size: int) -> Tensors:
    """The parameters as others want them: all biases, zeros if need be, and no token ids from ``vocab_size`` on."""
    wanted = found.parameters(bias=True, qkv_bias=True, vocab_size=vocab_size)
    for name, weight in found.weights():
        yield name, weight[: wanted.pop(name)[0]]
    for name, shape in wanted.items():
        yield name, torch.zeros(shape)


def _turned(name: str, weight: Tensor) -> Tensor:
    """Our layout to Hugging Face's, and back."""
    return weight.t() if name.endswith(_TRANSPOSED) else weight


def _kept_tokenizer(spec: dict[str, Any] | None) -> dict[str, Any] | None:
    return _IN_ITS_FILE if spec and spec["kind"] == "tokenizers" else spec


def _public(asked: dict[str, Any]) -> dict[str, Any]:
    """What may be told of a run: no paths, and no data set that was not used."""
    elsewhere = asked.get("data_dir") or asked.get("data_mixture")
    told = {k: v for k, v in asked.items() if k in _PUBLIC and not (k == "dataset" and elsewhere)}
    return told | ({"dataset": Path(told["dataset"]).name} if told.get("dataset") else {})


def check_hub_name(name: str) -> None:
    """Raises ValueError where the hub can have no such model."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"push_to_hub={name}: must be USER/NAME")


def push(folder: Path, name: str) -> str:
    """Uploads an exported folder as the hub's model ``USER/NAME``, and returns its address.

    Raises:
        OSError: no access, or no network; the folder stays as it is.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        repository = api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=repository.repo_id, folder_path=folder, commit_message="Upload model")
    except Exception as error:  # the library's, its client's and the network's
        raise OSError(
            f"{folder} is written, but was not pushed to {name}: {_reason(error)}; hf auth login gives access, "
            f"hf upload {name} {folder} tries again"
        ) from None
    return str(repository)
