"""Knobs, files and flags: how they become one frozen object, and that reading a file runs nothing."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from conftest import ROOT

from folio import api, cli
from folio.commands import bench, prepare, sample
from folio.config import files
from folio.config.options import Data, TrainConfig, option
from folio.config.compose import check
from folio.config.names import FOREIGN
from folio.config.table import flat, override, table
from folio.config.values import COMMAND_LINE

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
        return files.read_file(str(path), options)

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


# The names of a .py file (what its expressions are worth: tests/config/test_assignments.py)


def test_a_helper_sets_nothing_by_itself(read) -> None:
    assert read("base = 1e-3\nlearning_rate = base / 2") == {"learning_rate": 5e-4}
    assert read("_gpus = 8") == {}
    assert read("sizes = {'small': 4}\nn_layer = sizes['small']") == {"n_layer": 4}


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("train_data_fraction = 1.0", ""),
        ("save_points = [1, 2]", ""),
        ("n_layr = 4", "did you mean 'n_layer'?"),
        ("lr = 1e-3", "did you mean 'learning_rate'?"),
        ("num_train_epochs = 3", "did you mean 'max_iters', which counts steps?"),
    ],
)
def test_a_name_that_is_no_knob_and_of_no_use_is_named_once(read, line, hint) -> None:
    name = line.split()[0]
    with pytest.warns(UserWarning, match=rf"config\.py: {name} is not an option") as told:
        assert read(f"n_layer = 2\n{line}") == {"n_layer": 2}
    assert len(told) == 1
    assert hint in str(told[0].message)


def test_a_value_of_a_py_file_is_refused_with_its_line(read) -> None:
    with pytest.raises(ValueError, match=r"config\.py:3: n_layer = 'four': must be int"):
        read("n_head = 2\n\nn_layer = 'four'")


def test_a_file_finds_what_files_and_flags_before_it_set(tmp_path) -> None:
    """As in nanoGPT, where each is executed in turn."""
    first, second = tmp_path / "first.py", tmp_path / "second.py"
    first.write_text("base = 1e-3\nlearning_rate = base\nn_layer = 6")
    second.write_text("min_lr = learning_rate / 10 + base / 10\nn_layer += 1\nn_head = n_layer")
    read = parse(str(first), "--n_layer=8", "--n_embd=90", str(second))
    assert (read.model.n_layer, read.model.n_head, read.optimizer.min_lr) == (9, 9, 2e-4)
    with pytest.raises(ValueError, match=r"second\.py:1: the name 'base' is not assigned above"):
        parse(str(second), str(first))


@pytest.mark.parametrize(
    ("text", "suffix"),
    [
        ("\ufeffn_layer = 2\r\nn_head = 2\r\n", ".py"),
        ("\ufeffn_layer = 2\r\nn_head = 2\r\n", ".toml"),
        ('\ufeff{"n_layer": 2,\r\n "n_head": 2}', ".json"),
        ("# -*- coding: latin-1 -*-\rn_layer = 2  # é\rn_head = 2", ".py"),
        ("if True:\n\tn_layer = 2\n\tn_head\t=\t2\n", ".PY"),
    ],
    ids=["py", "toml", "json", "old Mac", "tabs"],
)
def test_marks_line_ends_and_tabs_change_nothing(tmp_path, text, suffix) -> None:
    path = tmp_path / f"config{suffix}"
    path.write_bytes(text.encode())
    assert files.read_file(str(path), TrainConfig) == {"n_layer": 2, "n_head": 2}


VALUES = [
    ("max_iters", "6e5", 600_000),
    ("batch_size", "4.0", 4),
    ("checkpoint_interval", "5e1", 50),
    ("vocab_size", "1e3", 1000),
    ("dropout", "0", 0.0),
    ("weight_decay", "1", 1.0),
    ("compile", "0", False),
    ("bias", "1", True),
    ("log_txt", "1", True),
]


@pytest.mark.parametrize(("name", "text", "value"), VALUES)
def test_numbers_are_taken_as_nanogpt_takes_them(read, name, text, value) -> None:
    """A whole float for an int, an int for a float, 0 and 1 for no and yes: in every file, and as a flag."""
    found = [read(f"{name} = {text}"), read(f"{name} = {text}", ".toml"), read(f'{{"{name}": {text}}}', ".json")]
    found += [{name: flat(parse(f"--{name}={text}"))[name]}, {name: flat(parse(f"--{name}", text))[name]}]
    assert found == [{name: value}] * 5
    assert {type(values[name]) for values in found} == {type(value)}


@pytest.mark.parametrize(
    ("flag", "name", "value"),
    [
        ("--max_iters=5_000", "max_iters", 5000),
        ("--max_iters=0x10", "max_iters", 16),
        ("--max_iters=007", "max_iters", 7),
        ("--max_iters= 7", "max_iters", 7),
        ("--out_dir='out-x'", "out_dir", "out-x"),
        ("--out_dir=7", "out_dir", "7"),
        ("--out_dir=None", "out_dir", "None"),
        ("--out_dir=it's", "out_dir", "it's"),
        ("--sample_prompt='a\\n'", "sample_prompt", "a\n"),
        ("--sample_prompt=[1, 2]", "sample_prompt", "[1, 2]"),
        ("--sample_prompt=" + "(" * 5000, "sample_prompt", "(" * 5000),
    ],
)
def test_a_flag_is_a_python_literal_or_the_text_itself(flag, name, value) -> None:
    """nanoGPT's rule."""
    assert flat(parse(flag))[name] == value


