"""A model in the hub's cache is found there without the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import Outcome, assert_refused, python
from gpt2_folders import PYTHON, SAMPLE, TRAIN, saved

from folio.checkpoints import hub
from folio.data import tokenizer_folder

transformers = pytest.importorskip("transformers")
filter_repo_objects = pytest.importorskip("huggingface_hub.utils").filter_repo_objects


def test_what_is_fetched_from_the_hub() -> None:
    """Every file that a tokenizer is read from, and none of other programs."""
    wanted = [*tokenizer_folder.FILES, "config.json", "model.safetensors", "model-00001-of-00002.safetensors"]
    wanted += ["model.safetensors.index.json"]
    others = ["tf_model.h5", "rust_model.ot", "flax_model.msgpack", "onnx/model.onnx", "pytorch_model.bin", "run.py"]
    assert list(filter_repo_objects([*wanted, *others], allow_patterns=hub._FILES)) == wanted
    assert {"vocab.json", "merges.txt", "vocab.txt", "tokenizer.json", "added_tokens.json"} <= set(wanted)


def cached(hub: Path, name: str, **shape: Any) -> None:
    """A model as the hub's library lays it out: its files are links to blobs."""
    repository = hub / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("607a30d783dfa663caf39e06633721c8d4cfcd7" + str(len(name) % 10))
    saved(repository / "blobs", **shape)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    for number, file in enumerate(sorted((repository / "blobs").iterdir())):
        blob = file.rename(file.with_name(f"{number:040x}"))
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)


def test_the_hubs_cache(tmp_path) -> None:
    """Under the organisation's name first, then the old one; what is not whole is passed over."""
    hub = tmp_path / "hub"
    cached(hub, "openai-community/gpt2", n_layer=1)
    cached(hub, "gpt2", n_layer=2)
    cached(hub, "gpt2-large", n_layer=3)
    cached(hub, "user/name.x", n_layer=4)
    cached(hub, "openai-community/gpt2-xl", n_layer=5)
    next((hub / "models--openai-community--gpt2-xl").rglob("snapshots/*/model.safetensors")).unlink()
    cached(hub, "gpt2-xl", n_layer=6)
    script = (
        "import sys\nfrom folio.model.gpt import GPT\n"
        "print([GPT.from_pretrained(n).config.n_layer for n in ('gpt2', 'gpt2-large', 'user/name.x', 'gpt2-xl')])\n"
        "print('transformers' in sys.modules)"
    )
    for where in ({"HF_HUB_CACHE": str(hub)}, {"HF_HOME": str(tmp_path)}):
        done = python("-c", script, cwd=tmp_path, HF_HUB_OFFLINE="1", **where)
        assert (done.stdout, done.returncode) == ("[1, 3, 4, 6]\nFalse\n", 0), done.stderr


def test_models_of_the_cache_at_the_command_line(tmp_path, story, shared_data) -> None:
    cached(tmp_path / "hub", "openai-community/gpt2", n_layer=1, n_embd=8, vocab_size=50257)
    cached(tmp_path / "hub", "user/name")
    offline = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "TIKTOKEN_CACHE_DIR": str(shared_data / "tiktoken")}
    done = python(*PYTHON, *SAMPLE, "--init_from=gpt2", "--start=The ferry", "--max_new_tokens=9", **offline)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("The ferry")
    argv = (*TRAIN, f"--data_dir={story}", f"--out_dir={tmp_path / 'out'}", "--init_from=user/name")
    done = python(*PYTHON, *argv, "--eval_only", **offline)
    assert (done.returncode, done.stderr) == (0, "")
    assert "models--user--name" in done.stdout
    assert "val loss" in done.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["gpt2-medium", "user/name"])
def test_nothing_in_the_cache(tmp_path, name) -> None:
    done = python(*PYTHON, "sample", f"--init_from={name}", cwd=tmp_path, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert_refused(Outcome(done.returncode, done.stdout, done.stderr), name, "cache of the Hugging Face hub")
