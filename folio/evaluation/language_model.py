"""A model as one of the lm-evaluation-harness's; imported only where lm_eval is needed, since it is optional."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from folio import rng
from folio.data import decoding
from folio.data.tokenizers import Tokenizer
from folio.errors import UserError
from folio.evaluation.scoring import Query, Scores, cut_to_context, score
from folio.generation import sampling
from folio.machine.runtime import Runtime
from folio.model.gpt import GPT

Answer = tuple[float, bool]  # log-likelihood, and whether each token is the likeliest


class LanguageModel(TemplateLM):  # type: ignore[misc]
    """A wrapped model for the harness. It encodes and cuts text, and stops, as the harness's own HFLM does.

    The harness calls its methods on rank 0; ``on_every_rank`` sends the model's work to the others, which
    ``harness.evaluate`` makes wait for it.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, runtime: Runtime) -> None:
        super().__init__()
        self.model, self.tokens, self.runtime = model, tokenizer, runtime
        self.block_size = model.config.block_size

    @property
    def eot_token_id(self) -> int:
        if self.tokens.eot is None:
            raise UserError("a task scores text without a context, which needs a tokenizer with an end-of-text token")
        return self.tokens.eot

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        ids: list[int] = self.tokens.encode(string, special=True).tolist()
        size = self.model.transformer.wte.num_embeddings
        if max(ids, default=0) >= size:
            raise UserError(f"a task's token id {max(ids)} is not among the model's {size}")
        return ids

    def _loglikelihood_tokens(self, requests: list[tuple[Any, list[int], list[int]]], **_: Any) -> list[Answer]:
        """Requests with one context share a query, as long as its row fits into the model's context."""
        order = sorted(range(len(requests)), key=lambda i: requests[i][1])
        queries: list[Query] = []
        for i in order:
            texts, context, continuation = requests[i]
            if not continuation:
                raise UserError(f"a task scores a continuation without tokens: {texts}")
            last = queries[-1] if queries else None
            if last and last.context == context and last.length + len(continuation) - 1 <= self.block_size:
                last.continuations.append(continuation)
            else:
                queries.append(Query(context, [continuation]))
        rows = [part for query in queries for part in cut_to_context(query, self.block_size)]
        scores = self.on_every_rank("score", rows)
        answers = zip((-scores.nats).tolist(), scores.likeliest.tolist(), strict=True)
        return [answer for _, answer in sorted(zip(order, answers, strict=True))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        windows = [
            (i, *make_disjoint_window(window))
            for i, request in enumerate(requests)
            for window in get_rolling_token_windows(
                self.tok_encode(*request.args), self.prefix_token_id, self.block_size, context_len=1
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
        if (room := self.block_size - new) < 1:
            raise UserError(f"a task asks for {new} new tokens, too many for a model with block_size={self.block_size}")
        ids = self.tok_encode(context)[-room:] or [self.prefix_token_id]
        uniform = torch.rand(1, new, dtype=torch.float64, generator=rng.generator("harness", number))
        settings = how.get("temperature", 0.0), how.get("top_k"), how.get("top_p"), uniform, self.tokens.size
        text: str = self.on_every_rank("generate", ids, until, new, *settings)
        for stop in until:
            text = text.split(stop)[0]
        return text

    # Methods that run on every rank

    def on_every_rank(self, method: str, *arguments: Any) -> Any:
        self.runtime.broadcast(lambda: (method, *arguments))
        return getattr(self, method)(*arguments)

    def score(self, queries: list[Query]) -> Scores:
        return score(self.model, queries, self.runtime)

    def generate(self, ids: list[int], until: list[str], *how: Any) -> str:
        """The text up to an end of text, or to the token that completes one of ``until``; ``how`` as ``stream``'s."""

        def run() -> str:
            new = map(int, sampling.stream(self.model, torch.tensor([ids], device=self.runtime.device), *how))
            text = ""
            for part in decoding.stream(self.tokens, itertools.takewhile(lambda i: i != self.tokens.eot, new)):
                text += part
                if any(stop in text for stop in until):
                    break
            return text

        return self.runtime.infer(run)
