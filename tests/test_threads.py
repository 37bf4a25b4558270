"""Several Python threads at once.

Any thread may call functions, run backward passes, step an optimizer of its own and ask `explain`:
the results are those of one thread alone, to the bit. Two things are the process's: the backend
that `use_backend` forces (a plain global, as Dynamo guards on no other kind) and torch's generator.
As everywhere in torch, what one thread writes, an optimizer's parameters say, no other one may use
meanwhile.

What could deadlock runs in a process of its own, `python tests/test_threads.py COUNT`.
"""

from __future__ import annotations

import faulthandler
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import bigops
from bigops.backends import native
from bigops.ops import dispatch, get, route
from bigops.ops.adam import adam, grad_norm

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))

WORKERS = 4
ROUNDS = 24
TIMEOUT = 120.0
Work = Callable[[], list[Tensor]]


def drawn(seed: int, *shape: int) -> Tensor:
    """Of a generator of its own: torch's is shared by all threads."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def differentiated(function: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
    leaves = [leaf.requires_grad_() for leaf in leaves]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]


def attention(seed: int) -> list[Tensor]:
    length = 65 + 8 * seed  # shapes differ, so that routes are left while others are looked up
    leaves = list(drawn(seed, 3, 2, 4, length, 32).unbind())
    return differentiated(lambda *t: bigops.attention(*t, causal=True), leaves)


def convolution(seed: int) -> list[Tensor]:
    leaves = [drawn(seed, 5, 3, 20 + seed, 21), drawn(seed, 24, 3, 3, 3), drawn(seed, 24)]
    pooled = differentiated(lambda *t: bigops.conv2d_relu_max_pool2d(*t, padding=1), leaves)
    return pooled + differentiated(bigops.conv2d_relu, [leaf.detach() for leaf in leaves])


def training(seed: int) -> list[Tensor]:
    params = [torch.nn.Parameter(drawn(seed, n)) for n in (70_001, 7, 40_000)]
    optimizer = bigops.optim.AdamW(params, lr=0.1, max_grad_norm=1.0)
    for step in range(3):
        for param in params:
            param.grad = drawn(step, param.numel())
        optimizer.step()
    return [p.detach() for p in params] + [optimizer.state[p]["exp_avg_sq"] for p in params]


def explained(seed: int) -> list[Tensor]:
    query = drawn(seed, 1, 2, 8, 16)
    assert bigops.explain(bigops.attention, query, query, query).backend == "native"
    assert bigops.explain(grad_norm, [query]).backend == "native"
    return []


WORK = (attention, convolution, training, explained)


def run_together(count: int) -> int:
    """All at once in fresh threads, each on `count` OpenMP threads; how much was compared."""
    torch.set_num_threads(count)
    route.MOST = 2  # so that routes come and go
    sys.setswitchinterval(1e-5)
    expected = [[work(seed) for work in WORK] for seed in range(WORKERS)]
    start = threading.Barrier(WORKERS)

    def rounds(seed: int) -> int:
        compared = 0
        start.wait()
        for i in range(ROUNDS):
            which = (i + seed) % len(WORK)  # every thread is at another op
            got = WORK[which](seed)
            for a, b in zip(got, expected[seed][which], strict=True):
                assert torch.equal(a, b), (WORK[which].__name__, seed)
                compared += 1
        return compared

    with ThreadPoolExecutor(WORKERS) as pool:
        return sum(pool.map(rounds, range(WORKERS)))


def in_a_process(*arguments: str, **environment: str) -> str:
    """The output; the stacks of all threads in the failure's message if it hangs."""
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=2 * TIMEOUT,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout.strip()


@pytest.mark.parametrize("count", [1, 2, 4])
def test_results_are_those_of_one_thread(count: int) -> None:
    assert int(in_a_process(__file__, str(count))) >= 100


NUMBER = """
import os, threading, torch, bigops
tasks = lambda: len(os.listdir("/proc/self/task"))
torch.set_num_threads(1)
query = torch.randn(1, 8, 256, 64)
before = tasks()
work = lambda: (bigops.attention(query, query, query), print(tasks() - before))
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


def test_number_of_threads_is_torchs_in_every_thread() -> None:
    """OpenMP itself would start three more for a thread that has not heard of set_num_threads."""
    assert in_a_process("-c", NUMBER, OMP_NUM_THREADS="4") == "1"


def test_explain_is_for_the_thread_that_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread's call goes on while one waits for its decision; so does a compiled one."""
    query = torch.randn(1, 2, 6, 8)
    expected = bigops.attention(query, query, query)
    compiled = torch.compile(bigops.attention, fullgraph=True, backend="eager")
    assert torch.equal(compiled(query, query, query), expected)
    monkeypatch.setattr(dispatch, "_explaining", threading.get_ident() + 1)
    assert torch.equal(bigops.attention(query, query, query), expected)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(compiled(query, query, query), expected)
    assert bigops.explain(bigops.attention, query, query, query).backend == "native"


