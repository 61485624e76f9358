"""The readers that are fuzzed: for each, valid content to change, and what reads it as a command would."""

from __future__ import annotations

import contextlib
import functools
import gzip
import io
import json
import pickle
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from fuzz_inputs import SCALARS, VALUES, changed_bytes, changed_json, changed_text
from hypothesis import strategies as st
from pt_contents import small
from safetensors.torch import save_file
from small_checkpoints import SHAPE, tensors, trained

from folio import cli, files
from folio.checkpoints import checkpoint, find, hugging_face, model_card, pt_files, safetensors_files
from folio.checkpoints.state import State
from folio.commands import data as data_command
from folio.config.compose import Layer, compose
from folio.config.files import PRESETS, read_file
from folio.config.options import Data, System, TrainConfig
from folio.config.table import flat, table
from folio.data import tokenizers
from folio.data.meta_files import read_meta_pkl
from folio.data.rows import Tokens
from folio.data.tokenizers import Bytes, Characters
from folio.evaluation import hellaswag
from folio.machine.choices import resolve
from folio.model.config import GPTConfig
from folio.preparation.documents import WorkerSettings
from folio.preparation.job import prepare
from folio.preparation.recipes import named_by_user
from folio.preparation.workers import Tokenize
from folio.records import history, metrics, report, run_folder
from folio.training.ownership import refuse_foreign
from folio.training.resume import find_former_run, overlay

_TEXT = "The ferry left at noon.\nNobody saw it.\n" * 20
_CHARACTERS = "".join(sorted(set(_TEXT)))


@dataclass(frozen=True)
class Target:
    """A reader: ``inputs`` makes the strategy, ``read`` writes a value into a folder and reads it there."""

    inputs: Callable[[], st.SearchStrategy[Any]]
    read: Callable[[Any, Path], object]


TARGETS: dict[str, Target] = {}


def target(inputs: Callable[[], st.SearchStrategy[Any]]) -> Callable[[Any], Any]:
    """Adds a reader to the targets, by its name."""

    def add(read: Callable[[Any, Path], object]) -> Any:
        TARGETS[read.__name__] = Target(inputs, read)
        return read

    return add


class Seeds(NamedTuple):
    """Valid content of each kind."""

    out_dir: Path
    files: dict[str, bytes]  # of the out_dir's run and its checkpoint, by name
    data: Path
    pickles: list[bytes]
    archives: list[bytes]
    arrays: list[bytes]  # .npy
    tokenizer: dict[str, Any]
    records: list[dict[str, Any]]
    item: dict[str, Any]


@functools.cache
def seeds() -> Seeds:
    room = Path(tempfile.mkdtemp(prefix="folio-seeds-"))
    out_dir, data = room / "out", room / "data"
    model, optimizer = trained()
    config = GPTConfig(**{**asdict(SHAPE), "vocab_size": len(_CHARACTERS)})
    model, optimizer = trained(shape=config)
    known = asdict(State(step=60, rows=240, tokens=1920, seconds=1.5, train_loss=2.1, val_loss=2.3))
    state = {
        "run": "a1",
        **known,
        "best": {"step": 60, "loss": 2.3},
        "model": asdict(config),
        "tokenizer": Characters(_CHARACTERS).to_json(),
        "data": {"train": "00", "val": "11"},
        "sources": [{"name": "data", "share": 1.0, "tokens": 100}],
        "row": 8,
        "owed": ["sample"],
        "optimizer": "AdamW",
        "scaler": {
            "scale": 2.0,
            "growth_factor": 2.0,
            "backoff_factor": 0.5,
            "growth_interval": 9,
            "_growth_tracker": 0,
        },
        "resolved": {**resolve(System(device="cpu")).resolved},
    }
    checkpoint.save(out_dir, 60, *tensors(model, optimizer), state)
    run_folder.write_config(out_dir, "a1", {**flat(TrainConfig()), "data_dir": str(data)})
    files.write_sealed(out_dir / "best.json", {"step": 60, "loss": 2.3})
    text = room / "text.txt"
    text.write_text(_TEXT)
    with contextlib.redirect_stdout(io.StringIO()):
        prepare(named_by_user([str(text)], "data", tokenizer="char", val_fraction=0.2), data)
    content, archives = small(), []
    for zipped in (True, False):
        held = io.BytesIO()
        torch.save(content, held, _use_new_zipfile_serialization=zipped)
        archives.append(held.getvalue())
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
        {
            "ind": 0,
            "activity_label": "The Ferry",
            "ctx_a": "It left",
            "ctx_b": "then",
            "ctx": "It left then",
            "endings": ["a", "b [x] c", "d", "e"],
            "label": 1,
        },
    )


