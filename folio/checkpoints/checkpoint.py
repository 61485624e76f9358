"""Checkpoints: folders that appear whole or not at all, verify themselves, and can run no code.

out_dir/checkpoints/step-00002000/   model.safetensors   optimizer.safetensors   state.json
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from folio import files
from folio.checkpoints.safetensors_files import OpenFile, Tensors, has_stated_length, read
from folio.checkpoints.state import State, check_entries
from folio.checkpoints.torch_files import FLOATS, StoredTensor
from folio.config.compose import model_config
from folio.config.declare import Weights
from folio.data.token_files import GPT2, GPT2_SIZES
from folio.data.tokenizers import IDS_ONLY, Tokenizer, from_json
from folio.errors import UserError
from folio.machine.shares import AVERAGE, is_finite, shard_like
from folio.model.config import GPTConfig
from folio.model.gpt import GPT
from folio.records import run_folder
from folio.records.run_folder import CHECKPOINTS, MODEL, OPTIMIZER, STATE

_NO_SUCH = "but the model has no such parameter (or its head is tied to the embedding)"
Shaped = TypeVar("Shaped", Tensor, StoredTensor)


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk, its ``state.json``, and the options of its run (``asked``).

    Tensors are read one at a time, on demand. Subclasses read other programs' files
    (``folio.checkpoints.hugging_face``, ``folio.checkpoints.pt_files``).
    """

    path: Path
    state: dict[str, Any]
    asked: dict[str, Any] = field(default_factory=dict)
    opened: Mapping[str, OpenFile] = field(default_factory=dict, repr=False, kw_only=True)  # its files, by name
    averaged: bool = field(default=False, kw_only=True)  # its weights are their moving averages

    @property
    def step(self) -> int:
        return int(self.state["step"])

    def parameters(self, **changes: Any) -> dict[str, torch.Size]:
        """Name and shape of each parameter of the model, or of a model with these fields of its config changed."""
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
        return self.fitting(_floating(self.path, self._averages() if self.averaged else self._stored()))

    def with_weights(self, which: Weights) -> Self:
        """The same checkpoint with the trained weights, or with their moving averages (``ema``).

        The losses in its state are those of the trained weights, so the averages have none.
        """
        if which == "trained":
            return self
        return replace(self, averaged=True, state={**self.state, "best": None, "train_loss": None, "val_loss": None})

    def fitting(self, stored: Iterable[tuple[str, Shaped]]) -> Iterator[tuple[str, Shaped]]:
        """Yields the stored tensors; raises ValueError if they are not the parameters of ``config``."""
        wanted = self.parameters()
        for name, weight in stored:
            if (shape := wanted.pop(name, None)) != weight.shape:
                model = _NO_SUCH if shape is None else f"but the model's has {tuple(shape)}"
                raise UserError(f"{self.path}: {name[:100]} has the shape {tuple(weight.shape)}, {model}")
            yield name, weight
        if wanted:
            raise UserError(f"{self.path}: {min(wanted)} is not among its weights")

    def not_finite(self, name: str) -> UserError:
        """The error for a checkpoint with NaN or infinity in one of its tensors."""
        mine = self.path.parent.name == CHECKPOINTS
        earlier = [step for step in run_folder.steps(self.path.parent.parent) if step < self.step] if mine else []
        remedy = f": use --checkpoint={earlier[-1]}; to resume from that, move this folder away" if earlier else ""
        return UserError(f"{self.path}: {name} is not finite, so the model cannot be used{remedy}")

    def _stored(self) -> Tensors:
        return read(self.path / MODEL, opened=self.opened.get(MODEL))

    def _averages(self) -> Tensors:
        found = False
        for key, average in self.slots():
            name, slot = key.rsplit("/", 1)
            if slot == AVERAGE:
                found = True
                yield name, average
        if not found:
            raise UserError(
                f"{self.path}: there is no moving average of the weights, which a run has with --ema_decay: "
                "use --weights=trained"
            )

    def slots(self) -> Tensors:
        """The optimizer's tensors, as ``<parameter>/<slot>``; none if its state is unknown.

        Raises:
            ValueError: the file is damaged, or a tensor in it does not fit a parameter of the model; names the file.
        """
        shapes = self.parameters()
        for key, slot in _floating(self.path, read(self.path / OPTIMIZER, opened=self.opened.get(OPTIMIZER))):
            shape = shapes.get(key.rpartition("/")[0])
            if shape is None or slot.numel() > shape.numel():
                raise UserError(
                    f"{self.path}: {key[:100]} of its optimizer has the shape {tuple(slot.shape)}, but the model has "
                    "no such parameter, or a smaller one"
                )
            yield key, slot

    def config(self) -> GPTConfig:
        return model_config(self.path, self.state["model"])

    def model(self, dropout: float | None = None) -> GPT:
        """The model in float32 on the CPU, as it was saved, with another ``dropout`` if one is given.

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
        """Its tokenizer as JSON; None if it is unknown.

        GPT-2's tokenizer does not count for a model with fewer ids: older checkpoints assumed it if the data had none.
        """
        spec: dict[str, Any] | None = self.state["tokenizer"]
        size = self.config().vocab_size
        assumed = spec == GPT2 and size != "auto" and size < GPT2_SIZES.start
        return None if assumed or spec == IDS_ONLY else spec

    def tokenizer(self) -> Tokenizer:
        """Raises ValueError if its vocabulary is unknown."""
        if self.tokenizer_spec is None:
            raise UserError(
                f"{self.path}: nothing says what its {self.config().vocab_size} token ids mean: "
                f"{self._tokenizer_remedy()}"
            )
        try:
            return from_json(self.state["tokenizer"])
        except ValueError as error:
            raise UserError(f"{self.path}: {error}") from None

    def _tokenizer_remedy(self) -> str:
        return (
            "put a meta.json, or a meta.pkl with its characters, beside the token files of its run, and resume the run"
        )


def _floating(path: Path, tensors: Tensors) -> Tensors:
    """Yields the tensors; raises ValueError for one that is not of floating-point numbers."""
    for name, tensor in tensors:
        if tensor.dtype not in FLOATS:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"{path}: {name[:100]} is of type {kind}, not of floating-point numbers as a weight is")
        yield name, tensor


def save(out_dir: Path, step: int, weights: dict[str, Tensor], slots: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Writes and syncs a checkpoint, and only then renames it into place.

    A checkpoint of the same step is replaced: if it has the same tensors, only its ``state.json``; otherwise it is
    moved aside first, so a whole checkpoint of this step is on the disk at any moment. After a kill between the
    renames, readers find the old one aside (``run_folder.existing_folder``), and the next run moves it back (``hold``).

    Raises:
        OSError: the disk is full or the folder is not writable; nothing is left of the attempt.
    """
    final, replaced = run_folder.checkpoint_folder(out_dir, step), run_folder.replaced_folder(out_dir, step)
    unfinished = final.with_name(f".{final.name}.unfinished")
    files.discard(unfinished)
    try:
        files.make_folder(unfinished)
        files.write_with(unfinished / MODEL, partial(save_file, weights))
        files.write_with(unfinished / OPTIMIZER, partial(save_file, slots))
        hashes = {name: files.sha256(unfinished / name) for name in (MODEL, OPTIMIZER)}
        files.write_sealed(unfinished / STATE, {**state, "sha256": hashes})
        for name in (MODEL, OPTIMIZER):
            files.sync(unfinished / name)
        files.sync(unfinished)
        if all((final / name).is_file() and files.sha256(final / name) == hashes[name] for name in hashes):
            files.rename(unfinished / STATE, final / STATE)
            files.sync(final)
        elif final.exists():
            if replaced.exists():
                run_folder.remove_checkpoint(replaced)
            files.rename(final, replaced)
            _rename_or_put_back(unfinished, final, replaced)
        else:
            files.rename(unfinished, final)
            files.sync(final.parent)
    except (OSError, SafetensorError) as error:
        files.discard(unfinished)
        why, remedy = files.reason(error) or str(error), "make room there or choose another --out_dir"
        raise files.UnwrittenError(final, why, remedy) from None
    files.discard(unfinished)
    if replaced.exists():
        run_folder.remove_checkpoint(replaced)


