"""scripts/tokenize_documents_parallel.py: the flags of GPT-from-scratch's script, for ``folio prepare``."""

from __future__ import annotations

from dataclasses import dataclass

from folio.config.options import ITSELF, knob
from folio.data.token_files import CLONE
from folio.preparation.job import prepare
from folio.preparation.recipes import FINEWEB_EDU, SHARD_SIZE, sharded


@dataclass(frozen=True)
class Options:
    """Tokenize the documents of a data set into shards val_000000.npy, train_000001.npy …"""

    local_dir: str = knob(
        "edu_fineweb10B", "folder to write, under data/ beside scripts/ unless it is absolute", path=ITSELF
    )
    remote_name: str = knob("sample-10BT", "configuration of the data set")
    shard_size: int = knob(SHARD_SIZE, "tokens in a shard", min=1)
    dataset_path: str = knob(
        FINEWEB_EDU, "data set on the hub, or a file or folder of parquet or JSON lines", path=ITSELF
    )
    tokenizer_model: str = knob("gpt2", "encoding of tiktoken")


def main(options: Options) -> None:
    o = options
    recipe = sharded(o.dataset_path, o.remote_name, "{split}_{index:06d}.npy", o.shard_size, o.tokenizer_model)
    prepare(recipe, CLONE / "data" / o.local_dir)