def value_of(name: str) -> Any:
    return json.loads(seeds().files[name])


def sealed(path: Path, value: Any, seal: bool) -> None:
    """Writes a JSON value, with the right checksum of itself if that is asked for and possible."""
    hashes = value.get("sha256", {}) if isinstance(value, dict) else None
    if seal and isinstance(hashes, dict):
        with contextlib.suppress(RecursionError):
            files.write_sealed(path, value)
            return
    path.write_text(json.dumps(value))


def copied(folder: Path) -> Path:
    """The run of the seeds in a folder, without what an input before it left there."""
    out = folder / "out"
    files.remove(out)
    place = run_folder.checkpoint_folder(out, 60)
    place.mkdir(parents=True)
    for name, content in seeds().files.items():
        (place if name in (run_folder.MODEL, run_folder.OPTIMIZER, run_folder.STATE) else out).joinpath(
            name
        ).write_bytes(content)
    return out


# Options


_NAMES = sorted(table(TrainConfig))
_ATOMS = st.one_of(
    st.sampled_from(_NAMES),
    SCALARS.map(repr),
    st.sampled_from(
        ["x", "1e9", "'a'", "[1, 2]", "{'a': 1}", "()", "math", "time.time()", "math.pi", "2**31", "f'{x}'"]
    ),
)
_OPERATORS = ["+", "-", "*", "/", "//", "%", "**", "<<", ">>", "&", "|", "^", "<", "==", "in", "is", "and", "or"]
_EXPRESSIONS = st.recursive(
    _ATOMS,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(_OPERATORS), inner).map(" ".join),
        st.tuples(
            st.sampled_from(["-", "not ", "~", "int", "str", "min", "round", "abs", "len", "math.sqrt"]), inner
        ).map(lambda pair: f"{pair[0]}({pair[1]})"),
        st.tuples(inner, inner, inner).map(lambda three: f"({three[0]} if {three[1]} else {three[2]})"),
        st.tuples(inner, inner).map(lambda pair: f"({pair[0]})[{pair[1]}]"),
        st.tuples(inner, st.sampled_from(["", ":>9", "!r", ":.3f", ":99999", ":x"])).map(
            lambda p: "f'{" + "".join(p) + "}'"
        ),
    ),
    max_leaves=6,
)
_LINES = st.one_of(
    st.tuples(
        st.sampled_from([*_NAMES, "x", "_y"]), st.sampled_from([" = ", " += ", ": int = ", " = x = "]), _EXPRESSIONS
    ).map("".join),
    _EXPRESSIONS.map(lambda e: f"if {e}:\n    x = 1\nelse:\n    n_layer = 2"),
    st.sampled_from(
        ["import math", "from math import *", "del x", "exec('x')", "a, b = 1, 2", "*a, b = 1, 2", "x[0] = 1"]
    ),
    st.sampled_from(
        ["(" * 300, "-" * 3000 + "1", "x = " + "[" * 150 + "]" * 150, "\f", "\\", "'''", "é = 1", "async def f(): 1"]
    ),
)


def presets() -> list[bytes]:
    return [path.read_bytes() for path in sorted(PRESETS.glob("*.py"))]


@target(
    lambda: (
        st.lists(_LINES, max_size=6).map(lambda lines: "\n".join(lines).encode("utf-8", "replace"))
        | changed_bytes(presets())
    )
)
def config_py(content: bytes, folder: Path) -> None:
    (folder / "c.py").write_bytes(content)
    _options_of(folder / "c.py")


def _options_of(path: Path) -> None:
    values = read_file(str(path), TrainConfig, names={"x": 3})
    compose(TrainConfig(), [Layer(str(path), values)])


_OPTIONS = st.dictionaries(st.sampled_from(_NAMES) | st.text(max_size=5), VALUES, max_size=5)


@target(
    lambda: (
        changed_text([{"n_layer": 2, "dropout": 0.1, "dtype": "auto"}]) | _OPTIONS.map(lambda o: json.dumps(o).encode())
    )
)
def config_json_file(content: bytes, folder: Path) -> None:
    (folder / "c.json").write_bytes(content)
    _options_of(folder / "c.json")


