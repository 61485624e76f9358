"""Worker processes: their ids, and the death of one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import corpora
import numpy as np
import pytest
from conftest import LINUX, ROOT
from corpora import DOCS, expected, ids, tokenizers

corpus = corpora.corpus


def test_many_ids_are_uint32(folio, corpus, tmp_path) -> None:
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(70_000)}, unk_token="w0"))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast.save(str(tmp_path / "words.json"))
    for n, text in enumerate(("w1 w2", "w65535 w65536 w69999", "w3 unheard")):
        (corpus / f"{n}.txt").write_text(text)
    out = tmp_path / "out"
    argv = (corpus, f"--tokenizer={tmp_path / 'words.json'}", f"--data_dir={out}", "--val_documents=1")
    assert folio("prepare", *argv).code == 0
    meta = json.loads((out / "meta.json").read_text())
    assert (meta["dtype"], meta["vocab_size"], meta["eot"]) == ("uint32", 70_000, "none")
    assert ids(out, "train", np.uint32) == [65535, 65536, 69999, 3, 0]


def session(leader: int) -> dict[int, str]:
    """The living processes of a session, with their command lines."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            *_, stat = (path / "stat").read_text().rpartition(")")
            if int(stat.split()[3]) == leader and stat.split()[0] != "Z":
                found[int(path.name)] = (path / "cmdline").read_text()
        except OSError:
            continue
    return found


@pytest.mark.slow
@LINUX
def test_a_worker_that_is_killed(corpus, tok, tmp_path) -> None:
    """One line of error and no orphans; the next run continues, and makes the same ids."""
    texts = [DOCS[4] * 400, *[DOCS[4] * 80] * 40, "end"]  # the first is cut, the others are not
    for n, text in enumerate(texts):
        (corpus / f"{n:02}.txt").write_bytes(text.encode())
    out = tmp_path / "out"
    small_blocks = "from folio import cli; from folio.preparation import sources; sources.BLOCK = 2**18; cli.main()"
    argv = ["prepare", str(corpus), f"--tokenizer={tok}", f"--data_dir={out}", "--val_documents=1", "--workers=2"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", small_blocks, *argv]
    run = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True)
    workers: list[int] = []
    end = time.monotonic() + 60
    while not (workers and (out / ".preparing" / "state.json").exists()):
        assert run.poll() is None, "it ended before a worker was killed"
        assert time.monotonic() < end
        time.sleep(0.02)
        workers = [pid for pid, command in session(run.pid).items() if "spawn_main" in command]
    os.kill(workers[0], signal.SIGKILL)
    _, err = run.communicate(timeout=60)
    assert (run.returncode, err.count("\n")) == (2, 1), err
    assert "a worker process was killed" in err
    end = time.monotonic() + 5
    while session(run.pid) and time.monotonic() < end:
        time.sleep(0.02)
    assert session(run.pid) == {}
    again = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert (again.returncode, again.stderr) == (0, "")
    assert "continuing after" in again.stdout
    cache = {text: expected(tok, [text]) for text in set(texts)}
    assert ids(out, "val") == cache[texts[0]]
    assert ids(out) == [i for text in texts[1:] for i in cache[text]]
