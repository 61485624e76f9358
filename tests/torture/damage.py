"""Damages files of runs and data sets at random: each damage is reported, and no damaged file is used.

python tests/torture/damage.py --damages=500 --seed=1
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    for folder in ("tests", "."):
        sys.path.insert(0, str(Path(__file__).resolve().parents[2] / folder))

import torch
from conftest import SMALL, STORY

from folio import cli
from folio.checkpoints import find
from folio.checkpoints.checkpoint import Checkpoint
from folio.commands import train as training
from folio.data.folders import open_folder
from folio.preparation.job import prepare
from folio.preparation.recipes import known, named_by_user
from folio.records import run_folder
from folio.records.run_folder import CHECKPOINTS, CONFIG
from folio.training.resume import find_former_run

Content = dict[str, bytes]


def flip(content: bytes, chance: random.Random) -> bytes:
    changed = bytearray(content)
    changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def cut(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(len(content))]


def blank(content: bytes, chance: random.Random) -> bytes:
    """A block of zeros, as after a loss of power."""
    at = chance.randrange(len(content))
    return (content[:at] + bytes(min(4096, len(content) - at)) + content[at + 4096 :])[: len(content)]


CHANGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "flip": flip,
    "cut": cut,
    "blank": blank,
    "empty": lambda content, chance: b"",
    "grow": lambda content, chance: content + chance.randbytes(chance.randrange(1, 64)),
}
KINDS = (*CHANGES, "delete", "swap", "foreign", "folder", "pipe", "link")


def _require(condition: bool, error: Exception) -> None:
    if not condition:
        raise AssertionError(f"the damaged file is not named: {error}") from error


def content_of(folder: Path) -> Content:
    """The files below a folder, by their names; without white space at the ends of JSON, which is no damage."""
    found = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    return {str(p.relative_to(folder)): raw.strip() if p.suffix == ".json" else raw for p, raw in found.items()}


def damage(folder: Path, other: Path, chance: random.Random) -> str:
    """Damages one file below a folder, and returns how. ``other`` is the same folder of another run or data set."""
    path = chance.choice([path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size])
    name, kind, times = path.relative_to(folder), chance.choice(KINDS), path.stat()
    match kind:
        case "delete":
            path.unlink()
        case "swap":
            others = [p for p in sorted(folder.rglob("*")) if p.is_file() and p != path]
            twin = chance.choice(others or [path])  # earlier damages may have left one file
            content = path.read_bytes(), twin.read_bytes()
            twin.write_bytes(content[0])
            path.write_bytes(content[1])
        case "foreign":
            shutil.copyfile(other / name, path)
        case "folder":
            path.unlink()
            path.mkdir()
        case "pipe":
            path.unlink()
            os.mkfifo(path)
        case "link":
            path.unlink()
            path.symlink_to("/dev/zero")
        case _:
            path.write_bytes(CHANGES[kind](path.read_bytes(), chance))
    if path.is_file() and chance.random() < 0.5:
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # a disk that rots leaves the times as they were
    return f"{kind} {name}"


def make_run(data: Path, out: Path, seed: int) -> Path:
    """A run of fifteen steps with three checkpoints."""
    argv = [
        *SMALL,
        f"--data_dir={data}",
        f"--out_dir={out}",
        f"--seed={seed}",
        "--max_iters=15",
        "--keep_checkpoints=3",
    ]
    training.main(cli.parse(training.Options, [*argv, "--checkpoint_interval=5"], "folio train", files=True))
    return out


class Runs:
    """A run, another one, and the tensors and the state of each checkpoint."""

    def __init__(self, room: Path) -> None:
        data = room / "run-data"
        prepare(known("shakespeare_char", data, str(STORY), {}), data)
        self.data = data
        self.good, self.other = (make_run(data, room / f"run-{seed}", seed) for seed in (1, 2))
        self.content = content_of(self.good)
        self.steps = run_folder.steps(self.good)
        assert self.steps == [5, 10, 15]
        self.checkpoints = {step: self._all(find.choose(self.good, str(step))) for step in self.steps}
        self.id = run_folder.read_config(self.good).run

    @staticmethod
    def _all(found: Checkpoint) -> tuple[dict[str, torch.Tensor], object]:
        tensors = {name: tensor.clone() for read in (found.weights, found.slots) for name, tensor in read()}
        return tensors, json.dumps(found.state, sort_keys=True)

    def check(self, out: Path) -> str:
        """What a reader does with a damaged run. Asserts that it uses no damaged file, and names the damage."""
        now = content_of(out)
        damaged = {name for name, content in self.content.items() if now.get(name) != content}
        steps = {int(Path(name).parts[1].removeprefix("step-")) for name in damaged if name.startswith(CHECKPOINTS)}
        whole = [step for step in self.steps if step not in steps]
        newer = [step for step in self.steps if step > max(whole, default=0)]
        found, lines = find.latest(out, self.id, aside=False)
        assert (found.step if found else 0) == max(whole, default=0)
        assert found is None or self._is_as_saved(found)
        named = [step for step in newer if run_folder.checkpoint_folder(out, step).is_dir()]
        assert len(lines) == len(named), lines
        assert all(any(f"step-{step:08d}" in line for line in lines) for step in named), lines
        try:
            assert self._is_as_saved(find.choose(out))
        except (ValueError, OSError) as error:
            _require(str(out) in str(error), error)
        try:
            former = find_former_run(out, "resume")
            assert former
            assert former.id == self.id or CONFIG in damaged
        except (ValueError, OSError) as error:
            _require(str(out) in str(error) and (CONFIG in damaged or not whole), error)
            return "refused"
        return "the previous one is used" if newer else "another file" if damaged else "harmless"

    def _is_as_saved(self, found: Checkpoint) -> bool:
        tensors, state = self.checkpoints[found.step]
        now, other = self._all(found)
        return state == other and now.keys() == tensors.keys() and all(torch.equal(now[n], tensors[n]) for n in now)


class DataSet:
    """A data set, and another one."""

    def __init__(self, room: Path, name: str, **how: object) -> None:
        text = room / "other.txt"
        text.write_text(STORY.read_text(encoding="utf-8").swapcase(), encoding="utf-8")
        self.good, self.other = room / f"{name}-good", room / f"{name}-other"
        for folder, source in ((self.good, STORY), (self.other, text)):
            prepare(named_by_user([str(source)], "story", tokenizer="bytes", **how), folder)  # type: ignore[arg-type]
        self.content = content_of(self.good)

    def check(self, data: Path) -> str:
        """What a reader does with a damaged data set. Asserts that it is refused by a damaged file or ``meta.json``."""
        now = content_of(data)
        damaged = [name for name, content in self.content.items() if now.get(name) != content]
        if not damaged:
            assert open_folder(data)
            return "harmless"
        try:
            open_folder(data)
        except (ValueError, OSError) as error:
            named = any(str(data / name) in str(error) for name in [*damaged, "meta.json"])
            _require(named or "meta.json" in damaged, error)
            return "refused"
        # without its meta file, it is a data set of other programs, whose ids are checked as they are read
        assert "meta.json" in damaged, damaged
        assert not (data / "meta.json").exists()
        return "another file"


def torture(room: Path, count: int, seed: int) -> Counter[str]:
    """Damages copies of runs and data sets ``count`` times; returns the number of each outcome."""
    kinds: list[Runs | DataSet] = [Runs(room), DataSet(room, "pair"), DataSet(room, "shards", shard_size=4000)]
    outcomes: Counter[str] = Counter()
    for number in range(count):
        chance = random.Random(f"{seed}/{number}")
        subject = kinds[number % 2 and 1 + number // 2 % 2]
        copy = room / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(subject.good, copy)
        done = [damage(copy, subject.other, chance) for _ in range(chance.choice([1, 1, 1, 2, 3]))]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                outcomes[f"{type(subject).__name__}: {subject.check(copy)}"] += 1
        except BaseException as error:
            error.add_note(f"damage {number} of seed {seed}: {', '.join(done)} in {copy}")
            raise
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description="Damages files of runs and data sets at random.")
    parser.add_argument("--damages", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    how = parser.parse_args()
    if how.damages < 1:
        parser.error(f"--damages={how.damages}: must be at least 1")
    with tempfile.TemporaryDirectory(prefix="folio-damage-") as room:
        outcomes = torture(Path(room), how.damages, how.seed)
    print(f"{how.damages} damages held: " + ", ".join(f"{n} {what}" for what, n in sorted(outcomes.items())))


if __name__ == "__main__":
    main()
