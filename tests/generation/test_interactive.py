"""A session: the texts are those of the command without it, whole characters at a time; Ctrl-C stops a text only."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Outcome
from tokenizer_kinds import WIDE

from folio import api, rng
from folio.config.options import Sampling
from folio.data.decoding import decode
from folio.data.tokenizers import Bytes, Characters, Tokenizer, named
from folio.errors import UserError
from folio.generation.sampling import LINE, continuations, draws, encode_prompt, generate, streamed
from folio.model.config import GPTConfig
from folio.model.gpt import GPT

HOW = ("--max_new_tokens=40", "--device=cpu", "--dtype=float32")
TERMINAL = "import os, sys; os.login_tty(0); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"


@pytest.fixture(params=["bytes", "characters", "bpe", "fallback"])
def each(request: pytest.FixtureRequest, tok: Path, spelling: Callable[[str], Path]) -> Tokenizer:
    """Tokenizers; all but the characters have ids that are parts of a character."""
    kinds: dict[str, Callable[[], Tokenizer]] = {
        "bytes": Bytes,
        "characters": lambda: Characters("".join(sorted(set(WIDE)))),
        "bpe": lambda: named(str(tok)),
        "fallback": lambda: named(str(spelling("fallback"))),
    }
    return kinds[request.param]()


@torch.no_grad()
def speaker(tokenizer: Tokenizer, text: str) -> GPT:
    """A model in float64 of random weights, which mostly draws ids of the text."""
    model = GPT(GPTConfig(block_size=16, vocab_size=tokenizer.size, n_layer=1, n_head=2, n_embd=16))
    model.lm_head = torch.nn.Linear(16, tokenizer.size)
    for name, p in model.named_parameters():
        p.normal_(0.0, 0.3, generator=rng.generator(name))
    model.lm_head.bias[tokenizer.encode(text).astype(int)] += 6
    return model.double().eval()


def test_what_is_streamed_is_the_text_of_the_command(each: Tokenizer) -> None:
    """Piece by piece, for any sample, and without a part of a character at the end of a piece."""
    model, how = speaker(each, WIDE), Sampling("The ferry", num_samples=3, max_new_tokens=200, top_k=0)
    prompt, ids = encode_prompt("start", how.start, each, model.config)
    whole = continuations(model, each, how, seed=5)
    assert len(set(whole)) == 3
    for number, text in enumerate(whole):
        pieces = list(streamed(model, each, (prompt, ids), how, 5, number))
        assert "".join(pieces) == text
        assert len(list(filter(None, pieces))) > 20
        assert ("" in pieces[:-1]) == (not isinstance(each, Characters))  # a part of a character waits for the rest
        drawn = generate(
            model, torch.tensor([ids]), 200, temperature=0.8, uniform=draws(5, 1, 200, number), vocab_size=each.size
        )
        assert text == decode(each, drawn[0].tolist())


def sampled(out: str) -> list[str]:
    *texts, rest = out.split(f"\n{LINE}\n")
    assert rest == ""
    return texts


@pytest.fixture
def session(folio: Callable[..., Outcome], finished: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Runs a session in this process with these bytes on its standard input, which is a pipe."""

    def run(content: bytes, *argv: str) -> Outcome:
        reader, writer = os.pipe()
        os.write(writer, content)
        os.close(writer)
        with open(reader, encoding="ascii") as stream:
            monkeypatch.setattr(sys, "stdin", stream)
            return folio("sample", "--interactive", f"--out_dir={finished}", *HOW, *argv)

    return run


