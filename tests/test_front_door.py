"""The commands of nanoGPT's users, and the jobs for clusters, in a copy of the clone."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, STORY, TINY, run, succeed


def test_openwebtext_is_the_default_and_its_absence_is_one_line(clone: Path) -> None:
    """train.py without arguments trains on OpenWebText, with GPT-2's vocabulary; without the data, one line."""
    missing = run("python train.py --batch_size=32 --compile=False", clone)
    assert missing.returncode == 2
    assert missing.stderr.count("\n") == 1
    assert "data/openwebtext/train.bin" in missing.stderr
    folder = clone / "data" / "openwebtext"
    for split in ("train", "val"):
        np.random.default_rng(0).integers(0, 50257, 400).astype(np.uint16).tofile(folder / f"{split}.bin")
    out = succeed(f"python train.py --batch_size=32 --compile=False {TINY} --max_iters=1 --out_dir=out-owt", clone)
    assert "50304" in out
    assert f"tokens per iteration will be: {40 * 4 * 16:,}" in out


@pytest.mark.parametrize("script", ["train.py", "sample.py", "bench.py", "data/shakespeare_char/prepare.py"])
def test_sh_runs_the_scripts(clone: Path, script: str) -> None:
    """Under a POSIX shell the same file starts Python."""
    assert "usage:" in succeed(f"sh {script} --help", clone, VIRTUAL_ENV=sys.prefix)


def test_sh_prefers_the_active_venv_then_the_clones(clone: Path, tmp_path: Path) -> None:
    """$VIRTUAL_ENV, else .venv beside the script, else python3; each recognized by its output."""

    def fake(folder: Path, word: str) -> Path:
        (folder / "bin").mkdir(parents=True)
        (folder / "bin" / "python").write_text(f"#!/bin/sh\necho {word}\n")
        (folder / "bin" / "python").chmod(0o755)
        return folder

    active, path = fake(tmp_path / "active", "active"), fake(tmp_path / "path", "unused")
    (path / "bin" / "python3").symlink_to("python")
    plain = {"PATH": f"{path / 'bin'}:{os.environ['PATH']}", "VIRTUAL_ENV": ""}
    assert succeed("sh train.py", clone, **plain) == "unused\n"
    own = fake(clone / ".venv", "clone")
    for script in ("train.py", "data/shakespeare_char/prepare.py"):
        assert succeed(f"sh {script}", clone, **plain) == "clone\n"
        assert succeed(f"sh {script}", clone, VIRTUAL_ENV=str(active)) == "active\n"
    shutil.rmtree(own)


@pytest.mark.slow
def test_sh_trains(clone: Path) -> None:
    """Preparing, training and sampling under a POSIX shell."""
    env = {"VIRTUAL_ENV": sys.prefix}
    succeed(f"sh data/stdlib/prepare.py --source {ROOT / 'folio'}", clone, **env)
    succeed(f"sh train.py config/train_stdlib.py {TINY} --max_iters=3 --out_dir=out-sh", clone, **env)
    assert "-" * 15 in succeed("sh sample.py --out_dir=out-sh --num_samples=1 --max_new_tokens=5", clone, **env)


