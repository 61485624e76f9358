"""folio train: a run from a config, to its end."""

from __future__ import annotations

from folio.config import TrainConfig as Options
from folio.trainer import EXIT, build, finish, fit, validate


def main(options: Options) -> int:
    run = build(options)
    try:
        if options.evaluation.eval_only:
            run.log.write(*validate(run))
            return 0
        return EXIT.get(fit(run), 0)
    finally:
        finish(run)
