"""The readers that are fuzzed: for each, the input, and the calls that read it as a command would."""

from __future__ import annotations

import contextlib
import functools
import gzip
import io
import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import fuzz_options
import numpy as np
import torch
from fuzz_inputs import VALUES, changed_bytes, changed_json, changed_text, pickles
from fuzz_seeds import Sealed, copied, empty, sealed_json, seeds, torch_saved, value_of, write_sealed
from hypothesis import strategies as st
from pt_contents import small
from safetensors.torch import save
from small_checkpoints import SHAPE, trained

from folio import cli, files
from folio.checkpoints import checkpoint, find, hugging_face, model_card, pt_files, safetensors_files
from folio.checkpoints.state import State
from folio.commands import data as data_command
from folio.config.compose import Layer, compose
from folio.config.files import read_file
from folio.config.options import Data, TrainConfig
from folio.config.table import table
from folio.data import tokenizers
from folio.data.meta_files import read_meta_pkl
from folio.data.rows import Tokens
from folio.data.tokenizers import Bytes
from folio.evaluation import hellaswag
from folio.machine.choices import resolve
from folio.model.config import GPTConfig
from folio.preparation.documents import WorkerSettings
from folio.preparation.recipes import named_by_user
from folio.preparation.workers import Tokenize
from folio.records import history, metrics, report, run_folder
from folio.training.ownership import refuse_foreign
from folio.training.resume import find_former_run, overlay


@dataclass(frozen=True)
class Target:
    """A reader: ``inputs`` makes the strategy, ``read`` writes one of its values into a folder and reads it there."""

    inputs: Callable[[], st.SearchStrategy[Any]]
    read: Callable[[Any, Path], object]


TARGETS: dict[str, Target] = {}


def target(inputs: Callable[[], st.SearchStrategy[Any]]) -> Callable[[Any], Any]:
    """Adds a reader to the targets, by its name."""

    def add(read: Callable[[Any, Path], object]) -> Any:
        TARGETS[read.__name__] = Target(inputs, read)
        return read

    return add


# Options


@target(fuzz_options.config_py)
def config_py(content: bytes, folder: Path) -> None:
    _read_options(folder / "c.py", content)


