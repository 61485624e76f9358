"""Several processes compute what one process computes, with DDP, FSDP and HSDP, however they were started."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, Outcome
from launches import Train, Trained, by_hand, torchrun, trained
from run_results import assert_same_bits
from safetensors.torch import load_file, save_file

from folio.checkpoints import checkpoint, find
from folio.records import run_folder

# Rows that 1, 2, 3 and 4 processes can share, sizes that 3 does not divide (59 token ids), norms that are clipped
RUN = [*SMALL, "--n_embd=20", "--batch_size=2", "--gradient_accumulation_steps=12", "--dropout=0.2", "--grad_clip=0.5"]
RUN += ["--max_iters=50", "--lr_decay_iters=50", "--learning_rate=1e-2", "--eval_interval=10", "--eval_iters=3"]
RUN += ["--keep_checkpoints=9"]

# Trains, and writes as JSON the collectives of the training, and the errors of check_replicas before and after a rank
# changes one weight
SCRIPT = """
import collections, contextlib, json, sys
from pathlib import Path
import torch
from torch.profiler import profile
from folio import cli
from folio.config.options import TrainConfig
from folio.machine.launch import exit_process
from folio.training import loop, start
from folio.training.run import finish

folder, counted, changed, *argv = sys.argv[1:]
run = start.build(cli.parse(TrainConfig, argv, "folio train", files=True))
runtime, seen = run.runtime, {"replicas": []}
if counted == "steps alone":
    run.work = []
with profile() if not run.work else contextlib.nullcontext() as events:
    loop.fit(run)
if events:
    seen["calls"] = collections.Counter(e.name for e in events.events() if e.name.startswith("c10d::"))
    if runtime.parallel == "ddp":
        seen["buckets"] = len(run.loss._get_ddp_logging_data()["rebuilt_bucket_sizes"].split(","))
for change in (False, True):
    if change and runtime.rank == int(changed):
        weight = run.model.transformer.h[1].mlp.c_proj.weight.detach()
        (weight.to_local() if hasattr(weight, "to_local") else weight)[0, 0] += 1e-6
    try:
        runtime.check_replicas(run.model)
        seen["replicas"].append("")
    except FloatingPointError as error:
        seen["replicas"].append(str(error))