@pytest.mark.parametrize(
    ("name", "value"), [("wandb_run_name", ""), ("data_dir", ""), ("vocab_size", "auto"), ("compile", "auto")]
)
def test_none_leaves_open_what_a_knob_may_leave_open(read, name, value) -> None:
    assert read(f"{name} = None") == read(f'{{"{name}": null}}', ".json") == {name: value}


@pytest.mark.parametrize(
    "line",
    [
        "n_layer = None",
        "out_dir = None",
        "bias = None",
        "n_layer = 4.5",
        "n_layer = True",
        "bias = 2",
        "dropout = False",
        "n_layer = [4]",
        "out_dir = ('a', 'b')",
        "dtype = {}",
        "dropout = '0.1'",
        "n_layer = 2, ",
    ],
)
def test_what_a_knob_cannot_take_is_refused(read, line) -> None:
    with pytest.raises(ValueError, match=rf"config\.py:1: {line.split()[0]} = .*: must be"):
        read(line)


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
        files.read_file(str(path), TrainConfig)


@pytest.mark.parametrize(
    ("text", "suffix"),
    [("n_layr = 4", ".toml"), ('{"n_layr": 4}', ".json")],
)
def test_an_unknown_knob_gets_a_suggestion(read, text, suffix) -> None:
    with pytest.raises(ValueError, match=f"config{suffix}: unknown option 'n_layr': did you mean 'n_layer'"):
        read(text, suffix)


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("n_layer = '4'", "int"),
        ("n_layer = 4.5", "int"),
        ("n_layer = inf", "int"),
        ("n_layer = true", "int"),
        ("learning_rate = 'fast'", "float"),
        ("bias = 2", "True or False"),
        ("out_dir = 4", "str"),
        ("vocab_size = 'large'", "auto"),
        ("compile = 2", "auto"),
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
    path = tmp_path / "config.toml"
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
        "n_head": COMMAND_LINE,
    }


@pytest.mark.parametrize("flag", [["--n-layer=4"], ["--n-layer", "4"], ["--n_layer=4"], ["--n_layer", "4"]])
def test_both_spellings_of_a_flag(flag) -> None:
    read = parse(*flag)
    assert read.model.n_layer == 4
    assert read.sources == {"n_layer": COMMAND_LINE}


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


# Places


PLACES = {
    "train": {"out_dir", "init_from", "data_dir", "dataset", "data_mixture", "hellaswag_data", "sample_prompt"},
    "sample": {"out_dir", "init_from", "start"},
    "eval": {"out_dir", "init_from", "data", "tasks", "data_dir", "dataset", "data_mixture"},
    "prepare": {"text", "data_dir", "source", "tokenizer"},
    "data": {"folder"},
    "tokenizer": {"text", "out"},
    "export": {"to", "out_dir"},
    "import": {"model", "to"},
    "plot": {"out_dirs", "output"},
    "report": {"out_dir", "output"},
    "plan": {"data_dir", "dataset", "data_mixture"},
    "bench": {"data_dir", "dataset", "data_mixture"},
    "train_gpt": {"data_root", "log_dir"},
    "tokenize_documents_parallel": {"local_dir", "dataset_path"},
}


