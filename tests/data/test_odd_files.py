"""Files that never end, and headers of other programs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SMALL, Outcome, assert_refused, make_pipe
from written import IDS, PAIR, cut, described, ds, lay, npy

from folio.data.folders import open_folder

KINDS: dict[str, Callable[[Path], object]] = {
    "a pipe": make_pipe,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["train.bin", "val.bin", "meta.pkl", "meta.json", "x_train_0.npy", "0.ds.metadata"])
def test_pipes_devices_and_broken_links(folio: Callable[..., Outcome], tmp_path: Path, name: str, kind: str) -> None:
    """They are refused: no waiting, no endless reading, no silent skipping."""
    lay(tmp_path, {".npy": "x_train_0.npy,x_val_0.npy", ".metadata": "0.ds"}.get(Path(name).suffix, PAIR))
    (tmp_path / name).unlink(missing_ok=True)
    KINDS[kind](tmp_path / name)
    outcome = folio("train", *SMALL, f"--data_dir={tmp_path}", f"--out_dir={tmp_path / 'out'}")
    assert_refused(outcome, tmp_path / name, kind if kind != "a link to" or name != "0.ds.metadata" else "No such file")
    assert not (tmp_path / "out").exists()


HEADERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a huge array": (
        lambda p: described(p, b"{'descr': '<u2', 'fortran_order': False, 'shape': (1000000000000000000,), }\n"),
        "empty",
    ),
    "fewer than none": (
        lambda p: (described(p, b"{'descr': '<u2', 'fortran_order': False, 'shape': (-5,), }\n"), grown(p)),
        "its header says -5",
    ),
    "a header of megabytes": (lambda p: described(p, b" " * (8 << 20)), "not a .npy file"),
    "a header that is deep": (lambda p: described(p, b"-" * 9000 + b"1"), "not a .npy file"),
    "booleans": (lambda p: npy(p, IDS > 5), "an array of bool"),
    "a struct": (lambda p: npy(p, np.zeros(9, dtype=[("id", "<u2")])), "not a row of token ids"),
    "dates": (lambda p: npy(p, np.zeros(9, dtype="M8[s]")), "not a row of token ids"),
}


def grown(path: Path) -> None:
    path.write_bytes(path.read_bytes() + bytes(1000))


@pytest.mark.parametrize("case", HEADERS)
def test_an_odd_npy_header(tmp_path: Path, case: str) -> None:
    npy(tmp_path / "x_val_0.npy", IDS)
    write, words = HEADERS[case]
    write(tmp_path / "x_train_0.npy")
    with pytest.raises(ValueError, match=words) as refused:
        open_folder(tmp_path)
    assert str(tmp_path / "x_train_0.npy") in str(refused.value)
    assert "\n" not in str(refused.value)


def llmc(*head: int) -> bytes:
    return np.array([*head, *[0] * (256 - len(head))], dtype="<i4").tobytes() + IDS.tobytes()


BINS: dict[str, tuple[bytes, str]] = {
    "another version": (llmc(20240520, 2, 100), "version 2, and only 1 can be read"),
    "a version of uint32": (llmc(20240801, 3, 50), "version 3, and only 1 and 7"),
    "a larger count": (llmc(20240520, 1, 101), "its header says 101: it is cut short"),
    "a smaller count": (llmc(20240520, 1, 99), "its header says 99: it is too long"),
    "a negative count": (llmc(20240520, 1, -1), "its header says -1"),
    "a model of llm.c's": (llmc(20240326, 3, 100), "an llm.c file without tokens"),
    "HellaSwag of llm.c's": (llmc(20240522, 1, 100), "an llm.c file without tokens"),
    "lit-gpt's": (b"LITPKDS" + bytes(1000), "is a packed file of lit-gpt"),
    "zip": (b"PK\x03\x04" + bytes(1000), "is a zip file"),
    "npy": (b"\x93NUMPY\x01\x00" + bytes(1000), "is a .npy file"),
}


@pytest.mark.parametrize("case", BINS)
def test_a_bin_file_with_another_header(tmp_path: Path, case: str) -> None:
    content, words = BINS[case]
    for name in ("x_train_0.bin", "x_val_0.bin"):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        open_folder(tmp_path)


def test_llama_3s_version(tmp_path: Path) -> None:
    """llm.c writes version 7 before uint32."""
    for name in ("x_train_0.bin", "x_val_0.bin"):
        (tmp_path / name).write_bytes(llmc(20240801, 7, 50))
    assert open_folder(tmp_path).splits["train"][0].tokens == 50


INDEXES: dict[str, tuple[Any, str]] = {
    "backwards": ([60, 40, 100], "ends before the one that it follows"),
    "another end": ([10, 99], "200 bytes for the 99 tokens"),
    "beyond": ([10, 2**63], "200 bytes for the 9,223,372,036,854,775,808 tokens"),
    "none": ([0], "200 bytes for the 0 tokens"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_an_index_that_does_not_fit(tmp_path: Path, case: str) -> None:
    ds(tmp_path / "0.ds", IDS)
    ends, words = INDEXES[case]
    np.array(ends, dtype="<u8").tofile(tmp_path / "0.ds.index")
    with pytest.raises(ValueError, match=words):
        open_folder(tmp_path)


def test_an_index_that_is_cut(tmp_path: Path) -> None:
    ds(tmp_path / "0.ds", IDS)
    cut(tmp_path / "0.ds.index", 77)
    with pytest.raises(ValueError, match=r"0\.ds\.index: 77 bytes are not a multiple of 8"):
        open_folder(tmp_path)
