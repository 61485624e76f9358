"""Fixtures: nanoGPT's checkpoint, its data, its folder, and the imported run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from nanogpt_run import Folio

from folio.preparation.job import prepare
from folio.preparation.recipes import known


@pytest.fixture(scope="session")
def shakespeare(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set of nanoGPT's checkpoint."""
    folder = tmp_path_factory.mktemp("shakespeare")
    prepare(known("shakespeare_char", folder, str(shared_data / "tinyshakespeare.txt"), {}), folder)
    return folder


@pytest.fixture
def theirs(shared_data: Path) -> dict[str, Any]:
    """The contents of nanoGPT's checkpoint."""
    return dict(torch.load(shared_data / "nanogpt_ckpt" / "ckpt.pt", weights_only=True))


@pytest.fixture
def out_dir(shared_data: Path, tmp_path: Path) -> Path:
    """nanoGPT's out_dir, which contains only its checkpoint."""
    folder = tmp_path / "out"
    folder.mkdir()
    shutil.copyfile(shared_data / "nanogpt_ckpt" / "ckpt.pt", folder / "ckpt.pt")
    return folder


@pytest.fixture
def imported(out_dir: Path, tmp_path: Path, folio: Folio) -> Path:
    assert folio("import", out_dir / "ckpt.pt", "--to", tmp_path / "imported").code == 0
    return tmp_path / "imported"


@pytest.fixture(params=["ckpt.pt", "imported"])
def begun(request: pytest.FixtureRequest) -> Path:
    """A folder with a run to resume: nanoGPT's own, or an imported one."""
    return Path(request.getfixturevalue("out_dir" if request.param == "ckpt.pt" else "imported"))
