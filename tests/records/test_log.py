"""The log of a run on the console, in ``metrics.jsonl`` and in ``log.txt``; and what a resumed run removes from it."""

from __future__ import annotations

import errno
import io
import json
import math
import sys
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import pytest

from folio.errors import UserError
from folio.records.log import Log
from folio.records.metrics import read_metrics, rewind, to_json
from folio.records.run_folder import LOG_TXT, METRICS

Record = dict[str, Any]


def train(step: int, loss: float = 4.0, mfu: float = math.nan) -> Record:
    return {"kind": "train", "step": step, "loss": loss, "tokens_per_second": 1000.0, "mfu": mfu}


def evaluation(step: int) -> Record:
    return {"kind": "eval", "step": step, "train_loss": 3.25, "val_loss": 3.5}


def hellaswag(step: int) -> Record:
    scores = {"acc": 0.28590, "acc_norm": 2967 / 10042}
    return {"kind": "hellaswag", "step": step, "style": "completion", "total": 10042, **scores}


def sample(step: int, text: str) -> Record:
    return {"kind": "sample", "step": step, "number": 1, "text": text}


def written(out: Path, *records: Record, log_txt: Any = True, epoch: int = 1) -> None:
    log = Log(True, total=10)
    log.open(out, log_txt, epoch)
    for record in records:
        log.write(record)
    log.sync()
    log.close()


# On the console


