"""folio doctor: what this machine has, what each lack means, and the command that mends it."""

from __future__ import annotations

import hashlib
import http.client
import importlib.util
import os
import platform
import re
import shlex
import shutil
import sys
import sysconfig
import tempfile
import textwrap
import threading
import time
import tomllib
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from rich.console import Console
from rich.text import Text

from folio import __version__
from folio.config.options import DATA_SETS, System
from folio.data.rows import holds_tokens
from folio.data.token_files import CLONE, SPLITS, UNFINISHED, open_folder
from folio.machine import shortage
from folio.machine.flops import peak
from folio.machine.runtime import Runtime
from folio.records.console import printable

# What an extra's packages are for; which ones they are, the project's metadata says
MEANS = {
    "data": "parquet and zstd files, Hugging Face's data sets and tokenizers cannot all be read",
    "hf": "models cannot be fetched from the Hugging Face hub, or exported",
    "eval": "folio eval cannot run the tasks of the lm-evaluation-harness",
    "log": "--track cannot send a run there",
    "plot": "folio plot or folio report cannot draw",
}
GPT2 = "openai-community/gpt2"
_TABLES = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"  # tiktoken_ext/openai_public.py
_PATIENCE = 2.0  # seconds that a server has to answer
_STYLES = {"ok": "green", "note": "yellow", "lacks": "bold red"}
_STATE = 2.0e9  # bytes of GPT-2 124M's weights, gradients and AdamW's averages, in float32
_CHECKPOINTS = 6.0e9  # bytes of the four that may lie there: two, the best, and one being written


@dataclass(frozen=True)
class Options:
    """Say what this machine has, what each lack means, and the command that mends it."""


class Row(NamedTuple):
    """A line of the table: ``mend`` is a command that one can paste, if there is one."""

    mark: Literal["ok", "note", "lacks"]
    what: str
    finding: str
    mend: str = ""


class Site(threading.Thread):
    """A server that is asked at once. ``silence``: why it has not answered; empty once it has.

    The proxies of the environment are used, as by urllib. A name that is not resolved can keep a thread waiting far
    longer than ``_PATIENCE``, so nobody waits for its end.
    """

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        scheme, _, rest = url.partition("://")
        self.host = rest.partition("/")[0].rpartition("@")[2] or url  # without a password
        self.url = f"{scheme}://{self.host}/"
        self.silence = f"nothing within {_PATIENCE:g} seconds"
        self._end = time.monotonic() + 1.2 * _PATIENCE
        self.start()

    def run(self) -> None:
        try:
            asked = urllib.request.build_opener()  # urlopen keeps the proxies of its first call
            asked.open(self.url, timeout=_PATIENCE).close()
            self.silence = ""
        except urllib.error.HTTPError as error:
            error.close()
            self.silence = f"status {error.code}" if error.code >= 500 else ""
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            self.silence = getattr(reason, "strerror", None) or str(reason)

    def answers(self) -> bool:
        self.join(max(0.0, self._end - time.monotonic()))
        return not self.silence


