"""argv → config → command. Only this module reads sys.argv and turns errors into one line."""

from __future__ import annotations

import contextlib
import importlib
import io
import keyword
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, TypeVar

from folio.errors import UserError
from folio.records import console

COMMANDS = {
    "prepare": "turn text into token files",
    "data": "describe token files",
    "tokenizer": "train a tokenizer on text",
    "train": "train a model, or resume a run",
    "sample": "generate text from a model",
    "export": "export a model: a Hugging Face folder, or a GGUF file",
    "import": "import a model of nanoGPT, its heirs or Hugging Face, to resume it",
    "eval": "measure a model: its loss, HellaSwag, the tasks of the lm-evaluation-harness",
    "plot": "draw the losses, HellaSwag accuracies and other measurements of runs",
    "report": "write a one-page report of one run or several",
    "plan": "compute what a run would need: memory, time, cost",
    "bench": "measure the speed of training",
    "doctor": "report what this machine has, and what each missing part means",
    "demo": "prepare, train, sample and plot on Python's own sources, in minutes",
}
EXAMPLES = {
    "prepare": "folio prepare novels/ --name=novels",
    "data": "folio data info data/shakespeare_char --verify",
    "tokenizer": "folio tokenizer train novels/ --vocab_size=8192 --out=tok.json",
    "train": "folio train shakespeare_char --max_iters=500",
    "sample": 'folio sample --out_dir=out --start="ROMEO:"',
    "export": "folio export --out_dir=out --to=model.gguf",
    "import": "folio import ckpt.pt --to=out",
    "eval": "folio eval hellaswag --out_dir=out",
    "plot": "folio plot out --output=loss.svg",
    "report": "folio report out out-2",
    "plan": "folio plan train_gpt2 --gpus=8 --gpu=h100",
    "bench": "folio bench train_gpt2 --batch_size=8",
    "demo": "folio demo",
    "train.py": "python train.py config/train_shakespeare_char.py --max_iters=500",
    "sample.py": 'python sample.py --out_dir=out --start="ROMEO:"',
    "bench.py": "python bench.py --batch_size=8",
}
_TAKE_FILES = {"train", "sample", "plan", "bench", "demo"}  # commands that read config files and presets
T = TypeVar("T")


def main(command: str | None = None, first: Sequence[str] = ()) -> NoReturn:
    """Runs one command and exits: 0; 2 for bad input; 1 for a failed run; 128 + n for a signal.

    Args:
        command: The command, for a script at the root such as ``train.py``; without it, the first argument names one.
        first: Arguments before those that were typed.
    """
    line = ""
    console.open_streams()
    warnings.formatwarning = lambda message, *_, **__: f"warning: {console.printable(_shortened(str(message)))}\n"
    silent: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if os.environ.get("RANK", "0") != "0":
        warnings.simplefilter("ignore")
        silent = contextlib.redirect_stdout(io.StringIO())
    try:
        with silent:
            code = _main(command, [*first, *sys.argv[1:]])
        console.flush()
    except BrokenPipeError:
        code = 141  # nobody reads the rest
        console.silence(sys.stdout)
    except KeyboardInterrupt:
        code, line = 130, "interrupted" * (os.environ.get("RANK", "0") == "0")
    except Exception as error:
        code, line = _line_about(error)
    if line:
        name = Path(sys.argv[0]).name
        sign = "" if line.startswith("Traceback") else f"{'folio' if name == '__main__.py' else name}: "
        console.say(sign + line, sys.stderr)
    with contextlib.suppress(OSError, ValueError):
        console.flush()
    if launch := sys.modules.get("folio.machine.launch"):
        launch.exit_process(code)
    sys.exit(code)


def _requirement(package: str) -> str:
    """The argument of ``pip install`` that provides a package: the whole clone, if Folio always needs the package."""
    import tomllib  # in Python 3.11 and later, which _line_about has checked

    from folio.files import read_text

    clone = Path(__file__).resolve().parent.parent
    project = clone / "pyproject.toml"
    if project.is_file():
        needs = tomllib.loads(read_text(project))["project"]["dependencies"]
        if package.replace("_", "-") in (need.partition(">=")[0] for need in needs):
            return f"-e {shlex.quote(str(clone))}"
    return package


