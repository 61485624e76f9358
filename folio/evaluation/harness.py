"""Evaluates a model on tasks of EleutherAI's lm-evaluation-harness; the only module that imports lm_eval."""

from __future__ import annotations

import contextlib
import difflib
import functools
import io
import itertools
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from folio import rng
from folio.data import decoding
from folio.data.tokenizers import Tokenizer
from folio.errors import UserError
from folio.evaluation.scoring import Query, Scores, fitted, score
from folio.generation import sampling
from folio.machine.runtime import Runtime
from folio.model.gpt import GPT
from folio.records.console import silent_stderr

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

Answer = tuple[float, bool]  # log-likelihood, and whether each token is the likeliest


def evaluate(
    model: GPT, tokens: Tokenizer, tasks: list[str], runtime: Runtime, limit: int = 0
) -> dict[str, dict[str, float]]:
    """Task → metric, such as ``acc``, ``acc_norm`` or ``acc_stderr`` → value; the same on every rank.

    ``tasks`` are names of the harness's tasks, groups and tags, or task files (YAML), whose ``!function`` lines run
    code. ``limit``: documents of each task, from the first; 0: all. A metric that a filter makes keeps its name, as
    ``exact_match,strict-match``.

    The harness runs on rank 0, so that data is fetched and anything drawn at random once; every rank takes part in
    the model's work.

    Raises:
        ValueError: there is no such task, its data cannot be fetched, or the model cannot answer what it asks.
        FileNotFoundError: no such task file. ModuleNotFoundError: lm_eval, or what a task needs, is not installed.
    """
    lm = language_model(model, tokens, runtime)
    while isinstance(sent := runtime.broadcast(lambda: _ask(lm, tasks, limit)), tuple):  # work that rank 0 sends
        method, *what = sent
        getattr(lm, method)(*what)
    return sent


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drops the output and warnings of lm_eval and its libraries; exceptions are raised."""
    nowhere = io.StringIO()
    with (
        silent_stderr(),  # git's, which it asks for its own version
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def _ask(lm: LM, tasks: list[str], limit: int) -> Any:
    with _quiet():
        from lm_eval.evaluator import simple_evaluate

        manager = _manager()
        loaded = [part for name in dict.fromkeys(tasks) for part in _load(manager, name)]
        found = simple_evaluate(lm, tasks=loaded, task_manager=manager, limit=limit or None, log_samples=False)
        return {task: _plain(metrics) for task, metrics in found["results"].items()}


@functools.cache
def _manager() -> TaskManager:
    from lm_eval.tasks import TaskManager

    return TaskManager()  # which reads thousands of files


def _load(manager: TaskManager, name: str) -> list[Any]:
    """The group or the tasks of a name."""
    if name not in manager.all_tasks and not Path(name).is_file():
        if name.endswith((".yaml", ".yml")):
            raise FileNotFoundError(f"{name}: there is no such task file")
        close = difflib.get_close_matches(name, manager.all_tasks)
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "lm-eval ls tasks lists them"
        raise UserError(f"no task {name!r} in the lm-evaluation-harness: {hint}")
    try:
        found = manager.load(name)
    except Exception as error:  # the hub's, its client's and the network's, or of a task file whatever it is
        if isinstance(error, ModuleNotFoundError) and error.name:
            raise
        remedy = "; its data comes from the Hugging Face hub, once" if isinstance(error, OSError) else ""
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"task {name} could not be loaded: {reason}{remedy}") from None
    groups = found["groups"]
    return [groups[name]] if name in groups else list(found["tasks"].values())


def _plain(metrics: dict[str, Any]) -> dict[str, float]:
    """The numbers among a task's results, whose names are "metric,filter"."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in metrics.items()
        if "," in name and isinstance(value, (int, float)) and math.isfinite(value)
    }


def language_model(model: GPT, tokens: Tokenizer, runtime: Runtime) -> LM:
    """A wrapped model as one of the harness's, which encodes, cuts and stops as its own HFLM does.

    The harness asks that of rank 0; ``evaluate`` has the others do their part.
    """
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    block_size = model.config.block_size

    class Folio(TemplateLM):  # type: ignore[misc]
        @property
        def eot_token_id(self) -> int:
            if tokens.eot is None:
                raise UserError("a task asks about text without context: that needs a tokenizer with an end of text")
            return tokens.eot

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            ids: list[int] = tokens.encode(string, special=True).tolist()
            if max(ids, default=0) >= model.transformer.wte.num_embeddings:
                raise UserError(f"a task's token id {max(ids)} is not among the model's {model.config.vocab_size}")
            return ids

        def _loglikelihood_tokens(self, requests: list[tuple[Any, list[int], list[int]]], **_: Any) -> list[Answer]:
            """Those of one context share a query, while its row is no longer than a text may be."""
            order = sorted(range(len(requests)), key=lambda i: requests[i][1])
            queries: list[Query] = []
            for i in order:
                texts, context, continuation = requests[i]
                if not continuation:
                    raise UserError(f"a task asks about no token: {texts}")
                last = queries[-1] if queries else None
                if last and last.context == context and last.length + len(continuation) - 1 <= block_size:
                    last.continuations.append(continuation)
                else:
                    queries.append(Query(context, [continuation]))
            rows = [part for query in queries for part in fitted(query, block_size)]
            scores = self.everywhere("score", rows)
            answers = zip((-scores.nats).tolist(), scores.likeliest.tolist(), strict=True)
            return [answer for _, answer in sorted(zip(order, answers, strict=True))]

        def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
            windows = [
                (i, *make_disjoint_window(window))
                for i, request in enumerate(requests)
                for window in get_rolling_token_windows(
                    self.tok_encode(*request.args), self.prefix_token_id, block_size, context_len=1
                )
            ]
            totals = [0.0] * len(requests)
            for (i, *_), (log_likelihood, _) in zip(windows, self._loglikelihood_tokens(windows), strict=True):
                totals[i] += log_likelihood
            return totals

        def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
            return [self._continue(i, *request.args) for i, request in enumerate(requests)]

        def _continue(self, number: int, context: str, asked: dict[str, Any]) -> str:
            how = normalize_gen_kwargs(asked)
            new, until = how["max_gen_toks"], [stop for stop in how["until"] if stop]
            if (room := block_size - new) < 1:
                raise UserError(
                    f"a task asks for {new} new tokens, which a model with block_size={block_size} has no room for"
                )
            ids = self.tok_encode(context)[-room:] or [self.prefix_token_id]
            uniform = torch.rand(1, new, dtype=torch.float64, generator=rng.generator("harness", number))
            drawn = how.get("temperature", 0.0), how.get("top_k"), how.get("top_p"), uniform, tokens.size
            said = self.everywhere("write", ids, until, new, *drawn)
            for stop in until:
                said = said.split(stop)[0]
            return said

        # What every rank does

        def everywhere(self, method: str, *what: Any) -> Any:
            runtime.broadcast(lambda: (method, *what))
            return getattr(self, method)(*what)

        def score(self, queries: list[Query]) -> Scores:
            return score(model, queries, runtime)

        def write(self, ids: list[int], until: list[str], *how: Any) -> str:
            """Up to the end of the text, or the token that completes a stop."""

            def run() -> str:
                new = map(int, sampling.stream(model, torch.tensor([ids], device=runtime.device), *how))
                said = ""
                for part in decoding.stream(tokens, itertools.takewhile(lambda i: i != tokens.eot, new)):
                    said += part
                    if any(stop in said for stop in until):
                        break
                return said

            return runtime.infer(run)

    return Folio()
