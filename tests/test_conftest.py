"""Every test is isolated from the user's files, and fails only for this project's own warnings."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest
from conftest import CHECKOUT, HOME, ROOT, python

import folio


def test_the_package_is_a_clean_copy() -> None:
    """In this process and in others, in any working folder; it has no data set, run or log."""
    assert Path(folio.__file__).is_relative_to(ROOT)
    assert not ROOT.is_relative_to(CHECKOUT)
    done = python("-c", "import folio; print(folio.__file__)", cwd=Path.cwd())
    assert Path(done.stdout.strip()).is_relative_to(ROOT)
    kept = {"prepare.py", "__pycache__"}
    assert {path.name for path in ROOT.glob("data/*/*")} <= kept
    assert not [path for path in ROOT.iterdir() if path.name.startswith("out") or path.name == ".venv"]


def test_a_data_set_of_the_checkout_is_not_found(tmp_path: Path) -> None:
    done = python("-m", "folio", "train", "--dataset=shakespeare_char", cwd=tmp_path)
    assert done.returncode == 2
    assert "data/shakespeare_char/train.bin is missing" in done.stderr


def test_a_test_starts_in_an_empty_folder_with_an_empty_home() -> None:
    assert list(Path.cwd().iterdir()) == []
    assert Path.home() == HOME
    assert (
        not {"HF_HOME", "HF_TOKEN", "HF_HUB_CACHE", "XDG_CACHE_HOME", "WANDB_DIR", "TIKTOKEN_CACHE_DIR"}
        & os.environ.keys()
    )


@pytest.mark.parametrize("module", ["torch._inductor.utils", "multiprocessing.popen_fork", "transformers"])
def test_a_warning_of_another_package_is_not_an_error(module: str) -> None:
    with warnings.catch_warnings(record=True):
        warnings.warn_explicit("old", DeprecationWarning, "file.py", 1, module=module)


@pytest.mark.parametrize("module", ["folio", "folio.model.gpt", "test_gpt", "conftest"])
def test_a_warning_that_this_project_causes_is_an_error(module: str) -> None:
    with pytest.raises(DeprecationWarning):
        warnings.warn_explicit("old", DeprecationWarning, "file.py", 1, module=module)
