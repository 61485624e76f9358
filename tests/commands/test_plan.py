"""folio plan against runs: memory, messages, and the report."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_refused, python

from folio import cli
from folio.commands import plan
from folio.machine.devices import normalize
from folio.machine.flops import GPUS
from folio.machine.memory import Memory, Step, bytes_sent, needed
from folio.model.config import GPTConfig

TINY = GPTConfig(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=32, bias=False)
GPT2 = GPTConfig(bias=False)
PARAMETERS = 124_373_760  # of GPT-2 without biases: 50304·768 + 1024·768 + 12·(12·768² + 2·768) + 768
BLOCK = 12 * 768**2  # of those in a block's matrices

# Prints in bytes by how much the process's memory grew at most after its imports
GROWTH = """
import re, sys
from pathlib import Path
import torch._dynamo  # an optimizer imports it
from folio import cli
from folio.commands import train

def status(name):
    return 1024 * int(re.search(rf"{name}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

before = status("VmRSS")
train.main(cli.parse(train.Options, sys.argv[1:], "folio train", files=True))
print("growth", status("VmHWM") - before)
"""

# Prints the bytes that a rank sends in a step, from the sizes of the messages that torch's profiler records
SENT = """
import json, os, sys
import torch
from folio.config.options import Processes, System
from folio.model.config import GPTConfig
from folio.model.gpt import GPT
from folio.machine.choices import resolve
from folio.machine.launch import exit_process
from folio.machine.runtime import Runtime

parallel, micro_steps, node, trace = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
os.environ["LOCAL_WORLD_SIZE"] = node
runtime = Runtime(resolve(System(device="cpu", dtype="bfloat16", compile=False), Processes(parallel=parallel)))
model = GPT(GPTConfig(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=32, bias=False))
loss = runtime.wrap(model, (2, 16))
tokens = torch.zeros(2, 16, dtype=torch.long)

def step():
    for m in range(micro_steps):
        with runtime.sync(loss, last=m == micro_steps - 1):
            runtime.backward(loss(tokens, tokens)[0])

step()
with torch.profiler.profile(record_shapes=True) as profiler:
    step()
if runtime.rank == 0:
    profiler.export_chrome_trace(trace)
runtime.close()
exit_process(0)
"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data set of 100,000 tokens."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 100_000), ("val", 10_000)):
        draw.integers(0, 1000, count).astype(np.uint16).tofile(tmp_path / f"{split}.bin")
    return tmp_path


def gpt2_on_gpus(**changes) -> Step:
    return Step(**{"rows": 12, "micro_steps": 5, "dtype": torch.bfloat16, "gpu": True, "world": 8, **changes})


# Memory


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        "--dtype=float32 --block_size=256 --batch_size=8 --gradient_accumulation_steps=1 "
        "--n_layer=4 --n_head=4 --n_embd=384 --vocab_size=1024",
        "--dtype=auto --block_size=512 --batch_size=4 --gradient_accumulation_steps=2 "
        "--n_layer=4 --n_head=8 --n_embd=384 --vocab_size=8192",
        "--dtype=auto --block_size=256 --batch_size=8 --gradient_accumulation_steps=2 --dropout=0.1 "
        "--n_layer=6 --n_head=4 --n_embd=512 --vocab_size=1024 --activation_checkpointing=block",
    ],
    ids=["short, float32", "long, auto", "recomputed, with dropout"],
)
def test_a_run_takes_the_memory_that_was_planned(tmp_path, data, options) -> None:
    """Within 15 %, on a CPU, with a C library that returns freed memory at once."""
    script = tmp_path / "growth.py"
    script.write_text(GROWTH)
    argv = [f"--data_dir={data}", "--device=cpu", *shlex.split(options)]
    run = f"--out_dir={tmp_path / 'out'} --max_iters=3 --eval_iters=1 --compile=False --warmup_iters=1"
    done = python(script, *argv, *run.split(), cwd=tmp_path, MALLOC_MMAP_THRESHOLD_="65536")
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout.split()[-1])
    asked = cli.parse(plan.Options, ["--gpu=cpu", *argv], "folio plan", files=True)
    planned = needed(asked.model, plan.step_of(asked, plan.device_of(asked))).total
    print(f"planned {planned / 1e6:.1f} MB, grown {grown / 1e6:.1f} MB: {planned / grown:.3f}")
    assert 200e6 < planned < 900e6
    assert planned == pytest.approx(grown, rel=0.15)


