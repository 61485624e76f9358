"""Every reader of files, and of the command line, takes random input without a crash; ``make fuzz`` tries many more."""

from __future__ import annotations

import pytest
from fuzz import fuzz
from fuzz_targets import TARGETS

INPUTS = 25  # of each target, the same in each run


@pytest.mark.parametrize("name", TARGETS)
def test_random_input_is_read_or_refused_in_one_line(name: str) -> None:
    assert fuzz(TARGETS[name], INPUTS) <= INPUTS
