"""The package as users install it: built by pip, installed in its own venv, used from another folder."""

from __future__ import annotations

import sysconfig
import tomllib
import venv
import zipfile
from email import message_from_bytes
from functools import partial
from pathlib import Path

import pytest
from conftest import ROOT, STORY, TINY
from conftest import succeed as succeed_with

from folio import __version__

pytestmark = pytest.mark.slow
NAME = f"folio-{__version__}"
succeed = partial(succeed_with, PYTHONPATH="")  # only the installed package


@pytest.fixture(scope="module")
def wheel(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    succeed(f"python -m pip wheel --no-deps --wheel-dir={out} .", clone)
    return out / f"{NAME}-py3-none-any.whl"


@pytest.fixture
def installed(wheel: Path, tmp_path: Path) -> Path:
    """A venv with the wheel; the dependencies are those of the running Python."""
    folder = tmp_path / "venv"
    venv.create(folder, symlinks=True)
    succeed(f"python -m pip --python {folder / 'bin' / 'python'} install --no-deps --no-index {wheel}", tmp_path)
    packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
    dependencies = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    # a .pth file in one of those folders, such as an editable folio's, has no effect from here
    (packages / "dependencies.pth").write_text("\n".join(dependencies), encoding="utf-8")
    return folder


def test_it_holds_the_package_and_nothing_else(wheel: Path, clone: Path) -> None:
    """All tracked files of folio/, with presets and py.typed, and the metadata: readme, license, extras."""
    package = {path.relative_to(clone).as_posix() for path in (clone / "folio").rglob("*") if path.is_file()}
    about = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt"}
    with zipfile.ZipFile(wheel) as file:
        assert set(file.namelist()) == package | {f"{NAME}.dist-info/{name}" for name in about}
        metadata = message_from_bytes(file.read(f"{NAME}.dist-info/METADATA"))
    assert {"folio/py.typed", "folio/presets/train_shakespeare_char.py"} < package
    assert metadata.get_payload(decode=True) == (ROOT / "README.md").read_bytes()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert metadata.get_all("Provides-Extra") == list(project["optional-dependencies"])


def test_it_works_from_another_folder(installed: Path, tmp_path: Path) -> None:
    """All commands from --version to plot, on a packaged preset; the imported folio is the wheel's."""
    python, folio = (installed / "bin" / name for name in ("python", "folio"))
    where = succeed(f"{python} -c 'import folio; print(folio.__file__)'", tmp_path)
    assert Path(where).is_relative_to(installed)
    assert succeed(f"{folio} --version", tmp_path) == f"{__version__}\n"
    succeed(f"{folio} prepare shakespeare_char --source {STORY}", tmp_path)
    assert "found vocab_size" in succeed(f"{folio} train shakespeare_char {TINY} --max_iters=3", tmp_path)
    of_the_preset = "--out_dir=out-shakespeare-char"
    assert "-" * 15 in succeed(f"{folio} sample {of_the_preset} --num_samples=1 --max_new_tokens=5", tmp_path)
    assert "val loss" in succeed(f"{folio} eval {of_the_preset}", tmp_path)
    succeed(f"{folio} plot out-shakespeare-char", tmp_path)
    assert (tmp_path / "out-shakespeare-char" / "loss.png").stat().st_size > 0
