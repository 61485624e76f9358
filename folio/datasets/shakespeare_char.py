"""Tiny Shakespeare by characters: the files of nanoGPT's data/shakespeare_char, byte by byte."""

from __future__ import annotations

import hashlib
import http.client
import urllib.request
from pathlib import Path

from folio.datasets.write import write
from folio.tokenizer import Characters

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def prepare(folder: Path, source: Path | None = None) -> None:
    """Any UTF-8 ``source`` does; without one, input.txt in the folder, downloaded and verified if need be."""
    text = _read(source) if source else _downloaded(folder)
    characters = "".join(sorted(set(text)))
    print(f"length of dataset in characters: {len(text):,}")
    print(f"all the unique characters: {characters}")
    print(f"vocab size: {len(characters):,}")
    tokenizer = Characters(characters)
    ids, cut = tokenizer.encode(text), int(len(text) * 0.9)
    made = {"dataset": "shakespeare_char", "source_sha256": hashlib.sha256(text.encode()).hexdigest()}
    write(folder, {"train": ids[:cut], "val": ids[cut:]}, tokenizer, "none", made)


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise FileNotFoundError(f"{path}: {error.strerror}: give a file that can be read as --source") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text at byte {error.start}") from None


def _downloaded(folder: Path) -> str:
    path = folder / "input.txt"
    if not path.exists():
        remedy = f"fetch {URL} by other means and give it as --source FILE"
        try:
            with urllib.request.urlopen(URL, timeout=60) as response:
                content = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise ValueError(f"the download of {URL} failed ({error}): {remedy}") from None
        if (actual := hashlib.sha256(content).hexdigest()) != SHA256:
            raise ValueError(f"the download has SHA-256 {actual}, not {SHA256}: {remedy}")
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(".input.txt.unfinished")
        unfinished.write_bytes(content)
        unfinished.replace(path)
    return _read(path)
