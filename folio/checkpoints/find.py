"""Finds a model by the name of its source, and a run's checkpoint as ``best``, ``latest`` or by its step.

A source is an out_dir, a ``.pt`` file, a Hugging Face folder or a model of the hub.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from folio import files
from folio.checkpoints import checkpoint, hub, hugging_face, pt_files
from folio.checkpoints.checkpoint import Checkpoint
from folio.config.options import Source
from folio.data.token_files import GPT2
from folio.errors import UserError
from folio.model.gpt import GPT
from folio.records import run_folder
from folio.records.run_folder import BEST, CHECKPOINTS


def from_pretrained(name: str, override_args: dict[str, Any] | None = None) -> GPT:
    """The model of any source that ``by_name`` knows, in float32 on the CPU; dropout is 0 unless overridden.

    Matches nanoGPT's ``GPT.from_pretrained``, with OpenAI's tanh GELU where nanoGPT's is the exact one.

    Raises:
        ValueError: ``override_args`` has a key besides dropout, or as ``by_name``. FileNotFoundError: as ``by_name``.
    """
    changes = {"dropout": 0.0, **(override_args or {})}
    if odd := sorted(changes.keys() - {"dropout"}):
        raise UserError(f"override_args: {odd[0]} is fixed by the weights, only dropout can be chosen")
    return by_name(name).model(**changes)


def from_source(source: Source) -> Checkpoint:
    """The model that a command was given; raises as ``by_name``."""
    resume = source.init_from == "resume"
    name = source.out_dir if resume else source.init_from
    found = in_folder(Path(name), source.checkpoint) if resume else by_name(name, source.checkpoint)
    return found.with_weights(source.weights)


def by_name(name: str, which: str = "best") -> Checkpoint:
    """A model by name: an out_dir, a ``.pt`` file or its folder, a Hugging Face folder, a model of the hub.

    Raises:
        FileNotFoundError: there is none. ValueError: it is damaged, not a GPT-2, or its pickle names code to run.
    """
    try:
        path = Path(name).expanduser()
    except RuntimeError:
        raise FileNotFoundError(f"{name}: there is no such user") from None
    if path.is_dir():
        return in_folder(path, which)
    if path.suffix == ".pt":
        return _the_only(pt_files.read(path), which)
    if path.is_file():
        raise UserError(f"{path}: a model is a folder or a .pt file")
    tokenizer = GPT2 if name.removeprefix("openai-community/") in hub.OPENAI else None
    return _the_only(hugging_face.read(hub.download(name), tokenizer), which)


def in_folder(path: Path, which: str = "best") -> Checkpoint:
    """An out_dir's checkpoint ``which`` (best, latest or a step), nanoGPT's ``ckpt.pt``, or a Hugging Face folder.

    Raises:
        FileNotFoundError, ValueError: as ``by_name``.
    """
    run = path.parent.parent
    for step in run_folder.steps(run):
        if path == run_folder.existing_folder(run, step):
            raise UserError(f"{path} is a checkpoint of the run {run}: give {run}, and checkpoint={step}")
    if not run_folder.steps(path):
        if (path / run_folder.NANOGPT).exists():
            return _the_only(pt_files.read(path / run_folder.NANOGPT), which)
        if hugging_face.weight_files(path):
            return _the_only(hugging_face.read(path), which)
    return choose(path, which)


def _the_only(found: Checkpoint, which: str) -> Checkpoint:
    """A single checkpoint is the best and the latest; raises FileNotFoundError for another step."""
    if which not in ("best", "latest", str(found.step)):
        raise FileNotFoundError(f"no checkpoint {which!r} in {found.path}: there is one, of step {found.step}")
    return found


# The checkpoints of a run's folder


def latest(out_dir: Path, run_id: str | None = None, aside: bool = True) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, and a line about each newer one that does not.

    With ``aside``, those newer ones are renamed to ``….damaged``, so that they are not found again. If none verifies,
    none is renamed: the damage may be in another file, as if ``config.json`` is that of another run.
    """
    damaged: dict[Path, str] = {}
    for step in reversed(run_folder.steps(out_dir)):
        path = run_folder.existing_folder(out_dir, step)
        try:
            found = checkpoint.verify(path, run_id)
        except ValueError as error:
            damaged[path] = str(error)
            continue
        for path in damaged if aside else ():
            other = path.with_name(f"{path.name}.damaged")
            files.discard(other)
            files.rename(path, other)
            damaged[path] += f"; set aside as {other.name}"
        return found, [*damaged.values(), *filter(None, [checkpoint.unsealed(found)])]
    return None, list(damaged.values())


def best_step(out_dir: Path) -> int | None:
    """The step of ``best.json``; if that is lost or damaged, the best one according to the newest checkpoint."""
    try:
        best, sealed = files.read_sealed(out_dir / BEST)
        if (sealed or best.keys() == {"step", "loss"}) and type(best["step"]) is int:
            return best["step"]
    except (OSError, ValueError, LookupError):
        pass
    for step in reversed(run_folder.steps(out_dir)):
        try:
            best = checkpoint.state_of(run_folder.existing_folder(out_dir, step))[0]["best"]
            return int(best["step"]) if best else None
        except (ValueError, LookupError, TypeError):
            continue
    return None


def choose(out_dir: Path, which: str = "best") -> Checkpoint:
    """Finds the checkpoint ``best``, ``latest`` or of a step. If it is removed before it is read, chooses again.

    Raises:
        FileNotFoundError: there is no such checkpoint; lists those that exist.
        ValueError: it is damaged; names another one.
    """
    while True:
        step = _chosen(out_dir, which)
        path, inode = _located(out_dir, step)
        try:
            found = checkpoint.verify(path)
            break
        except ValueError as error:
            if inode is not None and _located(out_dir, step) == (path, inode):
                others = [other for other in run_folder.steps(out_dir) if other != step]
                remedy = f"; --checkpoint={others[-1]} is another" if others else ""
                raise UserError(f"{error}{remedy}") from None
    options: dict[str, Any] = {}
    try:
        options = run_folder.read_config(out_dir).options
    except FileNotFoundError:
        pass
    except ValueError as error:  # the model is usable without the run's options
        warnings.warn(str(error), stacklevel=2)
    if line := checkpoint.unsealed(found):
        warnings.warn(line, stacklevel=2)
    return replace(found, asked=options)


def _located(out_dir: Path, step: int) -> tuple[Path, int | None]:
    """The folder of a checkpoint and its inode, which changes when another folder takes the name; None if removed."""
    path = run_folder.existing_folder(out_dir, step)
    try:
        return path, path.stat().st_ino
    except OSError:
        return path, None


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

    With ``keep`` 1 only the newest stays, not the two newest. Unfinished folders of a killed ``save`` are removed too.
    What cannot be removed stays, with a warning, until the next call.
    """
    for path in (out_dir / CHECKPOINTS).glob(".step-*"):
        if not path.name.endswith(run_folder.REPLACED):
            run_folder.delete(path)
    there = run_folder.steps(out_dir)
    kept = {best_step(out_dir), *there[-min(keep, 2) :], *[step for step in there if step % interval == 0][-keep:]}
    for step in there:
        if step not in kept:
            run_folder.remove_checkpoint(run_folder.checkpoint_folder(out_dir, step))
