"""Knobs, files and flags: how they become one frozen object, and that reading a file runs nothing."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from conftest import ROOT

from folio import cli, config
from folio.commands import bench, sample
from folio.config import Data, TrainConfig, flat

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


@pytest.fixture
def read(tmp_path: Path):
    """Writes a config file and reads its knobs: ``read("n_layer = 4")``."""

    def write_and_read(text: str, suffix: str = ".py", options: type = TrainConfig):
        path = tmp_path / f"config{suffix}"
        path.write_text(text)
        return config.read_file(str(path), options)

    return write_and_read


def parse(*argv: str, options: type = TrainConfig):
    return cli.parse(options, list(argv), "folio", files=True)


# What nanoGPT's users know


def test_the_defaults_are_nanogpts() -> None:
    ours = flat(TrainConfig())
    assert {name: ours[name] for name in NANOGPT_DEFAULTS} == NANOGPT_DEFAULTS
    assert {name: type(ours[name]) for name in NANOGPT_DEFAULTS} == {n: type(v) for n, v in NANOGPT_DEFAULTS.items()}
    assert {ours[name] for name in ("device", "dtype", "compile", "backend")} == {"auto"}


@pytest.mark.parametrize("name", NANOGPT_PRESETS)
def test_a_preset_sets_what_nanogpts_file_of_that_name_sets(name: str) -> None:
    ours, theirs = config.read_file(name, TrainConfig), dict(NANOGPT_PRESETS[name])
    if name == "finetune_shakespeare":
        assert ours.pop("wandb_run_name").startswith(theirs.pop("wandb_run_name"))
    assert ours == theirs


def test_the_presets_stand_where_nanogpts_users_look() -> None:
    """config/ and the packaged presets are the same files, byte by byte."""
    here = {p.name: p.read_bytes() for p in (ROOT / "config").iterdir()}
    assert here == {p.name: p.read_bytes() for p in config.PRESETS.glob("*.py")}
    assert here.keys() >= {f"{name}.py" for name in NANOGPT_PRESETS}


@pytest.mark.parametrize("path", sorted(config.PRESETS.glob("*.py")), ids=lambda p: p.stem)
def test_every_preset_passes_the_checks(path: Path) -> None:
    parse(path.stem)
    parse(str(path))


def test_a_preset_answers_to_its_name_without_train() -> None:
    assert flat(parse("shakespeare_char")) == flat(parse("train_shakespeare_char"))


def test_a_file_in_nanogpts_style_is_read(read) -> None:
    before = time.time()
    values = read(
        "import time\n"
        "# a comment above\n"
        "\n"
        "out_dir = 'out-verse' # where it goes\n"
        "wandb_run_name='ft-' + str(time.time())\n"
        "init_from = 'gpt2-xl' # the largest\n"
        "always_save_checkpoint = False\n"
        "gradient_accumulation_steps = 5 * 8 # 8 GPUs\n"
        "learning_rate = 3e-5; min_lr=learning_rate/10\n"
        "weight_decay = 1e-1\n"
    )
    assert before <= float(values.pop("wandb_run_name").removeprefix("ft-")) <= time.time()
    assert values == {
        "out_dir": "out-verse",
        "init_from": "gpt2-xl",
        "always_save_checkpoint": False,
        "gradient_accumulation_steps": 40,
        "learning_rate": 3e-5,
        "min_lr": 3e-5 / 10,
        "weight_decay": 0.1,
    }


# The reader of .py files


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("n_layer = 4", {"n_layer": 4}),
        ("n_layer: int = 4", {"n_layer": 4}),
        ("n_layer = n_head = 4", {"n_layer": 4, "n_head": 4}),
        ("n_layer = (7 + 2 ** 3 - 1) // 2 % 5", {"n_layer": 2}),
        ("n_layer = 0b11; n_head = 0x10", {"n_layer": 3, "n_head": 16}),
        ("dropout = 1 / 4", {"dropout": 0.25}),
        ("dropout = 0", {"dropout": 0.0}),
        ("learning_rate = 10 ** -3", {"learning_rate": 1e-3}),
        ("weight_decay = --+0.5", {"weight_decay": 0.5}),
        ("compile = not True", {"compile": False}),
        ("compile = 'auto'", {"compile": "auto"}),
        ("max_iters = max_iters // 2", {"max_iters": 300_000}),
        ("batch_size = 6\nbatch_size = batch_size * 2\nn_embd = batch_size * 64", {"batch_size": 12, "n_embd": 768}),
        ("_gpus = 8\ngradient_accumulation_steps = 5 * _gpus", {"gradient_accumulation_steps": 40}),
        ("out_dir = f'out-{n_layer}x{n_embd}-{learning_rate:.0e}'", {"out_dir": "out-12x768-6e-04"}),
        ("out_dir = 'a' 'b' + str(2) + 'c'", {"out_dir": "ab2c"}),
        ("n_layer = int('4') + int(2.9) + round(2.6) + min(3, 1) + max(0, 2)", {"n_layer": 12}),
        ("dropout = float('0.5')", {"dropout": 0.5}),
        ("'''A docstring.'''\nn_layer = 4", {"n_layer": 4}),
        ("", {}),
    ],
)
def test_arithmetic_is_evaluated(read, text, expected) -> None:
    values = read(text)
    assert values == expected
    assert {k: type(v) for k, v in values.items()} == {k: type(v) for k, v in expected.items()}


@pytest.mark.parametrize(
    "line",
    [
        "import os",
        "import time, os",
        "import time as t",
        "from os import system",
        "open({mark!r}, 'w')",
        "n_layer = len(open({mark!r}, 'w').mode)",
        "n_layer = __import__('os').system('touch {mark}')",
        "exec(\"open({mark!r}, 'w')\")",
        "n_layer = eval('4')",
        "n_layer = int(x=4)",
        "out_dir = ''.__class__.__name__",
        "out_dir = 'out'.upper()",
        "out_dir = f'{{n_layer.real}}'",
        "out_dir = f'{{n_layer!r}}'",
        "n_layer = 'abc'[0]",
        "n_layer = [4][0]",
        "n_layer = sum(x for x in (1, 2))",
        "n_layer = [x for x in 'abc']",
        "n_layer = lambda: 4",
        "n_layer = (n_head := 4)",
        "n_layer = 4 if n_head else 5",
        "n_layer += 1",
        "n_layer, n_head = 4, 4",
        "if n_layer: n_head = 4",
        "def f(): pass",
        "del n_layer",
        "n_layer = None",
        "n_layer = not_a_name",
        "out_dir = str(time.time())",  # without its import
        "time.sleep(9)",
        "n_layer = 2 ** 65",
        "n_layer = 2 ** 2 ** 7",
        "n_layer = 9 ** 9 ** 9",
        "n_layer = (2 ** 64) ** 64",
        "n_layer = 2 ** -65",
        "out_dir = 'a' * 9",
        "out_dir = 9 * 'a'",
        "out_dir = f'{{n_layer:>99999999}}'",
        "out_dir = '%99999999d' % 1",
        "n_layer = 1 / 0",
        "n_layer = int('four')",
        "n_layer = min(4)",
        "n_layer = 4 +",
    ],
)
def test_anything_else_is_refused_by_file_and_line_and_never_run(read, tmp_path, line) -> None:
    mark = tmp_path / "mark"
    with pytest.raises(ValueError, match=r"config\.py") as error:
        read("n_layer = 2\n\n" + line.format(mark=str(mark)))
    assert f"{tmp_path / 'config.py'}:3: " in str(error.value) or "line 3" in str(error.value)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("text", "suffix"),
    [
        ("n_layer = " + "-" * 50_000 + "1", ".py"),
        ("n_layer = " + "1+" * 50_000 + "1", ".py"),
        ("n_layer = " + "(" * 500 + "1" + ")" * 500, ".py"),
        ("[" * 100_000, ".json"),
    ],
    ids=["signs", "sum", "brackets", "json"],
)
def test_a_file_that_is_nested_too_deep_is_refused_by_name(read, text, suffix) -> None:
    with pytest.raises(ValueError, match=f"config{suffix}"):
        read(text, suffix)


# Other files, and what all of them share


@pytest.mark.parametrize(
    ("text", "suffix"),
    [
        ("n_layer = 4\nlearning_rate = 1\ncompile = false\nsampling = 'random'", ".toml"),
        ('{"n_layer": 4, "learning_rate": 1, "compile": false, "sampling": "random"}', ".json"),
        ("n_layer = 4\nlearning_rate = 1\ncompile = False\nsampling = 'random'", ".py"),
    ],
)
def test_all_formats_say_the_same(read, text, suffix) -> None:
    values = read(text, suffix)
    assert values == {"n_layer": 4, "learning_rate": 1.0, "compile": False, "sampling": "random"}
    assert isinstance(values["learning_rate"], float)


@pytest.mark.parametrize(("text", "suffix"), [("n_layer =", ".toml"), ('{"n_layer": 4', ".json"), ("[4]", ".json")])
def test_a_file_that_is_not_of_its_format_is_refused_by_name(read, text, suffix) -> None:
    with pytest.raises(ValueError, match=f"config{suffix}"):
        read(text, suffix)


def test_a_file_that_is_not_text_is_refused_by_name(tmp_path) -> None:
    path = tmp_path / "config.py"
    path.write_bytes(b"out_dir = '\xff'")
    with pytest.raises(ValueError, match=r"config\.py"):
        config.read_file(str(path), TrainConfig)


@pytest.mark.parametrize(
    ("text", "suffix"),
    [("n_layr = 4", ".py"), ("n_layr = 4", ".toml"), ('{"n_layr": 4}', ".json")],
)
def test_an_unknown_knob_gets_a_suggestion(read, text, suffix) -> None:
    with pytest.raises(ValueError, match=f"config{suffix}: unknown knob 'n_layr': did you mean 'n_layer'"):
        read(text, suffix)


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("n_layer = '4'", "int"),
        ("n_layer = 4.0", "int"),
        ("n_layer = true", "int"),
        ("learning_rate = 'fast'", "float"),
        ("bias = 1", "bool"),
        ("out_dir = 4", "str"),
        ("vocab_size = 'large'", "auto"),
        ("compile = 1", "auto"),
        ("sampling = 'sorted'", "sequential"),
        ("dtype = 'float64'", "bfloat16"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_file_knob_value_and_choices(read, line, wanted) -> None:
    name, value = line.split(" = ")
    with pytest.raises(ValueError, match=rf"config\.toml: {name} = ") as error:
        read(line, ".toml")
    said = str(error.value)
    assert value.strip("'").lower() in said.lower()
    assert wanted in said.partition("must be")[2]


def test_sample_and_bench_take_a_training_preset() -> None:
    """Knobs of training that they lack are passed over, others are still refused."""
    assert parse("train_shakespeare_char", options=sample.Options).source.out_dir == "out-shakespeare-char"
    assert parse("train_shakespeare_char", options=bench.Options).model.n_embd == 384


def test_a_knob_that_no_command_has_is_refused_for_sample_too(tmp_path) -> None:
    path = tmp_path / "config.py"
    path.write_text("temprature = 1.0")
    with pytest.raises(ValueError, match="did you mean 'temperature'"):
        parse(str(path), options=sample.Options)


@pytest.mark.parametrize(
    ("name", "hint"), [("train_shakespear_char", "did you mean 'train_shakespeare_char'"), ("zzz.py", "train_gpt2")]
)
def test_a_missing_file_is_named_with_what_there_is(name, hint) -> None:
    with pytest.raises(FileNotFoundError, match=hint) as error:
        parse(name)
    assert repr(name) in str(error.value)


# The command line


def test_files_and_flags_apply_left_to_right(tmp_path) -> None:
    first, second = tmp_path / "first.py", tmp_path / "second.toml"
    first.write_text("batch_size = 1\nn_layer = 1")
    second.write_text("batch_size = 2\nn_head = 2")
    read = parse(str(first), "--batch_size=3", str(second), "--n_head=3")
    assert (read.data.batch_size, read.model.n_layer, read.model.n_head) == (2, 1, 3)
    assert parse(str(first), str(second), "--batch_size=3", "--batch_size=4").data.batch_size == 4
    assert parse("--batch_size=3", str(second), str(first)).data.batch_size == 1
    assert read.sources == {
        "batch_size": str(second),
        "n_layer": str(first),
        "n_head": config.COMMAND_LINE,
    }


@pytest.mark.parametrize("flag", [["--n-layer=4"], ["--n-layer", "4"], ["--n_layer=4"], ["--n_layer", "4"]])
def test_both_spellings_of_a_flag(flag) -> None:
    read = parse(*flag)
    assert read.model.n_layer == 4
    assert read.sources == {"n_layer": config.COMMAND_LINE}


@pytest.mark.parametrize(
    ("flag", "name", "value"),
    [
        ("--compile=False", "compile", False),
        ("--compile=True", "compile", True),
        ("--compile=auto", "compile", "auto"),
        ("--bias=True", "bias", True),
        ("--vocab_size=256", "vocab_size", 256),
        ("--dropout=0", "dropout", 0.0),
        ("--learning_rate=1e-3", "learning_rate", 1e-3),
        ("--out_dir=--odd", "out_dir", "--odd"),
        ("--data_dir=", "data_dir", ""),
        ("--checkpoint_interval=5", "checkpoint_interval", 5),
    ],
)
def test_flags_have_the_types_of_their_knobs(flag, name, value) -> None:
    assert flat(parse(flag))[name] == value
    assert type(flat(parse(flag))[name]) is type(value)


def test_a_prompt_keeps_its_spaces_lines_and_dashes() -> None:
    for start in ("\n", " a = b ", "--help", "é"):
        assert parse(f"--start={start}", options=sample.Options).sampling.start == start
        assert parse("--start", start, options=sample.Options).sampling.start == start


# The knobs


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_knob_of_a_command_has_one_name_and_a_help(command) -> None:
    knobs = config.knobs(cli.module_of(command).Options)
    assert all(knob.field.metadata["help"] for knob in knobs.values())


def test_two_knobs_of_one_name_are_refused() -> None:
    @dataclass(frozen=True)
    class Twice:
        data: Data = field(default_factory=Data)
        batch_size: int = config.knob(1, "again")

    with pytest.raises(TypeError, match="batch_size"):
        config.knobs(Twice)


def _out_of_bounds():
    for options in (TrainConfig, sample.Options):
        for name, knob in config.knobs(options).items():
            for rule, step in {"min": -1, "max": 1, "above": 0, "below": 0}.items():
                if rule in knob.field.metadata:
                    yield pytest.param(options, name, knob.field.metadata[rule] + step, id=f"{name}-{rule}")


@pytest.mark.parametrize(("options", "name", "value"), list(_out_of_bounds()))
def test_bounds_are_held(options, name, value) -> None:
    with pytest.raises(ValueError, match=rf"^{name}={value}: must be .*\d"):
        config.check(config.override(options(), {name: value}))


@pytest.mark.parametrize("name", ["learning_rate", "dropout", "weight_decay", "beta1", "grad_clip", "min_lr"])
def test_what_is_no_number_is_out_of_bounds(name) -> None:
    with pytest.raises(ValueError, match=f"^{name}=nan"):
        parse(f"--{name}=nan")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--n_head=5"], "n_embd=768 is not divisible by n_head=5: choose n_embd=770"),
        (["--learning_rate=1e-5"], "min_lr=6e-05 is above learning_rate=1e-05"),
    ],
)
def test_knobs_that_do_not_go_together_are_refused(flags, said) -> None:
    with pytest.raises(ValueError, match=said):
        parse(*flags)


def test_a_constant_rate_needs_no_lowest_one() -> None:
    assert parse("--learning_rate=1e-5", "--decay_lr=False").optimizer.learning_rate == 1e-5
