"""Checkpoints: folders that appear whole or not at all, verify themselves, and can run no code.

out_dir/checkpoints/step-00002000/   model.safetensors   optimizer.safetensors   state.json
"""

from __future__ import annotations

import math
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from folio import files
from folio.checkpoints.torch_files import FLOATS, StoredTensor
from folio.config.compose import model_config
from folio.data.token_files import GPT2, GPT2_SIZES
from folio.data.tokenizers import IDS_ONLY, Tokenizer, from_json
from folio.errors import UserError
from folio.machine.runtime import is_finite, laid_out_as
from folio.model.config import GPTConfig
from folio.model.gpt import GPT
from folio.records import run_folder
from folio.records.run_folder import BEST, CHECKPOINTS, MODEL, OPTIMIZER, STATE

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
                raise UserError("its counts are not whole numbers from 0 on")
            losses = (loss for loss in (state.train_loss, state.val_loss) if loss is not None)
            if not all(map(math.isfinite, (state.seconds, *losses, *best))):
                raise UserError("its losses or seconds are not finite")
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"not the state of a run: {error}") from None
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
    (``folio.checkpoints.hugging_face``, ``folio.checkpoints.pt_files``).
    """

    path: Path
    state: dict[str, Any]
    asked: dict[str, Any] = field(default_factory=dict)
    opened: Mapping[str, Opened] = field(default_factory=dict, repr=False, kw_only=True)  # its files, by name

    @property
    def step(self) -> int:
        return int(self.state["step"])

    def parameters(self, **changes: Any) -> dict[str, torch.Size]:
        """Name and shape of each parameter that the model has, or would have with other fields of its config."""
        try:
            with torch.device("meta"):
                return {name: p.shape for name, p in GPT(replace(self.config(), **changes)).named_parameters()}
        except RuntimeError:
            raise UserError(f"{self.path}: a model of its shape does not fit into memory") from None

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
                raise UserError(f"{self.path}: {name[:100]} has the shape {tuple(weight.shape)}, its model {model}")
            yield name, weight
        if wanted:
            raise UserError(f"{self.path}: {min(wanted)} is not among its weights")

    def not_finite(self, name: str) -> UserError:
        """What is said of a checkpoint of which a tensor holds NaN or infinity."""
        mine = self.path.parent.name == CHECKPOINTS
        earlier = [step for step in run_folder.steps(self.path.parent.parent) if step < self.step] if mine else []
        remedy = f": take --checkpoint={earlier[-1]}; to resume there, move this folder away" if earlier else ""
        return UserError(f"{self.path}: {name} is not finite, so that nothing can be computed with it{remedy}")

    def _stored(self) -> Tensors:
        return read(self.path / MODEL, opened=self.opened.get(MODEL))

    def slots(self) -> Tensors:
        """The optimizer's tensors, as ``<parameter>/<slot>``; none where it is not known."""
        return _floating(self.path, read(self.path / OPTIMIZER, opened=self.opened.get(OPTIMIZER)))

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
            raise UserError(f"{self.path}: a model of its shape does not fit into memory") from None
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
            raise UserError(
                f"{self.path}: nothing says what its {self.config().vocab_size} token ids mean: put nanoGPT's meta.pkl "
                "or a tokenizer.json beside it"
            )
        try:
            return from_json(self.state["tokenizer"])
        except ValueError as error:
            raise UserError(f"{self.path}: {error}") from None


def _floating(path: Path, tensors: Tensors) -> Tensors:
    """Passes tensors on; raises ValueError for one that holds anything but floating-point numbers."""
    for name, tensor in tensors:
        if tensor.dtype not in FLOATS:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"{path}: {name[:100]} is of type {kind}, not of floating-point numbers as a weight is")
        yield name, tensor


class Opened:
    """A file that can be read at ``path`` for as long as this object lives, also when its own name is gone."""

    def __init__(self, name: Path) -> None:
        self.name, self._handle = name, os.open(files.require_file(name), os.O_RDONLY)
        path = Path(f"/dev/fd/{self._handle}")
        self.path = path if path.exists() else name

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            os.close(self._handle)

    def __reduce__(self) -> tuple[type[Opened], tuple[Path]]:
        return Opened, (self.name,)  # to another process, which opens it again


