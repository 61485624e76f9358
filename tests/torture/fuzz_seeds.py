"""Valid files of each kind, which the fuzzer changes, and how it writes them."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import pickle
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from fuzz_inputs import changed_bytes, changed_json
from hypothesis import strategies as st
from pt_contents import small
from small_checkpoints import SHAPE, tensors, trained

from folio import files
from folio.checkpoints import checkpoint
from folio.checkpoints.state import State
from folio.config.options import System, TrainConfig
from folio.config.table import flat
from folio.data.tokenizers import Characters
from folio.machine.choices import resolve
from folio.model.config import GPTConfig
from folio.preparation.job import prepare
from folio.preparation.recipes import named_by_user
from folio.records import run_folder

_TEXT = "The ferry left at noon.\nNobody saw it.\n" * 20
_CHARACTERS = "".join(sorted(set(_TEXT)))
Sealed = tuple[Any, bool] | bytes  # what ``sealed_json`` draws


class Seeds(NamedTuple):
    """Valid content of each kind."""

    out_dir: Path
    files: dict[str, bytes]  # of the out_dir and its checkpoint, by name
    data: Path
    pickles: list[bytes]  # of a meta.pkl
    archives: list[bytes]  # of torch.save, in both formats
    arrays: list[bytes]  # .npy
    tokenizer: dict[str, Any]  # a tokenizer.json
    records: list[dict[str, Any]]  # of a metrics.jsonl
    item: dict[str, Any]  # of HellaSwag


@functools.cache
def seeds() -> Seeds:
    room = Path(tempfile.mkdtemp(prefix="folio-seeds-"))
    out_dir, data = room / "out", room / "data"
    config = GPTConfig(**{**asdict(SHAPE), "vocab_size": len(_CHARACTERS)})
    model, optimizer = trained(shape=config)
    known = State(step=60, rows=240, tokens=1920, seconds=1.5, train_loss=2.1, val_loss=2.3)
    scaler = {"scale": 2.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 9, "_growth_tracker": 0}
    state = {"run": "a1", **asdict(known), "best": {"step": 60, "loss": 2.3}, "model": asdict(config), "row": 8}
    state |= {"tokenizer": Characters(_CHARACTERS).to_json(), "data": {"train": "00", "val": "11"}, "owed": ["sample"]}
    state |= {"sources": [{"name": "data", "share": 1.0, "tokens": 100}], "optimizer": "AdamW", "scaler": scaler}
    state |= {"resolved": dict(resolve(System(device="cpu")).resolved)}
    checkpoint.save(out_dir, 60, *tensors(model, optimizer), state)
    run_folder.write_config(out_dir, "a1", {**flat(TrainConfig()), "data_dir": str(data)})
    files.write_sealed(out_dir / "best.json", {"step": 60, "loss": 2.3})
    text = room / "text.txt"
    text.write_text(_TEXT)
    with contextlib.redirect_stdout(io.StringIO()):
        prepare(named_by_user([str(text)], "data", tokenizer="char", val_fraction=0.2), data)
    archives = [torch_saved(small(), zipped) for zipped in (True, False)]
    meta = {"vocab_size": 3, "itos": dict(enumerate("abc")), "stoi": {"a": 0, "b": np.int64(1), "c": np.arange(3)}}
    arrays = []
    for version in ((1, 0), (2, 0)):
        held = io.BytesIO()
        np.lib.format.write_array(held, np.arange(100, dtype=np.uint16), version)
        arrays.append(held.getvalue())
    return Seeds(
        out_dir,
        {path.name: path.read_bytes() for path in out_dir.rglob("*") if path.is_file()},
        data,
        [pickle.dumps(meta, protocol) for protocol in (0, 2, 4, 5)],
        archives,
        arrays,
        json.loads(Characters("abc <|endoftext|>").fast().to_str()),
        [
            {"kind": "start", "step": 0, "device": "cpu", "threads": 1, "tokens_per_iteration": 64},
            {"kind": "train", "step": 0, "loss": 2.5, "lr": 0.1, "grad_norm": 1.0, "tokens": 64, "seconds": 0.1},
            {"kind": "eval", "step": 1, "train_loss": 2.4, "val_loss": 2.5, "tokens": 64, "seconds": 0.2},
            {"kind": "hellaswag", "step": 1, "style": "completion", "acc": 0.2, "acc_norm": 0.3, "total": 12},
            {"kind": "sample", "step": 1, "text": "The", "number": 0},
            {"kind": "wte", "step": 1, "norm": 0.5},
        ],
        {"ind": 0, "activity_label": "The Ferry", "ctx_a": "It left", "ctx_b": "then", "ctx": "It left then"}
        | {"endings": ["a", "b [x] c", "d", "e"], "label": 1},
    )


def torch_saved(content: Any, zipped: bool) -> bytes:
    """What ``torch.save`` writes, as an archive or in the legacy format."""
    held = io.BytesIO()
    torch.save(content, held, _use_new_zipfile_serialization=zipped)
    return held.getvalue()


def value_of(name: str) -> Any:
    """The value in a JSON file of the seeds' run."""
    return json.loads(seeds().files[name])


def sealed_json(*values: Any) -> st.SearchStrategy[Sealed]:
    """One of the JSON values after changes, and whether to give it its checksum; or changed bytes of the first."""
    return st.tuples(changed_json(values), st.booleans()) | changed_bytes([json.dumps(values[0]).encode()])


def write_sealed(path: Path, content: Sealed) -> None:
    """Writes what ``sealed_json`` draws. Some values cannot have a checksum of themselves."""
    if isinstance(content, bytes):
        path.write_bytes(content)
        return
    value, seal = content
    hashes = value.get("sha256", {}) if isinstance(value, dict) else None
    if seal and isinstance(hashes, dict):
        with contextlib.suppress(RecursionError):
            files.write_sealed(path, value)
            return
    path.write_text(json.dumps(value))


def empty(folder: Path) -> Path:
    """The folder, without what an earlier input left there."""
    files.remove(folder)
    folder.mkdir()
    return folder


def copied(folder: Path) -> Path:
    """A copy of the seeds' run in a folder, without what an earlier input left there."""
    out = folder / "out"
    files.remove(out)
    shutil.copytree(seeds().out_dir, out)
    return out
