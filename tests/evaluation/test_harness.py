"""Folio's scores equal those of the lm-evaluation-harness's own HFLM on the same tasks."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import python

from folio.checkpoints import checkpoint, find, hugging_face
from folio.checkpoints.state import foreign_state
from folio.config.options import System
from folio.data.tokenizers import Bytes, Tiktoken
from folio.evaluation import harness, hellaswag
from folio.evaluation.scoring import score
from folio.machine.choices import resolve
from folio.machine.runtime import Runtime
from folio.model.config import GPTConfig
from folio.model.gpt import GPT

lm_eval = pytest.importorskip("lm_eval")
pytest.importorskip("accelerate")  # which their HFLM needs
transformers = pytest.importorskip("transformers")
Instance = pytest.importorskip("lm_eval.api.instance").Instance
TaskManager = pytest.importorskip("lm_eval.tasks").TaskManager
LanguageModel = pytest.importorskip("folio.evaluation.language_model").LanguageModel

THEIRS = Path(lm_eval.__file__).parent / "tasks"

# What WikiHow's marks, spaces and characters may come to; labels as the hub's copy has them
ODD = [
    ("Health", "[header] How to rest [title] Lie. [step] Close your eyes.", "", ["[step] Sleep.", "Run [title] on."]),
    ("Food", "A pan  is  heated.   ", "she adds oil and", ["stirs.", "jumps  over."]),
    ("Travel", "Une gare à Zürich", "the train, 渡し船 🚢,", ["fährt ab.", "naïvely – waits"]),
    ("Work", "He opens the letter. [step]", "", [" reads it. ", "[substeps] eats it."]),
    ("Work", "He opens the letter.\n[step]\u00a0", "HE Reads", ["aloud [title] and  slowly  .", "it…"]),
    ("[title] Home", "They sit", " ", ["down [ 1 ] .", "up [not closed"]),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ignores the libraries' warnings; nothing is cached beyond the test."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def wrapped(model: GPT) -> Runtime:
    runtime = Runtime(resolve(System(device="cpu", dtype="float32", compile=False, matmul_precision="highest")))
    runtime.wrap(model, None)
    return runtime


@pytest.fixture
def pair(tmp_path: Path, gpt2: Tiktoken) -> Callable[[int], tuple[GPT, Any]]:
    """A model far from indifference, with so long a context; and as their HFLM, from the folder of an export."""

    def made(block_size: int) -> tuple[GPT, Any]:
        from lm_eval.models.huggingface import HFLM

        shape = GPTConfig(block_size=block_size, vocab_size=50257, n_layer=2, n_head=2, n_embd=32)
        model, generator = GPT(shape), torch.Generator().manual_seed(1)
        for name, p in model.named_parameters():
            p.data = torch.randn(p.shape, generator=generator) * 0.3 + (p.dim() == 1 and name.endswith("weight"))
        state = foreign_state(shape, gpt2.to_json())
        checkpoint.save(tmp_path / "out", 0, dict(model.named_parameters()), {}, state)
        hugging_face.export(find.in_folder(tmp_path / "out"), tmp_path / "hf")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
        words = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
        return model, HFLM(pretrained=theirs, tokenizer=words, batch_size=1, max_length=block_size)

    return made


def task(folder: Path, name: str, items: list[dict[str, Any]], **changes: Any) -> Path:
    """The file of one of the harness's tasks, over these items."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    config = {
        "include": str(next((THEIRS / name).glob(f"{name}.yaml"))),
        "task": f"{name}_here",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"validation": str(data)}},
        "training_split": None,
        "validation_split": "validation",
        "test_split": None,
        **changes,
    }
    path = folder / f"{name}_here.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


def asked(lm: Any, path: Path) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """What their evaluator finds: the metrics, and what it knows of each document."""
    found = lm_eval.simple_evaluate(lm, tasks=[str(path)], task_manager=TaskManager(include_defaults=False))
    (metrics,), (samples,) = found["results"].values(), found["samples"].values()
    return metrics, sorted(samples, key=lambda s: s["doc_id"])


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]


def real(folder: Path, name: str, count: int) -> list[dict[str, Any]]:
    with (folder / name).open(encoding="utf-8") as file:
        return [json.loads(next(file)) for _ in range(count)]