def test_weights_moments_and_gradients_are_sums_over_the_parameters() -> None:
    memory = needed(GPT2, gpt2_on_gpus())
    assert memory[:3] == (4 * PARAMETERS, 8 * PARAMETERS, 4 * PARAMETERS)
    assert memory.copies == 2 * (PARAMETERS - 1024 * 768 - 25 * 768)  # all matrices except the positions
    assert memory.logits == 3 * 4 * 12 * 1024 * 50304  # log softmax, its gradient and that of the logits


def test_muon_keeps_one_moment_of_the_blocks_matrices(folio, data) -> None:
    """And sends their updates in 16 bits with DDP; shards of momenta and updates, over all shards, with FSDP."""
    matrices = 12 * 12 * 768**2
    for shards, sent in ((1, 2 * matrices * 7 / 8), (8, (4 + 2) * matrices / 8 * 7 / 8)):
        muon, adamw = gpt2_on_gpus(shards=shards, muon=True), gpt2_on_gpus(shards=shards)
        assert needed(GPT2, muon).optimizer == 4 * (2 * PARAMETERS - matrices) // shards
        assert bytes_sent(GPT2, muon) - bytes_sent(GPT2, adamw) == pytest.approx(sent, abs=1)
    argv = ["train_gpt2", "--gpus=8", "--vocab_size=50304", f"--data_dir={data}"]
    plans = [folio("plan", *argv, *more).out for more in ((), ("--optimizer=muon",), ("--ema_decay=0.9",))]
    assert [re.search(r"([\d.]+) GB  optimizer", plan)[1] for plan in plans] == ["0.99", "0.66", "1.49"]


def test_sharding_divides_weights_moments_and_gradients_only() -> None:
    ddp, fsdp = (needed(GPT2, gpt2_on_gpus(micro_steps=1, shards=s)) for s in (1, 8))
    assert (8 * fsdp.weights, 8 * fsdp.optimizer) == (ddp.weights, ddp.optimizer)
    assert PARAMETERS / 2 < fsdp.gradients < ddp.gradients / 3
    assert fsdp.copies == 4 * (PARAMETERS - 12 * BLOCK) + 2 * (2 * BLOCK + 50304 * 768)
    assert fsdp[4:] == ddp[4:]
    summed = needed(GPT2, gpt2_on_gpus(micro_steps=2, shards=8))
    assert summed.gradients == 4 * (PARAMETERS + BLOCK)  # kept whole between micro steps
    assert needed(GPT2, gpt2_on_gpus(shards=4)).weights == PARAMETERS


def test_recomputation_keeps_the_input_of_each_block_and_one_block() -> None:
    kept, recomputed = (needed(GPT2, gpt2_on_gpus(recompute=r)) for r in (False, True))
    assert recomputed.activations < kept.activations / 5
    assert recomputed.activations > 13 * 12 * 1024 * 768 * 4
    assert recomputed.logits == kept.logits


def test_a_gpu_keeps_no_attention_scores_and_one_byte_per_dropped_element() -> None:
    shape = GPTConfig(block_size=256, vocab_size=65, n_layer=12, n_head=6, n_embd=384)
    step = Step(8, 1, torch.bfloat16, gpu=True)
    kept = needed(shape, step).activations
    scores = 12 * 6 * 256**2 * 8
    on_gpu, on_cpu = (needed(shape, replace(step, dtype=torch.float32, gpu=gpu)).activations for gpu in (True, False))
    assert on_cpu - on_gpu > 3 / 4 * 4 * scores * 0.9  # a CPU keeps those of a block of queries up to its last key
    dropped = needed(replace(shape, dropout=0.2), step).activations - kept
    assert dropped == pytest.approx(25 * 8 * 256 * 384, rel=0.2)  # after the embedding, and twice in a block


def test_memory_grows_with_the_rows() -> None:
    few, many = (needed(GPT2, gpt2_on_gpus(rows=rows)) for rows in (4, 8))
    assert many.logits == 2 * few.logits
    assert many.activations == pytest.approx(2 * few.activations, rel=0.05)
    assert many[:4] == few[:4]


