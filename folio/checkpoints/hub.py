"""Downloads models from the Hugging Face hub, and uploads them, with the hub's library."""

from __future__ import annotations

import re
from pathlib import Path

from folio.checkpoints.hugging_face import weight_files
from folio.config.names import did_you_mean
from folio.data import tokenizer_folder
from folio.errors import UserError, first_line

OPENAI = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
_FILES = ["config.json", *tokenizer_folder.FILES, "model*.safetensors", "model.safetensors.index.json"]
_BIN_FILES = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]


def download(name: str) -> Path:
    """The folder of a model of the hub, from the hub's cache or else downloaded by the hub's library."""
    if hint := did_you_mean(name, ("scratch", "resume", "auto"), cutoff=0.7):
        raise UserError(f"{name}: there is no such folder: {hint}")
    if not re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", name):
        raise FileNotFoundError(f"{name}: there is no such file or folder")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError
    except ModuleNotFoundError:
        raise FileNotFoundError(
            f"{name}: there is no such file or folder; to ask the Hugging Face hub for it: pip install huggingface_hub"
        ) from None

    names = [f"openai-community/{name}", name] if name in OPENAI else [name]
    for cached in names:
        try:
            folder = Path(snapshot_download(cached, local_files_only=True))
        except LocalEntryNotFoundError:
            continue
        wanted = weight_files(folder)
        if wanted and all(p.is_file() for p in (folder / "config.json", *wanted)):
            return folder
    try:
        folder = Path(snapshot_download(names[0], allow_patterns=_FILES))
        if not weight_files(folder):
            folder = Path(snapshot_download(names[0], allow_patterns=[*_FILES, *_BIN_FILES]))
    except Exception as error:  # the library's, its client's and the network's
        raise FileNotFoundError(
            f"{name} is not a file or folder, is not in the cache of the Hugging Face hub, and was not fetched: "
            f"{first_line(error)}"
        ) from None
    return folder


def check_name(name: str) -> None:
    """Raises ValueError if the hub cannot have a model of that name."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"push_to_hub={name}: must be USER/NAME")


def push(folder: Path, name: str) -> str:
    """Uploads an exported folder as the hub's model ``USER/NAME``, and returns its address.

    Raises:
        OSError: no access, or no network; the folder stays as it is.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        repository = api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=repository.repo_id, folder_path=folder, commit_message="Upload model")
    except Exception as error:  # the library's, its client's and the network's
        raise OSError(
            f"{folder} is written, but was not pushed to {name}: {first_line(error)}; hf auth login gives access, "
            f"hf upload {name} {folder} tries again"
        ) from None
    return str(repository)
