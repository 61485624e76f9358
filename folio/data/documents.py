"""Where documents begin and end among token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from folio.data.folders import Folder
from folio.data.shards import Rows
from folio.data.token_files import GPT2, SPLITS
from folio.data.tokenizers import from_json
from folio.errors import UserError
from folio.model.config import AUTO

_SEARCHED = 2**20  # tokens of a file without a meta file that are searched for its end-of-text token


@dataclass(frozen=True)
class Documents:
    """How documents are separated: by the id ``eot``, which is the first or the last token of each."""

    eot: int
    first: bool

    def __call__(self, rows: Rows) -> NDArray[np.int32]:
        """Rows (n, T + 1) → for each of the first T tokens, the number of its document within the row (n, T)."""
        ends = (rows == self.eot).astype(np.int32)
        numbers = ends.cumsum(axis=1, dtype=np.int32)
        return (numbers if self.first else numbers - ends)[:, :-1]


def find_documents(folders: Sequence[Folder], eot: int | AUTO) -> tuple[Documents, str]:
    """How the documents of data sets are separated, and a sentence that says how this is known.

    ``eot``: the id of the end-of-text token, "auto" for the tokenizer's. Without a meta file, the token is the first of
    each document if one of the files begins with it, else the last.

    Raises:
        ValueError: the token is unknown or not in the files, or the data sets differ.
    """
    found: list[tuple[Documents, str]] = []
    for folder in folders:
        token = _eot_of(folder) if eot == "auto" else eot
        if folder.eot in ("before", "after") and token == _eot_of(folder):
            found.append((Documents(token, folder.eot == "before"), f"{folder.path}'s meta file"))
            continue
        heads = [folder.splits[split][0].map()[:_SEARCHED] for split in SPLITS]
        if not any((head == token).any() for head in heads):
            raise UserError(
                f"{folder.path}: no token {token} near the beginning of its files, so documents cannot be told "
                "apart: give the id that separates them as --eot, or set --document_mask=False"
            )
        found.append((Documents(token, any(head[0] == token for head in heads)), f"the files in {folder.path}"))
    if len({documents for documents, _ in found}) > 1:
        names = ", ".join(str(folder.path) for folder in folders)
        raise UserError(
            f"documents are separated in different ways in {names}, so they cannot be mixed with --document_mask"
        )
    documents, source = found[0]
    return documents, f"token {documents.eot} {'begins' if documents.first else 'ends'} a document, by {source}"


def _eot_of(folder: Folder) -> int:
    eot = None
    if folder.eot != "none" and (folder.tokenizer or GPT2)["kind"] != "datatrove":
        eot = 50256 if folder.tokenizer in (None, GPT2) else from_json(folder.tokenizer).eot
    if eot is None:
        named = f" of {folder.tokenizer['name']}" if folder.tokenizer and "name" in folder.tokenizer else ""
        raise UserError(
            f"{folder.path} has no known token{named} between documents, which --document_mask needs: "
            "give its id as --eot, or prepare the text with a tokenizer that has one, such as gpt2"
        )
    return eot
