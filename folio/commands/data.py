"""folio data: describe token files."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from folio.config.declare import ITSELF, TokenDtype, option, token_dtype_option
from folio.data import tokenizers
from folio.data.decoding import decode
from folio.data.folders import Folder, open_folder
from folio.data.token_files import GPT2, META, SPLITS, TokenFile
from folio.data.tokenizers import IDS_ONLY
from folio.files import sha256
from folio.records.console import show
from folio.records.log import counted

_SAMPLE = 64  # tokens


@dataclass(frozen=True)
class Options:
    """Describe a data set: folio data info FOLDER."""

    action: Literal["info"] = option(MISSING, "print what the files contain", positional="info")
    folder: str = option(MISSING, "folder of a data set, or a glob of its files", path=ITSELF, positional="FOLDER")
    token_dtype: TokenDtype = token_dtype_option()
    verify: bool = option(False, "compare the hash of every file with the meta file")


def main(options: Options) -> int:
    folder = open_folder(Path(options.folder), options.token_dtype)
    damaged = [file for split in SPLITS for file in _damaged(folder, split)] if options.verify else []
    for line in _lines(folder):
        show(line)
    if options.verify:
        show(f"checksums   {_verdict(folder, damaged)}")
    show(f"begins with {_sample(folder)}")
    return 1 if damaged else 0


def _lines(folder: Folder) -> list[str]:
    spec, dtype = folder.tokenizer or GPT2, folder.splits["train"][0].dtype
    assumed = "" if folder.tokenizer else ", assumed since no meta file names one"
    size = f"{folder.vocab_size:,} ids" if folder.vocab_size else "unknown"
    name = "unknown" if spec == IDS_ONLY else spec.get("name") or spec["kind"]
    lines = [folder.note or f"{folder.path}", f"tokenizer   {name}{assumed}", f"vocabulary  {size}, {dtype}"]
    separator = {"before": "before each document", "after": "after each document", "none": "none"}
    lines.append(f"end-of-text {separator.get(str(folder.eot), 'unknown')}")
    for split in SPLITS:
        files = folder.splits[split]
        documents = folder.meta.get("splits", {}).get(split, {}).get("documents")
        count = f", {counted(documents, 'document')}" if documents is not None else ""
        named = files[0].path.name if len(files) == 1 else f"{files[0].path.name} … {files[-1].path.name}"
        tokens = sum(file.tokens for file in files)
        lines.append(f"{split:11} {tokens:,} tokens{count}, {counted(len(files), 'file')}: {named}")
    if text_bytes := folder.meta.get("text_bytes"):
        tokens = sum(file.tokens for split in SPLITS for file in folder.splits[split])
        lines.append(f"text        {text_bytes:,} bytes, {tokens / text_bytes:.3f} tokens per byte")
    for reason, count in folder.meta.get("skipped", {}).items():
        lines.append(f"left out    {counted(count, 'document')}: {reason}")
    return lines


def _damaged(folder: Folder, split: Any) -> list[TokenFile]:
    """Files whose hash differs from the meta file's."""
    return [f for f in folder.splits[split] if f.sha256 is not None and sha256(f.path) != f.sha256]


def _verdict(folder: Folder, damaged: list[TokenFile]) -> str:
    files = [file for split in SPLITS for file in folder.splits[split]]
    if damaged:
        return f"{', '.join(f.path.name for f in damaged)} {'does' if len(damaged) == 1 else 'do'} not match {META}"
    if any(file.sha256 is None for file in files):
        return f"unknown: {folder.path} has no {META}"
    return f"all {counted(len(files), 'file')} match {META}"


def _sample(folder: Folder) -> str:
    ids = np.asarray(folder.splits["train"][0].map()[:_SAMPLE]).tolist()
    try:
        return repr(decode(tokenizers.from_json(folder.tokenizer or GPT2), ids))
    except (ValueError, OSError, LookupError, OverflowError) as error:
        return f"{ids[:8]} … (the tokenizer cannot be loaded: {error})"
