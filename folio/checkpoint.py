"""Checkpoints: folders that appear whole or not at all, verify themselves, and can run no code.

out_dir/checkpoints/step-00002000/   model.safetensors   optimizer.safetensors   state.json
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from folio import __version__, files
from folio.config import OF_THE_CALL, model_config
from folio.model import GPT, GPTConfig
from folio.runtime import is_finite, laid_out_as
from folio.token_files import GPT2, GPT2_SIZES
from folio.tokenizer import IDS_ONLY, Tokenizer, from_json
from folio.torch_files import FLOATS, StoredTensor

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
CONFIG, BEST, EVALUATIONS = "config.json", "best.json", "evaluations.jsonl"
_HEADER = 16 * 2**20  # bytes of a safetensors file's list of tensors
Tensors = Iterator[tuple[str, Tensor]]
Shaped = TypeVar("Shaped", Tensor, StoredTensor)


@dataclass
class State:
    """Where a run is. With the weights and the optimiser's tensors, all that it needs to go on."""

    step: int = 0  # updates done
    rows: int = 0  # rows of the order that they consumed
    tokens: int = 0  # targets in those
    seconds: float = 0.0  # of wall time
    train_loss: float | None = None  # of the last evaluation
    val_loss: float | None = None
    best: dict[str, float] | None = None  # {"step", "loss"} of the best evaluation
    evaluations_without_improvement: int = 0

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> State:
        """From a ``state.json``. Raises ValueError for what is missing or no number that can be."""
        try:
            state = cls(**{f.name: values[f.name] for f in fields(cls)})
            best = (state.best["step"], state.best["loss"]) if state.best else ()
            counts = (state.step, state.rows, state.tokens, state.evaluations_without_improvement)
            if not all(type(n) is int and n >= 0 for n in counts):
                raise ValueError("its counts are not whole numbers from 0 on")
            losses = (loss for loss in (state.train_loss, state.val_loss) if loss is not None)
            if not all(map(math.isfinite, (state.seconds, *losses, *best))):
                raise ValueError("its losses or seconds are not finite")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not the state of a run: {error}") from None
        return state


def state_of_elsewhere(
    config: GPTConfig, tokenizer: dict[str, Any] | None, state: State | None = None
) -> dict[str, Any]:
    """What ``state.json`` would say of a model that another program wrote."""
    return {
        "run": secrets.token_hex(6),
        **asdict(state or State()),
        "model": asdict(config),
        "tokenizer": tokenizer,
        "data": None,
        "scaler": {},
        "resolved": {},
    }


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk, what is known of it (as ``state.json`` has it), and what was asked of its run.

    Tensors are read one at a time, when asked for. Other programs' files are subclasses of this
    (``folio.pretrained``, ``folio.pt_files``).
    """

    path: Path
    state: dict[str, Any]
    asked: dict[str, Any] = field(default_factory=dict)

    @property
    def step(self) -> int:
        return int(self.state["step"])

    def parameters(self, **changes: Any) -> dict[str, torch.Size]:
        """Name and shape of each parameter that the model has, or would have with other fields of its config."""
        try:
            with torch.device("meta"):
                return {name: p.shape for name, p in GPT(replace(self.config(), **changes)).named_parameters()}
        except RuntimeError:
            raise ValueError(f"{self.path}: a model of its shape does not fit into memory") from None

    def weights(self) -> Tensors:
        """Each parameter by its name.

        Raises:
            ValueError: what is stored is damaged, or not the parameters of ``config``; names the file.
        """
        return self.fitting(_floating(self.path, self._stored()))

    def fitting(self, stored: Iterable[tuple[str, Shaped]]) -> Iterator[tuple[str, Shaped]]:
        """Passes on what is stored by name; raises ValueError where it is not the parameters of ``config``."""
        wanted = self.parameters()
        for name, weight in stored:
            if (shape := wanted.pop(name, None)) != weight.shape:
                model = "has it not, or once only" if shape is None else f"wants {tuple(shape)}"
                raise ValueError(f"{self.path}: {name[:100]} has the shape {tuple(weight.shape)}, its model {model}")
            yield name, weight
        if wanted:
            raise ValueError(f"{self.path}: {min(wanted)} is not among its weights")

    def not_finite(self, name: str) -> ValueError:
        """What is said of a checkpoint of which a tensor holds NaN or infinity."""
        mine = self.path.parent.name == "checkpoints"
        earlier = [step for step in steps(self.path.parent.parent) if step < self.step] if mine else []
        remedy = f": take --checkpoint={earlier[-1]}; to resume there, move this folder away" if earlier else ""
        return ValueError(f"{self.path}: {name} is not finite, so that nothing can be computed with it{remedy}")

    def _stored(self) -> Tensors:
        return read(self.path / MODEL)

    def slots(self) -> Tensors:
        """The optimizer's tensors, as ``<parameter>/<slot>``; none where it is not known."""
        return _floating(self.path, read(self.path / OPTIMIZER))

    def config(self) -> GPTConfig:
        return model_config(self.path, self.state["model"])

    def model(self, dropout: float | None = None) -> GPT:
        """The model in float32 on the CPU, as it was saved but perhaps for the ``dropout``.

        Raises:
            ValueError: as ``weights``; a weight is not finite; the model does not fit into memory.
        """
        config = self.config()
        try:
            model = GPT.empty(config if dropout is None else replace(config, dropout=dropout))
        except RuntimeError:
            raise ValueError(f"{self.path}: a model of its shape does not fit into memory") from None
        load_weights(model, self.weights())
        for name, p in model.named_parameters():
            if not is_finite(p):
                raise self.not_finite(name)
        return model

    @property
    def tokenizer_spec(self) -> dict[str, Any] | None:
        """Its tokenizer as JSON; None where nothing says what its token ids mean.

        GPT-2's is none for a model with fewer ids: older checkpoints assumed it where the data said nothing.
        """
        spec: dict[str, Any] | None = self.state["tokenizer"]
        size = self.config().vocab_size
        assumed = spec == GPT2 and size != "auto" and size < GPT2_SIZES.start
        return None if assumed or spec == IDS_ONLY else spec

    def tokenizer(self) -> Tokenizer:
        """Raises ValueError where its vocabulary is not known."""
        if self.tokenizer_spec is None:
            raise ValueError(
                f"{self.path}: nothing says what its {self.config().vocab_size} token ids mean: put nanoGPT's meta.pkl "
                "or a tokenizer.json beside it"
            )
        try:
            return from_json(self.state["tokenizer"])
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None


