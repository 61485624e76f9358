"""HellaSwag as build-nanogpt scores it, item by item; what is no file of items; where one comes from."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import STORY, make_pipe, tree
from servers import server
from torch import Tensor
from torch.nn import functional as F

from folio.config.options import System
from folio.data.tokenizers import Bytes, Characters, Tokenizer, TokenizersFile, named
from folio.evaluation import hellaswag
from folio.evaluation.hellaswag import Item, Questions
from folio.machine.choices import resolve
from folio.machine.runtime import Runtime
from folio.model.config import GPTConfig
from folio.model.gpt import GPT

Render = Callable[[dict[str, Any]], tuple[Tensor, Tensor, int]]  # (4, N) tokens, (4, N) mask, label
GOOD = {
    "activity_label": "Ferry",
    "ctx_a": "It left.",
    "ctx_b": "a dog",
    "ctx": "It left. a dog",
    "endings": ["barked.", "sang a song.", "sank.", "was the captain of it."],
    "label": 2,
}


def model_of(vocab_size: int, block_size: int) -> GPT:
    """Far from indifference, in each position and token."""
    model = GPT(GPTConfig(block_size=block_size, vocab_size=vocab_size, n_layer=2, n_head=2, n_embd=16))
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        p.data = torch.randn(p.shape, generator=generator) * 0.3 + (p.dim() == 1 and name.endswith("weight"))
    return model


def wrapped(model: GPT) -> Runtime:
    runtime = Runtime(resolve(System(device="cpu", dtype="float32", compile=False, matmul_precision="highest")))
    runtime.wrap(model, None)
    return runtime


def written(path: Path, *lines: object) -> Path:
    """A file of these lines: bytes and text as they are, anything else as JSON."""
    texts = (line if isinstance(line, (bytes, str)) else json.dumps(line) for line in lines)
    path.write_bytes(b"".join((t if isinstance(t, bytes) else t.encode()) + b"\n" for t in texts))
    return path


def rendered_by(tokenizer: Tokenizer) -> Render:
    """build-nanogpt's render_example, with any tokenizer."""

    def render(example: dict[str, Any]) -> tuple[Tensor, Tensor, int]:
        context = tokenizer.encode(example["ctx"]).tolist()
        endings = [tokenizer.encode(" " + ending).tolist() for ending in example["endings"]]
        tokens = torch.zeros((4, len(context) + max(map(len, endings))), dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for row, ending in enumerate(endings):
            tokens[row, : len(context) + len(ending)] = torch.tensor(context + ending)
            mask[row, len(context) : len(context) + len(ending)] = 1
        return tokens, mask, example["label"]

    return render


def their_render(_: Tokenizer) -> Render:
    """The function itself, out of a checkout that FOLIO_BUILD_NANOGPT names."""
    if not (checkout := os.environ.get("FOLIO_BUILD_NANOGPT")):
        pytest.skip("FOLIO_BUILD_NANOGPT names no checkout of build-nanogpt")
    import tiktoken

    body = ast.parse((Path(checkout) / "hellaswag.py").read_text(encoding="utf-8")).body
    (wanted,) = (node for node in body if getattr(node, "name", "") == "render_example")
    scope: dict[str, Any] = {"torch": torch, "enc": tiktoken.get_encoding("gpt2")}
    exec(compile(ast.Module([wanted], []), "hellaswag.py", "exec"), scope)
    return lambda example: scope["render_example"](example)[1:]


@torch.no_grad()
def one_at_a_time(model: GPT, render: Render, path: Path) -> tuple[list[int], list[int], list[int]]:
    """By sum, by mean, and the labels: build-nanogpt's evaluation, four padded rows and all logits at a time."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        tokens, mask, label = render(json.loads(line))
        logits = model.lm_head(model.hidden(tokens))[:, :-1]
        losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(4, -1)
        sums = (losses * mask[:, 1:]).sum(dim=1)
        found.append((int(sums.argmin()), int((sums / mask[:, 1:].sum(dim=1)).argmin()), int(label)))
    by_sum, by_mean, labels = zip(*found, strict=True)
    return list(by_sum), list(by_mean), list(labels)


def questions(path: Path, tokenizer: Tokenizer, block_size: int, style: Any = "completion") -> Questions:
    return hellaswag.encode(hellaswag.read(path, style), style, tokenizer, GPTConfig(block_size=block_size))


@pytest.fixture
def some(tmp_path: Path, shared_data: Path) -> Callable[[int], Path]:
    """So many real items, from all over the file."""

    def made(count: int) -> Path:
        lines = (shared_data / "hellaswag_val_head5000.jsonl").read_text(encoding="utf-8").splitlines()
        return written(tmp_path / "some.jsonl", *lines[:: len(lines) // count][:count])

    return made


@pytest.mark.parametrize("count", [12, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("render", [rendered_by, their_render], ids=["written here", "theirs"])
def test_completion_is_build_nanogpts(some, gpt2, render, count) -> None:
    path, model = some(count), model_of(gpt2.size, 256)
    by_sum, by_mean, labels = one_at_a_time(model, render(gpt2), path)
    runtime, asked = wrapped(model), questions(path, gpt2, 256)
    found = hellaswag.predictions(model, asked, runtime)
    assert [each.tolist() for each in found] == [by_sum, by_mean]
    assert by_sum != by_mean
    assert asked.labels.tolist() == labels
    right = [sum(p == label for p, label in zip(each, labels, strict=True)) for each in (by_sum, by_mean)]
    figures = {"acc": right[0] / count, "acc_norm": right[1] / count, "total": count}
    assert hellaswag.evaluate(model, asked, runtime) == {"style": "completion", **figures}


@pytest.mark.parametrize("kind", ["bytes", "characters", "file"])
def test_other_tokenizers(tmp_path, tok, items, kind) -> None:
    """Their own tokens, by which completion's mean is taken."""
    made: dict[str, Callable[[], Tokenizer]] = {
        "bytes": Bytes,
        "characters": lambda: Characters("".join(sorted(set(items.read_text(encoding="utf-8"))))),
        "file": lambda: named(str(tok)),
    }
    tokenizer = made[kind]()
    model = model_of(tokenizer.size, 256)
    by_sum, by_mean, _ = one_at_a_time(model, rendered_by(tokenizer), items)
    found = hellaswag.predictions(model, questions(items, tokenizer, 256), wrapped(model))
    assert [each.tolist() for each in found] == [by_sum, by_mean]


def test_a_tokenizer_that_lacks_a_character(tmp_path) -> None:
    """The item is named, in either style."""
    path = written(tmp_path / "items.jsonl", GOOD, GOOD | {"ctx": "It left für a dog.", "ctx_a": "It left für a dog."})
    alphabet = Characters("".join(sorted(set(json.dumps(GOOD) + "A"))))
    for style in ("completion", "harness"):
        with pytest.raises(ValueError, match=r"^HellaSwag item 2: the vocabulary of \d+ characters lacks 'ü'"):
            questions(path, alphabet, 99, style)


def test_an_ending_that_melts_into_its_context(tmp_path) -> None:
    """Where a tokenizer merges across words, the harness's way may leave an ending no token of its own."""
    pytest.importorskip("tokenizers")
    from tokenizers import Tokenizer, models

    vocab = {c: i for i, c in enumerate(sorted({*map(chr, range(32, 127)), "g sank", "g s", "g sa", "g san", "g "}))}
    merges = [("g", " "), ("g ", "s"), ("g s", "a"), ("g sa", "n"), ("g san", "k")]
    merging = TokenizersFile(Tokenizer(models.BPE(vocab, merges)).to_str())
    path = written(tmp_path / "items.jsonl", GOOD | {"endings": ["sank", "sank", "barked", "sang"]})
    with pytest.raises(ValueError, match="HellaSwag item 1"):
        questions(path, merging, 99, "harness")


def test_what_is_cut(tmp_path) -> None:
    """The front of an item that is longer than the model's context; its endings stay, and a line says how many."""
    path = written(tmp_path / "items.jsonl", GOOD, GOOD | {"ctx": "Once. " * 9 + GOOD["ctx"]}, GOOD)
    whole, cut = questions(path, Bytes(), 99), questions(path, Bytes(), 40)
    assert (whole.cut, whole.note) == (0, "")
    assert (cut.cut, len(cut.queries)) == (1, 1 + 4 + 1)
    assert cut.note == "1 of 3 HellaSwag items are longer than the model's context: their beginnings are left out"
    assert [c for q in cut.queries for c in q.continuations] == [c for q in whole.queries for c in q.continuations]
    assert cut.lengths.tolist() == whole.lengths.tolist()
    model = model_of(256, 99)
    short = GPT(GPTConfig(**{**vars(model.config), "block_size": 40}))
    short.load_state_dict({k: v[:40] if "wpe" in k else v for k, v in model.state_dict().items()})
    found = [hellaswag.predictions(m, q, wrapped(m))[0] for m, q in ((model, whole), (short, cut))]
    assert [f[[0, 2]].tolist() for f in found] == [found[0][[0, 2]].tolist()] * 2


# Files


def test_the_first_items(tmp_path) -> None:
    """Beyond the limit nothing is looked at."""
    path = written(tmp_path / "items.jsonl", GOOD, GOOD | {"label": "1"}, "{")
    assert [item.label for item in hellaswag.read(path, "completion", limit=2)] == [2, 1]


def test_the_styles_of_an_item(tmp_path) -> None:
    path = written(tmp_path / "items.jsonl", GOOD)
    endings = [" barked.", " sang a song.", " sank.", " was the captain of it."]
    assert hellaswag.read(path, "completion") == [Item("It left. a dog", endings, None, 2)]
    assert hellaswag.read(path, "harness") == [Item("Ferry: It left. A dog", endings, [7, 12, 5, 22], 2)]


BROKEN: dict[str, tuple[object, str]] = {
    "half a line": ('{"ctx": "It', "not a HellaSwag item"),
    "no object": ("[1, 2]", "JSON object"),
    "not UTF-8": (b'{"ctx": "\xff"}', "utf-8"),
    "three endings": (GOOD | {"endings": ["a", "b", "c"]}, "four texts"),
    "an empty ending": (GOOD | {"endings": ["a", "", "c", "d"]}, "four texts"),
    "an ending that is a number": (GOOD | {"endings": ["a", "b", "c", 4]}, "four texts"),
    "label 4": (GOOD | {"label": 4}, "label is 4"),
    "label -1": (GOOD | {"label": "-1"}, "label is '-1'"),
    "label true": (GOOD | {"label": True}, "label is True"),
    "label 2.0": (GOOD | {"label": 2.0}, "label is 2.0"),
    "a label that is long": (GOOD | {"label": "2" * 10**6}, f"label is '{'2' * 39}: must"),
    "a label that is a list": (GOOD | {"label": [2]}, "label is a list"),
    "a label that is deep": (json.dumps(GOOD).replace(" 2}", "[" * 900 + "]" * 900 + "}"), "nested too deeply"),
    "deep": ("[" * 100_000, "nested too deeply"),
    "beyond float": (json.dumps(GOOD)[:-1] + ', "ind": 1e999}', "1e999"),
    "beyond int": (json.dumps(GOOD)[:-1] + f', "ind": {"9" * 5000}}}', "digits"),
    "five endings": (GOOD | {"endings": ["a"] * 5}, "four texts"),
    "endings that are one text": (GOOD | {"endings": "abcd"}, "four texts"),
    "a line that is too long": ('{"ctx": "' + "a" * (1 << 24), "longer than 16,777,216 bytes"),
    "test split": (GOOD | {"label": ""}, "validation split"),
    "no label": ({k: v for k, v in GOOD.items() if k != "label"}, "'label'"),
    "no endings": ({k: v for k, v in GOOD.items() if k != "endings"}, "'endings'"),
    "an empty context": (GOOD | {"ctx": " ", "ctx_a": "", "ctx_b": "", "activity_label": ""}, "empty or not text"),
    "a context of numbers": (GOOD | {"ctx": [1], "ctx_a": [1]}, "empty or not text"),
}


@pytest.mark.parametrize("style", ["completion", "harness"])
@pytest.mark.parametrize("case", BROKEN)
def test_a_line_that_is_no_item(tmp_path, case, style) -> None:
    """The file, the line and what is amiss, in one line; in a file of more than one buffer, too."""
    broken, word = BROKEN[case]
    path = written(tmp_path / "items.jsonl", *[GOOD] * 99, broken)
    with pytest.raises(ValueError, match="not a HellaSwag item") as told:
        hellaswag.read(path, style)
    assert str(told.value).startswith(f"{path}:100: ")
    assert word in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("name", ["ctx_a", "ctx_b", "activity_label"])
def test_what_the_harness_style_needs(tmp_path, name) -> None:
    path = written(tmp_path / "items.jsonl", {k: v for k, v in GOOD.items() if k != name})
    assert len(hellaswag.read(path, "completion")) == 1
    with pytest.raises(ValueError, match=f"{path}:1: .*it has no '{name}'"):
        hellaswag.read(path, "harness")


def test_marks_alone(tmp_path) -> None:
    path = written(tmp_path / "items.jsonl", GOOD | {"endings": ["[step]", "b", "c", "d"]})
    with pytest.raises(ValueError, match=f"{path}:1: .*marks"):
        hellaswag.read(path, "harness")


def test_marks_are_left_out_in_linear_time() -> None:
    """As re.sub(r"\\[.*?\\]", "") leaves them out, whose time grows with the square of what has no end."""
    chance = random.Random(5)
    for _ in range(2000):
        text = "x" + "".join(chance.choices(["[", "]", "a", "\n", "[b]", " "], k=12)) + "x"
        assert hellaswag._clean(text) == re.sub(r"\[.*?\]", "", text).replace("  ", " ")
    for text in ("[" * 10**6, "[\n" * 10**6, "]" * 10**6, "[" * 10**6 + "]x", "a]" + "[" * 10**6, "[]" * 10**6 + "["):
        begun = time.process_time()
        hellaswag._clean(text)
        assert time.process_time() - begun < 5, text[:9]


def test_no_items(tmp_path) -> None:
    path = written(tmp_path / "items.jsonl")
    with pytest.raises(ValueError, match=f"^{path}: it holds no items"):
        hellaswag.read(path, "completion")


# Where the file comes from


@pytest.fixture
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory and a clone without data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(hellaswag, "CLONE", tmp_path / "clone")
    return tmp_path


def test_it_is_downloaded_once(empty_folder, monkeypatch, items) -> None:
    content = items.read_bytes()
    monkeypatch.setattr(hellaswag, "SHA256", hashlib.sha256(content).hexdigest())
    with server(content) as url:
        monkeypatch.setattr(hellaswag, "URL", url)
        assert hellaswag.locate("") == hellaswag.FILE
    assert {name for name, held in tree(empty_folder).items() if held} == {str(hellaswag.FILE)}
    assert hellaswag.FILE.read_bytes() == content
    assert hellaswag.locate("") == hellaswag.FILE  # nobody serves it any more


def test_another_file_is_refused(empty_folder, monkeypatch) -> None:
    """The line names the address and the way round; nothing is left for the next attempt to trust."""
    with server(STORY.read_bytes()) as url:
        monkeypatch.setattr(hellaswag, "URL", url)
        reason = rf"SHA-256 \w+, not {hellaswag.SHA256}: download {url} .*--hellaswag_data=FILE "
        with pytest.raises(ValueError, match=f"^the download has {reason}"):
            hellaswag.locate("")
    assert tree(empty_folder) == {}


def test_the_nearest_file_is_taken(empty_folder) -> None:
    """The one that is named, else the working directory's, else the clone's."""
    for place in ("clone", "."):
        path = Path(place) / hellaswag.FILE
        path.parent.mkdir(parents=True)
        path.touch()
        assert hellaswag.locate("").resolve() == path.resolve()
    assert hellaswag.locate(__file__) == Path(__file__)


def test_no_such_file(empty_folder) -> None:
    with pytest.raises(FileNotFoundError, match=r"^no/such.jsonl: there is no such file"):
        hellaswag.locate("no/such.jsonl")


@pytest.mark.parametrize("kind", ["a folder", "a pipe", "a device"])
def test_pipes_and_devices_are_refused(empty_folder, kind) -> None:
    {"a folder": os.mkdir, "a pipe": make_pipe, "a device": lambda p: os.symlink("/dev/zero", p)}[kind]("items.jsonl")
    with pytest.raises(ValueError, match=f"^items.jsonl is {kind}, not a file"):
        hellaswag.locate("items.jsonl")
