"""The command line: what it offers, and how it says no."""

from __future__ import annotations

import runpy
import shlex
import sys

import pytest
from conftest import ROOT, SMALL, STORY, python

from folio import __version__, cli
from folio.commands import demo
from folio.config.options import TrainConfig
from folio.config.table import Option, flat, table


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_the_overview_lists_every_command(folio, argv) -> None:
    code, out, err = folio(*argv)
    assert (code, err) == (0, "")
    for command, what in cli.COMMANDS.items():
        assert f"  {command}" in out
        assert what in out


@pytest.mark.parametrize("word", ["--version", "version"])
def test_version(folio, word) -> None:
    assert folio(word) == (0, f"{__version__}\n", "")


def shown(name: str, option: Option) -> str:
    return f"  {option.metadata.get('positional') or f'--{name}'} "


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_all_shows_every_option(folio, command) -> None:
    """Under the heading of its group; the values in the table are the defaults."""
    code, out, err = folio(command, "--help=all")
    assert (code, err) == (0, "")
    assert folio(command, "--help", "all") == (code, out, err)
    for name, option in table(cli.module_of(command).Options).items():
        assert shown(name, option) in out.replace(", ", "  ").replace("\n", " \n"), name
        assert f"\n{option.group or 'options'}:" in out


@pytest.mark.parametrize(
    ("command", "columns"),
    [
        *((command, 100) for command in [*cli.COMMANDS, "train_gpt", "tokenize_documents_parallel"]),
        *((command, 80) for command in ("train", "sample", "demo")),
    ],
)
def test_help_fits_a_screen(capsys, monkeypatch, command, columns) -> None:
    """At most 45 lines, and one for each option that is not advanced."""
    monkeypatch.setenv("COLUMNS", str(columns))
    options = cli.module_of(command).Options
    with pytest.raises(SystemExit):
        cli.parse(options, ["--help"], f"folio {command}", files=command == "train")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 45
    assert max(map(len, lines)) <= columns
    for name, option in table(options).items():
        found = [line for line in lines if line.replace(", ", "  ").startswith(shown(name, option).rstrip())]
        found = [line for line in found if shown(name, option) in f"{line} ".replace(", ", "  ")]
        assert len(found) == (not option.metadata.get("advanced")), name
    rest = [line for line in lines if line.startswith("   ")]
    assert rest == [], "an option takes more than one line"


def test_help_of_an_option(folio) -> None:
    """At length: its unit, default and bounds, what the short help leaves out, and who else has it."""
    code, out, err = folio("train", "--help=eval_iters")
    assert (code, err) == (0, "")
    for words in ("--eval_iters: batches", "(200)", "over all ranks", "at least 0", "nanoGPT"):
        assert words in out
    for argv in (["train", "--help", "eval-iters"], ["help", "train", "eval_iters"], ["train", "--help=eval-iters"]):
        assert folio(*argv) == (code, out, err)
    assert folio("train", "--help=lr") == (2, "", "folio: unknown option 'lr': did you mean 'learning_rate'?\n")


def test_a_preset_replaces_that_of_the_command() -> None:
    """A file, and an option with a preset's name as its value, do not."""

    def parsed(*argv: str) -> dict[str, object]:
        return flat(cli.parse(TrainConfig, list(argv), "folio demo", files=True, preset=demo.PRESET))

    assert (
        parsed("train_stdlib")
        == parsed("stdlib")
        == flat(cli.parse(TrainConfig, ["train_stdlib"], "folio train", files=True))
    )
    usual = parsed()
    assert usual["optimizer"] == "muon"
    assert parsed("--dataset", "shakespeare_char") == usual | {"dataset": "shakespeare_char"}


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("demo", "--dataset PATH  a data set's name or folder (stdlib)"),
        ("demo", "--n_layer N  blocks (4)"),
        ("eval", "--dataset PATH  a data set's name or folder (the run's, else openwebtext)"),
        ("eval", "--data_dir PATH  token files instead: a folder or glob (the run's)"),
        ("bench", "--gradient_accumulation_steps N  accepted, but not used by this command"),
    ],
)
def test_help_shows_the_values_that_the_command_uses(folio, monkeypatch, command, line) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    option, _, text = line.partition("  ")
    shown_lines = [" ".join(found.split()) for found in folio(command, "--help").out.splitlines()]
    assert f"{option} {text}" in shown_lines
    name = option.split()[0]
    assert folio(command, f"--help={name[2:]}").out.startswith(f"{name}: {text}")


def test_help_of_a_command_by_its_name(folio) -> None:
    assert folio("help", "train") == folio("train", "--help") == folio("train", "shakespeare_char", "-h")
    assert folio("help", "train", "all") == folio("train", "--help=all")


@pytest.mark.parametrize("argv", [["eval", "hellaswag", "--help"], ["help", "eval", "hellaswag"]])
def test_help_of_a_measurement_shows_what_it_takes(folio, argv) -> None:
    out = folio(*argv).out
    assert all(f"--{name} " in out for name in ("style", "data", "limit", "out_dir", "device"))
    assert not any(f"--{name} " in out for name in ("split", "eval_iters", "tasks", "batch_size", "dataset"))


