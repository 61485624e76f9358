"""Files are read whole and appear whole, and one module makes all changes to the file system."""

from __future__ import annotations

import ast
import json
import pickle
import socket
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import ROOT, make_pipe

from folio import files
from folio.files import (
    UnwrittenError,
    open_regular,
    parse_json,
    read_json,
    read_sealed,
    read_text,
    require_file,
    write_json,
    write_sealed,
)


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
def test_a_file_that_is_not_json_is_refused_by_name(text: bytes, word: str, tmp_path: Path) -> None:
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


def test_pipes_sockets_and_devices_are_refused(tmp_path: Path) -> None:
    make_pipe(tmp_path / "fifo")
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
def test_a_file_that_is_not_text_is_refused_by_name(content: bytes, word: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=word) as refusal:
        read_text(tmp_path / "file", most=10)
    assert str(tmp_path / "file") in str(refusal.value)


def test_json_appears_whole(tmp_path: Path) -> None:
    """A value that cannot be written leaves the old file unchanged."""
    path = tmp_path / "best.json"
    write_json(path, {"step": 1})
    with pytest.raises(TypeError):
        write_json(path, {"step": 2, "odd": object()})
    assert json.loads(path.read_text()) == {"step": 1}


# Files with a checksum of themselves


def test_a_sealed_file_detects_every_flipped_bit(tmp_path: Path) -> None:
    """Also a flip that leaves the value unchanged: 1e-05 and 1E-05, the seventeenth digit, \\u00e9 and \\u00E9."""
    value = {"a": [1e-05, 2.3000000000000003, None, True], "é": 'q"\\ "x', "sha256": {"other": "00"}}
    path = tmp_path / "file.json"
    write_sealed(path, value)
    found, sealed = read_sealed(path)
    assert sealed
    assert {**found, "sha256": {"other": "00"}} == value
    content = path.read_bytes()
    for i in range(8 * len(content)):
        changed = bytearray(content)
        changed[i // 8] ^= 1 << i % 8
        path.write_bytes(changed)
        with suppress(ValueError):
            assert not read_sealed(path)[1]  # the checksum now has another name


@pytest.mark.parametrize(
    "content", ["[1]", "3", '{"sha256": 5}', '{"sha256": {"file": 5}}', '{"sha256": {"file": "00"}}']
)
def test_changed_content_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text(content)
    with pytest.raises(ValueError, match=f"{tmp_path / 'file'} cannot be read: "):
        read_sealed(tmp_path / "file")


# Changes to the file system

CHANGES = {"rename", "replace", "renames", "unlink", "rmdir", "removedirs", "rmtree", "fsync", "fdatasync"}
CHANGES |= {"mkdir", "makedirs", "write_text", "write_bytes", "copyfile", "save_file"}


def changes(path: Path) -> list[str]:
    """The calls in a module that make, write, rename, remove or sync files or folders."""
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    found = []
    for call in calls:
        match call.func:
            case ast.Attribute(value=ast.Name("files")):
                continue
            case ast.Attribute(value=ast.Name("os" | "shutil"), attr=("remove" | "replace" | "move") as name):
                found.append(name)
            case ast.Attribute(attr="replace") if len(call.args) != 1 or call.keywords:
                continue  # str.replace or dataclasses.replace
            case ast.Attribute(attr="open") if any(_writes(argument) for argument in call.args):
                found.append("open")
            case ast.Attribute(attr=name) if name in CHANGES:
                found.append(name)
            case ast.Name("save_file" | "copyfile" as name):
                found.append(name)
    return found


def _writes(argument: ast.expr) -> bool:
    """Whether this is the mode of a file that is opened to be written."""
    mode = argument.value if isinstance(argument, ast.Constant) else None
    return isinstance(mode, str) and len(mode) < 4 and bool(set(mode) & set("wax+"))


def test_no_other_module_changes_files() -> None:
    """Tests make each function of ``folio.files`` fail, and so each change."""
    package = ROOT / "folio"
    found = {str(path): made for path in package.rglob("*.py") if (made := changes(path))}
    assert found.pop(str(package / "files.py"))
    assert found == {}


def test_an_unwritten_file_is_named_in_any_process() -> None:
    error = pickle.loads(pickle.dumps(UnwrittenError("out", "disk full", "make room")))
    assert str(error) == "out could not be written (disk full): make room"
    assert error.reason == "disk full"


def test_remove(tmp_path: Path) -> None:
    """Removes files, links but not their targets, and folders with their content; a missing file is not an error."""
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "folder" / "inner" / "file").write_text("")
    (tmp_path / "kept").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    for act in (files.remove, files.discard):
        (tmp_path / "other").mkdir(exist_ok=True)
        for name in ("folder", "file", "link", "nothing", "other"):
            act(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


# Opening


def test_a_file_is_opened_only_if_it_is_regular(tmp_path: Path) -> None:
    """It may be read through a link, but not written."""
    (tmp_path / "file").write_text("1")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "dangling").symlink_to("nowhere")
    make_pipe(tmp_path / "pipe")
    with open_regular(tmp_path / "link") as file:
        assert file.read() == b"1"
    for name in ("link", "dangling"):
        for mode in ("wb", "ab", "r+b", "a"):
            with pytest.raises(ValueError, match=f"{name} is a link"):
                open_regular(tmp_path / name, mode)
    for mode in ("rb", "wb", "r+b", "a"):
        with pytest.raises(ValueError, match="is a pipe"):
            open_regular(tmp_path / "pipe", mode)
    with open_regular(tmp_path / "new", "w") as file:
        file.write("é")
    assert (tmp_path / "new").read_bytes() == "é".encode()
    assert not (tmp_path / "nowhere").exists()


def test_a_file_that_becomes_a_pipe_meanwhile_is_not_awaited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_pipe(tmp_path / "pipe")
    monkeypatch.setattr(files, "require_file", lambda path: path)
    with pytest.raises(ValueError, match="is a pipe"):
        open_regular(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("text", "plain"), [("a.bin", True), ("", False), ("..", False), ("a/b", False), ("a\0", False)]
)
def test_plain_names(text: str, plain: bool) -> None:
    assert files.is_name(text) is plain


NO_FILES = {"Tokens.open", "run.log.open", "self._trackers.open", "opener.open", "archive.open"}  # methods of that name


def opened(path: Path) -> list[str]:
    """The calls in a module that open a file by its name."""
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    names = [ast.unparse(call.func) for call in calls]
    methods = (".open", ".read_bytes", ".read_text")
    return [
        n for n in names if n == "open" or (n.endswith(methods) and not n.startswith("files.") and n not in NO_FILES)
    ]


def test_no_other_module_opens_files() -> None:
    """So that nothing waits for a pipe or writes through a link. Locks and the console open files in their own way."""
    package = ROOT / "folio"
    found = {str(path.relative_to(package)): made for path in package.rglob("*.py") if (made := opened(path))}
    assert found.pop("files.py") == ["open", "os.open", "os.open"]
    assert found == {"locks.py": ["os.open"], "records/console.py": ["os.open", "os.open", "os.open", "open"]}


@pytest.mark.parametrize("target", ["empty folder", "nothing"])
def test_a_link_in_the_place_of_a_new_folder_is_refused_as_such(tmp_path: Path, target: str) -> None:
    (tmp_path / "empty folder").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / target)
    with pytest.raises(FileExistsError, match="link is there already: remove it"), files.written_atomically(link):
        pass
    assert link.is_symlink()
