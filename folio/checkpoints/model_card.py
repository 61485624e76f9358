"""The model card of an exported model: facts about the model and its run, and which of them are unknown."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from folio import __version__
from folio.checkpoints.checkpoint import Checkpoint
from folio.checkpoints.exportable import Architecture
from folio.data.decoding import decode
from folio.data.tokenizers import Tokenizer
from folio.errors import UserError
from folio.records.metrics import read_metrics
from folio.records.record import hellaswag_scores
from folio.records.run_folder import EVALUATIONS, METRICS

UNKNOWN = "not known"
_ACTIVATIONS = {"gelu": "exact GELU", "gelu_tanh": "tanh GELU", "relu2": "squared ReLU"}
_SETTINGS = ("learning_rate", "weight_decay", "batch_size", "gradient_accumulation_steps")
_PROMPTS = ("Once upon a time", "The", "a", " ")
_TOKENS = 50  # tokens that the card's program generates, if the context has room for them


def facts(found: Checkpoint) -> dict[str, str]:
    """The facts about a model that its state lacks: data, HellaSwag, which weights, seed and machine; no paths.

    A model that was imported from an export keeps the facts of that export.
    """
    if kept := found.state.get("facts"):
        return dict(kept)
    said = {
        "data": _data(found),
        "HellaSwag": _hellaswag(found),
        "weights": "moving averages over the steps" if found.averaged else "",
        "seed": str(found.asked["seed"]) if "seed" in found.asked else "",
        "machine": _machine(found.state["resolved"]),
    }
    return {what: value for what, value in said.items() if value}


def checked(facts: Any) -> dict[str, str]:
    """Returns facts from an untrusted file. Raises ValueError if they are not short lines of text."""
    if not isinstance(facts, dict):
        raise UserError("its facts are not an object")
    for what, value in facts.items():
        if not isinstance(value, str) or len(what + value) > 1000 or not (what + value).isprintable():
            raise UserError(f"its fact {what[:80]!r} is not a line of text")
    return facts


def _data(found: Checkpoint) -> str:
    """The names of the data sets that the run opened; for older checkpoints, of those in its options."""
    sources = found.state.get("sources")
    if sources:
        shares = [f", {source['share']:.0%} of the rows" if len(sources) > 1 else "" for source in sources]
        return "; ".join(
            f"{source['name']} ({source['tokens']:,} tokens to train on{share})"
            for source, share in zip(sources, shares, strict=True)
        )
    asked = found.asked
    names = [part.strip().rpartition("=")[0] for part in str(asked.get("data_mixture") or "").split(",")]
    paths = [Path(name) for name in names if name] or [Path(str(asked.get("data_dir") or asked.get("dataset") or ""))]
    return ", ".join((path.parent if set("*?[") & set(path.name) else path).name for path in paths)


def _hellaswag(found: Checkpoint) -> str:
    """The last HellaSwag result of this checkpoint, from its run or from folio eval."""
    said = ""
    if found.path.parent.name != "checkpoints":  # of a run's folder
        return said
    for path in (found.path.parents[1] / METRICS, found.path.parents[1] / EVALUATIONS):
        for record in read_metrics(path) if path.is_file() else []:
            weights = found.averaged == (record.get("weights") == "ema")
            if record["kind"] == "hellaswag" and record["step"] == found.step and weights:
                said = hellaswag_scores(record)
    return said


def _machine(resolved: dict[str, Any]) -> str:
    if "device" not in resolved:
        return ""
    world = resolved.get("world", 1)
    parts = [resolved["device"], resolved.get("processor"), resolved.get("dtype")]
    parts += [f"{world} processes" if world > 1 else "1 process"]
    parts += [f"PyTorch {resolved['torch']}"] if "torch" in resolved else []
    return ", ".join(str(part) for part in parts if part)


def card(
    found: Checkpoint,
    architecture: Architecture,
    name: str,
    vocab_size: int,
    tokenizer: Tokenizer | None,
    asked: dict[str, Any],
) -> str:
    """The text of ``README.md``; ``asked`` has the options of the run that may be published."""
    config, state, known = replace(found.config(), vocab_size=vocab_size), found.state, facts(found)
    parameters = sum(shape.numel() for shape in found.parameters(vocab_size=vocab_size).values())
    activation = _ACTIVATIONS[config.activation]
    biases = "biases" if config.bias else "no biases"
    head = "head shared with the embedding" if config.tie_weights else "head of its own"
    head += f", logits capped at {config.logit_softcap:g}" if config.logit_softcap else ""
    rows = {
        "parameters": f"{parameters:,}",
        "shape": f"{config.n_layer} layers, {config.n_head} heads, width {config.n_embd}, context "
        f"{config.block_size:,}, vocabulary {config.vocab_size:,}, {activation}, {biases}, {head}",
        "data": known.get("data", UNKNOWN),
        "languages": f"those of the data; {UNKNOWN} to Folio",
        "license": UNKNOWN,
        "weights": known.get("weights"),
        "steps": f"{state['step']:,}" if state["step"] else None,
        "tokens seen": f"{state['tokens']:,}" if state["tokens"] else None,
        "validation loss": _loss(state["val_loss"]),
        "training loss": _loss(state["train_loss"]),
        "HellaSwag": known.get("HellaSwag", "not measured"),
        "dropout": f"{config.dropout:g}" if config.dropout else None,
        **{setting.replace("_", " "): f"{asked[setting]:g}" for setting in _SETTINGS if setting in asked},
        "seed": known.get("seed", UNKNOWN),
        "machine": known.get("machine", UNKNOWN),
    }
    table = "\n".join(f"| {what} | {_cell(value)} |" for what, value in rows.items() if value)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
license: unknown
tags: [{architecture.model_type}, folio]
---

# {_cell(name)}

A language model of {architecture.name}'s architecture, exported by Folio {__version__}.

| | |
|---|---|
{table}

```python
{_program(name, config.block_size, tokenizer)}
```

## Limits

The context is {config.block_size:,} tokens. The model continues text in the style of its training data, so its output
may be wrong or harmful. It was not tested for bias, safety or truth. State the licenses of the model and of its data
when you publish it.
"""


