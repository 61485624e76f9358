"""Every command and program of the README and of docs/ runs, made tiny, in a copy of the clone; every link works."""

from __future__ import annotations

import gzip
import re
import runpy
import shlex
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import pytest
from conftest import ROOT, STORY, TINY, Outcome, run

from folio import cli
from folio.config.options import TrainConfig
from folio.config.table import defaults
from folio.machine.flops import GPUS
from folio.preparation.recipes import KNOWN

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*DOCUMENTS, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]

# Commands that no test can run → the reason; a program is named by its first line
NOT_RUN = {
    "pip install -e '.[hf,data,log]'": "make test has installed the package",
    **dict.fromkeys(
        (
            "torchrun --nproc_per_node=8 --nnodes=2 --node_rank=0 --master_addr=123.456.123.456 "
            "--master_port=1234 train.py",
            "torchrun --nproc_per_node=8 --nnodes=2 --node_rank=0 --master_addr=10.0.0.1 --master_port=1234 train.py",
            "torchrun --nproc_per_node=8 --nnodes=2 --node_rank=1 --master_addr=10.0.0.1 --master_port=1234 train.py",
            "torchrun --nproc_per_node=8 --nnodes=1:4 --max_restarts=3 --rdzv_id=7 --rdzv_backend=c10d "
            "--rdzv_endpoint=10.0.0.1:29500 train.py --init_from=auto",
        ),
        "several machines; tests/machine/test_parallel.py runs several launchers",
    ),
    "from datatrove.executor import LocalPipelineExecutor": "tests/test_front_door.py runs it, on real documents",
}
GIVEN = (  # commands that every document may assume to have run
    "python data/shakespeare_char/prepare.py",
    "python train.py config/train_shakespeare_char.py --out_dir=out",
    "python scripts/tokenize_documents_parallel.py --local_dir edu_fineweb10B",
    "python data/openwebtext/prepare.py",
)
REPLACED = {  # text of a document, and its replacement on one machine with two cores
    "--nproc_per_node=8": "--nproc_per_node=2",
    "1_000_000_000": "1_000_000",
    "< 5:": "< 0.1:",
    "max_iters=500": "max_iters=3",
    "max_new_tokens=40": "max_new_tokens=8",
    "--shard_of=0/64": "--shard_of=0/1",
}

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```|^\|[^\n]*", re.DOTALL | re.MULTILINE)
SHELL_LINE = re.compile(r"(?:.*\\\n)*.+")
PROGRAMS = "(?:python|folio|torchrun|sh|make) "
IN_TABLE = re.compile(f"`({PROGRAMS}[^`]+)`")
TINY_TOO = (  # in GPT-from-scratch's names
    "--n_batches=4 --n_tokens=16 --context_length=16 --emb_dim=8 --n_layers=1 --n_heads=1 --total_batch_size=128 "
    "--max_iters=3 --metrics=none"
)
# Run in this process; those in scripts/ write beside the package, so they need the clone's
SCRIPTS = {"train.py", "sample.py", "bench.py", *(f"data/{name}/prepare.py" for name in KNOWN)}
HERE = "--device=cpu --compile=False --dtype=float32 --eval_iters=1"


class Command(NamedTuple):
    """A shell line or a whole program, with the output that the document shows."""

    place: str
    text: str
    program: bool = False
    shown: tuple[str, ...] = ()


def commands(document: Path) -> Iterator[Command]:
    """In order: lines of sh blocks, commands in tables and in sessions (``$ …``), python blocks that import."""
    text = document.read_text(encoding="utf-8")

    def place(offset: int) -> str:
        return f"{document.relative_to(ROOT)}:{text.count(chr(10), 0, offset) + 1}"

    for block in BLOCK.finditer(text):
        kind, inside = block.groups()
        if kind is None:
            for command in IN_TABLE.findall(block[0]):
                yield Command(place(block.start()), command)
        elif kind == "sh" or (not kind and re.match(PROGRAMS, inside)):
            for line in SHELL_LINE.finditer(inside):
                if not line[0].startswith("#"):
                    yield Command(place(block.start(2) + line.start()), _plain(line[0]))
        elif kind == "python" and re.match("import |from ", inside):
            yield Command(place(block.start(2)), inside, program=True)
        elif inside.startswith("$ "):
            for typed, shown in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", inside, re.MULTILINE):
                printed = tuple(line for line in shown.splitlines() if line.strip("… "))
                yield Command(place(block.start(2)), _plain(typed), shown=printed)


def _plain(line: str) -> str:
    """Without a comment, and on one line."""
    return re.sub(r"\s+# .*", "", line.replace("\\\n", " ")).strip()


def tiny(line: str, data: Path, task: Path) -> str:
    """The same command, made small by more flags, and with local text instead of downloads."""
    line = line.replace("OUT", "out-shakespeare-char")
    if "prepare" in line or "scripts/tokenize" in line:
        return _without_a_network(line, data)
    if "train_gpt.py" in line:
        return f"{line} {TINY_TOO}"
    if "sample.py" in line or "folio sample" in line:
        return f"{line} --max_new_tokens=5"
    if "bench" in line:
        return f"{line} --device=cpu --n_layer=1 --n_head=1 --n_embd=8 --block_size=16 --batch_size=2"
    if "eval lm_eval" in line:
        return f"{line} --tasks={task} --limit=3 --device=cpu"
    if "eval hellaswag" in line:
        return f"{line} --limit=3 --device=cpu"
    if "init_from=resume" in line:  # of any shape; an imported checkpoint is at step 200
        asked = re.search(r"--max_iters=(\d+)", line)
        steps = min(202, int(asked[1])) if asked else 202
        return f"{line} {HERE} --eval_interval=100 --max_iters={steps} --gradient_accumulation_steps=1 --batch_size=2"
    if "folio eval" in line:
        return f"{line} --eval_iters=2 --device=cpu"
    if re.search(r"train\.py|folio (train|demo)", line):
        micro_steps = "" if "total_batch_size" in line else " --gradient_accumulation_steps=2"
        return f"{line} {TINY} --max_iters=3{micro_steps}"
    return line


def _without_a_network(line: str, data: Path) -> str:
    """A command that prepares a data set, with local text instead of the download."""
    wikitext = data / "wikitext2_valid.jsonl"
    line = re.sub(r"--shard_size=\S+", "--shard_size=50_000", line)
    if "hf:" in line:
        return re.sub(r"hf:\S+", f"hf:{wikitext}", line)
    if "scripts/" in line:
        return f"{line} --dataset_path {wikitext} --shard_size=50_000"
    if "openwebtext" in line:
        return f"{line} --source {wikitext}"
    if "fineweb_edu" in line:
        return f"{line} --source {wikitext} --shard_size=50_000"
    return line


@pytest.fixture(scope="module")
def furnished(clone: Path, shared_data: Path) -> Path:
    """The clone with what the documents assume: text, another program's files, HellaSwag, models on the hub."""
    (clone / "path" / "to").mkdir(parents=True)
    for name in ("ckpt.pt", "meta.pkl"):
        shutil.copyfile(shared_data / "nanogpt_ckpt" / name, clone / "path" / "to" / name)
    for name in ("shakespeare", "shakespeare_char"):
        shutil.copy(shared_data / "tinyshakespeare.txt", clone / "data" / name / "input.txt")
    (clone / "novels").mkdir()
    shutil.copy(STORY, clone / "novels" / "story.txt")
    shutil.copy(STORY, clone / "my.txt")
    shutil.copy(STORY, clone / "prompt.txt")
    (clone / "notes.md").write_text("# Notes\n\nOf no great length.\n" * 30, encoding="utf-8")
    (clone / "crawl").mkdir()
    with gzip.open(clone / "crawl" / "part.jsonl.gz", "wb") as file:
        file.write((shared_data / "wikitext2_valid.jsonl").read_bytes())
    (clone / "data" / "hellaswag").mkdir()
    items = (shared_data / "hellaswag_val_head5000.jsonl").read_bytes().splitlines(keepends=True)[:6]
    (clone / "data" / "hellaswag" / "hellaswag_val.jsonl").write_bytes(b"".join(items))
    _a_task_of(clone / "data" / "hellaswag" / "hellaswag_val.jsonl", clone / "task.yaml")
    _fill_the_hub_cache(clone / "hub")
    return clone


def _a_task_of(items: Path, task: Path) -> None:
    """A task of the lm-evaluation-harness on a local file; the harness's own tasks download their data."""
    task.write_text(
        f"task: endings\ndataset_path: json\ndataset_kwargs: {{data_files: {{validation: {items}}}}}\n"
        "validation_split: validation\noutput_type: multiple_choice\ndoc_to_text: '{{ctx}}'\n"
        "doc_to_choice: '{{endings}}'\ndoc_to_target: '{{label}}'\n",
        encoding="utf-8",
    )


def _fill_the_hub_cache(cache: Path) -> None:
    """Small models under the names of OpenAI's, in the layout of the hub's cache."""
    from transformers import GPT2Config, GPT2LMHeadModel

    for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"):
        folder = cache / f"models--openai-community--{name}"
        model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, n_positions=32))
        model.save_pretrained(folder / "snapshots" / ("0" * 40))
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("0" * 40, encoding="ascii")


