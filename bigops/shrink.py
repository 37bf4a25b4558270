"""The smallest call that still fails: random legal calls of an op, shrunk by hypothesis."""

from __future__ import annotations

import importlib.util
import random
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import check
from .ops import BackendError, Chooser, FallbackWarning, Op, Sample

EXAMPLES = 100
SECONDS = 15.0  # of looking and shrinking together; what is found by then is told
T = TypeVar("T")


class _Drawn:
    """A `Chooser` whose choices hypothesis makes, and shrinks."""

    def __init__(self, draw: Any) -> None:
        self._draw = draw

    def integer(self, low: int, high: int) -> int:
        from hypothesis import strategies

        return self._draw(strategies.integers(low, high))

    def choice(self, options: Sequence[T]) -> T:
        from hypothesis import strategies

        return self._draw(strategies.sampled_from(options))


def drawn(build: Callable[[Chooser], T]) -> Any:
    """Hypothesis' strategy of what `build` makes of a `Chooser`'s choices."""
    from hypothesis import strategies

    return strategies.composite(lambda draw: build(_Drawn(draw)))()


def smallest_failure(op: Op, backend: str, dtype: torch.dtype, device: str) -> Sample | None:
    """A call of `op` that fails on `backend` and whose simpler neighbours do not.

    None if the op does not declare `arbitrary`, hypothesis is not installed, or none of the random
    calls fails.
    """
    if op.arbitrary is None or importlib.util.find_spec("hypothesis") is None:
        return None
    from hypothesis import HealthCheck, errors, find, settings

    failed: list[Sample] = []
    end = time.monotonic() + SECONDS

    def condition(sample: Sample) -> bool:
        if time.monotonic() > end or not fails(op, sample, backend, dtype, device):
            return False
        failed.append(sample)
        return True

    quiet = settings(
        max_examples=EXAMPLES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    try:
        found = find(drawn(op.arbitrary), condition, settings=quiet, random=random.Random(0))
    except errors.NoSuchExample:
        return None
    except errors.Flaky:  # the time is over: the last one that failed is the smallest so far
        found = failed[-1]
    surely = fails(op, found, backend, dtype, device, check.check_arbitrary)
    return found if surely else None


def fails(
    op: Op,
    sample: Sample,
    backend: str,
    dtype: torch.dtype,
    device: str,
    judge: Callable[..., list[check.Comparison]] = check.check_sample,
) -> bool:
    """Whether the call, drawn as `bigops check` draws it, raises or is off its limit."""
    torch.manual_seed(check.SEED)
    if check.serves(op, sample, backend, dtype, device) is not None:
        return False
    torch.manual_seed(check.SEED)
    try:
        with warnings.catch_warnings(), check.nan_memory():
            warnings.simplefilter("ignore", FallbackWarning)
            return not all(c.ok for c in judge(op, sample, backend, dtype, device))
    except BackendError:
        return False
    except Exception:
        return True


def describe(op: Op, sample: Sample, dtype: torch.dtype) -> str:
    """The call in words: each tensor by its dtype, sizes and, unless contiguous, strides."""
    # Drawn on the CPU: after some failures a GPU answers nothing more.
    args, kwargs = sample.make("cpu", dtype)
    words = [_word(arg) for arg in args]
    words += [f"{name}={_word(value)}" for name, value in kwargs.items()]
    return f"{op.name}({', '.join(words)})"


def _word(value: Any) -> str:
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        strides = "" if value.is_contiguous() else f" strides {list(value.stride())}"
        return f"{dtype}{list(value.shape)}{strides}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_word, value))}]"
    return repr(value)
