"""Figures from ``metrics.jsonl``: the losses and HellaSwag accuracies of runs, over steps and over tokens."""

from __future__ import annotations

import io
import itertools
import math
import warnings
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from folio import files
from folio.errors import UserError
from folio.records import run_folder
from folio.records.metrics import read_metrics
from folio.records.run_folder import METRICS

GPT2_LOSS = 3.2924  # nats per token of GPT-2 124M over FineWeb-Edu's validation shard (build-nanogpt, play.ipynb)
GPT2_HELLASWAG = {"completion": 0.2955, "harness": 0.3114}  # its acc_norm: build-nanogpt, lm-evaluation-harness
FORMATS = (".png", ".svg", ".pdf")
UNITS = {1e12: "trillions", 1e9: "billions", 1e6: "millions", 1e3: "thousands"}
SETTINGS: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "text.parse_math": False,  # a folder's name may hold $
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "folio",  # the same bytes again
}
EACH: dict[str, Any] = {"linewidth": 0.6, "alpha": 0.22, "zorder": 1}
SMOOTHED: dict[str, Any] = {"linewidth": 1.3, "alpha": 0.55, "marker": "", "zorder": 1.5}

_LARGEST = 1e18  # of what is measured: tokens, steps, losses

Records: TypeAlias = dict[str, list[dict[str, Any]]]  # by kind; empty for those that there are none of
Points: TypeAlias = NDArray[np.float64]  # (2, N): steps, values


class History(NamedTuple):
    """The measurements of a run; null, which stands for a number that is not finite, is left out."""

    name: str
    train: Points
    validation: Points
    hellaswag: dict[str, NDArray[np.float64]]  # style → (3, N): steps, acc_norm, its standard error
    tokens: Points  # that the model was trained on after so many steps
    fineweb: bool  # the data is FineWeb-Edu, as far as its name tells

    def along(self, steps: NDArray[np.float64], unit: float | None) -> NDArray[np.float64]:
        """The steps as positions on an axis of tokens in this unit; NaN if the run recorded no tokens.

        Without a unit the axis is in steps.
        """
        if unit is None:
            return steps
        return np.interp(steps, *self.tokens) / unit if self.tokens.size else np.full_like(steps, np.nan)

    @property
    def best(self) -> tuple[float, float]:
        """Step and loss of the best validation."""
        step, loss = self.validation[:, self.validation[1].argmin()].tolist()
        return step, loss


def read(out_dir: Path) -> Records:
    """The records of a run, by kind.

    Raises:
        FileNotFoundError: no run in ``out_dir``.
        ValueError: a run that has not begun.
    """
    path = out_dir / METRICS
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: train with --out_dir={out_dir} first")
    records: Records = defaultdict(list)
    found = sorted(read_metrics(path), key=lambda r: r["step"])
    # the later of two records of one step counts
    for record in {tuple(map(str, map(r.get, ("kind", "step", "style", "number")))): r for r in found}.values():
        records[record["kind"]].append(record)
    if not records:
        raise UserError(f"{path} holds nothing yet: let the run get to its first loss")
    return records


def asked(out_dir: Path) -> dict[str, Any]:
    """The options of a run; empty if its ``config.json`` cannot be read."""
    with suppress(ValueError, OSError):
        return run_folder.asked(out_dir).options
    return {}


def history(name: str, records: Records, options: dict[str, Any]) -> History:
    """Sorts the records of a run by what they measure."""
    hellaswag = {}
    scored = [
        r for r in records["hellaswag"] if isinstance(r.get("style"), str) and 0 <= figure(r.get("acc_norm")) <= 1
    ]
    for style in sorted({r["style"] for r in scored}):
        found = [r for r in scored if r["style"] == style]
        steps, accuracy, total = points(found, "step", "acc_norm", "total")
        hellaswag[style] = np.stack([steps, accuracy, np.sqrt(accuracy * (1 - accuracy) / np.maximum(total, 1))])
    updates = points(records["train"], "step", "tokens")
    updates[0] += 1  # a train line counts its own step's tokens
    seen = np.hstack([updates, points(records["eval"], "step", "tokens")])
    seen = seen[:, seen.min(axis=0) > 0]
    source = "" if options.get("data_mixture") else options.get("data_dir") or options.get("dataset") or ""
    return History(
        name,
        points(records["train"], "step", "loss"),
        points(records["eval"], "step", "val_loss"),
        hellaswag,
        np.unique(np.hstack([np.zeros((2, 1)), seen]), axis=1) if seen.size else seen,
        "fineweb" in "/".join(Path(source).parts[-2:]).lower(),  # data/fineweb_edu, edu_fineweb10B/*.npy
    )


def figure(value: Any) -> float:
    """The value as a number; NaN if it is none or out of range."""
    return float(value) if type(value) in (int, float) and abs(value) <= _LARGEST else math.nan


def points(records: list[dict[str, Any]], *keys: str) -> NDArray[np.float64]:
    """The values of these keys, (keys, N), from all records that have all of them."""
    columns = np.array([[figure(r.get(key)) for r in records] for key in keys], dtype=np.float64)
    return columns[:, np.isfinite(columns).all(axis=0)]


def smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean of all values (N,), each weighted by exp(−distance / horizon), with N / 100 as the horizon.

    It averages to both sides, so that the curve does not lag behind the evaluations; the weights of each mean sum
    to one, so that the ends are not pulled to zero.
    """
    decay = math.exp(-1 / max(1.0, len(values) / 100))

    def before(terms: NDArray[np.float64]) -> NDArray[np.float64]:
        sums = itertools.accumulate(terms.tolist(), lambda total, term: decay * total + term)
        return np.fromiter(sums, np.float64, len(terms))

    def around(terms: NDArray[np.float64]) -> NDArray[np.float64]:
        return before(terms) + before(terms[::-1])[::-1] - terms

    return around(values) / around(np.ones_like(values))


def thin(points: Points, bins: int = 1000) -> Points:
    """The first, last, lowest and highest of each bin: a line through these looks as one through all.

    M4 (Jugel et al., VLDB 2014).
    """
    if points.shape[1] <= 4 * bins:
        return points
    edges = np.linspace(0, points.shape[1], bins + 1).astype(int).tolist()
    values = points[1]
    kept = {
        i
        for a, b in itertools.pairwise(edges)
        for i in (a, a + int(values[a:b].argmin()), a + int(values[a:b].argmax()), b - 1)
    }
    return points[:, sorted(kept)]


def span(histories: Sequence[History]) -> tuple[float, float]:
    """Lowest and highest loss to show.

    The first twentieth of a run may stand out at the top, where it would take more than two thirds of the height; so
    may one train loss in a hundred.
    """
    shown, highest = [GPT2_LOSS] * any(h.fineweb for h in histories), -math.inf
    for h in histories:
        steps = h.train[0] if h.train.size else h.validation[0]
        begin = steps[len(steps) // 20] if steps.size else 0.0
        train, validation = (losses[at >= begin] for at, losses in (h.train, h.validation))
        shown += [train.min(), np.quantile(train, 0.99)] if train.size else []
        shown += validation.tolist()
        highest = max([highest, *shown, *h.train[1, :1], *h.validation[1, :1]])
    low, high = min(shown), max(shown)
    high = low + 2 * (high - low) if highest - low > 3 * (high - low) > 0 else highest
    margin = 0.04 * (high - low) or 0.1
    return float(low - margin), float(high + margin)


def draw(out_dirs: Sequence[Path], picture: Path) -> None:
    """Draws the losses of runs, and their HellaSwag accuracies where there are any; the suffix says the format.

    The axes are linear: half of the width is half of the work, and the effect of the last learning rates is visible.
    Tokens stand above the steps; where the runs differ in tokens per step, a second column is drawn over tokens.
    Runs differ in line, marker and lightness, and so in grayscale too.

    Raises:
        FileNotFoundError: no run in one of ``out_dirs``.
        ValueError: nothing to draw yet; an unknown format.
        OSError: the picture cannot be written.
    """
    if picture.suffix.lower() not in FORMATS:
        raise UserError(f"{picture}: its suffix must be {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")
    import matplotlib
    from matplotlib.figure import Figure

    folders = {path.resolve(): path for path in out_dirs}
    named = zip(names(list(folders)), folders.values(), strict=True)
    histories = [history(name, read(path), asked(path)) for name, path in named]
    for h, path in zip(histories, folders.values(), strict=True):
        if not (h.train.size or h.validation.size or any(p.size for p in h.hellaswag.values())):
            raise UserError(f"{path / METRICS} holds nothing to draw yet: let the run get to its first loss")

    with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # of a folder's name; a box stands there
        fig = Figure(layout="constrained")
        _panels(fig, histories)
        drawn = io.BytesIO()
        undated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(picture.suffix.lower())
        fig.savefig(drawn, format=picture.suffix[1:].lower(), dpi=150, metadata=undated)
    write(picture, drawn.getvalue())


def names(folders: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as tell them apart, in characters that can be shown."""
    depths = range(1, max(len(path.parts) for path in folders) + 1)
    ends = ([Path(*path.parts[-depth:]).as_posix() for path in folders] for depth in depths)
    apart = next(end for end in ends if len(set(end)) == len(folders))
    return ["".join(c if c.isprintable() else "\ufffd" for c in name) for name in apart]


def unit_of(histories: Sequence[History]) -> tuple[float, str]:
    """The unit for their tokens, and its name, "" for 1."""
    most = max((h.tokens[1].max() for h in histories if h.tokens.size), default=0.0)
    return next(((unit, word) for unit, word in UNITS.items() if most >= unit), (1.0, ""))


def write(path: Path, content: bytes) -> None:
    """Replaces a file, or leaves all as it was. Raises OSError that names it."""
    try:
        files.write(path, content)
    except OSError as error:
        raise files.UnwrittenError(path, error.strerror or str(error), "choose another with --output") from None


