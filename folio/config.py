"""The knobs, each once, in groups by what they are about; and how files and flags become one frozen object.

A knob's metadata holds its help and bounds. Files are read, never run: a ``.py`` file is evaluated from its
syntax tree by ``_Evaluator``, which knows arithmetic and little else.
"""

from __future__ import annotations

import ast
import difflib
import json
import math
import operator
import time
import tomllib
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro

from folio.model import AUTO, GPTConfig

T = TypeVar("T")
COMMAND_LINE = "the command line"
HellaSwagStyle = Literal["completion", "harness"]
OF_THE_CALL = ("out_dir", "init_from", "eval_only", "max_minutes", "profile")  # knobs that a run does not keep
MICRO_STEPS = 1_000_000  # of a step, at most
EITHER = {"total_batch_size", "gradient_accumulation_steps"}  # knobs that say the same
PRESETS = Path(__file__).parent / "presets"
DATA_SETS = ("shakespeare_char", "shakespeare", "stdlib", "openwebtext", "fineweb_edu")  # that are known by name


def knob(default: Any, help: str, **bounds: float) -> Any:
    """A field with its help and bounds (``min`` ≤ value ≤ ``max``, value > ``above``, value < ``below``)."""
    return field(default=default, metadata={"help": help, **bounds})


def out_dir_knob() -> Any:
    """The one knob that commands share outside a group."""
    return knob("out", "folder of the run")


def hellaswag_style_knob() -> Any:
    return knob(
        "completion",
        "completion: as build-nanogpt scores; harness: as the lm-evaluation-harness (acc_norm by characters)",
    )


def hellaswag_data_knob() -> Any:
    return knob("", "file of HellaSwag items; default: data/hellaswag/hellaswag_val.jsonl, downloaded if need be")


@dataclass(frozen=True)
class Output:
    """Where a run writes, how it begins, what it keeps."""

    out_dir: str = out_dir_knob()
    init_from: str = knob(
        "scratch",
        "scratch | resume | auto (resume if there is something) | gpt2 … gpt2-xl | an out_dir, .pt file, Hugging Face "
        "folder or name",
    )
    always_save_checkpoint: bool = knob(True, "False: keep the best checkpoint and the latest only")
    checkpoint_interval: int | AUTO = knob("auto", "steps between checkpoints; auto: every evaluation", min=1)
    keep_checkpoints: int = knob(
        2, "latest checkpoints to keep, at multiples of checkpoint_interval; the two newest and the best besides", min=1
    )
    async_checkpoint: bool | AUTO = knob(
        "auto", "write checkpoints while training goes on; auto: on a GPU, and wherever there are several processes"
    )


@dataclass(frozen=True)
class Evaluation:
    """What is measured while a run trains, and how often; all of it at the end as well."""

    eval_interval: int = knob(2000, "steps between evaluations of the loss", min=1)
    eval_iters: int = knob(200, "batches an evaluation, over all ranks; 0: every validation token", min=0)
    eval_only: bool = knob(False, "evaluate once and leave; nothing is written")
    hellaswag_interval: int = knob(0, "steps between HellaSwag evaluations; 0: none", min=0)
    hellaswag_style: HellaSwagStyle = hellaswag_style_knob()
    hellaswag_data: str = hellaswag_data_knob()
    hellaswag_limit: int = knob(0, "items, from the first; 0: all 10,042; the run waits for them", min=0)
    sample_interval: int = knob(0, "steps between samples; 0: none", min=0)
    sample_prompt: str = knob("Hello, I'm a language model,", "what samples go on from")
    sample_count: int = knob(4, "samples at a time, of each process", min=1)
    sample_tokens: int = knob(32, "tokens of a sample, those of the prompt included", min=1)
    sample_top_k: int = knob(50, "draw from the k likeliest tokens; 0: from all", min=0)