@pytest.mark.parametrize(
    ("which", "block_size"), [pytest.param("real", 96, marks=pytest.mark.slow), ("real", 48), ("odd", 96), ("odd", 16)]
)
def test_hellaswag(tmp_path, pair, gpt2, shared_data, caplog, which, block_size) -> None:
    """Their code on their model, Folio's HellaSwag, and Folio's model under their code: one result."""
    items = [
        {"activity_label": a, "ctx_a": b, "ctx_b": c, "endings": [*endings, "x", "y [a] z"], "label": str(i % 4)}
        for i, (a, b, c, endings) in enumerate(ODD)
    ]
    if which == "real":
        items = real(shared_data, "hellaswag_val_head5000.jsonl", 24)
    path = task(tmp_path, "hellaswag", items)
    model, theirs = pair(block_size)
    metrics, samples = asked(theirs, path)

    questions = hellaswag.encode(hellaswag.read(tmp_path / "hellaswag.jsonl", "harness"), "harness", gpt2, model.config)
    runtime = wrapped(model)
    nats = score(model, questions.queries, runtime).nats.reshape(-1, 4)
    wanted = -np.array([[log_p for log_p, _ in s["filtered_resps"]] for s in samples])
    assert np.allclose(nats, wanted, rtol=1e-6, atol=1e-4)
    found = hellaswag.evaluate(model, questions, runtime)
    assert (found["acc"], found["acc_norm"], found["total"]) == (
        metrics["acc,none"],
        metrics["acc_norm,none"],
        len(items),
    )

    pairs = [[theirs._encode_pair(*each) for each in s["arguments"]] for s in samples]
    cut = [[len(context) + len(ending) > block_size + 1 for context, ending in item] for item in pairs]
    assert caplog.text.count("exceeds model's maximum length") == sum(map(sum, cut))
    assert questions.cut == sum(map(any, cut)) > (0 if block_size < 96 else -1)

    ours = harness.evaluate(model, gpt2, [str(path)], runtime)["hellaswag_here"]
    assert ours == {name.removesuffix(",none"): value for name, value in metrics.items() if "," in name}


def test_limit(tmp_path, pair, gpt2, shared_data) -> None:
    path = task(tmp_path, "hellaswag", real(shared_data, "hellaswag_val_head5000.jsonl", 12))
    model, _ = pair(96)
    few, runtime = tmp_path / "few.jsonl", wrapped(model)
    few.write_text("".join((tmp_path / "hellaswag.jsonl").read_text(encoding="utf-8").splitlines(True)[:5]))
    wanted = hellaswag.evaluate(
        model, hellaswag.encode(hellaswag.read(few, "harness"), "harness", gpt2, model.config), runtime
    )
    found = harness.evaluate(model, gpt2, [str(path)], runtime, limit=5)["hellaswag_here"]
    assert (found["acc"], found["acc_norm"]) == (wanted["acc"], wanted["acc_norm"])


def test_perplexity(tmp_path, pair, gpt2, shared_data) -> None:
    """In windows: texts longer than the context several times, of exactly its length, of one token, of none."""
    text = real(shared_data, "wikitext2_valid.jsonl", 1)[0]["text"]
    ids = gpt2.encode(text).tolist()
    texts = [text[:3000], *(gpt2.bytes(ids[:n]).decode() for n in (64, 65, 1)), ""]
    model, theirs = pair(64)
    lm = LanguageModel(model, gpt2, wrapped(model))
    wanted = theirs.loglikelihood_rolling(requests("loglikelihood_rolling", *((t,) for t in texts)))
    found = lm.loglikelihood_rolling(requests("loglikelihood_rolling", *((t,) for t in texts)))
    assert found == pytest.approx(wanted, rel=1e-6)
    assert found[-1] == 0
    path = task(tmp_path, "wikitext", [{"page": t} for t in texts[:2]])
    metrics, _ = asked(theirs, path)
    ours = harness.evaluate(model, gpt2, [str(path)], wrapped(model))["wikitext_here"]
    names = ("word_perplexity", "byte_perplexity", "bits_per_byte")
    assert ours == pytest.approx({name: metrics[f"{name},none"] for name in names}, rel=1e-6)


