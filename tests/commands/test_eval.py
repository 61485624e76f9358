"""folio eval: the results for a model, and what is refused."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from children import Spawn, to_its_end
from conftest import SMALL, STORY, Outcome, assert_refused, tree
from tokenizer_kinds import SPELLINGS
from torch.nn import functional as F

from folio.checkpoints import find
from folio.data.tokenizers import Bytes, Tokenizer
from folio.model.gpt import GPT

tokenizers = pytest.importorskip("tokenizers")

Run = Callable[..., Outcome]
HERE = ["--device=cpu", "--dtype=float32", "--matmul_precision=highest"]


def kept(out: Path) -> list[dict[str, Any]]:
    """The records of evaluations.jsonl."""
    return [json.loads(line) for line in (out / "evaluations.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("split", ["val", "train"])
def test_the_whole_split(folio: Run, finished: Path, story: Path, tmp_path: Path, split: str) -> None:
    """Every token except the first counts once, predicted from the tokens before it in its window."""
    out = shutil.copytree(finished, tmp_path / "out")
    code, said, _ = folio("eval", f"--out_dir={out}", f"--split={split}", *HERE)
    assert code == 0
    model, block = find.by_name(str(out)).model(), 16
    text = STORY.read_text(encoding="utf-8")
    text = text[int(len(text) * 0.9) :] if split == "val" else text[: int(len(text) * 0.9)]
    ids = torch.from_numpy(find.by_name(str(out)).tokenizer().encode(text).astype("int64"))
    nats = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, block):
            row = ids[start : start + block + 1]
            logits = model.lm_head(model.hidden(row[None, :-1]))[0]
            nats += F.cross_entropy(logits, row[1:], reduction="sum").item()
    (found,) = kept(out)
    mean, size = nats / (len(ids) - 1), len(text[1:].encode())
    assert found["loss"] == pytest.approx(mean, abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(mean), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert (found["tokens"], found["bytes"], found["step"], found["split"]) == (len(ids) - 1, size, 10, split)
    assert f"{split} loss {mean:.4f} nats per token, perplexity {math.exp(mean):.4g}" in said


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_bits_are_per_byte_of_text(folio: Run, gpt2: Tokenizer, tmp_path: Path, name: str) -> None:
    """A character may be several tokens or bytes. An end-of-text counts in the nats, not in the bytes."""
    tokenizer = gpt2 if name == "gpt2" else Bytes()
    texts = ["The ferry – naïve, 渡し船.", "Left at noon.", "🚢 and nobody saw it go. " * 40]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
    sources = [str(tmp_path / f"{number}.txt") for number in range(3)]
    data, out = tmp_path / "data", tmp_path / "out"
    argv = [*sources, f"--tokenizer={name}", f"--data_dir={data}", "--val_documents=2"]
    assert folio("prepare", *argv).code == 0
    assert folio("train", *SMALL, "--max_iters=1", f"--data_dir={data}", f"--out_dir={out}").code == 0
    assert folio("eval", f"--out_dir={out}", *HERE).code == 0
    ids = np.fromfile(data / "val.bin", dtype=np.uint16)[1:].tolist()
    assert (tokenizer.eot in ids) == (name == "gpt2")
    size = len(tokenizer.bytes([i for i in ids if i != tokenizer.eot]))
    (found,) = kept(out)
    assert (found["tokens"], found["bytes"]) == (len(ids), size)
    assert found["bits_per_byte"] == pytest.approx(found["loss"] * len(ids) / size / math.log(2))


@pytest.mark.parametrize("name", SPELLINGS)
def test_bits_are_per_byte_of_decoded_documents(
    folio: Run, spelling: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    """If ids have no bytes of their own, the bytes are those of the documents as the library decodes them."""
    fast = tokenizers.Tokenizer.from_file(str(spelling(name)))
    texts = [text.strip() for text in STORY.read_text(encoding="utf-8").split("\n\n")][:9]
    texts[1:2] = [texts[1] + " 渡し船 🚢 left" if name == "fallback" else texts[1]]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
    data, out = tmp_path / "data", tmp_path / "out"
    sources = sorted(str(path) for path in tmp_path.glob("*.txt"))
    argv = [*sources, f"--tokenizer={spelling(name)}", f"--data_dir={data}", "--val_documents=6"]
    assert folio("prepare", *argv).code == 0
    assert folio("train", *SMALL, "--max_iters=1", f"--data_dir={data}", f"--out_dir={out}").code == 0
    assert folio("eval", f"--out_dir={out}", *HERE).code == 0
    (found,) = kept(out)
    each = [fast.encode(text, add_special_tokens=False).ids for text in texts[:6]]
    decoded = [fast.decode(ids) for ids in each]
    if name == "wordpiece":  # it has no end-of-text, so documents are not separated
        decoded = [" ".join(decoded)]
    elif name == "fallback":
        assert decoded == texts[:6]
    size = len("".join(decoded).encode()) - len(fast.decode(each[0][:1]).encode())
    assert found["bytes"] == size
    assert found["bits_per_byte"] == pytest.approx(found["loss"] * found["tokens"] / size / math.log(2))
    alone = sum(len(fast.decode([i]).encode()) for ids in each for i in ids) - len(fast.decode(each[0][:1]).encode())
    assert alone < 0.95 * size  # the sum over single ids is wrong


def test_the_data_of_the_run_or_other_data(folio: Run, finished: Path, story: Path, tmp_path: Path) -> None:
    """A data set that is named has precedence over the run's."""
    out, other = shutil.copytree(finished, tmp_path / "out"), shutil.copytree(story, tmp_path / "data" / "other")
    assert folio("eval", f"--out_dir={out}", "--eval_iters=1", *HERE).code == 0
    assert folio("eval", f"--out_dir={out}", "--eval_iters=1", f"--data_dir={other}", *HERE).code == 0
    assert_refused(folio("eval", f"--out_dir={out}", "--dataset=nowhere", *HERE), "data/nowhere")
    first, second = kept(out)
    assert (first["data"], second["data"]) == (str(story), str(other))
    assert first["loss"] == second["loss"]