Path(folder, f"{runtime.rank}.json").write_text(json.dumps(seen))
finish(run)
exit_process(0)
"""

# Prints the threads that torch uses alone, and those of a process of a group
THREADS = """
import torch
alone = torch.get_num_threads()
from folio.config.options import System
from folio.machine.choices import resolve
from folio.machine.launch import exit_process
from folio.machine.runtime import Runtime
runtime = Runtime(resolve(System(device="cpu")))
print(alone, runtime.resolved["threads"], torch.get_num_threads())
runtime.close()
exit_process(0)
"""


@pytest.fixture(scope="module")
def run(story: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """RUN on so many ranks, once for each set of flags."""
    folder = tmp_path_factory.mktemp("runs")
    made: dict[tuple[Any, ...], Trained] = {}

    def once(ranks: int, *flags: str, how: str = "torchrun") -> Trained:
        key = (ranks, how, *flags)
        if key not in made:
            made[key] = trained(folder / str(len(made)), ranks, [*RUN, f"--data_dir={story}", *flags], how)
        return made[key]

    return once


@pytest.fixture(scope="module")
def scripted(story: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[dict[str, Any]]]:
    """The results of SCRIPT, by rank."""

    def seen(ranks: int, counted: str, changed: int, *flags: str, nodes: int = 1) -> list[dict[str, Any]]:
        folder = tmp_path_factory.mktemp("scripted")
        (folder / "script.py").write_text(SCRIPT)
        argv = [folder / "script.py", folder, counted, str(changed), *RUN, f"--data_dir={story}", *flags]
        done = torchrun(ranks, *argv, f"--out_dir={folder / 'out'}", nodes=nodes)
        assert all(d.returncode == 0 for d in done), [d.stderr for d in done]
        return [{"out": folder / "out", **json.loads((folder / f"{r}.json").read_text())} for r in range(ranks)]

    return seen


@pytest.fixture(scope="module")
def three(scripted: Callable[..., list[dict[str, Any]]]) -> Callable[[str], list[dict[str, Any]]]:
    """Three steps of four micro steps on each of three ranks, once for each value of ``parallel``."""
    made: dict[str, list[dict[str, Any]]] = {}

    def once(parallel: str) -> list[dict[str, Any]]:
        if parallel not in made:
            flags = ("--n_embd=160", "--max_iters=3", f"--parallel={parallel}")  # more than one of DDP's buckets
            made[parallel] = scripted(3, "steps alone", 1, *flags)
        return made[parallel]

    return once


@pytest.fixture(scope="module")
def hsdp(scripted: Callable[..., list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """RUN to its end on two machines of two processes."""
    return scripted(4, "all", 3, "--parallel=hsdp", "--check_replicas_every=20", nodes=2)


def assert_same_files(out: Path, other: Path) -> None:
    """The same bits in every checkpoint of the two runs."""
    assert_same_bits(out, other)
    for step in run_folder.steps(other):
        for name in (run_folder.MODEL, run_folder.OPTIMIZER):
            a, b = (run_folder.checkpoint_folder(folder, step) / name for folder in (out, other))
            assert a.read_bytes() == b.read_bytes(), (step, name)


def as_of(step: int, former: Path, out: Path) -> Path:
    """A copy of a run without the checkpoints after this step."""
    shutil.copytree(former, out)
    for later in run_folder.steps(out):
        if later > step:
            shutil.rmtree(run_folder.checkpoint_folder(out, later))
    return out


# Any number of processes


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "parallel"), [(2, "ddp"), (4, "ddp"), (3, "fsdp")])
def test_ranks_have_the_losses_of_one_process(run: Train, ranks: int, parallel: str) -> None:
    """Losses and evaluations to rounding, with dropout, and the norm of all gradients, which is clipped."""
    one, several = run(1), run(ranks, f"--parallel={parallel}")
    assert len(one.losses()) == 50 + 2 * 6
    assert several.losses() == pytest.approx(one.losses(), abs=1e-5)
    assert several.norms() == pytest.approx(one.norms(), rel=1e-4)
    assert max(one.norms()) > 2 * 0.5
    assert f"1 thread, {ranks} processes, {parallel}" in several.said


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_every_option_of_the_model(run: Train, parallel: str) -> None:
    """No position embeddings, no weights of norms, and a head that starts at zero."""
    flags = ["--position=rope", "--norm=unweighted", "--activation=relu2", "--qk_norm=True", "--logit_softcap=15"]
    flags += ["--zero_init=True", "--tie_weights=False", "--token_shift=2", "--max_iters=20"]
    one, three = run(1, *flags), run(3, f"--parallel={parallel}", *flags)
    assert three.losses() == pytest.approx(one.losses(), abs=1e-5)
    assert three.norms() == pytest.approx(one.norms(), rel=1e-4)


@pytest.mark.slow
def test_ranks_share_a_micro_step(run: Train) -> None:
    """If they do not divide the accumulation, the rows are the same but dropout is not, as a line says."""
    flags = ("--gradient_accumulation_steps=1", "--batch_size=6", "--dropout=0.0", "--max_iters=20")
    one, two = run(1, *flags), run(2, *flags)
    assert two.losses() == pytest.approx(one.losses(), abs=1e-5)
    assert two.norms() == pytest.approx(one.norms(), rel=1e-4)
    line = "2 processes do not divide the micro steps: dropout masks are not those of one process"
    assert (line in two.said, line in one.said) == (True, False)


@pytest.mark.slow
def test_forty_micro_steps_on_sixteen_processes(run: Train) -> None:
    """nanoGPT's accumulation on two machines of eight GPUs, which nanoGPT refuses."""
    flags = ("--gradient_accumulation_steps=40", "--dropout=0.0", "--max_iters=2")
    one, sixteen = run(1, *flags), run(16, *flags)
    assert len(one.losses()) == 2 + 2 * 2
    assert sixteen.losses() == pytest.approx(one.losses(), abs=1e-5)
    assert sixteen.norms() == pytest.approx(one.norms(), rel=1e-4)


@pytest.mark.slow
def test_an_error_on_every_rank_is_one_line(story: Path, tmp_path: Path) -> None:
    """The launcher prints others around it."""
    flags = (
        "--gradient_accumulation_steps=1",
        "--batch_size=5",
        f"--data_dir={story}",
        f"--out_dir={tmp_path / 'out'}",
    )
    (done,) = torchrun(2, "train.py", *SMALL, *flags)
    assert done.returncode != 0
    assert done.stderr.count("5 rows cannot be shared by 2 processes: 1 process or 4 rows would fit") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_gradients_are_exchanged_once_a_step(three: Callable[..., list[dict[str, Any]]], parallel: str) -> None:
    """For any number of micro steps: each bucket of gradients, or each group of parameters, and the loss.

    Before each further micro step the ranks also ask on their CPUs whether any of them received a signal.
    """
    for seen in three(parallel):
        calls = seen["calls"]
        if parallel == "ddp":
            assert seen["buckets"] > 1
            assert calls["c10d::allreduce_"] == 3 * (seen["buckets"] + 1 + 3)
        else:
            assert calls["c10d::_reduce_scatter_base_"] == 3 * (2 + 1)  # two blocks, and the other weights
            assert calls["c10d::allreduce_"] == 3 * (1 + 1 + 3)  # the norm's too
            assert calls["c10d::_allgather_base_"] > 3 * 4  # every micro step


