"""The command line: files and options from left to right, paths, and names of other trainers."""

from __future__ import annotations

import pytest

from folio import api, cli
from folio.commands import prepare, sample
from folio.config.names import FOREIGN
from folio.config.options import TrainConfig
from folio.config.table import flat, table
from folio.config.values import COMMAND_LINE


def parse(*argv: str, options: type = TrainConfig):
    return cli.parse(options, list(argv), "folio", files=True)


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
def test_flags_have_the_types_of_their_options(flag, name, value) -> None:
    assert flat(parse(flag))[name] == value
    assert type(flat(parse(flag))[name]) is type(value)


def test_a_prompt_keeps_its_spaces_lines_and_dashes() -> None:
    for start in ("\n", " a = b ", "--help", "é"):
        assert parse(f"--start={start}", options=sample.Options).sampling.start == start
        assert parse("--start", start, options=sample.Options).sampling.start == start


# Paths


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
    "report": {"out_dirs", "output"},
    "plan": {"data_dir", "dataset", "data_mixture"},
    "bench": {"data_dir", "dataset", "data_mixture", "peer"},
    "train_gpt": {"data_root", "log_dir"},
    "tokenize_documents_parallel": {"local_dir", "dataset_path"},
}


@pytest.mark.parametrize("command", PLACES)
def test_every_option_that_names_a_place_says_so(command) -> None:
    options = table(cli.module_of(command).Options)
    assert {name for name, option in options.items() if option.metadata.get("path")} == PLACES[command]


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
def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch, name, value, expected) -> None:
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


# Names of other trainers


def test_other_trainers_names_are_of_no_command_and_lead_to_one_that_is() -> None:
    options = {name: table(cli.module_of(name).Options) for name in cli.COMMANDS}
    ours = {name for command in options.values() for name in command}
    trained = options["train"]
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