def test_a_model_of_another_folder_is_only_read(folio: Run, finished: Path, story: Path, items: Path) -> None:
    """Only the run of out_dir gets an evaluations.jsonl."""
    before = tree(finished)
    assert folio("eval", f"--init_from={finished}", f"--data_dir={story}", *HERE).code == 0
    assert folio("eval", "hellaswag", f"--init_from={finished}", f"--data={items}", *HERE).code == 0
    assert tree(finished) == before


@pytest.mark.parametrize("style", ["completion", "harness"])
def test_hellaswag(folio: Run, finished: Path, items: Path, tmp_path: Path, style: str) -> None:
    out = shutil.copytree(finished, tmp_path / "out")
    code, said, _ = folio(
        "eval", "hellaswag", f"--out_dir={out}", f"--style={style}", f"--data={items}", "--limit=8", *HERE
    )
    (found,) = kept(out)
    assert code == 0
    assert (found["kind"], found["style"], found["total"], found["step"]) == ("hellaswag", style, 8, 10)
    right = round(8 * found["acc_norm"])
    assert f"HellaSwag acc_norm {right / 8:.4f} ({right}/8), acc {found['acc']:.4f}, {style}" in said
    assert "of 8 HellaSwag items are longer than the model's context: their beginnings are left out" in said


@pytest.mark.slow
@pytest.mark.parametrize(("what", "parallel"), [("loss", "ddp"), ("hellaswag", "fsdp")])
def test_several_processes_have_the_same_result(
    folio: Run, spawn: Spawn, finished: Path, items: Path, tmp_path: Path, what: str, parallel: str
) -> None:
    out = shutil.copytree(finished, tmp_path / "out")
    argv = [what, f"--out_dir={out}", *HERE, *([f"--data={items}"] if what == "hellaswag" else [])]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "folio", "eval"]
    to_its_end(spawn(*launcher, *argv, f"--parallel={parallel}", threads=1))
    assert folio("eval", *argv).code == 0
    two, one = kept(out)
    assert two == {k: pytest.approx(v, abs=1e-5) if isinstance(v, float) else v for k, v in one.items()}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--out_dir=nowhere"], ["nowhere"]),
        (["hellaswag", "--out_dir=nowhere", "--limit=-1"], ["limit=-1", "at least 0"]),
        (["--style=harness"], ["--style", "folio eval hellaswag", "loss"]),
        (["hellaswag", "--split=val"], ["--split", "folio eval loss", "hellaswag"]),
        (["hellaswag", "--data=nowhere.jsonl"], ["nowhere.jsonl: there is no such file"]),
        (["perplexity"], ["perplexity", "hellaswag"]),
        (["--split=test"], ["test", "train", "val"]),
        (["--limit=3"], ["--limit", "folio eval hellaswag and lm_eval", "loss"]),
        (["hellaswag", "--data_dir=nowhere"], ["--data_dir", "folio eval loss", "hellaswag"]),
        (["--checkpoint=7"], ["'7'", "10"]),
    ],
)
def test_invalid_options_are_refused_and_change_nothing(
    folio: Run, finished: Path, argv: list[str], words: list[str]
) -> None:
    before = tree(finished)
    argv = argv if any(word.startswith("--out_dir") for word in argv) else [*argv, f"--out_dir={finished}"]
    assert_refused(folio("eval", *argv, *HERE), *words)
    assert tree(finished) == before