def test_a_route_is_not_of_a_backend_that_was_forced_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another thread enters use_backend between the key and the choice of the backend."""
    op, query = get("attention"), torch.randn(1, 2, 6, 8)

    def forced() -> None:
        monkeypatch.setattr(dispatch, "_forced", "triton")

    monkeypatch.setattr(dispatch, "forced", forced)
    monkeypatch.setattr(op, "routes", {})
    options = (*(None,) * 7, -1, -1, False, 1.0, 0.0, 0.0)
    route.leave(op, (query,) * 3, (), (query, query, query, *options))
    (left,) = op.routes.values()
    assert left._forward is next(b.forward for b in op.backends if b.name == "native")


def long_call(name: str) -> Callable[[], object]:
    """Tens of milliseconds on one thread, nearly all of it in one native kernel."""
    query = torch.randn(1, 4, 2048, 64, requires_grad=True)
    image = torch.randn(64, 32, 56, 56)
    weight = torch.randn(64, 32, 3, 3, requires_grad=True)
    attended = bigops.attention(query, query, query)
    convolved = bigops.conv2d_relu_max_pool2d(image, weight)
    lists = [[torch.ones(12_000_000)] for _ in range(4)]
    calls: dict[str, Callable[[], object]] = {
        "attention": lambda: bigops.attention(query, query, query),
        "attention backward": lambda: attended.backward(attended),
        "convolution": lambda: bigops.conv2d_relu_max_pool2d(image, weight),
        "convolution backward": lambda: convolved.backward(convolved),
        "adam": lambda: adam(*lists, [], [torch.zeros(())]),
        "norm": lambda: grad_norm(lists[0] * 8),
    }
    return calls[name]


def longest_silence(call: Callable[[], object]) -> float:
    """The longest time that another thread stood still during the call, as a part of it."""
    ticks: list[float] = []
    stop = threading.Event()

    def tick() -> None:
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(1e-3)

    ticker = threading.Thread(target=tick)
    ticker.start()
    try:
        begin = time.perf_counter()
        call()
        end = time.perf_counter()
    finally:
        stop.set()
        ticker.join()
    seen = [begin, *(t for t in ticks if begin < t < end), end]
    return max(b - a for a, b in pairwise(seen)) / (end - begin)


@pytest.mark.parametrize(
    "name",
    ["attention", "attention backward", "convolution", "convolution backward", "adam", "norm"],
)
@pytest.mark.alone
def test_kernels_run_without_the_gil(name: str) -> None:
    """A loaded machine can keep the other thread waiting, but nothing lets it run if the GIL is
    held: one attempt that shows it at work is the proof."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found: list[float] = []
    try:
        long_call(name)()  # the first backward pass of a process does other work, too
        while not found or (min(found) > 0.5 and len(found) < 20):
            found.append(longest_silence(long_call(name)))
    finally:
        torch.set_num_threads(threads)
    assert min(found) <= 0.5, found


FIRST_CALL = """
import torch, bigops
torch.set_num_threads(2)
query, key, value = torch.randn(3, 16, 2, 49, 8).unbind()
with torch.no_grad(), bigops.use_backend("reference"):
    _, lse = bigops.attention(query, key, value, scale=3.0, return_lse=True)
exact = (query.double() @ key.double().mT * 3.0).logsumexp(-1)
assert (lse - exact).abs().max() < 3e-5
"""


def test_the_first_logarithm_of_a_process_is_right() -> None:
    """Without the line in bigops/reference/__init__.py one process of three fails."""
    command = [sys.executable, "-W", "ignore", "-c", FIRST_CALL]
    for _ in range(4):
        pair = [subprocess.Popen(command) for _ in range(2)]
        assert [process.wait() for process in pair] == [0, 0]


if __name__ == "__main__":
    faulthandler.dump_traceback_later(TIMEOUT, exit=True)
    print(run_together(int(sys.argv[1])))