def main(options: Options) -> None:
    """Prints the table. A lack is no failure, and neither is a question that has no answer here."""
    hub = Site(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    index = Site(os.environ.get("PIP_INDEX_URL") or "https://pypi.org/simple")
    tables = Site(_TABLES)
    probes: dict[str, Callable[[], Iterator[Row]]] = {
        "Python": _python,
        "device": _arithmetic,
        "memory": _memory,
        "disk": _disk,
        "packages": _packages,
        "network": lambda: _network(hub, index),
        "GPT-2 tokenizer": lambda: _tokenizer(tables),
        "GPT-2 weights": lambda: _weights(hub),
        "data": _data,
    }
    rows = [row for what, probe in probes.items() for row in _answered(what, probe)]
    _show(rows)


def _answered(what: str, probe: Callable[[], Iterator[Row]]) -> Iterator[Row]:
    try:
        yield from probe()
    except (OSError, ValueError, RuntimeError, ImportError) as error:  # torch's are RuntimeErrors
        yield Row("note", what, f"could not be found out: {error}")


def _show(rows: list[Row]) -> None:
    """As wide as the terminal, or COLUMNS; elsewhere a finding is one line. Commands are never broken."""
    console, width = Console(highlight=False, soft_wrap=True), shutil.get_terminal_size((0, 0)).columns
    title = max(len(row.what) for row in rows)
    indent = len("lacks") + title + 4
    for row in rows:
        finding = " ".join(printable(row.finding).split())
        room = max(width - indent, 24) if width else len(finding) + 1
        lines = textwrap.wrap(finding, room, break_long_words=False, break_on_hyphens=False)
        lines += [f"$ {printable(row.mend)}"] * bool(row.mend)
        text = f"\n{'':{indent}}".join(lines)
        console.print(Text.assemble((f"{row.mark:5}", _STYLES[row.mark]), f"  {row.what:{title}}  {text}"))
    count = {mark: sum(row.mark == mark for row in rows) for mark in _STYLES}
    console.print(f"\n{count['lacks']} lacking, {count['note']} to note, {count['ok']} as it should be")


def _command(rest: str) -> str:
    """A command line of the Python that runs, under the name by which the shell finds it."""
    named = (name for name in ("python", "python3") if (path := shutil.which(name)) and _is_this_python(path))
    return f"{next(named, shlex.quote(sys.executable))} {rest}"


def _is_this_python(path: str) -> bool:
    """By its folder: the Pythons of all virtual environments may be links to one file."""
    here = Path(sys.executable)
    return os.path.samefile(Path(path).parent, here.parent) and os.path.samefile(path, here)


# The machine


def _python() -> Iterator[Row]:
    yield Row("ok", "Python", f"{platform.python_version()}, {sys.executable}")
    gpus = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip, "Apple's": "GPUs" * torch.backends.mps.is_built()}
    built = next((f"{name} {version}" for name, version in gpus.items() if version), "CPUs alone")
    yield Row("ok", "torch", f"{torch.__version__}, built for {built}")
    where = "the clone in" if _project() else "installed in"
    yield Row("ok", "Folio", f"{__version__}, {where} {CLONE}")


