"""The type of the ids in files that do not state it, recognized from their first values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from folio.data.token_files import BARE, GPT2_SIZES, META_PKL, TokenFile
from folio.errors import UserError
from folio.files import open_regular

_LOOKS = (2**12, 2**20)  # 16-bit values to read: first a few, then more
_FEWEST = 16  # 16-bit values; in fewer, zeros do not show a type
_FEWEST_BYTES = 2**11  # bytes; in fewer, frequencies do not show a type
_OPTIONS = {"|u1": "uint8", "<u4": "uint32", "<i4": "int32", "<i8": "int64"}  # NumPy's names → --token_dtype's


def refuse_other_types(files: list[TokenFile], vocab_size: int | None) -> None:
    """Raises ValueError if files without a header seem to hold another type than nanoGPT's uint16."""
    bare = [file for file in files if file.path.suffix == ".bin" and not file.offset]
    if not bare:
        return
    if vocab_size and vocab_size > 2**16:
        raise UserError(
            f"{bare[0].path}: {META_PKL} says {vocab_size:,} token ids, for which nanoGPT's uint16 is too narrow: say "
            "the type with --token_dtype, such as --token_dtype=uint32"
        )
    seen = [_type_seen(file.path, vocab_size) for file in bare]
    odd = next((i for i, dtype in enumerate(seen) if dtype != BARE), None)
    if odd is None:
        return
    dtype, path = seen[odd], bare[odd].path
    if len(set(seen)) > 1:
        other = next(i for i, found in enumerate(seen) if found != dtype)
        said = f"and {bare[other].path.name} {_described(seen[other])}: write them again as one type"
    elif (name := _OPTIONS.get(dtype.str)) is None:
        fit, option = ("<u2", "makes") if dtype.itemsize == 2 else ("<u4", "and --token_dtype=uint32 make")
        said = f"which is not read: np.fromfile(FILE, {dtype.str!r}).astype({fit!r}).tofile(FILE) {option} it fit"
    else:
        said = f"not uint16 as nanoGPT's: set --token_dtype={name}"
    raise UserError(f"{path} seems to hold {_described(dtype)}, {said}; --token_dtype=uint16 reads it as uint16 anyway")


def _type_seen(path: Path, vocab_size: int | None) -> np.dtype[Any]:
    """The type of a file's ids: uint16, unless its first values, few and then many, are ids of another type."""
    found = BARE
    for count in _LOOKS:
        with open_regular(path) as file:
            found = _looks_like(np.fromfile(file, "u1", 2 * count), vocab_size)
        if found == BARE:
            break
    return found


def _looks_like(content: NDArray[np.uint8], vocab_size: int | None) -> np.dtype[Any]:
    """The type of the ids in these bytes.

    In a wider type, every second or fourth 16 bits are zero, or small if the vocabulary is above 65,536. Read as the
    right type, all ids are whole numbers within the vocabulary, if its size is known; read as another, they are not.
    """
    ids = content[: len(content) // 8 * 8].view("<u2")
    if len(ids) < _FEWEST or ids.min() == ids.max():
        return BARE
    for name in ("<i8", "<i4", "<f8", "<f4", ">i8", ">i4"):
        wide = ids.view(name)
        if not _are_ids(wide, vocab_size) or np.count_nonzero(wide) < _FEWEST // 2:
            continue
        if (np.abs(wide) < 2**16).all() or (np.abs(wide) % 2**16).max() >= 2**15:
            return np.dtype(name if wide.min() < 0 else name.replace("i4", "u4"))
    limit = vocab_size or GPT2_SIZES.stop
    swapped = ids.byteswap()
    if swapped.max() < 2**8 or (swapped.max() < limit <= ids.max() and (vocab_size or len(ids) > _FEWEST_BYTES)):
        return np.dtype(">u2")
    fits = not vocab_size or content.max() < vocab_size <= ids.max()
    enough = len(content) >= _FEWEST_BYTES or (len(content) >= 8 * _FEWEST and content.max() < 2**7)
    return np.dtype("u1") if fits and enough and _alike(content[::2], content[1::2]) else BARE


def _are_ids(values: NDArray[Any], vocab_size: int | None) -> bool:
    with np.errstate(invalid="ignore"):
        return bool((values < (vocab_size or 2**20)).all() and (values > -(2**15)).all() and not (values % 1).any())


def _alike(even: NDArray[np.uint8], odd: NDArray[np.uint8]) -> bool:
    """Whether even and odd bytes are distributed alike, as in text: not evenly, and seldom zero."""
    first, second = (np.bincount(half, minlength=256) / len(half) for half in (even, odd))
    differing = np.abs(first - second).sum() / 2
    return bool(differing < 0.2 + 3 / len(odd) ** 0.5 and second.max() > 4 / 256 and second[0] < 3 / 4)


def _described(dtype: np.dtype[Any]) -> str:
    return f"{dtype.name}{' in big-endian order' if dtype.str.startswith('>') else ''}"
