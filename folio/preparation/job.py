"""A recipe → a finished data set: in parallel, in bounded memory, under a lock, and resumable.

1. A data set that is finished is left as it is; one that was made otherwise is refused, unless to overwrite.
2. Everything grows in the folder ``.preparing`` of the data set's, which the lock in it guards.
3. Workers tokenise blocks, a bounded number at a time; their results come back in order.
4. The writer adds them, and commits them with the source's position about once a second.
5. Finished files move to their place, ``meta.json`` last.

With ``part`` the job is shared out: each process prepares part I of N in a folder of its own, as ids and lengths
of documents, and the one that completes the last part puts all of them, in order, through step 4 and 5.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from folio.data.token_files import META, SPLITS, UNFINISHED
from folio.data.tokenizers import Characters, Tokenizer, stored
from folio.errors import UserError
from folio.files import read_json
from folio.locks import InUseError, Lock
from folio.preparation.sources import BLOCK, Block, Files, Source
from folio.preparation.workers import Alphabet, Tokenise, Tokenised, Work, begin, do
from folio.preparation.writer import STATE, Layout, Parts, PartWriter, Writer, listed, move, read_state, save_state
from folio.records.console import accompanying, say

COMMIT_EVERY = 1.0  # seconds
_LOCK = "lock"
_SAY_EVERY = 10.0  # seconds, where there is no terminal for a progress bar

Results = Callable[[Any], Generator[tuple[Block, Tokenised]]]  # from a position on


@dataclass(frozen=True)
class Recipe:
    """What a data set is made of, and how. ``tokenizer`` None: characters, those of the source."""

    source: Source
    tokenizer: Tokenizer | None
    layout: Layout
    text_key: str = "text"
    keep_empty: bool = False
    given_splits: bool = False  # the source decides what is for validation
    small_fraction: float = 0.1  # of the documents, where there is less than one shard
    made: dict[str, Any] = field(default_factory=dict)  # what else tells it from others

    def describe(self) -> dict[str, Any]:
        """What this data set's ``meta.json`` will say of its making."""
        told = self.tokenizer.to_json() if self.tokenizer else {"kind": "characters"}
        if told["kind"] == "tokenizers":
            digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
            told = {"kind": "tokenizers", "sha256": digest[:16]}
        return {
            **self.made,
            "source": self.source.describe(),
            "tokenizer": told,
            "text_key": self.text_key,
            "layout": asdict(self.layout),
        }


def prepare(
    recipe: Recipe,
    folder: Path,
    *,
    workers: int = 0,
    skip: bool = False,
    overwrite: bool = False,
    part: tuple[int, int] = (0, 1),
) -> None:
    """Makes a data set in ``folder``, or goes on making it.

    ``workers``: processes that tokenise, 0 for as many as this process may use cores. ``skip``: count documents
    that cannot be taken, instead of stopping at the first. ``part``: (I, N) of a job that is shared out.

    Raises:
        ValueError: a document that cannot be taken; another or a changed recipe, with the difference; the folder is
            in use by another process.
        OSError: what cannot be read or written.
    """
    described = recipe.describe()
    work = folder / UNFINISHED
    if _finished(folder, recipe, described, overwrite):
        if "meta" in read_state(work):  # of a process that was killed when all was in its place
            with contextlib.suppress(InUseError), _lock(work):
                _remove(work)
        return
    job = _Job(recipe, described, workers, skip, overwrite)
    if part[1] == 1:
        job.whole(folder, work)
        return
    job.part(work / f"part-{part[0]}-of-{part[1]}", part)
    parts = [work / f"part-{i}-of-{part[1]}" for i in range(part[1])]
    if missing := [i for i, path in enumerate(parts) if not _complete(path, described)]:
        few = ", ".join(map(str, missing[:8])) + (" …" if len(missing) > 8 else "")
        say(f"part {part[0]} of {part[1]} is complete; not yet: {few}")
        return
    try:
        job.whole(folder, work, parts)
    except InUseError:
        say(f"part {part[0]} of {part[1]} is complete; another process puts all parts together")


