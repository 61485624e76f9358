"""Ids of data stand for the same text as the model's: in training, on resume, in evaluation, in a mixture."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import SMALL, STORY, Outcome, assert_refused, tree

from folio.checkpoints import find
from folio.data.tokenizer_comparison import difference
from folio.data.tokenizers import Bytes, Characters, Tiktoken, TokenizersFile, named
from folio.preparation.job import prepare
from folio.preparation.recipes import known, named_by_user
from folio.records import run_folder

Folio = Callable[..., Outcome]


def swapped(text: str) -> str:
    """The text with one character replaced by another that it does not have."""
    return text.replace("e", "é")


@pytest.fixture
def out(story: Path, tmp_path: Path, folio: Folio) -> Path:
    """A run of two steps over characters."""
    argv = [*SMALL, "--max_iters=2", f"--data_dir={story}", f"--out_dir={tmp_path / 'out'}"]
    assert folio("train", *argv).code == 0
    return tmp_path / "out"


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A data set with as many characters as the run's, one of them different."""
    (tmp_path / "other.txt").write_text(swapped(STORY.read_text(encoding="utf-8")), encoding="utf-8")
    prepare(known("shakespeare_char", tmp_path / "other", str(tmp_path / "other.txt"), {}), tmp_path / "other")
    return tmp_path / "other"


def by(tokenizer: str, folder: Path, text: Path = STORY) -> Path:
    prepare(named_by_user([str(text)], folder.name, tokenizer=tokenizer), folder)
    return folder


def learned(folio: Folio, path: Path, text: Path) -> Path:
    assert folio("tokenizer", "train", text, "--vocab_size=300", f"--out={path}").code == 0
    return path


def test_the_same_ids_from_two_programs(gpt2: Tiktoken, tok: Path) -> None:
    spec = {"kind": "tokenizers", "file": json.loads(gpt2.fast().to_str())}
    assert difference(spec, gpt2.to_json()) == ""
    assert difference(gpt2.to_json(), spec) == ""
    characters = Characters("abc")
    file = {"kind": "tokenizers", "file": json.loads(characters.fast().to_str())}
    assert difference(characters.to_json(), file) == ""
    assert difference(file, characters.to_json()) == ""
    assert difference(named(str(tok)).to_json(), TokenizersFile(tok.read_text()).to_json()) == ""


def test_a_model_may_know_more_ids_than_the_data_has() -> None:
    assert difference(Characters("abc").to_json(), Characters("abcd").to_json()) == ""
    assert "which has no id 3" in difference(Characters("abcd").to_json(), Characters("abc").to_json())


def test_ids_that_differ_are_named(gpt2: Tiktoken, tok: Path) -> None:
    file = named(str(tok)).to_json()
    assert "id 2 is 'c', not 'd'" in difference(Characters("abc").to_json(), Characters("abd").to_json())
    assert "bytes, not gpt2 of tiktoken: id 0 is '\\x00', not '!'" in difference(Bytes().to_json(), gpt2.to_json())
    assert difference(file, gpt2.to_json()).startswith("a BPE file of the tokenizers library, not gpt2 of tiktoken")
    # no id can be compared if only the name of a tokenizer is known
    acme = {"kind": "datatrove", "name": "acme/bpe"}
    assert difference(acme, gpt2.to_json()) == "acme/bpe, not gpt2 of tiktoken"
    assert difference(acme, file) == ""  # whose name is not known


def test_words_that_differ_by_a_space_alone_are_not_the_same() -> None:
    import tokenizers
    from tokenizers import decoders, models

    def file(*pieces: str) -> dict[str, object]:
        made = tokenizers.Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], 0))
        made.decoder = decoders.Metaspace()
        return {"kind": "tokenizers", "file": json.loads(made.to_str())}

    assert difference(file("a", "▁a"), file("a", "▁a")) == ""
    assert "id 1 is '▁a', not 'a'" in difference(file("b", "▁a"), file("b", "a"))


@pytest.mark.parametrize("begin", ["resume", "auto"])
def test_a_resume_over_other_characters_is_refused(begin: str, out: Path, other: Path, folio: Folio) -> None:
    before = tree(out)
    outcome = folio("train", f"--init_from={begin}", f"--out_dir={out}", f"--data_dir={other}", "--max_iters=4")
    assert_refused(outcome, other, "mean something else", "id ", "--data_dir", "--init_from=scratch")
    assert tree(out) == before


