"""``log.txt``, in the formats of build-nanogpt and of GPT-from-scratch: a record → its line, or ""."""

from __future__ import annotations

import math
import re

from folio.records.record import Record

LINE = re.compile(rb"(\d+ (train|val|hella) \S+|Epoch \d+ \| iter \d+ \| .+)?\s*")  # in either format


def build_nanogpt(record: Record) -> str:
    match record:
        case {"kind": "train", "step": step, "loss": float(loss)} if math.isfinite(loss):
            return f"{step} train {loss:.6f}"
        case {"kind": "eval", "step": step, "val_loss": float(loss)}:
            return f"{step} val {loss:.4f}"
        case {"kind": "hellaswag", "step": step, "acc_norm": float(acc_norm)}:
            return f"{step} hella {acc_norm:.4f}"
    return ""


def gpt_from_scratch(epoch: int, record: Record) -> str:
    step: int = record["step"]
    match record:
        case {"kind": "train", "loss": float(loss)} if math.isfinite(loss):
            number, step = divmod(step, epoch)
            return f"Epoch {number} | iter {step} | train loss: {loss:.6f}"
        case {"kind": "eval", "val_loss": float(loss)}:
            what = f"validation loss: {loss:.3f}"
        case {"kind": "hellaswag", "acc_norm": float(acc_norm)}:
            what = f"Hellaswag accuracy: {acc_norm:.3f}"
        case _:
            return ""
    number = max(0, step - 1) // epoch  # weights after an epoch's last step are still that epoch's
    return f"Epoch {number} | iter {step - number * epoch} | {what}"