_TOML = [
    b"n_layer = 2\ndropout = 0.1\nout_dir = 'x'\n[a]\nb = 1\n",
    b"a = {b = 1}\nn_head = 0x10\nlearning_rate = inf\n",
]
_TOML += [b"x = 1979-05-27T07:32:00Z\ny = '''\n'''\nz = [[1], [2.5, \"\\u00e9\"]]\n"]


@target(
    lambda: (
        changed_bytes(_TOML)
        | _OPTIONS.map(lambda o: "\n".join(f"{json.dumps(k)} = {json.dumps(v)}" for k, v in o.items()).encode())
    )
)
def config_toml(content: bytes, folder: Path) -> None:
    (folder / "c.toml").write_bytes(content)
    _options_of(folder / "c.toml")


def _command_lines() -> st.SearchStrategy[tuple[str, list[str]]]:
    commands = [*cli.COMMANDS, "train_gpt", "tokenize_documents_parallel"]
    text = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=6)
    values = SCALARS.map(str).filter(lambda s: "\0" not in s and s.isprintable()) | text | _EXPRESSIONS

    def words(command: str) -> st.SearchStrategy[tuple[str, list[str]]]:
        names = st.sampled_from(sorted(table(cli.module_of(command).Options)) or ["help"])
        word = st.one_of(
            st.tuples(names, values).map(lambda pair: f"--{pair[0]}={pair[1]}"),
            names.map(lambda name: f"--{name}"),
            names.map(lambda name: f"--no-{name.replace('_', '-')}"),
            text,
            values,
            text.map(lambda t: f"--{t}"),
            st.sampled_from(
                ["--", "-", "-h", "--help=all", "--help=n_layer", "-o", "train_gpt2", "--=", "---x", ".", "c.py"]
            ),
        )
        return st.tuples(st.just(command), st.lists(word, max_size=6))

    return st.sampled_from(commands).flatmap(words)