@pytest.mark.parametrize("says", [True, False])
def test_a_resume_over_more_ids_is_refused(says: bool, out: Path, tmp_path: Path, folio: Folio) -> None:
    """Also if only the number of ids is known. The error suggests no --vocab_size, since none would fit."""
    data = by("bytes", tmp_path / "bytes")
    if not says:
        (data / "meta.json").unlink()
        (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 256}))
    before = tree(out)
    outcome = folio("train", "--init_from=resume", f"--out_dir={out}", f"--data_dir={data}", "--max_iters=4")
    assert_refused(outcome, data, "mean something else" if says else "below the 256", "the run was trained on")
    assert "--vocab_size" not in outcome.err
    assert tree(out) == before


def test_a_resume_after_the_data_was_made_anew(tmp_path: Path, story: Path, folio: Folio) -> None:
    """The same folder, with another alphabet."""
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(story, data)
    assert folio("train", *SMALL, "--max_iters=2", f"--data_dir={data}", f"--out_dir={out}").code == 0
    (tmp_path / "few.txt").write_text(re.sub("[A-Z]", "x", STORY.read_text(encoding="utf-8")), encoding="utf-8")
    prepare(known("shakespeare_char", data, str(tmp_path / "few.txt"), {}), data, overwrite=True)
    outcome = folio("train", "--init_from=resume", f"--out_dir={out}", "--max_iters=4")
    assert_refused(outcome, data, "mean something else", "characters, not")
    assert folio("eval", f"--out_dir={out}").code == 2


def test_a_resume_over_other_text_of_the_same_tokenizer(tmp_path: Path, folio: Folio) -> None:
    """The run resumes, and its checkpoints keep the tokenizer."""
    one, out = by("bytes", tmp_path / "one"), tmp_path / "out"
    assert folio("train", *SMALL, "--max_iters=2", f"--data_dir={one}", f"--out_dir={out}").code == 0
    (tmp_path / "other.txt").write_text(swapped(STORY.read_text(encoding="utf-8")), encoding="utf-8")
    two = by("bytes", tmp_path / "two", tmp_path / "other.txt")
    outcome = folio("train", "--init_from=resume", f"--out_dir={out}", f"--data_dir={two}", "--max_iters=4")
    assert outcome.code == 0
    assert "exact to rounding only" in outcome.out
    assert find.choose(out, "latest").state["tokenizer"] == {"kind": "bytes"}


