"""How an option is declared, and the options that several commands declare."""

from __future__ import annotations

from dataclasses import field
from typing import Any, Literal

HellaSwagStyle = Literal["completion", "harness"]
TokenDtype = Literal["auto", "uint8", "uint16", "uint32", "int32", "int64"]
Weights = Literal["trained", "ema"]
MFU = 0.4  # share of a device's peak that training reaches, where nothing else is known
Role = Literal["call", "machine", "data", ""]
# The part of an option's value that is a path: all of it, each part between commas, or the text after FILE:
ITSELF, EACH, AFTER_FILE = "itself", "each", "FILE:"


def option(default: Any, help: str, *, role: Role = "", **more: Any) -> Any:
    """A dataclass field with its help, on one line, and other metadata.

    Args:
        default: Its value if none is given; ``dataclasses.MISSING`` if one is required.
        help: What it is; ``--help`` shows it after the unit ("steps" + "between evaluations").
        role: ``"call"``: holds for one call, and the run does not keep it. ``"machine"``: how this machine computes;
            a foreign run's value is not read. ``"data"``: where the run's data is.
        more: ``unit``; bounds (``min`` ≤ value ≤ ``max``, value > ``above``, value < ``below``); ``details`` that
            ``--help=NAME`` adds; ``advanced``: listed by ``--help=all`` only; ``nanogpt``: nanoGPT has it, with this
            name and default; ``public``: exports include it; ``local``: ranks may differ in it; ``path``: which part
            of it is a path (ITSELF, EACH or AFTER_FILE); ``none``: what None stands for, if neither auto nor an empty
            default; ``positional``: it is a positional argument, shown as this; ``short``: a second spelling, such as
            ``-o``; ``of``: it applies only to these values of the command's first argument; ``listed``: (title,
            lines by name), values that ``--help`` lists in a section of their own; ``inherited``: a source whose value
            replaces the default, such as "the run's"; ``unused``: names of options in a group that the command ignores.
    """
    return field(default=default, metadata={"help": help, "role": role, **more})


def out_dir_option(**more: Any) -> Any:
    """The run's folder, for the groups and commands that have this option."""
    return option("out", "folder of the run", path=ITSELF, role="call", local=True, nanogpt=True, **more)


def depth_option() -> Any:
    return option(
        0,
        "layers; sets size, rates and steps",
        details="0: off. It sets some 30 options by the rules in docs/depth.md; folio plan lists them. The command "
        "line and later files override it; it overrides earlier files.",
        min=0,
        max=100,
    )


def max_flops_option() -> Any:
    return option(
        0.0,
        "most floating-point operations of a run with depth; 0: no limit",
        details="It limits the steps that depth sets. Two CPU cores do about 5e13 in up to 20 minutes, a laptop's "
        "GPU about 5e16 in an hour.",
        min=0,
        advanced=True,
    )


def checkpoint_option() -> Any:
    return option("best", "best | latest | a step")


def weights_option() -> Any:
    return option("trained", "trained | ema: their moving average", details="ema needs a run with --ema_decay.")


def hellaswag_style_option(**more: Any) -> Any:
    return option(
        "completion",
        "completion | harness: how items are scored",
        details="completion: as build-nanogpt does; harness: as the lm-evaluation-harness (acc_norm by characters)",
        **more,
    )


def hellaswag_data_option(**more: Any) -> Any:
    return option(
        "",
        "file of HellaSwag items",
        details="default: data/hellaswag/hellaswag_val.jsonl, downloaded if necessary",
        path=ITSELF,
        local=True,
        **more,
    )


def token_dtype_option(**more: Any) -> Any:
    return option(
        "auto",
        "of the ids in .bin files without a header",
        details="auto: uint16, as in nanoGPT's files; else uint8, uint16, uint32, int32 or int64",
        unit="type",
        **more,
    )
