"""Reads safetensors files, one tensor at a time."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from folio import files
from folio.errors import UserError

_MAPPED = 64 * 2**20  # bytes: after so many of tensors, the file is closed and mapped again
_HEADER = 16 * 2**20  # bytes, at most, of the list of tensors that a file begins with
Tensors = Iterator[tuple[str, Tensor]]


class OpenFile:
    """A file that can be read at ``path`` while this object lives; on Linux even if the file is removed.

    Elsewhere ``/dev/fd`` would share the position in the file, or is missing.
    """

    def __init__(self, name: Path) -> None:
        self.name, self._file = name, files.open_regular(name)
        path = Path(f"/proc/self/fd/{self._file.fileno()}")
        self.path = path if path.exists() else name

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    def __reduce__(self) -> tuple[type[OpenFile], tuple[Path]]:
        return OpenFile, (self.name,)  # another process opens the file again


def read(path: Path, wanted: Callable[[str], bool] = lambda name: True, opened: OpenFile | None = None) -> Tensors:
    """Yields the ``wanted`` tensors of a file, the largest first; few of them are mapped at the same time.

    Copying them into a model therefore needs little more memory than the model. ``opened`` is the file, already open.

    Raises:
        ValueError: the file is damaged, or is not a regular file.
    """
    here = opened.path if opened else path
    _require_header(path, here)
    try:
        with safe_open(here, "pt") as file:
            chosen = filter(wanted, file.keys())
            sizes = {name: math.prod(file.get_slice(name).get_shape()) for name in chosen}
        names = deque(sorted(sizes, key=sizes.__getitem__, reverse=True))
        while names:
            mapped = 0
            with safe_open(here, "pt") as file:  # which reads the list of tensors again
                while names and mapped < _MAPPED:
                    tensor = file.get_tensor(name := names.popleft())
                    mapped += tensor.nbytes
                    yield name, tensor
    except SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}") from None


def has_stated_length(file: OpenFile) -> bool:
    """Whether a file is as long as its list of tensors says. Reads the list alone: a sparse file may have terabytes."""
    try:
        _require_header(file.name, file.path)
        with safe_open(file.path, "pt"):
            return True
    except (SafetensorError, UserError):
        return False


def _require_header(path: Path, here: Path) -> None:
    with files.open_regular(here) as raw:
        header = int.from_bytes(raw.read(8), "little")
    if header > _HEADER:
        raise UserError(f"{path} is damaged: its header has {header:,} bytes, more than the {_HEADER:,} of any model")
