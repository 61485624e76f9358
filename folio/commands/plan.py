"""folio plan: the memory, time and cost of a run, computed before it runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from folio.config import depth
from folio.config.compose import accumulated, with_depth
from folio.config.declare import MFU, depth_option, max_flops_option, option
from folio.config.options import Data, Optimizer, Processes, System, TrainConfig
from folio.config.table import override
from folio.errors import UserError
from folio.model.config import PADDED_GPT2, GPTConfig
from folio.records.console import show

if TYPE_CHECKING:
    from folio.data.rows import Tokens
    from folio.machine.devices import Device
    from folio.machine.estimate import Estimate
    from folio.machine.memory import Memory, Step

IGNORED = TrainConfig  # options that only folio train has: they do not change a plan
_KINDS = {
    "weights": "weights",
    "optimizer": "optimizer",
    "gradients": "gradients",
    "copies": "copies of weights, gathered or in 16 bits",
    "activations": "activations",
    "logits": "logits and their gradient",
    "total": "total",
}
_BYTES = {"GB": 1e9, "MB": 1e6}  # from the largest unit to the smallest
_FLOPS = {"TFLOP": 1e12, "GFLOP": 1e9, "MFLOP": 1e6}


@dataclass(frozen=True)
class Options:
    """Compute what a run would need: folio plan [PRESET or FILE …] --gpus=8 --gpu=h100 [--option=value …]."""

    gpus: int = option(1, "devices; each runs one process", min=1)
    gpu: str = option(
        "h100", "kind of device, such as h100, a100, l4, rtx 4090; or cpu", details="cpu: this machine's processor"
    )
    gpus_per_node: int = option(8, "devices in a machine", details="With hsdp they share a copy of the model.", min=1)
    mfu: float = option(MFU, "share of the devices' peak that training reaches", above=0, max=1)
    price: float = option(0.0, "price of a device for an hour; 0: compute no cost", min=0)
    init_from: str = option(
        "scratch",
        "scratch | resume | auto",
        details="Other models are not read: give their shape by --n_layer, --n_head and --n_embd.",
    )
    depth: int = depth_option()
    max_flops: float = max_flops_option()
    data: Data = field(default_factory=Data)
    model: GPTConfig = field(default_factory=lambda: GPTConfig(vocab_size="auto", bias=False))
    optimizer: Optimizer = field(default_factory=Optimizer)
    system: System = field(default_factory=System, metadata={"advanced": True, "unused": ("autotune",)})
    processes: Processes = field(default_factory=Processes)
    sources: dict[str, str] = field(default_factory=dict)  # option → what set it


def main(options: Options) -> None:
    from folio.machine.estimate import estimate

    device = device_of(options)
    options, data, vocab_size, chosen = _data(options)
    options, found = with_depth(options, vocab_size, None if isinstance(data, str) else data.length("train"))
    chosen += depth.table(options.depth, found) if options.depth else []
    for line in chosen:
        show(line)
    if options.model.vocab_size == "auto":
        options = override(options, {"vocab_size": vocab_size})
    o = options
    options = replace(o, data=accumulated(o.data, o.data.row(o.model.block_size), o.sources))
    step = step_of(options, device)
    needs = estimate(options.model, options.data, step)
    lines = [*_model(options, device, step, needs), *_memory(needs.memory), *_work(options, device, needs, data)]
    for title, text in lines:
        show(f"{title:9}{text}")
    show(
        "\nComputed for eager mode, without the memory of the device's driver, the allocator and the network library."
        f"\n{_verdict(options, device, needs.memory.total)}"
    )


def device_of(options: Options) -> Device:
    """Raises UserError if the devices are unknown, lack the dtype, or do not divide into machines."""
    import torch

    from folio.machine.devices import find_device

    gpus, node, parallel = options.gpus, options.gpus_per_node, options.processes.parallel
    if options.init_from not in ("scratch", "resume", "auto"):
        raise UserError(
            f"init_from={options.init_from}: folio plan does not read that model: set --init_from=scratch, "
            "and the model's --n_layer, --n_head and --n_embd"
        )
    if parallel == "hsdp" and (not 1 < node < gpus or gpus % node):
        raise UserError(
            f"parallel=hsdp divides the model among the devices of a machine, but gpus={gpus} are not several machines "
            f"of gpus_per_node={node}: use --parallel=fsdp, or change one of the two"
        )
    device = find_device(options.gpu, gpus, options.system)
    if device.dtype == torch.float16 and parallel != "ddp":
        raise UserError(f"dtype=float16 does not go with parallel={parallel}: use --dtype=float32, or another --gpu")
    return device


def step_of(options: Options, device: Device) -> Step:
    """The first device's part of a step. Raises UserError if the devices do not divide the rows."""
    from folio.training.memory_advice import step_of_a_device

    shards = {"ddp": 1, "fsdp": options.gpus, "hsdp": options.gpus_per_node}[options.processes.parallel]
    context, on_gpu = options.data.row(options.model.block_size), device.name != "CPU"
    return step_of_a_device(
        options.data, options.processes, context, device.dtype, on_gpu, options.gpus, shards, options.optimizer
    )


