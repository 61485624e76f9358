"""Whether the token ids of two tokenizers stand for the same text."""

from __future__ import annotations

from typing import Any

from folio.data.tokenizers import Tokenizer, TokenizersFile, from_json


def describe(spec: dict[str, Any]) -> str:
    """A tokenizer in a few words, for messages. ``spec``: as ``to_json`` describes it."""
    match spec:
        case {"kind": "characters", "characters": str(characters)}:
            return f"{len(characters)} characters"
        case {"kind": "tiktoken", "name": str(name)}:
            return f"{name} of tiktoken"
        case {"kind": "tokenizers", "file": {"model": {"type": str(model)}}}:
            return f"a {model} file of the tokenizers library"
    return str(spec.get("name") or spec.get("kind"))[:80]


def difference(ids_of: dict[str, Any], known_to: dict[str, Any]) -> str:
    """How the ids of one tokenizer differ from those that a model knows; "" if they do not.

    Both are as ``to_json`` describes them. Every id of the first must stand for the same text in the second, which may
    have more: GPT-2's ids are the same from tiktoken and from a file of the tokenizers library.
    """
    if ids_of == known_to:
        return ""
    kinds = f"{describe(ids_of)}, not {describe(known_to)}"
    try:
        mine, theirs = _tokens(from_json(ids_of)), _tokens(from_json(known_to))
    except (ValueError, OSError):  # an unknown kind, or its tables are not on this machine
        named = {ids_of.get("kind"), known_to.get("kind")}
        return "" if named == {"datatrove", "tokenizers"} else kinds  # the file may be that of the named tokenizer
    for i, token in enumerate(mine):
        if i >= len(theirs):
            return f"{kinds}, which has no id {i}"
        if token != theirs[i]:
            here, there = (t.decode(errors="backslashreplace") for t in (token, theirs[i]))
            return f"{kinds}: id {i} is {here!r}, not {there!r}"
    return ""


def _tokens(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes of each id, in order; of a tokenizer that is not byte-level, the tokens as its file spells them."""
    if isinstance(tokenizer, TokenizersFile) and not tokenizer.by_bytes:
        spelled = tokenizer.fast().id_to_token
        return [(spelled(i) or "").encode() for i in range(tokenizer.size)]
    return [tokenizer.bytes([i]) for i in range(tokenizer.size)]