@dataclass(frozen=True)
class Logging:
    """What is told besides, and to whom."""

    log_interval: int = knob(1, "steps between lines", min=1)
    monitor: bool = knob(True, "False: no losses, measurements and samples on the console")
    log_txt: bool | Literal["gpt-from-scratch"] = knob(
        False, "write a log.txt too, build-nanogpt's (--log_txt) or GPT-from-scratch's"
    )
    track: str = knob("", "send the records to tensorboard, wandb or trackio, or several: a,b")
    wandb_log: bool = knob(False, "log to Weights & Biases; the same as --track=wandb")
    wandb_project: str = knob("owt", "project there, and with trackio")
    wandb_run_name: str = knob("gpt2", "name of the run there")
    profile: int = knob(0, "steps to profile, after two, and what is due between them: time and memory; 0: none", min=0)


@dataclass(frozen=True)
class Data:
    """What is read, and in which order."""

    dataset: str = knob("openwebtext", "data/<dataset>, under the working folder, else beside train.py; or a folder")
    data_dir: str = knob("", "folder or glob of the token files; wins over dataset")
    data_mixture: str = knob("", "several data sets by weight instead, such as a=0.7,b=0.3")
    batch_size: int = knob(12, "rows in a micro batch", min=1)
    window: int = knob(0, "tokens of a row, at most block_size; 0: block_size", min=0)
    gradient_accumulation_steps: int = knob(40, "micro steps a step, over all ranks together", min=1, max=MICRO_STEPS)
    total_batch_size: int = knob(
        0, "tokens a step, over all ranks together, instead of gradient_accumulation_steps; 0: as that says", min=0
    )
    sampling: Literal["epoch", "random", "sequential"] = knob(
        "epoch", "epoch: each window once, shuffled; random: with replacement; sequential: as they lie"
    )
    document_mask: bool = knob(False, "keep attention within a document")
    eot: int | AUTO = knob("auto", "id of the token between documents; auto: as the data set says", min=0)

    def row(self, block_size: int) -> int:
        """Tokens of a row for a model of so many positions. Raises ValueError where it does not know as many."""
        if self.window > block_size:
            raise ValueError(
                f"window={self.window} is above block_size={block_size}: the positions of the model; lower --window"
            )
        return self.window or block_size


@dataclass(frozen=True)
class Optimizer:
    """AdamW, its learning rate, and how long it trains."""

    learning_rate: float = knob(6e-4, "highest learning rate", min=0)
    max_iters: int = knob(600_000, "steps (updates) to make", min=0)
    max_minutes: float = knob(0.0, "minutes from this start after which to end; 0: no limit", min=0)
    patience: int = knob(0, "evaluations without a better validation loss after which to end; 0: no limit", min=0)
    weight_decay: float = knob(0.1, "decay of tensors of two and more dimensions", min=0)
    beta1: float = knob(0.9, "decay of the mean of the gradients", min=0, below=1)
    beta2: float = knob(0.95, "decay of the mean of their squares", min=0, below=1)
    grad_clip: float = knob(1.0, "highest norm of the gradients; 0: no clipping", min=0)
    decay_lr: bool = knob(True, "False: a constant learning rate")
    warmup_iters: int = knob(2000, "steps of linear warm-up", min=0)
    lr_decay_iters: int = knob(600_000, "step at which the cosine ends at min_lr", min=0)
    min_lr: float = knob(6e-5, "lowest learning rate", min=0)
    warmup: Literal["folio", "nanogpt"] = knob("folio", "nanogpt: divide by warmup_iters + 1")
    restart_interval: int = knob(0, "steps after which the learning rate and the data begin again; 0: never", min=0)


@dataclass(frozen=True)
class Source:
    """Which trained model."""

    out_dir: str = out_dir_knob()
    init_from: str = knob(
        "resume",
        "resume (the model in out_dir) | gpt2 … gpt2-xl | another out_dir, .pt file, Hugging Face folder or name",
    )
    checkpoint: str = knob("best", "best | latest | a step")


