"""The time to nanoGPT's loss, and the loss after nanoGPT's time: nanoGPT, Folio's GPT-2 and its presets in turn.

    python benchmarks/time_to_loss.py --peer PATH_TO_A_NANOGPT_CHECKOUT --source tinyshakespeare.txt

Each round runs the CPU command of nanoGPT's README, the same command with Folio, and each preset: one after another, in
processes of their own, with a seed of the round. All saved models are scored by the same code: the whole validation
split, every token once, in rows of 64 tokens that begin 64 tokens apart, in float32.

The process is timed from its start to its end. The loop is timed between two lines that every program prints, right
before and right after it, so that it includes the evaluations and checkpoints that each program makes on its way. Where
a preset's loss is at or below TARGET, the whole run counts as the time to it. Ratios are computed within a round.

- ``--tune True``: the losses of each preset and of its neighbors, which have one hyper-parameter lower or higher. They
  train on the first nine tenths of the training split and are scored on its last tenth: the hyper-parameters are chosen
  by this, and the validation split is not even in the folder that the runs read.
- ``--ablate True``: the losses of each preset without one of its pieces, on the validation split, at the
  hyper-parameters of the preset. Of two presets that share a piece, the first is run without it.
- ``--plot FILE``: a picture of the validation loss over the seconds of training. Runs of their own evaluate often, so
  their clock is the sum of the times that each program prints for its iterations. nanoGPT's include its evaluations:
  an iteration that has one counts as the median iteration, in all programs.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # in place of this folder, whose tokenize.py would hide the standard library's
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import io
import re
import shutil
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.nanogpt_shakespeare import PRESET, SEED, SETTINGS, Result, characters, run_folio, run_nanogpt
from folio import cli
from folio.config.declare import option
from folio.config.options import TrainConfig
from folio.config.table import flat
from folio.records import plot

PRESETS = ("speedrun_shakespeare_cpu", "fastest_shakespeare_cpu", "best_shakespeare_cpu")
TARGET = 1.898  # nanoGPT's loss at the end of its command
WINDOW = 64  # tokens, the context of nanoGPT's command
NANOGPT, GPT2 = "nanoGPT", "Folio, GPT-2"
COMMAND = [PRESET, *SETTINGS["cpu"].split()]
TUNED = ("learning_rate", "adam_learning_rate", "weight_decay", "decay_share")
TUNED_DECAYS = ("momentum", "beta2", "ema_decay")  # whose distance to 1 matters
FACTORS = (0.7, 1.4)
ABLATIONS = (
    "--position=learned",
    "--norm=layernorm",
    "--activation=gelu",
    "--token_shift=0",
    "--qk_norm=False",
    "--tie_weights=True",
    "--zero_init=False",
    "--optimizer=adamw --adam_learning_rate=auto --learning_rate=0.004",
    "--schedule=cosine",
    "--schedule=linear",
    "--ema_decay=0",
    "--sampling=random",
    "--dtype=float32",
)
OFTEN = ["--eval_interval=20", "--eval_iters=20", "--log_interval=1"]  # evaluations for the picture


@dataclass(frozen=True)
class Options:
    """Measure the time to nanoGPT's loss, and the loss after its time."""

    peer: str = option("", "a checkout of nanoGPT; without it only the presets run")
    source: str = option("", "tiny Shakespeare; downloaded if not given")
    presets: str = option(",".join(PRESETS), "presets or config files, separated by commas")
    seeds: int = option(5, "rounds, each with another seed", min=1)
    tune: bool = option(False, "instead: the presets and their neighbors on a third split")
    ablate: bool = option(False, "instead: the presets without each of their pieces")
    plot: str = option("", "instead: draw loss against seconds into this file")

    @property
    def commands(self) -> dict[str, list[str]]:
        """The presets by name, as arguments of train.py."""
        names = self.presets.split(",")
        return {Path(n).stem: [str(Path(n).resolve()) if Path(n).is_file() else n] for n in names}


