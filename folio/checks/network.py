"""The servers that Folio uses, and GPT-2's files, which are downloaded once."""

from __future__ import annotations

import hashlib
import http.client
import os
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from folio.checks.finding import Finding, python_command

GPT2 = "openai-community/gpt2"
_TABLES = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"  # tiktoken_ext/openai_public.py
_TIMEOUT = 2.0  # seconds to wait for a server


class Site(threading.Thread):
    """A request to a server, sent at once. ``failure``: why there is no answer; empty once there is one.

    It uses the proxies of the environment, as urllib does. Resolving a name can take far longer than ``_TIMEOUT``, so
    ``answers`` does not wait for the thread's end.
    """

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        scheme, _, rest = url.partition("://")
        self.host = rest.partition("/")[0].rpartition("@")[2] or url  # without a password
        self.url = f"{scheme}://{self.host}/"
        self.failure = f"nothing within {_TIMEOUT:g} seconds"
        self._end = time.monotonic() + 1.2 * _TIMEOUT
        self.start()

    def run(self) -> None:
        try:
            opener = urllib.request.build_opener()  # urlopen keeps the proxies of its first call
            opener.open(self.url, timeout=_TIMEOUT).close()
            self.failure = ""
        except urllib.error.HTTPError as error:
            error.close()
            self.failure = f"status {error.code}" if error.code >= 500 else ""
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            self.failure = getattr(reason, "strerror", None) or str(reason)

    def answers(self) -> bool:
        self.join(max(0.0, self._end - time.monotonic()))
        return not self.failure


class Sites:
    """The servers: the Hugging Face hub, the package index, and that of GPT-2's tokenizer. All are asked at once."""

    def __init__(self) -> None:
        self.hub = Site(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
        self.index = Site(os.environ.get("PIP_INDEX_URL") or "https://pypi.org/simple")
        self.tables = Site(_TABLES)

    def servers(self) -> Iterator[Finding]:
        effects = {self.hub: "models and data sets cannot be downloaded", self.index: "packages cannot be installed"}
        for site, effect in effects.items():
            if site.answers():
                yield Finding("ok", "network", f"{site.host} answers")
            else:
                remedy = "" if urllib.request.getproxies() else "export https_proxy=http://HOST:PORT"
                yield Finding("missing", "network", f"{site.host} does not answer ({site.failure}): {effect}", remedy)

    def tokenizer(self) -> Iterator[Finding]:
        """Whether GPT-2's tokenizer is in tiktoken's cache (tiktoken.load.read_file_cached)."""
        default = os.environ.get("DATA_GYM_CACHE_DIR", str(Path(tempfile.gettempdir(), "data-gym-cache")))
        folder = os.environ.get("TIKTOKEN_CACHE_DIR", default)
        names = [hashlib.sha1(f"{_TABLES}{table}".encode()).hexdigest() for table in ("vocab.bpe", "encoder.json")]
        if folder and all(Path(folder, name).is_file() for name in names):
            yield Finding("ok", "GPT-2 tokenizer", f"in {folder}: no network is needed")
            return
        effect = "text cannot be prepared or generated with GPT-2's tokenizer"
        download = python_command("""-c 'import tiktoken; tiktoken.get_encoding("gpt2")'""")
        folder = folder or "a cache"
        yield _not_cached("GPT-2 tokenizer", folder, self.tables, effect, download, "TIKTOKEN_CACHE_DIR")

    def weights(self) -> Iterator[Finding]:
        """Whether GPT-2's weights are in the cache of the Hugging Face hub."""
        from huggingface_hub import constants, try_to_load_from_cache

        cached = [try_to_load_from_cache(repository, "model.safetensors") for repository in (GPT2, "gpt2")]
        if any(isinstance(path, str) for path in cached):
            yield Finding("ok", "GPT-2 weights", f"in {constants.HF_HUB_CACHE}: no network is needed")
            return
        effect, download = "--init_from=gpt2 fails", f"hf download {GPT2} config.json model.safetensors"
        yield _not_cached("GPT-2 weights", constants.HF_HUB_CACHE, self.hub, effect, download, "HF_HUB_CACHE")


def _not_cached(subject: str, folder: str, site: Site, effect: str, download: str, variable: str) -> Finding:
    if site.answers():
        return Finding("note", subject, f"not in {folder}: downloaded when first needed", download)
    text = f"not in {folder}, and {site.host} does not answer: {effect}; copy the folder from another machine"
    return Finding("missing", subject, text, f"export {variable}=FOLDER")
