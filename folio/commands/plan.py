"""folio plan: the memory, time and cost of a run, computed before it runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from folio.config.compose import accumulated
from folio.config.names import did_you_mean
from folio.config.options import Data, Optimizer, Processes, System, option
from folio.config.table import override
from folio.errors import UserError
from folio.model.config import PADDED_GPT2, GPTConfig
from folio.records.console import show

if TYPE_CHECKING:
    import torch

    from folio.data.rows import Tokens
    from folio.machine.memory import Memory, Step

_KINDS = {
    "weights": "weights",
    "optimizer": "optimizer",
    "gradients": "gradients",
    "copies": "weights, gathered or in 16 bits",
    "activations": "activations",
    "logits": "logits and their gradient",
}


@dataclass(frozen=True)
class Options:
    """Compute what a run would need: folio plan [PRESET or FILE …] --gpus=8 --gpu=h100 [--option=value …]."""

    gpus: int = option(1, "devices, one process each", min=1)
    gpu: str = option(
        "h100", "their kind, such as h100, a100, l4, rtx 4090; or cpu", details="cpu: this machine's processor"
    )
    gpus_per_node: int = option(8, "devices in a machine", details="With hsdp they share a copy of the model.", min=1)
    mfu: float = option(0.4, "share of the devices' peak that training reaches", above=0, max=1)
    price: float = option(0.0, "of one device for an hour; 0: no cost is computed", min=0)
    init_from: str = option(
        "scratch", "scratch | resume | auto", details="The shape of another model is not looked up."
    )
    data: Data = field(default_factory=Data)
    model: GPTConfig = field(default_factory=lambda: GPTConfig(vocab_size="auto", bias=False))
    optimizer: Optimizer = field(default_factory=Optimizer)
    system: System = field(default_factory=System, metadata={"advanced": True})
    processes: Processes = field(default_factory=Processes)
    sources: dict[str, str] = field(default_factory=dict)  # option → what set it


class Device(NamedTuple):
    """One of the devices: ``memory`` in bytes, ``peak`` in FLOP/s, None where it is not known."""

    name: str
    dtype: torch.dtype
    memory: float
    peak: float | None


def main(options: Options) -> None:
    from folio.machine.memory import needed

    _check(options)
    device = device_of(options)
    data, vocab_size = _data(options)
    if options.model.vocab_size == "auto":
        options = override(options, {"vocab_size": vocab_size})
    o = options
    options = replace(o, data=accumulated(o.data, o.data.row(o.model.block_size), o.sources))
    step = step_of(options, device)
    memory = needed(options.model, step)
    for title, text in _report(options, device, step, memory, data):
        show(f"{title:9}{text}")
    show(
        "\nCounted in eager mode, and without what the device's driver, the allocator and the network take for "
        f"themselves.\n{_verdict(options, device, memory.total)}"
    )


def _check(options: Options) -> None:
    gpus, node = options.gpus, options.gpus_per_node
    if options.init_from not in ("scratch", "resume", "auto"):
        raise UserError(
            f"init_from={options.init_from}: the shape of that model is not looked up here: set --init_from=scratch, "
            "and --n_layer, --n_head, --n_embd as it has them"
        )
    if options.processes.parallel == "hsdp" and (not 1 < node < gpus or gpus % node):
        raise UserError(
            f"parallel=hsdp shares the model within each machine, but gpus={gpus} are not several machines of "
            f"gpus_per_node={node}: use --parallel=fsdp, or change one of the two"
        )


def device_of(options: Options) -> Device:
    """Raises ValueError for a kind that is not known, or a dtype that it or FSDP lacks."""
    import torch

    from folio.machine import flops, probe
    from folio.machine.choices import resolve

    asked, parallel = options.system.dtype, options.processes.parallel
    if options.gpu.lower() == "cpu":
        choices = resolve(replace(options.system, device="cpu"))
        dtype: torch.dtype = getattr(torch, choices.dtype)
        with probe.matmul_precision(choices.matmul_precision):
            peak = flops.peak(torch.device("cpu"), dtype)
        found = Device("CPU", dtype, probe.memory() / options.gpus, peak and peak / options.gpus)
    else:
        names = {plain(name): name for name in flops.GPUS}
        if plain(options.gpu) not in names:
            hint = did_you_mean(options.gpu.upper(), flops.GPUS) or f"choose {', '.join(flops.GPUS)} or cpu"
            raise UserError(f"gpu={options.gpu}: it is not known: {hint}")
        name = names[plain(options.gpu)]
        gpu = flops.GPUS[name]
        if asked == "bfloat16" and not gpu.bfloat16:
            raise UserError(f"dtype=bfloat16: {name} has no such units: use --dtype=float16 or --dtype=float32")
        dtype = getattr(torch, ("bfloat16" if gpu.bfloat16 else "float16") if asked == "auto" else asked)
        found = Device(name, dtype, gpu.memory * 1e9, gpu.peak(dtype))
    if found.dtype == torch.float16 and parallel != "ddp":
        raise UserError(f"dtype=float16 does not go with parallel={parallel}: use --dtype=float32, or another --gpu")
    return found


def plain(name: str) -> str:
    """A device's name in lower case, without spaces and punctuation."""
    return "".join(c for c in name.lower() if c.isalnum())


