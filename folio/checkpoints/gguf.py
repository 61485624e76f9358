"""A model as a GGUF file, under llama.cpp's names for GPT-2: written by the gguf library."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from folio import files
from folio.checkpoints.checkpoint import Checkpoint
from folio.checkpoints.exportable import cast, complete_weights, fitting_tokenizer, require
from folio.checkpoints.gpt2 import GPT2
from folio.checkpoints.nanochat import NANOCHAT
from folio.data.tokenizers import END_OF_TEXT, Bytes, Characters, Tokenizer, byte_characters
from folio.errors import UserError

_NO_MERGE = "\u2581 \u2581"  # occurs in no text: llama.cpp needs a list of merges, and the library writes no empty list
_TYPES = {"float32": ("F32", 0), "float16": ("F16", 1), "bfloat16": ("BF16", 32)}  # llama.cpp's, of tensor and file


def export(found: Checkpoint, path: Path, dtype: str = "float32") -> None:
    """Writes a file that llama.cpp runs. Matrices are in ``dtype``; it needs vectors and positions in float32.

    Biases that the model lacks are written as zeros; token ids beyond the tokenizer's are cut off. llama.cpp needs
    a token to stop at: a tokenizer without an end-of-text gets one, as its last id.

    Raises:
        FileExistsError: the file exists. ValueError: the tokenizer is unknown, or not of byte pairs like GPT-2's; the
            model is not expressible, or has numbers that are not finite in ``dtype``.
        OSError: the disk is full or not writable; nothing is left of the attempt.
    """
    import gguf

    tokenizer = fitting_tokenizer(found)
    if tokenizer is None:
        raise UserError(
            f"{found.path}: nothing says what its token ids mean, and a GGUF file needs the tokenizer: "
            "export a folder, --to=FOLDER"
        )
    folder_fits = not NANOCHAT.lacks(found.config())
    config = require(found, GPT2, "export a folder, --to=FOLDER" if folder_fits else "")
    tensors = dict(_tensors(found, tokenizer, dtype))
    if config.activation == "gelu":
        warnings.warn(
            "activation=gelu is exact, llama.cpp computes gelu_tanh: its logits will differ a little",
            stacklevel=2,
        )
    tokens, types, merges = _vocabulary(tokenizer)
    with files.written_atomically(path) as unfinished:
        writer = gguf.GGUFWriter(unfinished, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.GPT2])
        writer.add_name(path.stem)
        writer.add_block_count(config.n_layer)
        writer.add_context_length(config.block_size)
        writer.add_embedding_length(config.n_embd)
        writer.add_feed_forward_length(4 * config.n_embd)
        writer.add_head_count(config.n_head)
        writer.add_layer_norm_eps(1e-5)
        writer.add_file_type(_TYPES[dtype][1])
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_merges(merges)
        eot = tokenizer.size if tokenizer.eot is None else tokenizer.eot
        writer.add_bos_token_id(eot)
        writer.add_eos_token_id(eot)
        for name, (content, kind) in tensors.items():
            writer.add_tensor(name, content.view(_Checked), raw_dtype=kind)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


class _Checked(np.ndarray[Any, Any]):
    """An array whose ``tofile`` raises if the disk is full. NumPy's does not: C's stdio buffers the last bytes."""

    def tofile(self, file: Any, sep: str = "", format: str = "%s") -> None:
        file.write(self.data)


def _tensors(found: Checkpoint, tokenizer: Tokenizer, dtype: str) -> Iterator[tuple[str, tuple[NDArray[Any], Any]]]:
    """llama.cpp's name, numbers and type of each tensor of the file."""
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, found.config().n_layer)
    for name, weight in complete_weights(found, GPT2, tokenizer.size):
        theirs = names.get_name(name, (".weight", ".bias"))
        assert theirs
        vector = weight.dim() < 2 or name == "transformer.wpe.weight"
        cast(found, name, weight, "float32" if vector else dtype)  # raises if a number is not finite
        if name in ("transformer.wte.weight", "lm_head.weight") and tokenizer.eot is None:
            weight = torch.cat([weight, weight.mean(0, keepdim=True)])
        kind = gguf.GGMLQuantizationType[_TYPES["float32" if vector else dtype][0]]
        yield theirs, (gguf.quants.quantize(weight.float().contiguous().numpy(), kind), kind)


def _vocabulary(tokenizer: Tokenizer) -> tuple[list[str], list[int], list[str]]:
    """The text of each id, its type, and the merges, as byte pairs in GPT-2's printable characters."""
    import gguf

    if isinstance(tokenizer, Characters):
        shown = byte_characters()
        tokens = ["".join(shown[b] for b in c.encode()) for c in tokenizer.characters]
        merges = [f"{token[:i]} {token[i]}" for token in tokens for i in range(1, len(token))]
        types = [int(gguf.TokenType.NORMAL)] * len(tokens)
    else:
        spec = json.loads(tokenizer.fast().to_str())
        words = spec["pre_tokenizer"] or {}
        gpt2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": not isinstance(tokenizer, Bytes)}
        if spec["model"]["type"] != "BPE" or spec["normalizer"] or not gpt2.items() <= words.items():
            raise UserError(
                "the tokenizer splits text in another way than GPT-2's, which a GGUF file of GPT-2 cannot express: "
                "export a folder, --to=FOLDER"
            )
        added = {t["id"]: t for t in spec["added_tokens"]}
        by_id = {i: token for token, i in spec["model"]["vocab"].items()} | {i: t["content"] for i, t in added.items()}
        tokens = [by_id.get(i, f"[PAD{i}]") for i in range(tokenizer.size)]
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in spec["model"]["merges"]]
        kinds = dict.fromkeys(by_id, gguf.TokenType.NORMAL) | {
            i: gguf.TokenType.CONTROL if t["special"] else gguf.TokenType.USER_DEFINED for i, t in added.items()
        }
        types = [int(kinds.get(i, gguf.TokenType.UNUSED)) for i in range(tokenizer.size)]
    if tokenizer.eot is None:
        tokens.append(END_OF_TEXT[0])
        types.append(int(gguf.TokenType.CONTROL))
    return tokens, types, merges or [_NO_MERGE]
