"""Goals for tests: apart from these, for the processes that import them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from functools import partial

import torch

from bigops.bench import goals


def lines() -> Iterator[tuple[torch.dtype, goals.Goal]]:
    """Calls that wait."""
    for name in ("waiting", "left out", "waiting, too"):
        slow = {"slow": partial(time.sleep, 0.1), "slower": partial(time.sleep, 0.3)}
        yield torch.float32, (name, lambda: partial(time.sleep, 0.01), partial(dict, slow))


def tell(call: goals.Call) -> str:
    """Which process calls."""
    call()
    return f"process {os.getpid()}"