def test_loglikelihood(pair, gpt2) -> None:
    """In the order of the requests, whatever they share."""
    model, theirs = pair(32)
    lm = LanguageModel(model, gpt2, wrapped(model))
    long = "The ferry did not leave " * 9
    (likely,) = theirs.generate_until(requests("generate_until", ("The ferry", {"max_gen_toks": 3})))
    pairs = [
        ("The ferry", " left the pier"),
        ("", "Nobody came."),
        ("The ferry", likely),
        ("The ferry", likely + " then"),
        ("A dog  ", "barks"),
        ("The ferry", " sank"),
        ("", "<|endoftext|>Nobody"),
        ("One<|endoftext|>", "Two"),
        (long, " again and again"),
        (long, " today"),
        ("Zürich – 渡し船", " 🚢\n"),
        ("The ferry", " left the pier"),
    ]
    wanted = theirs.loglikelihood(requests("loglikelihood", *pairs))
    found = lm.loglikelihood(requests("loglikelihood", *pairs))
    assert [answer for answer, _ in found] == pytest.approx([answer for answer, _ in wanted], abs=1e-4)
    assert [whole for _, whole in found] == [whole for _, whole in wanted]
    assert [i for i, (_, whole) in enumerate(found) if whole] == [2]


def test_a_context_is_read_once(pair, gpt2) -> None:
    """For all its continuations, in rows no longer than the context of the model."""
    model, _ = pair(32)
    lm, shapes = LanguageModel(model, gpt2, wrapped(model)), []
    model.transformer.wte.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    lm.loglikelihood(requests("loglikelihood", *(("One two three four", f" {c} end") for c in "abcd")))
    assert shapes == [(1, 4 + 4)]
    shapes.clear()
    lm.loglikelihood(requests("loglikelihood", *(("", f"{i} and so on") for i in range(99))))
    assert max(tokens for _, tokens in shapes) <= 32
    assert sum(rows for rows, _ in shapes) < 30


@pytest.mark.parametrize(
    "asked",
    [
        {"max_gen_toks": 20},
        {"until": "a", "max_gen_toks": 20},
        {"until": ["\n", " the", "ing"], "max_gen_toks": 24, "do_sample": False, "temperature": 0.7},
        {"until": [""], "max_gen_toks": 1, "temperature": 0.0},
    ],
)
def test_generation(pair, gpt2, asked) -> None:
    """Greedily what theirs write; a prompt that is too long keeps its end."""
    model, theirs = pair(48)
    lm = LanguageModel(model, gpt2, wrapped(model))
    prompts = ["The ferry", "A", "One, two, three " * 20, "Zürich 🚢", "<|endoftext|>"]
    asks = requests("generate_until", *((prompt, dict(asked)) for prompt in prompts))
    assert lm.generate_until(asks) == theirs.generate_until(asks)


def test_the_end_of_a_text_ends_it(pair, gpt2) -> None:
    model, theirs = pair(48)
    model.lm_head.weight.data[gpt2.eot] = 3 * model.transformer.ln_f.bias.data  # likelier than all but the likeliest
    theirs.model.lm_head.weight.data.copy_(model.lm_head.weight.data)
    lm = LanguageModel(model, gpt2, wrapped(model))
    asks = requests("generate_until", *((prompt, {"max_gen_toks": 16}) for prompt in ("The", "A", "One", "Two")))
    found = lm.generate_until(asks)
    assert found == theirs.generate_until(asks)
    assert len({len(gpt2.encode(text)) for text in found}) > 1


def test_drawn_texts(pair, gpt2) -> None:
    """The same at each call, but not at each request."""
    model, _ = pair(48)
    lm = LanguageModel(model, gpt2, wrapped(model))
    asks = requests("generate_until", *[("The", {"max_gen_toks": 9, "do_sample": True, "temperature": 1.0})] * 3)
    found = lm.generate_until(asks)
    assert len(set(found)) == 3
    torch.rand(1)
    assert lm.generate_until(asks) == found


RANKS = """
import json, sys
import torch
from folio.checkpoints import find
from folio.evaluation import harness
from folio.config.options import Processes, System
from folio.machine.choices import resolve
from folio.machine.launch import exit_process
from folio.machine.runtime import Runtime

model_folder, out, parallel, *tasks = sys.argv[1:]
runtime = Runtime(resolve(System(device="cpu", dtype="float32", compile=False), Processes(parallel=parallel)))
found = find.by_name(model_folder)
model = found.model()
runtime.wrap(model, None)
told = []
for names in (tasks, ["no such task"]):
    try:
        told.append(harness.evaluate(model, found.tokenizer(), names, runtime))
    except ValueError as error:
        told.append(str(error))
print(json.dumps(told), file=open(f"{out}-{runtime.rank}.json", "w"))
runtime.close()
exit_process(0)
"""