# Sharded models


@pytest.mark.slow
def test_sharding_in_bfloat16(run: Train) -> None:
    """Products are in bfloat16 and all else in float32, as with DDP.

    Without clipping, since the norm of shards is summed in another order, which may round a weight differently.
    """
    flags = ("--dtype=bfloat16", "--n_embd=32", "--max_iters=20", "--grad_clip=0.0")
    whole, shares = (run(2, *flags, f"--parallel={parallel}").losses() for parallel in ("ddp", "fsdp"))
    assert shares == pytest.approx(whole, abs=1e-6)
    assert run(1, *flags, "--dtype=float32").losses() != pytest.approx(whole, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "parallel"), [(1, "ddp"), (3, "fsdp")])
def test_recomputed_blocks_give_the_same_bits(run: Train, ranks: int, parallel: str) -> None:
    """The same dropout is drawn again."""
    flag = f"--parallel={parallel}"
    plain = run(ranks, flag) if ranks > 1 else run(1)
    assert_same_files(run(ranks, flag, "--activation_checkpointing=block").out, plain.out)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "parallel"), [(2, "ddp"), (3, "ddp"), (2, "fsdp"), (3, "fsdp")])
def test_processes_share_the_work_of_muon(story: Path, tmp_path: Path, ranks: int, parallel: str) -> None:
    """The losses are those of one process, also where the ranks do not divide the matrices or their rows."""
    argv = [*RUN, f"--data_dir={story}", "--optimizer=muon", "--ema_decay=0.5", "--n_layer=5", "--max_iters=20"]
    one, several = trained(tmp_path / "1", 1, argv), trained(tmp_path / "n", ranks, [*argv, f"--parallel={parallel}"])
    assert several.losses() == pytest.approx(one.losses(), abs=1e-5)
    assert several.norms() == pytest.approx(one.norms(), rel=1e-4)
    name = run_folder.OPTIMIZER
    whole, shared = (load_file(run_folder.checkpoint_folder(run.out, 20) / name) for run in (one, several))
    torch.testing.assert_close(shared, whole, rtol=0, atol=1e-5)
    as_of_10 = as_of(10, several.out, tmp_path / "resumed")
    trained(as_of_10, ranks, ["--init_from=resume"])
    assert_same_files(as_of_10, several.out)


@pytest.mark.slow
def test_sharding_within_each_machine(run: Train, hsdp: list[dict[str, Any]]) -> None:
    """Two machines of two processes have the losses of four processes with whole models."""
    several, whole = Trained(hsdp[0]["out"], ""), run(4, "--parallel=ddp")
    assert several.losses() == pytest.approx(whole.losses(), abs=1e-5)
    assert several.norms() == pytest.approx(whole.norms(), rel=1e-4)
    state = find.choose(several.out, "latest").state
    assert (state["resolved"]["world"], state["resolved"]["parallel"]) == (4, "hsdp")


# Checkpoints


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["fsdp", "hsdp"])
def test_a_checkpoint_of_shards_is_whole(
    run: Train, request: pytest.FixtureRequest, folio: Callable[..., Outcome], parallel: str
) -> None:
    """Every weight and every tensor of the optimizer by name, as one process writes them; folio sample reads it."""
    out = run(3, "--parallel=fsdp").out if parallel == "fsdp" else request.getfixturevalue("hsdp")[0]["out"]
    for step in (10, 50):
        for name, error in ((run_folder.MODEL, 1e-4), (run_folder.OPTIMIZER, 1e-6)):
            shares, whole = (
                load_file(run_folder.checkpoint_folder(folder, step) / name) for folder in (out, run(1).out)
            )
            torch.testing.assert_close(shares, whole, rtol=0, atol=error)
    found = find.choose(out, "latest")
    names = {name for name, _ in found.model().named_parameters()}
    assert {"transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.weight"} < names
    assert {name for name, _ in found.slots()} == {f"{n}/{s}" for n in names for s in ("step", "exp_avg", "exp_avg_sq")}
    outcome = folio("sample", f"--out_dir={out}", "--device=cpu", "--num_samples=1", "--max_new_tokens=5")
    assert (outcome.code, outcome.err) == (0, "")