def _floating(path: Path, tensors: Tensors) -> Tensors:
    """Passes tensors on; raises ValueError for one that holds anything but floating-point numbers."""
    for name, tensor in tensors:
        if tensor.dtype not in FLOATS:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"{path}: {name[:100]} is of type {kind}, not of floating-point numbers as a weight is")
        yield name, tensor


def read(path: Path, wanted: Callable[[str], bool] = lambda name: True) -> Tensors:
    """The tensors of these names in a safetensors file, each mapped only while it is looked at, the largest first.

    So whoever copies them into place needs hardly more memory than they do.

    Raises:
        ValueError: the file is damaged, or none.
    """
    with files.require_file(path).open("rb") as raw:
        header = int.from_bytes(raw.read(8), "little")
    if header > _HEADER:
        raise ValueError(f"{path} is damaged: its header has {header:,} bytes, more than the {_HEADER:,} of any model")
    try:
        with safe_open(path, "pt") as file:
            names = filter(wanted, file.keys())
            sizes = {name: math.prod(file.get_slice(name).get_shape()) for name in names}
        for name in sorted(sizes, key=sizes.__getitem__, reverse=True):
            with safe_open(path, "pt") as file:
                yield name, file.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def folder(out_dir: Path, step: int) -> Path:
    return out_dir / "checkpoints" / f"step-{step:08d}"


