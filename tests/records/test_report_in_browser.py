"""The report in a browser: it needs no network, shows hostile text as text, and its switches work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_plot import hellaswag, own, run, train, usual

from folio.records.report import report

EVIL = "</script></pre></td><script>window.evil = 1</script><img src=x onerror='window.evil = 1'>"
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium on this machine")
    with pytest.importorskip("playwright.sync_api").sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=path, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser: Any) -> Iterator[Open]:
    """Opens a page without a network; afterwards it must have loaded nothing else and reported no error."""
    contexts, errors, requests, files = [], [], [], []

    def open_page(file: Path, width: int = 1200, scheme: str = "light") -> Any:
        context = browser.new_context(offline=True, color_scheme=scheme, viewport={"width": width, "height": 1200})
        page = context.new_page()
        page.on("console", lambda message: errors.append(message.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        contexts.append(context)
        files.append(file.as_uri())
        page.goto(file.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert errors == []
    assert requests == files


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The reports of one run, and of two, with HTML in every text that they can contain."""
    folder = tmp_path_factory.mktemp("runs")
    outs = [folder / name for name in ("<img src=x onerror=evil=1>", "<script>evil=1")]
    for out in outs:
        scored = [hellaswag(step, style) for step in (0, 50, 100) for style in ("completion", EVIL)]
        start = {"kind": "start", "step": 0, "dataset": EVIL, "hardware": EVIL, "device": "cuda", EVIL: EVIL}
        records = [start, *usual(), *scored, own(9, **{EVIL: 1.5}), {"kind": EVIL, "step": 9, EVIL: 2.5}]
        records += [{"kind": "sample", "step": step, "number": 0, "text": EVIL + "word " * 99} for step in (50, 100)]
        run(out, records, dataset="fineweb_edu", data_dir=EVIL, **{EVIL: EVIL})
        task = {"kind": "lm_eval", "step": 9, "tasks": {EVIL: {EVIL: 1.5}}}
        (out / "evaluations.jsonl").write_text(json.dumps(task) + "\n")
    pages = {count: folder / f"{count}.html" for count in (1, 2)}
    for count, page in pages.items():
        report(outs[:count], page)
    return pages


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of two runs, of which one has half the tokens per step and recorded no seconds."""
    folder = tmp_path_factory.mktemp("plain")
    timed = [{**record, "seconds": 36.0 * (1 + record["step"])} for record in usual()]
    outs = [run(folder / "timed", timed), run(folder / "old", usual(rate=50))]
    report(outs, folder / "compare.html")
    return folder / "compare.html"


def hover(page: Any, share: float) -> dict[str, str]:
    """Moves the mouse to this share of the first panel's width; the values that its legend then shows, by name."""
    page.evaluate("document.querySelector('.panels').scrollIntoView()")
    panel = page.locator(".u-over").first.bounding_box()
    page.mouse.move(panel["x"] + panel["width"] * share, panel["y"] + panel["height"] / 2)
    page.wait_for_function("document.querySelector('.u-series .u-value').textContent")
    x, *rows = page.locator(".panel").first.locator(".u-series:not(.aside)").all()
    named = {row.locator("th").text_content(): row.locator(".u-value").text_content() for row in rows}
    return {"x": x.locator(".u-value").text_content(), **named}


@pytest.mark.parametrize(("count", "width", "scheme"), [(1, 1200, "light"), (1, 390, "dark"), (2, 390, "light")])
def test_hostile_text_is_shown_as_text(
    opened: Open, hostile: dict[int, Path], count: int, width: int, scheme: str
) -> None:
    page = opened(hostile[count], width, scheme)
    assert page.locator(".u-over").count() >= 3
    assert page.locator("body").inner_text().count("<script>window.evil = 1</script>") >= 10
    assert page.evaluate("[window.evil, document.querySelector('img')]") == [None, None]
    colors = "e => [getComputedStyle(e).color, getComputedStyle(e).backgroundColor].map(c => parseInt(c.slice(4)))"
    ink, paper = page.locator("body").evaluate(colors)
    assert (ink > 200 > 50 > paper) if scheme == "dark" else (ink < 50 < 200 < paper)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_script_that_is_not_the_reports_own_does_not_run(browser: Any, plain: Path, tmp_path: Path) -> None:
    """If the escaping of a text failed, the page's policy would still stop its scripts."""
    content = plain.read_text(encoding="utf-8")
    (tmp_path / "page.html").write_text(content.replace("<h1>", "<script>evil = 1</script><h1 onclick='evil = 1'>"))
    page = browser.new_page()
    page.goto((tmp_path / "page.html").as_uri())
    page.locator("h1").click()
    assert page.locator(".u-over").count() >= 1
    assert page.evaluate("typeof evil") == "undefined"
    page.close()