def main(options: Options) -> None:
    for argv in options.commands.values():
        _config(argv)  # raises what train.py would raise, but before the first run
    with tempfile.TemporaryDirectory() as folder:
        data = characters(Path(folder) / "data", options.source)
        if options.tune:
            _compare(options, {n: _neighbors(argv) for n, argv in options.commands.items()}, _third_split(data))
        elif options.ablate:
            _compare(options, _ablations(options.commands), data)
        elif options.plot:
            _draw(options, data)
        else:
            print(_table(_rounds(options, _programs(options), data)))


def _programs(options: Options) -> dict[str, list[str]]:
    """All programs by name, each with its arguments."""
    return ({NANOGPT: COMMAND, GPT2: COMMAND} if options.peer else {}) | options.commands


def _rounds(options: Options, programs: Mapping[str, list[str]], data: Path) -> dict[str, list[Result]]:
    """The results of each program, one of each round."""
    results: dict[str, list[Result]] = {name: [] for name in programs}
    for seed in range(SEED, SEED + options.seeds):
        for name, argv in programs.items():
            results[name].append(_run(options, name, argv, data, seed))
            print(f"seed {seed}: {name}: {results[name][-1]}", flush=True)
    return results


def _run(options: Options, name: str, argv: list[str], data: Path, seed: int) -> Result:
    with tempfile.TemporaryDirectory(dir=data.parent) as folder:
        out = Path(folder) / "out"
        if name == NANOGPT:
            return run_nanogpt(Path(options.peer), argv, data, out, seed, WINDOW)
        return run_folio(argv, data, out, seed, WINDOW)


def _table(results: Mapping[str, list[Result]]) -> str:
    """A Markdown table: medians over the rounds, with the worst of them in brackets."""
    peer = results.get(NANOGPT)
    rows = [
        "| | loop, s | process, s | loss | times as fast as nanoGPT: loop | process | "
        f"≤ {TARGET} in the median, in the worst | rounds with nanoGPT's loss in its time |"
    ]
    rows.append("|---" * 8 + "|")
    for name, found in results.items():
        loops, walls, losses = ([getattr(r, f) for r in found] for f in ("loop", "wall", "loss"))
        cells = [_with_worst(loops, ".1f"), _with_worst(walls, ".1f"), _with_worst(losses, ".4f")]
        below = [kind(losses) <= TARGET for kind in (statistics.median, max)]
        reached = ", ".join("yes" if each else "no" for each in below)
        if peer:
            faster = [(p.loop / r.loop, p.wall / r.wall) for p, r in zip(peer, found, strict=True)]
            cells += [f"{statistics.median(each):.1f} × ({min(each):.1f})" for each in zip(*faster, strict=True)]
            better = zip(faster, peer, found, strict=True)
            within = sum(loop >= 1 and wall >= 1 and r.loss <= p.loss for (loop, wall), p, r in better)
            cells += [reached, f"{within} of {len(found)}"]
        else:
            cells += ["–", "–", reached, "–"]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(["", *rows])


