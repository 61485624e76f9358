"""scripts/tokenize_documents_parallel.py: the flags of GPT-from-scratch's script, for ``folio prepare``."""

from __future__ import annotations

from dataclasses import dataclass

from folio.config.declare import ITSELF, option
from folio.data.token_files import CLONE
from folio.preparation.job import prepare
from folio.preparation.recipes import FINEWEB_EDU, SHARD_SIZE, sharded


@dataclass(frozen=True)
class Options:
    """Tokenize the documents of a data set into shards val_000000.npy, train_000001.npy …"""

    local_dir: str = option("edu_fineweb10B", "folder to write, under data/ unless it is absolute", path=ITSELF)
    remote_name: str = option("sample-10BT", "configuration of the data set")
    shard_size: int = option(SHARD_SIZE, "tokens in a shard", min=1)
    dataset_path: str = option(FINEWEB_EDU, "data set of the hub, or a file or folder", path=ITSELF)
    tokenizer_model: str = option("gpt2", "encoding of tiktoken")


def main(options: Options) -> None:
    o = options
    recipe = sharded(o.dataset_path, o.remote_name, "{split}_{index:06d}.npy", o.shard_size, o.tokenizer_model)
    prepare(recipe, CLONE / "data" / o.local_dir)