@target(_command_lines)
def command_line(typed: tuple[str, list[str]], folder: Path) -> None:
    command, argv = typed
    module = cli.module_of(command)
    with contextlib.suppress(SystemExit):  # after --help
        cli.parse(
            module.Options,
            [word.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape") for word in argv],
            f"folio {command}",
            files=command in cli._TAKE_FILES,
            preset=getattr(module, "PRESET", None),
            ignored=getattr(module, "IGNORED", None),
        )


# Data sets


def _headed(magic: int, version: int, count: int, ids: np.ndarray[Any, Any]) -> bytes:
    return np.array([magic, version, count, *[0] * 253], dtype="<i4").tobytes() + ids.tobytes()


def _token_files() -> st.SearchStrategy[tuple[str, bytes, bytes, bytes]]:
    ids = np.arange(100, dtype="<u2") % 7
    bins = [ids.tobytes(), ids.astype("<u4").tobytes(), ids.astype("u1").tobytes(), ids.astype(">u2").tobytes()]
    bins += [_headed(20240520, 1, 100, ids), _headed(20240801, 7, 100, ids.astype("<u4")), _headed(20240326, 3, 9, ids)]
    ends = [np.array(e, dtype="<u8").tobytes() for e in ([10, 20, 100], [100], [60, 40, 100], [0, 50])]
    names = [b"gpt2|2\n100\n100", b"a/b|4", b"../tok.json|2", b"\xff|x", b"|", b"/etc/passwd|2"]
    whole = changed_bytes([*bins, *seeds().arrays])
    return st.one_of(
        st.tuples(st.just(".bin"), changed_bytes(bins), st.just(b""), st.just(b"")),
        st.tuples(st.just(".npy"), changed_bytes(seeds().arrays), st.just(b""), st.just(b"")),
        st.tuples(st.sampled_from([".bin", ".npy"]), whole, st.just(b""), st.just(b"")),
        st.tuples(
            st.just(".ds"),
            st.just(bins[0]) | changed_bytes(bins),
            st.sampled_from(ends) | changed_bytes(ends),
            st.sampled_from(names) | changed_bytes(names),
        ),
    )


@target(_token_files)
def token_file(content: tuple[str, bytes, bytes, bytes], folder: Path) -> None:
    suffix, ids, index, metadata = content
    data = folder / "tokens"
    files.remove(data)
    data.mkdir()
    for name in ("x_train_0", "x_val_0"):
        (data / f"{name}{suffix}").write_bytes(ids)
        if suffix == ".ds":
            (data / f"{name}.ds.index").write_bytes(index)
            (data / f"{name}.ds.metadata").write_bytes(metadata)
    use_data(data)


def use_data(data: Path) -> None:
    """What folio data info and the beginning of a run read."""
    data_command.main(data_command.Options("info", str(data), verify=True))
    tokens = Tokens.open(Data(data_dir=str(data)), 8, 1337)
    tokens.fingerprint()
    tokens.tokenizer()
    tokens.sources()
    tokens.rows("train", 0, 4)
    tokens.windows("val", tokens.spread("val", 2))
    with contextlib.suppress(files.UserError):
        tokens.with_documents("auto")


def _meta() -> st.SearchStrategy[tuple[Any, bool] | bytes]:
    value = json.loads((seeds().data / "meta.json").read_text())
    library = {**value, "tokenizer": {"kind": "tokenizers", "file": seeds().tokenizer}}
    values = [value, {**value, "tokenizer": {"kind": "bytes"}}, {**value, "tokenizer": {"kind": "ids"}}, library]
    return st.tuples(changed_json(values), st.booleans()) | changed_bytes([json.dumps(value).encode()])


@target(_meta)
def meta_json(content: tuple[Any, bool] | bytes, folder: Path) -> None:
    data = folder / "data"
    files.remove(data)
    data.mkdir()
    for name in ("train.bin", "val.bin"):
        (data / name).write_bytes((seeds().data / name).read_bytes())
    if isinstance(content, bytes):
        (data / "meta.json").write_bytes(content)
    else:
        sealed(data / "meta.json", *content)
    use_data(data)


_OPCODES = [
    b".",
    b"N",
    b"}",
    b"]",
    b")",
    b"(",
    b"t",
    b"l",
    b"d",
    b"s",
    b"u",
    b"a",
    b"e",
    b"R",
    b"b",
    b"o",
    b"\x81",
    b"\x92",
]
_OPCODES += [
    b"2",
    b"0",
    b"1",
    b"\x85",
    b"\x86",
    b"\x87",
    b"\x94",
    b"h\0",
    b"h\1",
    b"q\0",
    b"Q",
    b"K\1",
    b"J\xff\xff\xff\xff",
]
_OPCODES += [
    b"\x8a\x08" + b"\xff" * 8,
    b"\x8a\x01\x05",
    b"U\x03abc",
    b"X\x01\0\0\0a",
    b"\x8c\x07storage",
    b"G" + b"\0" * 8,
]
_OPCODES += [
    b"I1\n",
    b"L5L\n",
    b"F1.5\n",
    b"S'a'\n",
    b"Va\n",
    b"B\x04\0\0\0abcd",
    b"\x93",
    b"\x8f",
    b"\x91",
    b"\x90",
    b"\x97",
]
_NAMES_IN_PICKLES = ["builtins list", "builtins dict", "numpy dtype", "numpy.core.multiarray scalar", "os system"]
_NAMES_IN_PICKLES += ["numpy.core.multiarray _reconstruct", "numpy.core.numeric _frombuffer", "copyreg _reconstructor"]
_NAMES_IN_PICKLES += ["pathlib PurePosixPath", "collections OrderedDict", "collections defaultdict", "_codecs encode"]
_NAMES_IN_PICKLES += ["torch FloatStorage", "torch._utils _rebuild_tensor_v2", "torch Size", "argparse Namespace"]
_OPCODES += [b"c" + name.replace(" ", "\n").encode() + b"\n" for name in _NAMES_IN_PICKLES]


def _pickles(more: list[bytes]) -> st.SearchStrategy[bytes]:
    made = st.lists(st.sampled_from(_OPCODES), max_size=30).map(lambda parts: b"\x80\x04" + b"".join(parts) + b".")
    return changed_bytes(more) | made if more else made


@target(lambda: _pickles(seeds().pickles))
def meta_pkl(content: bytes, folder: Path) -> None:
    (folder / "meta.pkl").write_bytes(content)
    size, spec = read_meta_pkl(folder / "meta.pkl")
    if spec != tokenizers.IDS_ONLY:
        tokenizers.from_json(spec).bytes(range(min(size, 3)))


# Models


def _pt_contents() -> st.SearchStrategy[bytes]:
    """Files of torch.save: with changed bytes, with a changed pickle, or of changed values."""
    odd = st.sampled_from(
        [torch.ones(2), torch.ones(1).expand(4), torch.tensor(1j), torch.empty(0), torch.ones(1).byte()]
    )
    weird = VALUES | odd | st.sampled_from([np.float64(1), np.arange(2), (1, 2), b"x", {1, 2}])

    @st.composite
    def changed(draw: Any) -> bytes:
        content = small()
        for _ in range(draw(st.integers(1, 3))):
            whole: Any = {"": content}
            key: Any = ""
            while isinstance(inner := whole[key], dict) and inner and draw(st.integers(0, 3)):
                whole, key = inner, draw(st.sampled_from(list(inner)))
            if draw(st.booleans()) or key == "":
                whole[key if draw(st.integers(0, 3)) else draw(st.sampled_from([0, "x", 2.5, None, True]))] = draw(
                    weird
                )
            else:
                del whole[key]
            content = content if key else whole.get("", content)
        held = io.BytesIO()
        torch.save(content, held, _use_new_zipfile_serialization=draw(st.booleans()))
        return held.getvalue()

    return changed_bytes(seeds().archives) | changed() | _pickles([seeds().archives[1]]) | _pickles([]).map(_archive_of)


def _archive_of(pickled: bytes) -> bytes:
    import zipfile

    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        archive.writestr("a/data.pkl", pickled)
        archive.writestr("a/data/0", bytes(64))
    return held.getvalue()


@target(_pt_contents)
def pt_file(content: bytes, folder: Path) -> None:
    path = folder / "ckpt.pt"
    path.write_bytes(content)
    use_model(pt_files.read(path))


def use_model(found: checkpoint.Checkpoint) -> None:
    """What the commands do with a model."""
    found.model()
    for _ in found.slots():
        pass
    if found.tokenizer_spec is not None:
        found.tokenizer().bytes([0])
    model_card.facts(found)


def _safetensors() -> st.SearchStrategy[bytes]:
    content = seeds().files[run_folder.MODEL]
    size = int.from_bytes(content[:8], "little")
    header, rest = json.loads(content[8 : 8 + size]), content[8 + size :]

    def joined(value: Any) -> bytes:
        raw = json.dumps(value).encode()
        return len(raw).to_bytes(8, "little") + raw + rest

    odd = {"a": {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [0, 4]}}
    odd |= {"b": {"dtype": "F4", "shape": [8], "data_offsets": [4, 8]}}
    short = len(json.dumps(odd)).to_bytes(8, "little") + json.dumps(odd).encode() + bytes(8)
    kinds = [
        "F64",
        "F32",
        "F16",
        "BF16",
        "I64",
        "U8",
        "BOOL",
        "F8_E4M3",
        "F8_E8M0",
        "F4",
        "F6_E2M3",
        "C64",
        "U64",
        "I32",
    ]

    @st.composite
    def retyped(draw: Any) -> bytes:
        value = json.loads(json.dumps(header))
        for name in value:
            if name != "__metadata__" and draw(st.booleans()):
                begin, end = value[name]["data_offsets"]
                value[name]["dtype"] = draw(st.sampled_from(kinds))
                value[name]["shape"] = draw(
                    st.sampled_from([[end - begin], [(end - begin) // 2], [(end - begin) // 4], []])
                )
        return joined(value)

    return changed_bytes([content, short]) | changed_json([header]).map(joined) | retyped()


@target(_safetensors)
def safetensors_file(content: bytes, folder: Path) -> None:
    """With a checksum that fits, as an attacker would write it."""
    out = copied(folder)
    place = run_folder.checkpoint_folder(out, 60)
    for name in (run_folder.MODEL, run_folder.OPTIMIZER):
        (place / name).write_bytes(content)
    for _ in safetensors_files.read(place / run_folder.MODEL):
        pass
    state = value_of(run_folder.STATE)
    state["sha256"] |= {name: files.sha256(place / name) for name in (run_folder.MODEL, run_folder.OPTIMIZER)}
    files.write_sealed(place / run_folder.STATE, state)
    use_model(find.choose(out))


@target(
    lambda: (
        st.tuples(changed_json([value_of(run_folder.STATE)]), st.booleans())
        | changed_bytes([seeds().files[run_folder.STATE]])
    )
)
def state_json(content: tuple[Any, bool] | bytes, folder: Path) -> None:
    out = copied(folder)
    path = run_folder.checkpoint_folder(out, 60) / run_folder.STATE
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        sealed(path, *content)
    find.best_step(out)
    refuse_foreign(out, False, True)
    found = find.choose(out)
    use_model(found)
    former = find_former_run(out, "auto")
    assert former
    config, _ = overlay(TrainConfig(), former)
    State.of(found.state)
    resolve(config.system, config.processes, before=found.state["resolved"]).differences(found.state["resolved"])


@target(
    lambda: (
        st.tuples(changed_json([value_of(run_folder.CONFIG)]), st.booleans())
        | changed_bytes([seeds().files[run_folder.CONFIG]])
    )
)
def run_config(content: tuple[Any, bool] | bytes, folder: Path) -> None:
    out = copied(folder)
    if isinstance(content, bytes):
        (out / run_folder.CONFIG).write_bytes(content)
    else:
        sealed(out / run_folder.CONFIG, *content)
    refuse_foreign(out, False, True)
    found = find.choose(out)
    model_card.facts(found)
    history.options_of(out)
    former = find_former_run(out, "auto")
    assert former
    overlay(TrainConfig(), former)
    compose(TrainConfig(), [Layer("c", {k: v for k, v in former.found.asked.items() if k in table(TrainConfig)})])


@target(
    lambda: (
        st.tuples(changed_json([value_of(run_folder.BEST)]), st.booleans())
        | changed_bytes([seeds().files[run_folder.BEST]])
    )
)
def best_json(content: tuple[Any, bool] | bytes, folder: Path) -> None:
    out = copied(folder)
    if isinstance(content, bytes):
        (out / run_folder.BEST).write_bytes(content)
    else:
        sealed(out / run_folder.BEST, *content)
    refuse_foreign(out, False, True)
    assert find.choose(out).step == 60


def _records() -> st.SearchStrategy[bytes]:
    lines = [json.dumps(record).encode() for record in seeds().records]
    line = changed_json(seeds().records).map(lambda value: json.dumps(value).encode()) | changed_bytes(lines)
    return st.lists(line | st.sampled_from(lines), max_size=8).map(b"\n".join) | changed_bytes(
        [b"\n".join(lines) + b"\n"]
    )


@target(_records)
def metrics_jsonl(content: bytes, folder: Path) -> None:
    out = folder / "run"
    files.remove(out)
    out.mkdir()
    (out / run_folder.METRICS).write_bytes(content)
    (out / run_folder.EVALUATIONS).write_bytes(content)
    metrics.holds_records(out / run_folder.METRICS)
    read = history.read(out)
    h = history.history("run", read, {})
    for section in (report._summary, report._evaluations):
        section(h, read)
    report._hellaswag(h)
    report._evaluated(metrics.read_metrics(out / run_folder.EVALUATIONS))
    report._samples(read["sample"])
    report._machine(read["start"])
    for drawn in (h.train, h.validation, *h.others.values()):
        if drawn.size:
            history.smooth(drawn[1])
            history.thin(drawn)
    if h.train.size or h.validation.size:
        history.span([h])
    history.unit_of([h])
    metrics.rewind(out / run_folder.METRICS, 1, {"eval"})


@target(lambda: st.lists(changed_text([seeds().item]), min_size=1, max_size=3).map(b"\n".join))
def hellaswag_items(content: bytes, folder: Path) -> None:
    (folder / "items.jsonl").write_bytes(content)
    shape = GPTConfig(block_size=16, vocab_size=256)
    for style in ("completion", "harness"):
        with contextlib.suppress(files.UserError) if style == "completion" else contextlib.nullcontext():
            hellaswag.encode(hellaswag.read(folder / "items.jsonl", style), style, Bytes(), shape)


def _tokenizer_files() -> st.SearchStrategy[bytes]:
    bpe = {
        **seeds().tokenizer,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "added_tokens": [
            {
                "id": 2,
                "content": "</s>",
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        ],
        "normalizer": {"type": "Replace", "pattern": {"Regex": "a+"}, "content": "b"},
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]], "unk_token": "a"},
    }
    return changed_text([seeds().tokenizer, bpe])


@target(_tokenizer_files)
def tokenizer_json(content: bytes, folder: Path) -> None:
    (folder / "t.json").write_bytes(content)
    use_tokenizer(tokenizers.named(str(folder / "t.json")))


def use_tokenizer(found: tokenizers.Tokenizer) -> None:
    for text in ("", "abc ab", "é\ud7ff"):
        with contextlib.suppress(tokenizers.UserError):
            found.bytes(found.encode(text, special=True).tolist())
    found.bytes(range(min(found.size, 5)))
    tokenizers.from_json(found.to_json())


_HF = {
    "model_type": "gpt2",
    "n_positions": 8,
    "n_layer": 1,
    "n_head": 2,
    "n_embd": 8,
    "vocab_size": 11,
    "activation_function": "gelu_new",
    "folio": {
        "model": asdict(SHAPE),
        "state": asdict(State(step=3)),
        "asked": {"learning_rate": 0.1},
        "facts": {"seed": "1"},
        "tokenizer": {"kind": "characters", "characters": "abcdefghijk"},
    },
}
_HF_FILES = {
    "model.safetensors.index.json": {"weight_map": {"a": "model.safetensors", "b": "model.safetensors"}},
    "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer", "eos_token": "</s>", "add_prefix_space": True},
    "special_tokens_map.json": {"unk_token": {"content": "<unk>"}, "additional_special_tokens": ["<x>"]},
    "added_tokens.json": {"<x>": 258},
    "vocab.json": {**{c: i for i, c in enumerate(tokenizers.byte_characters().values())}, "ab": 256, "</s>": 257},
}


def _hugging_face() -> st.SearchStrategy[dict[str, bytes]]:
    others = st.sampled_from(sorted(_HF_FILES)).flatmap(
        lambda name: changed_text([_HF_FILES[name]]).map(lambda content: {name: content})
    )
    texts = st.sampled_from(["merges.txt", "vocab.txt"]).flatmap(
        lambda name: changed_bytes([b"#version: 0.2\na b\n", b"[UNK]\na\nb\n"]).map(lambda content: {name: content})
    )
    config = changed_text([_HF, {k: v for k, v in _HF.items() if k != "folio"}]).map(lambda c: {"config.json": c})
    return (
        config
        | others
        | texts
        | st.tuples(config, others, texts).map(lambda all: {k: v for d in all for k, v in d.items()})
    )


@target(_hugging_face)
def hugging_face_folder(content: dict[str, bytes], folder: Path) -> None:
    model = folder / "model"
    files.remove(model)
    model.mkdir()
    for name, value in _HF_FILES.items():
        (model / name).write_text(json.dumps(value))
    (model / "merges.txt").write_text("a b\n")
    (model / "config.json").write_text(json.dumps({k: v for k, v in _HF.items() if k != "folio"}))
    if "model.safetensors.index.json" in content:
        (model / "x.safetensors").write_bytes(b"")
    else:
        _hf_weights(model / "model.safetensors")
    for name, raw in content.items():
        (model / name).write_bytes(raw)
    use_model(hugging_face.read(model))


@functools.cache
def _hf_content() -> bytes:
    with tempfile.TemporaryDirectory() as room:
        path = Path(room) / "model.safetensors"
        weights = {
            name: p.detach().t().contiguous()
            if name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))
            else p.detach()
            for name, p in trained(shape=GPTConfig(**{**asdict(SHAPE), "bias": True}))[0].named_parameters()
        }
        save_file(weights, path)
        return path.read_bytes()


def _hf_weights(path: Path) -> None:
    path.write_bytes(_hf_content())


# Text


_DOCUMENTS = [json.dumps({"text": "The ferry left."}).encode(), b'{"text": "\\ud800 half"}', b"[1]", b"\xef\xbb\xbf{}"]


@target(
    lambda: st.tuples(
        st.sampled_from([".jsonl", ".txt", ".jsonl.gz", ".jsonl.zst", ".parquet"]),
        st.lists(changed_bytes(_DOCUMENTS), max_size=4).map(b"\n".join)
        | changed_bytes([gzip.compress(b"\n".join(_DOCUMENTS), mtime=0)]),
    )
)
def documents(content: tuple[str, bytes], folder: Path) -> None:
    suffix, raw = content
    path = folder / f"text{suffix}"
    path.write_bytes(raw)
    recipe = named_by_user([str(path)], "text", tokenizer="bytes")
    work = Tokenize(WorkerSettings(Bytes().to_json(), "none", skip=True))
    for block in recipe.source.blocks():
        work(block.spans)