def _arithmetic() -> Iterator[Row]:
    """The device, and what ``auto`` becomes on it."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        runtime = Runtime(System(), flops=float("inf"))  # of a run that is long enough to compile
        runtime.close()
    device, auto = runtime.device, runtime.resolved
    yield from _answered("device", lambda: _devices(device, auto["processor"], [str(w.message) for w in said]))
    yield _threads(auto["threads"])

    fast = {auto["dtype"], *(["float16"] if device.type == "cuda" else [])}
    slow = [name for name in ("bfloat16", "float16") if name not in fast]
    limit = peak(device, runtime.dtype)
    speed = f"{limit / 1e12:,.3g} TFLOP/s {'measured' if device.type == 'cpu' else 'by its maker'}" if limit else ""
    verdict = f"{' and '.join(slow)} would be slower" if slow else "float16 is fast too"
    known = speed or "of unknown peak, so that no MFU is shown"
    yield Row("ok" if limit else "note", "dtype", f"{auto['dtype']}, {known}; {verdict}")
    means = {"highest": "in full", "high": "in TF32", "medium": "by faster kernels that are as exact here"}
    precision = auto["matmul_precision"]
    yield Row("ok", "float32", f"products at precision {precision}, {means[precision]}")
    yield _compiler(device, auto["compile"])


def _devices(device: torch.device, processor: str, said: list[str]) -> Iterator[Row]:
    if device.type == "cuda":
        for i in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(i)
            finding = f"cuda:{i}, {torch.cuda.get_device_name(i)}, {_gb(free, total)} free"
            if free > total / 2:
                yield Row("ok", "device", finding)
            else:
                yield Row("note", "device", f"{finding}: other processes hold the rest", "nvidia-smi")
    elif device.type == "mps":
        yield Row("ok", "device", "mps, Apple's GPU, in the machine's memory")
    elif not (shutil.which("nvidia-smi") or Path("/dev/nvidia0").exists()):
        plan = _command("-m folio plan --gpu=cpu")
        yield Row("note", "device", f"cpu, {processor}: there is no GPU, and a large model takes long", plan)
    elif torch.version.cuda is None:
        unused = f"torch is built without CUDA, so that the GPU is not used; cpu, {processor}"
        yield Row("lacks", "device", unused, _command("-m pip install --force-reinstall torch"))
    elif "CUDA_VISIBLE_DEVICES" in os.environ:
        hidden = f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']} hides the GPU; cpu, {processor}"
        yield Row("lacks", "device", hidden, "unset CUDA_VISIBLE_DEVICES")
    else:
        reason = said[0] if said else f"torch for CUDA {torch.version.cuda} cannot use its driver"
        yield Row("lacks", "device", f"the GPU is not used: {reason}; cpu, {processor}", "nvidia-smi")


def _threads(threads: int) -> Row:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    held = os.environ.get("OMP_NUM_THREADS")
    if held and threads < cores:
        finding = f"{cores}; OMP_NUM_THREADS={held} keeps torch to {threads}"
        return Row("note", "cores", finding, "unset OMP_NUM_THREADS")
    return Row("ok", "cores", f"{cores}, of which torch uses {threads}")


def _compiler(device: torch.device, compiled: bool) -> Row:
    """What torch.compile needs: on a GPU Triton and a C compiler, on a CPU a C++ compiler, for either Python.h."""
    on_gpu = device.type == "cuda"
    header = Path(sysconfig.get_path("include"), "Python.h")
    name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")  # as torch._inductor looks
    missing, mend = "", "xcode-select --install" if sys.platform == "darwin" else "sudo apt install g++"
    if on_gpu and not compiled and not importlib.util.find_spec("triton"):
        missing, mend = "Triton", _command("-m pip install triton")
    elif on_gpu and not compiled:
        missing = "a C compiler"
    elif not on_gpu and not shutil.which(name):
        missing = name
    elif not header.is_file():
        missing, mend = str(header), "sudo apt install python3-dev"
    if missing:
        loss = "long runs go uncompiled, and slower" if on_gpu else "--compile=True would go on without"
        return Row("lacks" if on_gpu else "note", "compiler", f"{missing} is missing: {loss}", mend)
    found = "Triton and a C compiler: long runs are compiled" if on_gpu else f"{name}, used with --compile=True"
    return Row("ok", "compiler", found)


def _memory() -> Iterator[Row]:
    total = available = shortage.machine()
    about = Path("/proc/meminfo")
    if about.is_file() and (found := re.search(r"^MemAvailable:\s+(\d+) kB", about.read_text(), re.MULTILINE)):
        available = min(total, 1024 * int(found[1]))
    finding = f"{_gb(available, total)} available"
    if available >= _STATE:
        yield Row("ok", "memory", finding)
    else:
        means = f"{_gb(_STATE)} is what training GPT-2 124M takes, activations not counted"
        yield Row("note", "memory", f"{finding}: {means}", _command("-m folio plan --gpu=cpu"))


def _disk() -> Iterator[Row]:
    here = Path.cwd()
    total, _, free = shutil.disk_usage(here)
    finding = f"{_gb(free, total)} free in {here}, where data/ and out/ go"
    if not os.access(here, os.W_OK):
        yield Row("lacks", "disk", f"{here} cannot be written: choose another for --out_dir and --data_dir")
    elif free < _CHECKPOINTS:
        means = f"checkpoints of GPT-2 124M take up to {_gb(_CHECKPOINTS)}, so choose another disk for --out_dir"
        yield Row("note", "disk", f"{finding}; {means}")
    else:
        yield Row("ok", "disk", finding)


def _gb(*sizes: float) -> str:
    return f"{' of '.join(f'{size / 1e9:,.1f}' for size in sizes)} GB"


# Packages


def _packages() -> Iterator[Row]:
    target = ("." if Path.cwd() == CLONE else str(CLONE)) if _project() else "folio"
    install = _command(f"-m pip install {'-e ' * bool(_project())}")
    for extra, needs in requirements().items():
        found = [_installed(need) for need in needs]
        lacking = [text for there, text in found if not there]
        title, option = (f"extra {extra}", f"[{extra}]") if extra else ("packages", "")
        if lacking:
            means = MEANS.get(extra, "Folio may fail")
            wanted = shlex.quote(f"{target}{option}")
            yield Row("lacks", title, f"{', '.join(lacking)}: {means}", f"{install}{wanted}")
        else:
            yield Row("ok", title, ", ".join(text for _, text in found))


def requirements() -> dict[str, list[str]]:
    """What Folio needs, as ``"rich>=13"``, by extra; the core's under "". Those of its developers are left out.

    The clone's ``pyproject.toml`` says it, since the metadata of an editable install may be older; else the metadata.

    Raises:
        PackageNotFoundError, an ImportError: there is neither.
    """
    if project := _project():
        found = {"": project["dependencies"], **project["optional-dependencies"]}
    else:
        found = {"": []}
        for line in metadata.requires("folio") or []:
            need, _, marker = line.partition(";")
            extra = re.search(r"extra == ['\"](.+?)['\"]", marker)
            found.setdefault(extra[1] if extra else "", []).append(need.strip())
    return {extra: needs for extra, needs in found.items() if extra != "dev"}


def _project() -> dict[str, Any]:
    """The clone's table of itself; empty where Folio is installed without its clone."""
    path = CLONE / "pyproject.toml"
    found: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8")).get("project", {}) if path.is_file() else {}
    return found if found.get("name") == "folio" else {}


