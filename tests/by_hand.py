"""What tells ranks about each other if no launcher starts them."""

from __future__ import annotations

import socket


def by_hand_variables(rank: int, world: int, port: int) -> dict[str, str]:
    there = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in there.items()}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
