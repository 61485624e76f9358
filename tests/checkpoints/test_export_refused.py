"""A model that the formats cannot express is refused, and a failed write leaves nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pytest
from conftest import NO_POSIX, assert_refused, tree
from exports import (
    _quiet,  # noqa: F401
)
from small_checkpoints import save_random

from folio import files
from folio.checkpoints import checkpoint, find, gguf, hugging_face
from folio.data.tokenizers import Bytes
from folio.model.config import GPTConfig

transformers = pytest.importorskip("transformers")
yaml = pytest.importorskip("yaml")

REFUSALS: dict[str, tuple[list[str], list[str]]] = {
    "a target that holds something": (["--to=full/hf"], ["full/hf", "is there already"]),
    "a target that is a file": (["--to=file"], ["file", "is there already"]),
    "a gguf that is there": (["--to=mine.gguf"], ["mine.gguf", "is there already"]),
    "no target": (["--to=."], ["."]),
    "below a file": (["--to=file/hf"], ["file/hf", "could not be written"]),
    "far below a file": (["--to=file/a/hf"], ["file/a/hf", "could not be written"]),
    "a gguf below a file": (["--to=file/x.gguf"], ["file/x.gguf", "could not be written"]),
    "no out_dir": (["--out_dir=nowhere"], ["no checkpoint in nowhere", "train"]),
    "an empty out_dir": (["--out_dir=empty"], ["no checkpoint in empty", "train"]),
    "an unknown step": (["--checkpoint=8"], ["'8'", "out", "latest", "7"]),
    "an unknown checkpoint": (["--checkpoint=newest"], ["'newest'", "out", "latest", "7"]),
    "an unknown dtype": (["--dtype=float64"], ["dtype", "float64", "bfloat16"]),
    "a tokenizer larger than the model": (["--out_dir=large"], ["large", "256 token ids", "its model 100"]),
    "the same for a gguf": (["--out_dir=large", "--to=x.gguf"], ["large", "256 token ids", "its model 100"]),
    "a damaged checkpoint": (["--out_dir=damaged"], ["step-00000007 is damaged"]),
    "a gguf to the hub": (["--to=x.gguf", "--push_to_hub=me/it"], ["push_to_hub", "me/it", "x.gguf", "folder"]),
}


@pytest.mark.parametrize(("argv", "words"), REFUSALS.values(), ids=REFUSALS)
def test_refusals(folio, tmp_path, monkeypatch, argv, words) -> None:
    """In one line, and no file changes."""
    monkeypatch.chdir(tmp_path)
    for folder in ("full/hf", "empty"):
        Path(folder).mkdir(parents=True)
    for file in ("full/hf/mine.txt", "file", "mine.gguf"):
        Path(file).write_text("mine")
    save_random(Path("out"), Bytes(), activation="gelu_tanh")
    save_random(Path("large"), Bytes(), vocab_size=100)
    (save_random(Path("damaged"), Bytes()) / "checkpoints" / "step-00000007" / "model.safetensors").write_bytes(b"")
    before = tree(tmp_path)
    assert_refused(folio("export", "--out_dir=out", "--to=hf", *argv), *words)
    assert tree(tmp_path) == before


def damaged(out_dir: Path, name: str, value: float) -> Path:
    """The out_dir, with another number in the middle of a parameter."""
    found = find.choose(out_dir)
    weights = dict(found.weights())
    weights[name].view(-1)[weights[name].numel() // 2] = value
    checkpoint.save(out_dir, 7, weights, {}, found.state)
    return out_dir


WTE, LN_F = "transformer.wte.weight", "transformer.ln_f.weight"


@pytest.mark.parametrize("to", ["hf", "new/hf", "model.gguf"])
@pytest.mark.parametrize(
    ("name", "value", "dtype", "words"),
    [
        (WTE, float("nan"), "float32", [WTE, "1 numbers", "not finite"]),
        (LN_F, float("inf"), "bfloat16", [LN_F, "not finite"]),
        ("transformer.h.1.mlp.c_fc.bias", float("-inf"), "float16", ["h.1.mlp.c_fc.bias", "not finite"]),
        (WTE, 7e4, "float16", [WTE, "70000", "beyond float16", "65504", "another --dtype"]),
        (WTE, -7e4, "float16", [WTE, "beyond float16"]),
        (WTE, 3.4e38, "bfloat16", [WTE, "beyond bfloat16"]),
    ],
)
def test_numbers_that_are_not_finite(folio, tmp_path, to, name, value, dtype, words) -> None:
    """In the weights, or after rounding: the error names the parameter, and nothing is written."""
    damaged(save_random(tmp_path / "out", Bytes(), activation="gelu_tanh"), name, value)
    before = tree(tmp_path)
    argv = ("export", f"--out_dir={tmp_path / 'out'}", "--to", tmp_path / to, f"--dtype={dtype}")
    assert_refused(folio(*argv), tmp_path / "out", *words)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("to", ["hf", "model.gguf"])
def test_numbers_that_just_fit(folio, tmp_path, to) -> None:
    """The largest number of the type; and one that is not finite in a row that is cut off."""
    damaged(save_random(tmp_path / "out", Bytes(), activation="gelu_tanh", vocab_size=300), WTE, 65504.0)
    found = find.choose(tmp_path / "out")
    weights = dict(found.weights())
    weights[WTE][299] = float("nan")
    checkpoint.save(tmp_path / "out", 7, weights, {}, found.state)
    argv = ("export", f"--out_dir={tmp_path / 'out'}", "--to", tmp_path / to, "--dtype=float16")
    assert folio(*argv).code == 0


@dataclass(frozen=True)
class Later(GPTConfig):
    """What a later version may have."""

    rope_theta: float = 0.0
    windows: tuple[int, ...] = field(default_factory=tuple)


LATER: dict[str, dict[str, Any]] = {
    "position='rope'": {"position": "rope"},
    "norm='unweighted'": {"norm": "unweighted"},
    "activation='relu2'": {"activation": "relu2"},
    "qk_norm=True": {"qk_norm": True},
    "token_shift=1": {"token_shift": 1},
    "logit_softcap=15.0": {"logit_softcap": 15.0},
    "rope_theta=10000.0": {"rope_theta": 1e4},
    "windows=(8,)": {"windows": (8,)},
}


@pytest.mark.parametrize("to", ["hf", "model.gguf"])
@pytest.mark.parametrize("what", LATER)
def test_fields_that_the_formats_lack(tmp_path, to, what) -> None:
    """A field that GPT-2 lacks is refused by name unless it has its default."""
    found = find.in_folder(save_random(tmp_path / "out", Bytes(), activation="gelu_tanh"))
    export = gguf.export if to.endswith(".gguf") else hugging_face.export

    class Newer(checkpoint.Checkpoint):
        def config(self) -> GPTConfig:
            return Later(**{**self.state["model"], **self.asked})

    newer = Newer(found.path, found.state, LATER[what])
    with pytest.raises(ValueError, match=re.escape(f"{found.path}: {what}: other programs' GPT-2 does not support it")):
        export(newer, tmp_path / to)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    export(replace(newer, asked={}), tmp_path / to)
    assert (tmp_path / to).exists()


def test_every_field_is_exported_or_refused(tmp_path) -> None:
    """Each field survives export and import; a new field must be added to this test."""
    shape = {"block_size": 8, "vocab_size": 256, "n_layer": 1, "n_head": 3, "n_embd": 12, "dropout": 0.25}
    shape |= {"bias": False, "qkv_bias": True, "activation": "gelu_tanh", "tie_weights": False, "zero_init": True}
    refused = {"position", "norm", "token_shift", "qk_norm", "logit_softcap"}
    assert shape.keys() | refused == {f.name for f in fields(GPTConfig)}
    hugging_face.export(find.in_folder(save_random(tmp_path / "out", Bytes(), **shape)), tmp_path / "hf")
    assert find.by_name(str(tmp_path / "hf")).config() == GPTConfig(**shape)


@contextmanager
def small_files(size: int) -> Iterator[None]:
    """Files of this process cannot grow beyond ``size``, as on a disk that is full."""
    resource = pytest.importorskip("resource", reason=NO_POSIX)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("to", ["hf", "model.gguf"])
@pytest.mark.parametrize("size", [1_000, 40_000])
def test_a_write_that_fails_leaves_nothing(folio, tmp_path, to, size) -> None:
    """If files cannot grow to their length, the error is one line."""
    save_random(tmp_path / "out", Bytes(), activation="gelu_tanh")
    before = tree(tmp_path)
    with small_files(size):
        outcome = folio("export", f"--out_dir={tmp_path / 'out'}", "--to", tmp_path / to)
    assert_refused(outcome, to, "could not be written")
    assert tree(tmp_path) == before


def test_appearing_in_an_empty_folder_and_after_a_kill(tmp_path) -> None:
    """An empty folder is replaced; the rest of a killed attempt is removed."""
    rest = tmp_path / ".hf.unfinished"
    (tmp_path / "hf").mkdir()
    rest.mkdir()
    (rest / "half").write_text("half")
    with files.written_atomically(tmp_path / "hf") as unfinished:
        assert unfinished == rest
        unfinished.mkdir()
        (unfinished / "whole").write_text("whole")
        assert not list((tmp_path / "hf").iterdir())
    assert tree(tmp_path) == {"hf": b"", "hf/whole": b"whole"}


def test_appearing_is_undone_by_any_error(tmp_path) -> None:
    def attempt() -> None:
        with files.written_atomically(tmp_path / "new" / "hf") as unfinished:
            unfinished.mkdir()
            (unfinished / "half").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attempt()
    assert tree(tmp_path) == {"new": b""}
