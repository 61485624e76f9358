"""Reads the files of TensorBoard, Weights & Biases and trackio back."""

from __future__ import annotations

import html
import json
import struct
import sys
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple


class Seen(NamedTuple):
    """A run as a tracker shows it: (step, value) of each number and text, by name."""

    points: dict[str, list[tuple[int, Any]]]
    config: dict[str, Any]


def verbatim(markdown: str) -> str:
    """The text from Markdown that shows it unchanged."""
    assert all(line.startswith("    ") for line in markdown.splitlines())
    return textwrap.dedent(markdown)


def tensorboard(out: Path) -> Seen:
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    found = EventAccumulator(str(out / "tensorboard"))  # as its pages do
    found.Reload()
    points: dict[str, list[tuple[int, Any]]] = {}
    for name in found.Tags()["tensors"]:
        values = [(e.step, make_ndarray(e.tensor_proto).reshape(-1)[0]) for e in found.Tensors(name)]
        if name.endswith("/text_summary"):
            values = [(step, verbatim(text.decode())) for step, text in values]
        points[name.removesuffix("/text_summary")] = values
    return Seen(points, json.loads(points.pop("config")[-1][1]))


def records_of(path: Path) -> Iterator[Any]:
    """The records in a run's local file: a LevelDB log after a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (rest := 2**15 - at % 2**15) < 7:
            at += rest
        _, size, part = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if part in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(whole)
            whole = b""


def wandb_records(out: Path, kind: str) -> list[Any]:
    """The records of one kind from all processes of the run abc123."""
    sys.modules["wandb"].teardown()  # its server writes everything before it ends
    paths = sorted((out / "wandb").glob("offline-run-*/run-abc123.wandb"))
    return [getattr(r, kind) for path in paths for r in records_of(path) if r.HasField(kind)]


def wandb_rows(out: Path) -> list[dict[str, Any]]:
    """The logged rows, without W&B's own columns."""
    rows = []
    for history in wandb_records(out, "history"):
        row: dict[str, Any] = {}
        for item in history.item:
            name, *part = item.nested_key or [item.key]
            value = json.loads(item.value_json)
            row[name] = {**row.get(name, {}), part[0]: value} if part else value
        rows.append({name: value for name, value in row.items() if not name.startswith("_")})
    return rows


def wandb(out: Path) -> Seen:
    points: dict[str, list[tuple[int, Any]]] = defaultdict(list)
    for row in wandb_rows(out):
        step = row.pop("step")
        for name, value in row.items():
            if isinstance(value, dict):
                (path,) = out.glob(f"wandb/offline-run-*/files/{value['path']}")
                escaped = path.read_text().partition("<pre>")[2].removesuffix("</pre>")
                assert "<" not in escaped
                value = html.unescape(escaped)
            points[name].append((step, value))
    run = wandb_records(out, "run")[-1]
    return Seen(points, {u.key: json.loads(u.value_json) for u in run.config.update})


def trackio(out: Path) -> Seen:
    from trackio import Api
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = Api().runs(out.name)
    assert run.name == "first-abc123"
    points: dict[str, list[tuple[int, Any]]] = defaultdict(list)
    for row in SQLiteStorage.get_logs(out.name, run_id=run.id):
        step = row.pop("step")
        row.pop("timestamp")
        for name, value in row.items():
            points[name].append((step, verbatim(value["_value"]) if isinstance(value, dict) else value))
    return Seen(points, run.config)


READ: dict[str, Callable[[Path], Seen]] = {"tensorboard": tensorboard, "wandb": wandb, "trackio": trackio}