@pytest.mark.slow
def test_a_sharded_run_resumes_in_the_same_bits(run: Train, tmp_path: Path) -> None:
    """On the same number of processes: the files of a run that was not interrupted."""
    undisturbed = run(3, "--parallel=fsdp").out
    out = as_of(20, undisturbed, tmp_path / "out")
    said = trained(out, 3, ["--init_from=resume"]).said
    assert f"resuming {out} at step 20" in said
    assert "exact to rounding" not in said
    assert_same_files(out, undisturbed)


@pytest.mark.slow
def test_a_run_resumes_on_other_numbers_of_processes(run: Train, tmp_path: Path) -> None:
    """With other sharding too; the losses stay those of one process."""
    out = as_of(10, run(3, "--parallel=fsdp").out, tmp_path / "out")
    moves = [
        (2, "ddp", "world was 3 and is 2; parallel was fsdp and is ddp"),
        (1, "ddp", "world was 2 and is 1"),
        (4, "fsdp", "world was 1 and is 4; parallel was ddp and is fsdp"),
    ]
    for i, (ranks, parallel, differences) in enumerate(moves, start=1):
        flags = ["--init_from=resume", f"--parallel={parallel}", f"--max_iters={10 * (i + 1)}"]
        said = trained(out, ranks, flags).said
        assert f"resuming {out} at step {10 * i}\n" in said
        assert f"exact to rounding only: {differences}\n" in said
    expected = Trained(run(1).out, "").losses()[: 40 + 2 * 5]
    assert Trained(out, "").losses() == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_a_run_of_several_machines_resumes_on_one_process(
    run: Train, hsdp: list[dict[str, Any]], tmp_path: Path
) -> None:
    out = as_of(20, hsdp[0]["out"], tmp_path / "out")
    moved = trained(out, 1, ["--init_from=resume"])
    assert "exact to rounding only: world was 4 and is 1; parallel was hsdp and is ddp\n" in moved.said
    assert moved.losses(20) == pytest.approx(run(1).losses(20), abs=1e-5)


def test_a_checkpoint_written_during_training_is_of_its_step(
    story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if writing takes long: the files of a run that waits for it."""
    monkeypatch.setattr(checkpoint, "save_file", lambda *args: (time.sleep(0.2), save_file(*args)))
    for meanwhile in (True, False):
        argv = [*RUN, f"--data_dir={story}", "--max_iters=20", f"--async_checkpoint={meanwhile}"]
        trained(tmp_path / str(meanwhile), 1, argv)
    assert_same_files(tmp_path / "True", tmp_path / "False")


# Replicas


@pytest.mark.slow
def test_a_rank_whose_weights_changed_is_named(three: Callable[..., list[dict[str, Any]]]) -> None:
    """On every rank, with the parameter; before the change there is no error."""
    for seen in three("ddp"):
        before, after = seen["replicas"]
        assert before == ""
        assert "the weights of rank 1 differ from those of" in after
        assert "first transformer.h.1.mlp.c_proj.weight" in after


@pytest.mark.slow
def test_a_shard_that_changed_is_named(hsdp: list[dict[str, Any]]) -> None:
    """It is compared with the same shard on the other machine."""
    for seen in hsdp:
        before, after = seen["replicas"]
        assert before == ""
        assert "the weights of rank 3 differ from those of" in after
        assert "first transformer.h.1.mlp.c_proj.weight" in after


# How they are started


@pytest.mark.slow
def test_started_by_hand(run: Train, tmp_path: Path) -> None:
    """Five variables and no launcher: the same files, even if each process has another name for the run."""
    (tmp_path / "named.py").write_text("import time\nwandb_run_name = 'run' + str(time.time())\n")
    flags = (str(tmp_path / "named.py"), "--async_checkpoint=False")
    assert_same_files(run(2, *flags, how="by hand").out, run(2, "--parallel=ddp").out)


@pytest.mark.slow
def test_processes_share_the_cores(tmp_path: Path) -> None:
    """Two use half of torch's threads each, unless OMP_NUM_THREADS is set."""
    (tmp_path / "threads.py").write_text(THREADS)
    variables: list[dict[str, str]] = [{}, {"OMP_NUM_THREADS": "2"}]
    for env in variables:
        done = by_hand(2, tmp_path / "threads.py", **env)
        assert [d.returncode for d in done] == [0, 0], done
        for alone, taken, used in (map(int, d.stdout.split()) for d in done):
            assert taken == used == (alone if env else max(1, alone // 2))
