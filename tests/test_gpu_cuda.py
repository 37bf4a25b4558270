"""Rung 7: attention's CUDA C++ kernels on a GPU: what the CPU model runs, and larger calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_cuda import Case, cases, forward
from attention_cuda_backward import backward

from bigops.backends import cuda

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(cuda.why_not() is not None, reason=str(cuda.why_not())),
]

# (head size, rows, keys) of a tile, by kernel.
FORWARD = {
    "sm90": ((64, 192, 128), (96, 128, 128), (128, 128, 160), (128, 128, 128), (256, 128, 80)),
    "sm80": ((64, 128, 64), (96, 128, 64), (128, 128, 64), (256, 128, 64)),
}
BACKWARD = {
    "sm90": ((64, 128, 128), (96, 64, 128), (128, 64, 128), (256, 64, 64)),
    "sm80": ((64, 64, 128), (96, 64, 128), (128, 64, 128), (256, 32, 64)),
}
# More tiles than a GPU has multiprocessors.
LARGE = (
    Case(2, 16, 4, 2048, 2048, 128, causal=True),
    Case(4, 32, 32, 1000, 1000, 128, window=(100, 0)),
    Case(4, 32, 8, 600, 1000, 64, window=(100, 50), dtype=torch.float16),
    Case(heads=16, kv_heads=2, size=128, lengths=((5, 5), (0, 7), (130, 200), (300, 177)) * 8),
    Case(heads=16, kv_heads=2, size=64, lengths=((700, 900), (0, 7), (1, 0)) * 8, causal=True),
)


def params(tiles: dict[str, Any]) -> list[Any]:
    found = []
    for family, sizes in tiles.items():
        here = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
        marks = [pytest.mark.skipif(family == "sm90" and not here, reason="not a Hopper GPU")]
        chosen = dict.fromkeys(c for tile in sizes for c in cases(*tile))
        found += [
            pytest.param(family, c, id=f"{family}-{c}", marks=marks) for c in [*chosen, *LARGE]
        ]
    return found


def packed(starts: tuple[Any, ...]) -> Any:
    return None if starts[0] is None else tuple(starts)


def run_forward(family: str) -> Callable[..., None]:
    kernels = cuda.kernels()
    workspace = torch.full((kernels.FORWARD_WORKSPACE,), 255, dtype=torch.uint8, device="cuda")

    def run(*args: Any) -> None:
        tensors, options, starts = args[:5], args[5:10], args[10:]
        getattr(kernels, f"attention_forward_{family}")(
            *tensors, *options, packed(starts), workspace
        )

    return run


@pytest.mark.parametrize(("family", "case"), params(FORWARD))
def test_forward(family: str, case: Case) -> None:
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        judged, *got = forward(case, run_forward(family), "cuda")
        assert all(c.ok for c in judged), judged
        found.append(got)
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize(("family", "case"), params(BACKWARD))
def test_backward(family: str, case: Case, deterministic: bool) -> None:
    if case.keys == 1:
        pytest.skip("of a single key the gradients of query and key are nothing but rounding")
    name = f"attention_backward_{family}"
    kernels = cuda.kernels()

    def size(query: Any, key: Any, *starts: Any) -> int:
        return int(getattr(kernels, f"{name}_workspace")(query, key, packed(starts)))

    def run(*args: Any) -> None:
        tensors, options, starts = args[:10], args[10:15], args[15:19]
        getattr(kernels, name)(*tensors, *options, bool(args[19]), packed(starts), args[20])

    found = []
    for _ in range(2):
        torch.manual_seed(0)
        judged, got = backward(case, run, size, deterministic=deterministic, device="cuda")
        assert all(c.ok for c in judged), judged
        found.append(got)
    if deterministic:
        assert all(map(torch.equal, *found))