def _data(options: Options) -> tuple[Options, Tokens | str, int, list[str]]:
    """The options that fit the data set; the set, or why it cannot be read; the vocabulary size of training; notes."""
    from folio.data.rows import Tokens
    from folio.training.start import fit_context, vocab_size_of

    try:
        options, notes = fit_context(options)
        tokens = Tokens.open(options.data, options.model.block_size, options.system.seed)
    except FileNotFoundError as error:
        note = f", and vocab_size=auto is taken as {PADDED_GPT2}" if options.model.vocab_size == "auto" else ""
        return options, f"{error}\n{'':9}so the number of epochs is unknown{note}", PADDED_GPT2, []
    return options, tokens, vocab_size_of(tokens)[0], notes


def _model(options: Options, device: Device, step: Step, found: Estimate) -> Iterator[tuple[str, str]]:
    """Lines of the report: (title, text)."""
    from folio.records.log import counted

    shape, gpus = options.model, options.gpus
    yield (
        "model",
        f"{_count(found.parameters)} parameters ({_count(found.without_positions)} without positions): "
        f"{counted(shape.n_layer, 'layer')}, {counted(shape.n_head, 'head')}, width {shape.n_embd:,}, "
        f"context {shape.block_size:,}, vocab {shape.vocab_size:,}",
    )
    parallel, dtype = f"{options.processes.parallel}, " * (gpus > 1), str(device.dtype).removeprefix("torch.")
    micro_steps = f"{counted(step.micro_steps, 'micro step')} of {counted(step.rows, 'row')}"
    yield "devices", f"{gpus} × {device.name}, {parallel}{dtype}; each runs {micro_steps}"


def _memory(memory: Memory) -> Iterator[tuple[str, str]]:
    yield "memory", "of each device, at the peak of a step"
    unit, word = _unit(memory.total, _BYTES)
    for kind, words in _KINDS.items():
        yield "", f"{getattr(memory, kind) / unit:>9,.2f} {word}  {words}"
        if kind == "gradients" and memory.gradients < memory.weights:
            yield "", f"{'':>9}     (activations are freed while the other gradients are computed)"


def _work(options: Options, device: Device, found: Estimate, data: Tokens | str) -> Iterator[tuple[str, str]]:
    steps, gpus = options.optimizer.max_iters, options.gpus
    tokens = found.tokens * steps
    sends = f"; each device sends {_in_unit(found.sent, _BYTES)}" if gpus > 1 else ""
    yield "step", f"{found.tokens:,} tokens, {_in_unit(found.flops, _FLOPS)}{sends}"
    yield "run", f"{steps:,} steps, {_count(tokens)} tokens, {found.flops * steps:.3g} FLOP"
    if isinstance(data, str):
        yield "data", data
    else:
        there = data.length("train")
        yield "data", f"{_count(there)} tokens in {data.name}, {tokens / there:,.2f} epochs"

    hours = found.hours(steps, device, gpus, options.mfu)
    if hours is None or device.peak is None:
        yield "time", f"unknown, since the peak of a {device.name} in {device.dtype} is unknown"
        return
    yield "time", f"{_time(hours)} at an MFU of {options.mfu:g} and a peak of {device.peak / 1e12:,.2f} TFLOP/s"
    if options.price:
        yield "cost", f"{hours * gpus * options.price:,.2f} at {options.price:g} per device and hour"


def _count(n: int) -> str:
    """123456789 → "123.46 M"."""
    size, letter = next(
        (s, letter) for s, letter in ((1e9, " B"), (1e6, " M"), (1e3, " k"), (1, "")) if n >= s or s == 1
    )
    return f"{n / size:,.2f}{letter}" if letter else f"{n:,}"


def _unit(value: float, units: dict[str, float]) -> tuple[float, str]:
    """The size and the name of the largest unit of which the value is at least a tenth, else of the smallest unit."""
    sizes = [(size, word) for word, size in units.items()]
    return next((unit for unit in sizes if value >= unit[0] / 10), sizes[-1])


def _in_unit(value: float, units: dict[str, float]) -> str:
    """1234567 → "1.23 MB"."""
    size, word = _unit(value, units)
    return f"{value / size:,.2f} {word}"


def _time(hours: float) -> str:
    """0.05 → "3.0 minutes"."""
    if hours >= 0.1:
        return f"{hours:,.1f} hours"
    return f"{60 * hours:.1f} minutes" if 60 * hours >= 1 else f"{3600 * hours:.1f} seconds"


def _verdict(options: Options, device: Device, total: int) -> str:
    """Whether the run fits, and if not, which options would make it fit."""
    import torch

    from folio.machine.memory import NOTHING_FITS, needed, remedies

    of = f"{_in_unit(total, _BYTES).removesuffix(' GB')} of {_in_unit(device.memory, _BYTES)}"
    if total <= device.memory:
        return f"fits: {of}"

    def fits(way: dict[str, Any]) -> bool:
        changed = override(options, way)
        return needed(changed.model, step_of(changed, device)).total <= device.memory

    sharded = options.gpus > 1 and device.dtype != torch.float16
    ways = remedies(options.data, sharded, fits)
    return f"does not fit: {of}; {f'what fits: {ways}' if ways else NOTHING_FITS}"
