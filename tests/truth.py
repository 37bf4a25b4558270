"""The project's error rule for several calls of a function, put together."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bigops import check

Run = Callable[[], dict[str, Tensor]]


def assert_as_true(
    got: list[dict[str, Tensor]],
    eager: list[dict[str, Tensor]],
    want: list[dict[str, Tensor]],
    moved: list[Run] | None = None,
) -> None:
    """Each tensor of several calls, by name; `want` is in float64.

    Calls are judged together, as the maximal error of a small tensor is a matter of luck. What
    fails is judged once more as `check.check_arbitrary` does, and for its reason (attention that
    saves no weights loses more than eager where nearly all weight of a row is on one key), if
    `moved` gives what moving the inputs by an ulp makes of `want`.
    """
    assert got[0].keys() == eager[0].keys() == want[0].keys()
    for one, same in zip((*got, *eager), (*want, *want), strict=True):
        assert {n: t.shape for n, t in one.items()} == {n: t.shape for n, t in same.items()}
    assert {n: t.dtype for n, t in got[0].items()} == {n: t.dtype for n, t in eager[0].items()}

    def joined(calls: list[dict[str, Tensor]], name: str) -> Tensor:
        return torch.cat([call[name].flatten() for call in calls])

    def judged(name: str, *more: Tensor) -> check.Comparison:
        return check.compare(name, *(joined(way, name) for way in (got, eager, want)), *more)

    failed = [name for name in want[0] if not judged(name).ok]
    if failed and moved is not None:
        runs = [run() for run in moved]
        failed = [name for name in failed if not judged(name, joined(runs, name)).ok]
    assert not failed, [judged(name) for name in failed]


def nudged(t: Tensor) -> Tensor:
    """Each element an ulp of float32 up or down, in float64."""
    signs = torch.randint(2, t.shape) * 2.0 - 1.0
    return t.detach().double() * (1.0 + check.EPS * signs)