def _loss(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f} nats a token"


def _cell(text: str) -> str:
    """The text with escapes, so that it neither ends a table's cell nor becomes markup."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def _program(name: str, block_size: int, tokenizer: Tokenizer | None) -> str:
    """A program that generates text with transformers, within the context."""
    load = f"model = AutoModelForCausalLM.from_pretrained({json.dumps(name, ensure_ascii=False)})"
    prompt = _prompt(tokenizer, block_size) if tokenizer else None
    if tokenizer is None or prompt is None:
        return f"""import torch
from transformers import AutoModelForCausalLM

{load}
prompt = torch.zeros(1, 1, dtype=torch.long)  # token ids: nothing says which text they stand for
print(model.generate(prompt, max_new_tokens={max(1, min(_TOKENS, block_size - 1))})[0])"""
    room = max(1, min(_TOKENS, block_size - len(tokenizer.encode(prompt))))
    return f"""from transformers import AutoModelForCausalLM, AutoTokenizer

{load}
tokenizer = AutoTokenizer.from_pretrained({json.dumps(name, ensure_ascii=False)})
prompt = tokenizer({json.dumps(prompt, ensure_ascii=False)}, return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**prompt, max_new_tokens={room})[0]))"""


def _prompt(tokenizer: Tokenizer, block_size: int) -> str | None:
    """A text that the tokenizer can encode and that fits into the context."""
    for text in (*_PROMPTS, *(decode(tokenizer, [i]) for i in range(min(tokenizer.size, 1000)))):
        try:
            ids = tokenizer.encode(text)
        except ValueError:
            continue
        if 0 < len(ids) <= max(1, block_size // 2) and text.isprintable() and decode(tokenizer, ids) == text:
            return text
    return None
