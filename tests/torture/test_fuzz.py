"""No reader of files or of the command line crashes at random input; ``make fuzz`` tries much more."""

from __future__ import annotations

import pytest
from fuzz import fuzz
from fuzz_targets import TARGETS

INPUTS = 25  # of each target, the same in each run


@pytest.mark.parametrize("name", TARGETS)
def test_random_input_is_read_or_refused_in_one_line(name: str) -> None:
    assert fuzz(TARGETS[name], INPUTS) <= INPUTS