# Messages


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parallel", "world", "node", "micro_steps"), [("ddp", 2, 2, 2), ("fsdp", 2, 2, 2), ("hsdp", 4, 2, 1)]
)
def test_a_step_sends_the_bytes_that_were_planned(tmp_path, parallel, world, node, micro_steps) -> None:
    script, trace = tmp_path / "sent.py", tmp_path / "trace.json"
    script.write_text(SENT)
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
    done = python(*launch, script, parallel, str(micro_steps), str(node), trace)
    assert done.returncode == 0, done.stderr
    shards = {"ddp": 1, "fsdp": world, "hsdp": node}[parallel]
    step = Step(2, micro_steps, torch.bfloat16, gpu=False, world=world, shards=shards)
    assert bytes_sent(TINY, step) == pytest.approx(_sent(trace, shards, world // shards), abs=8)


def _sent(trace: Path, shards: int, replicas: int) -> float:
    """Bytes by the ring algorithms. gloo records its reduce-scatter as an all-reduce too, which is subtracted."""
    size = {"float": 4, "c10::BFloat16": 2, "unsigned char": 1}
    found = {"gloo:all_reduce": 0, "c10d::_allgather_base_": 0, "c10d::_reduce_scatter_base_": 0}
    for event in json.loads(trace.read_text())["traceEvents"]:
        if (name := event.get("name")) in found:
            argument = 0 if name == "gloo:all_reduce" else 1  # its input
            kind, dims = (event["args"][key][argument] for key in ("Input type", "Input Dims"))
            found[name] += size[kind] * int(np.prod(dims))
    reduced, gathered, scattered = found.values()
    within = gathered * (shards - 1) + scattered * (shards - 1) / shards
    return within + (reduced - scattered) * 2 * (replicas - 1) / replicas


# The command


def test_gpt2_on_eight_gpus_by_hand(folio, data) -> None:
    argv = f"train_gpt2 --gpus 8 --gpu h100 --price 2 --vocab_size=50304 --data_dir={data}"
    code, out, err = folio("plan", *argv.split())
    assert (code, err) == (0, "")
    work = 6 * (PARAMETERS - 1024 * 768) + 12 * 12 * 768 * 1024  # of a token
    hours = 491_520 * 600_000 * work / (0.4 * 989e12 * 8) / 3600
    memory = needed(GPT2, gpt2_on_gpus())
    for said in (
        "124.37 M parameters (123.59 M without positions)",
        "8 × H100, ddp, bfloat16; each runs 5 micro steps of 12 rows",
        f"{memory.total / 1e9:.2f} GB  total",
        f"491,520 tokens, {491_520 * work / 1e12:.2f} TFLOP; each device sends {7 / 4 * 4 * PARAMETERS / 1e9:.2f} GB",
        "600,000 steps, 294.91 B tokens",
        f"100.00 k tokens in {data}, {491_520 * 600_000 / 1e5:,.2f} epochs",
        f"{hours:.1f} hours at an MFU of 0.4",
        f"{hours * 8 * 2:.2f} at 2 per device and hour",
    ):
        assert said in out
    assert out.splitlines()[-1] == f"fits: {memory.total / 1e9:.2f} of 80.00 GB"
    assert max(map(len, out.replace(str(data), "data").splitlines())) <= 120
    kinds = [float(line.split()[0]) for line in out.splitlines() if " GB  " in line]
    assert sum(kinds[:-1]) == pytest.approx(kinds[-1], abs=0.05)


def test_a_plan_without_data(folio, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = folio("plan", "train_gpt2", "--dataset=nowhere")
    assert (code, err) == (0, "")
    assert "nowhere" in out
    assert "the number of epochs is unknown" in out
    assert "context 1,024, vocab 50,304" in out
    assert "cost" not in out


def test_the_vocabulary_size_is_that_of_the_data_set(folio, story) -> None:
    out = folio("plan", "train_shakespeare_char", f"--data_dir={story}", "--gpu=cpu", "--dtype=float32").out
    size = json.loads((story / "meta.json").read_text())["vocab_size"]
    assert f"context 256, vocab {size}\n" in out
    assert "activations are freed" in out


@pytest.mark.parametrize(
    "argv",
    ["--gpu=t4", "--gpu=rtx4090 --gpus=2 --batch_size=64", "--gpu=l4 --gpus=4 --n_layer=24 --n_head=16 --n_embd=1024"],
)
def test_the_remedies_fit(folio, argv) -> None:
    argv = ["plan", "train_gpt2", *argv.split(), "--batch_size=24"]
    last = folio(*argv).out.splitlines()[-1]
    assert last.startswith("does not fit: ")
    ways = last.partition("what fits: ")[2].split(", or ")
    assert ways[0]
    for way in ways:
        remedied = folio(*argv, *way.split()).out
        assert remedied.splitlines()[-1].startswith("fits: ")
        assert "983,040 tokens" in remedied


def test_the_options_of_a_train_command_are_accepted(folio) -> None:
    """Users paste the command of a run; options that change no plan are checked for their type and ignored."""
    argv = ["train_shakespeare_char", "--max_iters=100", "--vocab_size=65", "--gpu=cpu", "--dtype=float32"]
    pasted = [
        "--eval_iters=20",
        "--log_interval",
        "1",
        "--wandb_log",
        "--no-always_save_checkpoint",
        "--out_dir=x",
        "--profile",
        "3",
    ]
    assert folio("plan", *argv, *pasted) == folio("plan", *argv)
    assert_refused(folio("plan", *argv, "--eval_iters=many"), "eval_iters", "many")
    assert_refused(folio("plan", *argv, "--eval_itres=20"), "eval_itres")
    assert_refused(folio("plan", *argv, "--eval_iters"), "eval_iters", "needs a value")


def test_a_tiny_model_is_planned_in_small_units(folio) -> None:
    shape = "--n_layer=2 --n_head=2 --n_embd=32 --block_size=32 --vocab_size=65 --batch_size=4"
    argv = f"{shape} --gradient_accumulation_steps=1 --max_iters=100 --gpu=cpu --dtype=float32"
    out = folio("plan", *argv.split()).out
    assert " MB  total\n" in out
    assert " MFLOP\n" in out
    assert " seconds at an MFU of 0.4" in out
    assert " GB  " not in out
    assert out.splitlines()[-1].startswith("fits: ")
    assert " MB of " in out.splitlines()[-1]


@pytest.mark.parametrize(
    ("seconds", "text"), [(7200, "2.0 hours"), (2700, "0.8 hours"), (90, "1.5 minutes"), (12, "12.0 seconds")]
)
def test_a_time_in_its_unit(seconds, text) -> None:
    assert plan._time(seconds / 3600) == text


def test_a_model_without_remedies(folio) -> None:
    argv = "--gpu=t4 --batch_size=1 --n_layer=48 --n_head=25 --n_embd=1600"
    last = folio("plan", *argv.split()).out.splitlines()[-1]
    assert last.startswith("does not fit: ")
    assert "no smaller batch, recomputation or sharding" in last


def test_the_page_about_scale_shows_the_output(folio) -> None:
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    shown = [block.splitlines() for block in page.split("```\n") if block.startswith("$ folio plan")]
    assert len(shown) == 2
    for command, *lines in shown:
        out = folio(*command.split()[2:]).out.splitlines()
        assert [line for line in lines if line != "…" and line not in out] == []


@pytest.mark.parametrize("name", ["H100", "h100 pcie", "a100-40gb", "RTX4090", "cpu"])
def test_a_device_by_its_name(name) -> None:
    device = plan.device_of(cli.parse(plan.Options, [f"--gpu={name}", "--dtype=float32"], "folio plan", files=True))
    assert device.peak
    assert device.memory > 1e9


def test_the_plain_names_of_devices_are_unique() -> None:
    assert len({normalize(name) for name in GPUS} | {"cpu"}) == len(GPUS) + 1


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--gpu=h10", ["gpu=h10", "did you mean 'H100'"]),
        ("--gpu=abacus", ["gpu=abacus", "A100", "cpu"]),
        ("--gpus=0", ["gpus=0", "at least 1"]),
        ("--mfu=40", ["mfu=40", "at most 1"]),
        ("--gpus=7", ["480 rows", "7 processes", "6 processes or 483 rows would fit"]),
        ("--gpus=8 --parallel=hsdp", ["parallel=hsdp", "gpus=8", "gpus_per_node=8", "--parallel=fsdp"]),
        ("--gpus=12 --parallel=hsdp", ["parallel=hsdp", "gpus=12", "gpus_per_node=8"]),
        ("--gpu=v100 --dtype=bfloat16", ["dtype=bfloat16", "V100", "--dtype=float16"]),
        ("--gpu=v100 --gpus=8 --parallel=fsdp", ["dtype=float16", "parallel=fsdp", "--dtype=float32"]),
        ("--init_from=gpt2-xl", ["init_from=gpt2-xl", "--n_layer"]),
    ],
)
def test_invalid_options_are_refused(folio, argv, words) -> None:
    assert_refused(folio("plan", "train_gpt2", *argv.split()), *words)


def test_the_total_is_the_sum_of_the_kinds() -> None:
    assert Memory(1, 2, 3, 4, 5, 6).total == 21
