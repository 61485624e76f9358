"""A notebook's kernel: runs cells, and interrupts one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Kernel:
    """Jupyter's own kernel for Python, in a process of its own."""

    def __init__(self, manager: Any, client: Any) -> None:
        self._manager, self._client = manager, client

    def run(self, source: str, interrupt_at: str = "", timeout: float = 120) -> tuple[str, list[dict[str, Any]]]:
        """Runs a cell: its text, and its displays with their MIME types, each as it was last.

        As soon as the text has ``interrupt_at``, the kernel is interrupted, as by the stop button.
        """
        message, text, shown = self._client.execute(source), "", {}
        end = time.monotonic() + timeout
        while True:
            found = self._client.get_iopub_msg(timeout=max(0.1, end - time.monotonic()))
            content, kind = found["content"], found["msg_type"]
            if found["parent_header"].get("msg_id") != message:
                continue
            if kind == "stream":
                text += content["text"]
            elif kind == "error":
                text += "\n".join(content["traceback"])
            elif kind in ("display_data", "update_display_data", "execute_result"):
                name = content.get("transient", {}).get("display_id", len(shown))
                shown[name] = content["data"]
            elif kind == "status" and content["execution_state"] == "idle":
                return text, list(shown.values())
            if interrupt_at and interrupt_at in text:
                interrupt_at = ""
                self._manager.interrupt_kernel()


@contextmanager
def kernel(folder: Path) -> Iterator[Kernel]:
    """A kernel that works in this folder."""
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(kernel_name="python3", cwd=str(folder))
    try:
        yield Kernel(manager, client)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
