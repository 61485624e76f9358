"""Runs a command of Folio with faults: ``faulty.py "FAULT; FAULT" train …``; each fault happens by its name."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torture.faults import Fault, Plan

from folio import cli

SCRIPT = Path(__file__).resolve()

if __name__ == "__main__":
    names, sys.argv[:] = sys.argv[1], ["folio", *sys.argv[2:]]
    Plan([Fault(*name.split()) for name in names.split("; ")], None, Path(os.devnull)).install()
    cli.main()
