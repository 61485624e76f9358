"""Plots of runs: their content, and plots of odd runs."""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SMALL, Outcome, assert_refused

from folio.records.history import COLORS, Records, history, names
from folio.records.plot import draw, line_styles
from folio.records.run_folder import METRICS

pytest.importorskip("matplotlib")

Folio = Callable[..., Outcome]
LOSS, HELLASWAG, TOKENS = "loss (nats per token)", "HellaSwag accuracy (acc_norm)", "tokens (thousands)"


def train(step: int, loss: float | None = None, rate: int = 100) -> dict[str, Any]:
    loss = 3 + 2 * math.exp(-step / 20) + 0.1 * math.sin(step) if loss is None else loss
    return {"kind": "train", "step": step, "loss": loss, "tokens": rate * (step + 1)}


def evaluation(step: int, loss: float | None, rate: int = 100) -> dict[str, Any]:
    return {"kind": "eval", "step": step, "train_loss": loss, "val_loss": loss, "tokens": rate * step}


def hellaswag(step: int, style: str = "completion") -> dict[str, Any]:
    return {"kind": "hellaswag", "step": step, "style": style, "acc": 0.25, "acc_norm": 0.26, "total": 10042}


def own(step: int, **values: Any) -> dict[str, Any]:
    """A record of a measurement that a user added."""
    return {"kind": "wte", "step": step, **values}


def usual(rate: int = 100) -> list[dict[str, Any]]:
    evaluations = [evaluation(step, 3 + 2 * math.exp(-step / 20), rate) for step in range(0, 101, 20)]
    return [*(train(step, rate=rate) for step in range(100)), *evaluations]


def run(out: Path, records: list[dict[str, Any]], end: str = "", **asked: str) -> Path:
    """The folder of a run with these records, and a config.json with these options if there are any."""
    out.mkdir(parents=True, exist_ok=True)
    (out / METRICS).write_text("".join(json.dumps(record) + "\n" for record in records) + end)
    if asked:
        (out / "config.json").write_text(json.dumps({"run": "0", "folio": "0", "asked": asked}))
    return out


def drawn(*outs: Path, **how: Any) -> str:
    """The plot of these runs as SVG, in which text stays text."""
    picture = outs[0] / "picture.svg"
    draw(outs, picture, **how)
    return picture.read_text()


def place(svg: str, text: str) -> tuple[float, float]:
    """The place of the only occurrence of this text, in points from the left and the top."""
    (found,) = re.findall(rf' x="([\d.]+)" y="([\d.]+)"[^>]*>{re.escape(text)}<', svg)
    return float(found[0]), float(found[1])


def lines(svg: str, color: str, width: float) -> list[list[tuple[float, float]]]:
    """The points of each line of this color and width, in points from the left and the top."""
    found = re.findall(
        rf'<path d="([^"]*)" clip-path[^>]*stroke: {color.lower()};[^"]*stroke-width: {width:g}[;"]', svg
    )
    paths = [[(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path)] for path in found]
    return [path for path in paths if len(path) > 1]


def size(svg: str) -> tuple[float, float]:
    """Width and height in points."""
    ((width, height),) = re.findall(r'viewBox="0 0 (\S+) (\S+)"', svg)
    return float(width), float(height)


def darkest(picture: Path) -> int:
    from PIL import Image

    with Image.open(picture) as image:
        return int(image.convert("L").getextrema()[0])


