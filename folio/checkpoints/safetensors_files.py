"""Reads safetensors files, one tensor at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from folio import files
from folio.errors import UserError

_HEADER = 16 * 2**20  # bytes, at most, of the list of tensors that a file begins with
Tensors = Iterator[tuple[str, Tensor]]


class OpenFile:
    """A file that can be read at ``path`` while this object lives, even if the file is removed."""

    def __init__(self, name: Path) -> None:
        self.name, self._handle = name, os.open(files.require_file(name), os.O_RDONLY)
        path = Path(f"/dev/fd/{self._handle}")
        self.path = path if path.exists() else name

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            os.close(self._handle)

    def __reduce__(self) -> tuple[type[OpenFile], tuple[Path]]:
        return OpenFile, (self.name,)  # another process opens the file again


def read(path: Path, wanted: Callable[[str], bool] = lambda name: True, opened: OpenFile | None = None) -> Tensors:
    """Yields the ``wanted`` tensors of a file, the largest first; each is mapped only while it is in use.

    Copying them into a model therefore needs little more memory than the model. ``opened`` is the file, already open.

    Raises:
        ValueError: the file is damaged, or is not a regular file.
    """
    here = opened.path if opened else path
    with files.require_file(here).open("rb") as raw:
        header = int.from_bytes(raw.read(8), "little")
    if header > _HEADER:
        raise UserError(f"{path} is damaged: its header has {header:,} bytes, more than the {_HEADER:,} of any model")
    try:
        with safe_open(here, "pt") as file:
            names = filter(wanted, file.keys())
            sizes = {name: math.prod(file.get_slice(name).get_shape()) for name in names}
        for name in sorted(sizes, key=sizes.__getitem__, reverse=True):
            with safe_open(here, "pt") as file:
                yield name, file.get_tensor(name)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}") from None