@dataclass(frozen=True)
class Sampling:
    """What to continue, and how."""

    start: str = knob("\n", "prompt, or FILE:name of a file that holds it")
    num_samples: int = knob(10, "samples to draw", min=1)
    max_new_tokens: int = knob(500, "tokens in each, after the prompt", min=1)
    temperature: float = knob(0.8, "below 1 bolder, above 1 wilder; 0: the likeliest token always", min=0)
    top_k: int = knob(200, "draw from the k likeliest tokens; 0: from all", min=0)
    top_p: float = knob(1.0, "draw from the fewest tokens that reach this probability", above=0, max=1)


@dataclass(frozen=True)
class System:
    """The machine, and what arithmetic is done on it."""

    seed: int = knob(1337, "of every random choice", min=0)
    device: str = knob("auto", "auto (cuda, else mps, else cpu) | cpu | cuda | cuda:0 | mps")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = knob(
        "auto", "of the arithmetic, weights stay float32; auto: bfloat16 where it is fast"
    )
    compile: bool | AUTO = knob("auto", "torch.compile; auto: where the run is long enough to pay")
    deterministic: bool = knob(False, "the same bits again on a GPU too; slower there")
    matmul_precision: Literal["auto", "highest", "high", "medium"] = knob(
        "auto", "of float32 products, as torch.set_float32_matmul_precision"
    )


@dataclass(frozen=True)
class Processes:
    """What each of several processes holds, and how long they wait for one another."""

    backend: Literal["auto", "nccl", "gloo"] = knob("auto", "of the process group; auto: by device")
    parallel: Literal["ddp", "fsdp", "hsdp"] = knob(
        "ddp",
        "several processes hold: ddp: the whole model each; fsdp: a share each; hsdp: a share within each machine",
    )
    activation_checkpointing: Literal["none", "block"] = knob(
        "none", "block: keep only what goes into each block and compute the rest again, for less memory"
    )
    timeout: float = knob(
        300.0,
        "seconds to wait for another process before all end; half an hour until the first step is done",
        min=1,
        max=31_536_000,
    )
    check_replicas_every: int = knob(
        0, "steps between comparisons of the weights that several processes hold; 0: none", min=0
    )


@dataclass(frozen=True)
class TrainConfig:
    """Train a model: folio train [PRESET or FILE …] [--knob=value …]; later ones win."""

    output: Output = field(default_factory=Output)
    data: Data = field(default_factory=Data)
    model: GPTConfig = field(default_factory=lambda: GPTConfig(vocab_size="auto", bias=False))
    optimizer: Optimizer = field(default_factory=Optimizer)
    evaluation: Evaluation = field(default_factory=Evaluation)
    logging: Logging = field(default_factory=Logging)
    system: System = field(default_factory=System)
    processes: Processes = field(default_factory=Processes)
    sources: tyro.conf.Suppress[dict[str, str]] = field(default_factory=dict)  # knob → who set it


class Knob(NamedTuple):
    """Where a knob stands: the group's field in the composed dataclass, its own field, its type."""

    group: str
    field: Field[Any]
    type: Any


def knobs(options: type[Any]) -> dict[str, Knob]:
    """Every knob of a command's options by its flat name; fields that are no dataclass are their own group.

    Raises:
        TypeError: two groups hold a knob of the same name.
    """
    found: dict[str, Knob] = {}
    for outer in fields(options):
        if outer.name == "sources":
            continue
        kind = get_type_hints(options)[outer.name]
        inner = fields(kind) if is_dataclass(kind) else [outer]
        hints = get_type_hints(kind if is_dataclass(kind) else options)
        for f in inner:
            if f.name in found:
                raise TypeError(f"{options.__name__} has the knob {f.name!r} twice")
            group = outer.name if is_dataclass(kind) else ""
            found[f.name] = Knob(group, f, hints[f.name])
    return found