def _line_about(error: Exception) -> tuple[int, str]:
    """The exit code, and one line about the error; about a defect of Folio, its traceback.

    Of several processes, only the first that fails prints its line.
    """
    if sys.version_info < (3, 11):  # noqa: UP036 (whoever types python3 may well have an older one)
        return 2, f"Folio needs Python 3.11 or later, and this is {sys.version.split()[0]}"
    package = (error.name or "").split(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if package and package != "folio":
        code, line = 2, f"the package {package!r} is missing: pip install {_requirement(package)}"
    elif isinstance(error, FloatingPointError):
        code, line = 1, str(error)
    elif isinstance(error, (UserError, OSError)):
        code, line = 2, _describe(error)
    elif shortage := _shortage(error):
        code, line = 2, shortage
    else:
        defect = "this is a defect of Folio: please report it with these lines and the command"
        code, line = 1, f"{traceback.format_exc().rstrip()}\n{defect}"
    if "RANK" in os.environ and package != "torch":
        from folio.machine.failures import first_error

        line = first_error(line, error)
    return code, line


def _shortage(error: Exception) -> str:
    """The line about memory that ran out; "" if that was not the error."""
    if isinstance(error, MemoryError) or "torch" in sys.modules:
        from folio.machine import shortage

        return shortage.line(error) if shortage.is_shortage(error) else ""
    return ""


def _main(command: str | None, argv: list[str]) -> int:
    """Runs one command and returns its exit code; errors are raised."""
    prog = f"{command}.py" if command else ""
    if command is None:
        command, *argv = argv or ["--help"]
        if command == "help" and argv:
            command, *argv = [argv[0], "--help", *argv[1:]]
        if command in ("-h", "--help", "help"):
            console.show(_overview())
            return 0
        if command in ("version", "--version"):
            from folio import __version__

            console.show(__version__)
            return 0
        if command not in COMMANDS:
            from folio.config.names import did_you_mean

            raise UserError(f"no command {command!r}: {did_you_mean(command, COMMANDS) or 'folio --help lists them'}")
    module = module_of(command)
    preset, ignored = getattr(module, "PRESET", None), getattr(module, "IGNORED", None)
    files = command in _TAKE_FILES
    try:
        options = parse(module.Options, argv, prog or f"folio {command}", files=files, preset=preset, ignored=ignored)
    except SystemExit:  # after --help
        return 0
    return int(module.main(options) or 0)


def module_of(command: str) -> ModuleType:
    """The module of a command, with its Options and main; that of import is ``import_``."""
    room = "commands" if command in COMMANDS else "doors"
    return importlib.import_module(f"folio.{room}.{command}{'_' * keyword.iskeyword(command)}")


def parse(
    options: type[T],
    argv: Sequence[str],
    prog: str,
    *,
    files: bool,
    preset: str | None = None,
    ignored: type | None = None,
) -> T:
    """Parses files and options, from left to right, into the options of a command.

    A ``preset`` is read before them, unless they name one. Options that only ``ignored`` has are dropped.

    Raises:
        UserError, FileNotFoundError: one line about the mistake.
        SystemExit: after --help.
    """
    from folio.config import arguments
    from folio.config.compose import compose, starting_from
    from folio.config.files import find_preset, read_file

    given = arguments.read(options, argv, files=files, ignored=ignored)
    if preset and not any(find_preset(layer.source) for layer in given.layers):
        given = given._replace(layers=[*arguments.read(options, [preset], files=True).layers, *given.layers])
    if given.help is None:
        return compose(starting_from(options, given.layers), given.layers)
    from folio.config.help import page

    command = prog.removeprefix("folio ").removesuffix(".py")  # nanoGPT's scripts have the names of commands
    about, example = COMMANDS.get(command, ""), EXAMPLES.get(command, "")
    about = f"{about[:1].upper()}{about[1:]}." if about else " ".join(str(options.__doc__).split())
    values = read_file(preset, options) if preset else {}
    console.show_styled(page(options, prog, about, example, given.help, given.places, files=files, preset=values))
    raise SystemExit(0)


def _overview() -> str:
    width = max(map(len, COMMANDS))
    table = "\n".join(f"  {name:{width}}  {what}" for name, what in COMMANDS.items())
    return (
        "Folio trains GPT-2-class language models from scratch.\n\n"
        f"usage: folio COMMAND [FILE or PRESET …] [--option=value …]\n\n{table}\n\n"
        "folio COMMAND --help lists the options of a command. An option that is True or False may stand alone: "
        "--overwrite, --no-overwrite."
    )


def _describe(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        line = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        return _shortened(line.replace("\n", "\\n"))
    return _shortened(" ".join(str(error).split()))


def _shortened(line: str) -> str:
    """A line without its middle if it is long, as it may be where it quotes a file."""
    return line if len(line) <= 1500 else f"{line[:1000]} … {line[-400:]}"
