"""Kills ``folio prepare`` and ``folio train`` at random moments, starts them again, and compares their results.

``make torture KILLS=1000 SEED=7``. Each round starts one of ``starts.RUNS`` again and again until it is finished. Its
files must then equal those of an undisturbed run. Some of the faults are errors of the disk. The program ends at the
first promise that does not hold, and prints the round's faults. ``make torture REPLAY="RUN: FAULT; FAULT + FAULT"``
repeats them: a semicolon separates processes, a plus separates faults of one process.
"""

from __future__ import annotations

import argparse
import random
import secrets
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from torture.faults import Chance, Fault
from torture.starts import RUNS, Disturbed, Ended, Server, arguments, results

from folio.checkpoints import checkpoint
from folio.records import run_folder

RATE, ERRORS = 1 / 40, 0.1  # faults per change of the file system; the share of them that are errors of the disk


class FailureError(Exception):
    """A promise that did not hold."""


class Torture:
    """Rounds of disturbed runs, and what happened in them."""

    def __init__(self, server: Server, seed: str) -> None:
        self.server, self.seed = server, seed
        self.kills, self.errors, self.starts, self.rounds = Counter[str](), 0, 0, 0
        self._undisturbed: dict[str, dict[str, Any]] = {}

    def undisturbed(self, name: str) -> dict[str, Any]:
        """The results of a run that nothing disturbs."""
        if name not in self._undisturbed:
            out = self.server.folder / "undisturbed" / name.replace(" ", "-")
            ended = self.server.start(*arguments(self.server, RUNS[name], out), ranks=RUNS[name].ranks)
            if any(ended.codes):
                raise FailureError(ended.said)
            self._undisturbed[name] = results(RUNS[name], out)
        return self._undisturbed[name]

    def round(self, name: str, kills: int, replay: list[str] | None = None) -> int:
        """Disturbs a run by at most ``kills`` kills, or by ``replay``, and compares; returns the number of kills."""
        run, out, met = RUNS[name], self.server.folder / "out", list[str]()
        expected = self.undisturbed(name)
        shutil.rmtree(out, ignore_errors=True)
        if run.first:
            assert self.server.start(*run.first, f"{run.folder}={out}").codes == [0]
        argv, done, step, left = arguments(self.server, run, out), 0, -1, list(replay or ())
        unsaved = False
        self.rounds += 1
        try:
            while True:
                how = self._next(run, done < kills, left if replay else None)
                ended = self.server.start(*argv, ranks=run.ranks, **how)
                self.starts += 1
                met.append(" + ".join(str(fault) for fault, _ in ended.faults))
                check_end(ended)
                unsaved |= "could not be saved" in ended.said
                self.errors += len(ended.faults) - ended.killed
                if ended.killed:
                    done += 1
                    self.kills[ended.faults[-1][1]] += 1
                if not any(ended.codes):
                    break
                step = check_folder(run, out, step)
            if replay and met[: len(replay)] != replay:
                raise FailureError(f"not all of these faults happened: {'; '.join(replay)}")
            found = results(run, out)
            if found.keys() != expected.keys():
                raise FailureError(f"{sorted(found)} are there, not {sorted(expected)}")
            for part, content in found.items():
                # without the checkpoint of the best evaluation, the best of the others counts
                if expected[part] != content and not (part == run_folder.BEST and unsaved):
                    raise FailureError(f"{part} is not that of an undisturbed run")
        except (FailureError, AssertionError, OSError, ValueError) as error:
            raise FailureError(f"{error}\nseed {self.seed}, {name}: {'; '.join(met)}") from error
        return done

    def _next(self, run: Disturbed, more: bool, left: list[str] | None) -> dict[str, Any]:
        """The faults of the next start."""
        if left is not None:
            return {"faults": [fault for fault in left.pop(0).split(" + ") if fault] if left else []}
        whom = ("", "-all", "-last") if run.ranks > 1 else ("",)
        chance = Chance(f"{self.seed}/{self.starts}", RATE, ERRORS, run.longest, whom)
        return {"chance": chance} if more else {}


def check_end(ended: Ended) -> None:
    """A process ends by a kill, with success, or with one line about the disk's error; never with a traceback."""
    if "Traceback" in ended.said:
        raise FailureError(ended.said)
    if not ended.killed and any(ended.codes) and not (ended.codes[0] == 2 and ended.faults):
        raise FailureError(f"exit codes {ended.codes}: {ended.said}")


def check_folder(run: Disturbed, out: Path, before: int) -> int:
    """All visible checkpoints are whole, and the newest is not older than step ``before``; returns its step."""
    steps = run_folder.steps(out)
    for step in steps:
        checkpoint.verify(run_folder.existing_folder(out, step))
    if max(steps, default=-1) < before:
        raise FailureError(f"the checkpoint of step {before} is gone: {steps}")
    return max(steps, default=-1)


def main() -> int:
    parser = argparse.ArgumentParser(prog="make torture")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", default="")
    parser.add_argument("--replay", default="", help="RUN: FAULT; FAULT + FAULT; …")
    options = parser.parse_args()
    name, _, faults = options.replay.partition(":")
    replay = [fault.strip() for fault in faults.split(";")]
    if options.kills < 1:
        parser.error(f"--kills={options.kills}: must be at least 1")
    if options.replay and name not in RUNS:
        parser.error(f"--replay={options.replay}: there is no run {name!r}: there are {', '.join(RUNS)}")
    try:
        for fault in " + ".join(filter(None, replay)).split(" + ") if options.replay else ():
            Fault.named(fault)
    except ValueError as error:
        parser.error(f"--replay={options.replay}: {error}")
    seed = options.seed or secrets.token_hex(3)
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="torture-") as folder, Server(Path(folder)) as server:
        torture = Torture(server, seed)
        try:
            if options.replay:
                torture.round(name, 0, replay)
            shares = [run.share for run in RUNS.values()]
            while not options.replay and (left := options.kills - torture.kills.total()) > 0:
                (name,) = chance.choices(list(RUNS), shares)
                print(f"{name}: {torture.round(name, left)} kills", flush=True)
        except KeyboardInterrupt:
            print(f"interrupted after {torture.kills.total():,} kills, seed {seed}")
            return 130
        except FailureError as failure:
            print(f"FAILED: {failure}")
            return 1
    where = ", ".join(f"{count:,} in {doing}" for doing, count in torture.kills.most_common())
    print(
        f"{torture.kills.total():,} kills ({where}) and {torture.errors:,} errors of the disk in {torture.rounds:,} "
        f"runs, seed {seed}: the weights, metrics and token files are those of undisturbed runs"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
