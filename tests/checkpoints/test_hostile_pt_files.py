"""No file of ``torch.save``, and no ``meta.pkl``, can run code."""

from __future__ import annotations

import os
import pickle
import shlex
import subprocess
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_refused, tree
from pt_contents import (
    BUILD,
    QUICK,
    Folio,
    pickled_as,
    saved,
    small,
)

from folio.checkpoints import pt_files


class Calls:
    """Pickled, it is a call of this function."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


def shell(marker: Path) -> str:
    return f"touch {shlex.quote(str(marker))}"


# How the marker appears, and the callable that is named: torch lets OrderedDict pass, in meta.pkl it has no business
HOSTILE: dict[str, tuple[Callable[[Path], Calls], str]] = {
    "os.system": (lambda marker: Calls(os.system, shell(marker)), f"{os.name}.system"),
    "eval": (lambda marker: Calls(eval, f"open({str(marker)!r}, 'w').close()"), "eval"),
    "Path.touch": (lambda marker: Calls(Path.touch, marker), "(getattr|Path.touch)"),
    "Popen": (lambda marker: Calls(subprocess.Popen, ["touch", str(marker)]), "Popen"),
    "torch.hub.load": (lambda marker: Calls(torch.hub.load, "pytorch/evil:main", "entry"), "torch.hub.load"),
    "nested": (
        lambda marker: Calls(OrderedDict, [["a", Calls(OrderedDict, [["b", Calls(os.system, shell(marker))]])]]),
        f"({os.name}.system|OrderedDict)",
    ),
}


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is there once hostile code ran; torch's hub has a program that makes it."""
    path = tmp_path / "marker"
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    program = tmp_path / "home" / "hub" / "pytorch_evil_main" / "hubconf.py"
    program.parent.mkdir(parents=True)
    program.write_text(f"def entry():\n    open({str(path)!r}, 'w').close()\n")
    return path


def assert_hostile(load: Callable[[], Any], marker: Path) -> None:
    """Loaded without care, it does run its code."""
    for value in load():
        if isinstance(value, subprocess.Popen):
            value.wait()
    assert marker.exists()
    marker.unlink()


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("place", ["model", "config", "optimizer"])
@pytest.mark.parametrize("kind", HOSTILE)
def test_code_in_a_checkpoint(tmp_path: Path, marker: Path, kind: str, place: str, legacy: bool) -> None:
    """Wherever it hides: refused by the name of what it would call, which is not called."""
    make, name = HOSTILE[kind]
    content = small()
    content[place]["hostile"] = make(marker)
    path = saved(content, tmp_path / "ckpt.pt", legacy)
    assert_hostile(lambda: torch.load(path, weights_only=False)[place].values(), marker)
    with pytest.raises(ValueError, match=rf"ckpt\.pt: refused: it asks for \S*{name}, which would run code$"):
        pt_files.read(path)
    assert not marker.exists()


@pytest.mark.parametrize("protocol", [None, *range(6)])
def test_code_in_a_bare_pickle(tmp_path: Path, marker: Path, protocol: int | None) -> None:
    """Under the name of a checkpoint; every protocol, and one written by hand. No word of torch's beside."""
    path = tmp_path / "model_00002.pt"
    by_hand = f"cos\nsystem\n(S{shell(marker)!r}\ntR.".encode()
    hostile = [Calls(os.system, shell(marker))]
    path.write_bytes(by_hand if protocol is None else pickle.dumps(hostile, protocol=protocol))
    assert_hostile(lambda: [pickle.loads(path.read_bytes())], marker)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with pytest.raises(ValueError, match=r"model_00002\.pt") as error:
            pt_files.read(path)
    assert "pytorch.org" not in str(error.value)
    assert not said
    assert not marker.exists()


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_code_in_meta_pkl(tmp_path: Path, marker: Path, kind: str, protocol: int) -> None:
    """Beside a harmless checkpoint."""
    make, name = HOSTILE[kind]
    pickled = tmp_path / "meta.pkl"
    pickled.write_bytes(pickle.dumps({"vocab_size": 128, "itos": make(marker)}, protocol=protocol))
    assert_hostile(lambda: pickle.loads(pickled.read_bytes()).values(), marker)
    with pytest.raises(ValueError, match=rf"meta\.pkl: refused: it asks for \S*{name}, which would run code"):
        pt_files.read(saved(small(), tmp_path / "ckpt.pt"))
    assert not marker.exists()


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("what", ["ckpt.pt", "meta.pkl"])
def test_code_at_the_command_line(
    tmp_path: Path, marker: Path, story: Path, folio: Folio, what: str, legacy: bool
) -> None:
    """train, sample and import: one line, exit code 2, and nothing written."""
    content, hostile = small(), Calls(os.system, shell(marker))
    if what == "ckpt.pt":
        content["optimizer"]["state"][0]["exp_avg"] = hostile
    ckpt = saved(content, tmp_path / "out" / "ckpt.pt", legacy)
    if what == "meta.pkl":
        ckpt.with_name(what).write_bytes(pickle.dumps(hostile))
    before = tree(tmp_path)
    for argv in (
        ("train", *QUICK, "--init_from=resume", f"--out_dir={ckpt.parent}", f"--data_dir={story}"),
        ("train", *QUICK, f"--init_from={ckpt}", f"--out_dir={tmp_path / 'new'}", f"--data_dir={story}"),
        ("sample", f"--out_dir={ckpt.parent}", "--device=cpu"),
        ("import", ckpt, "--to", tmp_path / "imported"),
    ):
        assert_refused(folio(*argv), ckpt.with_name(what), "posix.system")
    assert tree(tmp_path) == before


FIELDS = {"a container": OrderedDict(a=1), "text": "rm", "an allowed class": torch.Size([1]), "a tensor": torch.ones(1)}


@pytest.mark.parametrize("value", FIELDS.values(), ids=FIELDS)
def test_objects_in_a_config_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: object) -> None:
    """The one class that is let in holds numbers or nothing, whatever torch thinks harmless."""
    with monkeypatch.context() as patch:
        config = pickled_as(patch, "__main__.GPTConfig", **BUILD, extra=value)
        path = saved({"model": {}, "config": config, "step": 2}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model\.pt.*its config holds more than numbers"):
        pt_files.read(path)


@pytest.mark.parametrize("way", ["field", "state", "arguments"])
def test_code_in_a_config_class(tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """In a field, in the place of its fields, or handed to its constructor."""
    hostile = Calls(os.system, shell(marker))
    with monkeypatch.context() as patch:
        config = pickled_as(patch, "__main__.GPTConfig", **BUILD)
        kind = type(config)
        if way == "field":
            config.n_layer = hostile
        elif way == "state":
            kind.__getstate__ = lambda self: hostile
            kind.__setstate__ = lambda self, state: None
        else:
            kind.__init__ = lambda self, given=None: None
            kind.__reduce__ = lambda self: (kind, (hostile,))
        path = saved({"model": {}, "config": config}, tmp_path / "model.pt")
        assert_hostile(lambda: torch.load(path, weights_only=False), marker)
    with pytest.raises(ValueError, match=r"model\.pt: refused: it asks for \S*system"):
        pt_files.read(path)
    assert not marker.exists()
