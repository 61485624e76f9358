"""A run that shows what it learns: what the model writes before and after, and the figure."""

from __future__ import annotations

from folio.config.options import Sampling, TrainConfig
from folio.generation.sampling import LINE, continuations
from folio.records.console import say
from folio.records.plot import draw
from folio.records.run_folder import PICTURE
from folio.training.loop import fit
from folio.training.run import Run, finish
from folio.training.start import build
from folio.training.stopping import EXIT


def show(config: TrainConfig, how: Sampling) -> Run:
    """Trains, and lets the model write before and after; draws the losses into the run's folder at the end."""
    run = build(config)
    try:
        _write(run, how)
        if fit(run) in EXIT:
            return run
        _write(run, how)
    finally:
        finish(run)
    if run.log.main and not config.evaluation.eval_only:
        picture = run.out_dir / PICTURE
        try:
            draw([run.out_dir], picture)
            say(f"The losses over the steps: {picture}")
        except ModuleNotFoundError as error:
            say(f"No picture, since the package {error.name!r} is missing: pip install {error.name}, then folio plot")
    return run


def _write(run: Run, how: Sampling) -> None:
    vocabulary, seed = run.vocabulary(), run.config.system.seed
    texts = run.runtime.infer(lambda: continuations(run.model, vocabulary, how, seed))
    who = f"The model after {run.state.step:,} steps" if run.state.step else "The untrained model"
    for text in texts:
        run.log.say(f"\n{who} writes:\n\n{text}\n{LINE}\n")
