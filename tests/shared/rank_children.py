"""Processes that are the ranks of one world, as torchrun would start them."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence

from children import Child


def start_ranks(
    command: Sequence[str], ranks: int, more: Callable[[int], Sequence[str]] = lambda rank: ()
) -> list[Child]:
    """more: further arguments of a rank."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment["WORLD_SIZE"] = str(ranks)
    return [
        Child([*command, *more(rank)], environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(ranks)
    ]