def test_a_real_run_is_drawn(folio: Folio, story: Path, tmp_path: Path) -> None:
    out = tmp_path / "a run"
    assert folio("train", *SMALL, f"--data_dir={story}", f"--out_dir={out}").code == 0
    outcome = folio("plot", str(out))
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out == f"wrote {out / 'loss.png'}\n"
    assert darkest(out / "loss.png") < 50
    svg = drawn(out)
    best = json.loads((out / "best.json").read_text())["loss"]
    for text in (LOSS, ">step<", "train, smoothed", ">validation<", ">a run<", f">{best:.4f}<"):
        assert text in svg
    assert "GPT-2" not in svg
    assert HELLASWAG not in svg


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf", ".PNG"])
def test_every_format_has_the_same_bytes_again(
    folio: Folio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    out = run(tmp_path / "run", usual())
    before = None
    for now in ("1000000000", "2000000000"):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", now)  # matplotlib's clock
        picture = tmp_path / "new" / f"figure{suffix}"
        assert folio("plot", str(out), "-o", str(picture)).code == 0
        assert before in (None, picture.read_bytes())
        before = picture.read_bytes()
    assert [path.name for path in (tmp_path / "new").iterdir()] == [f"figure{suffix}"]


@pytest.mark.parametrize(
    ("asked", "there"),
    [
        ({"dataset": "fineweb_edu", "data_dir": ""}, True),
        ({"dataset": "openwebtext", "data_dir": "data/edu_fineweb10B/*.npy"}, True),
        ({"dataset": "fineweb_edu", "data_dir": "data/story"}, False),
        ({"dataset": "fineweb_edu", "data_mixture": "fineweb_edu=0.5,story=0.5"}, False),
        ({"dataset": "story", "data_dir": "fineweb/trials/story"}, False),
        ({}, False),
    ],
)
def test_gpt2s_loss_is_drawn_for_fineweb_edu_only(tmp_path: Path, asked: dict[str, str], there: bool) -> None:
    """Where it is within reach of the curves."""
    svg = drawn(run(tmp_path / "run", usual(), **asked))
    assert ("3.2924" in svg) == there
    assert ("GPT-2 124M" in svg) == there


def test_gpt2s_loss_out_of_reach_is_not_drawn(tmp_path: Path) -> None:
    far = [train(step, 9 - step / 100) for step in range(100)]
    assert "GPT-2" not in drawn(run(tmp_path / "run", far, dataset="fineweb_edu"))


@pytest.mark.parametrize(
    ("styles", "score", "values"),
    [
        (["completion"], 0.29, {"completion: 0.2955"}),
        (["harness"], 0.31, {"harness: 0.3114"}),
        (["completion", "harness"], 0.3, {"completion: 0.2955", "harness: 0.3114"}),
        (["another"], 0.3, set()),
        (["completion"], 0.2, set()),
    ],
)
def test_gpt2s_hellaswag_accuracy_is_that_of_the_same_style(
    tmp_path: Path, styles: list[str], score: float, values: set[str]
) -> None:
    """Where it is within reach of the curves. Two styles of a run have labels."""
    scored = [{**hellaswag(step, style), "acc_norm": score + step / 5000} for style in styles for step in (0, 50, 100)]
    svg = drawn(run(tmp_path / "run", [*usual(), *scored]))
    assert HELLASWAG in svg
    assert {value for value in ("completion: 0.2955", "harness: 0.3114") if value in svg} == values
    assert (">harness<" in svg) == (len(styles) == 2)


def test_accuracies_have_their_standard_errors(tmp_path: Path) -> None:
    svg = drawn(run(tmp_path / "run", [hellaswag(0), hellaswag(100)]))
    bars = re.findall(rf'd="M (\S+) (\S+) \nL (\S+) (\S+) \n" clip-path[^>]*stroke: {COLORS[0].lower()}', svg)
    heights = [float(y) - float(v) for x, y, u, v in bars if x == u]
    assert len(heights) == 2
    assert min(heights) > 20


def test_several_runs_have_different_names(tmp_path: Path) -> None:
    """Also with $ and underscores, which matplotlib treats specially by default."""
    outs = [run(tmp_path / name, usual()) for name in ("a/out", "b/out", "_c", "$d_{$")]
    svg = drawn(*outs, outs[0])
    last = tmp_path.name
    for name in ("a/out", "b/out", f"{last}/_c", f"{last}/$d_{{$"):
        assert all(f">{line}<" in svg for line in textwrap.wrap(f"{name} 3.0135", 22))
    assert names([Path("/x/out")]) == ["out"]


def test_each_run_has_its_color_and_a_label_of_it_at_the_end_of_its_curve(tmp_path: Path) -> None:
    """The label gives the best validation loss, is right of the curve and near its height."""
    svg = drawn(*(run(tmp_path / name, usual()[: n + 1] + usual()[100:]) for name, n in (("a", 99), ("b", 99))))
    for name, color in zip("ab", COLORS, strict=False):
        assert re.search(rf"fill: {color.lower()}[^>]*>{name} 3.0135<", svg)
        ((*_, end),) = lines(svg, color, 2)
        x, y = place(svg, f"{name} 3.0135")
        assert end[0] < x < end[0] + 15
        assert abs(end[1] - y) < 20
        assert len(lines(svg, color, 0.9)) == 1  # train is thin


@pytest.mark.parametrize("count", [2, 8, 20])
def test_labels_of_runs_that_end_alike_are_apart_and_in_the_picture(tmp_path: Path, count: int) -> None:
    svg = drawn(*(run(tmp_path / f"run{i}", usual()) for i in range(count)))
    places = [place(svg, f"run{i} 3.0135") for i in range(count)]
    width, height = size(svg)
    heights = sorted(y for _, y in places)
    assert min(np.diff(heights)) >= 9  # points, the size of the letters
    assert 9 < heights[0] < heights[-1] < height
    assert max(x for x, _ in places) < width - 60


def test_no_line_joins_the_untrained_evaluation_to_the_next(tmp_path: Path) -> None:
    """It is a mark in the frame, or a note at its edge."""
    svg = drawn(run(tmp_path / "near", usual()))
    (bold,) = lines(svg, COLORS[0], 2)
    thin = lines(svg, COLORS[0], 0.9)[0]
    assert len(bold) == 5
    assert bold[0][0] > thin[0][0] + 20
    assert "step 0" not in svg
    high = [train(0, 11.0), *usual()[1:100], evaluation(0, 10.98), *usual()[101:]]
    svg = drawn(run(tmp_path / "far", high))
    assert ">↑ validation at step 0: 10.98<" in svg
    assert lines(svg, COLORS[0], 2)[0][0][0] > thin[0][0] + 20
    assert ">↑ validation at step 0: 10.98<" in drawn(tmp_path / "far", run(tmp_path / "short", usual()[:9]))


def test_the_axis_counts_steps_tokens_or_time(folio: Folio, tmp_path: Path) -> None:
    """Runs whose steps have other tokens end at other places."""
    timed = [{**record, "seconds": 60.0 * record["step"] + 60} for record in usual()]
    outs = [run(tmp_path / "a", timed), run(tmp_path / "b", [{**r, "tokens": r["tokens"] // 2} for r in timed])]
    for x, label, ends in (("step", "step", 1), ("tokens", TOKENS, 2), ("time", "time (minutes)", 1)):
        picture = tmp_path / f"{x}.svg"
        assert folio("plot", *map(str, outs), f"--x={x}", "-o", str(picture)).code == 0
        svg = picture.read_text()
        assert f">{label}<" in svg
        assert len({lines(svg, color, 2)[0][-1][0] for color in COLORS[:2]}) == ends


def test_a_logarithmic_axis_says_that_it_lacks_step_0(folio: Folio, tmp_path: Path) -> None:
    out, picture = run(tmp_path / "run", usual()), tmp_path / "log.svg"
    assert folio("plot", str(out), "--log", "-o", str(picture)).code == 0
    svg = picture.read_text()
    assert ">← validation at step 0: 5.00<" in svg
    assert ">50<" in svg
    assert ">0<" not in svg
    (bold,) = lines(svg, COLORS[0], 2)
    gaps = np.diff([x for x, _ in bold])  # of the steps 20, 40, 60, 80, 100
    np.testing.assert_allclose(gaps / gaps[0], np.diff(np.log([20, 40, 60, 80, 100])) / np.log(2), rtol=1e-3)


def test_smoothing_has_a_horizon_or_is_off(tmp_path: Path) -> None:
    out = run(tmp_path / "run", usual())
    roughness = {}
    for smoothing in (0.1, 0.01, 0):
        svg = drawn(out, smoothing=smoothing)
        assert ("train, smoothed" in svg) == (smoothing > 0)
        roughness[smoothing] = np.abs(np.diff([y for _, y in lines(svg, COLORS[0], 0.9)[0]], 2)[20:]).sum()
    assert roughness[0.1] < roughness[0.01] / 3 < roughness[0] / 3


@pytest.mark.parametrize(
    ("records", "option", "words"),
    [
        ([{**train(step), "tokens": None} for step in range(9)], "--x=tokens", "does not say the tokens of any step"),
        (usual(), "--x=time", "does not say the seconds of any step"),
        ([train(0), evaluation(0, 4.0)], "--log", "has only step 0"),
    ],
)
def test_an_axis_that_a_run_does_not_have_is_refused(
    folio: Folio, tmp_path: Path, records: list[dict[str, Any]], option: str, words: str
) -> None:
    out = run(tmp_path / "run", records)
    assert_refused(folio("plot", str(out), option), out / METRICS, words)
    assert not (out / "loss.png").exists()


def test_a_comparison_leaves_the_pictures_of_its_runs(
    folio: Folio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is compare.png in the working folder. A folder named twice is one run."""
    monkeypatch.chdir(tmp_path)
    outs = [run(Path(name), usual()) for name in ("a", "b")]
    assert folio("plot", "a", "a/").out == f"wrote {Path('a/loss.png')}\n"
    (outs[1] / "loss.png").write_bytes(b"own")
    before = [(out / "loss.png").read_bytes() for out in outs]
    assert folio("plot", "a", "b").out == "wrote compare.png\n"
    assert [(out / "loss.png").read_bytes() for out in outs] == before
    assert darkest(tmp_path / "compare.png") < 100


@pytest.mark.parametrize("log", [False, True])
def test_a_run_of_evaluations_alone_has_its_label_beside_another_run(tmp_path: Path, log: bool) -> None:
    only = run(tmp_path / "only", [evaluation(step, 3.0) for step in (0, 20)])
    begun = run(tmp_path / "begun", [train(0), evaluation(0, 4.0), evaluation(20, 2.5)])
    picture = drawn(only, begun, log=log)
    assert "only 3.0000" in picture
    assert "begun 2.5000" in picture


def test_looks_differ() -> None:
    found = line_styles(7)
    assert [look["color"] for look in found] == list(COLORS)
    assert {look["linestyle"] for look in found} == {"-"}
    assert len({(look["color"], look["linestyle"], look["marker"]) for look in line_styles(28)}) == 28


@pytest.mark.parametrize(
    ("records", "end", "shown", "absent"),
    [
        pytest.param(
            [train(step) for step in range(9)], "", [f">{LOSS}<", "train, smoothed"], ["validation"], id="no-eval"
        ),
        pytest.param([evaluation(0, 4.0), evaluation(5, 3.0)], "", [LOSS, ">3.0000<"], ["smoothed"], id="no-train"),
        pytest.param(
            [train(0), {**train(1), "loss": None}, evaluation(2, None)],
            "",
            [f">{LOSS}, without 2 that are not finite<"],
            [">valid"],
            id="null",
        ),
        pytest.param(usual(), '{"kind": "eval", "step": 200, "val_l', [LOSS, "3.0135"], [], id="cut"),
        pytest.param([evaluation(0, 4.0)], "", [LOSS, ">4.0000<", ">0<"], ["tokens"], id="one-evaluation"),
        pytest.param([train(0)], "", [LOSS], ["validation"], id="one-step"),
        pytest.param([hellaswag(100)], "", [HELLASWAG, ">step<"], [LOSS, "tokens"], id="hellaswag-alone"),
        pytest.param([own(9, norm=1.5)], "", [">wte/norm<", ">step<"], [LOSS, "tokens"], id="own-alone"),
        pytest.param([*usual(), own(9, norm=None, note="a", ok=True)], "", [LOSS], ["wte"], id="own-no-number"),
        pytest.param([*usual(), {**hellaswag(9), "acc_norm": None}], "", [LOSS], [HELLASWAG], id="no-accuracy"),
    ],
)
def test_odd_runs_are_drawn(
    folio: Folio, tmp_path: Path, records: list[dict[str, Any]], end: str, shown: list[str], absent: list[str]
) -> None:
    out = run(tmp_path / "run", records, end)
    outcome = folio("plot", str(out))
    assert (outcome.code, outcome.err) == (0, "")
    assert darkest(out / "loss.png") < 50
    svg = drawn(out)
    assert [text for text in shown if text not in svg] == []
    assert [text for text in absent if text in svg] == []


def test_a_measurement_of_ones_own_has_a_panel_for_each_number(tmp_path: Path) -> None:
    """Below loss and HellaSwag, in the order of the file; a run without it has no curve there."""
    other = run(tmp_path / "other", [*usual(), hellaswag(50)])
    records = [own(step, norm=12 + step / 100, **{"angle\x1b": 0.5}) for step in (0, 50, 100)]
    svg = drawn(run(tmp_path / "run", [*usual(), hellaswag(50), *records]), other)
    labels = [f">{label}<" for label in (LOSS, HELLASWAG, "wte/norm", "wte/angle\ufffd")]
    assert sorted(labels, key=svg.index) == labels
    alone = drawn(other)
    assert "wte" not in alone
    assert svg.count("clip-path") > alone.count("clip-path")


def test_too_many_measurements_are_named(tmp_path: Path) -> None:
    out = run(tmp_path / "run", [own(0, **{f"n{i}": i for i in range(34)})])
    with pytest.warns(UserWarning, match=r"^only 32 measurements are drawn: left out are wte/n32, wte/n33$"):
        svg = drawn(out)
    assert svg.count(">wte/n") == 32


ODD = [10**40, -(10**4000), -5, True, "3.0", [1], {"a": [1]}, None, 1e18, -1e300, "", "<b>\x1b[2J"]


def oddly(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The record with each value except kind and step missing, and replaced by every odd value."""
    names = [name for name in record if name not in ("kind", "step")]
    odd = [{**record, name: value} for name in names for value in ODD]
    return odd + [{k: v for k, v in record.items() if k != name} for name in names]


@pytest.mark.parametrize("record", [train(5), evaluation(5, 3.0), hellaswag(5)], ids=lambda r: r["kind"])
def test_odd_values_are_ignored(tmp_path: Path, record: dict[str, Any]) -> None:
    """The valid records are drawn unchanged, and every value that is drawn is finite."""
    right = [*usual(), hellaswag(40)]
    odd = [r for r in oddly({**record, "step": 40}) if r.get("style") in ("completion", None, True, 1e18)]
    assert drawn(run(tmp_path / "odd" / "run", [*odd, *right])) == drawn(run(tmp_path / "right" / "run", right))
    for odd_one in oddly(record):
        h = history("", Records({kind: [odd_one] for kind in ("train", "eval", "hellaswag")}), {})
        assert all(np.isfinite(found).all() for found in (h.train, h.validation, h.tokens, *h.hellaswag.values()))
    drawn(run(tmp_path / "all", [*(r | {"step": i} for i, r in enumerate(oddly(record))), *usual()]))


def test_repeated_and_unordered_lines_make_one_curve(tmp_path: Path) -> None:
    """Of two records of one step the later counts, as after two writers, or edits by hand."""
    right = drawn(run(tmp_path / "a" / "run", usual()))
    wrong = [{**r, "loss": 9.0, "val_loss": 9.0} for r in usual()[::7]]
    assert drawn(run(tmp_path / "b" / "run", [*wrong, *reversed(usual())])) == right


def test_damaged_lines_are_reported_and_ignored(folio: Folio, tmp_path: Path) -> None:
    """plot and report warn once each; one of the lines is nested a hundred thousand deep."""
    out = run(tmp_path / "run", usual())
    right = drawn(out)
    lines = (out / METRICS).read_bytes().splitlines(keepends=True)
    bad = (b"\0\0\0\n", b'{"kind": "train", "step": ' + b"[" * 100_000 + b"\n", b'{"kind": "train", "step": 1e999}\n')
    (out / METRICS).write_bytes(b"".join([*lines[:3], *bad, *lines[3:]]))
    for command in ("plot", "report"):
        with pytest.warns(UserWarning, match=r"jsonl: 3 lines \(4, 5, 6\) are damaged, and ignored$") as told:
            assert folio(command, str(out)).code == 0
        assert len(told) == 1
    with pytest.warns(UserWarning, match="3 lines"):
        assert drawn(out) == right


@pytest.mark.parametrize("name", ["a\x1b[2Jb", "a\nb", "日本語", "caf\udce9"])
def test_names_with_characters_that_a_font_or_terminal_lacks(folio: Folio, tmp_path: Path, name: str) -> None:
    """They are drawn without a warning about the font."""
    out = run(tmp_path / name, usual())
    svg = drawn(out)
    assert "\x1b" not in svg
    assert ">a\ufffd[2Jb<" in svg or "[2J" not in name
    draw([out], tmp_path / "picture.png")


@pytest.mark.parametrize(
    ("records", "words"),
    [
        (None, "is missing: train with"),
        ([], "holds nothing"),
        ([{"kind": "start", "step": 0}], "holds nothing to draw"),
    ],
)
def test_nothing_to_draw_is_refused(
    folio: Folio, tmp_path: Path, records: list[dict[str, Any]] | None, words: str
) -> None:
    full, out = run(tmp_path / "full", usual()), tmp_path / "run"
    if records is not None:
        run(out, records)
    before = sorted(tmp_path.rglob("*"))
    assert_refused(folio("plot", str(full), str(out)), out / METRICS, words)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("figure.xyz", "its suffix must be .png, .svg or .pdf"),
        ("figure", "its suffix must be"),
        ("folder.png", "could not be written"),
        ("run/metrics.jsonl/figure.png", "could not be written"),
    ],
)
def test_a_picture_that_cannot_be_written_is_refused(folio: Folio, tmp_path: Path, name: str, words: str) -> None:
    out = run(tmp_path / "run", usual())
    (tmp_path / "folder.png").mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert_refused(folio("plot", str(out), f"--output={tmp_path / name}"), tmp_path / name, words)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("steps", [20_000, pytest.param(600_000, marks=pytest.mark.slow)])
def test_a_long_run_is_a_small_picture(tmp_path: Path, steps: int) -> None:
    noise = np.random.default_rng(0).normal(size=steps).tolist()
    out = run(tmp_path / "run", [train(step, 3 + 0.1 * noise[step]) for step in range(steps)])
    assert len(drawn(out)) < 150_000
