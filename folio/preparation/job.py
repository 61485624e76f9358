"""A recipe → a finished data set: in parallel, in bounded memory, under a lock, and resumable.

1. A finished data set is not changed. One with other settings is refused, unless it is to be overwritten.
2. Everything is written in the folder ``.preparing`` inside the data set's folder, under a lock file.
3. Workers tokenize blocks, a bounded number at a time; their results come back in order.
4. The writer adds them, and commits them with the source's position about once a second.
5. Finished files move to their place, ``meta.json`` last.

With ``part`` several processes share the work. Each prepares part I of N in a folder of its own, as ids and lengths of
documents. The process that completes the last part runs steps 4 and 5 on all parts, in order.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from folio import files
from folio.data.token_files import SPLITS, UNFINISHED
from folio.data.tokenizers import Characters, Tokenizer, dtype_for
from folio.errors import UserError
from folio.locks import InUseError, Lock
from folio.preparation import sources
from folio.preparation.documents import WorkerSettings
from folio.preparation.finished import already_there, is_finished, refuse_difference
from folio.preparation.parts import Parts, PartWriter
from folio.preparation.progress import progress
from folio.preparation.recipe import Recipe
from folio.preparation.sources import Block
from folio.preparation.workers import Alphabet, Tokenize, Tokenized, results
from folio.preparation.writer import DIVIDED, STATE, Writer, listed, move, read_state, save_state
from folio.records.console import say

COMMIT_EVERY = 1.0  # seconds
_LOCK = "lock"

Results = Callable[[Any], Generator[tuple[Block, Tokenized]]]  # takes a position, or None for the beginning


def prepare(
    recipe: Recipe,
    folder: Path,
    *,
    workers: int = 0,
    skip: bool = False,
    overwrite: bool = False,
    part: tuple[int, int] = (0, 1),
) -> None:
    """Makes a data set in ``folder``, or continues where a killed process stopped.

    ``workers``: processes that tokenize, 0 for one per core that this process may use. ``skip``: leave out and count
    unusable documents, instead of stopping at the first. ``part``: (I, N), the part I of N that this process prepares.

    Raises:
        ValueError: a document is unusable; the settings differ from those of an unfinished data set; another process
            uses the folder.
        OSError: something cannot be read or written.
    """
    described = recipe.describe()
    work = folder / UNFINISHED
    if is_finished(folder, recipe, described, overwrite):
        if "meta" in read_state(work):  # the process that moved all files was killed before it removed this folder
            with contextlib.suppress(InUseError), _lock(work, once=False):
                _remove(work)
        return
    job = _Job(recipe, described, workers, skip, overwrite)
    if part[1] == 1:
        job.prepare_all(folder, work)
        return
    job.prepare_part(work / f"part-{part[0]}-of-{part[1]}", part)
    parts = [work / f"part-{i}-of-{part[1]}" for i in range(part[1])]
    if missing := [i for i, path in enumerate(parts) if not _complete(path, described)]:
        few = ", ".join(map(str, missing[:8])) + (" …" if len(missing) > 8 else "")
        say(f"part {part[0]} of {part[1]} is complete; not yet: {few}")
        return
    try:
        job.prepare_all(folder, work, parts)
    except InUseError:
        say(f"part {part[0]} of {part[1]} is complete; another process joins the parts")


def _complete(part: Path, described: dict[str, Any]) -> bool:
    state = read_state(part)
    return "complete" in state and _has_settings(state, described)


def _has_settings(state: dict[str, Any], described: dict[str, Any]) -> bool:
    """Whether a state was saved with these settings and the same size of blocks."""
    return state.get("made") == described and state.get("block") == sources.BLOCK


def _remove(work: Path) -> None:
    """Removes the folder, its state last: if this process is killed, the next one removes the rest.

    On Windows the lock stays, since it is open, and ``_lock`` removes both.
    """
    for path in work.iterdir():
        if path.name != STATE and not (files.WINDOWS and path.name == _LOCK):
            files.remove(path)
    files.remove(work / STATE if files.WINDOWS else work)


@contextlib.contextmanager
def _lock(work: Path, once: bool) -> Iterator[None]:
    """Locks the folder for this process. If it fails, and no later process can continue, the folder is removed.

    That is before the first commit, and with a source that is read ``once`` until all of it is written.
    """
    files.require_own_folder(work)
    lock = Lock(work / _LOCK, "another process is preparing this data set", "wait until it has finished")
    try:
        yield
    except KeyboardInterrupt:
        say("stopped: nothing is left of it" if once else "stopped: the same command continues from here")
        raise
    except OSError as error:
        raise OSError(f"{error.filename or work}: {error.strerror or error}: run it again to continue") from None
    finally:
        if unused := not (work / STATE).exists() or (once and "meta" not in read_state(work)):
            files.discard(work)
        lock.release()
        if unused and files.WINDOWS:
            files.discard(work)


@dataclass
class _Job:
    recipe: Recipe
    described: dict[str, Any]
    workers: int
    skip: bool
    overwrite: bool

    def prepare_all(self, folder: Path, work: Path, parts: list[Path] | None = None) -> None:
        """Prepares everything, from the source or from complete parts of it."""
        with _lock(work, self.recipe.source.once):
            state = self._state(work)
            earlier = "meta" in state  # a process that was killed had written everything
            gone = parts and not all(_complete(path, self.described) for path in parts)
            if "meta" not in state and (gone or is_finished(folder, self.recipe, self.described, self.overwrite)):
                return  # another process finished it in the meantime
            if "meta" not in state:
                # a position in N parts means nothing in another number of parts
                if state.setdefault("parts", shared := len(parts or [])) != shared:
                    state = {"made": self.described, "block": sources.BLOCK, "parts": shared}
                if parts:
                    save_state(work, state)  # without it, a failure would remove the folder and all parts
                tokenizer = self._tokenizer(work, state)
                writer = Writer(work, self.recipe.layout, dtype_for(tokenizer.size), self.recipe.given_splits, state)
                tokenized = Parts(parts, dtype_for(tokenizer.size)).results if parts else self._tokenized(tokenizer)
                with contextlib.closing(writer):
                    self._write(writer, tokenized)
                    try:
                        written = writer.finish(tokenizer.eot, self.recipe.small_fraction)
                    except ValueError as error:
                        files.remove(work / STATE)  # with it, a second run would fail here again
                        raise UserError(f"{folder}: {error}{_count(writer.skipped)}") from None
                state["meta"] = self._meta(writer, tokenizer, written)
                state["place"] = "" if writer.place == work else writer.place.name
                state["replaces"] = sorted(listed(folder))
                save_state(work, state)
            meta = state["meta"]
            names = [f["name"] for split in meta["splits"].values() for f in split["files"]]
            place = work / DIVIDED if state["place"] else work
            move(place, names, meta, folder, state["replaces"])
            _remove(work)
            if earlier and self.recipe.source.once:
                raise already_there(folder)
        for split in SPLITS:
            say(f"{split} has {meta['splits'][split]['tokens']:,} tokens")
        say(f"wrote {folder}{_count(meta['skipped'])}")

    def prepare_part(self, work: Path, part: tuple[int, int]) -> None:
        """Prepares one part, unless it is complete."""
        with _lock(work, once=False):
            state = self._state(work)
            if not state.get("complete"):
                tokenizer = self._tokenizer(work, state)
                with contextlib.closing(PartWriter(work, state)) as writer:
                    self._write(writer, self._tokenized(tokenizer, part))
                    writer.commit(None, complete=True)

    def _state(self, work: Path) -> dict[str, Any]:
        """The state that an earlier process committed, or a new one. Raises ValueError if the settings differ."""
        state = read_state(work)
        if state and not self.overwrite:
            refuse_difference(f"{work} was begun", state["made"], self.described, self.recipe.source)
        afresh = self.recipe.source.once and (self.overwrite or "meta" not in state)
        if afresh or not _has_settings(state, self.described):
            files.remove(work / STATE)
            state = {"made": self.described, "block": sources.BLOCK}
        return state

    def _tokenizer(self, work: Path, state: dict[str, Any]) -> Tokenizer:
        """The recipe's tokenizer; if it has none, one of all characters, which a first pass over the source finds."""
        if tokenizer := self.recipe.fixed_tokenizer:
            return tokenizer
        if "alphabet" not in state:
            settings = WorkerSettings({}, "none", self.recipe.text_key)
            source = self.recipe.source
            if source.once:
                raise UserError("tokenizer=char reads the texts twice, and an iterable only once: give a list of them")
            found: set[str] = set()
            alphabets = results(Alphabet, settings, source.blocks(), source.size, self.workers)
            with contextlib.closing(alphabets):
                for _, characters in alphabets:
                    found.update(characters)
            state["alphabet"] = "".join(sorted(found))
            save_state(work, state)
        return Characters(state["alphabet"])

    def _tokenized(self, tokenizer: Tokenizer, part: tuple[int, int] = (0, 1)) -> Results:
        recipe = self.recipe
        eot = recipe.layout.eot if tokenizer.eot is not None else "none"
        settings = WorkerSettings(tokenizer.to_json(), eot, recipe.text_key, self.skip, recipe.keep_empty)

        def from_position(position: Any) -> Generator[tuple[Block, Tokenized]]:
            blocks = recipe.source.blocks(position, part)
            return results(Tokenize, settings, blocks, recipe.source.size, self.workers)

        return from_position

    def _write(self, writer: Writer | PartWriter, tokenized: Results) -> None:
        position, committed = writer.state.get("position"), time.perf_counter()
        if position is not None:
            say(f"continuing after {writer.tokens:,} tokens of {writer.documents:,} documents")
        with progress(self.recipe.source.size, writer) as show, contextlib.closing(tokenized(position)) as found:
            for block, result in found:
                writer.add(result, block)
                position = block.after
                if (now := time.perf_counter()) - committed > COMMIT_EVERY:
                    writer.commit(position)
                    committed = now
                show()
        writer.commit(position)

    def _meta(self, writer: Writer, tokenizer: Tokenizer, files: dict[Any, list[dict[str, Any]]]) -> dict[str, Any]:
        splits = {
            split: {
                "tokens": sum(f["tokens"] for f in found),
                "documents": sum(f["documents"] for f in found),
                "files": found,
            }
            for split, found in files.items()
        }
        return {
            "vocab_size": tokenizer.size,
            "dtype": writer.dtype.name,
            "tokenizer": tokenizer.to_json(),
            "eot": self.recipe.layout.eot if tokenizer.eot is not None else "none",
            "splits": splits,
            "text_bytes": writer.text_bytes,
            "skipped": dict(writer.skipped),
            "made": self.described,
        }


def _count(skipped: Counter[str] | dict[str, int]) -> str:
    if not skipped:
        return ""
    kinds = ", ".join(f"{count:,} with {what}" for what, count in Counter(skipped).most_common(5))
    return f"; documents that could not be used: {sum(skipped.values()):,} ({kinds})"
