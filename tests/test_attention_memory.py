"""attention's memory and time: at most linear beside inputs and outputs, and what the mask leaves.

Memory is the growth of a fresh process; time is the processor's, of all threads, which other
processes on the machine change little.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

GROWTH = """
import json, resource, sys, torch, bigops
length, dtype, kwargs = int(sys.argv[1]), getattr(torch, sys.argv[2]), json.loads(sys.argv[3])
learned = kwargs.pop("bias", False)
packed = kwargs.pop("packed", False)
leaves = [torch.randn(1, 1, length, 64).to(dtype).requires_grad_() for _ in "qkv"]
if learned:
    kwargs["bias"] = torch.randn(1, 1, 1, length).to(dtype).requires_grad_()
grad = torch.randn(1, 1, length, 64).to(dtype)
def run(n):
    q, k, v = (t[:, :, :n] for t in leaves)
    if packed:
        starts = torch.tensor([0, n // 4, n], dtype=torch.int32)
        q, k, v = (t[0].transpose(0, 1) for t in (q, k, v))
        out = bigops.varlen_attention(q, k, v, starts, starts, n, n, **kwargs)
        out.backward(grad[0, :, :n].transpose(0, 1))
    else:
        own = {"bias": kwargs["bias"][..., :n]} if learned else {}
        bigops.attention(q, k, v, **kwargs | own).backward(grad[:, :, :n])
run(128)
for t in leaves:
    t.grad = None
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(length)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def growth(length: int, dtype: str, **kwargs: object) -> float:
    """Bytes by which a fresh process grows for a forward and backward pass."""
    done = subprocess.run(
        [sys.executable, "-c", GROWTH, str(length), dtype, json.dumps(kwargs)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "BIGOPS_BACKEND": "native"},
    )
    return float(done.stdout)


CALLS = {
    "causal": {"causal": True},
    "window": {"causal": True, "window_size": [512, -1]},
    "learned bias, dropout": {"causal": True, "bias": True, "dropout_p": 0.1},
    "packed": {"causal": True, "packed": True},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("call", CALLS)
def test_memory_is_linear(call: str, dtype: str) -> None:
    """At 32768 the scores would be 4 GiB. What is made: out, three gradients and the slices' own,
    lse and delta, an fp32 sum of query's gradient, keys and values packed once."""
    tensor = 32768 * 64 * (4 if dtype == "float32" else 2)
    assert growth(32768, dtype, **CALLS[call]) < 14 * tensor


TIME = """
import json, sys, time, torch, bigops
torch.set_num_threads(2)
dtype, kwargs = getattr(torch, sys.argv[1]), json.loads(sys.argv[2])
def seconds(length):
    leaves = [torch.randn(1, 2, length, 64).to(dtype).requires_grad_() for _ in "qkv"]
    best = float("inf")
    for _ in range(5):
        began = time.process_time()
        bigops.attention(*leaves, **kwargs).sum().backward()
        best = min(best, time.process_time() - began)
    return best
seconds(256)
print(json.dumps([seconds(length) for length in (1024, 2048, 4096)]))
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("kwargs", "factor"),
    [({"causal": True}, 4.0), ({}, 4.0), ({"causal": True, "window_size": [128, -1]}, 2.0)],
    ids=["causal", "full", "window"],
)
@pytest.mark.alone
def test_time_grows_as_the_work_does(dtype: str, kwargs: dict[str, object], factor: float) -> None:
    """By the factor for twice the length, and by a quarter more at most; a window's by no square.

    A disturbed measurement can only be too long, so the first of three that holds is the proof.
    """
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", TIME, dtype, json.dumps(kwargs)],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "BIGOPS_BACKEND": "native", "OMP_WAIT_POLICY": "passive"},
        )
        short, twice, four = json.loads(done.stdout)
        ratios = twice / short, four / twice
        if max(ratios) < 1.25 * factor:
            return
    raise AssertionError(f"twice the length took {ratios} times as long")