@pytest.mark.parametrize("pair", ["characters", "bytes and BPE", "two files of one size"])
def test_fine_tuning_on_other_ids_warns(
    pair: str, tmp_path: Path, folio: Folio, request: pytest.FixtureRequest
) -> None:
    """Evaluation of the base on that data is refused; the new run's checkpoints have the new tokenizer."""
    if pair == "characters":
        first, second = request.getfixturevalue("story"), request.getfixturevalue("other")
    elif pair == "bytes and BPE":
        file = learned(folio, tmp_path / "a.json", STORY)
        first, second = by(str(file), tmp_path / "one"), by("bytes", tmp_path / "two")
    else:
        (tmp_path / "other.txt").write_text(swapped(STORY.read_text(encoding="utf-8")), encoding="utf-8")
        files = [learned(folio, tmp_path / f"{name}.json", STORY) for name in "ab"]
        spec = json.loads(files[1].read_text(encoding="utf-8"))
        vocabulary = spec["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
        files[1].write_text(json.dumps(spec), encoding="utf-8")
        first, second = by(str(files[0]), tmp_path / "one"), by(str(files[1]), tmp_path / "two")
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    assert folio("train", *SMALL, "--max_iters=2", f"--data_dir={first}", f"--out_dir={base}").code == 0

    refused = folio("eval", f"--out_dir={base}", f"--data_dir={second}", "--eval_iters=1")
    assert_refused(refused, second, "are not those of the model of", "id ", "--data_dir")

    argv = [f"--init_from={base}", f"--data_dir={second}", f"--out_dir={tuned}", *SMALL, "--max_iters=1"]
    outcome = folio("train", *argv)
    assert outcome.code == 0, outcome.err
    assert f"warning: the token ids of {second} mean something else to the model of {base}" in outcome.out
    assert "folio export" in outcome.out
    kept = find.choose(tuned, "latest").state["tokenizer"]
    assert kept != find.choose(base, "latest").state["tokenizer"]
    assert folio("eval", f"--out_dir={tuned}", "--eval_iters=1").code == 0  # on its own data


def test_fine_tuning_on_the_same_ids_says_nothing(out: Path, story: Path, tmp_path: Path, folio: Folio) -> None:
    argv = [f"--init_from={out}", f"--data_dir={story}", f"--out_dir={tmp_path / 'tuned'}", *SMALL, "--max_iters=1"]
    assert "mean something else" not in folio("train", *argv).out


def test_files_without_a_tokenizer_are_assumed_to_have_the_models(
    out: Path, story: Path, tmp_path: Path, folio: Folio
) -> None:
    """A folder of nanoGPT without meta.pkl: bits per byte use the model's tokenizer."""
    bare = tmp_path / "bare"
    bare.mkdir()
    for split in ("train", "val"):
        shutil.copy(story / f"{split}.bin", bare)
    said = folio("eval", f"--out_dir={out}").out
    assert folio("eval", f"--out_dir={out}", f"--data_dir={bare}").out == said.replace(str(story), str(bare))
    argv = [f"--init_from={out}", f"--data_dir={bare}", f"--out_dir={tmp_path / 'tuned'}", *SMALL, "--max_iters=1"]
    assert folio("train", *argv).code == 0
    tuned = find.choose(tmp_path / "tuned").state["tokenizer"]
    assert tuned == find.choose(out).state["tokenizer"]


def test_ids_of_an_unknown_tokenizer(story: Path, tmp_path: Path, folio: Folio) -> None:
    """If the vocabulary size is not GPT-2's, the ids have a loss, but no text and no bits per byte."""
    bare, out = tmp_path / "bare", tmp_path / "out"
    bare.mkdir()
    for split in ("train", "val"):
        shutil.copy(story / f"{split}.bin", bare)
    argv = [*SMALL, "--max_iters=1", "--vocab_size=300", f"--data_dir={bare}", f"--out_dir={out}"]
    assert_refused(folio("train", *argv, "--sample_interval=1"), bare, "nothing says what the token ids", "meta.json")
    assert folio("train", *argv).code == 0
    assert find.choose(out).state["tokenizer"] is None
    said = folio("eval", f"--out_dir={out}")
    assert said.code == 0
    assert "no bits per byte, since the tokenizer or the text is unknown" in said.out
    assert_refused(folio("sample", f"--out_dir={out}"), "nothing says what its 300 token ids mean")
    argv = [*SMALL, "--max_iters=1", f"--init_from={out}", f"--data_dir={story}", f"--out_dir={tmp_path / 'tuned'}"]
    tuned = folio("train", *argv)
    assert f"nothing says what the token ids of {run_folder.checkpoint_folder(out, 1)} mean" in tuned.out


def test_the_remedy_for_an_unknown_tokenizer_helps(story: Path, tmp_path: Path, folio: Folio) -> None:
    bare, out = tmp_path / "bare", tmp_path / "out"
    bare.mkdir()
    for split in ("train", "val"):
        shutil.copy(story / f"{split}.bin", bare)
    argv = [*SMALL, "--vocab_size=300", f"--data_dir={bare}", f"--out_dir={out}"]
    assert folio("train", *argv, "--max_iters=1").code == 0
    sampling = ["sample", f"--out_dir={out}", "--checkpoint=latest", "--num_samples=1", "--max_new_tokens=5"]
    assert_refused(folio(*sampling), "put a meta.json", "beside the token files of its run, and resume the run")
    shutil.copy(story / "meta.json", bare)
    assert folio("train", "--init_from=resume", f"--out_dir={out}", "--max_iters=2").code == 0
    assert folio(*sampling).code == 0


def test_a_mixture_of_the_same_ids(tmp_path: Path, gpt2: Tiktoken, folio: Folio) -> None:
    """GPT-2's from two programs can be mixed, other tokenizers cannot."""
    (tmp_path / "gpt2.json").write_text(gpt2.fast().to_str(), encoding="utf-8")
    one, two = by("gpt2", tmp_path / "one"), by(str(tmp_path / "gpt2.json"), tmp_path / "two")
    three = by("bytes", tmp_path / "three")
    argv = [*SMALL, "--max_iters=1", "--vocab_size=50304", "--n_embd=8", f"--out_dir={tmp_path / 'out'}"]
    assert folio("train", *argv, f"--data_mixture={one}=0.5,{two}=0.5").code == 0
    refused = folio("train", *argv, f"--data_mixture={one}=0.5,{three}=0.5")
    assert_refused(refused, one, three, "different tokenizers", "bytes, not gpt2 of tiktoken")