def save(out_dir: Path, step: int, weights: dict[str, Tensor], slots: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Writes, syncs, and only then renames into place. A checkpoint of the same step is replaced.

    Raises:
        OSError: the disk is full or the folder is not writable; nothing is left of the attempt.
    """
    final = folder(out_dir, step)
    unfinished = final.with_name(f".{final.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        save_file(weights, unfinished / MODEL)
        save_file(slots, unfinished / OPTIMIZER)
        hashes = {name: files.sha256(unfinished / name) for name in (MODEL, OPTIMIZER)}
        files.write_json(unfinished / STATE, {**state, "sha256": hashes})
        for name in (MODEL, OPTIMIZER):
            files.sync(unfinished / name)
        files.sync(unfinished)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise OSError(f"{final} could not be written ({error}): make room there or choose another --out_dir") from None
    if final.exists():
        shutil.rmtree(final)
    unfinished.rename(final)
    files.sync(final.parent)


def steps(out_dir: Path) -> list[int]:
    """The steps that have a checkpoint, in order; not verified."""
    there = [p for p in (out_dir / "checkpoints").glob("step-*") if re.fullmatch("step-[0-9]{8,18}", p.name)]
    return sorted(step for p in there if p == folder(out_dir, step := int(p.name[5:])) and p.is_dir())


def verify(path: Path, run_id: str | None = None) -> dict[str, Any]:
    """The state of a checkpoint whose files are what it says they are.

    Raises:
        ValueError: something is missing, changed, or of another run.
    """
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        for name in (MODEL, OPTIMIZER):
            if files.sha256(path / name) != state["sha256"][name]:
                raise ValueError(f"{name} is not what was written")
        if run_id is not None and state["run"] != run_id:
            raise ValueError(f"it is of another run, {state['run']}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    return dict(state)


def latest(out_dir: Path, run_id: str | None = None) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, and a line for each newer one that does not.

    Those are set aside as ``….damaged``, so that a later look does not meet them again.
    """
    lines: list[str] = []
    for step in reversed(steps(out_dir)):
        path = folder(out_dir, step)
        try:
            return Checkpoint(path, verify(path, run_id)), lines
        except ValueError as error:
            aside = path.with_name(f"{path.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            lines.append(f"{error}; set aside as {aside.name}")
    return None, lines


def asked(out_dir: Path) -> tuple[str, dict[str, Any]]:
    """The run's id and the knobs that it was asked for, by flat name, from ``config.json``.

    Raises:
        ValueError: it is missing or not readable.
    """
    path = out_dir / CONFIG
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return str(raw["run"]), dict(raw["asked"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): start afresh with --init_from={out_dir}") from None


def keep_asked(out_dir: Path, run_id: str, knobs: dict[str, Any]) -> None:
    """Writes what ``asked`` reads, without the knobs that a run does not keep."""
    kept = {name: value for name, value in knobs.items() if name not in OF_THE_CALL}
    files.write_json(out_dir / CONFIG, {"run": run_id, "folio": __version__, "asked": kept})


def best_step(out_dir: Path) -> int | None:
    """The step of ``best.json``; where that is lost, the best that the newest checkpoint knows of."""
    try:
        return int(json.loads((out_dir / BEST).read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    for step in reversed(steps(out_dir)):
        try:
            best = json.loads((folder(out_dir, step) / STATE).read_text(encoding="utf-8"))["best"]
            return int(best["step"]) if best else None
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def choose(out_dir: Path, which: str = "best") -> Checkpoint:
    """``best``, ``latest`` or a step's number.

    Raises:
        FileNotFoundError: there is no such checkpoint; says what there is.
        ValueError: it is damaged.
    """
    have = steps(out_dir)
    if not have:
        raise FileNotFoundError(f"no checkpoint in {out_dir}: train with --out_dir={out_dir} first")
    if which == "best":
        best = best_step(out_dir)
        step = best if best in have else have[-1]
    elif which == "latest":
        step = have[-1]
    else:
        step = int(which) if re.fullmatch("[0-9]{1,18}", which) else -1
        if step not in have:
            raise FileNotFoundError(
                f"no checkpoint {which!r} in {out_dir}: there are best, latest and {', '.join(map(str, have))}"
            )
    assert step is not None
    knobs: dict[str, Any] = {}
    with contextlib.suppress(ValueError):  # a model is of use without what was asked for
        _, knobs = asked(out_dir)
    return Checkpoint(folder(out_dir, step), verify(folder(out_dir, step)), knobs)


def prune(out_dir: Path, keep: int, interval: int = 1) -> None:
    """Removes all but the best checkpoint, the two newest, and the ``keep`` newest at multiples of ``interval``.

    Of the two newest one alone stays where ``keep`` is 1. What a killed save left goes too.
    """
    for path in (out_dir / "checkpoints").glob(".step-*.unfinished"):
        shutil.rmtree(path, ignore_errors=True)
    there = steps(out_dir)
    kept = {best_step(out_dir), *there[-min(keep, 2) :], *[step for step in there if step % interval == 0][-keep:]}
    for step in there:
        if step not in kept:
            shutil.rmtree(folder(out_dir, step), ignore_errors=True)


def load_weights(model: GPT, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Copies weights by name; raises ValueError where names or shapes differ."""
    wanted = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in weights:
            if (p := wanted.pop(name, None)) is None:
                raise ValueError(f"the weights do not fit the model: it has no {name}, or has it once only")
            if p.shape != weight.shape:
                raise ValueError(f"{name} has shape {tuple(weight.shape)}, the model {tuple(p.shape)}")
            p.copy_(laid_out_as(p, weight))
    if wanted:
        raise ValueError(f"the weights do not fit the model: {min(wanted)} is not among them")


def load_slots(optimizer: torch.optim.Optimizer, model: GPT, slots: Iterable[tuple[str, Tensor]]) -> None:
    """Puts ``<parameter>/<slot>`` tensors back into an optimiser of this model."""
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, value in slots:
        name, slot = key.rsplit("/", 1)
        by_name.setdefault(name, {})[slot] = value
    names = {p: name for name, p in model.named_parameters()}
    packed = optimizer.state_dict()
    order: Iterable[nn.Parameter] = (p for group in optimizer.param_groups for p in group["params"])
    packed["state"] = {
        i: {slot: laid_out_as(p, value) for slot, value in by_name[names[p]].items()}
        for i, p in enumerate(order)
        if names[p] in by_name
    }
    optimizer.load_state_dict(packed)
