"""The options: nanoGPT's defaults and presets, one name each, a help, bounds and rules."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from conftest import ROOT

from folio import cli
from folio.commands import sample
from folio.config import files
from folio.config.compose import check
from folio.config.declare import EACH, ITSELF, option
from folio.config.options import Data, Optimizer, Processes, System, TrainConfig
from folio.config.table import flat, options_with, override, table

# nanoGPT's train.py; of device, dtype, compile and backend Folio's defaults are auto
NANOGPT_DEFAULTS = {
    "out_dir": "out",
    "eval_interval": 2000,
    "log_interval": 1,
    "eval_iters": 200,
    "eval_only": False,
    "always_save_checkpoint": True,
    "init_from": "scratch",
    "wandb_log": False,
    "wandb_project": "owt",
    "wandb_run_name": "gpt2",
    "dataset": "openwebtext",
    "gradient_accumulation_steps": 40,
    "batch_size": 12,
    "block_size": 1024,
    "n_layer": 12,
    "n_head": 12,
    "n_embd": 768,
    "dropout": 0.0,
    "bias": False,
    "learning_rate": 6e-4,
    "max_iters": 600000,
    "weight_decay": 0.1,
    "beta1": 0.9,
    "beta2": 0.95,
    "grad_clip": 1.0,
    "decay_lr": True,
    "warmup_iters": 2000,
    "lr_decay_iters": 600000,
    "min_lr": 6e-5,
}
_EVAL = {"batch_size": 8, "eval_iters": 500, "eval_only": True, "wandb_log": False}
NANOGPT_PRESETS = {
    "train_shakespeare_char": {
        "out_dir": "out-shakespeare-char",
        "eval_interval": 250,
        "eval_iters": 200,
        "log_interval": 10,
        "always_save_checkpoint": False,
        "wandb_log": False,
        "wandb_project": "shakespeare-char",
        "wandb_run_name": "mini-gpt",
        "dataset": "shakespeare_char",
        "gradient_accumulation_steps": 1,
        "batch_size": 64,
        "block_size": 256,
        "n_layer": 6,
        "n_head": 6,
        "n_embd": 384,
        "dropout": 0.2,
        "learning_rate": 1e-3,
        "max_iters": 5000,
        "lr_decay_iters": 5000,
        "min_lr": 1e-4,
        "beta2": 0.99,
        "warmup_iters": 100,
    },
    "train_gpt2": {
        "wandb_log": True,
        "wandb_project": "owt",
        "wandb_run_name": "gpt2-124M",
        "batch_size": 12,
        "block_size": 1024,
        "gradient_accumulation_steps": 40,
        "max_iters": 600000,
        "lr_decay_iters": 600000,
        "eval_interval": 1000,
        "eval_iters": 200,
        "log_interval": 10,
        "weight_decay": 0.1,
    },
    "finetune_shakespeare": {
        "out_dir": "out-shakespeare",
        "eval_interval": 5,
        "eval_iters": 40,
        "wandb_log": False,
        "wandb_project": "shakespeare",
        "wandb_run_name": "ft-",  # and the time
        "dataset": "shakespeare",
        "init_from": "gpt2-xl",
        "always_save_checkpoint": False,
        "batch_size": 1,
        "gradient_accumulation_steps": 32,
        "max_iters": 20,
        "learning_rate": 3e-5,
        "decay_lr": False,
    },
    "eval_gpt2": {**_EVAL, "init_from": "gpt2"},
    "eval_gpt2_medium": {**_EVAL, "init_from": "gpt2-medium"},
    "eval_gpt2_large": {**_EVAL, "init_from": "gpt2-large"},
    "eval_gpt2_xl": {**_EVAL, "init_from": "gpt2-xl"},
}


def parse(*argv: str, options: type = TrainConfig):
    return cli.parse(options, list(argv), "folio", files=True)


def test_the_defaults_are_nanogpts() -> None:
    ours = flat(TrainConfig())
    assert {name: ours[name] for name in NANOGPT_DEFAULTS} == NANOGPT_DEFAULTS
    assert {name: type(ours[name]) for name in NANOGPT_DEFAULTS} == {n: type(v) for n, v in NANOGPT_DEFAULTS.items()}
    assert {ours[name] for name in ("device", "dtype", "compile", "backend")} == {"auto"}


def test_roles_stand_in_the_options() -> None:
    """What a run keeps, what a foreign checkpoint says of it, and what its ranks agree on, follows from them."""
    assert options_with(TrainConfig, nanogpt=True) == NANOGPT_DEFAULTS.keys()
    assert options_with(TrainConfig, role="call") == {"out_dir", "init_from", "eval_only", "max_minutes", "profile"}
    assert options_with(TrainConfig, role="data") == {"dataset", "data_dir", "data_mixture"}
    assert options_with(TrainConfig, role="machine") == {*table(System), *table(Processes)}
    assert options_with(TrainConfig, public=True) >= {*table(Optimizer), "batch_size", "dataset"}
    paths = {name for name, option in table(TrainConfig).items() if option.metadata.get("path") in (ITSELF, EACH)}
    assert options_with(TrainConfig, local=True) == paths | {"wandb_run_name"}


@pytest.mark.parametrize("name", NANOGPT_PRESETS)
def test_a_preset_sets_what_nanogpts_file_of_that_name_sets(name: str) -> None:
    ours, theirs = files.read_file(name, TrainConfig), dict(NANOGPT_PRESETS[name])
    if name == "finetune_shakespeare":
        assert ours.pop("wandb_run_name").startswith(theirs.pop("wandb_run_name"))
    assert ours == theirs


def test_the_presets_stand_where_nanogpts_users_look() -> None:
    """config/ and the packaged presets are the same files, byte by byte."""
    here = {p.name: p.read_bytes() for p in (ROOT / "config").iterdir()}
    assert here == {p.name: p.read_bytes() for p in files.PRESETS.glob("*.py")}
    assert here.keys() >= {f"{name}.py" for name in NANOGPT_PRESETS}


@pytest.mark.parametrize("path", sorted(files.PRESETS.glob("*.py")), ids=lambda p: p.stem)
def test_every_preset_passes_the_checks(path: Path) -> None:
    parse(path.stem)
    parse(str(path))


def test_a_preset_answers_to_its_name_without_train() -> None:
    assert flat(parse("shakespeare_char")) == flat(parse("train_shakespeare_char"))


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_option_of_a_command_has_one_name_and_a_help(command) -> None:
    options = table(cli.module_of(command).Options)
    assert all(option.metadata["help"] for option in options.values())


def test_two_options_of_one_name_are_refused() -> None:
    @dataclass(frozen=True)
    class Twice:
        data: Data = field(default_factory=Data)
        batch_size: int = option(1, "again")

    with pytest.raises(TypeError, match="batch_size"):
        table(Twice)


def _out_of_bounds():
    for options in (TrainConfig, sample.Options):
        for name, found in table(options).items():
            for rule, step in {"min": -1, "max": 1, "above": 0, "below": 0}.items():
                if rule in found.metadata:
                    yield pytest.param(options, name, found.metadata[rule] + step, id=f"{name}-{rule}")


@pytest.mark.parametrize(("options", "name", "value"), list(_out_of_bounds()))
def test_bounds_are_held(options, name, value) -> None:
    with pytest.raises(ValueError, match=rf"^{name}={value}: must be .*\d"):
        check(override(options(), {name: value}))


@pytest.mark.parametrize("name", ["learning_rate", "dropout", "weight_decay", "beta1", "grad_clip", "min_lr"])
def test_what_is_no_number_is_out_of_bounds(name) -> None:
    with pytest.raises(ValueError, match=f"^{name}=nan"):
        parse(f"--{name}=nan")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--n_head=5"], "n_embd=768 is not divisible by n_head=5: choose n_head=4 or 6, or n_embd=770"),
        (["--n_head=1000"], "n_head=1000: choose n_head=768, or n_embd=1000"),
        (["--n_embd=7", "--n_head=2"], "n_head=2: choose n_head=1 or 7, or n_embd=8"),
        (["--learning_rate=1e-5"], "min_lr=6e-05 is above learning_rate=1e-05"),
        (["--momentum=0.9"], "momentum=0.9 has no effect with optimizer=adamw: set --optimizer=muon, or remove --mom"),
        (["--schedule=linear", "--decay_share=0.5"], "decay_share=0.5 has no effect with schedule=linear: set .*=wsd"),
        (["--decay_lr=False", "--schedule=wsd"], "schedule=wsd has no effect with decay_lr=False: set --decay_lr=True"),
    ],
)
def test_options_that_do_not_go_together_are_refused(flags, said) -> None:
    with pytest.raises(ValueError, match=said):
        parse(*flags)


def test_a_constant_rate_needs_no_lowest_one() -> None:
    assert parse("--learning_rate=1e-5", "--decay_lr=False").optimizer.learning_rate == 1e-5


def test_a_file_may_set_options_that_have_no_effect(tmp_path: Path) -> None:
    """So that a preset with Muon can be run without it."""
    (tmp_path / "preset.py").write_text("optimizer = 'muon'\nmomentum = 0.9\nschedule = 'wsd'\ndecay_share = 0.7")
    assert parse(str(tmp_path / "preset.py"), "--momentum=0.8", "--decay_share=0.5").optimizer.momentum == 0.8
    changed = parse(str(tmp_path / "preset.py"), "--optimizer=adamw", "--decay_lr=False")
    assert changed.optimizer.momentum == 0.9
