"""folio demo: prepare, train, sample and plot in some minutes, on text that every machine has."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from folio.config.options import Sampling
from folio.config.options import TrainConfig as Options
from folio.records.console import say
from folio.training.signals import EXIT_CODES, exit_on_signal

PRESET = "speedrun_stdlib"  # read before the command line, unless that names another preset


@exit_on_signal()
def main(options: Options) -> int:
    from folio.data.token_files import META
    from folio.preparation.job import prepare
    from folio.preparation.recipes import known
    from folio.training.showcase import show

    folder = Path(options.data.data_dir or Path("data") / options.data.dataset)
    if not (folder / META).exists():
        prepare(known(options.data.dataset, folder, "", {}), folder)
    run = show(options, Sampling(start="def ", num_samples=1, max_new_tokens=300))
    if stop := EXIT_CODES.get(run.stop):
        return stop
    say("\nWhat next?")
    folio = "folio" if shutil.which("folio") else os.path.relpath(Path(sys.executable).with_name("folio"))
    say(f'  {folio} sample --out_dir={run.out_dir} --start="def main():" --num_samples=3')
    steps = 2 * run.config.optimizer.max_iters
    say(f"  {folio} train --init_from=resume --out_dir={run.out_dir} --max_iters={steps} --lr_decay_iters={steps}")
    say(f"  {folio} prepare shakespeare_char && {folio} train shakespeare_char")
    say(f"  {folio} --help")
    return 0
