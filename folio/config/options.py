"""The knobs, each once, in groups by what they are about; and how files and flags become one frozen object.

A knob's metadata holds its help, its bounds, and whether it names a place. Files are read, never run
(``folio.config.assignments``).
"""

from __future__ import annotations

import ast
import difflib
import functools
import math
import operator
import os
import tomllib
import types
import warnings
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro

from folio.config import assignments
from folio.files import parse_json, require_file
from folio.model.config import AUTO, GPTConfig
from folio.errors import UserError

T = TypeVar("T")
COMMAND_LINE = "the command line"
HellaSwagStyle = Literal["completion", "harness"]
TokenDtype = Literal["auto", "uint8", "uint16", "uint32", "int32", "int64"]
OF_THE_CALL = ("out_dir", "init_from", "eval_only", "max_minutes", "profile")  # knobs that a run does not keep
MICRO_STEPS = 1_000_000  # of a step, at most
LONGEST = 1 << 16  # characters of a config file, at most
ITSELF, EACH, AFTER_FILE = (
    "itself",
    "each",
    "FILE:",
)  # where a path stands: all of a value, between commas, behind FILE:
EITHER = {"total_batch_size", "gradient_accumulation_steps"}  # knobs that say the same
_ELSEWHERE = {  # what other trainers call a knob → ours
    theirs: ours
    for ours, names in {
        "learning_rate": "lr max_lr base_lr peak_lr lr_max",
        "min_lr": "lr_min final_lr end_lr eta_min",
        "weight_decay": "wd",
        "beta1": "adam_beta1",
        "beta2": "adam_beta2",
        "grad_clip": "max_grad_norm clip_grad clip_grad_norm grad_clip_norm gradient_clip_val gradient_clipping clip",
        "warmup_iters": "warmup_steps num_warmup_steps lr_warmup_steps warmup_iterations",
        "warmup_iters, which counts steps": "warmup_ratio warmup_frac warmup_fraction",
        "lr_decay_iters": "decay_steps lr_decay_steps decay_iters",
        "max_iters": "max_steps num_steps n_steps steps total_steps train_steps training_steps max_train_steps "
        "num_training_steps iters iterations num_iterations max_iterations train_iters",
        "max_iters, which counts steps": "epochs num_epochs n_epochs max_epochs num_train_epochs max_tokens",
        "max_minutes": "max_time time_limit",
        "patience": "early_stopping_patience early_stopping",
        "batch_size": "bs batch train_batch_size per_device_train_batch_size per_device_batch_size device_batch_size "
        "micro_batch_size microbatch_size mbs n_batches",
        "total_batch_size, which counts tokens": "global_batch_size gbs effective_batch_size",
        "gradient_accumulation_steps": "grad_accum grad_accum_steps gradient_accumulation grad_acc_steps grad_acc "
        "accumulate_grad_batches accumulation_steps accum_steps",
        "block_size": "context_length context_size context ctx_len n_ctx n_positions max_position_embeddings seq_len "
        "seq_length sequence_length max_seq_len max_seq_length max_sequence_length",
        "n_layer": "num_layers n_layers num_hidden_layers layers depth",
        "n_head": "num_heads n_heads num_attention_heads heads",
        "n_embd": "d_model model_dim hidden_size hidden_dim emb_dim embed_dim embedding_dim n_embed width dim",
        "vocab_size": "padded_vocab_size n_vocab vocab",
        "dropout": "drop_rate dropout_rate dropout_prob attn_pdrop resid_pdrop embd_pdrop",
        "activation": "activation_function hidden_act",
        "tie_weights": "tie_word_embeddings weight_tying",
        "out_dir": "output_dir save_dir checkpoint_dir ckpt_dir log_dir logdir run_dir default_root_dir output_path",
        "init_from": "model model_name model_name_or_path pretrained from_pretrained load load_from ckpt_path",
        "init_from, such as --init_from=resume": "resume resume_from resume_from_checkpoint",
        "checkpoint_interval": "save_steps save_every save_interval save_freq checkpoint_every ckpt_interval",
        "keep_checkpoints": "save_total_limit max_checkpoints",
        "eval_interval": "eval_steps eval_every eval_freq val_every val_interval val_loss_every val_check_interval",
        "eval_iters": "eval_batches val_batches val_steps limit_val_batches",
        "log_interval": "logging_steps log_every log_every_n_steps log_freq print_every",
        "sample_interval": "sample_every generate_every",
        "track": "report_to logger",
        "wandb_log": "wandb use_wandb",
        "wandb_project": "project",
        "wandb_run_name": "run_name wandb_name",
        "data_dir": "data data_path data_root dataset_dir dataset_path train_data train_file train_path input_bin",
        "dataset": "dataset_name",
        "seed": "random_seed manual_seed",
        "dtype, such as --dtype=bfloat16": "bf16 fp16 amp precision mixed_precision torch_dtype",
        "compile": "torch_compile",
        "device": "accelerator cuda",
        "parallel": "strategy fsdp",
        "activation_checkpointing": "gradient_checkpointing",
        "start": "prompt",
        "num_samples": "n_samples num_return_sequences",
        "max_new_tokens": "num_tokens n_tokens new_tokens max_tokens length",
        "temperature": "temp",
        "workers": "num_workers num_proc n_proc",
        "text_key": "text_column text_field",
        "val_fraction": "val_split val_size test_size",
    }.items()
    for theirs in names.split()
}
PRESETS = Path(__file__).parents[1] / "presets"


