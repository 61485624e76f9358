"""Files that are read whole: JSON that cannot hurt, and nothing that never ends."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from folio.files import parse_json, read_json, read_text, require_file


def test_json_is_read_with_and_without_a_byte_order_mark(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None, True], "ö": "渡し船"}
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / "file").write_text(json.dumps(value, ensure_ascii=False), encoding=encoding)
        assert read_json(tmp_path / "file") == value


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"a": 1e999}', "1e999 is not a finite number"),
        (b"[-1e400]", "not a finite number"),
        (b"[NaN]", "NaN is not a finite number"),
        (b"[-Infinity]", "not a finite number"),
        (b"1" * 5000, "digits"),
        (b"\xff{}", "utf-8"),
        (b"{", "Expecting"),
        (b"", "Expecting"),
    ],
)
def test_what_is_no_json_is_refused_by_name(text: bytes, word: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(text)
    with pytest.raises(ValueError, match=word) as refusal:
        read_json(tmp_path / "file")
    assert str(tmp_path / "file") in str(refusal.value)
    with pytest.raises(ValueError, match=word):
        parse_json(text)


def test_a_long_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        file.truncate(1 << 40)  # a hole
    with pytest.raises(ValueError, match="1,099,511,627,776 bytes"):
        read_json(tmp_path / "file")


def test_what_never_ends_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "s"))
        for name, kind in {"fifo": "a pipe", "zero": "a device", "folder": "a folder", "s": "a socket"}.items():
            with pytest.raises(ValueError, match=f"{name} is {kind}, not a file"):
                read_json(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        require_file(tmp_path / "nothing")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "file").write_text("1")
    assert read_json(tmp_path / "link") == 1


@pytest.mark.parametrize("text", ["a\r\nb\rc\n\r\r\nd\u2028e\x85f\x0c", "\ufeffa\r", "\r\n", ""])
def test_text_is_read_as_open_reads_it(text: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(text.encode())
    with path.open(encoding="utf-8") as file:
        assert read_text(path) == file.read()


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"caf\xe9", "not UTF-8 text at byte 3$"),
        ("\ufeffx".encode("utf-16-le"), "UTF-16: iconv"),
        (b"a" * 11, "11 bytes"),
    ],
)
def test_what_is_no_text_is_refused_by_name(content: bytes, word: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=word) as refusal:
        read_text(tmp_path / "file", most=10)
    assert str(tmp_path / "file") in str(refusal.value)