@pytest.mark.parametrize("command", PLACES)
def test_every_knob_that_names_a_place_says_so(command) -> None:
    knobs = table(cli.module_of(command).Options)
    assert {name for name, knob in knobs.items() if knob.metadata.get("path")} == PLACES[command]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("out_dir", "~/out", "HOME/out"),
        ("out_dir", "~", "HOME"),
        ("out_dir", "a~b/~", "a~b/~"),
        ("dataset", "~/corpus", "HOME/corpus"),
        ("data_dir", "~/corpus/*.bin", "HOME/corpus/*.bin"),
        ("init_from", "~/models/gpt2", "HOME/models/gpt2"),
        ("hellaswag_data", "~/items.jsonl", "HOME/items.jsonl"),
        ("data_mixture", "~/a=0.7,b=0.2, ~/c=0.1", "HOME/a=0.7,b=0.2,HOME/c=0.1"),
        ("sample_prompt", "FILE:~/prompt.txt", "FILE:HOME/prompt.txt"),
        ("sample_prompt", "~ is a tilde", "~ is a tilde"),
        ("wandb_run_name", "~/x", "~/x"),
    ],
)
def test_a_tilde_is_the_home_folder(read, tmp_path, monkeypatch, name, value, expected) -> None:
    """On the command line, in files and in calls."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "config.toml").write_text(f"{name} = {value!r}")
    expected = expected.replace("HOME", str(tmp_path))
    for found in (
        parse(f"--{name}={value}"),
        parse(str(tmp_path / "config.toml")),
        parse("~/config.toml"),
        api._options(TrainConfig(), "train", {name: value}),
    ):
        assert flat(found)[name] == expected


def test_a_tilde_in_what_stands_without_a_name(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    found = cli.parse(prepare.Options, ["~/a.txt", "b.txt", "hf:c"], "folio", files=False)
    assert found.text == (f"{tmp_path}/a.txt", "b.txt", "hf:c")


def test_a_home_that_is_not_known_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^out_dir=~no-such-user/out: ~no-such-user has no home folder .* \./~no-such"
    ):
        parse("--out_dir=~no-such-user/out")
    assert parse("--out_dir=./~no-such-user/out").output.out_dir == "./~no-such-user/out"


# What other programs call it


def test_other_trainers_names_are_of_no_command_and_lead_to_one_that_is() -> None:
    knobs = {name: table(cli.module_of(name).Options) for name in cli.COMMANDS}
    ours = {name for command in knobs.values() for name in command}
    trained = knobs["train"]
    for theirs, meant in FOREIGN.items():
        assert meant.partition(",")[0] in ours, meant
        assert theirs not in trained


@pytest.mark.parametrize(
    ("command", "name", "hint"),
    [
        ("train", "wd", "did you mean 'weight_decay'?"),
        ("train", "num-hidden-layers", "did you mean 'n_layer'?"),
        ("train", "LR", "did you mean 'learning_rate'?"),
        ("train", "global_batch_size", "did you mean 'total_batch_size', which counts tokens?"),
        ("sample", "max_tokens", "did you mean 'max_new_tokens'?"),
        ("sample", "output_dir", "did you mean 'out_dir'?"),
        ("prepare", "num_proc", "did you mean 'workers'?"),
        ("export", "lr", ": --help lists them"),
    ],
)
def test_another_trainers_name_is_answered_with_ours(command, name, hint) -> None:
    options = cli.module_of(command).Options
    with pytest.raises(ValueError, match=f"^unknown option {name.replace('-', '_')!r}") as error:
        cli.parse(options, [f"--{name}=3"], "folio", files=True)
    assert hint in str(error.value)


# The knobs


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_knob_of_a_command_has_one_name_and_a_help(command) -> None:
    knobs = table(cli.module_of(command).Options)
    assert all(knob.metadata["help"] for knob in knobs.values())


def test_two_knobs_of_one_name_are_refused() -> None:
    @dataclass(frozen=True)
    class Twice:
        data: Data = field(default_factory=Data)
        batch_size: int = option(1, "again")

    with pytest.raises(TypeError, match="batch_size"):
        table(Twice)


def _out_of_bounds():
    for options in (TrainConfig, sample.Options):
        for name, knob in table(options).items():
            for rule, step in {"min": -1, "max": 1, "above": 0, "below": 0}.items():
                if rule in knob.metadata:
                    yield pytest.param(options, name, knob.metadata[rule] + step, id=f"{name}-{rule}")


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
    ],
)
def test_knobs_that_do_not_go_together_are_refused(flags, said) -> None:
    with pytest.raises(ValueError, match=said):
        parse(*flags)


def test_a_constant_rate_needs_no_lowest_one() -> None:
    assert parse("--learning_rate=1e-5", "--decay_lr=False").optimizer.learning_rate == 1e-5