def _read_options(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    values = read_file(str(path), TrainConfig, names={"x": 3})
    compose(TrainConfig(), [Layer(str(path), values)])


@target(fuzz_options.config_json)
def config_json_file(content: bytes, folder: Path) -> None:
    _read_options(folder / "c.json", content)


@target(fuzz_options.config_toml)
def config_toml(content: bytes, folder: Path) -> None:
    _read_options(folder / "c.toml", content)


@target(fuzz_options.command_lines)
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
    data = empty(folder / "tokens")
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


def _meta() -> st.SearchStrategy[Sealed]:
    value = json.loads((seeds().data / "meta.json").read_text())
    others = [{"kind": "bytes"}, {"kind": "ids"}, {"kind": "tokenizers", "file": seeds().tokenizer}]
    return sealed_json(value, *({**value, "tokenizer": tokenizer} for tokenizer in others))


@target(_meta)
def meta_json(content: Sealed, folder: Path) -> None:
    data = empty(folder / "data")
    for name in ("train.bin", "val.bin"):
        shutil.copy(seeds().data / name, data)
    write_sealed(data / "meta.json", content)
    use_data(data)


@target(lambda: pickles(seeds().pickles))
def meta_pkl(content: bytes, folder: Path) -> None:
    (folder / "meta.pkl").write_bytes(content)
    size, spec = read_meta_pkl(folder / "meta.pkl")
    if spec != tokenizers.IDS_ONLY:
        tokenizers.from_json(spec).bytes(range(min(size, 3)))


# Models


def _pt_contents() -> st.SearchStrategy[bytes]:
    """Files of torch.save: with changed bytes, with a changed pickle, or of changed values."""
    odd = [torch.ones(2), torch.ones(1).expand(4), torch.tensor(1j), torch.empty(0), torch.ones(1).byte()]
    weird = VALUES | st.sampled_from([*odd, np.float64(1), np.arange(2), (1, 2), b"x", {1, 2}])

    @st.composite
    def changed(draw: Any) -> bytes:
        content = small()
        for _ in range(draw(st.integers(1, 3))):
            whole: Any = {"": content}
            key: Any = ""
            while isinstance(inner := whole[key], dict) and inner and draw(st.integers(0, 3)):
                whole, key = inner, draw(st.sampled_from(list(inner)))
            if draw(st.booleans()) or key == "":
                new = key if draw(st.integers(0, 3)) else draw(st.sampled_from([0, "x", 2.5, None, True]))
                whole[new] = draw(weird)
            else:
                del whole[key]
            content = content if key else whole.get("", content)
        return torch_saved(content, draw(st.booleans()))

    return changed_bytes(seeds().archives) | changed() | pickles([seeds().archives[1]]) | pickles([]).map(_archive_of)


def _archive_of(pickled: bytes) -> bytes:
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

    def joined(value: Any, rest: bytes = rest) -> bytes:
        raw = json.dumps(value).encode()
        return len(raw).to_bytes(8, "little") + raw + rest

    odd = {"a": {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [0, 4]}}
    odd |= {"b": {"dtype": "F4", "shape": [8], "data_offsets": [4, 8]}}
    kinds = ["F64", "F32", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3"]
    kinds += ["F8_E8M0", "F4", "F6_E2M3", "C64", "U64", "I32"]

    @st.composite
    def retyped(draw: Any) -> bytes:
        value = json.loads(json.dumps(header))
        for name in value:
            if name != "__metadata__" and draw(st.booleans()):
                begin, end = value[name]["data_offsets"]
                value[name]["dtype"] = draw(st.sampled_from(kinds))
                size = end - begin
                value[name]["shape"] = draw(st.sampled_from([[size], [size // 2], [size // 4], []]))
        return joined(value)

    return changed_bytes([content, joined(odd, bytes(8))]) | changed_json([header]).map(joined) | retyped()


@target(_safetensors)
def safetensors_file(content: bytes, folder: Path) -> None:
    """With a matching checksum, as an attacker would write it."""
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


@target(lambda: sealed_json(value_of(run_folder.STATE)))
def state_json(content: Sealed, folder: Path) -> None:
    out = copied(folder)
    write_sealed(run_folder.checkpoint_folder(out, 60) / run_folder.STATE, content)
    find.best_step(out)
    refuse_foreign(out, False, True)
    found = find.choose(out)
    use_model(found)
    former = find_former_run(out, "auto")
    assert former
    config, _ = overlay(TrainConfig(), former)
    State.of(found.state)
    resolve(config.system, config.processes, before=found.state["resolved"]).differences(found.state["resolved"])


@target(lambda: sealed_json(value_of(run_folder.CONFIG)))
def run_config(content: Sealed, folder: Path) -> None:
    out = copied(folder)
    write_sealed(out / run_folder.CONFIG, content)
    refuse_foreign(out, False, True)
    found = find.choose(out)
    model_card.facts(found)
    history.options_of(out)
    former = find_former_run(out, "auto")
    assert former
    overlay(TrainConfig(), former)
    compose(TrainConfig(), [Layer("c", {k: v for k, v in former.found.asked.items() if k in table(TrainConfig)})])


@target(lambda: sealed_json(value_of(run_folder.BEST)))
def best_json(content: Sealed, folder: Path) -> None:
    out = copied(folder)
    write_sealed(out / run_folder.BEST, content)
    refuse_foreign(out, False, True)
    assert find.choose(out).step == 60


def _records() -> st.SearchStrategy[bytes]:
    lines = [json.dumps(record).encode() for record in seeds().records]
    line = changed_json(seeds().records).map(lambda value: json.dumps(value).encode()) | changed_bytes(lines)
    whole = changed_bytes([b"\n".join(lines) + b"\n"])
    return st.lists(line | st.sampled_from(lines), max_size=8).map(b"\n".join) | whole


@target(_records)
def metrics_jsonl(content: bytes, folder: Path) -> None:
    out = empty(folder / "run")
    (out / run_folder.METRICS).write_bytes(content)
    (out / run_folder.EVALUATIONS).write_bytes(content)
    metrics.holds_records(out / run_folder.METRICS)
    run = report.recorded("run", out)
    report.html([run])
    report.html([run, run])
    h = run.history
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
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    bpe = {
        **seeds().tokenizer,
        "pre_tokenizer": byte_level,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "added_tokens": [{"id": 2, "content": "</s>", **flags, "special": True}],
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


_PLAIN_HF = {"model_type": "gpt2", "n_positions": 8, "n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": 11}
_PLAIN_HF |= {"activation_function": "gelu_new"}
_EXPORTED = {"model": asdict(SHAPE), "state": asdict(State(step=3)), "asked": {"learning_rate": 0.1}}
_EXPORTED |= {"facts": {"seed": "1"}, "tokenizer": {"kind": "characters", "characters": "abcdefghijk"}}
_HF = {**_PLAIN_HF, "folio": _EXPORTED}
_HF_FILES = {
    "model.safetensors.index.json": {"weight_map": {"a": "model.safetensors", "b": "model.safetensors"}},
    "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer", "eos_token": "</s>", "add_prefix_space": True},
    "special_tokens_map.json": {"unk_token": {"content": "<unk>"}, "additional_special_tokens": ["<x>"]},
    "added_tokens.json": {"<x>": 258},
    "vocab.json": {**{c: i for i, c in enumerate(tokenizers.byte_characters().values())}, "ab": 256, "</s>": 257},
}


def _hugging_face() -> st.SearchStrategy[dict[str, bytes]]:
    """Those files of a folder that are changed, by name."""

    def named(name: str, content: st.SearchStrategy[bytes]) -> st.SearchStrategy[dict[str, bytes]]:
        return content.map(lambda raw: {name: raw})

    others = st.one_of(*(named(name, changed_text([value])) for name, value in sorted(_HF_FILES.items())))
    lists = changed_bytes([b"#version: 0.2\na b\n", b"[UNK]\na\nb\n"])
    texts = named("merges.txt", lists) | named("vocab.txt", lists)
    config = named("config.json", changed_text([_HF, _PLAIN_HF]))
    return config | others | texts | st.tuples(config, others, texts).map(lambda all: all[0] | all[1] | all[2])


@target(_hugging_face)
def hugging_face_folder(content: dict[str, bytes], folder: Path) -> None:
    model = empty(folder / "model")
    for name, value in _HF_FILES.items():
        (model / name).write_text(json.dumps(value))
    (model / "merges.txt").write_text("a b\n")
    (model / "config.json").write_text(json.dumps(_PLAIN_HF))
    if "model.safetensors.index.json" in content:
        (model / "x.safetensors").write_bytes(b"")
    else:
        (model / "model.safetensors").write_bytes(_hf_weights())
    for name, raw in content.items():
        (model / name).write_bytes(raw)
    use_model(hugging_face.read(model))


@functools.cache
def _hf_weights() -> bytes:
    """The weights of GPT-2's form, in which some matrices are transposed."""
    model, _ = trained(shape=GPTConfig(**{**asdict(SHAPE), "bias": True}))
    transposed = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return save({name: p.t().contiguous() if name.endswith(transposed) else p for name, p in weights.items()})


# Text


_DOCUMENTS = [json.dumps({"text": "The ferry left."}).encode(), b'{"text": "\\ud800 half"}', b"[1]", b"\xef\xbb\xbf{}"]


def _documents() -> st.SearchStrategy[tuple[str, bytes]]:
    suffixes = st.sampled_from([".jsonl", ".txt", ".jsonl.gz", ".jsonl.zst", ".parquet"])
    packed = changed_bytes([gzip.compress(b"\n".join(_DOCUMENTS), mtime=0)])
    return st.tuples(suffixes, st.lists(changed_bytes(_DOCUMENTS), max_size=4).map(b"\n".join) | packed)


@target(_documents)
def documents(content: tuple[str, bytes], folder: Path) -> None:
    suffix, raw = content
    path = folder / f"text{suffix}"
    path.write_bytes(raw)
    recipe = named_by_user([str(path)], "text", tokenizer="bytes")
    work = Tokenize(WorkerSettings(Bytes().to_json(), "none", skip=True))
    for block in recipe.source.blocks():
        work(block.spans)
