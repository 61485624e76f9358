"""The report of a run: its content, and that a browser shows it without a network."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL, Outcome, assert_refused
from test_plot import evaluation, hellaswag, oddly, own, run, train, usual

pytest.importorskip("plotly")

Folio = Callable[..., Outcome]
EVIL = "</script></pre></td><script>window.evil = 1</script><img src=x onerror='window.evil = 1'>"
START = {"kind": "start", "device": "cuda", "processor": "NVIDIA H100", "tokens_per_iteration": 100}


def text_of(page: str) -> str:
    """The visible text of a page, without scripts, styles and tags."""
    page = re.sub(r"<(script|style)\b.*?</\1>", "", page, flags=re.S)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page))


def page_of(folio: Folio, out: Path) -> str:
    outcome = folio("report", str(out))
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out == f"wrote {out / 'report.html'}\n"
    return (out / "report.html").read_text(encoding="utf-8")


def sample(step: int, text: str, number: int = 0) -> dict[str, Any]:
    return {"kind": "sample", "step": step, "number": number, "text": text}


def append(out: Path, *records: dict[str, Any], end: str = "") -> None:
    (out / "evaluations.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + end)


def test_the_report_of_a_real_run(folio: Folio, story: Path, tmp_path: Path) -> None:
    out = tmp_path / "a run"
    assert folio("train", *SMALL, f"--data_dir={story}", f"--out_dir={out}").code == 0
    page = page_of(folio, out)
    text = text_of(page)
    best = json.loads((out / "best.json").read_text())
    assert f"best validation loss {best['loss']:.4f} at step {best['step']} steps 10 tokens (thousands) 1.28" in text
    assert "n_layer 2 12" in text  # asked, default
    for words in ("tokens per second (median)", "device cpu", "matmul precision highest", "from step 0", f"{story} –"):
        assert words in text
    for absent in ("HellaSwag", "Samples", "folio eval"):
        assert absent not in text
    assert page.count("<!doctype html>") == page.count("plotly.js v") == 1


def test_options_that_differ_from_the_defaults_come_first(folio: Folio, tmp_path: Path) -> None:
    out = run(tmp_path / "run", usual(), n_layer=12, n_head=6, dataset="<b>", gone="yes")
    changed, same = text_of(page_of(folio, out)).split("Configuration")[1].split("1 options at their defaults")
    assert "n_head 6 12 dataset &lt;b&gt; openwebtext gone yes none" in changed
    assert "n_layer 12" in same


def test_evaluations_from_training_and_from_folio_eval(folio: Folio, tmp_path: Path) -> None:
    out = run(tmp_path / "run", [*usual(), evaluation(120, 3.5), hellaswag(100)])
    append(
        out,
        {
            "kind": "eval",
            "step": 100,
            "split": "val",
            "data": "data/ferry",
            "loss": 3.25,
            "perplexity": 25.79,
            "tokens": 12345,
        },
        {"kind": "hellaswag", "step": 100, "style": "harness", "acc": 0.25, "acc_norm": 0.375, "total": 8},
        {"kind": "lm_eval", "step": 120, "limit": 3, "tasks": {"<arc>": {"acc,none": 0.4375, "alias": "arc"}}},
        end='{"kind": "eval", "st',
    )
    text = text_of(page_of(folio, out))
    assert "best 100 3.0135 3.0135 10,000 – last 120 3.5000 3.5000 12,000 –" in text
    assert "100 completion 0.2600 0.0044" in text
    for row in (
        "100 eval, val, data/ferry loss 3.2500",
        "100 eval, val, data/ferry tokens 12,345",
        "100 hellaswag, harness acc_norm 0.3750",
        "120 &lt;arc&gt;, first 3 acc,none 0.4375",
    ):
        assert row in text
    assert "alias" not in text
    assert "eval, val step" not in text


def test_starts_with_equal_values_share_a_column(folio: Folio, tmp_path: Path) -> None:
    starts = [{**START, "step": 0}, {**START, "step": 40}, {**START, "step": 1000, "processor": "NVIDIA A100"}]
    text = text_of(page_of(folio, run(tmp_path / "run", [*starts, *usual()])))
    assert "from step 0, 40 from step 1,000 device cuda cuda processor NVIDIA H100 NVIDIA A100" in text


def test_samples_are_shown_as_text_and_the_last_step_is_open(folio: Folio, tmp_path: Path) -> None:
    samples = [sample(0, "old"), sample(100, EVIL), sample(100, "a  b\n\ud800", 1)]
    page = page_of(folio, run(tmp_path / "run", [*usual(), *samples]))
    assert re.findall(r"<details( open)?><summary>step (\d+)<", page) == [(" open", "100"), ("", "0")]
    assert EVIL not in page
    assert "&lt;script&gt;window.evil" in page
    assert "<pre>a  b\n?</pre>" in page


def test_a_measurement_of_ones_own_has_its_panel_and_last_value(folio: Folio, tmp_path: Path) -> None:
    records = [own(step, norm=12 + step / 100, **{"<b>": 0.5}) for step in (0, 50, 100)]
    page = page_of(folio, run(tmp_path / "run", [*usual(), *records]))
    assert "wte/norm, last 13 wte/&lt;b&gt;, last 0.5" in text_of(page)
    assert page.count('"text":"wte\\u002fnorm"') + page.count('"text":"wte/norm"') == 1
    assert "wte/<b>" not in page


@pytest.mark.parametrize(
    "records",
    [
        pytest.param([{**START, "step": 0}], id="begun"),
        pytest.param([evaluation(0, 4.0)], id="one-evaluation"),
        pytest.param([train(0)], id="one-step"),
        pytest.param([train(0), {**train(1), "loss": None, "mfu": None}, evaluation(2, None)], id="null"),
        pytest.param([hellaswag(3)], id="hellaswag-alone"),
        pytest.param([sample(3, "text")], id="sample-alone"),
        pytest.param([own(3, norm=1.5)], id="own-alone"),
    ],
)
def test_runs_with_few_records_have_a_report(folio: Folio, tmp_path: Path, records: list[dict[str, Any]]) -> None:
    page = page_of(folio, run(tmp_path / "run", records, '{"kind": "tra'))
    assert ("plotly.js v" in page) == (records[0]["kind"] not in ("start", "sample"))
    assert "nan" not in text_of(page)


@pytest.mark.parametrize(
    "record",
    [
        {**train(5), "lr": 0.1, "grad_norm": 1.0, "tokens_per_second": 5.0, "mfu": 0.1, "seconds": 9.0},
        {**evaluation(5, 3.0), "seconds": 9.0},
        hellaswag(5),
        sample(5, "text"),
        {**START, "step": 5},
    ],
    ids=lambda record: record["kind"],
)
def test_runs_with_odd_values_have_a_report(folio: Folio, tmp_path: Path, record: dict[str, Any]) -> None:
    """There is no traceback and no warning, and text is escaped."""
    out = run(tmp_path / "run", [*usual(), *(r | {"step": 200 + i} for i, r in enumerate(oddly(record)))])
    append(out, *oddly({"kind": "eval", "step": 5, "split": "val", "data": "x", "loss": 3.0, "tokens": 9}))
    page = page_of(folio, out)
    assert "best validation loss" in page
    assert "<b>\x1b" not in page


def test_runs_with_odd_evaluations_have_a_report(folio: Folio, tmp_path: Path) -> None:
    out = run(tmp_path / "run", usual())
    tasks: list[Any] = [None, 5, [1], {"a": 5}, {"a": {"acc": "high"}}, {"a": {"acc": [1]}}, {"b": {"acc": 0.25}}]
    append(out, *({"kind": "lm_eval", "step": i, "tasks": t, "limit": {}} for i, t in enumerate(tasks)))
    text = text_of(page_of(folio, out))
    assert "6 b acc 0.2500" in text
    append(
        out, {"kind": "start", "step": 1}, end='{"kind": "lm_eval", "step": 1, "tasks": ' + '{"a": ' * 100_000 + "\n"
    )
    with pytest.warns(UserWarning, match="evaluations.jsonl: line 2 is damaged, and ignored"):
        assert folio("report", str(out)).code == 0


def test_the_report_of_a_long_run_is_small(folio: Folio, tmp_path: Path) -> None:
    short, long = (
        page_of(folio, run(tmp_path / str(steps), [train(step) for step in range(steps)])) for steps in (9, 20_000)
    )
    assert len(long) < len(short) + 300_000


def test_a_report_without_a_run_or_a_writable_page_is_refused(folio: Folio, tmp_path: Path) -> None:
    out = run(tmp_path / "run", usual())
    empty, folder = run(tmp_path / "empty", []), tmp_path / "folder.html"
    folder.mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert_refused(folio("report", str(tmp_path)), tmp_path / "metrics.jsonl", "is missing")
    assert_refused(folio("report", str(empty)), empty / "metrics.jsonl", "holds nothing yet")
    assert_refused(folio("report", str(out), "-o", str(folder)), folder, "could not be written")
    assert_refused(folio("report", str(out), "-o", str(tmp_path / "page.png")), "page.png", ".html")
    assert sorted(tmp_path.rglob("*")) == before


# In a browser


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


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run with HTML in every text that it can contain."""
    from folio.records.report import report

    out = tmp_path_factory.mktemp("runs") / "<img src=x onerror=evil=1>"
    scored = [hellaswag(step, style) for step in (0, 50, 100) for style in ("completion", EVIL)]
    records = [{**START, "step": 0, EVIL: EVIL}, *usual(), *scored, sample(100, EVIL), sample(50, "word " * 99)]
    run(out, records, dataset="fineweb_edu", data_dir=EVIL, **{EVIL: EVIL})
    append(out, {"kind": "lm_eval", "step": 9, "tasks": {EVIL: {EVIL: 1.5}}})
    page = out.parent / "page.html"
    report(out, page)
    return page


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (390, "dark")])
def test_a_browser_shows_the_report_without_a_network(browser: Any, page_file: Path, width: int, scheme: str) -> None:
    context = browser.new_context(offline=True, color_scheme=scheme, viewport={"width": width, "height": 900})
    page = context.new_page()
    errors: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: errors.append(message.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(page_file.as_uri())
    page.wait_for_selector("#curves .scatterlayer .trace")

    panel = page.locator("#curves .nsewdrag").first.bounding_box()
    page.mouse.move(panel["x"] + panel["width"] / 2, panel["y"] + panel["height"] / 2)
    page.wait_for_selector("#curves .hoverlayer .legendtext")
    told = page.locator("#curves .hoverlayer").text_content()
    assert re.search(r"train, smoothed : (\(\d+, )?3\.\d+", told), told

    read = page.locator("body").inner_text()
    assert read.count("<script>window.evil = 1</script>") >= 6
    assert page.evaluate("window.evil") is None
    colors = "e => [getComputedStyle(e).color, getComputedStyle(e).backgroundColor].map(c => parseInt(c.slice(4)))"
    ink, paper = page.locator("body").evaluate(colors)
    assert (ink > 200 > 50 > paper) if scheme == "dark" else (ink < 50 < 200 < paper)
    tick = page.locator("#curves .ytick text").first.evaluate("e => parseInt(getComputedStyle(e).fill.slice(4))")
    assert tick == ink
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    context.close()
    assert errors == []
    assert requests == [page_file.as_uri()]
