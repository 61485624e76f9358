"""A run that samples before and after training, and plots the losses."""

from __future__ import annotations

from folio.config.options import Sampling, TrainConfig
from folio.generation.sampling import LINE, continuations
from folio.records.console import say
from folio.records.plot import draw
from folio.records.run_folder import PICTURE
from folio.training.loop import fit
from folio.training.run import Run
from folio.training.signals import EXIT_CODES
from folio.training.start import running


def show(config: TrainConfig, how: Sampling) -> Run:
    """Trains, and samples before and after; at the end draws the losses into the run's folder."""
    with running(config) as run:
        _show_samples(run, how)
        if fit(run) in EXIT_CODES:
            return run
        _show_samples(run, how)
    if run.log.main and not run.read_only:
        picture = run.out_dir / PICTURE
        try:
            draw([run.out_dir], picture)
            say(f"The losses over the steps: {picture}")
        except ModuleNotFoundError as error:
            say(f"No picture, since the package {error.name!r} is missing: pip install {error.name}, then folio plot")
    return run


def _show_samples(run: Run, how: Sampling) -> None:
    tokenizer, seed = run.make_tokenizer(), run.config.system.seed
    texts = run.runtime.infer(lambda: continuations(run.model, tokenizer, how, seed))
    who = f"The model after {run.state.step:,} steps" if run.state.step else "The untrained model"
    for text in texts:
        run.log.say(f"\n{who} writes:\n\n{text}\n{LINE}\n")