def _rename_or_put_back(unfinished: Path, final: Path, replaced: Path) -> None:
    try:
        files.rename(unfinished, final)
    except OSError:
        files.rename(replaced, final)
        raise
    files.sync(final.parent)


def state_of(path: Path) -> tuple[dict[str, Any], bool]:
    """The content of a checkpoint's ``state.json``, and whether it has a checksum of itself; older ones have none.

    Raises:
        ValueError: it is missing, changed, impossible, or of another step than its folder.
    """
    try:
        state, sealed = files.read_sealed(path / STATE)
        if state["sha256"].keys() != {MODEL, OPTIMIZER, *[STATE] * sealed}:
            raise UserError(f"its sha256 names {', '.join(map(str, state['sha256'])) or 'nothing'}")
        own = run_folder.checkpoint_folder, run_folder.replaced_folder
        if path.name not in [folder(path.parent, state["step"]).name for folder in own]:
            raise UserError(f"its state.json is of step {state['step']}")
        check_entries(state)
        if not sealed:
            known = State.of(state)
            if known.rows * int(state.get("row", 0)) > known.tokens:
                raise UserError(f"its {known.rows} rows need more than its {known.tokens} tokens")
        model_config(path, state["model"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    return state, sealed


def verify(path: Path, run_id: str | None = None) -> Checkpoint:
    """A checkpoint whose files match its checksums; they stay readable if the checkpoint is removed later.

    Raises:
        ValueError: a file is missing, changed, or of another run.
    """
    try:
        opened = {name: OpenFile(path / name) for name in (MODEL, OPTIMIZER)}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    state, _ = state_of(path)
    try:
        for name, file in opened.items():
            if not has_stated_length(file) or files.sha256(file.path) != state["sha256"][name]:
                raise UserError(f"{name} does not match its checksum")
        if run_id is not None and state["run"] != run_id:
            raise UserError(f"it is of another run, {state['run']}")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    return Checkpoint(path, state, opened=opened)


def unsealed(found: Checkpoint) -> str:
    """A warning if an older version wrote the checkpoint, without a checksum of ``state.json``; else ""."""
    if STATE in found.state["sha256"]:
        return ""
    return f"{found.path / STATE} has no checksum, since an older version wrote it: it is used without a check"


def load_weights(model: GPT, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Copies weights by name; raises ValueError if names or shapes differ."""
    wanted = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in weights:
            if (p := wanted.pop(name, None)) is None:
                raise UserError(f"the weights do not fit the model: they have {name}, {_NO_SUCH}")
            if p.shape != weight.shape:
                raise UserError(f"{name} has shape {tuple(weight.shape)}, the model {tuple(p.shape)}")
            p.copy_(shard_like(p, weight))
    if wanted:
        raise UserError(f"the weights do not fit the model: they lack {min(wanted)}")


def load_slots(optimizer: torch.optim.Optimizer, model: GPT, slots: Iterable[tuple[str, Tensor]]) -> None:
    """Puts ``<parameter>/<slot>`` tensors back into an optimizer of this model.

    On a CPU it would keep them in the file's map, and the file could then not be removed on Windows: they are copied.
    """
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, value in slots:
        name, slot = key.rsplit("/", 1)
        by_name.setdefault(name, {})[slot] = value
    names = {p: name for name, p in model.named_parameters()}
    packed = optimizer.state_dict()
    order: Iterable[nn.Parameter] = (p for group in optimizer.param_groups for p in group["params"])
    packed["state"] = {
        i: {slot: _placed(p, value) for slot, value in by_name[names[p]].items()}
        for i, p in enumerate(order)
        if names[p] in by_name
    }
    optimizer.load_state_dict(packed)


def _placed(p: nn.Parameter, value: Tensor) -> Tensor:
    return shard_like(p, value.clone() if p.device.type == "cpu" else value)
