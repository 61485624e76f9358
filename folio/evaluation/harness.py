"""Evaluates a model on tasks of EleutherAI's lm-evaluation-harness."""

from __future__ import annotations

import contextlib
import functools
import io
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from folio.config.names import did_you_mean
from folio.data.tokenizers import Tokenizer
from folio.errors import UserError
from folio.machine.runtime import Runtime
from folio.model.gpt import GPT
from folio.records.console import silent_stderr

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager


def evaluate(
    model: GPT, tokenizer: Tokenizer, tasks: list[str], runtime: Runtime, limit: int = 0
) -> dict[str, dict[str, float]]:
    """Task → metric, such as ``acc``, ``acc_norm`` or ``acc_stderr`` → value; the same on every rank.

    ``tasks`` are names of the harness's tasks, groups and tags, or task files (YAML), whose ``!function`` lines run
    code. ``limit``: documents of each task, from the first; 0: all. The name of a metric after a filter includes
    the filter, such as ``exact_match,strict-match``.

    The harness runs on rank 0 alone, so data is fetched and random numbers are drawn once; every rank runs the model.

    Raises:
        ValueError: there is no such task, its data cannot be fetched, or it needs what this model cannot compute.
        FileNotFoundError: no such task file. ModuleNotFoundError: lm_eval, or what a task needs, is not installed.
    """
    with _quiet():
        from folio.evaluation.language_model import LanguageModel

    lm = LanguageModel(model, tokenizer, runtime)
    # until ``_run`` ends, rank 0 sends the calls of ``on_every_rank`` as tuples
    while isinstance(sent := runtime.broadcast(lambda: _run(lm, tasks, limit)), tuple):
        method, *arguments = sent
        getattr(lm, method)(*arguments)
    return sent


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drops the output and warnings of lm_eval and its libraries; exceptions are raised."""
    nowhere = io.StringIO()
    with (
        silent_stderr(),  # of git, which lm_eval runs to find its own version
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def _run(lm: LM, tasks: list[str], limit: int) -> Any:
    """The metrics of each task; runs on rank 0."""
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
        hint = did_you_mean(name, manager.all_tasks) or "lm-eval ls tasks lists them"
        raise UserError(f"no task {name!r} in the lm-evaluation-harness: {hint}")
    try:
        found = manager.load(name)
    except Exception as error:  # of the hub, its client or the network; a task file may raise anything
        if isinstance(error, ModuleNotFoundError) and error.name:
            raise
        remedy = "; its data is downloaded once, from the Hugging Face hub" if isinstance(error, OSError) else ""
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