@pytest.mark.slow
def test_several_processes(tmp_path, pair, gpt2, shared_data) -> None:
    """All ranks get the results and errors of a single process, for scores and for generated texts."""
    scored = task(tmp_path, "hellaswag", real(shared_data, "hellaswag_val_head5000.jsonl", 12))
    written = tmp_path / "written.yaml"
    settings = {
        "task": "written",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(tmp_path / "hellaswag.jsonl")}},
        "validation_split": "validation",
        "output_type": "generate_until",
        "doc_to_text": "{{ctx_a}}",
        "doc_to_target": "",
        "generation_kwargs": {"until": ["the", "a"], "max_gen_toks": 12},
        "metric_list": [{"metric": "chrf", "aggregation": "chrf", "higher_is_better": True}],
    }
    written.write_text(json.dumps(settings))
    model, _ = pair(64)
    tasks = [str(scored), str(written)]
    (tmp_path / "ranks.py").write_text(RANKS)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = python(*launcher, tmp_path / "ranks.py", tmp_path / "out", tmp_path / "told", "fsdp", *tasks)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"told-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first[0].keys() == {"hellaswag_here", "written"}
    assert "'no such task'" in first[1]
    assert first[0] == harness.evaluate(model, gpt2, tasks, wrapped(model))


# Refusals


def refused(error: type[Exception], *tasks: str, model: GPT, tokens: Any, words: tuple[str, ...]) -> None:
    with pytest.raises(error) as told:
        harness.evaluate(model, tokens, list(tasks), wrapped(model))
    assert "\n" not in str(told.value)
    for word in words:
        assert word in str(told.value)


@pytest.fixture
def small() -> GPT:
    return GPT(GPTConfig(block_size=16, vocab_size=256, n_layer=1, n_head=1, n_embd=8))


def test_no_such_task(small, tmp_path) -> None:
    refused(
        ValueError, "hellaswagg", model=small, tokens=Bytes(), words=("'hellaswagg'", "did you mean", "'hellaswag'")
    )
    refused(ValueError, "qqqqqqqq", model=small, tokens=Bytes(), words=("'qqqqqqqq'", "lm-eval ls tasks"))
    path = str(tmp_path / "no.yaml")
    refused(FileNotFoundError, path, model=small, tokens=Bytes(), words=(path, "no such task file"))


def test_a_task_that_cannot_be_loaded(small, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    words = ("task hellaswag", "Rowan/hellaswag", "Hugging Face hub")
    refused(ValueError, "hellaswag", model=small, tokens=Bytes(), words=words)
    broken = tmp_path / "broken.yaml"
    broken.write_text("task: broken\noutput_type: [multiple_choice\n")
    refused(ValueError, str(broken), model=small, tokens=Bytes(), words=(str(broken), "could not be loaded"))


def test_what_the_model_cannot_answer(small) -> None:
    lm = LanguageModel(small, Bytes(), wrapped(small))
    with pytest.raises(ValueError, match="end-of-text"):
        lm.loglikelihood(requests("loglikelihood", ("", "text")))
    with pytest.raises(ValueError, match="end-of-text"):
        lm.loglikelihood_rolling(requests("loglikelihood_rolling", ("text",)))
    with pytest.raises(ValueError, match=r"16 new tokens.*block_size=16"):
        lm.generate_until(requests("generate_until", ("The", {"max_gen_toks": 16})))
    with pytest.raises(ValueError, match="continuation without tokens"):
        lm.loglikelihood(requests("loglikelihood", ("context", "")))


def test_silence(tmp_path, pair, gpt2, capfd) -> None:
    """The harness prints no bars and no log lines, even when texts are cut."""
    path = task(tmp_path, "wikitext", [{"page": "The ferry did not leave " * 20}])
    model, _ = pair(16)
    capfd.readouterr()
    harness.evaluate(model, gpt2, [str(path)], wrapped(model))
    assert capfd.readouterr() == ("", "")
