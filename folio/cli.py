"""argv → config → command. The only reader of sys.argv, and where errors become one line."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import io
import keyword
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, get_args

from folio.errors import UserError
from folio.records import console

COMMANDS = {
    "prepare": "turn text into token files",
    "data": "look into token files",
    "tokenizer": "learn a vocabulary from text",
    "train": "train a model, or go on with one",
    "sample": "let a trained model write",
    "export": "hand a model on: a Hugging Face folder, or a GGUF file",
    "import": "take in a model of nanoGPT, its heirs or Hugging Face, to go on with",
    "eval": "measure a model: its loss, HellaSwag, the tasks of the lm-evaluation-harness",
    "plot": "draw the losses and HellaSwag accuracies of runs",
    "report": "put all that is known of a run on one page",
    "plan": "work out what a run would need: memory, time, cost",
    "bench": "measure the speed of a training step",
    "doctor": "say what this machine has, and what each lack means",
    "demo": "prepare, train, sample and plot on this Python's own sources, in about two minutes",
}
_TAKE_FILES = {"train", "sample", "plan", "bench", "demo"}


def main(command: str | None = None, first: Sequence[str] = ()) -> NoReturn:
    """Runs one command and exits: 0; 2 for bad input; 1 for a run that failed; 128 + n for a signal.

    A script at the root names its command, and what stands before the arguments that were typed.
    """
    line = ""
    console.open_streams()
    warnings.formatwarning = lambda message, *_, **__: f"warning: {console.printable(str(message))}\n"
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
        code, line = _told(error)
    if line:
        name = Path(sys.argv[0]).name
        sign = "" if line.startswith("Traceback") else f"{'folio' if name == '__main__.py' else name}: "
        console.say(sign + line, sys.stderr)
    with contextlib.suppress(OSError, ValueError):
        console.flush()
    if processes := sys.modules.get("folio.machine.processes"):
        processes.leave(code)
    sys.exit(code)


def _told(error: Exception) -> tuple[int, str]:
    """The exit code, and what is said: one line, or of a defect of this program where it is.

    Of several processes the first to fail speaks for all.
    """
    if sys.version_info < (3, 11):  # noqa: UP036 (whoever types python3 may well have an older one)
        return 2, f"Folio needs Python 3.11 or later, and this is {sys.version.split()[0]}"
    package = (error.name or "").split(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if package and package != "folio":
        code, line = 2, f"the package {package!r} is missing: pip install {package}"
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
        from folio.machine.processes import first_error

        line = first_error(line, error)
    return code, line


def _shortage(error: Exception) -> str:
    """The line about memory that ran out; "" where it did not."""
    if isinstance(error, MemoryError) or "torch" in sys.modules:
        from folio.machine import shortage

        return shortage.line(error) if shortage.is_shortage(error) else ""
    return ""


def _main(command: str | None, argv: list[str]) -> int:
    script = f"{command}.py" if command else ""
    if command is None:
        if not argv or argv[0] in ("-h", "--help"):
            console.show(_overview())
            return 0
        if argv[0] == "--version":
            from folio import __version__

            console.show(__version__)
            return 0
        command, argv = argv[0], argv[1:]
        if command not in COMMANDS:
            close = difflib.get_close_matches(command, COMMANDS, n=1)
            raise UserError(
                f"no command {command!r}: " + (f"did you mean {close[0]!r}?" if close else "folio --help lists them")
            )
    module = module_of(command)
    argv = [*getattr(module, "FIRST", []), *argv]
    try:
        options = parse(module.Options, argv, script or f"folio {command}", files=command in _TAKE_FILES)
    except SystemExit:  # after --help
        return 0
    return int(module.main(options) or 0)


def module_of(command: str) -> ModuleType:
    """A command's module, with its Options and main; import's is ``import_``."""
    room = "commands" if command in COMMANDS else "doors"
    return importlib.import_module(f"folio.{room}.{command}{'_' * keyword.iskeyword(command)}")


def parse(options: type, argv: list[str], prog: str, *, files: bool) -> Any:
    """Files and flags, left to right, to a command's options.

    Raises:
        ValueError, FileNotFoundError: what is wrong, in one line.
        SystemExit: after --help.
    """
    import tyro

    from folio.config import options as config

    flags: dict[str, str] = {}
    values: dict[str, Any] = {}
    names: dict[str, Any] = {}  # what a .py file finds assigned
    sources: dict[str, str] = {}
    rest: list[str] = []
    waiting = list(argv)
    while waiting:
        token = waiting.pop(0)
        if token in ("-h", "--help"):
            rest.append(token)
        elif token.startswith("--"):
            name, equals, value = token[2:].partition("=")
            name, known = name.replace("-", "_"), config.knobs(options)
            off = name.removeprefix("no_")
            if not equals and name not in known and off in known and _is_switch(known[off].type, []):
                name, equals, value = off, "=", "False"
            if name not in known:
                raise UserError(config.unknown(name, options))
            if not equals and _is_switch(known[name].type, waiting):
                value = "True"
            elif not equals:
                if not waiting:
                    raise UserError(f"--{name} needs a value: --{name}=…")
                value = waiting.pop(0)
            names[name] = config.typed_text(name, value, options)
            flags[name] = str(names[name])
            sources.pop(name, None)
            sources[name] = config.COMMAND_LINE
        elif files and not token.startswith("-"):
            read = config.read_file(token, options, ignore=config.TrainConfig, names=names)
            values.update(read)
            names.update(read)
            for name in read:
                flags.pop(name, None)
                sources.pop(name, None)  # so that they stand in the order in which they were given
                sources[name] = token
        else:
            rest.append(token)
    given = [*rest, *(f"--{name}={value}" for name, value in flags.items())]
    kwargs: dict[str, Any] = {"default": config.override(options(), values)} if files else {}
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parsed = tyro.cli(
                options,
                args=given,
                prog=prog,
                use_underscores=True,
                config=(tyro.conf.FlagConversionOff, tyro.conf.OmitArgPrefixes),
                **kwargs,
            )
    except SystemExit as stop:
        if stop.code:
            raise UserError(_one_line(said.getvalue())) from None
        raise
    if hasattr(parsed, "sources"):
        parsed.sources.update(sources)
    parsed = config.at_home(parsed)
    config.check(parsed)
    return parsed


def _is_switch(kind: Any, waiting: list[str]) -> bool:
    """Whether a flag without a value stands for True: one of a bool, with no value after it."""
    words = {"True", "False", "1", "0", *(word for choice in get_args(kind) for word in get_args(choice))}
    return (kind is bool or bool in get_args(kind)) and words.isdisjoint(waiting[:1])


def _one_line(box: str) -> str:
    """The message of tyro's error box, without the box and the help below it."""
    words: list[str] = []
    for line in box.splitlines()[1:]:
        text = line.strip("│╭╮╰╯─ ")
        if text.strip("-"):  # on a console that is not UTF-8, dashes part the box
            words.append(text)
        elif words:
            break
    return " ".join(words) or box.strip()


def _overview() -> str:
    width = max(map(len, COMMANDS))
    table = "\n".join(f"  {name:{width}}  {what}" for name, what in COMMANDS.items())
    return (
        "Folio trains GPT-2-class language models from scratch.\n\n"
        f"usage: folio COMMAND [FILE or PRESET …] [--option=value …]\n\n{table}\n\n"
        "folio COMMAND --help lists the options of a command. A yes-or-no option alone means yes: --overwrite; "
        "or no: --no-overwrite."
    )


def _describe(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        line = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        return line.replace("\n", "\\n")
    return " ".join(str(error).split())