def _finished(folder: Path, recipe: Recipe, described: dict[str, Any], overwrite: bool) -> bool:
    """Whether there is nothing to do. Raises ValueError where something else is there."""
    if overwrite:
        return False
    try:
        meta = read_json(folder / META)
        made = dict(meta["made"])
        names = [str(f["name"]) for split in meta["splits"].values() for f in split["files"]]
        counts = {split: int(meta["splits"][split]["tokens"]) for split in SPLITS}
    except FileNotFoundError:
        if (folder / UNFINISHED / STATE).exists():
            return False
        if found := sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".npy", ".ds")):
            raise UserError(
                f"{folder} holds {found[0]}, which another program wrote: choose another folder, or --overwrite"
            ) from None
        return False
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / META} is damaged ({error}): --overwrite makes the data set anew") from None
    _refuse_difference(f"{folder} was made", made, described, recipe.source)
    gone = [name for name in names if not (folder / name).is_file()]
    if gone:
        raise UserError(f"{folder / gone[0]} is missing: --overwrite makes the data set anew")
    say(f"{folder} is finished: train has {counts['train']:,} tokens, val has {counts['val']:,}; nothing to do")
    return True


def _refuse_difference(what: str, old: dict[str, Any], new: dict[str, Any], source: Source) -> None:
    was, now = _flat(old), _flat(new)
    changed = [k for k in {**was, **now} if was.get(k) != now.get(k)]
    if changed == ["source.line_ends"] and isinstance(source, Files) and source.reads_as_before():
        return
    if changed:
        told = "; ".join(f"{k}: {was.get(k)} → {now.get(k)}" for k in changed)
        raise UserError(f"{what} with other settings ({told}): --overwrite makes it anew")


