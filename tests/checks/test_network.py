"""What folio doctor finds out about servers, and about the files of GPT-2."""

from __future__ import annotations

import socket
import sys
import threading
import time
from contextlib import closing, suppress

import pytest
from servers import server

from folio.checks import network
from folio.checks.finding import Finding

pytest_plugins = ["doctoring"]


def test_no_network(look) -> None:
    hub, index = look()["network"]
    assert hub == Finding(
        "missing",
        "network",
        "huggingface.co does not answer (Connection refused): models and data sets cannot be downloaded",
    )
    assert index.text == "pypi.org does not answer (Connection refused): packages cannot be installed"


@pytest.mark.parametrize(("status", "mark"), [(200, "ok"), (404, "ok"), (503, "missing")])
def test_a_server_that_answers(look, monkeypatch, status, mark) -> None:
    """Without a proxy, and with a password, which must not be shown."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with server(b"", status=status) as url:
        host = url.split("/")[2]
        monkeypatch.setenv("PIP_INDEX_URL", f"http://me:secret@{host}/simple")
        hub, index = look()["network"]
    assert (index.mark, index.text.split()[0]) == (mark, host)
    assert "secret" not in index.text
    assert hub.mark == "missing"


def test_a_proxy_is_used(look, monkeypatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    assert look()["network"][0].mark == "missing"
    with server(b"") as proxy:
        monkeypatch.setenv("http_proxy", proxy.removesuffix("/file"))
        assert look()["network"][0] == Finding("ok", "network", "hub.invalid answers")


@pytest.mark.parametrize("url", ["hub.invalid", "http://[", "http://h:port/", "ftp://hub.invalid"])
def test_an_invalid_address(look, monkeypatch, url) -> None:
    monkeypatch.setenv("HF_ENDPOINT", url)
    assert look()["network"][0].mark == "missing"


@pytest.mark.parametrize("word", [b"", b"HTTP/1.0 "], ids=["says nothing", "never ends"])
def test_a_slow_server_does_not_delay_the_command(look, monkeypatch, word) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(network, "_TIMEOUT", 0.2)
    seen = threading.Event()

    def drip() -> None:
        connection = listening.accept()[0]
        with closing(connection), suppress(OSError):
            end = time.monotonic() + 5
            while time.monotonic() < end and not seen.wait(0.02):
                connection.sendall(word)

    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        thread = threading.Thread(target=drip)
        thread.start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{listening.getsockname()[1]}")
        row = look()["network"][0]
        seen.set()
        thread.join()
    assert row.mark == "missing"
    assert "nothing within 0.2 seconds" in row.text or (not word and "timed out" in row.text)


# GPT-2's files


def test_the_tables_of_the_tokenizer(one, monkeypatch, gpt2, shared_data, tmp_path) -> None:
    """Both tables must be in the folder, from which ``gpt2`` has read them."""
    row = one("GPT-2 tokenizer")
    assert row == Finding("ok", "GPT-2 tokenizer", f"in {shared_data / 'tiktoken'}: no network is needed")
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    for file in sorted((shared_data / "tiktoken").iterdir()):
        row = one("GPT-2 tokenizer")
        assert (row.mark, row.remedy) == ("missing", "export TIKTOKEN_CACHE_DIR=FOLDER")
        assert f"not in {cache}, and openaipublic.blob.core.windows.net does not answer" in row.text
        (cache / file.name).symlink_to(file)
    assert one("GPT-2 tokenizer").mark == "ok"


def test_tables_that_can_be_downloaded(one, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with server(b"") as url:
        monkeypatch.setattr(network, "_TABLES", url)
        row = one("GPT-2 tokenizer")
    assert (row.mark, row.text) == ("note", "not in a cache: downloaded when first needed")
    assert "get_encoding" in row.remedy


def test_the_weights_in_the_cache_of_the_hub(one, monkeypatch, tmp_path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    row = one("GPT-2 weights")
    assert (row.mark, row.remedy) == ("missing", "export HF_HUB_CACHE=FOLDER")
    folder = tmp_path / "models--openai-community--gpt2"
    for path in ("refs/main", "snapshots/abc/model.safetensors"):
        (folder / path).parent.mkdir(parents=True)
        (folder / path).write_text("abc")
    assert one("GPT-2 weights") == Finding("ok", "GPT-2 weights", f"in {tmp_path}: no network is needed")


def test_the_weights_where_the_hub_library_is_missing(one, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    row = one("GPT-2 weights")
    assert row.mark == "note"
    assert "huggingface_hub" in row.text
