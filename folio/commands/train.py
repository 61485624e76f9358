"""folio train: train a model, or resume a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from folio.config.compose import BY_DEPTH
from folio.config.depth import SOURCE
from folio.config.files import read_file
from folio.config.options import TrainConfig as Options
from folio.config.table import options_with, override
from folio.config.values import COMMAND_LINE
from folio.records.console import say
from folio.training.signals import EXIT_CODES, exit_on_signal

_FINEWEB = "train_gpt2_124m_fineweb"


@exit_on_signal()
def main(options: Options) -> int:
    from folio.training.loop import fit
    from folio.training.start import running

    with running(_with_fineweb_preset(options)) as run:
        return EXIT_CODES.get(fit(run), 0)


def _with_fineweb_preset(options: Options) -> Options:
    """Applies build-nanogpt's preset if OpenWebText, the default data set, is missing and FineWeb-Edu is there.

    If a config file or data is named, or the run is resumed or starts from another model, the options stay as they are.
    """
    from folio.data.folders import find
    from folio.training.resume import has_run

    typed, begin = options.sources, options.output.init_from
    if typed.keys() & options_with(Options, role="data") or set(typed.values()) - {COMMAND_LINE, SOURCE}:
        return options
    if begin not in ("scratch", "auto", "resume") or (begin != "scratch" and has_run(Path(options.output.out_dir))):
        return options
    try:
        find(options.data)
        return options
    except FileNotFoundError as error:
        missing = error
    try:
        folder = find(replace(options.data, dataset="fineweb_edu"))
    except FileNotFoundError:
        if begin == "resume":
            return options
        raise FileNotFoundError(
            f"{missing}; or prepare build-nanogpt's data: python -m folio prepare fineweb_edu"
        ) from None
    say(f"{folder.path} is here and data/openwebtext is not: using config/{_FINEWEB}.py")
    kept = typed.keys() | (BY_DEPTH if options.depth else set())
    values = {name: value for name, value in read_file(_FINEWEB, Options).items() if name not in kept}
    return replace(override(options, values), sources={**dict.fromkeys(values, _FINEWEB), **typed})