@pytest.mark.slow
def test_the_script_for_slurm(clone: Path, story: Path, tmp_path: Path) -> None:
    """With the real launcher, on one node with two processes; Slurm's own commands are replaced by stubs."""
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho localhost\n")
    (tmp_path / "srun").write_text('#!/bin/sh\nshift\nshift\nexec "$PYTHON" -m torch.distributed.run "$@"\n')
    for stub in tmp_path.iterdir():
        stub.chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "n[0-1]", "SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "2"}
    slurm |= {"SLURM_CPUS_PER_TASK": "2", "SLURM_JOB_ID": "7", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    line = f"bash scripts/slurm.sh shakespeare_char {TINY} --max_iters=2 --data_dir={story} --out_dir=out-slurm"
    assert "2 processes" in succeed(line, clone, PYTHON=sys.executable, **slurm)
    assert "resuming out-slurm at step 2" in succeed(f"{line} --max_iters=3", clone, PYTHON=sys.executable, **slurm)


@pytest.mark.slow
def test_the_job_for_kubernetes(clone: Path, story: Path) -> None:
    """Its command runs on one pod with two processes: launcher and trainer accept the arguments."""
    yaml = pytest.importorskip("yaml")
    service, job = yaml.safe_load_all((ROOT / "scripts" / "kubernetes.yaml").read_text(encoding="utf-8"))
    pod = job["spec"]["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"]
    (container,) = pod["containers"]
    assert {v["name"] for v in pod["volumes"]} == {m["name"] for m in container["volumeMounts"]}
    command = shlex.join(container["command"])
    assert f"--rdzv_endpoint={job['metadata']['name']}-0.{pod['subdomain']}:29500" in command
    for there, here in [
        ("--nnodes=2", "--nnodes=1"),
        ("--nproc_per_node=8", "--nproc_per_node=2"),
        ("folio-0.folio:29500", "localhost:29511"),
        ("/shared/openwebtext", str(story)),
        ("/shared/out", "out-pod"),
    ]:
        assert command.count(there) == 1
        command = command.replace(there, here)
    assert "2 processes" in succeed(f"{command} {TINY} --max_iters=2", clone)


def test_the_pipeline_of_the_docs(tmp_path: Path, shared_data: Path) -> None:
    """datatrove, used as in docs/scale.md, gives the same ids as folio prepare, and Folio trains on its files."""
    pytest.importorskip("datatrove")
    text = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    pipeline, _ = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "pipeline.py").write_text(pipeline, encoding="utf-8")
    (tmp_path / "documents").mkdir()
    lines = (shared_data / "wikitext2_valid.jsonl").read_bytes().splitlines(keepends=True)
    for name, part in ("a.jsonl", lines[:25]), ("b.jsonl", lines[25:]):
        (tmp_path / "documents" / name).write_bytes(b"".join(part))
    outside = {"PYTHONPATH": str(ROOT)}
    succeed("folio tokenizer train documents --vocab_size=600 --out=tokenizer.json", tmp_path, **outside)
    succeed("python pipeline.py", tmp_path, **outside)
    prepared = "folio prepare documents --name=own --tokenizer=tokenizer.json --val_documents=1"
    succeed(prepared, tmp_path, **outside)
    theirs = [np.fromfile(path, "<u2") for path in sorted((tmp_path / "data" / "crawl").glob("*.ds"))]
    ours = [np.fromfile(tmp_path / "data" / "own" / f"{split}.bin", "<u2") for split in ("val", "train")]
    assert np.array_equal(np.concatenate(theirs), np.concatenate(ours))
    info = succeed("folio data info data/crawl", tmp_path, **outside)
    assert "train " in info
    assert "600 ids" in info
    out = succeed(f"folio train --data_dir=data/crawl --document_mask {TINY} --max_iters=2", tmp_path, **outside)
    assert "are for validation" in out
    assert "token 0 ends a document" in out


def test_prompt_from_a_file(clone: Path) -> None:
    """--start=FILE:prompt.txt continues the text of the file."""
    succeed(f"python data/shakespeare_char/prepare.py --source {STORY} --overwrite", clone)
    succeed(f"python train.py config/train_shakespeare_char.py {TINY} --max_iters=3 --out_dir=out-file", clone)
    prompt = STORY.read_text(encoding="utf-8")[:12]
    (clone / "prompt.txt").write_text(prompt, encoding="utf-8")
    out = succeed(
        "python sample.py --out_dir=out-file --device=cpu --start=FILE:prompt.txt --num_samples=2 --max_new_tokens=4",
        clone,
    )
    assert out.startswith(prompt)
    assert out.count("-" * 15) == 2