def _with_worst(values: Sequence[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({max(values):{form}})"


# Variants of the presets


def _third_split(data: Path) -> Path:
    """A folder with nine tenths of the training split for training, and its last tenth for validation."""
    folder = data.with_name("third")
    folder.mkdir()
    tokens = np.fromfile(data / "train.bin", dtype=np.uint16)
    cut = len(tokens) * 9 // 10
    tokens[:cut].tofile(folder / "train.bin")
    tokens[cut:].tofile(folder / "val.bin")
    shutil.copy(data / "meta.pkl", folder)
    return folder


def _config(argv: list[str]) -> TrainConfig:
    return cli.parse(TrainConfig, argv, "train.py", files=True)


def _neighbors(argv: list[str]) -> list[str]:
    """The flags that make one of the hyper-parameters that a preset sets lower or higher."""
    config = _config(argv)
    values = flat(config)
    tuned = [n for n in (*TUNED, *TUNED_DECAYS) if n in config.sources and isinstance(values[n], float) and values[n]]
    moved = [
        (name, 1 - (1 - values[name]) * factor if name in TUNED_DECAYS else values[name] * factor)
        for name in tuned
        for factor in FACTORS
    ]
    return [f"--{name}={value:.4g}" for name, value in moved if name != "decay_share" or value <= 1]


def _ablations(commands: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """For each preset the flags that take a piece off it, unless one did from an earlier preset."""
    found: dict[str, list[str]] = {}
    for name, argv in commands.items():
        values, done = flat(_config(argv)), {flags for earlier in found.values() for flags in earlier}
        found[name] = [f for f in ABLATIONS if f not in done and flat(_config([*argv, *f.split()])) != values]
    return found


def _compare(options: Options, variants: Mapping[str, list[str]], data: Path) -> None:
    """Prints a Markdown table for each preset: the mean loss as it is, and with each of these flags."""
    for name, argv in options.commands.items():
        programs = {name: argv} | {flags: [*argv, *flags.split()] for flags in variants[name]}
        results = _rounds(options, programs, data)
        rows = ["", "| | mean loss | difference | loop, s |", "|---|---|---|---|"]
        base = statistics.fmean(r.loss for r in results[name])
        for label, found in results.items():
            loss, loop = statistics.fmean(r.loss for r in found), statistics.median(r.loop for r in found)
            difference = "" if label == name else f"{loss - base:+.4f}"
            rows.append(f"| `{label}` | {loss:.4f} | {difference} | {loop:.1f} |")
        print("\n".join(rows), flush=True)


# The picture


def _curve(result: Result) -> tuple[list[float], list[float]]:
    """Seconds of training and validation losses of a run; those of the averaged weights, if it has them."""
    losses: dict[int, float] = {}
    for _, line in result.lines:
        if match := re.match(r"step (\d+): (?:train loss .*, val loss|ema/val_loss) ([\d.]+)", line):
            losses[int(match[1])] = float(match[2])
    times, seconds = result.milliseconds, [0.0]
    usual = statistics.median(times.values())
    for step in range(max(losses)):
        seconds.append(seconds[-1] + (usual if step in losses else times[step]) / 1000)
    steps = [step for step in losses if step]  # the axis is logarithmic
    return [seconds[step] for step in steps], [losses[step] for step in steps]


def _draw(options: Options, data: Path) -> None:
    programs = _programs(options)
    curves = {n: _curve(_run(options, n, [*argv, *OFTEN], data, SEED)) for n, argv in programs.items()}
    plot.write(Path(options.plot), _picture(curves, Path(options.plot).suffix[1:]))


def _picture(curves: Mapping[str, tuple[list[float], list[float]]], form: str) -> bytes:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    with matplotlib.rc_context(plot.SETTINGS):
        fig = Figure(figsize=(plot.WIDTH, 4), layout="constrained")
        ax = fig.subplots()
        ax.set(xscale="log", xlabel="seconds of training", ylabel="validation loss (nats per token)")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.grid(alpha=0.25)
        for (name, (seconds, losses)), look in zip(curves.items(), plot.line_styles(len(curves)), strict=True):
            ax.plot(seconds, losses, **look, **plot.BOLD, markevery=[-1])
            label = f"{name.removesuffix('_shakespeare_cpu')}\n{losses[-1]:.2f}, {seconds[-1]:.0f} s"
            how: dict[str, Any] = {"textcoords": "offset points", "color": look["color"]}
            # beside the end of nanoGPT's curve, below that of the others
            place, ha, va = ((8, 0), "left", "center") if name == NANOGPT else ((0, -7), "center", "top")
            ax.annotate(label, (seconds[-1], losses[-1]), place, ha=ha, va=va, **how)
        ax.set_xlim(right=2 * ax.get_xlim()[1])
        low, high = ax.get_ylim()
        ax.set_ylim(low - 0.15, min(3.0, high))  # all begin at 4.2
        drawn = io.BytesIO()
        fig.savefig(drawn, format=form, dpi=plot.DPI)
    return drawn.getvalue()


if __name__ == "__main__":
    main(cli.parse(Options, sys.argv[1:], "benchmarks/time_to_loss.py", files=False))