def test_prompts_through_a_pipe(session: Callable[..., Outcome], folio: Callable[..., Outcome], finished: Path) -> None:
    """Prompt n draws sample n of the command; the same input gives the same output; an empty line is no prompt."""
    lines = "The \n\nriver\nThe \nThe river was slow that morning"  # the last is longer than block_size
    command = [sys.executable, "-m", "folio", "sample", "--interactive", f"--out_dir={finished}", *HOW]
    done = subprocess.run(command, cwd=ROOT, input=lines, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert session(lines.encode()).out == done.stdout
    prompts = ["The ", "river", "The ", "The river was slow that morning"]
    for number, (prompt, text) in enumerate(zip(prompts, sampled(done.stdout), strict=True)):
        alone = folio("sample", f"--out_dir={finished}", *HOW, f"--start={prompt}", f"--num_samples={number + 1}")
        assert sampled(alone.out)[number] == text
        assert len(text) == len(prompt) + 40


def test_typed_options(session: Callable[..., Outcome], folio: Callable[..., Outcome], finished: Path) -> None:
    """start is the first prompt, and num_samples are drawn one after another, for each prompt new ones."""
    texts = sampled(session(b"The \n", "--start=The ", "--num_samples=2").out)
    alone = folio("sample", f"--out_dir={finished}", *HOW, "--start=The ", "--num_samples=4")
    assert texts == sampled(alone.out)
    assert len(set(texts)) == 4
    assert session(b"", "--seed=3").out == ""


def test_lines_that_are_refused(session: Callable[..., Outcome]) -> None:
    """Each is one line on stderr and draws no sample; a script learns of it by the exit code."""
    done = session("€\nThe \nFILE:nowhere.txt\n".encode() + b"\xff\n/quit\nThe \n")
    assert done.code == 2
    assert sampled(done.out) == sampled(session(b"\xef\xbb\xbfThe \n").out)  # a byte order mark is no character
    first, second, third = done.err.splitlines()
    assert first == "prompt: the vocabulary of 59 characters lacks '€': remove such characters from the text"
    assert second == "prompt=FILE:nowhere.txt: nowhere.txt: No such file or directory"
    assert third == "prompt has bytes that are not UTF-8 text"
    refused = session(b"The \n", "--start=€")
    assert (refused.code, refused.out, refused.err.count("\n")) == (2, "", 1)


def test_no_input(finished: Path) -> None:
    """A closed standard input is an empty one."""
    line = f'"{sys.executable}" -m folio sample --interactive --out_dir="{finished}" --device=cpu <&-'
    done = subprocess.run(["sh", "-c", line], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_only_the_command_is_interactive(finished: Path) -> None:
    with pytest.raises(UserError, match="works only in the command folio sample: call this once for each prompt"):
        api.generate("The", out_dir=str(finished), interactive=True)


class Terminal:
    """The command in a process of its own, whose terminal is a pseudo-terminal."""

    def __init__(self, *argv: str) -> None:
        self._ours, theirs = os.openpty()
        command = [sys.executable, "-c", TERMINAL, "-m", "folio", "sample", "--interactive", *argv]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TERM": "dumb"}
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=env, start_new_session=True
        )
        os.close(theirs)
        os.set_blocking(self._ours, False)
        self._seen = ""

    def type(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def until(self, text: str) -> str:
        """What appears up to this text, with plain line ends."""
        end = time.monotonic() + 120
        while text not in self._seen:
            assert time.monotonic() < end, self._seen
            try:
                self._seen += os.read(self._ours, 1 << 16).decode().replace("\r\n", "\n")
            except BlockingIOError:
                time.sleep(0.01)
            except OSError:
                pytest.fail(f"the session ended before {text!r}:\n{self._seen}")
        before, _, self._seen = self._seen.partition(text)
        return before + text

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._ours)


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def start(*argv: str) -> Terminal:
        opened.append(Terminal(*argv))
        return opened[-1]

    yield start
    for each in opened:
        each.close()


def test_ctrl_c_stops_the_text_and_not_the_program(terminal: Callable[..., Terminal], finished: Path) -> None:
    """In the middle of a text, and of a line; the next prompt is answered, and Ctrl-D leaves with exit code 0."""
    user = terminal(f"--out_dir={finished}", "--max_new_tokens=1000000", "--device=cpu", "--dtype=float32")
    introduction = user.until("> ")
    assert introduction.count("\n") == 1
    assert "Ctrl-C stops a text; Ctrl-D or /quit ends" in introduction
    texts = []
    for _ in range(2):
        user.type("The \n")
        user.until("The \nThe ")  # the line as it was typed, and the beginning of the text
        time.sleep(0.3)
        user.type("\x03")
        texts.append(user.until(f"\n{LINE}\n> "))
        assert len(texts[-1]) > 40
    assert texts[0][:20] != texts[1][:20]
    user.type("€\n")
    assert "lacks '€': remove such characters from the text\n> " in user.until("text\n> ")
    user.type("half a")
    user.until("half a")
    user.type("\x03")
    user.until("\n> ")
    user.type("\x04")
    assert user.process.wait(60) == 0


@pytest.mark.slow
def test_the_history_is_kept(
    terminal: Callable[..., Terminal], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The arrow key brings back the lines of the session before; /quit leaves."""
    pytest.importorskip("readline")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    for word in ("ferry", "\x1b[A\x1b[A"):
        user = terminal(f"--out_dir={finished}", *HOW)
        user.until("> ")
        time.sleep(0.2)  # until the line is read key by key
        user.type(f"{word}\n")
        user.until("ferry\n")
        user.until(f"\n{LINE}\n> ")
        user.type("/quit\n")
        assert user.process.wait(60) == 0
    path = tmp_path / "folio" / "prompts"
    assert path.read_text().split() == ["ferry", "/quit"] * 2
    assert path.stat().st_mode & 0o077 == 0