def test_other_token_ids_are_refused(folio: Run, finished: Path, tmp_path: Path) -> None:
    """Characters of another text, or more ids than the model has: a loss would be meaningless."""
    other = tmp_path / "other.txt"
    other.write_text("abcdefgh " * 200)
    folio("prepare", str(other), "--tokenizer=char", f"--data_dir={tmp_path / 'characters'}")
    folio("prepare", str(other), "--tokenizer=bytes", f"--data_dir={tmp_path / 'bytes'}")
    for name in ("characters", "bytes"):
        outcome = folio("eval", f"--out_dir={finished}", f"--data_dir={tmp_path / name}", *HERE)
        assert_refused(outcome, tmp_path / name, "token ids are not those", "--data_dir")


def test_a_split_without_text(folio: Run, gpt2: Tokenizer, tmp_path: Path) -> None:
    """Only end-of-text tokens: there are no bits per byte, and the record has null."""
    for split in ("train", "val"):
        np.full(500, 50256, dtype=np.uint16).tofile(tmp_path / f"{split}.bin")
    out = tmp_path / "out"
    assert folio("train", *SMALL, "--max_iters=1", f"--data_dir={tmp_path}", f"--out_dir={out}").code == 0
    assert folio("eval", f"--out_dir={out}", *HERE).code == 0
    assert (kept(out)[0]["bytes"], kept(out)[0]["bits_per_byte"]) == (0, None)


def test_a_result_that_cannot_be_kept(folio: Run, finished: Path, tmp_path: Path) -> None:
    """It is still printed."""
    out = shutil.copytree(finished, tmp_path / "out")
    (out / "evaluations.jsonl").mkdir()
    with pytest.warns(UserWarning, match=r"evaluations.jsonl could not be written \(.*\): the result is not kept"):
        outcome = folio("eval", f"--out_dir={out}", *HERE)
    assert outcome.code == 0
    assert "val loss" in outcome.out


def test_tokens_that_the_model_lacks(folio: Run, items: Path, tmp_path: Path) -> None:
    """Files without a tokenizer are not taken for GPT-2's if the model has 256 ids, so text cannot be encoded."""
    for split in ("train", "val"):
        np.arange(500, dtype=np.uint16).__mod__(256).tofile(tmp_path / f"{split}.bin")
    out = tmp_path / "out"
    argv = ["train", *SMALL, "--max_iters=1", "--vocab_size=256", f"--data_dir={tmp_path}", f"--out_dir={out}"]
    watched = folio(*argv, "--hellaswag_interval=1", f"--hellaswag_data={items}")
    assert_refused(watched, tmp_path, "nothing says what the token ids")
    assert not out.exists()
    assert folio(*argv).code == 0
    assert_refused(folio("eval", "hellaswag", f"--out_dir={out}", f"--data={items}", *HERE), "nothing says", "256")


def test_items_with_characters_outside_the_vocabulary(folio: Run, finished: Path, tmp_path: Path) -> None:
    """The line names the item and the characters."""
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps({"ctx": "Ça va", "endings": ["a", "b", "c", "d"], "label": 0}), encoding="utf-8")
    assert_refused(
        folio("eval", "hellaswag", f"--out_dir={finished}", f"--data={path}", *HERE), "item 1", "'Ç'", "bytes or words"
    )


@pytest.mark.parametrize("argv", [["eval"], ["eval", "hellaswag"], ["sample"]], ids=" ".join)
def test_an_interrupt_is_one_line(
    folio: Run, finished: Path, items: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str]
) -> None:
    """Ctrl-C while the model computes."""
    before, kill = tree(finished), signal.SIGINT
    monkeypatch.setattr(GPT, "hidden", lambda *_, **__: os.kill(os.getpid(), kill))
    more = {"hellaswag": [f"--data={items}"]}
    handler = signal.signal(kill, signal.default_int_handler)
    try:
        outcome = folio(*argv, *more.get(argv[-1], []), *HERE, f"--out_dir={finished}")
    finally:
        signal.signal(kill, handler)
    assert_refused(outcome, "interrupted", code=130)
    assert tree(finished) == before