def flat(config: Any) -> dict[str, Any]:
    """The knobs of a composed object by their flat names."""
    return {
        name: getattr(getattr(config, k.group) if k.group else config, name) for name, k in knobs(type(config)).items()
    }


def override(config: T, values: Mapping[str, Any]) -> T:
    """A copy of a composed object with these knobs set, by flat name."""
    known = knobs(type(config))
    by_group: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        by_group.setdefault(known[name].group, {})[name] = value
    groups = {g: replace(getattr(config, g), **v) for g, v in by_group.items() if g}
    return replace(config, **groups, **by_group.get("", {}))  # type: ignore[type-var]


def check(config: Any) -> None:
    """Bounds and cross-field rules, before anything is built. Raises ValueError that names the knob."""
    known, values = knobs(type(config)), flat(config)
    for name, value in values.items():
        _check_bounds(name, value, known[name].field.metadata)
    if isinstance(model := getattr(config, "model", None), GPTConfig):
        model.check()
    if values.get("min_lr", 0) > values.get("learning_rate", math.inf) and values["decay_lr"]:
        raise ValueError(
            f"min_lr={values['min_lr']:g} is above learning_rate={values['learning_rate']:g}: "
            "lower --min_lr, or set --decay_lr=False"
        )
    sources = getattr(config, "sources", {})
    asked = {sources.get(name) for name in EITHER}
    if len(asked) == 1 and asked != {None} and values["total_batch_size"]:
        raise ValueError(
            f"total_batch_size={values['total_batch_size']} and gradient_accumulation_steps="
            f"{values['gradient_accumulation_steps']} exclude each other: give one of them"
        )
    if values.get("check_replicas_every") and values["parallel"] == "fsdp":
        raise ValueError(
            f"check_replicas_every={values['check_replicas_every']}: parallel=fsdp holds each weight once, so there is "
            "nothing to compare: set --check_replicas_every=0, or use --parallel=hsdp"
        )