def read(path: Path, wanted: Callable[[str], bool] = lambda name: True, opened: Opened | None = None) -> Tensors:
    """The tensors of these names in a safetensors file, each mapped only while it is looked at, the largest first.

    So whoever copies them into place needs hardly more memory than they do. ``opened``: the same file.

    Raises:
        ValueError: the file is damaged, or none.
    """
    here = opened.path if opened else path
    with files.require_file(here).open("rb") as raw:
        header = int.from_bytes(raw.read(8), "little")
    if header > _HEADER:
        raise UserError(f"{path} is damaged: its header has {header:,} bytes, more than the {_HEADER:,} of any model")
    try:
        with safe_open(here, "pt") as file:
            names = filter(wanted, file.keys())
            sizes = {name: math.prod(file.get_slice(name).get_shape()) for name in names}
        for name in sorted(sizes, key=sizes.__getitem__, reverse=True):
            with safe_open(here, "pt") as file:
                yield name, file.get_tensor(name)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}") from None


def save(out_dir: Path, step: int, weights: dict[str, Tensor], slots: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Writes, syncs, and only then renames into place. A checkpoint of the same step is replaced.

    Where it has the same tensors, its state alone is, so that there is a whole one at any moment.

    Raises:
        OSError: the disk is full or the folder is not writable; nothing is left of the attempt.
    """
    final = run_folder.checkpoint_folder(out_dir, step)
    unfinished = final.with_name(f".{final.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        save_file(weights, unfinished / MODEL)
        save_file(slots, unfinished / OPTIMIZER)
        hashes = {name: files.sha256(unfinished / name) for name in (MODEL, OPTIMIZER)}
        files.write_sealed(unfinished / STATE, {**state, "sha256": hashes})
        for name in (MODEL, OPTIMIZER):
            files.sync(unfinished / name)
        files.sync(unfinished)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise OSError(f"{final} could not be written ({error}): make room there or choose another --out_dir") from None
    if all((final / name).is_file() and files.sha256(final / name) == hashes[name] for name in hashes):
        (unfinished / STATE).replace(final / STATE)
        shutil.rmtree(unfinished, ignore_errors=True)
        files.sync(final)
        return
    if final.exists():
        _remove(final)
    unfinished.rename(final)
    files.sync(final.parent)


def _remove(path: Path) -> None:
    """Takes a checkpoint away in one moment: whoever reads it has all of it, and whoever looks for it none."""
    gone = path.with_name(f".{path.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def state_of(path: Path) -> tuple[dict[str, Any], bool]:
    """What a checkpoint's ``state.json`` says, and whether a sum of itself bears it out, as older ones have none.

    Raises:
        ValueError: it is missing, changed, cannot be, or is of another step than its folder.
    """
    try:
        state, sealed = files.read_sealed(path / STATE)
        if state["sha256"].keys() != {MODEL, OPTIMIZER, *[STATE] * sealed}:
            raise UserError(f"its sha256 names {', '.join(map(str, state['sha256'])) or 'nothing'}")
        if path.name != f"step-{state['step']:08d}":
            raise UserError(f"it says step {state['step']}")
        if not sealed:
            known = State.of(state)
            if known.rows * int(state.get("row", 0)) > known.tokens:
                raise UserError(f"its {known.rows} rows are more than its {known.tokens} tokens make")
            model_config(path, state["model"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    return state, sealed


def verify(path: Path, run_id: str | None = None) -> Checkpoint:
    """A checkpoint whose files are what it says they are, and stay readable though it be removed meanwhile.

    Raises:
        ValueError: something is missing, changed, or of another run.
    """
    try:
        opened = {name: Opened(path / name) for name in (MODEL, OPTIMIZER)}
        state, _ = state_of(path)
        for name, file in opened.items():
            if files.sha256(file.path) != state["sha256"][name]:
                raise UserError(f"{name} does not match its checksum")
        if run_id is not None and state["run"] != run_id:
            raise UserError(f"it is of another run, {state['run']}")
    except (OSError, ValueError, KeyError) as error:
        sign = f"{path} is damaged: "
        raise UserError(f"{sign}{str(error).removeprefix(sign)}") from None
    return Checkpoint(path, state, opened=opened)


def unsealed(found: Checkpoint) -> str:
    """A line about a checkpoint that an older version wrote, else nothing."""
    if STATE in found.state["sha256"]:
        return ""
    return f"{found.path / STATE} has no checksum, as older versions wrote it: it is used as it is"


def latest(out_dir: Path, run_id: str | None = None, aside: bool = True) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, and a line for each newer one that does not.

    Those are set ``aside`` as ``….damaged``, so that a later look does not meet them again.
    """
    lines: list[str] = []
    for step in reversed(run_folder.steps(out_dir)):
        path = run_folder.checkpoint_folder(out_dir, step)
        try:
            found = verify(path, run_id)
            return found, [*lines, *filter(None, [unsealed(found)])]
        except ValueError as error:
            lines.append(str(error))
        if aside:
            other = path.with_name(f"{path.name}.damaged")
            shutil.rmtree(other, ignore_errors=True)
            path.rename(other)
            lines[-1] += f"; set aside as {other.name}"
    return None, lines


def best_step(out_dir: Path) -> int | None:
    """The step of ``best.json``; where that is lost or damaged, the best that the newest checkpoint knows of."""
    try:
        best, sealed = files.read_sealed(out_dir / BEST)
        if (sealed or best.keys() == {"step", "loss"}) and type(best["step"]) is int:
            return best["step"]
    except (OSError, ValueError, LookupError):
        pass
    for step in reversed(run_folder.steps(out_dir)):
        try:
            best = state_of(run_folder.checkpoint_folder(out_dir, step))[0]["best"]
            return int(best["step"]) if best else None
        except (ValueError, LookupError, TypeError):
            continue
    return None


def choose(out_dir: Path, which: str = "best") -> Checkpoint:
    """``best``, ``latest`` or a step's number. One that is removed before it is read gives way to the next.

    Raises:
        FileNotFoundError: there is no such checkpoint; says what there is.
        ValueError: it is damaged; names another.
    """
    while True:
        step = _chosen(out_dir, which)
        try:
            found = verify(run_folder.checkpoint_folder(out_dir, step))
            break
        except ValueError as error:
            if step in (have := run_folder.steps(out_dir)):
                others = [other for other in have if other != step]
                remedy = f"; --checkpoint={others[-1]} is another" if others else ""
                raise UserError(f"{error}{remedy}") from None
    knobs: dict[str, Any] = {}
    try:
        knobs = run_folder.asked(out_dir).options
    except FileNotFoundError:
        pass
    except ValueError as error:  # a model is of use without what was asked for
        warnings.warn(str(error), stacklevel=2)
    if line := unsealed(found):
        warnings.warn(line, stacklevel=2)
    return replace(found, asked=knobs)


def _chosen(out_dir: Path, which: str) -> int:
    have = run_folder.steps(out_dir)
    if not have:
        raise FileNotFoundError(f"no checkpoint in {out_dir}: train with --out_dir={out_dir} first")
    if which == "best":
        best = best_step(out_dir)
        return best if best in have else have[-1]
    if which == "latest":
        return have[-1]
    step = int(which) if re.fullmatch("[0-9]{1,18}", which) else -1
    if step not in have:
        raise FileNotFoundError(
            f"no checkpoint {which!r} in {out_dir}: there are best, latest and {', '.join(map(str, have))}"
        )
    return step


def prune(out_dir: Path, keep: int, interval: int = 1) -> None:
    """Removes all but the best checkpoint, the two newest, and the ``keep`` newest at multiples of ``interval``.

    Of the two newest one alone stays where ``keep`` is 1. What a killed save left goes too.
    """
    for path in (out_dir / CHECKPOINTS).glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)
    there = run_folder.steps(out_dir)
    kept = {best_step(out_dir), *there[-min(keep, 2) :], *[step for step in there if step % interval == 0][-keep:]}
    for step in there:
        if step not in kept:
            with suppress(OSError):
                _remove(run_folder.checkpoint_folder(out_dir, step))


def load_weights(model: GPT, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Copies weights by name; raises ValueError where names or shapes differ."""
    wanted = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in weights:
            if (p := wanted.pop(name, None)) is None:
                raise UserError(f"the weights do not fit the model: it has no {name}, or has it once only")
            if p.shape != weight.shape:
                raise UserError(f"{name} has shape {tuple(weight.shape)}, the model {tuple(p.shape)}")
            p.copy_(laid_out_as(p, weight))
    if wanted:
        raise UserError(f"the weights do not fit the model: {min(wanted)} is not among them")


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
