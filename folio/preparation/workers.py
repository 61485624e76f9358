"""A block of documents → ids, in worker processes, which import only this module and the tokenizer."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection, get_context, parent_process
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from folio.data.tokenizers import Ids, Tokenizer, dtype_for, from_json
from folio.errors import UserError
from folio.machine.probe import cores
from folio.preparation import sources
from folio.preparation.documents import Flaw, Spans, WorkerSettings, documents, refusal
from folio.preparation.sources import Block


class Tokenized(NamedTuple):
    """The ids of a block's documents, one after another, and how many each has."""

    ids: Ids  # uint16, or uint32 if the vocabulary needs it
    lengths: Ids
    continues: bool  # the first document continues the last one of the previous block
    size: int  # bytes of text in UTF-8
    skipped: Counter[str]


class Tokenize:
    """Spans → ``Tokenized``. Raises ValueError for a flaw, with file and line, unless flaws are skipped."""

    def __init__(self, settings: WorkerSettings) -> None:
        self.settings = settings
        self.tokenizer: Tokenizer = from_json(settings.tokenizer)
        self.dtype = dtype_for(self.tokenizer.size)
        self.eot = np.array([self.tokenizer.eot] if settings.eot != "none" else [], dtype=self.dtype)

    def __call__(self, spans: Spans) -> Tokenized:
        none = self.eot[:0]
        pieces, lengths, size, skipped = [none], [], 0, Counter[str]()
        for span in spans:
            before = none if span.continues or self.settings.eot == "after" else self.eot
            after = none if span.more or self.settings.eot == "before" else self.eot
            for i, text in documents(span, self.settings):
                if isinstance(text, str):
                    try:
                        size += len(text.encode())
                        ids = self.tokenizer.encode(text)
                    except UnicodeEncodeError:
                        text = Flaw("half of a surrogate pair")
                if isinstance(text, Flaw):
                    if not self.settings.skip:
                        raise refusal(span, i, text)
                    skipped[text.what] += 1
                    continue
                pieces += before, ids, after
                lengths.append(len(before) + len(ids) + len(after))
        ids = np.concatenate(pieces, dtype=self.dtype, casting="unsafe")
        return Tokenized(ids, np.array(lengths, dtype=np.int64), spans[0].continues, size, skipped)


class Alphabet:
    """Spans → the distinct characters of their documents, sorted."""

    def __init__(self, settings: WorkerSettings) -> None:
        self.settings = settings

    def __call__(self, spans: Spans) -> str:
        texts = (text for span in spans for _, text in documents(span, self.settings) if isinstance(text, str))
        return "".join(sorted(set().union(*texts) - {chr(c) for c in range(0xD800, 0xE000)}))


Job = Callable[[WorkerSettings], Callable[[Spans], Any]]  # Tokenize or Alphabet


def results(
    job: Job, settings: WorkerSettings, blocks: Iterator[Block], size: int | None, workers: int
) -> Generator[tuple[Block, Any]]:
    """Each block with the job's result, in order. If the source is small, this process does the work.

    ``size``: bytes of the source, if known. ``workers``: processes, 0 for one per core that this process may use.

    Raises:
        ValueError: the job raised it, or a worker process was killed.
    """
    workers = workers or cores()
    if workers == 1 or (size is not None and size <= 2 * sources.BLOCK):
        run = job(settings)
        yield from ((block, run(block.spans)) for block in blocks)
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _begin, (job, settings))
    waiting: deque[tuple[Block, Future[Any]]] = deque()
    try:
        for block in blocks:
            with _without_interrupts(), _without_main():  # which may start a process
                waiting.append((block, pool.submit(_run, block.spans)))
            if len(waiting) > 2 * workers:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed, perhaps because memory ran out: run it again to continue"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Inside, SIGINT is blocked; in a process that is started inside, it stays blocked.

    Ctrl-C in a terminal goes to the workers too, and would end one with a traceback before ``_begin`` ignores it.
    """
    if sys.platform == "win32" or not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _without_main() -> Iterator[None]:
    """A process that is started inside does not run the caller's script once more, as multiprocessing makes it do."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


_job: Callable[[Spans], Any]


def _begin(job: Job, settings: WorkerSettings) -> None:
    """Makes this process a worker for one job. It exits when its parent process does."""
    global _job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process ends this one
    _job = job(settings)
    parent = parent_process()
    if parent is not None:

        def exit_with_parent() -> None:
            connection.wait([parent.sentinel])
            os._exit(1)

        threading.Thread(target=exit_with_parent, daemon=True).start()


def _run(spans: Spans) -> Any:
    """Runs this worker's job on spans."""
    return _job(spans)