def test_the_cursor_shows_the_values_of_all_runs(opened: Open, plain: Path) -> None:
    page = opened(plain)
    shown = hover(page, 0.5)
    assert shown.pop("x") == "step 50"
    losses = {name: float(value) for name, value in shown.items()}
    assert list(losses) == ["timed, train", "timed, validation", "old, train", "old, validation"]
    assert all(3 < loss < 3.3 for loss in losses.values())


def test_the_switches_change_axis_scale_and_smoothing(opened: Open, plain: Path) -> None:
    page = opened(plain)
    ends = "charts.map(chart => [chart.scales.x.min, chart.scales.x.max])"
    assert page.evaluate(ends) == [[0, 100]]
    smoothed = hover(page, 0.5)
    page.get_by_label("smoothed").uncheck()
    raw = hover(page, 0.5)
    assert float(raw["timed, train"]) == pytest.approx(train(50)["loss"], abs=1e-3)
    assert abs(float(smoothed["timed, train"]) - float(raw["timed, train"])) > 1e-3
    page.get_by_label("over tokens").check()
    assert page.evaluate(ends) == [[0, 10]]
    shown = hover(page, 0.5)
    assert shown["x"] == "tokens (thousands) 5"
    assert shown["old, validation"] == f"{usual()[-1]['val_loss']:.5g}"  # after its 100 steps of 50 tokens
    page.get_by_label("over time").check()
    assert page.evaluate(ends) == [[0, 60]]
    assert {name for name, value in hover(page, 0.5).items() if value} == {"x", "timed, train", "timed, validation"}
    page.get_by_label("over steps").check()
    page.get_by_label("logarithmic axis").check()
    assert page.evaluate(ends) == [[1, 100]]
    assert page.evaluate("charts[0].scales.y.max") >= train(1)["loss"]
    assert hover(page, 0.5)["x"] == "step 10"


def test_a_name_in_the_legend_hides_its_curve(opened: Open, plain: Path) -> None:
    page = opened(plain)
    page.locator(".u-series th", has_text="timed, train").last.click()
    assert page.evaluate("charts[0].series.filter(s => !s.show).map(s => [s.label, s.class ?? ''])") == [
        ["timed, train", "aside"],  # each step as it was recorded
        ["timed, train", ""],
    ]


def test_dragging_zooms_all_panels_and_a_double_click_zooms_out(opened: Open, hostile: dict[int, Path]) -> None:
    page = opened(hostile[1])
    page.evaluate("document.querySelector('.panels').scrollIntoView()")
    panel = page.locator(".u-over").first.bounding_box()
    left, y = panel["x"], panel["y"] + 50
    page.mouse.move(left + panel["width"] * 0.25, y)
    page.mouse.down()
    page.mouse.move(left + panel["width"] * 0.75, y)
    page.mouse.up()
    ends = "charts.map(chart => [chart.scales.x.min, chart.scales.x.max])"
    zoomed = page.evaluate(ends)
    assert len(zoomed) >= 3
    assert all(found == pytest.approx([25, 75], abs=1) for found in zoomed)
    page.mouse.dblclick(left + 50, y)
    assert page.evaluate(ends) == len(zoomed) * [[0, 100]]


def test_a_single_point_is_drawn_on_every_axis(opened: Open, tmp_path: Path) -> None:
    report([run(tmp_path / "run", [{**train(7, 3.0), "seconds": 8.0}])], tmp_path / "page.html")
    page = opened(tmp_path / "page.html")
    for axis, x in (("steps", "step 7"), ("tokens", "tokens 700"), ("time", "time (seconds) 7")):
        page.get_by_label(f"over {axis}").check()
        for switch in (page.get_by_label("logarithmic axis").check, page.get_by_label("logarithmic axis").uncheck):
            switch()
            assert page.evaluate("charts[0].scales.x.max - charts[0].scales.x.min") > 0
            assert hover(page, 0.5) == {"x": x, "train": "3"}


def test_without_seconds_there_is_no_axis_of_time(opened: Open, tmp_path: Path) -> None:
    report([run(tmp_path / "run", usual())], tmp_path / "page.html")
    page = opened(tmp_path / "page.html")
    assert page.get_by_label("over time").is_disabled()
    assert page.get_by_label("over tokens").is_enabled()