def _installed(need: str) -> tuple[bool, str]:
    """Whether a requirement is met, and in words by what."""
    name, _, least = need.partition(">=")
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return False, f"{name} is missing"
    if _numbers(version) < _numbers(least):
        return False, f"{name} {version} is older than {least}"
    return True, f"{name} {version}"


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


# The network, and what is here without it


def _network(hub: Site, index: Site) -> Iterator[Row]:
    for site, means in ((hub, "models and data sets cannot be fetched"), (index, "packages cannot be installed")):
        if site.answers():
            yield Row("ok", "network", f"{site.host} answers")
        else:
            mend = "export https_proxy=http://HOST:PORT" if not urllib.request.getproxies() else ""
            yield Row("lacks", "network", f"{site.host} does not answer ({site.silence}): {means}", mend)


def _tokenizer(site: Site) -> Iterator[Row]:
    """Where tiktoken keeps what it fetched: tiktoken.load.read_file_cached."""
    default = os.environ.get("DATA_GYM_CACHE_DIR", str(Path(tempfile.gettempdir(), "data-gym-cache")))
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", default)
    names = [hashlib.sha1(f"{_TABLES}{table}".encode()).hexdigest() for table in ("vocab.bpe", "encoder.json")]
    if folder and all(Path(folder, name).is_file() for name in names):
        yield Row("ok", "GPT-2 tokenizer", f"in {folder}: it needs no network")
        return
    yield _not_here(
        "GPT-2 tokenizer",
        folder or "a cache",
        site,
        "text of GPT-2's tokens can be neither prepared nor sampled",
        _command("""-c 'import tiktoken; tiktoken.get_encoding("gpt2")'"""),
        "TIKTOKEN_CACHE_DIR",
    )


def _weights(site: Site) -> Iterator[Row]:
    from huggingface_hub import constants, try_to_load_from_cache

    cached = [try_to_load_from_cache(repository, "model.safetensors") for repository in (GPT2, "gpt2")]
    if any(isinstance(path, str) for path in cached):
        yield Row("ok", "GPT-2 weights", f"in {constants.HF_HUB_CACHE}: they need no network")
        return
    means, fetch = "--init_from=gpt2 cannot start", f"hf download {GPT2} config.json model.safetensors"
    yield _not_here("GPT-2 weights", constants.HF_HUB_CACHE, site, means, fetch, "HF_HUB_CACHE")


def _not_here(what: str, folder: str, site: Site, means: str, fetch: str, variable: str) -> Row:
    if site.answers():
        return Row("note", what, f"not in {folder}: fetched when first needed", fetch)
    finding = f"not in {folder}, and {site.host} does not answer: {means}; another machine's copy would do"
    return Row("lacks", what, finding, f"export {variable}=FOLDER")


# Data


def _data() -> Iterator[Row]:
    """Every data set that ``--dataset`` finds by its name."""
    places = [p for folder in (Path("data"), CLONE / "data") if folder.is_dir() for p in sorted(folder.iterdir())]
    places += [Path("edu_fineweb10B"), CLONE / "edu_fineweb10B"]
    folders: dict[Path, Path] = {}
    for place in filter(Path.is_dir, places):
        folders.setdefault(place.resolve(), place)
    rows = [row for place in folders.values() if (row := _data_set(place))]
    yield from rows
    if not rows:
        finding = "none is prepared, so there is nothing to train on; stdlib needs no network"
        yield Row("lacks", "data", finding, _command("-m folio prepare stdlib"))


def _data_set(place: Path) -> Row | None:
    elsewhere = "" if place == Path("data", place.name) else f" --data_dir={shlex.quote(str(place))}"
    again = _command(f"-m folio prepare {place.name}{elsewhere}") if place.name in DATA_SETS else ""
    if not holds_tokens(place):
        unfinished = f"{place} is not finished: the same folio prepare goes on with it"
        return Row("note", "data", unfinished, again) if (place / UNFINISHED).is_dir() else None
    try:
        folder = open_folder(place)
    except (OSError, ValueError) as error:
        return Row("lacks", "data", str(error), again and f"{again} --overwrite")
    tokens = (f"{sum(file.tokens for file in folder.splits[split]):,} {split}" for split in SPLITS)
    return Row("ok", "data", f"{place}: {' and '.join(tokens)} tokens")