def test_a_value_that_looks_like_help_is_a_value(folio, tmp_path) -> None:
    assert folio("sample", f"--out_dir={tmp_path}", "--start", "--help").code == 2


@pytest.mark.parametrize(("command", "remedy"), [("trian", "did you mean 'train'?"), ("xyzzy", "folio --help")])
def test_an_unknown_command_is_one_line(folio, command, remedy) -> None:
    code, out, err = folio(command)
    assert (code, out) == (2, "")
    assert err.splitlines() == [err.rstrip("\n")]
    assert repr(command) in err
    assert remedy in err


def test_a_process_of_several_names_its_rank(folio, monkeypatch) -> None:
    """Started by hand, without a launcher whose store would tell who failed first."""
    monkeypatch.setenv("RANK", "1")
    assert folio("trian") == (2, "", "folio: rank 1: no command 'trian': did you mean 'train'?\n")


@pytest.mark.parametrize(
    ("package", "argv"),
    [("torch", ["sample"]), ("rich_argparse", ["train", "--help"]), ("safetensors", ["train", *SMALL])],
)
def test_a_missing_package_is_one_line_with_its_remedy(tmp_path, package, argv) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] == {package!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Missing())\n"
    )
    done = python("-m", "folio", *argv, cwd=tmp_path, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"folio: the package '{package}' is missing: pip install -e {shlex.quote(str(ROOT))}\n"
    assert [p.name for p in tmp_path.iterdir() if p.name != "__pycache__"] == ["sitecustomize.py"]


def test_a_missing_extra_is_one_line_with_its_remedy(folio, tmp_path, monkeypatch) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 0, "loss": 1.0}\n')
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, err = folio("plot", tmp_path)
    assert (code, out) == (2, "")
    assert err == "folio: the package 'matplotlib' is missing: pip install matplotlib\n"


def test_nothing_but_a_command_needs_a_package(tmp_path) -> None:
    """The overview comes up in a Python that has none of them."""
    done = python("-S", "-m", "folio", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "train a model" in done.stdout


@pytest.mark.parametrize("script", ["train.py", "sample.py", "bench.py"])
def test_a_script_of_the_clone_speaks_under_its_own_name(monkeypatch, capfd, script) -> None:
    """As nanoGPT's users call them: ``python train.py --n_layr=4``."""
    monkeypatch.setattr(sys, "argv", [script, "--n_layr=4"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    out, err = capfd.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert err.startswith(f"{script}: unknown option 'n_layr'")
    assert err.count("\n") == 1


def test_an_argument_that_is_no_option_is_one_line(folio, tmp_path) -> None:
    for argv in (["train", "-x"], ["doctor", "more"], ["train", "--n_layer"], ["train", "--"]):
        code, out, err = folio(*argv)
        assert (code, out, err.count("\n")) == (2, "", 1), argv
        assert argv[-1].lstrip("-") in err


def test_a_bug_of_folio_itself_is_not_hidden(folio, monkeypatch) -> None:
    """Only errors that the user can mend become one line."""

    def broken(*_: object) -> int:
        raise AttributeError("a bug")

    monkeypatch.setattr(cli, "_main", broken)
    code, _, err = folio("train")
    assert code == 1
    assert err.startswith("Traceback")
    *_, error, remedy = err.splitlines()
    assert error == "AttributeError: a bug"
    assert "please report it" in remedy


LOADED = """
import atexit, sys
atexit.register(lambda: print("loaded:", *sorted({"torch", "numpy", "tiktoken"} & sys.modules.keys())))
from folio import cli
cli.main()
"""


@pytest.mark.parametrize(
    "argv",
    [
        *(
            "--help",
            "help train",
            "version",
            "train --help",
            "sample --help",
            "prepare --help",
            "eval hellaswag --help",
        ),
        *("train --n_layr=4", "sample --tempratur=1", "train nowhere.py", "prepare", "export"),
    ],
)
def test_an_answer_needs_no_heavy_package(tmp_path, argv) -> None:
    """So that it is there in a third of a second."""
    done = python("-c", LOADED, *argv.split(), cwd=tmp_path, PYTHONPATH=ROOT)
    loaded = set(done.stdout.splitlines()[-1].split()[1:])
    assert loaded <= ({"numpy"} if argv.startswith("eval") else set())
    assert done.returncode == (0 if "help" in argv or argv == "version" else 2)


def test_preparing_needs_no_torch(tmp_path) -> None:
    """Nor does finding that there is nothing to do."""
    argv = ["prepare", "shakespeare_char", f"--source={STORY}"]
    for _ in range(2):
        done = python("-c", LOADED, *argv, cwd=tmp_path, PYTHONPATH=ROOT)
        assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "loaded: numpy"), done