def _flat(tree: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {name: tree}
    return {k: v for key, value in tree.items() for k, v in _flat(value, f"{name}.{key}" if name else key).items()}


def _complete(part: Path, described: dict[str, Any]) -> bool:
    state = read_state(part)
    return "complete" in state and _same(state, described)


def _same(state: dict[str, Any], described: dict[str, Any]) -> bool:
    """Whether a state is of this recipe, and its positions of blocks of this size."""
    return state.get("made") == described and state.get("block") == BLOCK


def _remove(work: Path) -> None:
    """Removes what is left in there, the state last: a process that is killed on the way leaves it to be found."""
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != STATE:
            path.unlink()
    shutil.rmtree(work)


@contextlib.contextmanager
def _lock(work: Path) -> Iterator[None]:
    """Holds the folder for this process.

    A folder in which nothing was committed is removed again when what is done in it fails.
    """
    lock = Lock(work / _LOCK, "another process is preparing this data set", "wait until it has finished")
    try:
        yield
    except KeyboardInterrupt:
        say("stopped: the same command continues from here")
        raise
    except OSError as error:
        raise OSError(f"{error.filename or work}: {error.strerror or error}: run it again to go on") from None
    finally:
        if not (work / STATE).exists():
            shutil.rmtree(work, ignore_errors=True)
        lock.release()


@dataclass
class _Job:
    recipe: Recipe
    described: dict[str, Any]
    workers: int
    skip: bool
    overwrite: bool

    def whole(self, folder: Path, work: Path, parts: list[Path] | None = None) -> None:
        """Prepares everything, from the source or from complete parts of it."""
        with _lock(work):
            state = self._state(work)
            gone = parts and not all(_complete(path, self.described) for path in parts)
            if "meta" not in state and (gone or _finished(folder, self.recipe, self.described, self.overwrite)):
                return  # while this process waited for its turn
            if "meta" not in state:
                if state.setdefault("parts", shared := len(parts or [])) != shared:  # positions of another way
                    state = {"made": self.described, "block": BLOCK, "parts": shared}
                if parts:
                    save_state(work, state)  # without one the folder is removed where this fails, and all parts with it
                tokenizer = self._tokenizer(work, state)
                writer = Writer(work, self.recipe.layout, stored(tokenizer.size), self.recipe.given_splits, state)
                results = Parts(parts, stored(tokenizer.size)).results if parts else self._tokenised(tokenizer)
                with contextlib.closing(writer):
                    self._write(writer, results)
                    try:
                        files = writer.finish(tokenizer.eot, self.recipe.small_fraction)
                    except ValueError as error:
                        (work / STATE).unlink()  # going on would end here again
                        raise UserError(f"{folder}: {error}{_count(writer.skipped)}") from None
                state["meta"] = self._meta(writer, tokenizer, files)
                state["place"] = "" if writer.place == work else writer.place.name
                state["replaces"] = sorted(listed(folder))
                save_state(work, state)
            meta = state["meta"]
            names = [f["name"] for split in meta["splits"].values() for f in split["files"]]
            move(work / state["place"], names, meta, folder, state["replaces"])
            _remove(work)
        for split in SPLITS:
            say(f"{split} has {meta['splits'][split]['tokens']:,} tokens")
        say(f"wrote {folder}{_count(meta['skipped'])}")

    def part(self, work: Path, part: tuple[int, int]) -> None:
        """Prepares one part, unless it is complete."""
        with _lock(work):
            state = self._state(work)
            if not state.get("complete"):
                tokenizer = self._tokenizer(work, state)
                with contextlib.closing(PartWriter(work, state)) as writer:
                    self._write(writer, self._tokenised(tokenizer, part))
                    writer.commit(None, complete=True)

    def _state(self, work: Path) -> dict[str, Any]:
        """What an earlier process committed, if it was after the same."""
        state = read_state(work)
        if state and not self.overwrite:
            _refuse_difference(f"{work} was begun", state["made"], self.described, self.recipe.source)
        if not _same(state, self.described):
            (work / STATE).unlink(missing_ok=True)
            state = {"made": self.described, "block": BLOCK}
        return state

    def _tokenizer(self, work: Path, state: dict[str, Any]) -> Tokenizer:
        """The recipe's, or the one of the characters that a first pass over the whole source finds."""
        if self.recipe.tokenizer:
            return self.recipe.tokenizer
        if "alphabet" not in state:
            job = Work({}, "none", self.recipe.text_key)
            found: set[str] = set()
            with contextlib.closing(self._results(Alphabet, job, self.recipe.source.blocks())) as alphabets:
                for _, characters in alphabets:
                    found.update(characters)
            state["alphabet"] = "".join(sorted(found))
            save_state(work, state)
        return Characters(state["alphabet"])

    def _tokenised(self, tokenizer: Tokenizer, part: tuple[int, int] = (0, 1)) -> Results:
        recipe = self.recipe
        eot = recipe.layout.eot if tokenizer.eot is not None else "none"
        job = Work(tokenizer.to_json(), eot, recipe.text_key, self.skip, recipe.keep_empty)
        return lambda position: self._results(Tokenise, job, recipe.source.blocks(position, part))

    def _results(self, job: Any, work: Work, blocks: Iterator[Block]) -> Generator[tuple[Block, Any]]:
        """Each block with what the job makes of it, in order; small sources in this process."""
        size, workers = self.recipe.source.size, self.workers or _cores()
        if workers == 1 or (size is not None and size <= 2 * BLOCK):
            doing = job(work)
            yield from ((block, doing(block.spans)) for block in blocks)
            return
        pool = ProcessPoolExecutor(workers, get_context("spawn"), begin, (job, work))
        waiting: deque[tuple[Block, Future[Any]]] = deque()
        try:
            for block in blocks:
                waiting.append((block, pool.submit(do, block.spans)))
                if len(waiting) > 2 * workers:
                    done, future = waiting.popleft()
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        except BrokenProcessPool:
            raise UserError("a worker process was killed, perhaps for memory: run it again to go on") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _write(self, writer: Writer | PartWriter, results: Results) -> None:
        position, committed = writer.state.get("position"), time.perf_counter()
        if position is not None:
            say(f"going on after {writer.tokens:,} tokens of {writer.documents:,} documents")
        with _progress(self.recipe.source.size, writer) as show, contextlib.closing(results(position)) as found:
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
    return f"; documents that could not be taken: {sum(skipped.values()):,} ({kinds})"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _progress(total: int | None, writer: Writer | PartWriter) -> Iterator[Callable[[], None]]:
    """Tokens, MB of text a second and time left: a bar on a terminal, else a line now and then."""
    began, text, disk = time.perf_counter(), writer.text_bytes, writer.disk_bytes
    said = began
    console = Console(file=accompanying(sys.stdout))
    bar = Progress(
        TextColumn("{task.fields[figures]}"),
        BarColumn(bar_width=24),
        TimeRemainingColumn(compact=True),
        TextColumn("left"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    task = bar.add_task("", total=total, completed=disk, figures="")

    def show() -> None:
        nonlocal said
        now = time.perf_counter()
        speed = (writer.text_bytes - text) / (now - began) / 1e6
        figures = f"{writer.tokens:,} tokens  {speed:.1f} MB/s"
        bar.update(task, completed=writer.disk_bytes, figures=figures)
        if not console.is_terminal and now - said > _SAY_EVERY:
            said = now
            read = writer.disk_bytes - disk
            left = f", {(total - writer.disk_bytes) * (now - began) / read:,.0f} s left" if total and read else ""
            say(f"{writer.tokens:,} tokens, {speed:.1f} MB/s{left}")

    with bar:
        yield show
