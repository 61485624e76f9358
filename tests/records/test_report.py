"""The report of runs: the content of its page."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL, Outcome, assert_refused
from test_plot import evaluation, hellaswag, oddly, own, run, train, usual

Folio = Callable[..., Outcome]
EVIL = "</script></pre></td><script>window.evil = 1</script><img src=x onerror='window.evil = 1'>"
START = {"kind": "start", "device": "cuda", "processor": "NVIDIA H100", "tokens_per_iteration": 100}


def text_of(page: str) -> str:
    """The visible text of a page, without scripts, styles and tags."""
    page = re.sub(r"<(script|style)\b.*?</\1>", "", page, flags=re.S)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page)).strip()


def page_of(folio: Folio, *outs: Path) -> str:
    page = Path("compare.html") if len(outs) > 1 else outs[0] / "report.html"
    outcome = folio("report", *map(str, outs))
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out == f"wrote {page}\n"
    return page.read_text(encoding="utf-8")


def panels_of(page: str) -> dict[str, list[dict[str, Any]]]:
    """The curves that a page draws, by the title of their panel; empty if it draws none."""
    found = re.findall(r"<script type=application/json id=data>(.*?)</script>", page)
    return {panel["title"]: panel["curves"] for data in found for panel in json.loads(data)["panels"]}


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
    assert f"best validation loss {best['loss']:.4f} nats per token, after {best['step']} steps perplexity" in text
    assert "steps 10 of 10 tokens (thousands) 1.28" in text
    assert "n_layer 2 12" in text  # asked, default
    for words in (
        "tokens per second, median",
        "device cpu",
        "matmul precision highest",
        "processes 1",
        "from step 0",
        f"{story} –",
    ):
        assert words in text
    for absent in ("HellaSwag", "Samples", "folio eval", "of step", "at step"):
        assert absent not in text
    assert page.count("<!doctype html>") == page.count("uPlot (v") == 1
    assert list(panels_of(page)) == ["loss (nats per token)", "learning rate", "gradient norm", "tokens per second"]
    assert len(page) < 150_000


def test_options_that_differ_from_the_defaults_come_first(folio: Folio, tmp_path: Path) -> None:
    out = run(tmp_path / "run", usual(), n_layer=12, n_head=6, dataset="<b>", gone="yes")
    changed, same = text_of(page_of(folio, out)).split("Configuration")[1].split("1 option at its default")
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
    after = "last value, after 100 steps"
    assert f"wte/norm 13 {after} wte/&lt;b&gt; 0.5 {after}" in text_of(page)
    (curve,) = panels_of(page)["wte/norm"]
    assert (curve["x"], curve["y"]) == ([0, 50, 100], [12, 12.5, 13])
    assert "wte/<b>" in panels_of(page)
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
    assert ("uPlot (v" in page) == bool(panels_of(page)) == (records[0]["kind"] not in ("start", "sample"))
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


def test_the_report_of_long_runs_is_small(folio: Folio, tmp_path: Path) -> None:
    """Ten runs that are too long to show all points and samples take less than 1.5 MB."""
    figures = {"lr": 0.00012345, "grad_norm": 1.23456789, "tokens_per_second": 12345.678, "seconds": 123.456}
    long = [{**train(step), **figures} for step in range(20_000)]
    samples = [sample(step, "word " * 200, number) for step in range(0, 20_000, 50) for number in range(5)]
    one = page_of(folio, run(tmp_path / "run", [*long, *samples]))
    assert len(one) < 1_000_000
    assert "Samples of 80 of 400 steps." in one
    assert "<summary>step 19,950<" in one
    for number in range(10):
        run(tmp_path / str(number), [*long[::4], *(own(0, **{f"norm_{i}": i}) for i in range(20))])
    ten = page_of(folio, *(tmp_path / str(number) for number in range(10)))
    assert len(ten) < 1_500_000
    assert {len(curves) for curves in panels_of(ten).values()} == {10}


def test_several_runs_are_on_one_page(folio: Folio, tmp_path: Path) -> None:
    first = run(
        tmp_path / "a" / "first", [*usual(), hellaswag(100), sample(100, "one")], n_head=6, dropout=0.1, bias=True
    )
    records = [*usual(), own(100, norm=2.5), hellaswag(100, "harness"), sample(100, "two"), {**START, "step": 0}]
    second = run(tmp_path / "second", records, n_head=6, dropout=0.2)
    append(second, {"kind": "hellaswag", "step": 100, "style": "harness", "acc_norm": 0.375})
    page = page_of(folio, first, second)
    text = text_of(page)
    best = "3.0135 nats per token, after 100 steps"
    assert text.startswith(f"first, second first, second first second best validation loss {best} {best} perplexity")
    for words in (
        "wte/norm – 2.5 last value, after 100 steps",
        "first best 100 3.0135 3.0135 10,000 – first last 100 3.0135 3.0135 10,000 – second best 100",
        "first 100 completion 0.2600 0.0044 second 100 harness 0.2600 0.0044",
        "run step task metric value second 100 hellaswag, harness acc_norm 0.3750",
        "first step 100 one second step 100 two",
        "second, from step 0 device cuda",
        "different option first second dropout 0.1 0.2 bias True False 1 option with the same value",
    ):
        assert words in text
    panels = panels_of(page)
    assert [(c["run"], c["name"]) for c in panels["loss (nats per token)"]] == [
        (0, "train"), (0, "validation"), (1, "train"), (1, "validation")
    ]  # fmt: skip
    assert [c["run"] for c in panels["wte/norm"]] == [1]
    assert not (first / "report.html").exists()
    assert not (second / "report.html").exists()


def test_a_folder_that_is_named_twice_is_one_run(folio: Folio, tmp_path: Path) -> None:
    out = run(tmp_path / "run", usual())
    assert folio("report", str(out), str(out / ".." / "run")).out == f"wrote {out / 'report.html'}\n"
    assert text_of((out / "report.html").read_text(encoding="utf-8")).startswith("run run best validation loss")


def test_a_report_without_a_run_or_a_writable_page_is_refused(folio: Folio, tmp_path: Path) -> None:
    out = run(tmp_path / "run", usual())
    empty, folder = run(tmp_path / "empty", []), tmp_path / "folder.html"
    folder.mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert_refused(folio("report", str(tmp_path)), tmp_path / "metrics.jsonl", "is missing")
    assert_refused(folio("report", str(out), str(empty)), empty / "metrics.jsonl", "holds nothing yet")
    assert_refused(folio("report", str(empty)), empty / "metrics.jsonl", "holds nothing yet")
    assert_refused(folio("report", str(out), "-o", str(folder)), folder, "could not be written")
    assert_refused(folio("report", str(out), "-o", str(tmp_path / "page.png")), "page.png", ".html")
    assert sorted(tmp_path.rglob("*")) == before
