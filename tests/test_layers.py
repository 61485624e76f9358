"""Imports go down only: checks the layers of the package in its syntax trees."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter

import pytest
from conftest import ROOT

LAYERS = [
    {"", "errors", "files", "locks", "rng", "config", "model"},  # "" is folio/__init__.py
    {"data", "machine", "records"},
    {"checkpoints", "generation", "preparation"},
    {"checks", "evaluation"},
    {"training"},
    {"commands", "doors"},
    {"cli", "api", "__main__"},
]
DELEGATES = {  # modules with the functions behind nanoGPT's methods of GPT
    "checkpoints.find",
    "generation.sampling",
    "machine.flops",
    "machine.probe",
    "training.optimizers",
}
PUBLIC = {
    "api",
    "config.options",
    "model.config",
    "model.gpt",
}  # modules with the package's public names, imported on demand
OWNERS = {
    "torch.distributed": {"machine.failures", "machine.launch", "machine.processes", "machine.shares", "machine.wrap"},
    "wandb": {"records.trackers"},
    "trackio": {"records.trackers"},
    "torch.utils.tensorboard": {"records.trackers"},
    "transformers": {"checkpoints.hugging_face"},
    "lm_eval": {"evaluation.harness", "evaluation.language_model"},
}
MODULES = {
    ".".join(path.relative_to(ROOT / "folio").with_suffix("").parts).removesuffix("__init__").rstrip("."): path
    for path in sorted((ROOT / "folio").rglob("*.py"))
    if path.parent.name != "presets"
}


def imports(nodes: Iterator[ast.AST]) -> Iterator[str]:
    """The modules that these nodes import; ``from folio import rng`` imports folio.rng."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name.removeprefix("folio.") in MODULES else node.module or "" for name in inner)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield "torch.distributed"


def imported(module: str) -> set[str]:
    return set(imports(ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8")))))


def layer(module: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if module.split(".")[0] in names)


def test_imports_go_down_only() -> None:
    """Deferred imports count too; within a layer there is no circle."""
    graph = {
        module: {name.removeprefix("folio").removeprefix(".") for name in imported(module) if name.startswith("folio")}
        for module in MODULES
    }
    assert graph["model.gpt"] >= DELEGATES
    graph["model.gpt"] -= DELEGATES
    assert graph.pop("") == PUBLIC
    assert not {(module, name) for module in graph for name in graph[module] if layer(name) > layer(module)}
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError


@pytest.mark.parametrize("package", OWNERS)
def test_a_package_has_one_owner(package: str) -> None:
    users = {m for m in MODULES if any(n == package or n.startswith(f"{package}.") for n in imported(m))}
    assert users == OWNERS[package]


def test_the_model_needs_torch_alone() -> None:
    """At module level; its delegates are counted above."""
    rooms = [path for name, path in MODULES.items() if name.startswith("model.")]
    body = [node for path in rooms for node in ast.parse(path.read_text(encoding="utf-8")).body]
    names = {name for name in imports(iter(body)) if not name.startswith(("folio.model.", "folio.errors"))}
    assert {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) == {"torch"}
