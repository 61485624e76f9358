"""Config files: which values they set, and that reading one runs nothing."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from folio import cli
from folio.commands import bench, sample
from folio.config import files
from folio.config.options import TrainConfig
from folio.config.table import flat


@pytest.fixture
def read(tmp_path: Path):
    """Writes a config file and reads its options: ``read("n_layer = 4")``."""

    def write_and_read(text: str, suffix: str = ".py", options: type = TrainConfig):
        path = tmp_path / f"config{suffix}"
        path.write_text(text)
        return files.read_file(str(path), options)

    return write_and_read


def parse(*argv: str, options: type = TrainConfig):
    return cli.parse(options, list(argv), "folio", files=True)


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
def test_a_name_that_is_no_option_and_of_no_use_is_named_once(read, line, hint) -> None:
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
def test_none_leaves_open_what_an_option_may_leave_open(read, name, value) -> None:
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
def test_what_an_option_cannot_take_is_refused(read, line) -> None:
    with pytest.raises(ValueError, match=rf"config\.py:1: {line.split()[0]} = .*: must be"):
        read(line)


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
def test_an_unknown_option_gets_a_suggestion(read, text, suffix) -> None:
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
def test_a_value_of_the_wrong_type_is_refused_with_file_option_value_and_choices(read, line, wanted) -> None:
    name, value = line.split(" = ")
    with pytest.raises(ValueError, match=rf"config\.toml: {name} = ") as error:
        read(line, ".toml")
    said = str(error.value)
    assert value.strip("'").lower() in said.lower()
    assert wanted in said.partition("must be")[2]


def test_sample_and_bench_take_a_training_preset() -> None:
    """Options of training that they lack are passed over, others are still refused."""
    assert parse("train_shakespeare_char", options=sample.Options).source.out_dir == "out-shakespeare-char"
    assert parse("train_shakespeare_char", options=bench.Options).model.n_embd == 384


def test_an_option_that_no_command_has_is_refused_for_sample_too(tmp_path) -> None:
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