def accumulated(data: Data, row: int, sources: Mapping[str, str]) -> Data:
    """With as many micro steps as make ``total_batch_size``, of rows of ``row`` tokens, where that is asked for.

    Of the two, the one that was given last wins, and either over a checkpoint's.

    Raises:
        ValueError: it is no multiple of a micro batch; names what fits.
    """
    total, micro = data.total_batch_size, data.batch_size * row
    given = [name for name in sources if name in EITHER]
    if given[-1:] == ["gradient_accumulation_steps"]:
        return replace(data, total_batch_size=0)
    if not total:
        return data
    if total // micro > MICRO_STEPS:
        raise ValueError(
            f"total_batch_size={total} is {total // micro:,} micro steps of {micro} tokens, above {MICRO_STEPS:,}: "
            "lower it, or raise --batch_size"
        )
    if total % micro:
        sizes = [size for size in range(1, data.batch_size) if total % (size * row) == 0]
        raise ValueError(
            f"total_batch_size={total} is no multiple of batch_size × tokens of a row = {data.batch_size} × {row} = "
            f"{micro}: --total_batch_size={max(1, round(total / micro)) * micro} fits"
            + (f", or --batch_size={sizes[-1]}" if sizes else "")
        )
    return replace(data, gradient_accumulation_steps=total // micro)


def model_config(path: Path, values: Mapping[str, Any]) -> GPTConfig:
    """The shape of a model that a file describes.

    Raises:
        ValueError: a field that is not known, or whose value is not possible; names the file.
    """
    for f in fields(GPTConfig):
        value = typed(path, f.name, values.get(f.name, f.default), TrainConfig)
        try:
            _check_bounds(f.name, value, f.metadata)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    if odd := values.keys() - {f.name for f in fields(GPTConfig)}:
        raise ValueError(f"{path}: a model of GPT-2's kind has no {min(map(str, odd))!r}")
    config = GPTConfig(**values)
    if config.vocab_size == "auto":
        raise ValueError(f"{path}: vocab_size = 'auto': must be a number")
    try:
        config.check()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return config


def _check_bounds(name: str, value: Any, bounds: Mapping[str, Any]) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    rules: list[tuple[str, Callable[[Any, Any], bool], str]] = [
        ("min", operator.ge, "at least"),
        ("max", operator.le, "at most"),
        ("above", operator.gt, "above"),
        ("below", operator.lt, "below"),
    ]
    for rule, holds, words in rules:
        if rule in bounds and not holds(value, bounds[rule]):
            raise ValueError(f"{name}={value}: must be {words} {bounds[rule]}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name}={value}: must be a finite number")


def unknown(name: str, options: type) -> str:
    """One line about a knob that does not exist, with the one that was probably meant."""
    close = difflib.get_close_matches(name, knobs(options), n=1)
    return f"unknown knob {name!r}" + (f": did you mean {close[0]!r}?" if close else ": --help lists them")


# Files


def read_file(name: str, options: type, *, ignore: type | None = None) -> dict[str, Any]:
    """The knobs that a file or preset sets, checked against their types; nothing in it is executed.

    Knobs of ``ignore`` that ``options`` lacks are passed over, so that ``sample`` takes a training preset.

    Raises:
        FileNotFoundError: no such file or preset.
        ValueError: names the file, the line and the remedy.
    """
    path = find_file(name)
    try:
        text = path.read_text(encoding="utf-8")
        match path.suffix:
            case ".toml":
                values = tomllib.loads(text)
            case ".json":
                values = json.loads(text)
            case _:
                values = _Evaluator(path, text, {**defaults(TrainConfig), **defaults(options)}).values()
    except RecursionError:
        raise ValueError(f"{path}: it is nested too deep to be a config file") from None
    except (tomllib.TOMLDecodeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a valid {path.suffix[1:]} file: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must hold knobs and their values at its top level")
    return {k: typed(path, k, v, options) for k, v in values.items() if not _passed_over(k, options, ignore)}


def find_file(name: str) -> Path:
    """A path as it is, else a preset by its name, ``train_`` left out or not."""
    path = Path(name)
    if path.is_file():
        return path
    for preset in (name, f"train_{name}"):
        if name.isidentifier() and (PRESETS / f"{preset}.py").is_file():
            return PRESETS / f"{preset}.py"
    known = sorted(p.stem for p in PRESETS.glob("*.py"))
    close = difflib.get_close_matches(path.stem, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"the presets are {', '.join(known)}"
    raise FileNotFoundError(f"no config file or preset {name!r}: {hint}")


def _passed_over(name: str, options: type, ignore: type | None) -> bool:
    return ignore is not None and name not in knobs(options) and name in knobs(ignore)


def defaults(options: type) -> dict[str, Any]:
    """The knobs of a command's options at their defaults; those that must be given are left out."""
    return {
        name: value
        for name, k in knobs(options).items()
        if (value := getattr(_default_group(options, k.group), name, MISSING) if k.group else k.field.default)
        is not MISSING
    }


def _default_group(options: type, group: str) -> Any:
    f = next(f for f in fields(options) if f.name == group)
    return f.default_factory() if f.default_factory is not MISSING else f.default


def typed(path: Path | str, name: str, value: Any, options: type) -> Any:
    """The value of a knob that a file sets, if it is of the knob's type; raises ValueError that names the file."""
    known = knobs(options)
    if name not in known:
        raise ValueError(f"{path}: {unknown(name, options)}")
    kind = known[name].type
    for choice in get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,):
        if get_origin(choice) is Literal and value in get_args(choice):
            return value
        if choice is float and type(value) is int:
            return float(value)
        if choice in (int, float, bool, str) and type(value) is choice:
            return value
    raise ValueError(f"{path}: {name} = {value!r}: must be {_wanted(kind)}")


def _wanted(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(map(str, get_args(kind)))
    return " or ".join(map(_wanted, get_args(kind))) if get_args(kind) else str(kind.__name__)


_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
}
_CALLS: dict[str, Callable[..., Any]] = {
    "str": str,
    "int": int,
    "float": float,
    "min": min,
    "max": max,
    "round": round,
}


class _Evaluator:
    """Assignments of constants and arithmetic, evaluated by us from the syntax tree."""

    def __init__(self, path: Path, text: str, names: dict[str, Any]) -> None:
        self.path, self.text, self.names = path, text, dict(names)
        self.time = False

    def values(self) -> dict[str, Any]:
        try:
            body = ast.parse(self.text).body
        except (SyntaxError, ValueError, MemoryError) as error:  # MemoryError: nested too deep
            raise ValueError(f"{self.path}: not Python: {error or 'nested too deep'}") from None
        assigned: dict[str, Any] = {}
        for statement in body:
            for target, value in self._assignments(statement):
                assigned[target] = self.names[target] = value
        return {k: v for k, v in assigned.items() if not k.startswith("_")}

    def _assignments(self, node: ast.stmt) -> Iterator[tuple[str, Any]]:
        match node:
            case ast.Assign(targets=targets, value=value) if all(isinstance(t, ast.Name) for t in targets):
                for target in targets:
                    yield target.id, self._value(value)  # type: ignore[attr-defined]
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                yield name, self._value(value)
            case ast.Expr(value=ast.Constant()):  # a docstring
                pass
            case ast.Import(names=[ast.alias(name="time", asname=None)]):
                self.time = True
            case _:
                raise self._refused(node)

    def _value(self, node: ast.expr) -> Any:
        try:
            return self._evaluate(node)
        except (ArithmeticError, TypeError, ValueError) as error:
            if str(error).startswith(str(self.path)):
                raise
            raise ValueError(f"{self.path}:{node.lineno}: {ast.unparse(node)}: {error}") from None

    def _evaluate(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=bool() | int() | float() | str() as value):
                return value
            case ast.Name(id=name) if name in self.names:
                return self.names[name]
            case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
                return _UNARY[type(op)](self._evaluate(operand))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
                a, b = self._evaluate(left), self._evaluate(right)
                if isinstance(op, ast.Pow) and not (isinstance(b, (int, float)) and abs(b) <= 64):
                    raise ValueError("an exponent above 64")
                if isinstance(op, (ast.Mult, ast.Mod)) and (isinstance(a, str) or isinstance(b, str)):
                    raise ValueError("text is neither multiplied nor formatted with %; an f-string does that")
                result = _BINARY[type(op)](a, b)
                if isinstance(result, int) and result.bit_length() > 1024:
                    raise ValueError("a number above 2**1024")
                if isinstance(result, str) and len(result) > 4096:
                    raise ValueError("text of more than 4096 characters")
                return result
            case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _CALLS:
                return _CALLS[name](*map(self._evaluate, args))
            case ast.Call(func=ast.Attribute(value=ast.Name(id="time"), attr="time"), args=[], keywords=[]) if (
                self.time
            ):
                return time.time()
            case ast.JoinedStr(values=parts):
                return "".join(self._text(part) for part in parts)
            case _:
                raise self._refused(node)

    def _text(self, node: ast.expr) -> str:
        if isinstance(node, ast.FormattedValue):
            if node.conversion != -1:
                raise self._refused(node)
            spec = self._evaluate(node.format_spec) if node.format_spec else ""
            if any(int(digits) > 64 for digits in _numbers(spec)):
                raise ValueError("a width above 64")
            return format(self._evaluate(node.value), spec)
        return str(self._evaluate(node))

    def _refused(self, node: ast.AST) -> ValueError:
        code = ast.unparse(node).splitlines()[0]
        return ValueError(
            f"{self.path}:{getattr(node, 'lineno', 1)}: {code!r} is not read: a config file holds assignments "
            "of constants, arithmetic and names set above, and is never run"
        )


def _numbers(text: str) -> list[str]:
    return "".join(c if c.isdigit() else " " for c in text).split()
