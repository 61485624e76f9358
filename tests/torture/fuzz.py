"""Gives each reader random input, which it must read, or refuse with one clear error, in little time and memory.

    python tests/torture/fuzz.py --seconds=600 [TARGET …]

prints each kind of failure once, with an input that causes it, and the number of inputs. With ``--guided`` and atheris
(``pip install atheris``), the inputs of one target are changed towards code that no input has reached, until the first
failure.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib
import io
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    for folder in ("tests/checkpoints", "tests", "."):
        sys.path.insert(0, str(Path(__file__).resolve().parents[2] / folder))

from hypothesis import HealthCheck, Phase, given, seed, settings

# which must see the readers being imported
GUIDE = importlib.import_module("atheris") if __name__ == "__main__" and "--guided" in sys.argv else None
with GUIDE.instrument_imports(include=["folio"]) if GUIDE else contextlib.nullcontext():
    from fuzz_targets import TARGETS, Target

    from folio.cli import _describe, _shortened
    from folio.errors import UserError

LONGEST = 2000  # characters of an error or a warning
SECONDS = 5.0  # that one input may take
_BATCH = 500  # inputs


def check(target: Target, value: Any, folder: Path) -> bool:
    """Whether the reader refuses the value. Raises any other error, and AssertionError if it is long or takes long."""
    begin = time.process_time()
    refused = False
    with warnings.catch_warnings(record=True) as said, contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("always")
        try:
            target.read(value, folder)
        except (UserError, OSError) as error:
            refused = True
            line = _describe(error)
            assert 0 < len(line) <= LONGEST, f"an error of {len(line):,} characters: {line[:200]}"
    for warning in said:
        assert 0 < len(_shortened(str(warning.message))) <= LONGEST
    assert (took := time.process_time() - begin) <= SECONDS, f"{took:.1f} s"
    return refused


def fuzz(target: Target, count: int, number: int | None = None, failed: Callable[[Any], None] | None = None) -> int:
    """Tries ``count`` inputs, by the seed ``number`` if there is one; returns how many were refused.

    A failure is raised for the smallest input that causes it. If ``failed`` is given, it is called with each such
    input instead.
    """
    refused = 0
    folder = Path(tempfile.mkdtemp(prefix="folio-fuzz-"))
    phases = [Phase.generate] if failed else [Phase.generate, Phase.shrink]

    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        derandomize=number is None,
        phases=phases,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    @given(target.inputs())
    def each(value: Any) -> None:
        nonlocal refused
        try:
            refused += check(target, value, folder)
        except BaseException as error:
            if failed is None or isinstance(error, KeyboardInterrupt):
                raise
            failed(value)

    try:
        (each if number is None else seed(number)(each))()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return refused


def guided(target: Target, seconds: float) -> None:
    """Fuzzes with atheris, which ends the process."""
    folder = Path(tempfile.gettempdir()) / "folio-fuzz-guided"
    folder.mkdir(exist_ok=True)

    @settings(database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(target.inputs())
    def each(value: Any) -> None:
        check(target, value, folder)

    GUIDE.Setup([sys.argv[0], f"-max_total_time={seconds:.0f}"], each.hypothesis.fuzz_one_input)  # type: ignore[union-attr]
    GUIDE.Fuzz()  # type: ignore[union-attr]


def _kind() -> str:
    """The error that is being handled, and the last line of Folio's in its traceback."""
    kind, error, trace = sys.exc_info()
    frames = [f for f in traceback.extract_tb(trace) if "/folio/" in f.filename]
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
    return f"{kind.__name__ if kind else ''} at {place}: {str(error)[:100]}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Gives each reader random input.")
    parser.add_argument("targets", nargs="*", help=", ".join(TARGETS))
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--guided", action="store_true", help="by coverage, with atheris; for one TARGET")
    how = parser.parse_args()
    if not how.seconds > 0:
        parser.error(f"--seconds={how.seconds:g}: must be more than 0")
    if unknown := set(how.targets) - TARGETS.keys():
        parser.error(f"no target {', '.join(sorted(unknown))}: there are {', '.join(TARGETS)}")
    if how.guided and len(how.targets) != 1:
        parser.error("--guided needs one TARGET")
    if how.guided:
        guided(TARGETS[how.targets[0]], how.seconds)
    resource.setrlimit(resource.RLIMIT_AS, (12 << 30, resource.RLIM_INFINITY))
    end, number = time.monotonic() + how.seconds, how.seed
    tried, refused = Counter[str](), Counter[str]()
    failures: dict[str, tuple[int, str]] = {}
    names = how.targets or list(TARGETS)
    while time.monotonic() < end:
        for name in names:

            def failed(value: Any, name: str = name) -> None:
                kind = f"{name}: {_kind()}"
                shown = repr(value)
                before = failures.get(kind, (0, shown))
                failures[kind] = before[0] + 1, min(before[1], shown, key=len)
                if not before[0]:
                    print(f"{kind}\n    {shown[:1000]}\n{traceback.format_exc()}", flush=True)

            faulthandler.dump_traceback_later(120, exit=True)
            refused[name] += fuzz(TARGETS[name], _BATCH, number, failed)
            tried[name] += _BATCH
            faulthandler.cancel_dump_traceback_later()
            if time.monotonic() > end:
                break
        number += 1
    for name in names:
        print(f"{name:19} {tried[name]:9,} inputs, {refused[name]:9,} refused")
    print("\n".join(f"{count:6} × {kind}\n    {shown[:600]}" for kind, (count, shown) in sorted(failures.items())))
    print(f"{sum(tried.values()):,} inputs, {len(failures)} kinds of failure")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
