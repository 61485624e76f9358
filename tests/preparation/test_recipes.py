"""Help and errors name the known data sets."""

from __future__ import annotations

import pytest

from folio.preparation.recipes import KNOWN, help_of


@pytest.mark.parametrize("name", KNOWN)
def test_help_lists_a_known_data_set_on_one_line(folio, name) -> None:
    said = folio("prepare", "--help").out
    assert [*name.split(), *help_of(name).split()] in [line.split() for line in said.splitlines()]
    assert len(help_of(name)) > 20


def test_an_unknown_data_set_is_refused_with_the_known_names(folio) -> None:
    outcome = folio("prepare", "nowhere")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert all(name in outcome.err for name in KNOWN)