@pytest.fixture
def shell(
    furnished: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[[str], tuple[int, str]]:
    """Runs a line in the clone and returns exit code and output; Folio's commands and scripts run in this process."""
    import datasets.config
    import huggingface_hub.constants

    monkeypatch.chdir(furnished)
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # which a command sets
    monkeypatch.setattr(sys, "path", [str(furnished), *sys.path])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", furnished / "hub")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(furnished / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared_data / "tiktoken"))
    monkeypatch.setenv("WANDB_MODE", "disabled")

    def here(words: list[str]) -> tuple[int, str]:
        program, *rest = words
        monkeypatch.setattr(sys, "argv", words if program == "folio" else rest)
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main() if program == "folio" else runpy.run_path(rest[0], run_name="__main__")
        return int(stop.value.code or 0), "".join(capfd.readouterr())

    def outside(line: str) -> tuple[int, str]:
        done = run(line, furnished, VIRTUAL_ENV=sys.prefix)
        return done.returncode, done.stdout + done.stderr

    def either(line: str) -> tuple[int, str]:
        words = shlex.split(line)
        assert {"|", ">", "&&", ";"}.isdisjoint(words), f"{line}: one command a line"
        if words[0] == "folio" or (words[0] == "python" and words[1] in SCRIPTS):
            return here(words)
        assert re.match(PROGRAMS, line), f"{line}: neither run here nor listed as NOT_RUN"
        return outside(line.replace("make", "make -n") if words[0] == "make" else line)

    return either


@pytest.fixture(scope="module")
def done() -> set[str]:
    """Commands that have run already, in this or another document."""
    return set()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # a command may warn, as in a process of its own
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_runs(
    document: Path, furnished: Path, shared_data: Path, shell: Callable[[str], tuple[int, str]], done: set[str]
) -> None:
    """In order, and once if documents share a command. A session that runs unchanged prints the output it shows."""
    for command in (*(Command("given", line) for line in GIVEN), *commands(document)):
        if command.text.partition("\n")[0] in NOT_RUN:
            continue
        text = command.text
        for shown, replacement in REPLACED.items():
            text = text.replace(shown, replacement)
        if command.program:
            exec(compile(text, command.place, "exec"), {"__name__": "__main__"})
            continue
        line = tiny(text, shared_data, furnished / "task.yaml")
        if line in done:
            continue
        code, output = shell(line)
        assert code == 0, f"{command.place}: {line}\n{output}"
        missing = [text for text in command.shown if text not in output.splitlines()]
        assert not missing or line != command.text, f"{command.place}: {line}\nlacks\n{missing}\nin\n{output}"
        done.add(line)


def test_commands_that_are_not_run_are_in_the_documents() -> None:
    there = {command.text.partition("\n")[0] for document in DOCUMENTS for command in commands(document)}
    assert there >= NOT_RUN.keys()


@pytest.mark.slow
def test_hours_and_costs_are_those_of_folio_plan(folio: Callable[..., Outcome]) -> None:
    """Each row of the table of docs/reproduce-gpt2.md, to the digit."""
    row = re.compile(
        r"^\| ([\w ]+) \| ([\d,]+) \| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", re.MULTILINE
    )
    rows = row.findall((ROOT / "docs" / "reproduce-gpt2.md").read_text(encoding="utf-8"))
    assert len(rows) == 19
    for gpu, peak, size, on_one, on_eight, price, cost in rows:
        argv = ["plan", "train_gpt2_124m_fineweb", f"--gpu={gpu}", f"--batch_size={size}", f"--price={price}"]
        argv += ["--dtype=float16"] * (not GPUS[gpu].bfloat16)
        output = folio(*argv, "--gpus=8").out
        assert f" {on_eight} hours at an MFU of 0.4 and a peak of {peak}.00 TFLOP/s" in output, (gpu, output)
        assert f" {cost} at {price} " in output, (gpu, output)
        assert "\nfits" in output, (gpu, output)
        assert float(cost) / float(price) == pytest.approx(float(on_one), abs=0.06), gpu


def test_nanogpts_options_have_the_documented_defaults() -> None:
    text = (ROOT / "docs" / "from-nanogpt.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \| [^|]*\|$", text, re.MULTILINE)
    assert len(table) == 33
    assert dict(table) == {name: str(defaults(TrainConfig)[name]) for name, _ in table}


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(document: Path) -> set[str]:
    """GitHub's anchors of a document's headings."""
    prose = re.sub(r"^```.*?^```", "", document.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", prose, re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        found.add(next(name for i in range(99) if (name := f"{slug}-{i}" if i else slug) not in found))
    return found


@pytest.mark.parametrize("document", LINKED, ids=lambda path: path.name)
def test_every_link_works(document: Path, clone: Path) -> None:
    """Linked files, pictures and headings exist in the clone; links to other sites are well-formed."""
    for target in re.findall(r'\]\(([^)]*)\)|(?:src|href)="([^"]*)"', without_code(document.read_text("utf-8"))):
        link = target[0] or target[1]
        if "//" in link or ":" in link:
            parts = urlsplit(link)
            assert parts.scheme == "https", link
            assert "." in parts.netloc, link
            assert not set(link) & set(' "<>'), link
            continue
        name, _, anchor = link.partition("#")
        path = (clone / document.relative_to(ROOT).parent / name) if name else clone / document.relative_to(ROOT)
        assert path.exists(), link
        assert not anchor or anchor in anchors(path), link


def test_each_promise_of_reliability_names_tests_that_exist() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", text)
    assert len(named) == text.count("::") - 1 > 30  # it explains the sign once
    for path, name in named:
        assert f"\ndef {name}(" in (ROOT / "tests" / path).read_text(encoding="utf-8"), f"{path}::{name}"
