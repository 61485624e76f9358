"""Plots of runs: their content, and plots of odd runs."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SMALL, Outcome, assert_refused

from folio.records.history import Records, history, names
from folio.records.plot import draw, line_styles
from folio.records.run_folder import METRICS

pytest.importorskip("matplotlib")

Folio = Callable[..., Outcome]
LOSS, HELLASWAG, TOKENS = "loss (nats per token)", "HellaSwag accuracy", "tokens (thousands)"


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


def drawn(*outs: Path) -> str:
    """The plot of these runs as SVG, in which text stays text."""
    picture = outs[0] / "picture.svg"
    draw(outs, picture)
    return picture.read_text()


def height(svg: str, text: str) -> float:
    """The distance from the top of the only occurrence of this text."""
    (found,) = re.findall(rf' y="([\d.]+)"[^>]*>{re.escape(text)}<', svg)
    return float(found)


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
    for text in (LOSS, ">step<", TOKENS, "train, smoothed", ">validation<", ">a run<", f">{best:.4f}<"):
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
    svg = drawn(run(tmp_path / "run", usual(), **asked))
    assert ("3.2924" in svg) == there
    assert ("GPT-2 124M" in svg) == there


@pytest.mark.parametrize(
    ("styles", "values"),
    [
        (["completion"], {"completion 0.2955"}),
        (["harness"], {"harness 0.3114"}),
        (["completion", "harness"], {"completion 0.2955", "harness 0.3114"}),
        (["another"], set()),
    ],
)
def test_gpt2s_hellaswag_accuracy_is_that_of_the_same_style(
    tmp_path: Path, styles: list[str], values: set[str]
) -> None:
    scored = [hellaswag(step, style) for style in styles for step in (0, 50, 100)]
    svg = drawn(run(tmp_path / "run", [*usual(), *scored]))
    assert HELLASWAG in svg
    assert {value for value in ("completion 0.2955", "harness 0.3114") if value in svg} == values


def test_several_runs_have_different_names(tmp_path: Path) -> None:
    """Also with $ and underscores, which matplotlib treats specially by default."""
    outs = [run(tmp_path / name, usual()) for name in ("a/out", "b/out", "_c", "$d_{$")]
    svg = drawn(*outs, outs[0])
    last = tmp_path.name
    for name in ("a/out", "b/out", f"{last}/_c", f"{last}/$d_{{$"):
        assert svg.count(f">{name}: validation, best 3.0135 at step 100<") == 1
    assert names([Path("/x/out")]) == ["out"]


def test_tokens_have_an_axis_at_the_top_or_their_own_column(tmp_path: Path) -> None:
    one, same, other = (run(tmp_path / f"run{i}", usual(rate)) for i, rate in enumerate((100, 100, 50)))
    changed = run(tmp_path / "changed", [*usual(), train(100), {**train(101), "tokens": 10_300}])
    silent = run(tmp_path / "silent", [{**train(step), "tokens": None} for step in range(9)])
    for outs in ([one], [one, same]):
        svg = drawn(*outs)
        assert height(svg, TOKENS) < height(svg, "step") / 4
    for outs in ([one, other], [changed], [other, one, silent]):
        svg = drawn(*outs)
        assert height(svg, TOKENS) == pytest.approx(height(svg, "step"), abs=1)
    assert "tokens" not in drawn(silent)


def test_runs_differ_in_grayscale() -> None:
    found = line_styles(6)
    lightness = [np.dot(look["color"][:3], [0.299, 0.587, 0.114]) for look in found]
    assert min(np.diff(lightness)) > 0.05
    assert lightness[-1] < 0.65
    assert len({(look["linestyle"], look["marker"]) for look in line_styles(20)}) == 20


@pytest.mark.parametrize(
    ("records", "end", "shown", "absent"),
    [
        pytest.param([train(step) for step in range(9)], "", [LOSS, "train, smoothed"], ["validation"], id="no-eval"),
        pytest.param([evaluation(0, 4.0), evaluation(5, 3.0)], "", [LOSS, ">3.0000<"], ["smoothed"], id="no-train"),
        pytest.param([train(0), {**train(1), "loss": None}, evaluation(2, None)], "", [LOSS], [">valid"], id="null"),
        pytest.param(usual(), '{"kind": "eval", "step": 200, "val_l', [LOSS, "3.0135"], [], id="cut"),
        pytest.param([evaluation(0, 4.0)], "", [LOSS, ">4.0000<"], ["tokens"], id="one-evaluation"),
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
    labels = [f">{label}<" for label in (LOSS, "(acc_norm)", "wte/norm", "wte/angle\ufffd")]
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