def knob(default: Any, help: str, **more: Any) -> Any:
    """A field with its help and what holds for its values.

    Those are its bounds (``min`` ≤ value ≤ ``max``, value > ``above``, value < ``below``), where in it a ``path``
    stands (ITSELF, EACH or AFTER_FILE), and which value None stands for, if neither auto nor an empty default.
    """
    return field(default=default, metadata={"help": help, **more})


def out_dir_knob() -> Any:
    """The one knob that commands share outside a group."""
    return knob("out", "folder of the run", path=ITSELF)


def hellaswag_style_knob() -> Any:
    return knob(
        "completion",
        "completion: as build-nanogpt scores; harness: as the lm-evaluation-harness (acc_norm by characters)",
    )


def hellaswag_data_knob() -> Any:
    return knob(
        "", "file of HellaSwag items; default: data/hellaswag/hellaswag_val.jsonl, downloaded if need be", path=ITSELF
    )


def token_dtype_knob() -> Any:
    return knob("auto", "type of the ids in .bin files that have no header; auto: uint16, as nanoGPT's")


@dataclass(frozen=True)
class Output:
    """Where a run writes, how it begins, what it keeps."""

    out_dir: str = out_dir_knob()
    init_from: str = knob(
        "scratch",
        "scratch | resume | auto (resume if there is something) | gpt2 … gpt2-xl | an out_dir, .pt file, Hugging Face "
        "folder or name",
        path=ITSELF,
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
    sample_prompt: str = knob("Hello, I'm a language model,", "what samples go on from", path=AFTER_FILE)
    sample_count: int = knob(4, "samples at a time, of each process", min=1, max=10_000)
    sample_tokens: int = knob(32, "tokens of a sample, those of the prompt included", min=1, max=1_000_000)
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
    wandb_run_name: str = knob("gpt2", "name of the run there; empty: one that it makes up", none="")
    profile: int = knob(0, "steps to profile, after two, and what is due between them: time and memory; 0: none", min=0)


@dataclass(frozen=True)
class Data:
    """What is read, and in which order."""

    dataset: str = knob(
        "openwebtext", "data/<dataset>, under the working folder, else beside train.py; or a folder", path=ITSELF
    )
    data_dir: str = knob("", "folder or glob of the token files; wins over dataset", path=ITSELF)
    token_dtype: TokenDtype = token_dtype_knob()
    data_mixture: str = knob("", "several data sets by weight instead, such as a=0.7,b=0.3", path=EACH)
    batch_size: int = knob(12, "rows in a micro batch", min=1, max=MICRO_STEPS)
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
            raise UserError(
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
        path=ITSELF,
    )
    checkpoint: str = knob("best", "best | latest | a step")


@dataclass(frozen=True)
class Sampling:
    """What to continue, and how."""

    start: str = knob("\n", "prompt, or FILE:name of a file that holds it", path=AFTER_FILE)
    num_samples: int = knob(10, "samples to draw", min=1, max=10_000)
    max_new_tokens: int = knob(500, "tokens in each, after the prompt", min=1, max=1_000_000)
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
    """Train a model: folio train [PRESET or FILE …] [--option=value …]; later ones win."""

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
    return _knobs(options)  # type: ignore[arg-type]


@functools.cache
def _knobs(options: type[Any]) -> dict[str, Knob]:
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
        raise UserError(
            f"min_lr={values['min_lr']:g} is above learning_rate={values['learning_rate']:g}: "
            "lower --min_lr, or set --decay_lr=False"
        )
    sources = getattr(config, "sources", {})
    asked = {sources.get(name) for name in EITHER}
    if len(asked) == 1 and asked != {None} and values["total_batch_size"]:
        raise UserError(
            f"total_batch_size={values['total_batch_size']} and gradient_accumulation_steps="
            f"{values['gradient_accumulation_steps']} exclude each other: give one of them"
        )
    if values.get("check_replicas_every") and values["parallel"] == "fsdp":
        raise UserError(
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
        raise UserError(
            f"total_batch_size={total} is {total // micro:,} micro steps of {micro} tokens, above {MICRO_STEPS:,}: "
            "lower it, or raise --batch_size"
        )
    if total % micro:
        sizes = [size for size in range(1, data.batch_size) if total % (size * row) == 0]
        raise UserError(
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
    if odd := values.keys() - {f.name for f in fields(GPTConfig)}:
        raise UserError(f"{path}: a model of GPT-2's kind has no {min(map(str, odd))!r}")
    config = GPTConfig(**{f.name: possible(path, f.name, values.get(f.name, f.default)) for f in fields(GPTConfig)})
    if config.vocab_size == "auto":
        raise UserError(f"{path}: vocab_size = {values.get('vocab_size', 'auto')!r}: must be a number")
    try:
        config.check()
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    return config


def possible(path: Path, name: str, value: Any) -> Any:
    """A value that a file gives for an option of a run, held to its type and bounds; of one that is no more, as it is.

    Raises:
        ValueError: names the file, the option and the value.
    """
    if (found := knobs(TrainConfig).get(name)) is None:
        return value
    value = typed(path, name, value, TrainConfig)
    try:
        _check_bounds(name, value, found.field.metadata)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    return value


def _check_bounds(name: str, value: Any, bounds: Mapping[str, Any]) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    rules: list[tuple[str, Callable[[Any, Any], bool], str]] = [
        ("min", operator.ge, "at least"),
        ("max", operator.le, "at most"),
        ("above", operator.gt, "above"),
        ("below", operator.lt, "below"),
    ]
    huge = isinstance(value, int) and abs(value) >= 2**63
    shown = f"{'-' * (value < 0)}2**63 or more" if huge else value
    for rule, holds, words in rules:
        if rule in bounds and not holds(value, bounds[rule]):
            raise UserError(f"{name}={shown}: must be {words} {bounds[rule]}")
    if huge or not math.isfinite(value):
        raise UserError(f"{name}={shown}: must be {'below 2**63' if huge else 'a finite number'}")


def unknown(name: str, options: type) -> str:
    """One line about a knob that does not exist, with the one that was probably meant."""
    return f"unknown option {name!r}: {meant(name, options) or '--help lists them'}"


def meant(name: str, options: type) -> str:
    """A hint at the knob that another program calls so, or that has nearly this name; "" where there is none."""
    known, plain = knobs(options), name.lower().replace("-", "_")
    ours, comma, note = _ELSEWHERE.get(plain, "").partition(",")
    if ours in known:
        return f"did you mean {ours!r}{comma}{note}?"
    close = difflib.get_close_matches(plain, known, n=1)
    return f"did you mean {close[0]!r}?" if close else ""


# Files


def read_file(
    name: str, options: type, *, ignore: type | None = None, names: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The knobs that a file or preset sets, held to their types; nothing in it is executed.

    Knobs of ``ignore`` that ``options`` lacks are passed over, so that ``sample`` takes a training preset. ``names``
    are those that files and flags before this one have set; its own are added. A name of a .py file that is no knob
    is a helper, with a warning where nothing in the file uses it.

    Raises:
        FileNotFoundError: no such file or preset.
        ValueError: names the file, the line and the remedy.
    """
    path = find_file(name)
    text, suffix = _text(path), path.suffix.lower()
    if suffix in (".yaml", ".yml"):
        raise UserError(f"{path}: a config file is .py, .toml or .json")
    lines: dict[str, int] = {}
    if suffix in (".toml", ".json"):
        values = _table(path, text, tomllib.loads if suffix == ".toml" else parse_json)
    else:
        before = {**defaults(TrainConfig), **defaults(options), **(names or {})}
        values, lines, used = assignments.read(path, text, before)
        if names is not None:
            names |= values
        values = {k: v for k, v in values.items() if not _is_helper(path, k, used, options, ignore)}
    return {
        k: typed(f"{path}:{lines[k]}" if k in lines else path, k, v, options)
        for k, v in values.items()
        if not _passed_over(k, options, ignore)
    }


def _text(path: Path) -> str:
    with path.open(encoding="utf-8-sig") as file:
        try:
            text = file.read(LONGEST + 1)
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text, at byte {error.start}: save it as UTF-8") from None
    if len(text) > LONGEST:
        raise UserError(f"{path} has more than {LONGEST:,} characters: that is no config file")
    return text


def _table(path: Path, text: str, parse: Callable[[str], Any]) -> dict[str, Any]:
    """What a .toml or .json file holds at its top level."""
    try:
        values = parse(text)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"{path}: not a valid {path.suffix[1:]} file: {reason}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: must hold knobs and their values at its top level")
    for name, value in values.items():
        if isinstance(value, dict):
            raise UserError(f"{path}: {name!r} is a table: write what it holds at the top level, without tables")
    return values


def _is_helper(path: Path, name: str, used: set[str], options: type, ignore: type | None) -> bool:
    """Whether a name that a .py file assigns is no knob; says so if the file has no use for it either."""
    if name in knobs(options) or _passed_over(name, options, ignore):
        return False
    if name not in used and not name.startswith("_"):
        hint = meant(name, options)
        reason = f" ({hint})" if hint else ""
        warnings.warn(f"{path}: {name} is not an option{reason}, and nothing in the file uses it", stacklevel=2)
    return True


def find_file(name: str) -> Path:
    """A path as it is, else a preset by its name, ``train_`` left out or not.

    Raises:
        FileNotFoundError: there is neither. ValueError: a pipe or a device.
    """
    path = Path(name).expanduser() if name.startswith("~/") else Path(name)
    if path.exists() and not path.is_dir():
        return require_file(path)
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


# Values


def typed(path: Path | str, name: str, value: Any, options: type) -> Any:
    """A value as the knob's type has it, taken as nanoGPT takes it.

    A whole float is an int, an int a float, 0 and 1 are no and yes; None leaves open what a knob may leave open.

    Raises:
        ValueError: it is none of the knob's type, or there is no such knob; names the file.
    """
    known = knobs(options)
    if name not in known:
        raise UserError(f"{path}: {unknown(name, options)}")
    kind, metadata = known[name].type, known[name].field.metadata
    choices = _choices(kind)
    if value is None:
        open_to = "auto" if AUTO in choices else "" if known[name].field.default == "" else None
        value = metadata.get("none", open_to)
    for choice in choices:
        if (found := _as(choice, value)) is not MISSING:
            return found
    shown = repr(value)
    shown = shown if len(shown) <= 80 else f"{shown[:79]}…"
    given = f"--{name}={shown}" if path == COMMAND_LINE else f"{path}: {name} = {shown}"
    raise UserError(f"{given}: must be {_wanted(kind)}")


def typed_text(name: str, text: str, options: type) -> Any:
    """The value of a knob that is given as text, read as nanoGPT reads it: a Python literal, else the text itself.

    Raises:
        ValueError: as ``typed``.
    """
    kind = knobs(options)[name].type
    if get_origin(kind) is tuple:
        return text
    value = _literal(text)
    return typed(COMMAND_LINE, name, text if all(_as(c, value) is MISSING for c in _choices(kind)) else value, options)


def _literal(text: str) -> Any:
    if len(text) > LONGEST:
        return text
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes that Python does not know
        for read in (ast.literal_eval, int, float):
            try:
                return read(text)
            except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
                pass
    return text


def _choices(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _as(kind: Any, value: Any) -> Any:
    """The value as one of this type, or MISSING."""
    number = type(value) in (int, float)
    if get_origin(kind) is Literal:
        return value if isinstance(value, str) and value in get_args(kind) else MISSING
    if kind is bool and (type(value) is bool or (number and value in (0, 1))):
        return bool(value)
    if kind is int and number and (type(value) is int or value.is_integer()):
        return int(value)
    if kind is float and number and (type(value) is float or abs(value) < 2.0**1023):
        return float(value)
    return value if kind is str and type(value) is str else MISSING


def _wanted(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(map(str, get_args(kind)))
    if kind is bool:
        return "True or False"
    return " or ".join(map(_wanted, get_args(kind))) if get_args(kind) else str(kind.__name__)


# Places


def at_home(options: T) -> T:
    """The same options, with the user's home folder for each ``~`` that begins a place.

    Raises:
        ValueError: there is no such user.
    """
    values = flat(options)
    places = {name: where for name, k in knobs(type(options)).items() if (where := k.field.metadata.get("path"))}
    return override(options, {name: _expanded(name, values[name], where) for name, where in places.items()})


def _expanded(name: str, value: Any, where: str) -> Any:
    if isinstance(value, tuple):
        return tuple(_expanded(name, part, where) for part in value)
    if where == EACH:
        return ",".join(_expanded(name, part, ITSELF) for part in value.split(","))
    before = where if where == AFTER_FILE else ""
    if not value.removeprefix(before).lstrip(" ").startswith("~") or not value.startswith(before):
        return value
    place = os.path.expanduser(value.removeprefix(before).lstrip(" "))
    if place.startswith("~"):
        user = place.partition("/")[0]
        raise UserError(f"{name}={value}: {user} has no home folder here: write the whole path, or ./{place}")
    return before + place