def _panels(fig: Any, histories: list[History]) -> None:
    """Loss above HellaSwag; steps, and where they need a column of their own, tokens."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    lines = looks(len(histories))
    losses = any(h.train.size or h.validation.size for h in histories)
    styles = sorted({style for h in histories for style, found in h.hellaswag.items() if found.size})
    rates = set(np.hstack([h.tokens[1, 1:] / h.tokens[0, 1:] for h in histories]).tolist())
    unit, word = unit_of(histories)
    tokens = f"tokens ({word})" if word else "tokens"
    rows, columns = losses + bool(styles), 1 + (len(rates) > 1)
    fig.set_size_inches(7 * columns, (4.2, 6.4)[rows - 1] + 0.2 * (len(histories) - 1))
    grid = fig.subplots(rows, columns, squeeze=False, sharex="col", sharey="row", height_ratios=[3, 2][:rows])

    for scale, axes in zip((None, unit), grid.T, strict=False):
        for h, look in zip(histories, lines, strict=True):
            if losses:
                _draw_losses(axes[0], h, scale, look)
            for steps, accuracy, error in h.hellaswag.values():
                every = max(1, len(steps) // 20)
                bars = {"yerr": error, "errorevery": every, "markevery": every, "elinewidth": 0.8}
                axes[-1].errorbar(h.along(steps, scale), accuracy, **bars, **look)
        for ax in axes:
            ax.grid(alpha=0.25)
            ax.margins(x=0.02)
            ax.xaxis.set_major_locator(MaxNLocator(7, integer=scale is None))
            ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}" if scale is None else "{x:g}"))
        axes[-1].set_xlabel("step" if scale is None else tokens)
    if losses:
        grid[0, 0].set(ylabel="loss (nats per token)", ylim=span(histories))
        if any(h.fineweb for h in histories):
            _reference(grid[0], GPT2_LOSS, "", "center")
    if styles:
        grid[-1, 0].set_ylabel("HellaSwag accuracy\n(acc_norm)")
        for style in (style for style in styles if style in GPT2_HELLASWAG):
            align = "top" if style == "completion" else "bottom"  # the lower of the two
            _reference(grid[-1], GPT2_HELLASWAG[style], f"{style} ", align)
    if len(rates) == 1:
        rate = rates.pop() / unit
        top = grid[0, 0].secondary_xaxis("top", functions=(lambda x: x * rate, lambda x: x / rate))
        top.set_xlabel(tokens)
    _explain(fig, grid[0, 0], histories, lines)


def looks(count: int) -> list[dict[str, Any]]:
    """Line styles that differ in grayscale too: the lightness of inferno rises evenly."""
    from matplotlib import colormaps

    look = {"linewidth": 1.3, "markersize": 4, "markerfacecolor": "white"}
    lines, markers = itertools.cycle(["-", "--", "-.", ":"]), itertools.cycle("os^Dv")
    colors = colormaps["inferno"](np.linspace(0, 0.72, count)).tolist()
    return [
        {"color": color, "linestyle": line, "marker": marker, **look}
        for color, line, marker in zip(colors, lines, markers, strict=False)
    ]


def _draw_losses(ax: Any, h: History, unit: float | None, look: dict[str, Any]) -> None:
    steps, losses = thin(h.train)
    ax.plot(h.along(steps, unit), losses, color=look["color"], **EACH)
    steps, losses = thin(np.stack([h.train[0], smooth(h.train[1])]))
    ax.plot(h.along(steps, unit), losses, **{**look, **SMOOTHED})
    steps, losses = h.validation
    ax.plot(h.along(steps, unit), losses, **look, markevery=max(1, len(steps) // 20))


def _explain(fig: Any, ax: Any, histories: list[History], lines: list[dict[str, Any]]) -> None:
    """The legend, below all data; the best validation of one run where it is, of several in the legend."""
    from matplotlib.lines import Line2D

    keys = [
        Line2D([], [], color="black", label="train, each step that was logged", **EACH),
        Line2D([], [], color="black", label="train, smoothed", **SMOOTHED),
    ] * any(h.train.size for h in histories)
    for h, look in zip(histories, lines, strict=True):
        step, best = h.best if h.validation.size else (0, math.nan)
        label = f"{h.name}: validation, best {best:.4f} at step {step:,.0f}" if h.validation.size else h.name
        if len(histories) == 1:
            fig.suptitle(h.name)
            label = "validation"
        if len(histories) == 1 and h.validation.size:
            pale = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1}
            ax.annotate(f"{best:.4f}", (step, best), (0, 7), textcoords="offset points", ha="center", bbox=pale)
        if len(histories) > 1 or h.validation.size:
            keys.append(Line2D([], [], label=label, **look))
    fig.legend(handles=keys, loc="outside lower center", frameon=False, ncols=3 if len(histories) == 1 else 1)


def _reference(axes: Any, value: float, what: str, align: str) -> None:
    """A dashed line across a row of panels; its label stands beside the last, where it covers nothing."""
    for ax in axes:
        ax.axhline(value, color="0.35", linestyle=(0, (5, 3)), linewidth=0.9)
    look = {"xycoords": ax.get_yaxis_transform(), "textcoords": "offset points", "annotation_clip": False}
    ax.annotate(f"GPT-2 124M\n{what}{value}", (1, value), (4, 0), va=align, fontsize=7.5, **look)
