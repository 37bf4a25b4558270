"""Cases of many factors that cover every pair of their values."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

Factors = dict[str, tuple[Any, ...]]
Pair = tuple[tuple[str, Any], tuple[str, Any]]


def pairs(case: Any) -> Iterator[Pair]:
    """The pairs of values that a case, a named tuple, covers."""
    yield from itertools.combinations(zip(case._fields, case, strict=True), 2)


def every_pair(factors: Factors) -> Iterator[Pair]:
    """Those of all values."""
    for (a, xs), (b, ys) in itertools.combinations(factors.items(), 2):
        yield from (((a, x), (b, y)) for x, y in itertools.product(xs, ys))


def covering(
    wanted: set[Pair],
    drawn: Callable[[random.Random, bool], Any],
    cost: Callable[[Any], float],
    at_least: int,
    legal: Callable[[Any], bool] = lambda case: True,
    seed: int = 0,
) -> list[Any]:
    """Cases that cover all pairs of `wanted` at little cost, `at_least` in all.

    drawn(draw, filling) is a random case, `filling` once all pairs are covered; a pair that none
    of them has is put into those that stay `legal` with it.
    """
    wanted, draw = set(wanted), random.Random(seed)
    cases: dict[Any, None] = {}

    def worth(case: Any) -> float:
        return len(wanted.intersection(pairs(case))) / cost(case)

    while wanted or len(cases) < at_least:
        found = [drawn(draw, not wanted) for _ in range(40)]
        if wanted and not any(worth(case) for case in found):
            a, b = min(wanted, key=str)
            found = list(filter(legal, (case._replace(**dict((a, b))) for case in found)))
        if not found:
            continue
        best = max(found, key=worth)
        wanted.difference_update(pairs(best))
        cases[best] = None
    return list(cases)