def _data(options: Options) -> tuple[Tokens | str, int]:
    """The data set, or why it cannot be read; and the vocabulary size of training."""
    from folio.data.rows import Tokens
    from folio.training.start import vocab_size_of

    try:
        tokens = Tokens.open(options.data, options.model.block_size, options.system.seed)
    except FileNotFoundError as error:
        note = f", and vocab_size=auto counts as {PADDED_GPT2}" if options.model.vocab_size == "auto" else ""
        return f"{error}\n{'':9}so epochs are not known{note}", PADDED_GPT2
    return tokens, vocab_size_of(tokens)[0]


def step_of(options: Options, device: Device) -> Step:
    """The first device's part of a step. Raises UserError where the devices do not divide the rows."""
    from folio.training.memory_advice import step_of_a_device

    shards = {"ddp": 1, "fsdp": options.gpus, "hsdp": options.gpus_per_node}[options.processes.parallel]
    context = options.data.row(options.model.block_size)
    return step_of_a_device(
        options.data, options.processes, context, device.dtype, device.name != "CPU", options.gpus, shards
    )


def _report(
    options: Options, device: Device, step: Step, memory: Memory, data: Tokens | str
) -> Iterator[tuple[str, str]]:
    """Lines of the report: (title, text)."""
    import torch

    from folio.machine import flops
    from folio.machine.memory import sent
    from folio.model.gpt import GPT
    from folio.records.log import counted

    shape, gpus, several = options.model, options.gpus, options.gpus > 1
    context = options.data.row(shape.block_size)
    with torch.device("meta"):
        model = GPT(shape)
    dtype = str(device.dtype).removeprefix("torch.")
    yield (
        "model",
        f"{_count(model.get_num_params(False))} parameters ({_count(model.get_num_params())} without positions): "
        f"{counted(shape.n_layer, 'layer')}, {counted(shape.n_head, 'head')}, {shape.n_embd:,} wide, "
        f"{counted(shape.block_size, 'token')} of {shape.vocab_size:,}",
    )
    yield (
        "devices",
        f"{gpus} × {device.name}, {f'{options.processes.parallel}, ' if several else ''}{dtype}; on each "
        f"{counted(step.micro_steps, 'micro step')} of {counted(step.rows, 'row')}",
    )

    yield "memory", "of each device, at the moment of a step when it is most"
    for kind, words in _KINDS.items():
        yield "", f"{_gigabytes(getattr(memory, kind)):>9} GB  {words}"
    if memory.gradients < memory.weights:
        yield "", f"{'':>9}     (gradients come as activations go)"
    yield "", f"{_gigabytes(memory.total):>9} GB  in all"

    steps = options.optimizer.max_iters
    tokens = options.data.gradient_accumulation_steps * options.data.batch_size * context
    work = float(flops.flops_per_token(model, context)) * tokens
    sends = f"; each device sends {_gigabytes(sent(shape, step))} GB" if several else ""
    yield "a step", f"{tokens:,} tokens, {work / 1e12:,.2f} TFLOP{sends}"
    yield "the run", f"{steps:,} steps, {_count(tokens * steps)} tokens, {work * steps:.3g} FLOP"
    if isinstance(data, str):
        yield "data", data
    else:
        there = data.length("train")
        yield "data", f"{_count(there)} tokens in {data.name}, {tokens * steps / there:,.2f} epochs"

    if device.peak is None:
        yield "time", f"not known: there is no peak of {dtype} for a {device.name}"
        return
    hours = work * steps / (options.mfu * device.peak * gpus) / 3600
    yield "time", f"{hours:,.1f} hours at an MFU of {options.mfu:g}, the peak being {device.peak / 1e12:,.2f} TFLOP/s"
    if options.price:
        yield "cost", f"{hours * gpus * options.price:,.2f} at {options.price:g} for a device and hour"


def _count(n: int) -> str:
    """123456789 → "123.46 M"."""
    size, letter = next(
        (s, letter) for s, letter in ((1e9, " B"), (1e6, " M"), (1e3, " k"), (1, "")) if n >= s or s == 1
    )
    return f"{n / size:,.2f}{letter}" if letter else f"{n:,}"


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.2f}"


def _verdict(options: Options, device: Device, total: int) -> str:
    """Whether it fits, and if not, which options would make it fit, computed as the plan is."""
    import torch

    from folio.machine.memory import NOTHING_FITS, needed, remedies

    of = f"{_gigabytes(total)} of {_gigabytes(device.memory)} GB"
    if total <= device.memory:
        return f"fits: {of}"

    def fits(way: dict[str, Any]) -> bool:
        changed = override(options, way)
        return needed(changed.model, step_of(changed, device)).total <= device.memory

    sharded = options.gpus > 1 and device.dtype != torch.float16
    ways = remedies(options.data, sharded, fits)
    return f"does not fit: {of}; {f'what fits: {ways}' if ways else NOTHING_FITS}"
