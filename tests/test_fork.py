"""Ops in a forked child, as a DataLoader's workers call them.

A child on one thread is safe, whatever the parent did before: a DataLoader sets its workers to one
thread by itself, after a bare os.fork torch.set_num_threads(1) does. A child on several threads is
not, once the parent has used several: fork copies only the thread that calls it, and OpenMP waits
for the others for ever. That is so for torch's own ops too, and why the start method must be
"spawn" or "forkserver" for them.

Each test runs in a process of its own, which has a time limit: what goes wrong with fork hangs.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import bigops
from bigops.backends import native

pytestmark = [
    pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not())),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork"),
]

TIMEOUT = 60.0
ITEMS = 6


def work(seed: int) -> Tensor:
    """Every op's forward and backward pass, and a step; large enough for a second thread."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).requires_grad_()

    query, key, value = (drawn(1, 4, 130, 32) for _ in range(3))
    image, weight, bias = drawn(4, 3, 30, 30), drawn(16, 3, 3, 3), drawn(16)
    leaves = [query, key, value, image, weight, bias]
    outs = [
        bigops.attention(query, key, value, causal=True),
        bigops.conv2d_relu(image, weight, bias),
        bigops.conv2d_relu_max_pool2d(image, weight, bias, padding=1),
    ]
    sum(out.sum() for out in outs).backward()  # type: ignore[union-attr]
    bigops.optim.AdamW(leaves, max_grad_norm=1.0).step()
    return torch.cat([t.detach().flatten() for t in (*outs, *leaves)])


class Items(Dataset[Tensor]):
    def __len__(self) -> int:
        return ITEMS

    def __getitem__(self, index: int) -> Tensor:
        return work(index)


def start_a_pool() -> list[Tensor]:
    """What one thread computes; then the parent's pool has been used, forward and backward."""
    torch.set_num_threads(1)
    expected = [work(seed) for seed in range(ITEMS)]
    torch.set_num_threads(3)
    work(0)
    assert len(os.listdir("/proc/self/task")) >= 3, "no pool was started"
    return expected


def data_loader() -> None:
    expected = start_a_pool()
    loader = DataLoader(
        Items(), None, num_workers=2, multiprocessing_context="fork", timeout=TIMEOUT / 2
    )
    for _ in range(2):
        for got, want in zip(loader, expected, strict=True):
            assert torch.equal(got, want)
    work(0)  # the parent's pool is as it was


def bare_fork() -> None:
    expected = start_a_pool()
    pid = os.fork()
    if pid == 0:
        signal.alarm(int(TIMEOUT / 2))  # ends it; the parent's watchdog thread has not come along
        torch.set_num_threads(1)
        same = all(torch.equal(work(seed), want) for seed, want in enumerate(expected))
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    work(0)


SCENES: dict[str, Callable[[], None]] = {"data loader": data_loader, "bare fork": bare_fork}


@pytest.mark.parametrize("scene", SCENES)
def test_child_on_one_thread(scene: str) -> None:
    done = subprocess.run(
        [sys.executable, __file__, scene],
        capture_output=True,
        text=True,
        check=False,
        timeout=2 * TIMEOUT,
    )
    assert done.returncode == 0, done.stderr[-6000:]


if __name__ == "__main__":
    faulthandler.dump_traceback_later(TIMEOUT, exit=True)
    SCENES[sys.argv[1]]()