@pytest.mark.parametrize(
    ("record", "line"),
    [
        (train(7), "iter 7: loss 4.0000, time 500.00ms"),
        (train(7, mfu=0.3754), "iter 7: loss 4.0000, time 500.00ms, mfu 37.54%"),
        (evaluation(250), "step 250: train loss 3.2500, val loss 3.5000"),
        (hellaswag(250), "step 250: HellaSwag acc_norm 0.2955 (2967/10042), acc 0.2859, completion"),
        ({"kind": "wte", "step": 250, "norm": 12.345678, "note": "a"}, "step 250: wte/norm 12.346"),
        (sample(250, "Hello,\n\tworld"), "step 250: sample 1: Hello,\n  \tworld"),
        (sample(250, "\x1b[2Jgone\r\x07"), "step 250: sample 1: \\x1b[2Jgone\\r\\x07"),
    ],
)
def test_console_lines(record: Record, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """nanoGPT's lines, and others in their style; control characters in a sample are escaped."""
    log = Log(True, total=10)
    log.start(0, tokens_per_step=500)
    log.write(record)
    assert capsys.readouterr().out == f"{line}\n"


def test_records_without_a_console_line(capsys: pytest.CaptureFixture[str]) -> None:
    Log(True, total=10).write({"kind": "wte", "step": 0, "norm": math.nan})
    Log(True, total=10).write({"kind": "start", "step": 0, "device": "cpu"})
    Log(False, total=10).write(evaluation(0))  # of another rank
    assert capsys.readouterr().out == ""


def test_a_terminal_shows_samples_unchanged(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above the progress bar, which replaces the training lines. Markup and :smile: are not interpreted."""
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    log = Log(True, total=10)
    log.start(0, tokens_per_step=500)
    log.write(train(0))
    log.write(sample(0, "[bold]:smile:[/bold]"))
    log.close()
    out = capsys.readouterr().out
    assert "step 0: sample 1: [bold]:smile:[/bold]" in out
    assert "iter 0" not in out


def test_the_progress_bar_names_the_current_work(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "200")
    log = Log(True, total=10)
    log.start(0, tokens_per_step=500)
    log.busy("evaluating, batch 37 of 400")
    log._bar._progress.refresh()
    log.close()
    assert "evaluating, batch 37 of 400" in capsys.readouterr().out


def test_a_lost_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """For example after a lost connection: one warning, and neither the bar nor a line fails afterwards."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    log = Log(True, total=10)
    with pytest.warns(UserWarning, match="Input/output error.*continuing without it"):
        log.start(0, tokens_per_step=500)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log.busy("evaluating, batch 1 of 2")
        log.write(evaluation(5))
        log.advance(6, 4.0, 100.0)
        log.say("step 6")
        log.close()


# In the files


def test_log_txt_is_build_nanogpts(tmp_path: Path) -> None:
    """Exactly its lines; HellaSwag's has acc_norm. Other records have no line."""
    start = {"kind": "start", "step": 0}
    written(tmp_path, start, evaluation(0), hellaswag(0), train(0, 10.9551234), sample(0, "no\nline"), evaluation(1))
    assert (tmp_path / LOG_TXT).read_text() == "0 val 3.5000\n0 hella 0.2955\n0 train 10.955123\n1 val 3.5000\n"
    assert len(read_metrics(tmp_path / METRICS)) == 6


def test_log_txt_is_gpt_from_scratchs(tmp_path: Path) -> None:
    """Its steps restart with each epoch; a measurement after an epoch's last step belongs to that epoch."""
    steps = evaluation(0), train(0), train(3), evaluation(4), train(4), train(7), evaluation(8)
    written(tmp_path, *steps, log_txt="gpt-from-scratch", epoch=4)
    assert [line.split(" | ")[:2] for line in (tmp_path / "log.txt").read_text().splitlines()] == [
        ["Epoch 0", "iter 0"],
        ["Epoch 0", "iter 0"],
        ["Epoch 0", "iter 3"],
        ["Epoch 0", "iter 4"],
        ["Epoch 1", "iter 0"],
        ["Epoch 1", "iter 3"],
        ["Epoch 1", "iter 4"],
    ]


def test_log_txt_is_written_on_request_only(tmp_path: Path) -> None:
    """The user may have an own file of that name."""
    (tmp_path / LOG_TXT).write_text("mine\n")
    written(tmp_path, evaluation(5), train(6), log_txt=False)
    assert (tmp_path / LOG_TXT).read_text() == "mine\n"


def test_log_txt_is_rewritten_from_the_metrics(tmp_path: Path) -> None:
    """Also if it was not requested before, or belonged to another run."""
    (tmp_path / LOG_TXT).write_text("0 val 9.0000\n7 train 8.0")
    written(tmp_path, evaluation(0), train(0, math.inf), train(1), log_txt=False)
    written(tmp_path, train(2))
    text = (tmp_path / LOG_TXT).read_text()
    assert text == "0 val 3.5000\n1 train 4.000000\n2 train 4.000000\n"


def test_nan_and_infinity_are_null(tmp_path: Path) -> None:
    written(tmp_path, train(0, math.inf))
    (record,) = read_metrics(tmp_path / METRICS)
    assert (record["loss"], record["mfu"], record["tokens_per_second"]) == (None, None, 1000.0)
    assert (tmp_path / LOG_TXT).read_text() == ""  # as when it is written again from the metrics


def test_a_full_disk_is_an_error(tmp_path: Path) -> None:
    """Unlike that of a tracker; the log can still be closed."""
    resource = pytest.importorskip("resource")
    log = Log(True, total=10)
    log.open(tmp_path, log_txt=True)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, limits[1]))  # bytes of a file
    try:
        with pytest.raises(OSError, match=rf"{METRICS} could not be written \(File too large\)"):
            log.write(evaluation(0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    log.close()


# What a resumed run writes again


def test_rewinding(tmp_path: Path) -> None:
    """A run resumed at 5 keeps the lines of earlier steps, and the measurements of step 5."""
    start = {"kind": "start", "step": 5}
    kept = [train(4), evaluation(5), hellaswag(5), sample(5, "text")]
    written(tmp_path, *kept, start, train(5), train(6), evaluation(10), log_txt=False)
    rewind(tmp_path / METRICS, 5)
    found = [(r["kind"], r["step"]) for r in read_metrics(tmp_path / METRICS)]
    assert found == [("train", 4), ("eval", 5), ("hellaswag", 5), ("sample", 5)]
    assert [p.name for p in tmp_path.iterdir()] == [METRICS]


def test_nothing_to_rewind(tmp_path: Path) -> None:
    rewind(tmp_path / METRICS, 5)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tail", [b"", b'{"kind": "tr', b'{"kind": "eval", "step": 3}', b"\x00\x00\x00"])
def test_an_unfinished_last_line_is_removed(tail: bytes, tmp_path: Path) -> None:
    """A killed run leaves one. There is no warning, and the lines before are kept to the byte."""
    whole = "".join(
        json.dumps(r, indent=None, separators=(", ", " : ")) + "\r\n" for r in [evaluation(0), sample(4, "…")]
    )
    (tmp_path / METRICS).write_bytes(whole.encode() + tail)
    assert rewind(tmp_path / METRICS, 5) == []
    assert (tmp_path / METRICS).read_bytes() == whole.encode()
    assert [path.name for path in tmp_path.iterdir()] == [METRICS]


DAMAGED = {
    "one bit": b'{"kind": "eval", "st\x65q": 2}\n',
    "a quote lost": b'{"kind": "eval, "step": 2}\n',
    "no text": b"\xff\xfe\n",
    "a byte that is no UTF-8": b'{"kind": "sample", "step": 2, "text": "\xe9"}\n',
    "zeros": b"\x00" * 5000 + b"\n",
    "a number": b"17\n",
    "a list": b'[{"kind": "eval", "step": 2}]\n',
    "no kind": b'{"step": 2}\n',
    "a kind that is no text": b'{"kind": ["eval"], "step": 2}\n',
    "a step that is text": b'{"kind": "eval", "step": "2"}\n',
    "a step that is yes": b'{"kind": "eval", "step": true}\n',
    "a step below 0": b'{"kind": "eval", "step": -2}\n',
    "half a step": b'{"kind": "eval", "step": 2.5}\n',
    "a step beyond all": b'{"kind": "eval", "step": 1' + b"0" * 30 + b"}\n",
    "a step of 5000 digits": b'{"kind": "eval", "step": 1' + b"0" * 5000 + b"}\n",
    "a loss beyond all": b'{"kind": "eval", "step": 2, "val_loss": 1e999}\n',
    "no number": b'{"kind": "eval", "step": 2, "val_loss": NaN}\n',
    "deep": b'{"kind": "eval", "step": 2, "x": ' + b"[" * 100_000 + b"\n",
}


@pytest.mark.parametrize("line", DAMAGED.values(), ids=DAMAGED)
def test_only_the_damaged_line_is_lost(line: bytes, tmp_path: Path) -> None:
    """A note names the line, as does a warning for readers, and the original file is kept beside."""
    before = (to_json(evaluation(step)).encode() + b"\n" for step in (0, 1))
    after = b"".join(to_json(r).encode() + b"\n" for r in (train(2), train(3), evaluation(5)))
    first = b"".join(before)
    (tmp_path / METRICS).write_bytes(first + line + after)
    with pytest.warns(UserWarning, match=f"{METRICS}: line 3 is damaged, and ignored") as told:
        assert len(read_metrics(tmp_path / METRICS)) == 5
    assert len(told) == 1
    (said,) = rewind(tmp_path / METRICS, 5)
    assert said == f"{tmp_path / METRICS}: line 3 is damaged, and left out; the original is kept as {METRICS}.damaged"
    assert (tmp_path / METRICS).read_bytes() == first + after
    assert (tmp_path / f"{METRICS}.damaged").read_bytes() == first + line + after
    assert rewind(tmp_path / METRICS, 5) == []


@pytest.mark.parametrize(
    "half", [b'{"kind": "tr', b"\x00" * 700, b'{"kind": "sample", "step": 1, "text": "{\\"kind\\": ']
)
def test_a_whole_line_after_half_a_line_is_kept(half: bytes, tmp_path: Path) -> None:
    """A process that appends after a loss of power leaves such a line."""
    whole = [to_json(evaluation(step)).encode() + b"\n" for step in range(3)]
    (tmp_path / METRICS).write_bytes(whole[0] + half + whole[1] + whole[2])
    assert "line 2 is damaged" in rewind(tmp_path / METRICS, 5, interval=10)[0]
    assert (tmp_path / METRICS).read_bytes() == b"".join(whole)


def test_an_earlier_damaged_file_is_not_overwritten(tmp_path: Path) -> None:
    for number in range(3):
        lines = [to_json(train(step)) + "\n" for step in range(4)]
        (tmp_path / METRICS).write_text("".join([*lines, *["?\n"] * (number + 1)]))
        (said,) = rewind(tmp_path / METRICS, 4)
    assert said.startswith(f"{tmp_path / METRICS}: 3 lines (5, 6, 7) are damaged")
    kept = [(tmp_path / f"{METRICS}.damaged{end}").read_text().count("?") for end in ("", "-2", "-3")]
    assert kept == [1, 2, 3]


@pytest.mark.parametrize(
    ("steps", "interval", "words"),
    [
        (range(10), 1, None),
        ([0, 4, 8], 4, None),
        ([0, 5], 5, None),
        (range(9), 1, "ends at step 8, but the run resumes at step 10"),
        ([0, 4], 4, "ends at step 4, but the run resumes at step 10"),
        ([], 1, "has nothing from before, but the run resumes at step 10"),
        ([11, 12], 1, "has nothing from before"),
        (None, 1, "is missing: all measurements before step 10 are lost"),
        (None, 0, None),
        ([], 0, None),
        ([9, 0, 0, 3, 9], 1, None),
    ],
)
def test_lost_metrics_are_reported(steps: Any, interval: int, words: str | None, tmp_path: Path) -> None:
    """Lines out of order or repeated are kept unchanged."""
    content = None
    if steps is not None:
        content = "".join(to_json(train(step)) + "\n" for step in steps)
        (tmp_path / METRICS).write_text(content)
    said = rewind(tmp_path / METRICS, 10, interval=interval)
    if words:
        (line,) = said
        assert line.startswith(f"{tmp_path / METRICS} {words}")
    else:
        assert said == []
        assert content is None or (tmp_path / METRICS).read_text() == content


def test_an_endless_line_takes_no_memory(tmp_path: Path) -> None:
    with (tmp_path / METRICS).open("wb") as file:
        file.write(b'{"kind": "eval", "step": 0}\n')
        file.seek(200 << 20, 1)  # a hole
        file.write(b'\n{"kind": "eval", "step": 1}\n')
    tracemalloc.start()
    with pytest.warns(UserWarning, match="line 2 is damaged"):
        assert [r["step"] for r in read_metrics(tmp_path / METRICS)] == [0, 1]
    assert tracemalloc.get_traced_memory()[1] < 80 << 20
    tracemalloc.stop()


def test_odd_records_have_no_line_in_log_txt(tmp_path: Path) -> None:
    odd = [{**evaluation(1), "val_loss": value} for value in (None, "3.5", [3.5], True)]
    odd += [{**train(1), "loss": "4"}, {**hellaswag(1), "acc_norm": None}, {"kind": "train", "step": 1}]
    (tmp_path / METRICS).write_text("".join(to_json(r) + "\n" for r in odd))
    for how in (True, "gpt-from-scratch"):
        written(tmp_path, log_txt=how)
        assert (tmp_path / LOG_TXT).read_text() == ""


@pytest.mark.parametrize("change", ["removed", "folder moved", "replaced"])
def test_a_file_that_is_no_longer_there(tmp_path: Path, change: str) -> None:
    """Later records would be lost, and checkpoints would go to another folder than the file."""
    out = tmp_path / "out"
    out.mkdir()
    log = Log(True, total=10)
    log.open(out)
    log.write(evaluation(0))
    if change == "folder moved":
        out.rename(tmp_path / "elsewhere")
    else:
        (out / METRICS).unlink()
    if change == "replaced":
        (out / METRICS).write_text("")
    for later in (log.sync, lambda: log.write(evaluation(5))):
        with pytest.raises(UserError, match=r"metrics.jsonl was moved, removed or replaced .* --init_from=resume"):
            later()
    log.close()
